"""Stands for ``tensorrt`` and ``tensorrt_rtx`` of a release: engines are ONNX graphs that ONNX Runtime executes.

A name that the release does not have (by its API surface) does not exist here. TensorRT's rules hold: a context
needs a profile of its own where profiles are not shared, a shape within the profile and an address for every
tensor; the first run after a new shape cannot be captured; a graph does not outlive its context, nor a change of
it. TensorRT's own refusals answer False or None and log why; ``fail`` makes a call refuse.
"""

from __future__ import annotations

import enum
import functools
import json
import signal
import struct
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from double_cuda import DoubleCuda, Misuse, Stream, Work
from double_network import describe_layers, inspect_layer, read_network, runs_on_dla

SURFACE = json.loads((Path(__file__).parents[1] / "engines" / "tensorrt_api.json").read_text())
RELEASES = {"8.6": 0, "10.3": 2, "11.4": 7, "rtx": 8}
_MAGIC = b"double of a TensorRT plan\n"
_ENUM_VALUES = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
LAYER_MS = 0.25  # of the first layer; the second takes twice as long, and so on
IMAGE_BYTES = 4096  # of activations for each image of a batch
_NUMPY = {"UINT8": np.uint8, "INT8": np.int8, "HALF": np.float16}


def names_of(owner: str, index: int) -> frozenset[str]:
    members = SURFACE["classes"].get(owner, {})
    return frozenset(name for name, found in members.items() if found == "all" or index in found)


@functools.lru_cache(maxsize=16)
def session_of(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=128)
def answers_of(
    model: bytes, name: str, pixels: bytes, kind: np.dtype[Any], shape: tuple[int, ...]
) -> list[np.ndarray]:
    """What a graph answers, worked out once: the same pictures are run in many ways."""
    return session_of(model).run(None, {name: np.frombuffer(pixels, kind).reshape(shape)})


class Guarded:
    """An object of TensorRT's: public names are those that its class has in this release."""

    _class = ""

    def __init__(self, trt: DoubleTensorRt) -> None:
        self._trt = trt

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_need")(name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._need(name)
        object.__setattr__(self, name, value)

    def _need(self, name: str) -> None:
        if name not in names_of(type(self)._class, self._trt._index):
            raise AttributeError(f"{type(self)._class} of TensorRT {self._trt.__version__} has no {name!r}")

    def _dropped(self, what: str) -> None:
        cuda = self._trt._cuda
        cuda.log.append(f"drop {what}" if cuda.stack() else f"drop {what} without a context")


class HostMemory(bytes):
    nbytes = property(len)


class RuntimeCache(Guarded):
    _class = "IRuntimeCache"

    def __init__(self, trt: DoubleTensorRt) -> None:
        super().__init__(trt)
        self._sizes: set[int] = set()

    def deserialize(self, blob: Any) -> bool:
        self._trt._cuda.need_context("IRuntimeCache.deserialize")
        if not bytes(blob).startswith(b"kernels "):
            return False
        self._sizes = {int(size) for size in bytes(blob).split()[1:]}
        return True

    def serialize(self) -> HostMemory:
        return HostMemory(" ".join(["kernels", *map(str, sorted(self._sizes))]).encode())


class RuntimeConfig(Guarded):
    _class = "IRuntimeConfig"
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, trt: DoubleTensorRt) -> None:
        super().__init__(trt)
        self._cache: RuntimeCache | None = None
        self._strategy = "STATIC"

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy.name

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self._cache = cache
        return not self._trt._fails("set_runtime_cache")


