"""An engine on a server: a model of Triton behind the same interface as a runner of this machine, over gRPC."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from engines.errors import ArtefactError, EnvironmentProblem, UnansweredError, UsageError
from engines.packages import load
from engines.record import RECORD, BatchRange, EngineRecord, peek_record
from engines.runtimes import (
    DEFAULT_OPTIONS,
    BatchCheck,
    DirectSubmission,
    Runner,
    RunnerOptions,
    Ticket,
    open_engine,
    require_cam,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engines.contract import ModelContract
    from engines.images import InputPixels

SCHEME = "grpc://"
RECORD_KEY = "edge_dsc.record"  # of the parameters in a model's configuration: the engine's record
TYPES = {"uint8": "UINT8", "int8": "INT8", "float16": "FP16"}  # the contract's types by Triton's names
DEFAULT_PORT = 8001
REQUEST_S = 30.0  # a request that takes longer has no answer
PATIENCE_S = 5.0  # how long a picture waits for a server that went away
_LOOK_S = 0.2  # between two looks whether it is back
# A request in the middle of a restart fails at once, and the next one looks again soon: gRPC alone would wait up to two
# minutes. Its proxy, which the environment may name, is no connection that the user asked for.
_CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
_STAGES = ("queue", "compute_input", "compute_infer", "compute_output")  # of Triton's statistics
_START = "start it: tritonserver --model-repository=REPOSITORY; or check the address"
_DEPLOY = "deploy it: edge-dsc deploy triton ENGINE --out REPOSITORY"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The address of a model on a Triton server.

    Attributes:
        host: Name or address; an IPv6 address in brackets.
        port: Its gRPC port.
        name: The model.
        expected: An engine that it must be; None takes whatever is served under that name.
    """

    host: str
    port: int
    name: str
    expected: Path | None = None

    @property
    def stem(self) -> str:
        """The model's name, as the engine's without its suffix."""
        return self.name

    def __str__(self) -> str:
        """As it is written: ``grpc://host:8001/name``."""
        return f"{SCHEME}{self.host}:{self.port}/{self.name}"


