"""What need not be done again: kernels that TensorRT for RTX compiled here, and timings that a builder took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.errors import EnvironmentProblem
from engines.files import read_regular, sha256_bytes, write_bytes
from engines.record import EngineRecord

SUFFIX = ".cache"  # model.engine -> model.engine.cache
_MAGIC = b"edge-dsc/runtime-cache 1"


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