class Execution(Guarded):
    """Left to itself it takes memory for the largest shape of all profiles (NvInferRuntime.h, kSTATIC)."""

    _class = "IExecutionContext"
    profiler: Any = None  # kept alive by its context: pyCore.cpp 8.5 and 10, keep_alive<1, 2>
    enqueue_emits_profile = True

    def __init__(
        self, trt: DoubleTensorRt, engine: Engine, config: RuntimeConfig | None, managed: bool
    ) -> None:
        super().__init__(trt)
        self._engine, self._config = engine, config
        self._profile = 0 if engine._may_take_profile(0) else -1
        engine._executions.add(self)
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] | None = None
        self._version = 0  # of shape, addresses and memory: a graph is of one
        self._flushed = -1
        self._memory = 0
        self._own = None if managed else trt._cuda.mem_alloc(engine._memory_limit())
        if self._own is not None:
            self._memory = int(self._own)

    def __del__(self) -> None:
        if getattr(self, "_own", None) in self._trt._cuda.live:
            self._trt._cuda.live.remove(self._own)
        self._dropped("execution")

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._trt._stream(stream_handle)
        if not 0 <= profile_index < len(self._engine._profiles) or not self._engine._may_take_profile(
            profile_index, but=self
        ):
            self._trt._log(f"Profile {profile_index} has been chosen by another IExecutionContext.")
            # pyCore.cpp 8.6.1, context_set_optimization_profile_async: the binding raises where C++ says false
            raise RuntimeError("Error in set optimization profile async.")
        self._profile, self._shape = profile_index, None
        self._version += 1
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 0 if self._shape is None else self._shape[0] * IMAGE_BYTES

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self.update_device_memory_size_for_shapes():
            raise Misuse(f"{size} bytes of memory are too few for {self._shape}")
        self._memory = memory
        self._version += 1

    @property
    def device_memory(self) -> int:
        raise AttributeError("unreadable attribute")  # it has no getter: pyCore.cpp 8.6.1, def_property

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self._memory = memory
        self._version += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fits = name == self._engine._names[0] and tuple(shape[1:]) == self._engine._shapes[0][1:]
        if self._trt._fails("set_input_shape") or self._profile < 0 or not fits:
            self._trt._log(f"set_input_shape: {name} {tuple(shape)} is refused")
            return False
        smallest, _, largest = self._engine._profiles[self._profile]
        if not smallest <= shape[0] <= largest:
            self._trt._log(f"{shape[0]} is not in the profile's range")
            return False
        self._trt._shapes_set += 1
        self._shape = tuple(shape)
        self._version += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._trt._fails("set_tensor_address") or name not in self._engine._names:
            self._trt._log(f"set_tensor_address: no tensor {name}")
            return False
        self._addresses[name] = int(memory)
        self._version += 1
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        self._trt._stream(stream)
        return self._trt._capturable and self._engine._user_allocation

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._trt._cuda.need_context("execute_async_v3")
        if self._trt._cuda.here != self._engine._device:
            raise Misuse(
                f"an engine on GPU {self._engine._device} runs while GPU {self._trt._cuda.here} is current"
            )
        stream = self._trt._stream(stream_handle)
        if self._trt._fails("execute_async_v3"):
            return False
        unset = [name for name in self._engine._names if name not in self._addresses]
        if self._shape is None or unset:
            self._trt._log(f"no shape, or no address for {unset}")
            return False
        if stream.captured is not None and self._flushed != self._version:
            stream.invalid = True
            self._trt._log("a new shape was set: this run cannot be captured")
            return False
        if stream.captured is not None and not self._engine._user_allocation:
            # TensorRT for RTX 1.2, release notes: REQUIRE_USER_ALLOCATION is required when using stream capture
            stream.invalid = True
            self._trt._log("operation not permitted when stream is capturing")
            return False
        if not self._memory:
            self._trt._log("the context has no device memory")
            return False
        busy = [other for other in self._trt._cuda.streams() if other is not stream]
        if any(self in work.touches for other in busy for work in other.pending):
            raise Misuse("one context runs on two streams at once")
        memory = self._trt._cuda.owner_of(self._memory)
        if any(memory in work.touches for other in busy for work in other.pending):
            raise Misuse("two contexts use one memory at once")
        self._trt._ran.add((self._shape[0], self._profile))
        self._compile(self._shape[0])
        self._flushed = self._version
        stream.enqueue(self._work())
        if stream.captured is None and self.profiler is not None and self.enqueue_emits_profile:
            self._report_times(stream)
        return True

    def _report_times(self, stream: Stream) -> None:
        """Enqueueing waits for its end and reports each layer, which the launch of a graph does not.

        Source: NvInferRuntime.h, IProfiler, setEnqueueEmitsProfile (true by default), reportToProfiler. What a
        profiler raises is printed and dropped (pyCore.cpp 8.5 and 10, PyProfiler).
        """
        stream.finish()
        for index, entry in enumerate(self._engine._inspected(self._profile, shaped=False)):
            try:
                self.profiler.report_layer_time(entry["Name"], LAYER_MS * (index + 1))
            except BaseException as error:  # noqa: BLE001 - as the binding does
                sys.stderr.write(f"[ERROR] Exception caught in report_layer_time(): {error}\n")

    def _compile(self, size: int) -> None:
        known = self._config._cache._sizes if self._config and self._config._cache else set()
        if self._trt._index == RELEASES["rtx"] and size not in known:
            self._trt._compiled += 1
            known.add(size)

    def _work(self) -> Work:
        """The run as it stands now: an address or shape that changes afterwards makes it invalid."""
        version, shape, engine, cuda = self._version, self._shape, self._engine, self._trt._cuda
        source, *targets = (self._addresses[name] for name in engine._names)
        me = weakref.ref(self)
        assert shape is not None
        kind = np.dtype(_NUMPY[engine._types[0]])
        in_bytes = int(np.prod(shape)) * kind.itemsize
        sizes = [shape[0] * int(np.prod(one[1:])) * 4 for one in engine._shapes[1:]]
        memory = self._memory
        allocations = [cuda.owner_of(address) for address in (source, *targets, memory)]

        def check() -> None:
            this = me()
            if this is None:
                raise Misuse("the context of this work is gone")
            if this._version != version:
                raise Misuse("the context of this work was changed")
            cuda.need_memory(source, in_bytes)
            for target, size in zip(targets, sizes, strict=True):
                cuda.need_memory(target, size)
            cuda.need_memory(memory, shape[0] * IMAGE_BYTES)

        def step() -> None:
            if self_error := cuda.fail_on_device.pop("execute", ""):
                cuda.sick = self_error
            cuda.need_healthy()
            pixels = cuda.need_memory(source, in_bytes).view(kind).reshape(shape)
            answers = answers_of(engine._model, engine._names[0], pixels.tobytes(), kind, pixels.shape)
            for target, size, answer in zip(targets, sizes, answers, strict=True):
                cuda.need_memory(target, size)[:] = answer.reshape(-1).view(np.uint8)

        return Work("execute", step, check, (*allocations, WeakIdentity(self)))


