from __future__ import annotations

from pathlib import Path

import pytest

from edge_dsc.training import RECIPES, TrainOptions
from engines.errors import UsageError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vgg"}, r"no network 'vgg' \(choose one of dsc, cnn\)"),
        ({"recipe": "best"}, r"no recipe 'best' \(choose one of default, quick, paper\)"),
        ({"epochs": 0}, r"0 epochs \(train for at least 1\)"),
        ({"seed": -1}, r"the seed -1 \(choose one from 0 to 4294967295\)"),
        ({"seed": 2**32}, r"the seed 4294967296 \(choose"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
    ],
)
def test_options_that_cannot_be_met(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainOptions(data=Path(), out=Path(), **change).resolve_recipe()


def test_epochs_replace_those_of_the_recipe() -> None:
    options = TrainOptions(data=Path(), out=Path(), architecture="cnn", recipe="quick", epochs=3)
    recipe = options.resolve_recipe()
    assert recipe.epochs == 3
    assert (
        recipe.learning_rate == RECIPES["quick"]["cnn"].learning_rate < RECIPES["quick"]["dsc"].learning_rate
    )


def test_the_papers_recipe_is_its_table() -> None:
    paper = TrainOptions(data=Path(), out=Path(), recipe="paper").resolve_recipe()
    assert (paper.learning_rate, paper.batch, paper.epochs) == (1e-4, 32, 50)
    assert (paper.cosine, paper.class_weights, paper.label_smoothing) == (False, False, 0.0)
    assert (paper.dense_rate, paper.dense_start, paper.convolution_start) == (1.0, False, False)
    assert paper.flip
    assert paper.rotation > 0
    assert paper.zoom > 0
