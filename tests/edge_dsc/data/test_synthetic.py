"""The mark in a synthetic image's file, its folder's record, and every command that must not have one."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from msgspec.structs import replace

from edge_dsc.build.adopt import _fit_temperature
from edge_dsc.data.discover import discover
from edge_dsc.data.loading import load_dataset, load_synthetic
from edge_dsc.data.synthetic import (
    RECORD_FILE,
    SYNTHESIS,
    SynthesisRecord,
    SyntheticImage,
    Worth,
    encode_marked,
    is_synthetic,
    load_synthesis,
)
from engines.errors import ArtefactError, BadInputError
from engines.files import sha256_bytes
from engines.graph import load_model

PIXELS = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
GENERATOR = "5" * 64
MARKED = encode_marked(PIXELS, seed=3, draw=7, generator_sha256=GENERATOR)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Every chunk of a PNG file with its text, its checksum proven."""
    place, found = 8, []
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length) == (zlib.crc32(kind + data),)
        found.append((kind, data))
        place += 12 + length
    return found


def test_a_marked_image_is_a_whole_png_that_says_what_made_it() -> None:
    found = chunks(MARKED)
    assert [kind for kind, _ in found[:2]] == [b"IHDR", b"tEXt"]
    assert found[-1] == (b"IEND", b"")
    words = f"Comment\0edge-dsc synthetic image; seed 3; draw 7; generator {GENERATOR}"
    assert found[1][1] == words.encode()
    decoded = cv2.imdecode(np.frombuffer(MARKED, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, PIXELS)


def test_the_mark_is_seen_in_the_file_whatever_its_name(tmp_path: Path) -> None:
    plain = bytes(cv2.imencode(".png", PIXELS)[1])
    jpeg = bytes(cv2.imencode(".jpg", PIXELS)[1])
    words = b"edge-dsc synthetic image; seed 3"
    converted = jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(words)) + words + jpeg[2:]
    os.mkfifo(tmp_path / "pipe.png")
    files = {
        "a.png": (MARKED, True),
        "b.jpg": (MARKED, True),
        "c.png": (plain, False),
        "d.jpg": (jpeg, False),
    }
    files |= {"e.jpg": (converted, True), "f.png": (b"", False), "g.png": (MARKED[:100], True)}
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    assert {name: is_synthetic(tmp_path / name) for name in files} == {
        name: marked for name, (_, marked) in files.items()
    }
    assert not any(is_synthetic(tmp_path / name) for name in ("pipe.png", "missing.png", "."))


@pytest.fixture
def mixed_up(textures: Path, tmp_path: Path) -> Path:
    """A folder of real images with a synthetic one among them."""
    folder = Path(shutil.copytree(textures, tmp_path / "data"))
    (folder / "focal" / "unseen.png").write_bytes(MARKED)
    return folder


REFUSED = (
    "data holds a synthetic image, focal/unseen.png (take them out of the folder: they can train, with train"
)