class WeakIdentity:
    """Compares as an object without keeping it alive."""

    def __init__(self, thing: object) -> None:
        self._id = id(thing)

    def __eq__(self, other: object) -> bool:
        return id(other) == self._id

    __hash__ = None  # type: ignore[assignment]


class Inspector(Guarded):
    """What 8.6 answers of formats stays ``N/A`` even with a context; Myelin fuses everything from 11 on."""

    _class = "EngineInspector"
    execution_context: Execution | None = None

    def __init__(self, trt: DoubleTensorRt, engine: Engine) -> None:
        super().__init__(trt)
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        context = self.execution_context
        shaped = self._trt._index > 0 and context is not None and context._shape is not None
        entries = [
            entry
            for profile in range(len(self._engine._profiles))
            for entry in self._engine._inspected(profile, shaped=shaped and profile == context._profile)
        ]
        return json.dumps({"Layers": entries, "Bindings": list(self._engine._names)})


class Engine(Guarded):
    _class = "ICudaEngine"

    def __init__(self, trt: DoubleTensorRt, head: dict[str, Any], model: bytes) -> None:
        super().__init__(trt)
        self._model = model
        self._names = tuple(head["names"])
        self._types = tuple(head["types"])
        self._shapes = tuple(tuple(shape) for shape in head["shapes"])
        self._profiles = [tuple(sizes) for sizes in head["profiles"]]
        self._shared = bool(head["shared"]) or trt._index > 0  # always, since 10.0: NvInfer.h 10.3 line 8602
        self._user_allocation = bool(head["user_allocation"]) or trt._index != RELEASES["rtx"]
        self._layers = head["layers"]
        self._on_dla = head["on_dla"]
        self._device = (
            trt._cuda.here
        )  # an engine is loaded onto the GPU that is current, and runs there alone
        self._executions: weakref.WeakSet[Execution] = weakref.WeakSet()

    def __del__(self) -> None:
        self._dropped("engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._trt.TensorIOMode
        return mode.INPUT if name == self._names[0] else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._trt.DataType, self._types[self._names.index(name)])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._names.index(name)]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name == self._names[0]
        return [(size, *self._shapes[0][1:]) for size in self._profiles[profile_index]]

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size(self) -> int:
        return self._memory_limit()

    @property
    def device_memory_size_v2(self) -> int:
        return self._memory_limit()

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self._trt, self)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self._trt)

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Execution | None:
        if isinstance(strategy, RuntimeConfig):
            strategy, runtime_config = None, strategy
        if strategy is not None and not self._trt._has("ExecutionContextAllocationStrategy", "USER_MANAGED"):
            raise TypeError("incompatible function arguments")
        chosen = strategy.name if strategy is not None else getattr(runtime_config, "_strategy", "STATIC")
        return self._create(runtime_config, managed=chosen == "USER_MANAGED")

    def create_execution_context_without_device_memory(self) -> Execution | None:
        return self._create(None, managed=True)

    def _create(self, config: RuntimeConfig | None, *, managed: bool) -> Execution | None:
        self._trt._cuda.need_context("create_execution_context")
        if self._trt._fails("create_execution_context"):
            return None
        return Execution(self._trt, self, config, managed)

    def _inspected(self, profile: int, *, shaped: bool) -> list[dict[str, Any]]:
        release = self._trt._index
        # As trtexec lists it: [DlaLayer] {ForeignNode[conv1...relu5]}. What is inside has no entry of its own.
        dla = f"{{ForeignNode[{self._on_dla[0]}...{self._on_dla[-1]}]}}" if self._on_dla else ""
        inside = [{"Name": dla, "LayerType": "DLA", "Inputs": [], "TacticName": ""}] if dla else []
        return inside + [
            inspect_layer(
                *layer,
                index=index,
                fused=release > RELEASES["10.3"] or (release > 0 and layer[0] == "MATRIX_MULTIPLY"),
                silent=self._trt._silent,
                shaped=shaped,
                profile=profile,
            )
            for index, layer in enumerate(self._layers)
            if layer[1] not in self._on_dla
        ]

    def _memory_limit(self) -> int:
        return max(sizes[-1] for sizes in self._profiles) * IMAGE_BYTES

    def _may_take_profile(self, index: int, but: Execution | None = None) -> bool:
        others = [item for item in self._executions if item is not but and item._profile == index]
        return self._shared or not others


