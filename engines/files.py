"""Hashing, atomic writing and versioned JSON: the one place where edge-dsc touches its own files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec

from engines.errors import ArtefactError, EnvironmentProblem

_CHUNK = 1 << 20
Body = TypeVar("Body")
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]  # a body of one version -> that of the next


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


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


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` and rename it to ``target`` when the block ends well.

    A reader, or a run that is killed, sees the old file or the new one, never half of one.

    Raises:
        EnvironmentProblem: The place cannot be written (permission, space).
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: Keras chooses its format by it.
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        temporary.replace(target)
        temporary = None
    except OSError as error:
        raise output_problem(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(target: Path) -> None:
    """Refuse a place that cannot be written before the work for it begins, not after.

    Raises:
        EnvironmentProblem: The place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise output_problem(target, error) from error


def write_bytes(target: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def write_text(target: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    write_bytes(target, text.encode())


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
        """Write a document atomically: ``kind`` and ``schema_version``, the fields, then the seal. No NaN."""
        body = self.to_builtins(value)
        sealed = {self.seal: sha256_bytes(canonical_json(body))} if self.seal else {}
        document = {"kind": self.name, "schema_version": self.version, **body, **sealed}
        write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")

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
        document = read_json(path, remedy=remedy)
        if not isinstance(document, dict) or document.get("kind") != self.name:
            seen = document.get("kind") if isinstance(document, dict) else type(document).__name__
            raise ArtefactError(f"{path} is not an {self.name} document (kind: {seen})", remedy=remedy)
        return self._convert(document, path, remedy)

    def _convert(self, document: dict[str, Any], path: Path, remedy: str) -> Body:
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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ArtefactError(f"cannot read {path}: {reason}", remedy=remedy) from error
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not valid JSON: {error}", remedy=remedy) from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is JSON, but no number that we know
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
