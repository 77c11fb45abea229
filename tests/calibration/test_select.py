from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.select import relative_names, select_images
from calibration.table import MINIMUM_IMAGES
from engines.errors import BadInputError, UsageError

Lister = Callable[[Path], list[tuple[Path, str]]]


def test_classes_are_drawn_equally_as_far_as_they_have_enough(textures: Path, list_items: Lister) -> None:
    chosen = select_images(list_items(textures), 129, 0)
    assert Counter(label for _, label in chosen) == {"clear": 50, "diffuse": 49, "focal": 30}
    assert len({path for path, _ in chosen}) == 129


def test_the_draw_does_not_depend_on_the_order_of_listing_or_the_place(
    textures: Path, tmp_path: Path, list_items: Lister
) -> None:
    items = list_items(textures)
    shuffled = random.Random(1).sample(items, len(items))
    chosen = select_images(items, 130, 3)
    assert select_images(shuffled, 130, 3) == chosen
    moved = shutil.copytree(textures, tmp_path / "elsewhere" / "deep")
    there = select_images(list_items(moved), 130, 3)
    assert [path.relative_to(moved) for path, _ in there] == [
        path.relative_to(textures) for path, _ in chosen
    ]


def test_the_seed_changes_the_draw(textures: Path, list_items: Lister) -> None:
    draws = [select_images(list_items(textures), 130, seed) for seed in (0, 1)]
    assert set(draws[0]) != set(draws[1])


def test_one_more_file_leaves_the_draw_of_other_classes_as_it_is(copied: Path, list_items: Lister) -> None:
    before = [item for item in select_images(list_items(copied), 130, 0) if item[1] != "focal"]
    shutil.copy(copied / "focal" / "000.png", copied / "focal" / "new.png")
    after = [item for item in select_images(list_items(copied), 130, 0) if item[1] != "focal"]
    assert after == before


def test_all_are_taken_where_fewer_than_asked_are_there(textures: Path, list_items: Lister) -> None:
    assert len(select_images(list_items(textures), 10_000, 0)) == 150


def test_copies_count_once(copied: Path, list_items: Lister) -> None:
    for index in range(40):
        shutil.copy(copied / "clear" / "000.png", copied / "diffuse" / f"{index:03}.png")
    # 70 clear (one of which is the copied one), 10 left of diffuse, 30 focal
    with pytest.raises(
        BadInputError, match=r"^110 usable images .* at least 128 .*40 of 150 files are copies"
    ) as caught:
        select_images(list_items(copied), 150, 0)
    assert caught.value.remedy == (
        "give a folder with more real images of every class, such as the training images"
    )


@pytest.mark.parametrize("count", [0, 127])
def test_too_few_images_are_refused(textures: Path, list_items: Lister, count: int) -> None:
    with pytest.raises(
        BadInputError, match=f"^{count} usable images to calibrate on, at least 128 are needed"
    ):
        select_images(list_items(textures)[:count], 128, 0)


def test_exactly_the_minimum_is_enough(textures: Path, list_items: Lister) -> None:
    assert len(select_images(list_items(textures)[:MINIMUM_IMAGES], MINIMUM_IMAGES, 0)) == MINIMUM_IMAGES


def test_asking_for_too_few_is_a_usage_error(textures: Path, list_items: Lister) -> None:
    with pytest.raises(UsageError, match="127 images") as caught:
        select_images(list_items(textures), 127, 0)
    assert caught.value.remedy == "ask for at least 128"


def test_names_are_relative_to_the_common_folder(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "1.png", tmp_path / "b" / "c" / "2.png"]
    assert list(relative_names(paths).values()) == ["a/1.png", "b/c/2.png"]
    assert list(relative_names(paths[:1]).values()) == ["1.png"]
    assert relative_names([]) == {}


def test_an_unreadable_file_is_left_for_calibration_to_name(copied: Path, list_items: Lister) -> None:
    items = list_items(copied)
    (copied / "focal" / "000.png").unlink()
    (copied / "focal" / "000.png").symlink_to(copied / "nowhere.png")
    assert (copied / "focal" / "000.png", "focal") in select_images(items, 150, 0)