class Runtime(Guarded):
    _class = "Runtime"
    engine_host_code_allowed = False
    DLA_core = -1

    def __init__(self, trt: DoubleTensorRt, logger: Any) -> None:
        super().__init__(trt)
        trt._take_logger(logger)

    @property
    def num_DLA_cores(self) -> int:
        return self._trt._dla_cores

    def __del__(self) -> None:
        self._dropped("runtime")

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        self._trt._cuda.need_context("deserialize_cuda_engine")
        head, _, model = bytes(plan).removeprefix(_MAGIC).partition(b"\n")
        if self._trt._fails("deserialize_cuda_engine") or not bytes(plan).startswith(_MAGIC):
            self._trt._log("the engine plan file is\n not compatible with this version of TensorRT")
            return None
        values = json.loads(head)
        if values["compatible"] and not self.engine_host_code_allowed:
            self._trt._log("the engine holds host code, and that is not allowed")
            return None
        if values["dla"] is not None and values["dla"] != self.DLA_core:
            self._trt._log(f"the engine is for DLA core {values['dla']}, the runtime uses {self.DLA_core}")
            return None
        if values["release"] != self._trt.__version__ and not values["compatible"]:
            self._trt._log(f"version tag {values['release']} does not match {self._trt.__version__}")
            return None
        portable = self._trt._index == RELEASES["rtx"] or values["told"][2]
        if values["gpu"] != self._trt._cuda.here and not portable:
            # It warns and loads (NVIDIA/TensorRT#2900): between Orin modules that is all that happens.
            words = "Using an engine plan file across different models of devices is not recommended"
            self._trt._log(words, self._trt.ILogger.WARNING)
        return Engine(self._trt, values, model)


