from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from edge_dsc.networks import build_network
from edge_dsc.training import RECIPES, TrainOptions
from edge_dsc.training.fit import compile_model
from edge_dsc.training.recipes import TEACHING, Ingredients
from engines.errors import UsageError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "best"}, r"no recipe 'best' \(choose one of default, quick, paper, paper-text\)"),
        ({"epochs": 0}, r"0 epochs \(train for at least 1\)"),
        ({"seed": -1}, r"the seed -1 \(choose one from 0 to 4294967295\)"),
        ({"seed": 2**32}, r"the seed 4294967296 \(choose"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"fold": (1, 5), "keep_split": True}, "--fold and --keep-split exclude each other"),
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


# As the paper gives them, in its Table 1 and, where that is silent or says otherwise, in its text.
TABLE_1 = {"rotation": 1.0, "zoom": 0.05}
TEXT = {"rotation": 2.0, "zoom": 0.1}
BOTH = {
    "learning_rate": 1e-4,
    "batch": 32,
    "epochs": 50,
    "flip": True,
    "flip_vertical": True,
    "augmentation": True,
}
# And nothing else: what the paper does not name is off.
OFF = {
    "cosine": False,
    "warmup": 0,
    "class_weights": False,
    "label_smoothing": 0.0,
    "dense_rate": 1.0,
    "dense_start": False,
    "temperature": 1.0,
    "convolution_start": False,
    "shift": 0.0,
    "fixed": False,
    "mixup": 0.0,
    "cutmix": 0.0,
    "erasing": 0.0,
    "weight_decay": 0.0,
    "distillation": 0.0,
}


@pytest.mark.parametrize("architecture", ["dsc", "cnn", "resnet50v2", "mine.keras"])
@pytest.mark.parametrize(("name", "ranges"), [("paper", TABLE_1), ("paper-text", TEXT)])
def test_the_papers_recipes_are_its_table_and_its_text(
    architecture: str, name: str, ranges: dict[str, float]
) -> None:
    options = TrainOptions(data=Path(), out=Path(), architecture=architecture, recipe=name)
    assert asdict(options.resolve_recipe()) == {"name": name, **BOTH, **OFF, **ranges}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_what_the_paper_says_of_the_network_is_in_the_network(architecture: str) -> None:
    """Rescaling by 1/255, dropout 0.5, and with the fit categorical cross-entropy and Adam."""
    model = build_network(architecture, 3)
    assert model.get_layer("scale").scale == 1 / 255
    assert model.get_layer("dropout").rate == 0.5
    trained = compile_model(model, RECIPES["paper"][architecture], steps_per_epoch=7)
    assert type(trained.optimizer).__name__ == "Adam"
    assert float(trained.optimizer.learning_rate) == pytest.approx(1e-4, rel=1e-6)
    assert (type(trained.loss).__name__, trained.loss.label_smoothing) == ("CategoricalCrossentropy", 0.0)


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("architecture", ["dsc", "cnn", "xception"])
def test_every_recipe_works_without_augmentation(name: str, architecture: str) -> None:
    options = TrainOptions(data=Path(), out=Path(), architecture=architecture, recipe=name)
    with_it, without = options.resolve_recipe(), replace(options, augmentation=False).resolve_recipe()
    off = {"flip", "flip_vertical", "rotation", "zoom", "shift", "augmentation"}
    assert {key: bool(value) for key, value in asdict(without).items() if key in off} == dict.fromkeys(
        off, False
    )
    same = asdict(without).keys() - off
    assert {key: asdict(without)[key] for key in same} == {key: asdict(with_it)[key] for key in same}


def test_other_networks_have_no_start_of_the_papers_layers() -> None:
    for name in ("default", "quick"):
        other = TrainOptions(data=Path(), out=Path(), architecture="vgg19", recipe=name).resolve_recipe()
        assert (other.dense_rate, other.dense_start, other.convolution_start) == (1.0, False, False)


def test_what_is_added_stands_in_the_recipe() -> None:
    added = Ingredients(mixup=0.2, cutmix=1.0, erasing=0.25, weight_decay=0.01)
    for architecture in ("dsc", "vgg19"):
        options = TrainOptions(data=Path(), out=Path(), architecture=architecture)
        plain = options.resolve_recipe()
        recipe = replace(options, ingredients=added).resolve_recipe()
        assert recipe == replace(plain, mixup=0.2, cutmix=1.0, erasing=0.25, weight_decay=0.01)
    taught = replace(options, ingredients=Ingredients(**TEACHING), teachers=(Path("runs/cnn"),))
    assert taught.resolve_recipe() == replace(plain, distillation=0.5, temperature=2.0)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"mixup": -0.1}, r"^--mixup -0.1 \(give a number from 0 to 100\)$"),
        ({"cutmix": float("nan")}, r"^--cutmix nan"),
        ({"erasing": 1.5}, r"^--erasing 1.5 \(give a number from 0 to 1\)$"),
        ({"weight_decay": float("inf")}, r"^--weight-decay inf"),
        ({"distillation": 2}, r"^--distillation 2 "),
        ({"temperature": 0.5}, r"^--temperature 0.5 \(give a number from 1 to 100\)$"),
    ],
)
def test_an_amount_that_is_none_is_refused(added: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Ingredients(**added)


@pytest.mark.parametrize(
    "asked", [{"teachers": (Path("runs/cnn"),)}, {"ingredients": Ingredients(distillation=0.5)}]
)
def test_a_teacher_and_its_share_need_each_other(asked: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="a teacher needs a share of the loss, and the share a teacher"):
        TrainOptions(data=Path(), out=Path(), **asked).resolve_recipe()
