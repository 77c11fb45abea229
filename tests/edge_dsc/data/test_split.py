from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_dsc.data import PARTS, Dataset, Sample, Split, keep_split, load_split, save_split, split_dataset
from edge_dsc.data.discover import count_labels
from edge_dsc.data.split import check_sides
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.files import canonical_json, sha256_bytes

LABELS = ("clear", "diffuse", "focal")


def make_dataset(patients: list[tuple[str, str]]) -> Dataset:
    """One sample for each (label, patient)."""
    samples = tuple(
        Sample(path=f"{label}/{index:04d}.png", label=label, patient=patient, sha256=f"{index:064x}")
        for index, (label, patient) in enumerate(patients)
    )
    labels = tuple(sorted({label for label, _ in patients}))
    return Dataset(root=Path("data"), samples=samples, labels=labels)


def random_dataset(seed: int) -> Dataset:
    """Patients of one to nine images, some of them with images of two classes."""
    rng = np.random.default_rng(seed)
    patients = []
    for patient in range(int(rng.integers(30, 80))):
        labels = rng.choice(LABELS, 2 if rng.random() < 0.2 else 1, replace=False)
        patients += [(str(rng.choice(labels)), f"p{patient}") for _ in range(int(rng.integers(1, 10)))]
    return make_dataset(patients)


def test_single_images_meet_the_papers_shares() -> None:
    split = split_dataset(
        make_dataset([(label, f"{label}{i}") for label in LABELS for i in range(100)]), seed=3
    )
    assert {part: count_labels(split.samples(part)) for part in PARTS} == {
        "train": dict.fromkeys(LABELS, 63),
        "validation": dict.fromkeys(LABELS, 18),
        "evaluation": dict.fromkeys(LABELS, 9),
        "test": dict.fromkeys(LABELS, 10),
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_patient_and_no_file_is_on_two_sides(seed: int) -> None:
    dataset = random_dataset(seed)
    split = split_dataset(dataset, seed)
    side = {}
    for part in PARTS:
        for sample in split.samples(part):
            assert side.setdefault(sample.patient, part) == part
            assert side.setdefault(sample.sha256, part) == part
    assert sorted(sample.path for part in PARTS for sample in split.samples(part)) == [
        sample.path for sample in sorted(dataset.samples, key=lambda sample: sample.path)
    ]
    for part, share in zip(PARTS, (0.63, 0.18, 0.09, 0.10), strict=True):
        assert set(count_labels(split.samples(part))) == set(LABELS)
        assert abs(len(split.samples(part)) / len(dataset.samples) - share) < 0.06


def test_the_order_of_the_listing_does_not_matter() -> None:
    dataset = random_dataset(1)
    turned = replace(dataset, samples=tuple(reversed(dataset.samples)))
    assert split_dataset(turned, 5) == split_dataset(dataset, 5)
    assert split_dataset(dataset, 6).sha256 != split_dataset(dataset, 5).sha256


def test_a_class_of_too_few_patients_is_named() -> None:
    many = [("clear", f"c{i}") for i in range(20)]
    dataset = make_dataset(many + [("focal", f"f{i % 3}") for i in range(30)])
    with pytest.raises(
        BadInputError, match="the class 'focal' has images of 3 patients, too few for 4 parts"
    ):
        split_dataset(dataset, 0)
    split = split_dataset(make_dataset(many + [("focal", f"f{i}") for i in range(4)]), 0)
    assert {part: count_labels(split.samples(part))["focal"] for part in PARTS} == dict.fromkeys(PARTS, 1)


def test_a_split_is_saved_and_loaded(tmp_path: Path) -> None:
    split = replace(split_dataset(random_dataset(2), 7), root=tmp_path)
    save_split(split, tmp_path / "split.json")
    assert load_split(tmp_path / "split.json") == split
    body = json.loads((tmp_path / "split.json").read_text())
    assert body["fractions"] == {"train": 0.63, "validation": 0.18, "evaluation": 0.09, "test": 0.1}
    assert body["counts"]["train"] == count_labels(split.samples("train"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body["parts"]["test"].append(body["parts"]["train"].pop()),
        lambda body: body["labels"].reverse(),
        lambda body: body.update(root="/elsewhere"),
        lambda body: body.update(seed=8),
        lambda body: body["parts"].pop("test"),
    ],
    ids=["moved", "labels", "root", "seed", "part gone"],
)
def test_an_edited_split_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = tmp_path / "split.json"
    save_split(split_dataset(random_dataset(2), 7), path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(
        ArtefactError,
        match=r"split\.json was edited after it was made \(make it again: edge-dsc train DATA --overwrite\)",
    ):
        load_split(path)


@pytest.mark.parametrize("labels", [["b", "a"], ["a"], ["a", "x"]])
def test_labels_of_a_split_without_a_seal_follow_its_parts(tmp_path: Path, labels: list[str]) -> None:
    path = tmp_path / "split.json"
    dataset = random_dataset(2)
    save_split(split_dataset(dataset, 7), path)
    document = json.loads(path.read_text())
    document["schema_version"] = 1
    del document["document_sha256"], document["fold"], document["kept"]
    path.write_text(json.dumps(document))
    assert load_split(path).labels == dataset.labels
    document["labels"] = [dict(zip("ab", dataset.labels, strict=False)).get(name, name) for name in labels]
    path.write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=r"was edited after it was made|length >= 2"):
        load_split(path)


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "x" * 201])
def test_a_class_that_no_later_stage_takes_is_refused_before_training(name: str) -> None:
    dataset = random_dataset(2)
    with pytest.raises(BadInputError, match="cannot be used") as caught:
        split_dataset(replace(dataset, labels=(*dataset.labels, name)), 7)
    assert caught.value.remedy == "give their folders short names without control characters"


