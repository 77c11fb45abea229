"""What a study adds to a recipe: the rows with an ingredient, beside those without."""

from __future__ import annotations

import math
import os
import re
from dataclasses import fields, replace
from pathlib import Path

from edge_dsc.training.recipes import Ingredients, TrainOptions, add_ingredients
from engines.errors import UsageError

# As train names them, without the dashes in front.
_NUMBERS = {field.name.replace("_", "-"): field.name for field in fields(Ingredients)}
_PATHS = ("synthetic", "teacher")
_SHARE, _LAST = "synthetic-share", "last"
_NUMBER = "{n}"  # in a path: the seed or the fold


def parse_variant(text: str) -> str:
    """Return a variant as a study keeps it: ``mixup=0.2``, or several with commas; paths are made absolute.

    Raises:
        UsageError: Something that ``train`` does not add to a recipe, a value that is none, one twice.
    """
    kept: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if name in _PATHS and value:
            kept.append(f"{name}={os.path.normpath(Path(value).absolute())}")
        elif (name in _NUMBERS or name == _SHARE) and _is_number(value):
            kept.append(f"{name}={float(value):g}")
        elif name == _LAST and not equals:
            kept.append(name)
        else:
            known = [*(f"{one}=NUMBER" for one in (*_NUMBERS, _SHARE)), *(f"{one}=DIR" for one in _PATHS)]
            raise UsageError(
                f"--with {text!r}: {item!r} is nothing that can be added",
                remedy=f"add {', '.join(known)} or {_LAST}",
            )
    names = [item.partition("=")[0] for item in kept if not item.startswith("teacher=")]
    if not kept or len(set(names)) != len(names):
        raise UsageError(f"--with {text!r}", remedy="name each once: --with mixup=0.2,erasing=0.25")
    return ",".join(kept)


def variant_title(variant: str) -> str:
    """Return a variant as tables name it: of a path, its last name."""
    words = []
    for item in variant.split(","):
        name, equals, value = item.partition("=")
        words.append(f"{name}{equals}{Path(value).name if name in _PATHS else value}")
    return " ".join(words)


def variant_folder(variant: str) -> str:
    """Return a variant as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", variant_title(variant))


def add_variant(options: TrainOptions, variant: str, number: int) -> TrainOptions:
    """Add a variant to what a training is asked for.

    Args:
        options: Of the training without it.
        variant: As :func:`parse_variant` returns it.
        number: The seed or the fold, for ``{n}`` in paths: synthetic images and teachers are of one split.

    Raises:
        UsageError: What the recipe cannot have.
    """
    numbers: dict[str, float] = {}
    teachers: list[Path] = []
    changes: dict[str, object] = {}
    for item in variant.split(","):
        name, _, value = item.partition("=")
        if name == _LAST:
            changes["last"] = True
        elif name == _SHARE:
            changes["synthetic_share"] = float(value)
        elif name == "synthetic":
            changes["synthetic"] = Path(value.replace(_NUMBER, str(number)))
        elif name == "teacher":
            teachers.append(Path(value.replace(_NUMBER, str(number))))
        else:
            numbers[_NUMBERS[name]] = float(value)
    if "synthetic_share" in changes and "synthetic" not in changes:
        raise UsageError("--synthetic-share is of nothing", remedy="add synthetic=DIR")
    return replace(
        options,
        ingredients=add_ingredients(numbers, taught=bool(teachers)),
        teachers=tuple(teachers),
        **changes,  # type: ignore[arg-type]
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
