"""Figures of synthetic images, each on sets whose figure is known."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_dsc.data import load_split
from edge_dsc.training.synthesis.began import Began
from edge_dsc.training.synthesis.worth import (
    MadeImages,
    Neighbours,
    count_costs,
    covered_share,
    frechet_distance,
    mean_similarity,
    measure_costs,
    measure_worth,
    open_classifier,
    pixel_distances,
    probe_step,
    similarity_scales,
)
from engines.errors import UsageError

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(40, 3)) * (1.0, 2.0, 3.0)


def test_the_frechet_distance_of_moved_and_stretched_sets() -> None:
    assert frechet_distance(POINTS, POINTS) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(POINTS, POINTS + np.array([3.0, 0.0, 4.0])) == pytest.approx(25)
    centred = POINTS - POINTS.mean(axis=0)
    # Twice as wide: tr(C) + tr(4 C) - 2 tr(2 C) = tr(C).
    assert frechet_distance(centred, 2 * centred) == pytest.approx(np.trace(np.cov(POINTS, rowvar=False)))
    few = POINTS[:2]  # fewer than dimensions: of rank 1
    assert frechet_distance(few, few + np.array([1.0, 0.0, 0.0])) == pytest.approx(1)


def test_precision_and_recall_of_points_on_a_line() -> None:
    line = np.arange(8.0)[:, None]  # each one's third neighbour is 2 away, 3 or 2 at the ends
    assert covered_share(line, line) == 1.0
    assert covered_share(np.array([[3.5], [-3.0], [-3.1], [20.0]]), line) == 0.5
    near = np.array([[0.0], [0.1], [0.2], [0.3]])
    assert (covered_share(near, line), covered_share(line, near)) == (1.0, 1 / 8)


def test_distances_are_in_grey_levels() -> None:
    images = np.stack([np.full((4, 4), value, np.uint8) for value in (0, 10, 255)])
    expected = [[0, 10, 255], [10, 0, 245], [255, 245, 0]]
    np.testing.assert_allclose(pixel_distances(images, images), expected, atol=1e-3)
    neighbours = Neighbours.of(images)
    assert neighbours.nearest.tolist() == pytest.approx([10, 10, 245])
    assert neighbours.copy_below == pytest.approx(5)
    nearest, distances = neighbours.find(np.stack([np.full((4, 4), 200, np.uint8)]))
    assert (nearest.tolist(), distances.tolist()) == ([2], pytest.approx([55]))


@pytest.mark.parametrize(("size", "scales"), [(16, 1), (32, 2), (64, 3), (128, 4), (224, 5)])
def test_small_images_have_fewer_scales(size: int, scales: int) -> None:
    assert similarity_scales(size) == scales


def noise(count: int, size: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size), dtype=np.uint8)


def test_images_that_are_all_one_are_wholly_similar() -> None:
    one = noise(1)
    assert mean_similarity(np.repeat(one, 3, axis=0), seed=0) == pytest.approx(1, abs=1e-5)
    different = noise(6)
    assert abs(mean_similarity(different, seed=0)) < 0.2
    assert mean_similarity(different, seed=0) == mean_similarity(different, seed=0)


def test_the_worth_of_images_without_a_classifier() -> None:
    real = noise(9)
    neighbours = Neighbours.of(real)
    nearest, _ = neighbours.find(noise(4))
    made = MadeImages(
        pixels=noise(4),
        draws=[0, 1, 2, 4],
        nearest=nearest.tolist(),
        distances=[1.0, 5.0, 2.0, 3.0],
        copies=1,
    )
    worth = measure_worth(made, neighbours, None, seed=0)
    assert (worth.real, worth.copies, worth.nearest, worth.scales, worth.features) == (9, 1, 2.5, 2, None)
    assert worth.nearest_real == pytest.approx(np.median(neighbours.nearest))
    assert worth.copy_below == pytest.approx(worth.nearest_real / 2)


def test_the_separable_networks_have_fewer_parameters_and_multiply_adds() -> None:
    separable, conventional = (
        count_costs(Began(architecture=name, size=16, filters=2, latent=3))
        for name in ("depthwise-began", "began")
    )
    assert (separable.generator, conventional.generator) == (627, 683)  # as test_began adds them up
    # Dense 3 x 128; two convolutions at 8 x 8, two at 16 x 16, and the last one.
    decoder = 3 * 128 + 2 * 64 * 36 + 2 * 256 * 36 + 256 * 18
    encoder = 256 * 18 + 256 * 36 + 64 * 72 + 256 * 3
    assert conventional.multiply_adds == decoder + (encoder + decoder)
    kept = 4 * (conventional.generator + conventional.discriminator) + conventional.generator
    assert conventional.state_bytes == 4 * kept
    assert (separable.step_seconds, separable.peak_bytes) == (None, None)


@pytest.mark.slow
def test_a_step_is_measured_after_the_first_one() -> None:
    ticks = itertools.chain([0.0, 100.0], itertools.count(200.0, 0.25))
    found = probe_step(Began(size=16, filters=2, latent=3, batch=2), clock=lambda: next(ticks))
    assert found["step_seconds"] == 0.25
    assert 0 <= found["peak_bytes"] < 4 << 30  # none where this process once took more


@pytest.mark.slow
def test_a_process_that_measures_runs_nothing_that_lies_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    began = Began(size=16, filters=2, batch=2)
    found = measure_costs(began)
    assert not (tmp_path / "ran").exists()
    assert found.step_seconds is not None and found.step_seconds > 0
    assert replace(found, step_seconds=None, peak_bytes=None) == count_costs(began)


@pytest.mark.slow
def test_features_of_a_trained_run(dsc_run: Any, tmp_path: Path) -> None:
    """A set among itself: precision and recall are 1, and the distance is that of one half from the other."""
    run = dsc_run.result.run
    classifier = open_classifier(run, load_split(run / "split.json"))
    real = noise(20, 64)
    features = classifier(real)
    assert features.shape == (20, 64) and np.allclose(classifier(real[3:4]), features[3:4], atol=1e-4)
    made = MadeImages(
        pixels=real, draws=list(range(20)), nearest=list(range(20)), distances=[0.0] * 20, copies=0
    )
    found = measure_worth(made, Neighbours.of(real), classifier, seed=0).features
    assert found is not None
    assert (found.run, found.dimensions, found.images) == (run.name, 64, 10)
    assert (found.precision, found.recall) == (1.0, 1.0)
    assert 0 < found.frechet < 2 * found.frechet_real


def test_a_run_of_another_split_gives_no_features(dsc_run: Any) -> None:
    run = dsc_run.result.run
    split = load_split(run / "split.json")
    parts = {**split.parts, "train": split.samples("train")[1:]}
    with pytest.raises(UsageError, match="was trained with another split than this synthesis"):
        open_classifier(run, type(split)(root=split.root, labels=split.labels, seed=split.seed, parts=parts))
