"""Hashing, atomic writing and versioned JSON: the one place where edge-dsc touches its own files."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec

from engines.errors import ArtefactError, EnvironmentProblem, UsageError

_CHUNK = 1 << 20
# Bytes of a document, a list or a table; the largest of ours, a report, has a few MiB.
LARGEST_TEXT = 256 << 20

# What a file is: said by whoever writes it, and seen again in the file that it would replace.
ANNOTATED = "an annotated picture"
ANNOTATED_VIDEO = "an annotated video"
BUNDLE = "a bundle"
CHART = "a chart"
DOCUMENT = "a JSON document"
ENGINE = "an engine"
KERAS_MODEL = "a Keras model"
MARKDOWN = "a text"
ONNX_MODEL = "an ONNX model"
PAGE = "a page of edge-dsc"
ROWS = "rows of results"
VIDEO = "a video"
_OTHER = "a file of another program"
ANNOTATED_MARK = b"\xff\xfe\x00\x0aedge-dsc"  # a comment of JPEG, before all else
VIDEO_MARK = b"annotated by edge-dsc"  # at the end of a video, in what its container calls empty
_OUR_DOCUMENT = re.compile(rb'\s*\{\s*"kind": ?"(edge-dsc/[a-z-]+)"')
_HEADS = (
    (BUNDLE, re.compile(rb'.{512}\{\s*"kind": "edge-dsc/bundle"', re.DOTALL)),
    (ROWS, re.compile(rb'path,(frame,)?(seconds,|captured,)?label,|\{"path": ')),
    (PAGE, re.compile(rb"<!doctype html>.{1,400}default-src 'none'; img-src data:", re.DOTALL)),
    ("an HTML page of another program", re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE)),
    ("JSON of another program", re.compile(rb"\s*[{\[]")),
    ("a table of patients", re.compile(rb"(\xef\xbb\xbf)?class,file,patient")),
    (CHART, re.compile(rb"\x89PNG.{1,100}Matplotlib", re.DOTALL)),
    (VIDEO, re.compile(rb"RIFF.{4}AVI |.{4}ftyp|\x1aE\xdf\xa3", re.DOTALL)),
    (ANNOTATED, re.compile(b"\xff\xd8" + re.escape(ANNOTATED_MARK))),
    (
        "a picture",
        re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0|II\*\0|MM\0\*|RIFF|.{128}DICM", re.DOTALL),
    ),
    (ONNX_MODEL, re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]")),
    (KERAS_MODEL, re.compile(rb"PK\x03\x04.{26,40}(metadata|config)\.json", re.DOTALL)),
    ("an archive", re.compile(rb"PK\x03\x04|\x1f\x8b|ustar")),
)
_SUFFIXES = {
    "": MARKDOWN, ".avi": VIDEO, ".csv": ROWS, ".htm": PAGE, ".html": PAGE, ".json": DOCUMENT, ".jsonl": ROWS,
    ".keras": KERAS_MODEL, ".md": MARKDOWN, ".mkv": VIDEO, ".mov": VIDEO, ".mp4": VIDEO, ".onnx": ONNX_MODEL,
    ".png": CHART, ".txt": MARKDOWN,
}  # fmt: skip
Body = TypeVar("Body")
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]  # a body of one version -> that of the next


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    _require_regular(path)
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _require_regular(path: Path) -> os.stat_result:
    """Refuse a pipe, which may never begin, and a device, which may never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(code, "it is not a regular file")
    return found


def read_regular(path: Path, limit: int = LARGEST_TEXT) -> bytes:
    """Read a whole file, looked at before: a regular one of a sane size.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger; ``strerror`` says which.
    """
    size = _require_regular(path).st_size
    if size > limit:
        raise OSError(errno.EFBIG, f"it has {size} bytes, the limit is {limit}")
    with path.open("rb") as stream:
        return stream.read(limit)


def require_unpacked(path: Path, limit: int) -> None:
    """Refuse a ZIP archive that says it unpacks to more than ``limit`` bytes; readers take no more than it says.

    Raises:
        ValueError: It does.
        OSError: It cannot be read, or is no regular file.
        zipfile.BadZipFile: It is no archive.
    """
    _require_regular(path)
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > limit:
        raise ValueError(f"it unpacks to {size} bytes, the limit is {limit}")


