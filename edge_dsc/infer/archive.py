"""``infer --ray``: an archive through Ray Data, a runner in each actor, a part file of rows for each batch of files.

What goes through Ray are names and counts. An actor reads its files, answers them as :mod:`edge_dsc.infer.classify`
does on one machine, and writes their rows as one part that is named after them. A batch whose actor or node died is
done again and writes the same part, so each file has exactly one row.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import logging
import math
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from edge_dsc.infer.classify import Answer, OperatingPoint, Prepared, classify, decide_each, prepare_picture
from edge_dsc.infer.rows import DECISION, column_names, csv_cells, row_of
from edge_dsc.infer.source import STREAMS, SourceKind, expand_source, hide_password, parse_source
from edge_dsc.infer.stop import Stop, stop_on_signals
from engines import errors
from engines.contract import Count, ModelContract, Sha256, Text
from engines.errors import (
    ArtefactError,
    BadInputError,
    EdgeDscError,
    EnvironmentProblem,
    ImageError,
    UsageError,
)
from engines.files import DocumentKind, sha256_bytes, write_bytes
from engines.images import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    decode_image,
    prepare_pixels,
    quiet_decoder,
    require_decoder,
    usable_processors,
)
from engines.packages import load
from engines.record import BatchRange, EngineRecord, peek_record, read_engine, record_path
from engines.runtimes import DEFAULT_OPTIONS, Progress, Runner, RunnerOptions, get_runtime, open_engine

LOCAL = "local"  # an address: start a Ray on this machine and end it afterwards
FORMATS = (".parquet", ".csv")
MANIFEST = "_archive.json"  # readers of Parquet folders pass over such names
ACTOR_SHARE = (
    0.9  # of a processor: what is left keeps Ray's own tasks going; actors that hold all wait for ever
)
LARGEST_PART = 1024  # files: what a killed actor costs, and the number of parts of a large archive
_TURNS = 32  # parts for each actor, so that all end at about the same time
_STORE_THREADS = 8  # an object store answers late: so many files of an actor are on their way at once
_PART = "part-"
_STORE_BYTES = 128 << 20  # of a Ray of our own: names and counts
_ANSWER_S = 5.0  # until a Ray at an address must take a connection
_RIGHTS = "check the address, and what its credentials allow"


class ArchiveRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document beside the parts: whose rows they are, and whether that is all of them.

    Attributes:
        engine: File name of the engine.
        engine_sha256: Its hash: rows of two engines do not go into one folder.
        source: The source as it was named, without password.
        labels: Class names, in the order of the columns.
        operating_point: How a class is called, as text; empty without one.
        files: Files of the source.
        answered: Files with an answer; of this and all earlier runs that were resumed.
        failed: Files with an error.
        finished: Whether every file has its row.
        created: UTC time of the writing, ISO 8601.
    """

    engine: Text
    engine_sha256: Sha256
    source: Annotated[str, Meta(max_length=4096)]
    labels: tuple[str, ...]
    operating_point: str
    files: Count
    answered: Count
    failed: Count
    finished: bool
    created: Text


ARCHIVE = DocumentKind(
    name="edge-dsc/archive-run",
    version=1,
    body=ArchiveRun,
    renew="edge-dsc infer ENGINE SOURCE --ray --resume",
)


@dataclass(frozen=True, kw_only=True)
class ArchiveRequest:
    """What to classify, where, and where the rows go.

    Attributes:
        engine: The engine file; its content travels to the actors.
        source: An image, a folder or a glob; ``-`` or a ``.txt`` file with a path a line; a ``.parquet`` file or folder
            with a column ``path``; or an address such as ``s3://bucket/folder``, which every node must reach.
        out: A folder, ``NAME.parquet`` or ``NAME.csv``, which every node must reach; or such an address.
        address: Of a Ray that runs; :data:`LOCAL` starts one here.
        resume: Leave out the files that ``out`` has rows of.
        limit: Only so many files.
        threads: Decoding threads of an actor; None takes one a processor, and more for object stores.
        thresholds: By class, as :class:`edge_dsc.infer.classify.OperatingPoint` takes them.
        abstain: Likewise; with neither, rows have no column for a decision.
        running: How an engine of a GPU runs.
    """

    engine: Path
    source: str
    out: str
    address: str = LOCAL
    resume: bool = False
    limit: int | None = None
    threads: int | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    abstain: float | None = None
    running: RunnerOptions = DEFAULT_OPTIONS