class Profile(Guarded):
    _class = "IOptimizationProfile"

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._sizes = [shape[0] for shape in (min, opt, max)]


class TimingCache(Guarded):
    _class = "ITimingCache"

    def __init__(self, trt: DoubleTensorRt, content: bytes) -> None:
        super().__init__(trt)
        self._head, *self._layers = content.decode().split("\n") if content else [trt.__version__]

    def serialize(self) -> HostMemory:
        return HostMemory("\n".join([self._head, *sorted(set(self._layers))]).encode())


class Calibrator:
    """The base of a calibrator; the builder asks it in :func:`calibrate`."""

    started = False

    def __init__(self) -> None:
        self.started = True


class IInt8EntropyCalibrator2(Calibrator):
    _algorithm = "EntropyCalibration2"


class IInt8MinMaxCalibrator(Calibrator):
    _algorithm = "MinMaxCalibration"


def calibrate(trt: DoubleTensorRt, network: Any, config: Config) -> dict[str, float]:
    """Ask a calibrator for its cache, else for images until none is left; then hand it the cache.

    Source: pyInt8.cpp of the binding (a list of names, a list of addresses or None, bytes or None, a memoryview that
    lasts for the call; what is raised is printed and dropped, so here it fails the test); NvInfer.h, IInt8Calibrator:
    a cache "will not be used" where it does not match the calibrator; set_calibration_profile's docstring: "must be
    set" for runtime dimensions, "MIN and MAX values will be overwritten by kOPT".
    """
    calibrator: Any = config.int8_calibrator
    if calibrator is None:
        return {}
    trt._cuda.need_context("calibrate")
    size, profile = calibrator.get_batch_size(), config._calibration_profile
    if not calibrator.started or profile is None:
        raise Misuse("a calibrator without its base's __init__, or without a calibration profile")
    major, minor, patch = (int(part) for part in trt.__version__.split(".")[:3])
    number = major * (10_000 if major >= 10 else 1000) + minor * 100 + patch
    header = f"TRT-{number}-{calibrator._algorithm}"
    first, *lines = (calibrator.read_calibration_cache() or b"").decode().splitlines() or [""]
    if first == header:
        return {name: trt_scale(text) for name, _, text in (line.rpartition(": ") for line in lines)}
    if profile._sizes[1] != size:
        raise Misuse(f"batches of {size} images for a calibration profile of {profile._sizes}")
    image, names = (size, *network.shapes[0][1:]), [layer._output.name for layer in network.layers]
    graph = onnx.load_model_from_string(network.model)
    known = {value.name for value in graph.graph.output}
    kinds = {layer._output.name: layer._output._kind for layer in network.layers}
    wanted = [name for name in names if kinds[name] == "FLOAT"]
    for name in wanted:
        if name not in known:
            graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    scales: dict[str, float] = {}
    while (addresses := calibrator.get_batch(network.names[:1])) is not None:
        pixels = trt._cuda.need_memory(addresses[0], int(np.prod(image))).reshape(image)
        answers = session_of(graph.SerializeToString()).run(wanted, {network.names[0]: pixels})
        for name, values in zip(wanted, answers, strict=True):
            scales[name] = max(scales.get(name, 0.0), float(np.abs(values).max()) / 127)
    if not scales:
        trt._log("Calibration failure occurred with no scaling factors detected.")
        return {}
    text = "\n".join([header, *(f"{name}: {trt_hex(scale)}" for name, scale in scales.items())]) + "\n"
    with memoryview(text.encode()) as lent:
        calibrator.write_calibration_cache(lent)
    return scales