def canonical_json(value: object) -> bytes:
    """Return ``value`` as the one JSON text that stands for it: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def output_problem(path: Path, error: OSError) -> EnvironmentProblem:
    """Turn the operating system's refusal to write ``path`` into our error."""
    remedies = {
        errno.ENOSPC: "free some space or choose another place with --out",
        errno.EDQUOT: "free some space or choose another place with --out",
        errno.EACCES: "choose a place that you may write to with --out",
        errno.EPERM: "choose a place that you may write to with --out",
        errno.EROFS: "choose a place that you may write to with --out",
    }
    remedy = remedies.get(error.errno or 0, "choose another place with --out")
    return EnvironmentProblem(f"cannot write {path}: {error.strerror or error}", remedy=remedy)


def kind_of_file(path: Path) -> str | None:
    """Say what a file is, by what lies beside it, its first bytes, or else its suffix; None of an empty one."""
    head = _head(path)
    if not head:
        return None
    if document := _OUR_DOCUMENT.match(head):
        return document[1].decode()
    record = path.with_name(path.name + ".json")
    document = _OUR_DOCUMENT.match(_head(record)) if record.is_file() else None
    if path.suffix.lower() == ".engine" or (document and document[1] == b"edge-dsc/engine-record"):
        return ENGINE
    seen = next((kind for kind, pattern in _HEADS if pattern.match(head)), None)
    if seen == VIDEO and _tail(path, len(VIDEO_MARK)) == VIDEO_MARK:
        return ANNOTATED_VIDEO
    return seen or _SUFFIXES.get(path.suffix.lower(), _OTHER)


def _head(path: Path) -> bytes:
    with io.FileIO(path) as stream:  # without a buffer: no more is read
        return stream.read(1 << 10)


def _tail(path: Path, count: int) -> bytes:
    with io.FileIO(path) as stream:
        stream.seek(-min(count, os.fstat(stream.fileno()).st_size), os.SEEK_END)
        return stream.read(count)


def require_kind(target: Path, kind: str | None) -> os.stat_result | None:
    """Refuse to write over a folder, or over a file of another kind; pipes and devices are written to.

    Args:
        target: What would be written.
        kind: What it would become, such as :data:`ENGINE` or the name of a :class:`DocumentKind`; None for a file that
            only its own folder knows, such as a cache.

    Returns:
        What is there now, links followed; None where nothing is.

    Raises:
        UsageError: There is a file of another kind.
        OSError: It is a folder, or cannot be looked at.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind is None or not stat.S_ISREG(found.st_mode):
        return found
    seen = kind_of_file(target)
    same = seen in (None, kind) or (seen == DOCUMENT and kind.startswith("edge-dsc/"))
    if not same:
        raise UsageError(
            f"{target} is {seen}, and would be replaced by {kind}",
            remedy="nothing was written: name another file, or remove this one first",
        )
    return found


@contextlib.contextmanager
def atomic_path(target: Path, kind: str | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``target`` and rename it to ``target`` when the block ends well.

    A reader, or a run that is killed, sees the old file or the new one, never half of one. A link stays, and what it
    leads to is replaced; mode and owner stay; a pipe or a device is written to.

    What is written beside the temporary file under its name with one more suffix goes with it.

    Args:
        target: The file.
        kind: What it will be, as in :func:`require_kind`.

    Raises:
        EnvironmentProblem: The place cannot be written (permission, space), or is a folder.
        UsageError: There is a file of another kind.
    """
    temporary: Path | None = None
    try:
        found = require_kind(target, kind)
        special = found is not None and not stat.S_ISREG(found.st_mode)
        place = target if special else Path(os.path.realpath(target))
        folder = None if special else place.parent
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: Keras chooses its format by it.
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{place.stem}-", suffix=place.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if special:
            _write_to_special(place, temporary)
            return
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        _give_mode(temporary, found)
        for companion in _companions(temporary):
            companion.replace(place.with_name(place.name + companion.name.removeprefix(temporary.name)))
        temporary.replace(place)
        temporary = None
    except OSError as error:
        raise output_problem(target, error) from error
    finally:
        if temporary is not None:
            for left in (*_companions(temporary), temporary):
                left.unlink(missing_ok=True)