@pytest.mark.parametrize("read", [discover, load_dataset])
def test_a_data_folder_with_a_synthetic_image_is_refused(
    mixed_up: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(BadInputError, match=r"holds a synthetic image, focal/unseen.png") as caught:
        read(mixed_up)
    assert caught.value.remedy.endswith("with train --synthetic DIR, and nothing else")
    (mixed_up / "clear" / "another.png").write_bytes(MARKED)
    with pytest.raises(BadInputError, match=r"holds 2 synthetic images, such as clear/another.png"):
        read(mixed_up)


@pytest.mark.parametrize(
    ("purpose", "words"),
    [
        ("train", "train {data}"),
        ("choose an epoch", "train {data} --arch cnn --fold 1/2"),
        ("learn to make images", "synthesize {data} --class clear"),
        ("choose layers", "build-engine {run} --precision mixed --validate {data} --backend onnxruntime"),
        ("calibrate", "calibrate {run} --calib-data {data}"),
        ("calibrate a build", "build-engine {run} --int8 --calib-data {data} --backend onnxruntime"),
        ("look for the layer", "debug {run} --calib-data {data}"),
        ("judge an engine", "build-engine {run} --int8 --validate {data} --backend onnxruntime"),
        ("judge", "evaluate {run}/dsc-fp32.onnxruntime.engine {data}"),
        ("compare networks", "study {data} --plan"),
    ],
)
@pytest.mark.slow
def test_no_purpose_gets_one_from_a_data_folder(
    mixed_up: Path, built_run: Path, tmp_path: Path, edge_dsc: Any, purpose: str, words: str
) -> None:
    run = shutil.copytree(built_run, tmp_path / "run")
    words += "" if "study" in words or "evaluate" in words else " --out {out}"
    done = edge_dsc(*words.format(data=mixed_up, run=run, out=tmp_path / "out").split())
    assert (done.code, done.out) == (9, ""), (purpose, done)
    assert REFUSED in done.err and done.err.splitlines()[-1].startswith("error: "), (purpose, done.err)


def test_no_temperature_is_fitted_on_one(mixed_up: Path, deployed_models: dict[str, Path]) -> None:
    """As ``adopt --fit-on`` does once the foreign model is converted."""
    with pytest.raises(BadInputError, match=r"holds a synthetic image, focal/unseen.png"):
        _fit_temperature(load_model(deployed_models["dsc"]), mixed_up)


def record_of(*images: SyntheticImage) -> SynthesisRecord:
    return SynthesisRecord(
        label="focal",
        labels=("clear", "diffuse", "focal"),
        settings={"architecture": "depthwise-began", "size": 64, "gamma": 0.5},
        seed=3,
        split_sha256="1" * 64,
        seen=("2" * 64, "3" * 64),
        generator_sha256=GENERATOR,
        asked=len(images),
        images=images,
        history={"convergence": [0.5, 0.25]},
        best_epoch=2,
        ended="epochs",
        seconds=1.5,
        costs=(),
        worth=Worth(
            real=2,
            copies=0,
            copy_below=4.0,
            nearest=9.0,
            nearest_real=8.0,
            similarity=0.5,
            similarity_real=0.25,
            scales=3,
        ),
        versions={"python": "3.11"},
        created="2026-01-01T00:00:00+00:00",
        edge_dsc="0.1.0",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record and its one image."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000007.png").write_bytes(MARKED)
    image = SyntheticImage(
        path="images/000007.png",
        sha256=sha256_bytes(MARKED),
        draw=7,
        nearest_sha256="2" * 64,
        distance=9.0,
    )
    SYNTHESIS.save(tmp_path / RECORD_FILE, record_of(image))
    return tmp_path


def test_synthetic_images_are_read_by_their_record(folder: Path) -> None:
    record = load_synthesis(folder)
    assert record == record_of(*record.images)
    pixels = load_synthetic(folder, record, size=64)
    assert pixels.shape == (1, 64, 64, 1) and np.array_equal(pixels[0, :, :, 0], PIXELS)
    assert load_synthetic(folder, record, size=224).shape == (1, 224, 224, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda file: file.write_bytes(MARKED[:-20] + b"!" * 20),
            "is not the image that synthesis.json names",
        ),
        (lambda file: file.write_bytes(cv2.imencode(".png", PIXELS)[1]), "is not the image"),
        (lambda file: file.unlink(), "synthesis.json names: .* does not exist"),
    ],
)
def test_an_image_that_is_not_the_one_of_the_record_is_refused(
    folder: Path, change: Callable[[Path], object], words: str
) -> None:
    change(folder / "images" / "000007.png")
    with pytest.raises(ArtefactError, match=words) as caught:
        load_synthetic(folder, load_synthesis(folder), size=64)
    assert caught.value.remedy == "make them again: edge-dsc synthesize DATA --class CLASS --overwrite"


def test_an_edited_record_is_refused(folder: Path) -> None:
    document = json.loads((folder / RECORD_FILE).read_text())
    document["seen"] = []
    (folder / RECORD_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match="was edited after it was made"):
        load_synthesis(folder)
    (folder / RECORD_FILE).unlink()
    with pytest.raises(ArtefactError, match=r"cannot read .*synthesis.json: No such file"):
        load_synthesis(folder)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "images/../../x.png"])
def test_a_record_that_leaves_its_folder_is_refused(folder: Path, path: str) -> None:
    (image,) = load_synthesis(folder).images
    SYNTHESIS.save(folder / RECORD_FILE, record_of(replace(image, path=path)))
    with pytest.raises(ArtefactError, match="outside its folder"):
        load_synthesis(folder)