@dataclass(frozen=True, kw_only=True)
class ArchiveSummary:
    """What a run over an archive did.

    Attributes:
        engine: The engine file.
        source: The source as named, without password.
        files: Files of the source.
        resumed: Files that had a row.
        answered: Files that got an answer.
        failed: Files that got an error row.
        parts: Parts that were written.
        actors: Actors that ran.
        seconds: Wall time from the first batch handed to Ray to its last answer.
        start_seconds: Time until then: listing, and starting or joining Ray.
        out: Where the rows are.
        interrupted: Whether Ctrl-C or SIGTERM ended it early; the parts so far are kept.
    """

    engine: str
    source: str
    files: int
    resumed: int
    answered: int
    failed: int
    parts: int
    actors: int
    seconds: float
    start_seconds: float
    out: str
    interrupted: bool

    def line(self) -> str:
        """Return one line for the terminal."""
        parts = [f"{self.answered} images classified"]
        if self.failed:
            parts.append(f"{self.failed} could not be read")
        if self.resumed:
            parts.append(f"{self.resumed} were there already")
        if self.seconds > 0:
            parts.append(
                f"{(self.answered + self.failed) / self.seconds:.1f} images/s by {self.actors} actors"
            )
        early = " (interrupted: go on with --resume)" if self.interrupted else ""
        return f"{', '.join(parts)} -> {self.out}, {self.parts} parts{early}"


