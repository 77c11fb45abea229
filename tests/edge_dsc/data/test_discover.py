from __future__ import annotations

from pathlib import Path

import pytest

from edge_dsc.data import discover
from edge_dsc.data.discover import count_labels, list_images
from engines.errors import BadInputError
from engines.files import sha256_bytes


def put(root: Path, *names: str, data: bytes | None = None) -> None:
    """Write files; by default each has another content."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() if data is None else data)


def patients(root: Path) -> dict[str, str]:
    return {sample.path: sample.patient for sample in discover(root).samples}


def test_class_folders(tmp_path: Path) -> None:
    put(
        tmp_path,
        "b/two.JPG",
        "a/one.png",
        "a/deeper/three.tiff",
        "a/notes.txt",
        "a/.hidden.png",
        ".git/x.png",
    )
    put(tmp_path, "__MACOSX/a/one.png", "loose.png")
    dataset = discover(tmp_path)
    assert dataset.labels == ("a", "b")
    assert [(sample.path, sample.label) for sample in dataset.samples] == [
        ("a/deeper/three.tiff", "a"),
        ("a/one.png", "a"),
        ("b/two.JPG", "b"),
    ]
    assert dataset.ignored == ("a/notes.txt",)
    assert dataset.samples[1].sha256 == sha256_bytes(b"a/one.png")
    assert count_labels(dataset.samples) == {"a": 2, "b": 1}


def test_kaggle_layout_gives_three_classes_and_patients(tmp_path: Path) -> None:
    put(
        tmp_path,
        "train/NORMAL/IM-0115-0001.jpeg",
        "train/NORMAL/NORMAL2-IM-0115-0001.jpeg",
        "train/NORMAL/IM-0666-0001-0001.jpeg",
        "train/PNEUMONIA/person1_bacteria_1.jpeg",
        "train/PNEUMONIA/unnamed.jpeg",
        "test/NORMAL/IM-0666-0001-0002.jpeg",
        "test/PNEUMONIA/person1_virus_6.jpeg",
        "val/NORMAL/.DS_Store",
        "val/PNEUMONIA/person1946_bacteria_4874.jpeg",
    )
    dataset = discover(tmp_path)
    assert dataset.labels == ("bacteria", "normal", "virus")
    assert count_labels(dataset.samples) == {"bacteria": 2, "normal": 4, "virus": 1}
    assert dataset.ignored == ("train/PNEUMONIA/unnamed.jpeg",)
    assert patients(tmp_path) == {
        "test/NORMAL/IM-0666-0001-0002.jpeg": "IM-0666",
        "test/PNEUMONIA/person1_virus_6.jpeg": "person1",
        "train/NORMAL/IM-0115-0001.jpeg": "IM-0115",
        "train/NORMAL/IM-0666-0001-0001.jpeg": "IM-0666",
        "train/NORMAL/NORMAL2-IM-0115-0001.jpeg": "NORMAL2-IM-0115",
        "train/PNEUMONIA/person1_bacteria_1.jpeg": "person1",
        "val/PNEUMONIA/person1946_bacteria_4874.jpeg": "person1946",
    }


KAGGLE = (
    "train/NORMAL/IM-0115-0001.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg",
    "val/PNEUMONIA/person1946_bacteria_4874.jpeg",
    "test/NORMAL/NORMAL2-IM-0012-0001.jpeg",
    "test/PNEUMONIA/person1_virus_6.jpeg",
)


@pytest.mark.parametrize("above", ["", "chest_xray/", "archive/chest_xray/"])
def test_an_archive_that_holds_everything_twice(tmp_path: Path, above: str) -> None:
    """As chest-xray-pneumonia unpacks: chest_xray/train beside chest_xray/chest_xray/train and __MACOSX."""
    root = tmp_path / "archive" if above.count("/") > 1 else tmp_path
    put(root, *(f"{above.removeprefix('archive/')}{name}" for name in KAGGLE))
    put(root, *(f"{above.removeprefix('archive/')}chest_xray/{name}" for name in KAGGLE), data=b"again")
    put(root, "__MACOSX/chest_xray/train/NORMAL/._IM-0115-0001.jpeg")
    dataset = discover(root)
    inside = above.removeprefix("archive/")
    assert [sample.path for sample in dataset.samples] == sorted(inside + name for name in KAGGLE)
    assert dataset.ignored == (f"{inside}chest_xray/",)
    assert dataset.labels == ("bacteria", "normal", "virus")


def test_the_part_of_every_image_is_kept(tmp_path: Path) -> None:
    put(tmp_path, *(f"Data/{part}/{label}/{n}.png" for n, part in enumerate(("train", "Val", "evaluation", "TEST"))
                    for label in ("COVID19", "NORMAL")))  # fmt: skip
    assert discover(tmp_path).given == {
        "Data/train/COVID19/0.png": "train",
        "Data/train/NORMAL/0.png": "train",
        "Data/Val/COVID19/1.png": "validation",
        "Data/Val/NORMAL/1.png": "validation",
        "Data/evaluation/COVID19/2.png": "evaluation",
        "Data/evaluation/NORMAL/2.png": "evaluation",
        "Data/TEST/COVID19/3.png": "test",
        "Data/TEST/NORMAL/3.png": "test",
    }
    put(tmp_path, "Data/more/COVID19/4.png")  # now they are class folders, as any other names are
    found = discover(tmp_path / "Data")
    assert (found.given, found.labels) == ({}, ("TEST", "Val", "evaluation", "more", "train"))


def test_kinds_as_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "split", *KAGGLE)
    put(tmp_path / "one", *(name.split("/", 1)[1] for name in KAGGLE))
    labels = {
        (folder, kinds): list_images(tmp_path / folder, kinds=kinds).labels
        for folder in ("split", "one")
        for kinds in (None, True, False)
    }
    three, two = ("bacteria", "normal", "virus"), ("NORMAL", "PNEUMONIA")
    assert labels == {
        ("split", None): three,
        ("split", True): three,
        ("split", False): two,
        ("one", None): two,
        ("one", True): three,
        ("one", False): two,
    }
    put(tmp_path / "other", "sick/person1_virus_6.jpeg", "well/a.png")
    with pytest.raises(
        BadInputError, match=r"class folders SICK, WELL give no kinds of pneumonia \(kinds need"
    ):
        list_images(tmp_path / "other", kinds=True)


def test_names_are_read_as_the_model_reads_them(tmp_path: Path) -> None:
    put(tmp_path / "split", *KAGGLE)
    put(tmp_path / "one", *(name.split("/", 1)[1] for name in KAGGLE))
    three, two = ("bacteria", "normal", "virus"), ("NORMAL", "PNEUMONIA")
    for folder in ("split", "one"):
        for labels in (three, two):
            assert discover(tmp_path / folder, labels=labels).labels == labels
    assert discover(tmp_path / "split", labels=("a", "b")).labels == two


def test_kaggle_layout_without_kinds_has_its_two_classes(tmp_path: Path) -> None:
    put(tmp_path, "train/NORMAL/a.png", "train/PNEUMONIA/b.png", "test/NORMAL/c.png", "test/PNEUMONIA/d.png")
    assert discover(tmp_path).labels == ("NORMAL", "PNEUMONIA")


def test_presplit_folders_of_other_classes_are_taken_together(tmp_path: Path) -> None:
    put(tmp_path, "train/sick/1.png", "train/well/2.png", "test/sick/3.png", "test/well/4.png")
    assert count_labels(discover(tmp_path).samples) == {"sick": 2, "well": 2}


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    put(tmp_path, "test/1.png", "control/2.png")
    assert discover(tmp_path).labels == ("control", "test")


def test_nih_names_and_groups_and_equal_files(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a/00001280_004.png",
        "a/00001280_1.png",
        "b/00001280_005.png",
        "a/x.png",
        "b/y.png",
        "b/z.png",
    )
    put(tmp_path, "b/copy.png", data=b"a/x.png")
    (tmp_path / "groups.csv").write_text("class,file,patient\nb,y.png,00001280\n\nb,gone.png,p9\n")
    assert patients(tmp_path) == {
        "a/00001280_004.png": "00001280",
        "a/00001280_1.png": "file:a/00001280_1.png",
        "a/x.png": "file:a/x.png",
        "b/00001280_005.png": "00001280",
        "b/copy.png": "file:a/x.png",
        "b/y.png": "00001280",
        "b/z.png": "file:b/z.png",
    }


def test_equal_files_unite_whole_patients(tmp_path: Path) -> None:
    put(tmp_path, "a/00000001_001.png", "a/00000002_001.png", "b/00000003_001.png")
    put(tmp_path, "a/00000001_002.png", "b/00000002_002.png", data=b"same")
    put(tmp_path, "a/00000002_003.png", "b/00000003_003.png", data=b"same too")
    assert set(patients(tmp_path).values()) == {"00000001"}


def test_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path, "data/a/1.png", "data/b/2.png", "elsewhere/3.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b" / "more").symlink_to(tmp_path / "elsewhere")
    found = [sample.path for sample in discover(tmp_path / "data").samples]
    assert "b/more/3.png" in found
    assert len(found) <= 5  # the loop ends


def test_a_link_to_the_parent_does_not_bring_other_classes(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [(sample.path, sample.label) for sample in discover(tmp_path).samples] == [
        ("a/1.png", "a"),
        ("b/2.png", "b"),
    ]


def test_links_behind_a_link_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path, "data/a/1.png", "data/b/2.png", "process/own/3.png", "disk/4.png")
    (tmp_path / "data" / "b" / "more").symlink_to(tmp_path / "process")
    (tmp_path / "process" / "own" / "root").symlink_to(tmp_path / "disk")  # as /proc leads to everything
    found = discover(tmp_path / "data")
    assert [sample.path for sample in found.samples] == ["a/1.png", "b/2.png", "b/more/own/3.png"]
    assert found.ignored == ("b/more/own/root",)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BadInputError, match=r"cannot read .*broken\.png: No such file.*remove it"):
        discover(tmp_path)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nowhere does not exist \(lay images out as FOLDER/CLASS/IMAGE"):
        discover(tmp_path / "nowhere")
    put(tmp_path, "file.png")
    with pytest.raises(BadInputError, match=r"file\.png is not a folder"):
        discover(tmp_path / "file.png")
    with pytest.raises(BadInputError, match="there are no images in class folders below"):
        discover(tmp_path)
    put(tmp_path, "a/1.png")
    with pytest.raises(BadInputError, match=r"holds a single class, 'a' .*at least two"):
        discover(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        BadInputError, match=r"class folder .*empty holds no images \(put .*or remove the folder"
    ):
        discover(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,class,patient\n",
            r"line 1 is 'file,class,patient' \(its first line must be class,file,patient\)",
        ),
        ("", "line 1 is 'nothing'"),
        ("class,file,patient\na,1.png,p1\na,2.png\n", "line 3 is 'a,2.png'"),
        ("class,file,patient\na,1.png, \n", "line 2 is 'a,1.png, '"),
        ("class,file,patient\na,1.png,p1\na,1.png,p2\n", "line 3 gives a/1.png a second patient, 'p2'"),
        ('class,file,patient\na,"1.png,p1\n', "cannot read .*groups.csv"),
    ],
)
def test_a_malformed_table_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(BadInputError, match=message):
        discover(tmp_path)


def test_a_table_that_is_not_text(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "groups.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match=r"cannot read .*groups\.csv.*write it as UTF-8 CSV"):
        discover(tmp_path)