def trt_hex(scale: float) -> str:
    return f"{struct.unpack('>I', struct.pack('>f', scale))[0]:x}"


def trt_scale(digits: str) -> float:
    return float(struct.unpack(">f", struct.pack(">I", int(digits, 16)))[0])


class Config(Guarded):
    _class = "IBuilderConfig"
    int8_calibrator: Any = None
    _calibration_profile: Profile | None = None
    profiling_verbosity: Any = None
    progress_monitor: Any = None
    builder_optimization_level = 3
    max_aux_streams = -1
    hardware_compatibility_level: Any = None
    default_device_type: Any = None
    DLA_core = -1
    _timings: TimingCache | None = None

    def __init__(self, trt: DoubleTensorRt) -> None:
        super().__init__(trt)
        self._flags: set[str] = {"TF32"}
        self._features: set[str] = set()
        self._profiles: list[Profile] = []

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        if bytes(serialized_timing_cache).startswith(b"nonsense"):
            self._trt._log("the timing cache is damaged")
            return None
        return TimingCache(self._trt, bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache._head != self._trt.__version__ and not ignore_mismatch:
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self._timings

    def set_calibration_profile(self, profile: Profile) -> bool:
        self._calibration_profile = profile
        return True

    def can_run_on_DLA(self, layer: Any) -> bool:
        if self.default_device_type is None:
            raise Misuse("asked before the configuration is complete")
        return runs_on_dla(layer, self._flags, strong="precision" not in names_of("ILayer", self._trt._index))

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool_size > 0

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self._features.add if enable else self._features.discard)(feature.name)

    def add_optimization_profile(self, profile: Profile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Input:
    """A network's input, whose shape can be set (pyGraph.cpp, ``ITensor.shape``)."""

    def __init__(self, read: SimpleNamespace) -> None:
        self._read, self.name = read, read.names[0]

    @property
    def shape(self) -> list[int]:
        return self._read.shapes[0]

    @shape.setter
    def shape(self, shape: tuple[int, ...]) -> None:
        self._read.shapes[0] = list(shape)


class Network(Guarded):
    _class = "INetworkDefinition"

    def __init__(self, trt: DoubleTensorRt, flags: int) -> None:
        super().__init__(trt)
        self._strong = bool(flags & 0b10)
        if trt._index == 0 and flags != 0b01:
            raise Misuse("TensorRT 8.6 wants EXPLICIT_BATCH and knows nothing else")
        self._read: Any = None

    @property
    def num_layers(self) -> int:
        return len(self._read.layers)

    def get_layer(self, index: int) -> Any:
        return self._read.layers[index]

    def get_input(self, index: int) -> Any:
        return Input(self._read)


class Parser(Guarded):
    _class = "OnnxParser"

    def __init__(self, trt: DoubleTensorRt, network: Network, logger: Any) -> None:
        super().__init__(trt)
        self._network = network
        self._errors: list[str] = []

    def parse(self, model: bytes) -> bool:
        try:
            self._network._read = read_network(self._trt, bytes(model))
        except ValueError as error:
            self._errors.append(str(error))
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self._errors[index])


