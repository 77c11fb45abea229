"""What need not be done again: kernels that RTX compiled here, timings that a builder took, a choice of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from engines.contract import Sha256, Text
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import DocumentKind, read_regular, sha256_bytes, write_bytes
from engines.record import EngineRecord
from engines.trt.cuda import Gpu

SUFFIX = ".cache"  # model.engine -> model.engine.cache
MEMORY_SUFFIX = ".memory.json"  # model.engine -> model.engine.memory.json
_MAGIC = b"edge-dsc/runtime-cache 1"
_MOST_CHOICES = 64  # of memory, for one engine


def cache_path(engine: Path) -> Path:
    """Return the path of the runtime cache that belongs to an engine."""
    return engine.with_name(engine.name + SUFFIX)


class RuntimeCache:
    """A runtime cache with its file: one line that names the engine and the content's hash, then the content.

    A file that is missing, of another engine, damaged, or refused by TensorRT for RTX (which checks the GPU,
    the driver and its own version) costs the time of compiling again and nothing else.

    Attributes:
        state: What became of it, for the runner's description.
    """

    def __init__(self, cache: Any, record: EngineRecord, engine: Path | None) -> None:
        """Fill the cache from its file; the GPU's context must be current.

        Args:
            cache: The ``IRuntimeCache``.
            record: Of the engine that it belongs to.
            engine: The engine's path; None keeps no file.
        """
        self._cache = cache
        self._engine = record.engine_sha256.encode()
        self._path = cache_path(engine) if engine is not None else None
        self._stored = b""
        self.state = "none beside the engine" if self._path is not None else "not kept"
        if self._path is not None and self._path.is_file():
            self.state = self._load(self._path)

    def save(self) -> None:
        """Write the cache where it grew; a place that cannot be written is noted and costs nothing else."""
        if self._path is None:
            return
        blob = self._cache.serialize()
        if blob is None:
            self.state = "not kept: TensorRT does not give it"
            return
        content = bytes(blob)
        if content == self._stored:
            return
        head = b" ".join((_MAGIC, self._engine, sha256_bytes(content).encode()))
        try:
            write_bytes(self._path, head + b"\n" + content)
        except EnvironmentProblem as error:
            self.state = f"not kept: {error.what}"
            return
        self._stored = content
        self.state = f"kept in {self._path.name}"

    def _load(self, path: Path) -> str:
        try:
            head, _, content = read_regular(path).partition(b"\n")
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror}"
        if head != b" ".join((_MAGIC, self._engine, sha256_bytes(content).encode())):
            return f"{path.name} is of another engine or damaged, made again"
        if not self._cache.deserialize(content):
            return f"{path.name} is of another GPU, driver or release, made again"
        self._stored = content
        return f"read from {path.name}"


class TimingCache:
    """What builders measured of kernels, one file in a folder for each release; TensorRT checks the GPU.

    A build that finds its kernels there is quicker, and chooses what the builds before it chose.
    """

    def __init__(self, trt: Any, config: Any, folder: Path) -> None:
        """Give a builder's config the timings of earlier builds, or none where there are none that it takes.

        Args:
            trt: The module ``tensorrt``.
            config: The ``IBuilderConfig``.
            folder: Where the file is kept.
        """
        self._path = folder / f"{trt.__name__}-{trt.__version__}.timing{SUFFIX}"
        try:
            self._stored = read_regular(self._path)
        except OSError:
            self._stored = b""
        self._taken = bool(self._stored) and self._offer(config, self._stored)
        if not self._taken:
            self._offer(config, b"")

    def save(self, config: Any) -> tuple[str, ...]:
        """Write what is known after a build; returns what is to be said of it."""
        cache = config.get_timing_cache()
        blob = cache.serialize() if cache is not None else None
        notes = (f"kernels were chosen by the timings in {self._path.name} too",) if self._taken else ()
        if blob is None or bytes(blob) == self._stored:
            return notes
        try:
            write_bytes(self._path, bytes(blob))
        except EnvironmentProblem as error:
            return (*notes, f"the timings of this build are not kept: {error.what}")
        return notes

    def _offer(self, config: Any, content: bytes) -> bool:
        self._cache = config.create_timing_cache(content)
        return self._cache is not None and bool(config.set_timing_cache(self._cache, ignore_mismatch=False))


_Size: TypeAlias = Annotated[int, Meta(ge=1, le=65536)]
_Kind: TypeAlias = Annotated[str, Meta(pattern=r"\A(device|mapped)\Z")]
_Microseconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]


class MemoryChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which kind of memory was faster for batches of one size on one GPU.

    Attributes:
        gpu: That GPU, as :meth:`engines.trt.cuda.Gpu.facts` tells it from others.
        runtime_version: Version of the runtime that ran the engine.
        batch: Images a batch.
        kind: ``device`` or ``mapped``.
        medians_us: Median time of a batch with each kind, microseconds.
        created: UTC time of the trial, ISO 8601.
    """

    gpu: Mapping[Text, Text]
    runtime_version: Text
    batch: _Size
    kind: _Kind
    medians_us: Mapping[_Kind, _Microseconds]
    created: Text

    @property
    def words(self) -> str:
        """What was measured."""
        times = ", ".join(f"{kind} {taken:.0f} us" for kind, taken in self.medians_us.items())
        return f"measured in turns at batch {self.batch}, {times}"


