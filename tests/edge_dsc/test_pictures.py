from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_dsc.evaluate.metrics import classification_metrics
from edge_dsc.page.figures import draw_confusion, draw_curves


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves_are_drawn(tmp_path: Path, epochs: int) -> None:
    figures = list(np.linspace(1, 0.2, epochs))
    history = dict.fromkeys(("loss", "accuracy", "validation_loss", "validation_accuracy"), figures)
    draw_curves(history, tmp_path / "curves.png", best_epoch=epochs)
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape == (432, 1080, 3)
    assert picture.std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_the_matrix_is_drawn_for_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    true = np.arange(classes)
    metrics = classification_metrics(true, np.eye(classes)[true], [f"class {index}" for index in true])
    draw_confusion(metrics, tmp_path / "confusion.png", title="dsc")
    picture = cv2.imread(str(tmp_path / "confusion.png"))
    dark = (picture.astype(int)[:, :, 2] < 60) & (picture[:, :, 0] > 80)  # the full cells of a right answer
    assert dark.mean() > 0.01
