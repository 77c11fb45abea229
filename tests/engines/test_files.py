from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import msgspec
import pytest

from engines import files
from engines.errors import ArtefactError, EnvironmentProblem, UsageError

KIND = "edge-dsc/test"


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    files.write_text(target, "one\ud800")
    assert target.read_text() == "one\\ud800"
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


def test_a_link_stays_and_a_private_file_stays_private(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "a.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    files.write_text(link, "one")
    target.chmod(0o600)
    files.write_text(link, "two")
    assert link.is_symlink() and target.read_text() == "two"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(target.parent) == ["a.txt"]


def test_a_file_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    source, link = tmp_path / "a.keras", tmp_path / "link.keras"
    source.write_text("weeks of work")
    link.symlink_to(source)
    for target, read in ((source, source), (link, source), (source, str(link))):
        with pytest.raises(UsageError, match=f"{target.name} is read, and would be replaced") as refused:
            files.require_unread(target, "imagenet", read)
        assert "nothing was written" in refused.value.remedy
    files.require_unread(source, "", tmp_path / "b.keras")
    files.require_unread(tmp_path / "gone.keras", tmp_path / "gone.keras")


def test_a_pipe_and_a_device_are_written_to_and_a_folder_is_refused(tmp_path: Path) -> None:
    pipe, device, loop = tmp_path / "pipe", tmp_path / "device", tmp_path / "loop"
    os.mkfifo(pipe)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*pipe: No such device or address"):
        files.write_text(pipe, "nobody reads")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "read")
    assert os.read(reader, 9) == b"read"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    device.symlink_to("/dev/null")
    files.write_text(device, "x", files.PAGE)
    files.require_writable(device, files.PAGE)
    assert device.is_symlink() and Path("/dev/null").is_char_device()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(EnvironmentProblem, match="No space left"):
        files.write_text(full, "x")
    loop.symlink_to(loop)
    for place, reason in ((tmp_path, "Is a directory"), (loop, "symbolic links")):
        for write in (lambda at: files.write_text(at, "x"), files.require_writable):
            with pytest.raises(EnvironmentProblem, match=reason):
                write(place)


RECORD = '{\n "kind": "edge-dsc/engine-record",'
CONTENT = {
    "r.json": b'{\n "kind": "edge-dsc/latency-report",',
    "s.json": b'{\n "kind": "edge-dsc/split",',
    "x.engine": b"\x08\x09\x12plan",
    "odd": b"plan with a record beside it",
    "model.onnx": b"\x08\x09\x12\x08edge-dsc",
    "model.keras": b"PK\x03\x04" + bytes(26) + b"metadata.json",
    "page.html": b"<!doctype html>\n<head><meta content=\"default-src 'none'; img-src data:; \">",
    "chart.png": b"\x89PNG\r\n\x1a\n" + bytes(30) + b"Software\0Matplotlib version3",
    "rows.csv": b"path,label,probability,p_a,error\n",
    "rows.jsonl": b'{"path": "a.png", "label": "a"}\n',
    "report.md": b"| engine | ms |\n",
}
KINDS = {
    "r.json": "edge-dsc/latency-report",
    "s.json": "edge-dsc/split",
    "x.engine": files.ENGINE,
    "odd": files.ENGINE,
    "model.onnx": files.ONNX_MODEL,
    "model.keras": files.KERAS_MODEL,
    "page.html": files.PAGE,
    "chart.png": files.CHART,
    "rows.csv": files.ROWS,
    "rows.jsonl": files.ROWS,
    "report.md": files.MARKDOWN,
}


@pytest.mark.parametrize("name", CONTENT)
def test_only_a_file_of_the_same_kind_is_replaced(tmp_path: Path, name: str) -> None:
    target, own = tmp_path / name, KINDS[name]
    (tmp_path / "odd.json").write_text(RECORD)
    for kind in set(KINDS.values()) - {own}:
        target.write_bytes(CONTENT[name])
        with pytest.raises(UsageError, match=r" is .*, and would be replaced by .*nothing was written"):
            files.write_text(target, "new", kind)
        with pytest.raises(UsageError, match="would be replaced by"):
            files.require_writable(target, kind)
        assert target.read_bytes() == CONTENT[name]
        target.write_bytes(b"")
        if own != files.ENGINE:
            files.write_text(target, "", kind)
    target.write_bytes(CONTENT[name])
    files.write_text(target, "new", own)
    assert target.read_text() == "new"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("xray.png", b"\x89PNG\r\n\x1a\n" + bytes(300), files.CHART),
        ("xray.jpg", b"\xff\xd8\xff\xe0", files.PAGE),
        ("xray.dcm", bytes(128) + b"DICM", "edge-dsc/split"),
        ("groups.csv", b"class,file,patient\n", files.ROWS),
        ("times.json", b'[{"latencyMs": 1}]', "edge-dsc/latency-report"),
        ("mine.html", b"<html><body>", files.PAGE),
        ("thesis.txt", b"Chapter 1", files.PAGE),
        ("code.py", b"import os", files.MARKDOWN),
        ("all.zip", b"PK\x03\x04" + bytes(40), files.KERAS_MODEL),
    ],
)
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    target = tmp_path / name
    target.write_bytes(content)
    with pytest.raises(UsageError, match="would be replaced"):
        files.write_text(target, "new", kind)
    link = tmp_path / f"link{target.suffix}"
    os.link(target, link)
    with pytest.raises(UsageError, match="would be replaced"):
        files.write_text(link, "new", "edge-dsc/split")
    assert target.read_bytes() == content


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    pipe, huge = tmp_path / "pipe", tmp_path / "huge"
    os.mkfifo(pipe)
    with huge.open("wb") as stream:
        stream.truncate(files.LARGEST_TEXT + 1)
    for path, reason in (
        (pipe, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (huge, "it has 268435457 bytes, the limit is 268435456"),
    ):
        with pytest.raises(ArtefactError, match=f"cannot read .*: .*{reason}"):
            files.read_json(path, remedy="-")
    with pytest.raises(OSError, match="not a regular file"):
        files.sha256_file(pipe)
    (tmp_path / "a").write_bytes(b"abc")
    assert files.read_regular(tmp_path / "a", 3) == b"abc"


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
