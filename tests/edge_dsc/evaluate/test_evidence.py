"""Where the evidence lies, of a network that looks at one place and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edge_dsc.evaluate.evidence import ExplainedImages, evidence_table, measure_evidence
from engines.contract import ModelContract
from engines.record import BatchRange

CONTRACT = ModelContract(labels=("dark", "light"), architecture="stub", height=56, width=56)


class Looking:
    """Calls a picture light as one tile of 8x8 pixels is, by the tile's row and column; it counts the batches."""

    def __init__(self, place: tuple[int, int], batch: BatchRange, contract: ModelContract = CONTRACT) -> None:
        self.record: Any = type("Record", (), {"contract": contract, "batch": batch})()
        self._place, self.sizes = place, list[int]()

    def run(self, pixels: np.ndarray) -> np.ndarray:
        self.sizes.append(len(pixels))
        planes = pixels.reshape(len(pixels), 56, 56)
        row, column = (8 * place for place in self._place)
        light = planes[:, row : row + 8, column : column + 8].mean(axis=(1, 2)) / 420
        return np.stack([1 - light, light], axis=1).astype(np.float32)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six pictures, each light in the corner and in the middle, grey elsewhere."""
    paths = []
    for number in range(6):
        picture = np.full((56, 56), 20 + number, np.uint8)
        picture[:8, :8] = picture[24:32, 24:32] = 250  # on their own: blurred, they are dark
        paths.append(tmp_path / f"{number}.png")
        cv2.imwrite(str(paths[-1]), picture)
    return paths


def explained(images: list[Path], place: tuple[int, int]) -> ExplainedImages:
    evidence = np.zeros((len(images), 7, 7), np.float32)
    evidence[:, place[0], place[1]] = 1
    return ExplainedImages(
        paths=images,
        patients=[path.stem for path in images],
        top=np.ones(len(images), np.int64),
        evidence=evidence,
    )


@pytest.mark.parametrize("batch", [BatchRange(), BatchRange(1, 8, 8), BatchRange(4, 4, 4)])
def test_a_network_that_looks_at_the_corner_is_found_out(images: list[Path], batch: BatchRange) -> None:
    runner: Any = Looking((0, 0), batch)
    found = measure_evidence(explained(images, (0, 0)), runner)
    light = found.per_class["light"]
    assert set(found.per_class) == {"light"} and light.images == 6
    # A tile is a seventh of the side, the margin an eighth: 1/64 of the corner's lies in the central chest.
    assert (light.outside.value, light.outside.low, light.outside.high) == pytest.approx((63 / 64,) * 3)
    assert light.warns
    assert found.occlusion.images == 6
    assert found.occlusion.correlation is not None and found.occlusion.correlation.value == pytest.approx(1.0)
    assert found.occlusion.changed.value == 1.0  # the corner alone made it light
    assert set(runner.sizes) <= {batch.best, batch.smallest, 51 % batch.best or batch.best}
    notes = evidence_table(found).notes
    assert notes[1].startswith("warning: 98% of the evidence for light lies outside the central chest")


def test_a_network_that_looks_at_the_middle_is_not_warned_of(images: list[Path]) -> None:
    runner: Any = Looking((3, 3), BatchRange())
    found = measure_evidence(explained(images, (3, 3)), runner)
    assert (found.per_class["light"].outside.value, found.per_class["light"].warns) == (0.0, False)
    assert found.occlusion.changed.value == 0.0
    assert not any("warning" in note for note in evidence_table(found).notes)


def test_maps_that_point_elsewhere_do_not_agree_with_occlusion(images: list[Path]) -> None:
    runner: Any = Looking((0, 0), BatchRange())
    found = measure_evidence(explained(images, (5, 5)), runner)
    assert found.occlusion.correlation is not None and found.occlusion.correlation.value < 0.1


def test_channels_first_pictures_are_hidden_in_the_same_places(images: list[Path]) -> None:
    first = msgspec.structs.replace(CONTRACT, layout="NCHW")
    runner: Any = Looking((0, 0), BatchRange(), first)
    found = measure_evidence(explained(images, (0, 0)), runner)
    assert found.occlusion.correlation is not None and found.occlusion.correlation.value == pytest.approx(1.0)
