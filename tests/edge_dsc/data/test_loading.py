from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_dsc.data import Sample, discover
from edge_dsc.data.loading import load_dataset, load_images
from engines import images
from engines.contract import ModelContract
from engines.errors import BadInputError
from engines.files import sha256_bytes
from engines.images import read_input

CONTRACT = ModelContract(labels=("a", "b"), architecture="dsc")


def sample(name: str) -> Sample:
    return Sample(path=name, label="a", patient=name, sha256="")


def test_order_is_kept_and_damaged_files_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(9):
        cv2.imwrite(str(tmp_path / f"{index}.png"), rng.integers(0, 256, (240 + index, 300), np.uint8))
    (tmp_path / "4.png").write_bytes(b"no image")
    (tmp_path / "6.png").write_bytes(b"")
    calls = []
    loaded = load_images(
        tmp_path,
        [sample(f"{index}.png") for index in range(9)],
        CONTRACT,
        progress=lambda *call: calls.append(call),
    )
    assert [kept.path for kept in loaded.samples] == [f"{index}.png" for index in (0, 1, 2, 3, 5, 7, 8)]
    assert [path for path, _ in loaded.skipped] == ["4.png", "6.png"]
    assert "4.png is damaged or no image (8 bytes" in loaded.skipped[0][1]
    assert "6.png is empty (0 bytes)" in loaded.skipped[1][1]
    assert loaded.pixels.shape == (7, 224, 224, 1)
    assert loaded.pixels.dtype == np.uint8
    for pixels, kept in zip(loaded.pixels, loaded.samples, strict=True):
        assert np.array_equal(pixels, read_input(tmp_path / kept.path, CONTRACT))
    assert calls == [("reading images", done, 9) for done in range(1, 10)]


def test_not_one_readable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"none of 2 images below .* can be read: .*x\.png is empty"):
        load_images(tmp_path, [sample("x.png"), sample("y.png")], CONTRACT)


def test_a_dataset_and_its_pixels_come_of_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(4):
            cv2.imwrite(str(tmp_path / label / f"{index}.png"), rng.integers(0, 256, (230, 240), np.uint8))
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    (tmp_path / "b" / "copy.png").write_bytes((tmp_path / "a" / "1.png").read_bytes())
    found = discover(tmp_path)
    opened: list[Path] = []
    read = images.read_regular
    monkeypatch.setattr(images, "read_regular", lambda path, most: opened.append(path) or read(path, most))
    dataset, loaded = load_dataset(tmp_path)
    assert sorted(opened) == [tmp_path / sample.path for sample in found.samples]  # each file once
    assert dataset == found
    assert [path for path, _ in loaded.skipped] == ["a/2.png"]
    assert loaded.samples == tuple(sample for sample in found.samples if sample.path != "a/2.png")
    again = load_images(tmp_path, found.samples, CONTRACT)
    assert np.array_equal(loaded.pixels, again.pixels)
    assert (loaded.samples, loaded.skipped) == (again.samples, again.skipped)


def test_files_without_readable_content_have_a_hash_or_are_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        cv2.imwrite(str(tmp_path / name), np.zeros((40, 40), np.uint8))
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    dataset, loaded = load_dataset(tmp_path)
    assert dataset.samples[1].sha256 == sha256_bytes(b"")
    assert len(loaded.samples) == 2
    (tmp_path / "a" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BadInputError, match=r"cannot read .*broken\.png: No such file.*remove it"):
        load_dataset(tmp_path)