class Builder(Guarded):
    _class = "Builder"

    def __init__(self, trt: DoubleTensorRt, logger: Any) -> None:
        super().__init__(trt)
        trt._take_logger(logger)

    @property
    def num_DLA_cores(self) -> int:
        return self._trt._dla_cores

    def create_network(self, flags: int) -> Network:
        return Network(self._trt, flags)

    def create_builder_config(self) -> Config:
        return Config(self._trt)

    def create_optimization_profile(self) -> Profile:
        return Profile(self._trt)

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
        if self._trt._fails("build_serialized_network"):
            return None
        weak = config._flags & {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}
        bound = [layer.name for layer in network._read.layers if getattr(layer, "precision_is_set", False)]
        if network._strong and (weak or bound):
            self._trt._log(f"a strongly typed network does not take {weak or bound}")
            return None
        if not self._trt._report_progress(config.progress_monitor if self._trt._index else None):
            return None
        read = network._read
        on_dla = self._placed(network, config)
        if on_dla is None:
            return None
        ranged: dict[str, float] = {}
        if "INT8" in config._flags and config.int8_calibrator is not None:
            ranged = calibrate(self._trt, read, config)
            if not ranged:
                return None
        if config._timings is not None:
            config._timings._layers += [layer.name for layer in read.layers]
        level = config.hardware_compatibility_level
        head = {
            "release": self._trt.__version__,
            "gpu": self._trt._cuda.here,  # kernels are timed on the GPU that is current: cudaSetDevice's
            "compatible": "VERSION_COMPATIBLE" in config._flags,
            "told": [config.builder_optimization_level, config.max_aux_streams, level and level.name],
            "names": read.names,
            "types": read.types,
            "shapes": read.shapes,
            "profiles": [profile._sizes for profile in config._profiles],
            "shared": "PROFILE_SHARING_0806" in config._features,
            "user_allocation": "REQUIRE_USER_ALLOCATION" in config._flags,
            "dla": config.DLA_core if on_dla else None,
            "on_dla": on_dla,
            "layers": describe_layers(read, config._flags, strong=network._strong, ranged=ranged),
        }
        return HostMemory(_MAGIC + json.dumps(head).encode() + b"\n" + read.model)

    def _placed(self, network: Network, config: Config) -> list[str] | None:
        """Name the layers that DLA runs; None where it refuses.

        Source: TensorRT documentation, "DLA Supported Layers and Restrictions" (min, opt and max must be equal),
        "GPU Fallback Mode"; of calibrators DLA takes the second entropy one (NVIDIA/TensorRT#2222).
        """
        if config.default_device_type is not self._trt.DeviceType.DLA:
            return []
        layers = network._read.layers
        strong = "precision" not in names_of("ILayer", self._trt._index)
        if network._strong and not strong:
            raise Misuse("DLA wants the builder's flags of this release, not a network with types")
        placed = [layer.name for layer in layers if runs_on_dla(layer, config._flags, strong=strong)]
        calibrator = config.int8_calibrator if not strong else None
        dynamic = network._read.shapes[0][0] < 1 or any(
            len(set(profile._sizes)) > 1 for profile in config._profiles
        )
        if dynamic or len(config._profiles) > 1 or not 0 <= config.DLA_core < self._trt._dla_cores:
            self._trt._log("DLA does not support dynamic shapes, or there is no such core")
            return None
        if len(placed) < len(layers) and "GPU_FALLBACK" not in config._flags:
            self._trt._log("a layer is not supported on DLA, and GPU fallback is disabled")
            return None
        if calibrator is not None and not isinstance(calibrator, IInt8EntropyCalibrator2):
            self._trt._log("DLA takes no other calibrator than IInt8EntropyCalibrator2")
            return None
        return placed