@dataclass(frozen=True)
class Folder:
    """A folder of this machine, or of a store that pyarrow knows, as Ray does; picklable.

    Attributes:
        name: As it was named, without password.
        path: What the file system calls it.
        store: The ``pyarrow.fs.FileSystem``; None for this machine's.
    """

    name: str
    path: str
    store: Any = None

    @classmethod
    def at(cls, where: str) -> Folder:
        """Open a place by path or address.

        Raises:
            EnvironmentProblem: Nobody answers there, or not to these credentials.
            UsageError: No store is known by such an address.
        """
        if "://" not in where:
            return cls(where, os.path.abspath(where))  # noqa: PTH100  a Path would change what s3-like names say
        name = hide_password(where.partition("?")[0])
        with _store_problems(f"open {name}"):
            try:
                store, path = load("pyarrow.fs").FileSystem.from_uri(where)
            except ValueError as error:
                raise UsageError(
                    f"{name} is no address of a store: {_one_line(error)}",
                    remedy="such as s3://bucket/folder",
                ) from error
        return cls(
            f"{where.partition('://')[0]}://{path}".rstrip("/"), path.rstrip("/"), store
        )  # without a user

    def names(self) -> list[str]:
        """Return the names of the files in it, without those in its folders; none where it is missing.

        Raises:
            EnvironmentProblem: It cannot be read.
        """
        if self.store is None:
            here = Path(self.path)
            with _store_problems(f"read {self.name}"):
                return (
                    sorted(entry.name for entry in here.iterdir() if entry.is_file()) if here.exists() else []
                )
        fs = load("pyarrow.fs")
        with _store_problems(f"read {self.name}"):
            found = self.store.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def read(self, name: str) -> bytes:
        """Return what a file in it holds.

        Raises:
            EnvironmentProblem: It cannot be read.
        """
        with _store_problems(f"read {self.name}/{name}"):
            if self.store is None:
                return Path(self.path, name).read_bytes()
            with self.store.open_input_stream(f"{self.path}/{name}") as stream:
                return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, so that others see all of it or none; an object store knows nothing else.

        Raises:
            EnvironmentProblem: It cannot be written.
        """
        if self.store is None:
            write_bytes(Path(self.path, name), data)
            return
        path = f"{self.path}/{name}"
        with _store_problems(f"write {self.name}/{name}"), self.store.open_output_stream(path) as stream:
            stream.write(data)


@contextlib.contextmanager
def _store_problems(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"cannot {what}: {_one_line(error)}", remedy=_RIGHTS) from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def classify_archive(
    request: ArchiveRequest,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    stop: Stop | None = None,
) -> ArchiveSummary:
    """Classify every file of a source on a Ray cluster and write exactly one row for each.

    Ctrl-C and SIGTERM end it after the batches at hand; ``resume`` goes on.

    Args:
        request: What, where, and where to.
        progress: Called with (phase, files done, files in all).
        say: Called with lines for the person.
        stop: Asked by another thread to end.

    Raises:
        ArtefactError: The engine is stale or foreign, or ``resume`` found rows of another engine.
        BadInputError: No image in the source, or none could be read.
        EnvironmentProblem: Ray is missing, does not answer or has no free processor; a place cannot be read or written.
        UsageError: The request contradicts itself.
    """
    begun, stop = time.perf_counter(), stop or Stop()
    record = peek_record(request.engine)
    content = read_engine(request.engine, record)
    require_decoder(record.contract)
    out, suffix = Folder.at(request.out), _format_of(request.out)
    names, store = list_files(request.source)
    names = names[: request.limit]
    point = OperatingPoint.asked(record.contract.labels, request.thresholds, request.abstain)
    before = _earlier_rows(out, record, _words(point), resume=request.resume)
    left = [name for name in names if _readable(name) not in before]
    found = _begun_run(request, record, point, len(names))
    tally = _Tally(begun=begun, answered=sum(before.values()), failed=len(before) - sum(before.values()))
    if left:
        with _joined(request.address) as ray, stop_on_signals(stop):
            pool = plan_pool(ray.cluster_resources(), ray.available_resources(), record, request)
            _save(out, found)  # from here on there may be parts
            size = _part_size(len(left), pool.actors, record.batch)
            parts = [left[first : first + size] for first in range(0, len(left), size)]
            pool = replace(pool, actors=min(pool.actors, len(parts)))
            tally.actors = pool.actors
            if say is not None:
                say(f"{len(left)} files in parts of {size}, {pool.actors} actors on {pool.where}")
            job = _Job(
                engine=ray.put(content),
                record=record_path(request.engine).read_bytes(),
                name=record.engine,
                out=out,
                suffix=suffix,
                point=point,
                store=store,
                here=str(Path.cwd()),
                threads=pool.threads,
                running=request.running,
            )
            _run(ray, job, pool, parts, tally, stop, progress)
    finished = len(names) - len(left) + tally.done == len(names)
    found = msgspec.structs.replace(
        found, answered=tally.answered, failed=tally.failed, finished=finished, created=_now()
    )
    _save(out, found)
    if tally.failed and not tally.answered and finished:
        raise BadInputError(
            f"none of the {tally.failed} images of {found.source!r} could be read",
            remedy="the reason stands in each row",
        )
    return _summary(request, found, tally, out, before)


def _begun_run(
    request: ArchiveRequest, record: EngineRecord, point: OperatingPoint | None, files: int
) -> ArchiveRun:
    return ArchiveRun(
        engine=record.engine,
        engine_sha256=record.engine_sha256,
        source=hide_password(request.source),
        labels=record.contract.labels,
        operating_point=_words(point),
        files=files,
        answered=0,
        failed=0,
        finished=False,
        created=_now(),
    )


def _summary(
    request: ArchiveRequest,
    found: ArchiveRun,
    tally: _Tally,
    out: Folder,
    before: Mapping[str, bool],
) -> ArchiveSummary:
    answered = tally.answered - sum(before.values())
    return ArchiveSummary(
        engine=str(request.engine),
        source=found.source,
        files=found.files,
        resumed=len(before),
        answered=answered,
        failed=tally.done - answered,
        parts=tally.parts,
        actors=tally.actors,
        seconds=tally.seconds,
        start_seconds=tally.start_seconds,
        out=out.name,
        interrupted=not found.finished,
    )


def list_files(source: str) -> tuple[list[str], Folder | None]:
    """Name the image files of a source, each once.

    Args:
        source: See :class:`ArchiveRequest`.

    Returns:
        Paths, or addresses without password, in a stable order; and the store that such addresses are read from, where
        the source is one itself.

    Raises:
        BadInputError: Nothing is there, no image is in it, or a list has no column of paths.
        EnvironmentProblem: A store does not answer, or not to these credentials.
        UsageError: A camera, a stream or a video.
    """
    if source == "-":
        return _listed(sys.stdin.read() if sys.stdin is not None else "", source), None
    if source.endswith((".txt", ".parquet")):
        return _listed_in(source), None
    if "://" in source and source.partition("://")[0].lower() not in {*STREAMS, "csi", "v4l2"}:
        return _stored_files(source)
    spec = parse_source(source)
    if spec.kind is not SourceKind.FILES:
        raise UsageError(
            f"{spec.name} is no archive", remedy="leave --ray out: one machine follows a camera or a video"
        )
    return [os.fspath(path) for path in expand_source(source)], None


def _stored_files(source: str) -> tuple[list[str], Folder]:
    """Name the image files at an address, by their suffix; what begins with a dot is left out."""
    fs, place = load("pyarrow.fs"), Folder.at(source)
    with _store_problems(f"read {place.name}"):
        found = place.store.get_file_info(place.path)
        if found.type == fs.FileType.Directory:
            found = place.store.get_file_info(fs.FileSelector(place.path, recursive=True))
    scheme = place.name.partition("://")[0]
    infos = found if isinstance(found, list) else [found]
    names = sorted(
        f"{scheme}://{info.path}"
        for info in infos
        if info.type == fs.FileType.File
        and PurePosixPath(info.path).suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in PurePosixPath(info.path).parts)
    )
    if not names:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise BadInputError(f"no images in {place.name}", remedy=f"image files end in one of {suffixes}")
    return names, place


def _listed_in(source: str) -> list[str]:
    if source.endswith(".txt"):
        folder, name = os.path.split(source)
        return _listed(Folder.at(folder or ".").read(name).decode(errors="surrogateescape"), source)
    arrow = load("pyarrow")
    dataset = load("pyarrow.dataset")
    place = Folder.at(source)
    try:
        table = dataset.dataset(place.path, format="parquet", filesystem=place.store).to_table(
            columns=["path"]
        )
        paths = table.column("path").cast(arrow.string()).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise BadInputError(
            f"{place.name} holds no column 'path': {_one_line(error)}", remedy="name a Parquet file of paths"
        ) from error
    return _unique((path for path in paths if path), place.name)


def _listed(text: str, source: str) -> list[str]:
    return _unique((line for line in text.splitlines() if line.strip()), source)


def _unique(names: Iterable[str], source: str) -> list[str]:
    found = list(dict.fromkeys(names))
    if not found:
        raise BadInputError(f"{source} names no file", remedy="give one path a line, or a column 'path'")
    return found


@dataclass(frozen=True)
class Pool:
    """The actors of a run.

    Attributes:
        actors: How many.
        cpus: Processors that each asks Ray for.
        gpus: GPUs that each asks for.
        threads: Decoding threads of each.
        where: What they run on, for the person.
    """

    actors: int
    cpus: float
    gpus: float
    threads: int
    where: str


def plan_pool(
    whole: Mapping[str, float], free: Mapping[str, float], record: EngineRecord, request: ArchiveRequest
) -> Pool:
    """Size the actors below the cluster: an actor for each free processor, or for each GPU where engines run on one.

    Args:
        whole: ``ray.cluster_resources()``.
        free: ``ray.available_resources()``.
        record: Of the engine.
        request: What was asked for.

    Raises:
        EnvironmentProblem: No processor is free, or no GPU where one is needed.
    """
    runtime = get_runtime(record.runtime)
    kinds = {"CPU": "processor"} if runtime.runs_on_cpu else {"CPU": "processor", "GPU": "GPU"}
    for kind, word in kinds.items():
        if free.get(kind, 0) < 1:
            raise EnvironmentProblem(
                f"Ray has {whole.get(kind, 0):g} {word}s, {free.get(kind, 0):g} of them free; one is needed",
                remedy="wait for the other jobs (ray status), or add nodes",
            )
    actors = int(min(free[kind] for kind in kinds))
    cpus = int(free["CPU"]) / actors
    threads = request.threads or (1 if cpus < 2 else int(cpus))
    if "://" in request.source:
        threads = max(threads, _STORE_THREADS)
    return Pool(
        actors=actors,
        cpus=round(cpus * ACTOR_SHARE, 2),
        gpus=0.0 if runtime.runs_on_cpu else 1.0,
        threads=threads,
        where=f"{whole.get('CPU', 0):g} processors"
        + (f" and {whole['GPU']:g} GPUs" if "GPU" in kinds else ""),
    )


def _part_size(files: int, actors: int, batch: BatchRange) -> int:
    """Return the files of a part, whole batches of the engine: then they are batched as on one machine."""
    wanted = min(LARGEST_PART, math.ceil(files / (actors * _TURNS)))
    return max(1, math.ceil(wanted / batch.best)) * batch.best


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Any]:
    """Join the Ray at an address, or start one on this machine for as long as the block runs; one that is joined stays.

    Raises:
        EnvironmentProblem: Ray is missing, nobody answers, or not to this token.
    """
    ray, local = sys.modules.get("ray"), address == LOCAL
    if ray is not None and ray.is_initialized():  # by whoever calls us
        yield ray
        return
    with contextlib.ExitStack() as stack:
        if local and (ray is None or _environment):  # its import reads the environment, once
            stack.enter_context(_own_cluster())
        ray = load("ray")
        logging.getLogger("ray").setLevel(logging.ERROR)
        quiet: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if local:
            # Sockets lie in this folder, whose path must be short.
            folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            quiet |= {"_temp_dir": stack.enter_context(folder), "object_store_memory": _STORE_BYTES}
            quiet |= {"num_cpus": usable_processors(), "include_dashboard": False}
        else:
            _require_listener(address)
        try:
            with _no_standard_error():
                ray.init(**quiet)
        except Exception as error:  # what does not start in time is a bare Exception
            raise EnvironmentProblem(
                f"cannot {'start Ray here' if local else f'join Ray at {address}'}: {_one_line(error)}",
                remedy="see ray status there; its token goes into RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
            ) from error
        stack.callback(ray.shutdown)
        yield ray


_environment: dict[str, str] = {}  # that ray was imported in, where it was imported for a Ray of our own


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
    """Throw away what Ray's C++ part says while it starts, such as which log level it took; what fails is raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _own_cluster() -> Iterator[None]:
    """Let a Ray that is started in the block listen on loopback alone, and ask for a token that nobody else has."""
    wanted = _environment or {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: the address of its node is 127.0.0.1
        "RAY_worker_niceness": "0",  # as ``infer`` runs without Ray; 15 by default
        # Its C++ part warns of each actor pool of Ray Data that arguments in its store may be lost (ray#53727).
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    _environment.update(wanted)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _require_listener(address: str) -> None:
    """Refuse an address where nobody takes a connection: Ray itself would try for half a minute.

    Raises:
        EnvironmentProblem: Nobody does.
        UsageError: It is no address.
    """
    if address == "auto":
        return
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise UsageError(f"--ray {address} is no address", remedy="such as --ray 10.0.0.5:6379, or auto")
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"nobody answers at {address}: {error.strerror or error}",
            remedy="start one there: ray start --head; or leave the address out for this machine alone",
        ) from error


