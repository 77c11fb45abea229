from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from calibration.coverage import Coverage, TensorCoverage
from calibration.sensitivity import LayerSensitivity, Sensitivity
from edge_dsc.evaluate.metrics import classification_metrics
from edge_dsc.page.figures import (
    draw_confusion,
    draw_confusions,
    draw_coverage,
    draw_curves,
    draw_sensitivity,
    draw_trainings,
)

FORMULA = "$x^$ <b>"  # no valid formula


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves_are_drawn(tmp_path: Path, epochs: int) -> None:
    numbers = list(np.linspace(1, 0.2, epochs))
    history = dict.fromkeys(("loss", "accuracy", "validation_loss", "validation_accuracy"), numbers)
    draw_curves(history, tmp_path / "curves.png", best_epoch=epochs)
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture is not None
    assert picture.shape == (432, 1080, 3)
    assert picture.std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("classes", [2, 12])
def test_the_matrix_is_drawn_for_any_number_of_classes_of_any_name(tmp_path: Path, classes: int) -> None:
    true = np.arange(classes)
    metrics = classification_metrics(true, np.eye(classes)[true], [f"{FORMULA} {index}" for index in true])
    draw_confusion(metrics, tmp_path / "confusion.png", title=f"dsc {FORMULA}")
    picture = cv2.imread(str(tmp_path / "confusion.png"))
    assert picture is not None
    dark = (picture.astype(int)[:, :, 2] < 60) & (picture[:, :, 0] > 80)  # the full cells of a right answer
    assert dark.mean() > 0.01


def test_matrices_stand_side_by_side(tmp_path: Path) -> None:
    """Two of three sides are all right: their diagonals are dark, the third's is white."""
    right, wrong = ((4, 0), (0, 4)), ((0, 4), (4, 0))
    matrices = {"training": right, "validation": right, "testing": wrong, "nothing": ((0, 0), (0, 0))}
    draw_confusions(matrices, ("a", FORMULA), tmp_path / "confusions.png", title=FORMULA)
    picture = cv2.imread(str(tmp_path / "confusions.png"))
    assert picture is not None
    dark = (picture.astype(int)[:, :, 2] < 60) & (picture[:, :, 0] > 80)
    columns = np.flatnonzero(dark.sum(axis=0) > 20)
    assert len(np.split(columns, np.flatnonzero(np.diff(columns) > 20) + 1)) == 3  # the last has no dark cell


@pytest.mark.parametrize(("networks", "shape"), [(1, (372, 552)), (3, (744, 1104))])
def test_trainings_are_drawn_in_a_panel_of_each_network(
    tmp_path: Path, networks: int, shape: tuple[int, int]
) -> None:
    runs = [
        {"accuracy": [0.5, 0.6, 0.7], "validation_accuracy": [0.4, 0.5, 0.5]},
        {"accuracy": [0.5], "validation_accuracy": [0.5]},
    ]
    draw_trainings({f"{FORMULA} {index}": runs for index in range(networks)}, tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture is not None
    assert picture.shape[:2] == shape
    assert picture.std() > 10


def test_a_training_without_validation_images_has_one_line(tmp_path: Path) -> None:
    whole = {"accuracy": [0.5, 0.6, 0.7], "validation_accuracy": [0.1, 0.1, 0.1]}
    for name, run in (("two", whole), ("one", {"accuracy": whole["accuracy"]})):
        draw_trainings({"net": [run]}, tmp_path / f"{name}.png")
    two, one = (cv2.imread(str(tmp_path / f"{name}.png")).astype(int) for name in ("two", "one"))
    orange = [(picture[:, :, 2] - picture[:, :, 0] > 100).sum() for picture in (two, one)]
    assert orange[0] > 500 and orange[1] == 0


def test_coverage_is_drawn_for_classes_of_any_name(tmp_path: Path) -> None:
    tensor = TensorCoverage(
        name=FORMULA,
        low=0,
        high=1,
        smallest=0,
        largest=2,
        deviation=1,
        saturated=0.5,
        growth=(0.5, 0.8, 0.9, 1, 1, 1, 1, 1),
        drift=0,
    )
    found = Coverage(
        method="minmax", classes={FORMULA: 8}, patients=None, images=8, tensors=(tensor,) * 3, warnings=()
    )
    draw_coverage(found, tmp_path / "coverage.png")
    picture = cv2.imread(str(tmp_path / "coverage.png"))
    assert picture is not None
    blue = (picture == (0xB0, 0x72, 0x4C)).all(axis=2)
    assert blue[:, 600:].sum() > 10_000  # the three bars, half of the values each


def test_sensitivity_is_drawn_with_one_bar_per_layer(tmp_path: Path) -> None:
    layers = tuple(
        LayerSensitivity(
            name=f"{FORMULA} {index}",
            op="Conv",
            depthwise=index == 1,
            output_error=0.1,
            logit_error=1.0,
            flips=index,
            logit_error_without=2.0,
            flips_without=0,
            time_ms={},
        )
        for index in range(3)
    )
    found = Sensitivity(layers=layers, images=8, logit_error=3.0, flips=2, signed=False)
    draw_sensitivity(found, tmp_path / "sensitivity.png", title=FORMULA)
    picture = cv2.imread(str(tmp_path / "sensitivity.png"))
    assert picture is not None
    blue = (picture == (0xB0, 0x72, 0x4C)).all(axis=2)
    orange = (picture == (0x52, 0x84, 0xDD)).all(axis=2)
    assert blue.sum() == pytest.approx(2 * orange.sum(), rel=0.02)