class DoubleTensorRt:
    """The module of a release.

    Attributes:
        fail: Calls that refuse, with what they log: ``{"execute_async_v3": "out of memory"}``.
    """

    def __init__(self, release: str, cuda: DoubleCuda) -> None:
        self._index = RELEASES[release]
        package, _, version = SURFACE["releases"][self._index].partition("-")
        self.__name__, self.__version__ = package, version
        self._cuda = cuda
        self._first: Any = None  # a weak reference to the logger
        self._warns = ""  # while it builds
        self._interrupted = False  # whether Ctrl-C comes while TensorRT logs
        self._dla_cores = 0 if release == "rtx" else 2
        self._silent = False  # whether the inspector says nothing of the precision
        self.fail: dict[str, str] = {}
        self._capturable = True
        self._shapes_set = 0
        self._ran: set[tuple[int, int]] = set()  # batch size and optimisation profile
        self._compiled = 0
        makers = {"Runtime": Runtime, "Builder": Builder, "OnnxParser": Parser}
        self._made: dict[str, Any] = {name: functools.partial(kind, self) for name, kind in makers.items()}
        self._made["IRuntimeCache"] = RuntimeCache
        self._made |= {kind.__name__: kind for kind in (IInt8EntropyCalibrator2, IInt8MinMaxCalibrator)}
        severities = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)
        self._made["ILogger"] = type("ILogger", (), {**vars(severities), "Severity": severities})
        self._made["IProgressMonitor"] = type("IProgressMonitor", (), {})
        self._made["IProfiler"] = type("IProfiler", (), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "" not in names_of(name, self._index):
            raise AttributeError(f"TensorRT {self.__dict__.get('__version__')} has no {name!r}")
        if name not in self._made:
            members = sorted(names_of(name, self._index) - {"", "name", "value", "itemsize"})
            values = {member: _ENUM_VALUES.get(member, 100 + i) for i, member in enumerate(members)}
            self._made[name] = enum.IntEnum(name, values)
        return self._made[name]

    def _has(self, owner: str, member: str) -> bool:
        return member in names_of(owner, self._index)

    def _fails(self, call: str) -> bool:
        if call not in self.fail:
            return False
        self._log(self.fail[call])
        return True

    def _take_logger(self, logger: Any) -> None:
        """TensorRT keeps the first logger that it is given, by a bare pointer (NVIDIA/TensorRT#1475)."""
        if self._first is None:
            self._first = weakref.ref(logger)

    @property
    def _logger(self) -> Any:
        logger = self._first()
        if logger is None:
            raise Misuse("TensorRT reports through a logger that is gone")
        return logger

    def _log(self, message: str, severity: int = 1) -> None:
        """What is raised in ``log`` is printed and dropped (pyCore.cpp 8.6.1 line 529, 10.3 line 666)."""
        if not message:
            return
        logger = self._logger
        try:
            if self._interrupted:
                self._interrupted = False
                signal.raise_signal(signal.SIGINT)
            logger.log(severity, message)
        except BaseException as error:  # noqa: BLE001 - as the binding does
            sys.stderr.write(f"[ERROR] Exception caught in log(): {error}\n")

    def _report_progress(self, monitor: Any) -> bool:
        """Build in four steps; say whether the monitor lets them all be done."""
        if monitor is not None:
            monitor.phase_start("Building Engine", None, 4)
        if self._warns:
            self._log(self._warns, self.ILogger.WARNING)
        for step in range(4):
            self._log(f"Step {step}", self.ILogger.VERBOSE)
            if monitor is not None and not monitor.step_complete("Building Engine", step):
                return False
        if monitor is not None:
            monitor.phase_finish("Building Engine")
        return True

    def _stream(self, handle: int) -> Stream:
        found = self._cuda.by_handle.get(handle)
        if found is None:
            raise Misuse("work on a stream that does not exist, or on the default one")
        return found