def parse_server(text: str, expected: Path | None = None) -> ServedModel:
    """Read ``grpc://HOST[:PORT]/MODEL``.

    Args:
        text: The address.
        expected: An engine that the model must be.

    Raises:
        UsageError: Anything else.
    """
    match = re.fullmatch(
        r"grpc://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?/([A-Za-z0-9][A-Za-z0-9._-]{0,127})",
        text,
    )
    port = int(match[2] or DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 1 << 16:
        raise UsageError(f"--server {text!r} is no address of a model", remedy="write grpc://HOST:8001/MODEL")
    return ServedModel(host=match[1], port=port, name=match[3], expected=expected)


def open_model(
    engine: Path | ServedModel, *, threads: int = 1, options: RunnerOptions = DEFAULT_OPTIONS
) -> Runner:
    """Open an engine of this machine, as :func:`engines.runtimes.open_engine` does, or a model on a server.

    Args:
        engine: The engine file, or the model.
        threads: CPU threads for one run, where the engine runs here and its runtime uses any.
        options: How else to run it; of a server's model only ``time_stages`` counts.

    Raises:
        ArtefactError: The engine is refused; or the server's model is none of edge-dsc, or another than expected.
        EnvironmentProblem: Its runtime does not work here; or no server answers, or it has no such model ready.
    """
    if isinstance(engine, Path):
        return open_engine(engine, threads=threads, options=options)
    return ServedRunner(engine, time_stages=options.time_stages)


class ServedRunner(DirectSubmission):
    """A connection to a model; any number of threads may call :meth:`run` at once: the server makes batches of it.

    Attributes:
        record: The record of the engine that the server runs, from the model's configuration.
        thread_safe: True.
        together: The batch that the engine was built for, for a request costs the server and its client as much as a
            small network does.
        description: How it runs.
    """

    thread_safe = True

    def __init__(
        self, model: ServedModel, *, time_stages: bool = False, patience_s: float = PATIENCE_S
    ) -> None:
        """Connect, and hold what the server says of the model against its record.

        Args:
            model: The address.
            time_stages: Ask the server for its own times with every ticket.
            patience_s: How long a picture waits for a server that went away.

        Raises:
            ArtefactError: The model is none that edge-dsc deployed, is damaged, or is another than expected.
            EnvironmentProblem: ``tritonclient`` is missing, no server answers, or it has no such model ready.
        """
        self._grpc = load("tritonclient.grpc")
        self._failure: type[Exception] = load("tritonclient.utils").InferenceServerException
        self._model, self._time_stages, self._patience_s = model, time_stages, patience_s
        self._away = threading.Event()  # set from a request that failed to one that did not
        address = f"{model.host}:{model.port}"
        self._client: Any = self._grpc.InferenceServerClient(address, channel_args=list(_CHANNEL))
        try:
            self.record, self.description = self._look()
        except BaseException:
            self.close()
            raise
        contract, self.together = self.record.contract, self.record.batch.best
        self._check = BatchCheck(self.record)
        self._type = TYPES[contract.dtype]
        self._outputs = contract.outputs

    def _look(self) -> tuple[EngineRecord, Mapping[str, str]]:
        """Ask the server who it is and what the model is."""
        client, model = self._client, self._model
        try:
            server = client.get_server_metadata(client_timeout=REQUEST_S)
        except self._failure as error:
            raise EnvironmentProblem(
                f"no server answers at {SCHEME}{model.host}:{model.port}: {_said(error)}", remedy=_START
            ) from error
        try:
            config = client.get_model_config(model.name, client_timeout=REQUEST_S).config
        except self._failure as error:
            raise self._no_model(error) from error
        record = _record_of(config, model)
        if model.expected is not None:
            _require_same(record, peek_record(model.expected), model)
        description = {
            "execution": f"{server.name} {server.version}, {config.backend or config.platform}",
            "memory": "gRPC",
            "server": f"{model.host}:{model.port}",
        }
        return record, description

    def _no_model(self, error: Exception) -> EnvironmentProblem:
        """Say what the server has instead, and why the model is not ready where it has it."""
        model = self._model
        try:
            index = self._client.get_model_repository_index(client_timeout=REQUEST_S).models
        except self._failure:
            index = ()
        reason = next((entry.reason for entry in index if entry.name == model.name and entry.reason), "")
        names = ", ".join(sorted({entry.name for entry in index if entry.state == "READY"})) or "none"
        return EnvironmentProblem(
            f"{model} is not ready: {reason or _said(error)}", remedy=f"ready are: {names}"
        )

    def run(self, batch: InputPixels) -> NDArray[np.float32]:
        """Classify a batch on the server.

        A request that fails is not repeated. The next one waits until the server is back, five seconds at most.

        Args:
            batch: ``[N, *contract.input_shape]`` of the contract's type, with N within the model's batch range.

        Returns:
            Probabilities, ``float32 [N, classes]``, owned by the caller.

        Raises:
            ArtefactError: The server answers something else than probabilities.
            BadInputError: Another type or shape.
            UnansweredError: No answer came; another request may have one.
            ValueError: The runner is closed.
        """
        return self._ask(batch, self._outputs[:1])[0]

    def explain(self, batch: InputPixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Classify a batch and give its class activation maps; see :meth:`engines.runtimes.Runner.explain`."""
        require_cam(self.record)
        answers, maps = self._ask(batch, self._outputs)
        return answers, maps

    def _ask(
        self, batch: InputPixels, outputs: Sequence[tuple[str, tuple[int, ...]]]
    ) -> list[NDArray[np.float32]]:
        self._check(batch)
        client = self._client
        if client is None:
            raise ValueError(f"the connection to {self._model} is closed")
        if self._away.is_set():
            self._wait_until_back(client)
        pixels = self._grpc.InferInput(self.record.contract.input_name, list(batch.shape), self._type)
        pixels.set_data_from_numpy(batch)
        wanted = [self._grpc.InferRequestedOutput(name) for name, _ in outputs]
        try:
            answer = client.infer(self._model.name, [pixels], outputs=wanted, client_timeout=REQUEST_S)
        except self._failure as error:
            self._away.set()
            raise UnansweredError(
                f"{self._model} gave no answer: {_said(error)}",
                remedy="see the server's log, and give it again",
            ) from error
        return [self._taken(answer, name, (len(batch), *shape)) for name, shape in outputs]

    def _taken(self, answer: Any, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return an output as an array of the caller's own, for a message's memory is read only."""
        try:
            found = answer.as_numpy(name)
        except ValueError as error:  # more or fewer bytes than the shape says
            raise ArtefactError(f"{self._model} sends a broken {name}: {error}", remedy=_DEPLOY) from error
        if found is None or found.dtype != np.float32 or found.shape != shape:
            seen = None if found is None else (found.dtype.name, list(found.shape))
            raise ArtefactError(
                f"{self._model} answers {name} {seen}, not float32 {list(shape)}", remedy=_DEPLOY
            )
        kept: NDArray[np.float32] = found.copy()
        return kept

    def _wait_until_back(self, client: Any) -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                if client.is_model_ready(self._model.name, client_timeout=1.0):
                    self._away.clear()
                    return
                reason = "the model is not ready"
            except self._failure as error:
                reason = _said(error)
            if time.monotonic() >= deadline:
                raise UnansweredError(
                    f"{self._model} is still away after {self._patience_s:g} s: {reason}",
                    remedy="start it again; the pictures after that are answered",
                )
            time.sleep(_LOOK_S)

    def submit(self, batch: InputPixels) -> Ticket:
        """Run the batch; the ticket holds the answers and, where asked for, the server's own times.

        These are of the requests that the server ended meanwhile, ours and anybody's: the mean of each.
        """
        before = self._statistics() if self._time_stages else None
        ticket = super().submit(batch)
        if before is not None:
            after = self._statistics_after(before)
            ticket.stages_ns = {
                name: (after[name][0] - before[name][0]) // max(1, after[name][1] - before[name][1])
                for name in _STAGES
            }
        return ticket

    def _statistics_after(self, before: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Return the statistics once they hold another request: the server counts it after its answer is sent."""
        deadline = time.monotonic() + REQUEST_S
        while any((after := self._statistics())[name][1] == before[name][1] for name in _STAGES):
            if time.monotonic() > deadline:
                raise UnansweredError(f"{self._model} does not count its requests", remedy=_START)
            time.sleep(0.001)
        return after

    def _statistics(self) -> dict[str, tuple[int, int]]:
        """Return nanoseconds and count of each stage since the server began."""
        try:
            found = self._client.get_inference_statistics(self._model.name, client_timeout=REQUEST_S)
        except self._failure as error:
            raise UnansweredError(
                f"{self._model} gave no statistics: {_said(error)}", remedy=_START
            ) from error
        stats = found.model_stats[0].inference_stats
        return {name: (getattr(stats, name).ns, getattr(stats, name).count) for name in _STAGES}

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def __enter__(self) -> ServedRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _said(error: Exception) -> str:
    """Return what the server or gRPC said, in one line."""
    return " ".join(str(error).split())[:300]


def _record_of(config: Any, model: ServedModel) -> EngineRecord:
    """Return the record that a model's configuration carries, its batches as the server takes them."""
    if RECORD_KEY not in config.parameters:
        raise ArtefactError(
            f"{model} was not deployed by edge-dsc (no record in its configuration)", remedy=_DEPLOY
        )
    record = RECORD.loads(config.parameters[RECORD_KEY].string_value, str(model))
    record.contract.check(str(model))
    seen = _ends(config)
    expected = served_ends(record.contract)
    if seen != expected:
        raise ArtefactError(
            f"{model} has the inputs and outputs {seen}, its record says {expected}: it is the front of a model, "
            "or was changed",
            remedy=f"name the model that takes pixels; or {_DEPLOY}",
        )
    largest = max(1, min(record.batch.largest, config.max_batch_size))
    batch = BatchRange(1, min(record.batch.best, largest), largest)
    return msgspec.structs.replace(record, batch=batch)


def served_ends(contract: ModelContract) -> list[tuple[str, str, list[int]]]:
    """Return name, type and shape without the batch of a contract's input and outputs, by Triton's names."""
    return [
        (contract.input_name, TYPES[contract.dtype], list(contract.input_shape)),
        *((name, "FP32", list(shape)) for name, shape in contract.outputs),
    ]


def _ends(config: Any) -> list[tuple[str, str, list[int]]]:
    names = load("tritonclient.grpc.model_config_pb2").DataType
    return [
        (end.name, names.Name(end.data_type).removeprefix("TYPE_"), list(end.dims))
        for end in (*config.input, *config.output)
    ]


def _require_same(record: EngineRecord, expected: EngineRecord, model: ServedModel) -> None:
    """Refuse a server's model that is made from another contract or another network than an engine here.

    Raises:
        ArtefactError: It is.
    """
    for name in record.contract.__struct_fields__:
        served, here = getattr(record.contract, name), getattr(expected.contract, name)
        if served != here:
            raise ArtefactError(
                f"{model} has another contract than {expected.engine}: {name} {served!r}, not {here!r}",
                remedy=_DEPLOY,
            )
    if record.onnx_sha256 != expected.onnx_sha256:
        raise ArtefactError(
            f"{model} runs another model than {expected.engine} (its ONNX differs)", remedy=_DEPLOY
        )