@dataclass
class _Tally:
    """What the rows are so far, those of earlier runs included, and how many files this run has done."""

    begun: float
    answered: int
    failed: int
    done: int = 0
    parts: int = 0
    actors: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0


def _run(
    ray: Any,
    job: _Job,
    pool: Pool,
    parts: Sequence[Sequence[str]],
    tally: _Tally,
    stop: Stop,
    progress: Progress | None,
) -> None:
    """Hand the parts to the actors and count what they report, until the last one or until somebody stops."""
    data = load("ray.data")
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    total = sum(map(len, parts))
    batches = data.from_items([{"paths": json.dumps(part)} for part in parts], override_num_blocks=len(parts))
    outcomes = batches.map_batches(
        _Actor,
        batch_size=None,
        compute=data.ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        fn_constructor_args=(job,),
    )  # Ray Data starts a dead actor again, and gives it its batches again, as often as it takes
    started = time.perf_counter()
    tally.start_seconds = started - tally.begun
    try:
        for row in outcomes.iter_rows():
            _raise_problem(row["problem"])
            tally.answered += row["answered"]
            tally.failed += row["failed"]
            tally.done += row["answered"] + row["failed"]
            tally.parts += 1
            if progress is not None:
                progress("classifying", tally.done, total)
            if stop.asked:
                break
    except KeyboardInterrupt:
        stop.ask()
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise EnvironmentProblem(
            f"Ray gave up: {_one_line(error)}", remedy="what has a row is kept: go on with --resume"
        ) from error
    finally:
        tally.seconds = time.perf_counter() - started


