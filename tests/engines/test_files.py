from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from engines import files
from engines.errors import ArtefactError, EnvironmentProblem

KIND = "edge-dsc/test"


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    files.write_text(target, "one")
    files.write_text(target, "two")
    assert target.read_text() == "two"
    assert os.listdir(target.parent) == ["a.txt"]
    assert target.stat().st_mode & 0o044 == 0o044 & ~_umask()


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise failure
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]


def test_disk_full_and_no_permission_name_the_place_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*a\.txt: No space left") as caught:
        with files.atomic_path(tmp_path / "a.txt"):
            raise OSError(28, "No space left on device")
    assert "free some space" in caught.value.remedy
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        files.write_text(blocked / "a.txt", "x")


class Version1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    one: int


class Version3(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    one: int
    two: float
    words: tuple[str, ...] = ()


FIRST = files.DocumentKind(name=KIND, version=1, body=Version1, renew="edge-dsc make", seal="seal")
THIRD = files.DocumentKind(
    name=KIND,
    version=3,
    body=Version3,
    renew="edge-dsc make",
    seal="seal",
    older={1: lambda body: {**body, "two": body["one"] / 2}, 2: lambda body: {**body, "words": ["late"]}},
)
PLAIN = files.DocumentKind(name=KIND, version=3, body=Version3, renew="edge-dsc make")


@pytest.mark.parametrize("kind", [PLAIN, THIRD])
def test_a_document_of_a_kind_comes_back(tmp_path: Path, kind: files.DocumentKind[Version3]) -> None:
    path = tmp_path / "a.json"
    value = Version3(one=1, two=0.1, words=("ü",))
    kind.save(path, value)
    assert kind.load(path) == value
    assert list(json.loads(path.read_text()))[:2] == ["kind", "schema_version"]
    assert ("seal" in json.loads(path.read_text())) is (kind is THIRD)


def test_a_document_of_an_older_version_is_brought_up_to_date(tmp_path: Path) -> None:
    FIRST.save(tmp_path / "a.json", Version1(3))
    assert THIRD.load(tmp_path / "a.json") == Version3(one=3, two=1.5, words=("late",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"kind": "edge-dsc/test", "one": NaN}', "NaN is not a JSON number"),
        ("[1]", r"not an edge-dsc/test document \(kind: list\)"),
        ('{"kind": "other", "schema_version": 3}', r"not an edge-dsc/test document \(kind: other\)"),
        ('{"kind": "edge-dsc/test", "schema_version": 4}', "schema version 4, this edge-dsc reads 3"),
        ('{"kind": "edge-dsc/test", "schema_version": true}', "schema version True, this edge-dsc reads 3"),
        ('{"kind": "edge-dsc/test", "one": 1, "two": 2}', "schema version None, this edge-dsc reads 3"),
        ('{"kind": "edge-dsc/test", "schema_version": 3, "one": 1}', "missing required field `two`"),
        (
            '{"kind": "edge-dsc/test", "schema_version": 3, "one": "1", "two": 2}',
            r"`int`, got `str`.*\$\.one",
        ),
        ('{"kind": "edge-dsc/test", "schema_version": 3, "one": 1, "two": 2, "x": 0}', "unknown field `x`"),
    ],
)
def test_a_document_that_is_not_of_its_kind_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ArtefactError, match=message) as caught:
        PLAIN.load(path)
    assert caught.value.remedy == "make it again: edge-dsc make"
    with pytest.raises(ArtefactError) as caught:
        PLAIN.load(path, renew="edge-dsc make --more")
    assert caught.value.remedy == "make it again: edge-dsc make --more"


def test_an_edit_shows_in_every_version(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    THIRD.save(path, Version3(one=1, two=2.0))
    path.write_text(path.read_text().replace('"one": 1', '"one": 2'))
    with pytest.raises(ArtefactError, match="was edited after it was made"):
        THIRD.load(path)
    FIRST.save(path, Version1(1))
    path.write_text(path.read_text().replace('"one": 1', '"one": 2'))
    with pytest.raises(ArtefactError, match="was edited after it was made"):
        THIRD.load(path)


def test_an_older_version_without_what_its_upgrade_needs_is_refused(tmp_path: Path) -> None:
    kind = files.DocumentKind(
        name=KIND, version=2, body=Version1, renew="make", older={1: lambda body: {"one": body["uno"]}}
    )
    (tmp_path / "a.json").write_text('{"kind": "edge-dsc/test", "schema_version": 1}')
    with pytest.raises(ArtefactError, match="is no readable edge-dsc/test: 'uno'"):
        kind.load(tmp_path / "a.json")


def test_no_document_holds_a_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        PLAIN.save(tmp_path / "a.json", Version3(one=1, two=float("nan")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"kind": "edge-dsc/test", "x": NaN}', "NaN is not a JSON number"),
        (b"\xff\xfe", "not a text file"),
        (b"[1]", r"not an edge-dsc/test document \(kind: list\)"),
        (b'{"kind": "other"}', r"kind: other"),
        (b'{"kind": "edge-dsc/test", "schema_version": 2}', "schema version 2, this edge-dsc reads 1"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=message) as caught:
        FIRST.load(path)
    assert caught.value.remedy == "make it again: edge-dsc make"


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert files.sha256_file(path) == files.sha256_bytes(b"abc") == known


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
