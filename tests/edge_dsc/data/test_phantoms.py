from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_dsc.data import discover, split_dataset
from edge_dsc.data.loading import load_images
from edge_dsc.data.phantoms import CLASSES, draw_phantom, write_phantoms
from engines.contract import ModelContract
from engines.errors import UsageError
from engines.files import sha256_file


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "data"
    write_phantoms(root, 20, seed=1)
    return root


def hashes(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in root.rglob("*.*")}


def test_what_is_written(phantoms: Path) -> None:
    dataset = discover(phantoms)
    assert dataset.labels == CLASSES == ("clear", "diffuse", "focal")
    assert len(dataset.samples) == 60
    assert not dataset.ignored
    with (phantoms / "groups.csv").open() as stream:
        rows = {(row["class"], row["file"]): row["patient"] for row in csv.DictReader(stream)}
    assert {f"{label}/{file}": patient for (label, file), patient in rows.items()} == {
        sample.path: sample.patient for sample in dataset.samples
    }
    images = [len([s for s in dataset.samples if s.patient == patient]) for patient in set(rows.values())]
    assert set(images) == {1, 2, 3}
    split_dataset(dataset, 0)


def test_files_differ_in_kind_colour_and_size(phantoms: Path) -> None:
    paths = [phantoms / sample.path for sample in discover(phantoms).samples]
    assert {path.suffix for path in paths} == {".png", ".jpg"}
    decoded = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths]
    assert {image.ndim for image in decoded} == {2, 3}
    sides = np.array([image.shape[:2] for image in decoded])
    assert sides.min() >= 256
    assert sides.max() <= 512
    assert len(set(map(tuple, sides))) > 20


def test_the_same_seed_draws_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        write_phantoms(tmp_path / name, 3, seed=seed)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert hashes(tmp_path / "one") != hashes(tmp_path / "other")


def test_brightness_and_contrast_alone_tell_nothing(phantoms: Path) -> None:
    dataset = discover(phantoms)
    contract = ModelContract(labels=dataset.labels, architecture="dsc")
    pixels = load_images(phantoms, dataset.samples, contract).pixels.reshape(60, -1)
    targets = np.array([dataset.labels.index(sample.label) for sample in dataset.samples])
    figures = np.stack([pixels.mean(axis=1), pixels.std(axis=1)], axis=1)
    figures = (figures - figures.mean(axis=0)) / figures.std(axis=0)
    distances = ((figures[:, None] - figures[None]) ** 2).sum(axis=2) + np.eye(60) * 1e9
    nearest = targets[distances.argsort(axis=1)[:, :5]]
    guesses = [np.bincount(row, minlength=3).argmax() for row in nearest]
    assert np.mean(guesses == targets) < 0.6


def test_a_stain_vanishes_in_the_luma_and_shows_when_red_and_blue_are_swapped(phantoms: Path) -> None:
    paths = [
        path for path in phantoms.rglob("*.png") if cv2.imread(str(path), cv2.IMREAD_UNCHANGED).ndim == 3
    ]
    assert paths
    for path in paths:
        colour = cv2.imread(str(path), cv2.IMREAD_COLOR)
        grey = colour[:, :, 1].astype(int)  # the stain leaves green as it was
        right = cv2.cvtColor(colour, cv2.COLOR_BGR2GRAY).astype(int)
        swapped = cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY).astype(int)
        assert np.abs(right - grey).max() <= 2
        assert np.abs(swapped - grey).mean() > 3


@pytest.mark.parametrize("label", CLASSES)
def test_one_phantom(label: str) -> None:
    image = draw_phantom(label, 3)
    assert image.dtype == np.uint8
    assert image.ndim == 2
    assert np.array_equal(image, draw_phantom(label, 3))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"0 phantoms a class \(ask for at least 1\)"):
        write_phantoms(tmp_path, 0, seed=0)
    (tmp_path / "mine.png").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"is not an empty folder \(choose a new folder"):
        write_phantoms(tmp_path, 1, seed=0)


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls = []
    write_phantoms(tmp_path / "data", 2, seed=0, progress=lambda *call: calls.append(call))
    assert calls == [("drawing phantoms", done, 6) for done in range(1, 7)]