class MemoryChoices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The choices that were made for one engine.

    Attributes:
        engine_sha256: Hash of that engine.
        choices: One for each GPU, version and batch size, the newest last.
    """

    engine_sha256: Sha256
    choices: tuple[MemoryChoice, ...]


MEMORY = DocumentKind(
    name="edge-dsc/memory-choices",
    version=1,
    body=MemoryChoices,
    renew="edge-dsc infer ENGINE SOURCE, on the GPU that it is for",
    seal="choices_sha256",
)


def memory_path(engine: Path) -> Path:
    """Return the path of the document with an engine's choices of memory."""
    return engine.with_name(engine.name + MEMORY_SUFFIX)


@dataclass(frozen=True)
class MemoryFile:
    """An engine's choices of memory, beside it, for one GPU: a second run takes the choice of the first.

    A file that is missing, damaged or of another engine costs a trial and nothing else.

    Attributes:
        engine: The engine's path; None keeps no file.
        record: Its record.
        gpu: The GPU that it runs on; None, where that is not known, keeps no file.
        version: Version of the runtime here.
    """

    engine: Path | None
    record: EngineRecord
    gpu: Gpu | None
    version: str

    def find(self, batch: int) -> MemoryChoice | None:
        """Return the choice that was made here for a batch size, or None."""
        return next((choice for choice in self._load() if self._is_of(choice, batch)), None)

    def keep(self, batch: int, medians_us: Mapping[str, float]) -> tuple[MemoryChoice, str]:
        """Choose the faster kind for a batch size, and add the choice to the file.

        Returns:
            The choice, and what became of the file; one that cannot be written costs nothing else.
        """
        choice = MemoryChoice(
            gpu=self._facts,
            runtime_version=self.version,
            batch=batch,
            kind=min(medians_us, key=medians_us.__getitem__),
            medians_us={name: round(taken, 3) for name, taken in medians_us.items()},
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        if self._path is None:
            return choice, "not kept"
        others = [other for other in self._load() if not self._is_of(other, batch)]
        choices = (*others[1 - _MOST_CHOICES :], choice)
        try:
            MEMORY.save(self._path, MemoryChoices(engine_sha256=self.record.engine_sha256, choices=choices))
        except (EnvironmentProblem, UsageError) as error:  # such as a folder that is read only
            return choice, f"not kept: {error.what}"
        return choice, f"kept in {self._path.name}"

    def _is_of(self, choice: MemoryChoice, batch: int) -> bool:
        known = (choice.gpu, choice.runtime_version, choice.batch)
        return known == (self._facts, self.version, batch)

    @property
    def _facts(self) -> dict[str, str]:
        return self.gpu.facts() if self.gpu is not None else {}

    @property
    def _path(self) -> Path | None:
        return memory_path(self.engine) if self.engine is not None and self.gpu is not None else None

    def _load(self) -> tuple[MemoryChoice, ...]:
        if self._path is None:
            return ()
        try:
            found = MEMORY.load(self._path)
        except ArtefactError:
            return ()
        return found.choices if found.engine_sha256 == self.record.engine_sha256 else ()