def version_1(split: Split) -> dict[str, Any]:
    """What the first version of the format held, written out: only the parts are sealed."""
    parts = {
        part: [{"path": s.path, "label": s.label, "patient": s.patient, "sha256": s.sha256} for s in samples]
        for part, samples in split.parts.items()
    }
    return {
        "kind": "edge-dsc/split",
        "schema_version": 1,
        "root": str(split.root),
        "labels": list(split.labels),
        "seed": split.seed,
        "fractions": {"train": 0.63, "validation": 0.18, "evaluation": 0.09, "test": 0.1},
        "counts": {part: count_labels(split.parts[part]) for part in PARTS},
        "parts": parts,
        "split_sha256": sha256_bytes(canonical_json(parts)),
    }


def test_a_split_of_version_1_is_read_and_keeps_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    split = split_dataset(random_dataset(2), 7)
    document = version_1(split)
    path.write_text(json.dumps(document))
    assert load_split(path) == split
    assert split.sha256 == document["split_sha256"]  # what the training records of its time name
    save_split(split, path)
    assert json.loads(path.read_text())["split_sha256"] == document["split_sha256"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body["parts"]["test"].append(body["parts"]["train"].pop()), "was edited after"),
        (lambda body: body["parts"].pop("test"), r"no readable edge-dsc/split: .*required field `test`"),
        (lambda body: body["parts"]["test"][0].update(mood="good"), "unknown field `mood`"),
        (lambda body: body.update(seed="7"), r"Expected `int`, got `str` - at `\$\.seed`"),
        (lambda body: body.update(schema_version=4), "schema version 4, this edge-dsc reads 1 and 2 and 3"),
    ],
    ids=["moved", "part gone", "unknown field", "type", "later version"],
)
def test_a_damaged_split_of_version_1_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    document = version_1(split_dataset(random_dataset(2), 7))
    edit(document)
    (tmp_path / "split.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=message):
        load_split(tmp_path / "split.json")


def test_a_split_of_version_2_is_read(tmp_path: Path) -> None:
    split = split_dataset(random_dataset(2), 7)
    body = {name: value for name, value in version_1(split).items() if name != "kind"}
    body.pop("schema_version")
    seal = sha256_bytes(canonical_json(body))
    document = {"kind": "edge-dsc/split", "schema_version": 2, **body, "document_sha256": seal}
    (tmp_path / "split.json").write_text(json.dumps(document))
    assert load_split(tmp_path / "split.json") == split


@pytest.mark.parametrize("folds", [2, 5])
@pytest.mark.parametrize("seed", [0, 7])
def test_over_all_folds_every_image_is_held_out_once(folds: int, seed: int) -> None:
    dataset = random_dataset(seed)
    held_out = []
    for number in range(1, folds + 1):
        split = split_dataset(dataset, seed, fold=(number, folds))
        assert split.fold == (number, folds)
        check_sides(split, source="memory")
        assert sum(len(samples) for samples in split.parts.values()) == len(dataset.samples)
        for part in PARTS:
            assert set(count_labels(split.samples(part))) == set(LABELS)
        held_out += [sample.path for part in ("evaluation", "test") for sample in split.samples(part)]
    assert sorted(held_out) == [sample.path for sample in sorted(dataset.samples, key=lambda one: one.path)]


def test_a_fold_has_the_papers_shares_within(tmp_path: Path) -> None:
    dataset = make_dataset([(label, f"{label}{i}") for label in LABELS for i in range(100)])
    split = split_dataset(dataset, 3, fold=(2, 5))
    counts = {part: len(split.samples(part)) for part in PARTS}
    assert counts == {"train": 186, "validation": 54, "evaluation": 28, "test": 32} or (
        counts["evaluation"] + counts["test"] == 60 and abs(counts["evaluation"] - 28.4) < 2
    )
    save_split(replace(split, root=tmp_path), tmp_path / "split.json")
    assert load_split(tmp_path / "split.json") == replace(split, root=tmp_path)
    fractions = json.loads((tmp_path / "split.json").read_text())["fractions"]
    assert sum(fractions.values()) == pytest.approx(1)
    assert fractions["evaluation"] + fractions["test"] == pytest.approx(0.2)


@pytest.mark.parametrize("fold", [(0, 5), (6, 5), (1, 1), (1, 0)])
def test_there_is_no_such_fold(fold: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"there is no fold {fold[0]} of {fold[1]}"):
        split_dataset(random_dataset(0), 0, fold=fold)


def test_a_class_of_too_few_patients_for_the_folds_is_named() -> None:
    many = [("clear", f"c{i}") for i in range(40)]
    for count, words in ((4, "4 patients, too few for fold 1, fold 2"), (6, "too few for evaluation, test")):
        dataset = make_dataset(many + [("focal", f"f{i}") for i in range(count)])
        with pytest.raises(BadInputError, match=f"the class 'focal' has images of .*{words}"):
            for number in range(1, 6):
                split_dataset(dataset, 0, fold=(number, 5))


def given_dataset(*rows: tuple[str, str, str, str]) -> Dataset:
    """Samples of (part, label, patient, content), as a folder that comes split gives them."""
    samples = tuple(
        Sample(path=f"{part}/{label}/{index}.png", label=label, patient=patient, sha256=content)
        for index, (part, label, patient, content) in enumerate(rows)
    )
    given = {sample.path: row[0] for sample, row in zip(samples, rows, strict=True)}
    return Dataset(root=Path("data"), samples=samples, labels=("focal", "sick"), given=given)


FOUR = [(part, label, f"{part} {label}", f"{part} {label}") for part in PARTS for label in ("focal", "sick")]


def test_a_split_is_kept_as_it_comes(tmp_path: Path) -> None:
    split, left_out = keep_split(given_dataset(*FOUR), 0)
    assert {part: [sample.sha256 for sample in split.samples(part)] for part in PARTS} == {
        part: [f"{part} focal", f"{part} sick"] for part in PARTS
    }
    assert (split.kept, left_out, split.warnings()) == (True, (), ())
    dataset = given_dataset(
        *((part, label, patient, f"{n:064x}") for n, (part, label, patient, _) in enumerate(FOUR))
    )
    split = replace(keep_split(dataset, 0)[0], root=tmp_path)
    save_split(split, tmp_path / "split.json")
    assert load_split(tmp_path / "split.json") == split
    assert json.loads((tmp_path / "split.json").read_text())["fractions"] == dict.fromkeys(PARTS, 0.25)


def test_a_patient_on_two_sides_of_a_kept_split_is_counted() -> None:
    rows = [
        *FOUR,
        ("train", "sick", "person1", "a"),
        ("test", "focal", "person1", "b"),
        ("test", "sick", "person1", "c"),
    ]
    split, _ = keep_split(given_dataset(*rows), 0)
    check_sides(split, source="memory")
    (line,) = split.warnings()
    assert line == (
        "1 patients, such as person1, have images in train or validation and in evaluation or test:"
        " 2 of the 6 held-out images flatter the network"
    )
    with pytest.raises(ArtefactError, match="has the patient person1 in train and in test"):
        check_sides(replace(split, kept=False), source="memory")


def test_a_file_on_two_sides_stays_in_test_alone() -> None:
    rows = [
        *FOUR,
        ("train", "sick", "x", "same"),
        ("validation", "sick", "x", "same"),
        ("test", "sick", "x", "same"),
    ]
    split, left_out = keep_split(given_dataset(*rows), 0)
    where = [part for part in PARTS for sample in split.samples(part) if sample.sha256 == "same"]
    assert where == ["test"]
    assert left_out == (
        ("train/sick/8.png", "is the same file as test/sick/10.png"),
        ("validation/sick/9.png", "is the same file as test/sick/10.png"),
    )
    check_sides(split, source="memory")


def test_a_file_on_two_sides_is_refused_in_a_kept_split_too() -> None:
    split, _ = keep_split(given_dataset(*FOUR), 0)
    parts = {**split.parts, "test": (*split.samples("test"), split.samples("train")[0])}
    with pytest.raises(ArtefactError, match="has the file train focal in train and in test"):
        check_sides(replace(split, parts=parts), source="memory")


def test_parts_that_have_no_folder_are_dealt_from_train() -> None:
    rows = [("train", label, f"{label}{i}", f"{label}{i}") for label in ("focal", "sick") for i in range(100)]
    rows += [("test", label, f"t{label}{i}", f"t{label}{i}") for label in ("focal", "sick") for i in range(7)]
    split, _ = keep_split(given_dataset(*rows), 1)
    assert {part: count_labels(split.samples(part)) for part in PARTS} == {
        "train": {"focal": 70, "sick": 70},
        "validation": {"focal": 20, "sick": 20},
        "evaluation": {"focal": 10, "sick": 10},
        "test": {"focal": 7, "sick": 7},
    }
    assert split.warnings() == ()


def test_a_split_that_cannot_be_kept() -> None:
    def refused(*rows: tuple[str, str, str, str]) -> str:
        with pytest.raises(BadInputError) as caught:
            keep_split(given_dataset(*rows), 0)
        assert "--keep-split" in caught.value.remedy
        return str(caught.value)

    assert "data does not come split (folders of parts: train, validation, evaluation)" in refused(*FOUR[:6])
    assert "train holds no image of focal" in refused(*FOUR[1:])
    plain = replace(given_dataset(*FOUR), given={})
    with pytest.raises(BadInputError, match=r"does not come split \(folders of parts: none\)"):
        keep_split(plain, 0)
    # Another part may lack a class: that is said, and is the folder's own affair.
    split, _ = keep_split(given_dataset(*(row for row in FOUR if row[:2] != ("validation", "sick"))), 0)
    assert split.warnings() == ("validation holds no image of sick",)


@pytest.mark.parametrize(("change", "kind"), [("patient", "patient p0"), ("sha256", f"file {0:064x}")])
def test_a_leak_is_found(change: str, kind: str) -> None:
    first = Sample(path="clear/0.png", label="clear", patient="p0", sha256=f"{0:064x}")
    other = Sample(path="clear/1.png", label="clear", patient="p1", sha256=f"{1:064x}")
    other = msgspec.structs.replace(other, **{change: getattr(first, change)})
    split = Split(
        root=Path("data"),
        labels=("clear",),
        seed=0,
        parts={"train": (first,), "validation": (), "evaluation": (), "test": (other,)},
    )
    with pytest.raises(ArtefactError, match=f"has the {kind} in train and in test"):
        check_sides(split, source="split.json")
