"""Triton: a model repository made from engines, and a server of this machine started on one."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

import edge_dsc
from edge_dsc.infer.live_page.monitoring import reference_levels
from edge_dsc.infer.served import RECORD_KEY, TYPES
from engines.contract import PathName, Sha256, Text
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import DocumentKind, output_problem, sha256_file, write_text
from engines.packages import load
from engines.record import EngineRecord, load_record, save_record

BACKENDS = ("auto", "tensorrt", "onnxruntime", "python")
ENGINE_KEY = "edge_dsc.engine"  # parameters of a model: the engine's path, relative to the repository
MODEL_KEY = "edge_dsc.model"  # of a front: the model that it asks
UNSURE_KEY = "edge_dsc.unsure"
LEVELS_KEY = "edge_dsc.levels"  # grey levels of the images of the calibration, where a table gives them
FRONT = "_files"  # added to a model's name
FRONT_INPUT = "file"
MANIFEST = "edge-dsc.json"
LABELS = "labels.txt"
_VERSION = "1"
_PLATFORMS = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}
_FRONT_INSTANCES = 2  # one decodes while the other waits for the model
_MODEL_PY = '''"""Made by edge-dsc deploy triton. Triton's Python backend runs this, with edge-dsc installed."""

from edge_dsc.deploy.triton_models import {name} as TritonPythonModel  # noqa: F401
'''
_NOTES = {
    "tensorrt": "the server needs the TensorRT that built the plan ({version}) and the same kind of GPU",
    "onnxruntime": "the server's ONNX Runtime must be {version} too: the engine holds its own operators",
    "python": "the server's Python needs edge-dsc {edge_dsc} and {runtime} {version}",
}


class ServedEngine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model of a repository.

    Attributes:
        name: Its name on the server.
        front: Name of the model that takes whole files for it; None where there is none.
        backend: What runs it: ``tensorrt``, ``onnxruntime`` or ``python``.
        engine: Path of the engine, relative to the repository.
        engine_sha256: Its hash.
        note: What the server needs for it.
    """

    name: PathName
    front: PathName | None
    backend: PathName
    engine: Annotated[str, Meta(max_length=1000)]
    engine_sha256: Sha256
    note: Text


class Repository(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies in a repository.

    Attributes:
        edge_dsc: Version of edge-dsc.
        models: The models.
    """

    edge_dsc: Text
    models: tuple[ServedEngine, ...]


REPOSITORY = DocumentKind(
    name="edge-dsc/triton-repository",
    version=1,
    body=Repository,
    renew="edge-dsc deploy triton ENGINE --out REPOSITORY",
    seal="repository_sha256",
)


@dataclass(frozen=True, kw_only=True)
class TritonRequest:
    """What to serve, and how.

    Attributes:
        engines: The engine files; a model is named after its file.
        out: The repository.
        backend: One of :data:`BACKENDS`; ``auto`` takes Triton's TensorRT for plans, and for all else the Python
            backend with our runner, whose answers are those of this machine bit for bit.
        instances: Copies of each model at once.
        queue_delay_us: How long Triton holds a request back for others to join its batch, microseconds.
        unsure: Answers whose best class stays under it are counted as unsure.
        front: Make a model beside each that takes whole files.
    """

    engines: Sequence[Path]
    out: Path
    backend: str = "auto"
    instances: int = 1
    queue_delay_us: int = 0
    unsure: float = 0.6
    front: bool = True


def write_repository(request: TritonRequest) -> Repository:
    """Write a model repository: for each engine a model that takes pixels, and a front that takes whole files.

    A repository of ours is replaced; nothing of it goes before the new one is complete.

    Args:
        request: What, and where to.

    Returns:
        What lies in it now.

    Raises:
        ArtefactError: An engine is refused.
        EnvironmentProblem: ``tritonclient`` is missing, or the place cannot be written.
        UsageError: The folder holds something else; two engines of one name; an engine that takes no single picture;
            a backend that does not fit.
    """
    names = [_model_name(engine) for engine in request.engines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"two engines are called {', '.join(twice)}", remedy="rename one: build it again with --out"
        )
    found = [(engine, load_record(engine)) for engine in request.engines]
    chosen = [_choose_backend(engine, record, request.backend) for engine, record in found]
    models = []
    with replaced_folder(request.out, _our_names) as folder:
        for name, (engine, record), backend in zip(names, found, chosen, strict=True):
            front = f"{name}{FRONT}" if request.front else None
            models.append(_write_models(folder, engine, record, _Place(name, front, backend), request))
        repository = Repository(edge_dsc=edge_dsc.__version__, models=tuple(models))
        REPOSITORY.save(folder / MANIFEST, repository)
    return repository


def _model_name(engine: Path) -> str:
    name = engine.name.removesuffix(".engine")
    try:
        return msgspec.convert(name, PathName)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{engine} cannot name a model: {error}",
            remedy="letters, digits, dots and hyphens: build it with --out",
        ) from error


def _choose_backend(engine: Path, record: EngineRecord, asked: str) -> str:
    """Return what runs an engine.

    Raises:
        UsageError: It takes no single picture, or is of another runtime than the backend.
    """
    if record.batch.smallest > 1:
        raise UsageError(
            f"{engine} takes batches of {record.batch.smallest} and more; a server's requests come one by one",
            remedy="build it with --batch 1:8:32",
        )
    if asked == "auto":
        return "tensorrt" if record.runtime == "tensorrt" else "python"
    if asked in _PLATFORMS and asked != record.runtime:
        raise UsageError(
            f"{engine} is of {record.runtime}, which Triton's {asked} backend cannot load",
            remedy="take --triton-backend auto or python",
        )
    return asked


@dataclass(frozen=True)
class _Place:
    name: str
    front: str | None
    backend: str
    levels: list[int] | None = None


def _write_models(
    folder: Path, engine: Path, record: EngineRecord, place: _Place, request: TritonRequest
) -> ServedEngine:
    """Write the folders of one engine: the model, and its front."""
    levels, where = reference_levels(engine, record) if place.front is not None else (None, "")
    place = replace(place, levels=None if levels is None else levels.tolist())
    record = travelling_record(record)
    path = Path(place.name, _VERSION, engine.name)
    for name, config in _configs(record, place, path.as_posix(), request).items():
        (folder / name / _VERSION).mkdir(parents=True)
        write_text(folder / name / "config.pbtxt", config)
        write_text(folder / name / LABELS, "".join(f"{label}\n" for label in record.contract.labels))
    shutil.copyfile(engine, folder / path)
    if sha256_file(folder / path) != record.engine_sha256:
        raise ArtefactError(f"{engine} changed while it was copied", remedy="try again when nobody builds it")
    save_record(folder / path, record)
    if place.backend == "python":
        write_text(folder / place.name / _VERSION / "model.py", _MODEL_PY.format(name="EngineModel"))
    if place.front is not None:
        write_text(folder / place.front / _VERSION / "model.py", _MODEL_PY.format(name="FrontModel"))
    note = _NOTES[place.backend].format(
        version=record.runtime_version, runtime=record.runtime, edge_dsc=edge_dsc.__version__
    )
    if place.front is not None and levels is None:
        note = f"{note}; the metrics of {place.front} hold no drift of the input: {' '.join(where.split())[:500]}"
    return ServedEngine(
        name=place.name,
        front=place.front,
        backend=place.backend,
        engine=path.as_posix(),
        engine_sha256=record.engine_sha256,
        note=note,
    )


def travelling_record(record: EngineRecord) -> EngineRecord:
    """Return a record without the names of the pictures that judged the engine: they stay where they are."""
    if record.validation is None:
        return record
    agreement = msgspec.structs.replace(record.validation.agreement, flipped=())
    return msgspec.structs.replace(
        record, validation=msgspec.structs.replace(record.validation, images="", agreement=agreement)
    )


def _configs(record: EngineRecord, place: _Place, engine: str, request: TritonRequest) -> dict[str, str]:
    """Return the text of each model's ``config.pbtxt``, by its name."""
    proto = load("tritonclient.grpc.model_config_pb2")
    text = load("google.protobuf.text_format")
    models = [_engine_config(proto, record, place, request)]
    if place.front is not None:
        models.append(_front_config(proto, record, place, request.unsure))
    found = {}
    for config in models:
        config.version_policy.latest.num_versions = 1
        config.parameters[ENGINE_KEY].string_value = engine
        config.parameters[RECORD_KEY].string_value = _one_line(record)
        found[config.name] = (
            f"# Made by edge-dsc deploy triton, which replaces it.\n{text.MessageToString(config)}"
        )
    return found


def _one_line(record: EngineRecord) -> str:
    from engines.record import RECORD

    return msgspec.json.encode(msgspec.json.decode(RECORD.dumps(record))).decode()


def _engine_config(proto: Any, record: EngineRecord, place: _Place, request: TritonRequest) -> Any:
    contract, batch = record.contract, record.batch
    kind = f"TYPE_{TYPES[contract.dtype]}"
    platform = _PLATFORMS.get(place.backend)
    config = proto.ModelConfig(name=place.name, max_batch_size=batch.largest)
    if platform is None:
        config.backend = place.backend
    else:
        config.platform, config.default_model_filename = platform, record.engine
    config.input.add(name=contract.input_name, data_type=kind, dims=contract.input_shape)
    for name, shape in contract.outputs:
        config.output.add(name=name, data_type="TYPE_FP32", dims=shape)
    config.output[0].label_filename = LABELS
    config.dynamic_batching.max_queue_delay_microseconds = request.queue_delay_us
    if batch.best > 1:
        config.dynamic_batching.preferred_batch_size.append(batch.best)
    group = config.instance_group.add(count=request.instances)
    group.kind = "KIND_GPU" if record.runtime.startswith("tensorrt") else "KIND_CPU"
    for size in sorted({1, batch.best}):
        warm = config.model_warmup.add(name=f"batch of {size}", batch_size=size)
        pixels = warm.inputs[contract.input_name]
        pixels.data_type = proto.DataType.Value(kind)
        pixels.dims.extend(contract.input_shape)
        pixels.random_data = True
    return config


def _front_config(proto: Any, record: EngineRecord, place: _Place, unsure: float) -> Any:
    config = proto.ModelConfig(name=place.front, backend="python", max_batch_size=record.batch.largest)
    # Files of different lengths may share a batch: each request has a response of its own.
    config.input.add(name=FRONT_INPUT, data_type="TYPE_UINT8", dims=[-1], allow_ragged_batch=True)
    classes = len(record.contract.labels)
    config.output.add(name="label", data_type="TYPE_UINT8", dims=[-1])
    config.output.add(name="probability", data_type="TYPE_FP32", dims=[1])
    config.output.add(name="probabilities", data_type="TYPE_FP32", dims=[classes], label_filename=LABELS)
    config.dynamic_batching.max_queue_delay_microseconds = 0
    config.instance_group.add(count=_FRONT_INSTANCES, kind="KIND_CPU")
    config.parameters[MODEL_KEY].string_value = place.name
    config.parameters[UNSURE_KEY].string_value = repr(unsure)
    if place.levels is not None:
        config.parameters[LEVELS_KEY].string_value = json.dumps(place.levels)
    return config


def _our_names(folder: Path) -> set[str]:
    """Return the names that a repository of ours has at its top."""
    models = REPOSITORY.load(folder / MANIFEST).models
    return {MANIFEST, *(name for model in models for name in (model.name, model.front) if name)}


@contextlib.contextmanager
def replaced_folder(out: Path, ours: Callable[[Path], set[str]]) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``out`` when the block ends well.

    Args:
        out: New, empty, or made by an earlier run.
        ours: Reads from a folder what an earlier run made there; raises ArtefactError where it is none of ours.

    Raises:
        EnvironmentProblem: The place cannot be written.
        UsageError: The folder holds what no run of ours made.
    """
    out = Path(os.path.realpath(out))
    before = _entries(out, ours)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:64]}-") as made:
            folder = Path(made, "new")
            folder.mkdir()
            yield folder
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    _settle(path)
            out.mkdir(exist_ok=True)
            old = Path(made, "old")
            old.mkdir()
            with _undone_on_failure() as move:
                for name in before:
                    move(out / name, old / name)
                for path in sorted(folder.iterdir()):
                    move(path, out / path.name)
    except OSError as error:
        raise output_problem(out, error) from error


@contextlib.contextmanager
def _undone_on_failure() -> Iterator[Callable[[Path, Path], None]]:
    """Give what renames; where the block fails, or Ctrl-C ends it, everything goes back to where it was."""
    done: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.replace(target)
        done.append((source, target))

    try:
        yield move
    except BaseException:
        for source, target in reversed(done):
            target.replace(source)
        raise


def _settle(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _entries(out: Path, ours: Callable[[Path], set[str]]) -> list[str]:
    """Return what an earlier run left at the top of a folder, all of which may go."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", remedy="choose another folder with --out")
    there = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if not there:
        return []
    try:
        foreign = sorted(set(there) - ours(out))
    except ArtefactError as error:
        raise UsageError(
            f"{out} is not empty and was not made by edge-dsc ({error.what})",
            remedy="choose another folder with --out",
        ) from error
    if foreign:
        raise UsageError(
            f"{out} also holds {', '.join(foreign[:5])}, which is not ours",
            remedy="nothing was written: move it away, or choose another folder with --out",
        )
    return there


@dataclass(frozen=True)
class TritonProgram:
    """A ``tritonserver`` of this machine.

    Attributes:
        binary: The program.
        backends: Its folder of backends; None where it knows it.
        libraries: Folders that its loader must look into.
        stub: The Python backend's own program for this version of Python, where it does not lie beside the backend.
    """

    binary: Path
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()
    stub: Path | None = None


def find_triton() -> TritonProgram:
    """Find a server: ``EDGE_DSC_TRITON`` (the program, or a folder with it), ``tritonserver`` on PATH, or the wheel.

    The wheel is ``nvidia-pytriton``, of which only the server is used; nothing of it is imported.

    Raises:
        EnvironmentProblem: There is none.
    """
    named = os.environ.get("EDGE_DSC_TRITON")
    if named:
        places = [Path(named), Path(named, "bin", "tritonserver"), Path(named, "tritonserver")]
    else:
        places = [Path(found)] if (found := shutil.which("tritonserver")) else []
        places += [Path(folder, "pytriton", "tritonserver", "bin", "tritonserver") for folder in sys.path]
    binary = next((place for place in places if place.is_file()), None)
    if binary is None:
        where = f"EDGE_DSC_TRITON={named}" if named else "PATH, and no wheel nvidia-pytriton"
        raise EnvironmentProblem(
            f"there is no tritonserver here ({where})",
            remedy="pip install --no-deps nvidia-pytriton, or name one with EDGE_DSC_TRITON",
        )
    root = binary.parent.parent
    backends = root / "backends" if (root / "backends").is_dir() else None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    libraries = [root / "lib", *root.parent.parent.glob("nvidia_pytriton.libs")]
    return TritonProgram(
        binary, backends, tuple(path for path in libraries if path.is_dir()), stub if stub.is_file() else None
    )


@dataclass
class RunningTriton:
    """A server that was started, on loopback.

    Attributes:
        grpc: Its gRPC port.
        metrics: Its port for Prometheus.
        log: Where it writes.
        process: The server.
        memory: What the names of its shared memory begin with.
    """

    grpc: int
    metrics: int
    log: Path
    process: subprocess.Popen[bytes]
    memory: str = ""

    def stop(self, *, kill: bool = False) -> None:
        """End it and wait: as an administrator does, or as a fall of the machine does.

        Args:
            kill: Give it no time to finish.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(
                self.process.pid, signal.SIGKILL
            )  # its children for Python, which it cannot tell any more
        for left in Path("/dev/shm").glob(f"{glob.escape(self.memory)}*") if self.memory else ():
            left.unlink(missing_ok=True)

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(errors="replace")[-2000:]


@dataclass(frozen=True, kw_only=True)
class ServerRequest:
    """How to start a server.

    Attributes:
        repository: The model repository.
        work: A folder for its log and for what it needs beside the wheel.
        grpc: Port for gRPC; 0 takes a free one.
        ready_s: How long it may take to load its models.
        arguments: What else it is told.
        environment: What else its environment holds.
    """

    repository: Path
    work: Path
    grpc: int = 0
    ready_s: float = 120.0
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def start_triton(request: ServerRequest, program: TritonProgram | None = None) -> RunningTriton:
    """Start a server on loopback and wait until its models are ready.

    Args:
        request: What it serves.
        program: The server; None finds one.

    Raises:
        EnvironmentProblem: There is none, or it ended or did not become ready; the message ends with its own words.
    """
    program = program or find_triton()
    request.work.mkdir(parents=True, exist_ok=True)
    grpc, metrics = request.grpc or _free_port(), _free_port()
    log = request.work / f"triton-{grpc}.log"
    backends = _python_backend(program, request.work)
    memory = f"edge-dsc-{os.getpid()}-{time.monotonic_ns()}"
    command = [
        str(program.binary.absolute()), f"--model-repository={request.repository.absolute()}",
        "--allow-http=false", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--metrics-address=127.0.0.1", f"--metrics-port={metrics}", "--allow-gpu-metrics=false",
        "--disable-auto-complete-config",  # it is complete, and each Python model would be started twice
        # Two servers of one machine must not share their memory with the Python processes.
        f"--backend-config=python,shm-region-prefix-name={memory}",
        *([f"--backend-directory={backends.absolute()}"] if backends else []), *request.arguments,
    ]  # fmt: skip
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True,
            cwd=request.work,  # the children import from where they are started
            env={**os.environ, **_environment(program), **request.environment},
        )  # fmt: skip
    server = RunningTriton(grpc, metrics, log, process, memory)
    try:
        _wait_ready(server, request.ready_s)
    except BaseException:
        server.stop(kill=True)
        raise
    return server


def _free_port() -> int:
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        return int(plug.getsockname()[1])


def _environment(program: TritonProgram) -> dict[str, str]:
    """Return what the server's loader and the Python in its children need to find this environment's packages."""
    libraries = [str(path) for path in program.libraries]
    libraries += [
        path for path in (sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")) if path
    ]
    # The interpreter inside the children finds its packages as one that is started from PATH does; it does not look at
    # PYTHONPATH.
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _python_backend(program: TritonProgram, work: Path) -> Path | None:
    """Return a folder of backends in which the stub lies beside the Python backend; the wheel has it apart."""
    if program.backends is None or program.stub is None:
        return program.backends
    folder = work / "backends"
    if not folder.is_dir():
        (folder / "python").mkdir(parents=True)
        for backend in program.backends.iterdir():
            if backend.name != "python":
                (folder / backend.name).symlink_to(backend.absolute())
        for path in (*(program.backends / "python").iterdir(), program.stub):
            if path.name != "triton_python_backend_stub" or path == program.stub:
                (folder / "python" / path.name).symlink_to(path.absolute())
    return folder


def _wait_ready(server: RunningTriton, seconds: float) -> None:
    client = load("tritonclient.grpc").InferenceServerClient(f"127.0.0.1:{server.grpc}")
    failure = load("tritonclient.utils").InferenceServerException
    deadline = time.monotonic() + seconds
    with contextlib.closing(client):
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                raise EnvironmentProblem(
                    f"tritonserver ended with {server.process.returncode}: {_reason(server)}",
                    remedy=f"its log is {server.log}",
                )
            with contextlib.suppress(failure):
                if client.is_server_ready(client_timeout=1.0):
                    return
            time.sleep(0.1)
    raise EnvironmentProblem(
        f"tritonserver was not ready after {seconds:g} s: {_reason(server)}",
        remedy=f"its log is {server.log}",
    )


def _reason(server: RunningTriton) -> str:
    """Return the last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in server.tail().splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it wrote nothing"
    )