def _raise_problem(problem: str) -> None:
    """Raise what an actor could not do: our errors do not survive a pickle, and a restart would not help."""
    if problem:
        name, what, remedy = json.loads(problem)
        raise getattr(errors, name)(what, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What an actor must know; travels to every node.

    Attributes:
        engine: Reference to the engine's content in Ray's store.
        record: Its record, as the file holds it.
        name: The engine's file name.
        out: Where parts go.
        suffix: One of :data:`FORMATS`.
        point: How a class is called; None leaves that to the reader.
        store: Where addresses are read from; None opens each by itself.
        here: Folder that relative paths begin in.
        threads: Decoding threads.
        running: How an engine of a GPU runs.
    """

    engine: Any
    record: bytes
    name: str
    out: Folder
    suffix: str
    point: OperatingPoint | None
    store: Folder | None
    here: str
    threads: int
    running: RunnerOptions


class _Actor:
    """Holds a runner; Ray calls it with one part after the other, in one thread."""

    def __init__(self, job: _Job) -> None:
        """Take the job; nothing is opened, since what fails here is tried again for ever."""
        self._job = job
        self._runner: Runner | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Answer the files of one part, write it, and report how many have an answer."""
        outcome: dict[str, list[Any]] = {"answered": [], "failed": [], "problem": []}
        for text in batch["paths"]:
            answered = failed = 0
            problem = ""
            try:
                answered, failed = self._write_part(json.loads(text))
            except EdgeDscError as error:
                problem = json.dumps([type(error).__name__, error.what, error.remedy])
            for name, value in (("answered", answered), ("failed", failed), ("problem", problem)):
                outcome[name].append(value)
        return outcome

    def _write_part(self, names: Sequence[str]) -> tuple[int, int]:
        job, runner = self._job, self._open()
        contract = runner.record.contract
        prepare = functools.partial(prepare_named, contract=contract, store=job.store)
        answers = [*decide_each(classify(names, prepare, runner, threads=job.threads), job.point)]
        extra = (DECISION,) if job.point is not None else ()
        job.out.write(part_name(names, job.suffix), part_of(answers, contract.labels, job.suffix, extra))
        failed = sum(answer.error is not None for answer in answers)
        return len(answers) - failed, failed

    def _open(self) -> Runner:
        if self._runner is None:
            quiet_decoder()
            self._folder = tempfile.TemporaryDirectory(prefix="edge-dsc-engine-")
            engine = Path(self._folder.name, self._job.name)
            engine.write_bytes(load("ray").get(self._job.engine))
            record_path(engine).write_bytes(self._job.record)
            with contextlib.suppress(OSError):  # where a relative path means the same
                os.chdir(self._job.here)
            self._runner = open_engine(engine, options=self._job.running)
        return self._runner


def prepare_named(name: str, contract: ModelContract, store: Folder | None) -> Prepared:
    """Read, decode and resize a file by its path or address, as :func:`edge_dsc.infer.classify.prepare_picture` does.

    Args:
        name: A path, or an address as :func:`list_files` names it.
        contract: The model's contract.
        store: What an address without credentials is read from; None opens the address itself.
    """
    if "://" not in name:
        return prepare_picture(Path(name), contract)
    started = time.perf_counter()
    try:
        data = _read_stored(name, store)
        pixels = prepare_pixels(decode_image(data, contract, name=name), contract, name=name)
    except ImageError as error:
        return Prepared(name, error, time.perf_counter() - started)
    return Prepared(name, pixels, time.perf_counter() - started)


def _read_stored(name: str, store: Folder | None) -> bytes:
    try:
        if store is None:
            folder, _, file = name.rpartition("/")
            place, path = Folder.at(folder), f"{Folder.at(folder).path}/{file}"
        else:
            place, path = store, name.partition("://")[2]
        with place.store.open_input_stream(path) as stream:
            data = bytes(stream.read(MAX_BYTES + 1))
    except (OSError, EdgeDscError) as error:
        raise ImageError(f"cannot read {hide_password(name)}: {_one_line(error)}", remedy=_RIGHTS) from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} has more than {MAX_BYTES} bytes", remedy="shrink the image")
    return data


