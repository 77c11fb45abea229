from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration.select import CalibrationSet, Candidate, read_set, relative_names, select_images
from calibration.table import MINIMUM_IMAGES, CalibrationImage
from engines.contract import ModelContract
from engines.errors import BadInputError, UsageError
from engines.graph import load_model
from engines.images import read_input

Lister = Callable[[Path], list[Candidate]]


@pytest.fixture
def contract(small_model: Path) -> ModelContract:
    return load_model(small_model).contract


def test_classes_are_drawn_equally_as_far_as_they_have_enough(textures: Path, list_images: Lister) -> None:
    chosen = select_images(list_images(textures), 129, 0)
    assert Counter(candidate.label for candidate in chosen) == {"clear": 50, "diffuse": 49, "focal": 30}
    assert len({candidate.path for candidate in chosen}) == 129
    assert [candidate.label for candidate in chosen[:6]] == ["clear", "diffuse", "focal"] * 2


def test_the_draw_is_the_one_of_earlier_versions(textures: Path, list_images: Lister) -> None:
    chosen = select_images(list_images(textures), 130, 3)
    names = [f"{candidate.label}/{candidate.path.name}" for candidate in chosen[:6]]
    assert names == [
        "clear/044.png",
        "diffuse/031.png",
        "focal/019.png",
        "clear/057.png",
        "diffuse/007.png",
        "focal/029.png",
    ]


def test_the_draw_does_not_depend_on_the_order_of_listing_or_the_place(
    textures: Path, tmp_path: Path, list_images: Lister
) -> None:
    candidates = list_images(textures)
    shuffled = random.Random(1).sample(candidates, len(candidates))
    chosen = select_images(candidates, 130, 3)
    assert select_images(shuffled, 130, 3) == chosen
    moved = shutil.copytree(textures, tmp_path / "elsewhere" / "deep")
    there = select_images(list_images(moved), 130, 3)
    assert [candidate.path.relative_to(moved) for candidate in there] == [
        candidate.path.relative_to(textures) for candidate in chosen
    ]


def test_the_seed_changes_the_draw(textures: Path, list_images: Lister) -> None:
    draws = [select_images(list_images(textures), 130, seed) for seed in (0, 1)]
    assert set(draws[0]) != set(draws[1])


def test_one_more_file_leaves_the_draw_of_other_classes_as_it_is(copied: Path, list_images: Lister) -> None:
    before = [one for one in select_images(list_images(copied), 130, 0) if one.label != "focal"]
    shutil.copy(copied / "focal" / "000.png", copied / "focal" / "new.png")
    after = [one for one in select_images(list_images(copied), 130, 0) if one.label != "focal"]
    assert after == before


def test_all_are_taken_where_fewer_than_asked_are_there(textures: Path, list_images: Lister) -> None:
    assert len(select_images(list_images(textures), 10_000, 0)) == 150


def test_copies_count_once(copied: Path, list_images: Lister) -> None:
    for index in range(40):
        shutil.copy(copied / "clear" / "000.png", copied / "diffuse" / f"{index:03}.png")
    # 70 clear (one of which is the copied one), 10 left of diffuse, 30 focal
    with pytest.raises(
        BadInputError, match=r"^110 usable images .* at least 128 .*40 of 150 files are copies"
    ) as caught:
        select_images(list_images(copied), 150, 0)
    assert caught.value.remedy == (
        "give a folder with more real images of every class, such as the training images"
    )


@pytest.mark.parametrize("count", [0, 127])
def test_too_few_images_are_refused(textures: Path, list_images: Lister, count: int) -> None:
    with pytest.raises(
        BadInputError, match=f"^{count} usable images to calibrate on, at least 128 are needed"
    ):
        select_images(list_images(textures)[:count], 128, 0)


def test_exactly_the_minimum_is_enough(textures: Path, list_images: Lister) -> None:
    assert len(select_images(list_images(textures)[:MINIMUM_IMAGES], MINIMUM_IMAGES, 0)) == MINIMUM_IMAGES


def test_asking_for_too_few_is_a_usage_error(textures: Path, list_images: Lister) -> None:
    with pytest.raises(UsageError, match="127 images") as caught:
        select_images(list_images(textures), 127, 0)
    assert caught.value.remedy == "ask for at least 128"


def test_drawing_opens_no_file() -> None:
    ghosts = [Candidate(Path(f"/nowhere/{index}.png"), "ghost", f"{index:064}") for index in range(130)]
    assert len(select_images(ghosts, 128, 0)) == 128


def test_names_are_relative_to_the_common_folder(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "1.png", tmp_path / "b" / "c" / "2.png"]
    assert list(relative_names(paths).values()) == ["a/1.png", "b/c/2.png"]
    assert list(relative_names(paths[:1]).values()) == ["1.png"]
    assert relative_names([]) == {}


def test_a_set_is_sorted_and_remembers_its_draw(
    textures: Path, list_images: Lister, contract: ModelContract, small_set: CalibrationSet
) -> None:
    chosen = select_images(list_images(textures), 128, 0)
    expected = sorted(chosen, key=lambda one: (one.label, one.path.name))
    assert small_set.images == tuple(
        CalibrationImage(f"{one.label}/{one.path.name}", one.label, one.sha256) for one in expected
    )
    assert small_set.skipped == ()
    pixels = np.stack([read_input(one.path, contract) for one in chosen])
    np.testing.assert_array_equal(small_set.pixels[list(small_set.drawn)], pixels)
    again = read_set(list(reversed(chosen)), contract)
    assert again.images == small_set.images
    np.testing.assert_array_equal(again.pixels, small_set.pixels)
    assert again.drawn == tuple(reversed(small_set.drawn))


def test_damaged_images_are_skipped_and_named_without_their_folder(
    copied: Path, list_images: Lister, contract: ModelContract
) -> None:
    (copied / "clear" / "000.png").write_bytes(b"")
    (copied / "focal" / "001.png").write_text("not an image")
    candidates = list_images(copied)
    (copied / "focal" / "002.png").unlink()
    calls: list[tuple[str, int, int]] = []
    found = read_set(candidates, contract, lambda *call: calls.append(call))
    assert [image.name for image in found.skipped] == ["clear/000.png", "focal/001.png", "focal/002.png"]
    assert found.skipped[0].reason == "clear/000.png is empty (0 bytes)"
    assert str(copied) not in found.skipped[1].reason
    assert len(found.pixels) == len(found.images) == 147
    assert found.drawn == tuple(range(147))
    assert calls == [("reading images", done, 150) for done in range(1, 151)]


def test_too_few_readable_images_are_refused(
    copied: Path, list_images: Lister, contract: ModelContract
) -> None:
    for path in sorted((copied / "clear").iterdir())[:23]:
        path.write_bytes(b"")
    with pytest.raises(BadInputError, match=r"^127 usable images .*23 cannot be read: .* is empty"):
        read_set(list_images(copied), contract)


def test_copies_do_not_make_up_for_images(
    textures: Path, list_images: Lister, contract: ModelContract
) -> None:
    candidates = list_images(textures)
    with pytest.raises(BadInputError, match=r"^100 usable images .*\(60 copies\)"):
        read_set(candidates[:100] + candidates[:60], contract)


def test_a_file_that_changed_since_it_was_found_is_refused_by_name(
    copied: Path, list_images: Lister, contract: ModelContract
) -> None:
    candidates = list_images(copied)
    shutil.copy(copied / "clear" / "001.png", copied / "clear" / "000.png")
    with pytest.raises(BadInputError, match=r"clear/000\.png was changed while") as caught:
        read_set(candidates, contract)
    assert caught.value.remedy == "run the command again"
