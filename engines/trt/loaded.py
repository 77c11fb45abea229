"""A deserialised engine that was held against its contract, and the execution contexts made of it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import EnvironmentProblem
from engines.record import EngineRecord
from engines.trt import versions
from engines.trt.cache import RuntimeCache
from engines.trt.census import read_report
from engines.trt.cuda import Gpu
from engines.trt.faults import Faults

_DATA_TYPES = {
    "uint8": "UINT8",
    "int8": "INT8",
    "float16": "HALF",
}  # of a contract's input, as TensorRT calls them


@dataclass(frozen=True)
class StoredEngine:
    """A serialised engine, read and checked, as it goes into TensorRT.

    Attributes:
        plan: Its bytes, held against the record.
        record: Its record.
        place: Its path, beside which the runner keeps what it need not find out again; None keeps nothing.
        gpu: The GPU that it runs on; None keeps nothing that depends on it.
    """

    plan: bytes
    record: EngineRecord
    place: Path | None = None
    gpu: Gpu | None = None


class LoadedEngine:
    """TensorRT's engine and runtime; they live until the stack that they were registered with is closed.

    Attributes:
        cache: The cache of kernels that TensorRT for RTX compiles when it first runs; None elsewhere.
    """

    def __init__(self, trt: Any, stored: StoredEngine, faults: Faults) -> None:
        """Deserialise an engine; the GPU's context must be current.

        Args:
            trt: The module ``tensorrt`` or ``tensorrt_rtx``.
            stored: The engine.
            faults: Words the failures; its logger lives as long as the process.

        Raises:
            ArtefactError: TensorRT refuses the engine, or it is not of this contract.
            EnvironmentProblem: TensorRT for RTX refuses its own cache.
        """
        record = stored.record
        runtime = trt.Runtime(faults.logger)
        # A version-compatible engine brings its runtime along: code that is loaded with it.
        runtime.engine_host_code_allowed = record.tuning.version_compatible
        _use_dla(runtime, record)
        engine = runtime.deserialize_cuda_engine(stored.plan)
        if engine is None:
            raise faults.refused()
        _check_tensors(trt, engine, record, faults)
        self._trt, self._runtime, self._engine = trt, runtime, engine
        self._profiles = _own_profiles(engine, record.contract.input_name)
        self._settings, cache = versions.make_runtime_config(trt, engine)
        self.cache = RuntimeCache(cache, record, stored.place) if cache is not None else None
        if cache is not None and not versions.use_cache(self._settings, cache):
            raise faults.problem("open", "the runtime cache is refused")

    def register(self, frees: contextlib.ExitStack) -> None:
        """Drop the engine, then the runtime, when the stack closes."""
        for name in ("_runtime", "_engine", "_settings", "cache"):
            frees.callback(setattr, self, name, None)

    def create_execution(self) -> Any:
        """Return an execution context without memory, or None where TensorRT refuses."""
        return versions.create_execution(self._trt, self._engine, self._settings)

    def choose_profile(self, execution: Any, size: int, stream_handle: int) -> bool:
        """Have a context use the optimisation profile for a batch size: one of its own, or the first, of the range.

        From the second context on, a release without profile sharing (8.6 with an engine that was built
        without it) leaves the profile unset, and refuses to set one that another context has: by an exception
        of its binding (pyCore.cpp 8.6.1, ``context_set_optimization_profile_async``).

        Returns:
            Whether it does.
        """
        profile = self._profiles.get(size, 0)
        if execution.active_optimization_profile == profile:
            return True
        try:
            return bool(execution.set_optimization_profile_async(profile, stream_handle))
        except RuntimeError:
            return False

    def memory_needed(self, execution: Any) -> int:
        """Return the device memory that a context needs for the shape that is set, bytes."""
        return versions.memory_needed(self._engine, execution)

    def time_layers(self, execution: Any) -> Mapping[str, Sequence[float]]:
        """Have a context's layers timed from now on, which makes every run wait for its end.

        The launch of a graph is not timed. Source: NvInferRuntime.h, setEnqueueEmitsProfile (true by default) and
        reportToProfiler.

        Returns:
            Milliseconds by the layer's name; every run adds one to each.
        """
        trt: Any = self._trt
        times = defaultdict[str, list[float]](list)

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name].append(ms)

        # The binding has the context keep it alive (pyCore.cpp 8.5 and 10, keep_alive<1, 2>).
        execution.profiler = Profiler()
        return times

    def report_layers(self, execution: Any) -> str | None:
        """Return the engine inspector's JSON report, with the formats that a context has for the shape that is set."""
        return read_report(self._trt, self._engine, execution)


def _use_dla(runtime: Any, record: EngineRecord) -> None:
    """Have an engine for the Deep Learning Accelerator run on the core that it was built for.

    Raises:
        EnvironmentProblem: The device has no such core.
    """
    core = record.tuning.dla
    if core is None:
        return
    if core >= runtime.num_DLA_cores:
        raise EnvironmentProblem(
            f"{record.engine} runs on DLA core {core}, this device has {runtime.num_DLA_cores} of them",
            remedy=f"build it for what is here: {record.build_command}",
        )
    versions.use_dla(runtime, core)


def _own_profiles(engine: Any, name: str) -> dict[int, int]:
    """Return the places of the optimisation profiles that are for one batch size alone, by that size."""
    found = {}
    for index in range(engine.num_optimization_profiles):
        sizes = {next(iter(shape)) for shape in engine.get_tensor_profile_shape(name, index)}
        if len(sizes) == 1:
            found[int(sizes.pop())] = index
    return found


def _check_tensors(trt: Any, engine: Any, record: EngineRecord, faults: Faults) -> None:
    contract = record.contract
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    if (inputs, outputs) != ([contract.input_name], [name for name, _ in contract.outputs]):
        raise faults.refused(f"it takes {inputs} and gives {outputs}")
    taken, *given = (engine.get_tensor_dtype(name) for name in (*inputs, *outputs))
    wrong = next((kind for kind in given if kind != trt.DataType.FLOAT), None)
    if taken != getattr(trt.DataType, _DATA_TYPES[contract.dtype]) or wrong is not None:
        raise faults.refused(f"it takes {taken} and gives {wrong or given[0]}")
    shapes = [tuple(engine.get_tensor_shape(name))[1:] for name in (*inputs, *outputs)]
    if shapes != [contract.input_shape, *(shape for _, shape in contract.outputs)]:
        raise faults.refused(f"it takes {list(shapes[0])} and gives {list(shapes[1])} for each image")
    profile = engine.get_tensor_profile_shape(contract.input_name, 0)
    sizes = [next(iter(shape)) for shape in profile]
    batch = record.batch
    if not sizes[0] <= batch.smallest <= batch.largest <= sizes[2]:
        raise faults.refused(
            f"its profile is for batches of {sizes[0]} to {sizes[2]}, its record says {batch}"
        )