def part_name(names: Sequence[str], suffix: str) -> str:
    """Return the name of a part: of the files in it, so that doing it again writes the same one."""
    return f"{_PART}{sha256_bytes(chr(10).join(map(_readable, names)).encode())[:24]}{suffix}"


def part_of(
    answers: Sequence[Answer], labels: tuple[str, ...], suffix: str, extra: tuple[str, ...] = ()
) -> bytes:
    """Return the rows of answers as a file: the columns and values of ``infer`` without ``--ray``."""
    rows = [
        row_of(replace(answer, path=_readable(str(answer.path))), labels, SourceKind.FILES, extra)
        for answer in answers
    ]
    names = column_names(labels, SourceKind.FILES, extra)
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(map(csv_cells, rows))
        return text.getvalue().encode()
    arrow = load("pyarrow")
    kinds = dict.fromkeys(("path", "label", DECISION, "error"), arrow.string())
    schema = arrow.schema([(name, kinds.get(name, arrow.float64())) for name in names])
    sink = arrow.BufferOutputStream()
    load("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows, schema=schema), sink)
    return bytes(sink.getvalue())


def _readable(name: str) -> str:
    """Return a name as rows hold it: bytes of it that are no text become visible."""
    return name.encode(errors="backslashreplace").decode()


def _format_of(out: str) -> str:
    suffix = PurePosixPath(out.partition("?")[0].rstrip("/")).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(
            f"--out {hide_password(out)} ends in {suffix or 'nothing'}: with --ray it is a folder of parts",
            remedy="name it NAME.parquet or NAME.csv",
        )
    return suffix


def _earlier_rows(
    out: Folder, record: EngineRecord, operating_point: str, *, resume: bool
) -> dict[str, bool]:
    """Return the files that have rows, and whether these are answers.

    Raises:
        ArtefactError: The rows are of another engine, or a part is damaged.
        UsageError: There is something, and nobody asked to resume; or it is nothing of ours.
    """
    names = out.names()
    if not names:
        return {}
    if MANIFEST not in names:
        raise UsageError(f"{out.name} is not empty, and no archive run of ours", remedy="name another --out")
    if not resume:
        raise UsageError(
            f"{out.name} holds an archive run", remedy="go on with --resume, or name another --out"
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, MANIFEST)
        copy.write_bytes(out.read(MANIFEST))
        earlier = ARCHIVE.load(copy)
    if earlier.engine_sha256 != record.engine_sha256:
        raise ArtefactError(
            f"{out.name} holds rows of another engine ({earlier.engine})",
            remedy="name another --out, or that engine",
        )
    if earlier.operating_point != operating_point:
        raise ArtefactError(
            f"{out.name} was decided by {earlier.operating_point or 'nothing'}, not {operating_point or 'nothing'}",
            remedy="name another --out, or the same --threshold and --abstain",
        )
    rows: dict[str, bool] = {}
    for name in names:
        if name.startswith(_PART):
            rows.update(_rows_in(out, name))
    return rows


def _rows_in(out: Folder, name: str) -> dict[str, bool]:
    data, arrow = out.read(name), load("pyarrow")
    try:
        if name.endswith(".csv"):
            cells = csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True)
            return {row["path"].removeprefix("./"): not row["error"] for row in cells}
        table = load("pyarrow.parquet").read_table(arrow.BufferReader(data), columns=["path", "error"])
        return {row["path"]: row["error"] is None for row in table.to_pylist()}
    except (ValueError, KeyError, csv.Error, arrow.ArrowException) as error:
        raise ArtefactError(
            f"{out.name}/{name} is damaged: {_one_line(error)}",
            remedy="remove it: --resume answers its files again",
        ) from error


def _words(point: OperatingPoint | None) -> str:
    if point is None:
        return ""
    return json.dumps({"thresholds": dict(sorted(point.thresholds.items())), "abstain": point.abstain})


def _save(out: Folder, run: ArchiveRun) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, MANIFEST)
        ARCHIVE.save(copy, run)
        out.write(MANIFEST, copy.read_bytes())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