def _companions(file: Path) -> list[Path]:
    """Return what was written beside a file under its name with one more suffix, such as a runtime's cache."""
    return list(file.parent.glob(f"{glob.escape(file.name)}.*"))


def open_special(path: str | Path, flags: int) -> int:
    """Open a pipe or a device to write to it (``opener`` of :func:`open`); a pipe that nobody reads is an error."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    return handle


def _write_to_special(place: Path, source: Path) -> None:
    with open(place, "wb", buffering=0, opener=open_special) as stream:
        data = source.read_bytes()
        while data:
            data = data[stream.write(data) or 0 :]


def _give_mode(temporary: Path, found: os.stat_result | None) -> None:
    """Give the mode and, where that is allowed, the owner of what is replaced; else those of a new file."""
    if found is None:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        return
    with contextlib.suppress(PermissionError):
        os.chown(temporary, found.st_uid, found.st_gid)
    temporary.chmod(stat.S_IMODE(found.st_mode))


def clear_folder(folder: Path, marker: str, made: Sequence[str], what: str) -> None:
    """Remove what an earlier run of ours made in a folder, and nothing else; mark the folder as ours.

    Args:
        folder: New, empty, or with the marker in it.
        marker: Name of the file that says so.
        made: Names of the files and folders that a run makes.
        what: What runs, such as ``demo``.

    Raises:
        UsageError: The folder holds something and no marker.
        EnvironmentProblem: The place cannot be written.
    """
    ours = (folder / marker).is_file()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is not empty and no earlier {what}", remedy="choose another folder with --out"
        )
    for place in (folder / name for name in made):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    write_text(folder / marker, f"edge-dsc {what}: the next one replaces {', '.join(made)}\n")


def require_writable(target: Path, kind: str | None = None) -> None:
    """Refuse a place that cannot be written before the work for it begins, not after.

    Raises:
        EnvironmentProblem: The place cannot be written.
        UsageError: There is a file of another kind than ``kind``; see :func:`require_kind`.
    """
    try:
        found = require_kind(target, kind)
        if found is not None and not stat.S_ISREG(found.st_mode):
            return
        folder = Path(os.path.realpath(target)).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise output_problem(target, error) from error


def require_unread(target: Path, *read: str | Path) -> None:
    """Refuse to write over a file that the same command reads, whatever links lead there.

    Args:
        target: What would be written.
        read: Files that are read; what names no file is let through.

    Raises:
        UsageError: ``target`` is one of them.
    """
    if target.exists() and os.path.realpath(target) in map(os.path.realpath, read):
        raise UsageError(
            f"{target} is read, and would be replaced by what is made of it",
            remedy="nothing was written: choose another place with --out",
        )


def write_bytes(target: Path, data: bytes, kind: str | None = None) -> None:
    """Write a whole file atomically; ``kind`` as in :func:`atomic_path`."""
    with atomic_path(target, kind) as temporary:
        temporary.write_bytes(data)


def write_text(target: Path, text: str, kind: str | None = None) -> None:
    """Write a whole UTF-8 text file atomically; ``kind`` as in :func:`atomic_path`.

    Halves of characters, as in a file's name that is no UTF-8, become visible.
    """
    write_bytes(target, text.encode(errors="backslashreplace"), kind)


@dataclass(frozen=True, kw_only=True)
class DocumentKind(Generic[Body]):
    """One kind of JSON document of ours: read and written nowhere else, checked field by field.

    The version grows whenever a field comes, goes or changes its meaning; ``older`` makes each earlier body the next
    one. A reader refuses a later version by its number, and an unknown, missing or mistyped field by its name.

    Attributes:
        name: Its ``kind``, such as ``edge-dsc/engine-record``.
        version: The ``schema_version`` that is written.
        body: The ``msgspec.Struct`` that holds it, frozen, with ``forbid_unknown_fields``.
        renew: The command that makes such a file again.
        seal: Name of the field with the hash of the body as it was written; None for a document without a seal.
        sealed_from: The first version that has the seal.
        older: Earlier versions that are read too, each with the function that makes its body the next one.
        encode: msgspec's ``enc_hook``, for a body that holds a type that JSON does not know.
        decode: msgspec's ``dec_hook``, which undoes it.
    """

    name: str
    version: int
    body: type[Body]
    renew: str
    seal: str | None = None
    sealed_from: int = 1
    older: Mapping[int, Upgrade] = field(default_factory=dict)
    encode: Callable[[Any], object] | None = None
    decode: Callable[[type[Any], Any], object] | None = None

    def to_builtins(self, value: Body) -> dict[str, Any]:
        """Return a body as the values that are written, without kind, version and seal."""
        return cast(dict[str, Any], msgspec.to_builtins(value, enc_hook=self.encode))

    def save(self, path: Path, value: Body) -> None:
        """Write a document atomically: ``kind`` and ``schema_version``, the fields, then the seal. No NaN.

        Raises:
            EnvironmentProblem: The place cannot be written.
            UsageError: There is a file of another kind.
        """
        write_text(path, self.dumps(value), self.name)

    def load(self, path: Path, *, renew: str | None = None) -> Body:
        """Read a document.

        Args:
            path: The file.
            renew: The command that makes it again, where more is known than :attr:`renew` says.

        Raises:
            ArtefactError: Missing, unreadable, not JSON, another kind or version, edited after it was sealed, or a
                field that is missing, unknown or of another type; the message names it.
        """
        remedy = f"make it again: {renew or self.renew}"
        return self._convert(read_json(path, remedy=remedy), path, remedy)

    def dumps(self, value: Body) -> str:
        """Return a document as the JSON text that :meth:`save` writes."""
        body = self.to_builtins(value)
        sealed = {self.seal: sha256_bytes(canonical_json(body))} if self.seal else {}
        document = {"kind": self.name, "schema_version": self.version, **body, **sealed}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema (draft 2020-12) of a document as :meth:`save` writes it; of plain types alone."""
        (found,), parts = msgspec.json.schema_components([self.body])
        body = parts.pop(found["$ref"].rpartition("/")[2])
        ours: dict[str, Any] = {"kind": {"const": self.name}, "schema_version": {"const": self.version}}
        seal = {self.seal: {"type": "string", "pattern": "^[0-9a-f]{64}$"}} if self.seal else {}
        for part in (body, *parts.values()):
            # What stands below the first line is for who reads the code.
            part["description"], _, _ = part["description"].partition("\n")
        body["properties"] = {**ours, **body["properties"], **seal}
        body["required"] = [*ours, *body["required"], *seal]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body, "$defs": parts}

    def loads(self, text: str, source: str) -> Body:
        """Read a document that travelled inside something else, as :meth:`load` does.

        Args:
            text: The JSON text.
            source: Where it came from, for messages.

        Raises:
            ArtefactError: As :meth:`load`.
        """
        remedy = f"make it again: {self.renew}"
        return self._convert(_parse_json(text, source, remedy), source, remedy)

    def _convert(self, document: object, path: Path | str, remedy: str) -> Body:
        if not isinstance(document, dict) or document.get("kind") != self.name:
            seen = document.get("kind") if isinstance(document, dict) else type(document).__name__
            raise ArtefactError(f"{path} is not an {self.name} document (kind: {seen})", remedy=remedy)
        body = dict(document)
        del body["kind"]
        version = body.pop("schema_version", None)
        if isinstance(version, bool) or version not in (*self.older, self.version):
            reads = " and ".join(map(str, sorted((*self.older, self.version))))
            raise ArtefactError(
                f"{path} has schema version {version}, this edge-dsc reads {reads}", remedy=remedy
            )
        sealed = self.seal if version >= self.sealed_from else None
        if sealed and body.pop(sealed, None) != sha256_bytes(canonical_json(body)):
            raise ArtefactError(f"{path} was edited after it was made", remedy=remedy)
        try:
            while version != self.version:
                body, version = self.older[version](body), version + 1
            return msgspec.convert(body, self.body, strict=True, dec_hook=self.decode)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path} is no readable {self.name}: {error}", remedy=remedy) from error


def read_json(path: Path, *, remedy: str) -> object:
    """Read a JSON file, whatever it holds; ``NaN`` and ``Infinity`` are no JSON.

    Raises:
        ArtefactError: Missing, unreadable, no UTF-8 or no JSON.
    """
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ArtefactError(f"cannot read {path}: {reason}", remedy=remedy) from error
    return _parse_json(text, path, remedy)


def _parse_json(text: str, source: Path | str, remedy: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{source} is not valid JSON: {error}", remedy=remedy) from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is JSON, but no number that we know
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
