"""How the TensorRT releases differ: the one module that asks. Everything else is in all of them.

8.6          weakly typed: explicit batch and the FP16/INT8 flags; no progress monitor
10.x         strongly typed networks; the old flags still exist, for calibrators alone
11.x, RTX    strongly typed only
RTX          compiles kernels when it first runs, and can keep them in a runtime cache
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from engines.packages import parse_version
from engines.record import Precision, Tuning

# By default an engine of TensorRT for RTX runs on all of these, on Linux and on Windows.
# Source: TensorRT-RTX documentation, "Support Matrix"
RTX_GPUS = "compute capability 8.6, 8.9 and 12.0"
RTX_INT8 = (
    "the support matrix of TensorRT for RTX names INT8 for weights of matrix multiplications only: layers counted as"
    " INT8 may compute in floating point, and no engine inspector has shown otherwise"
)

# What a release logs as an error although nothing is wrong.
_HARMLESS = ("Thread context has not been set",)  # TensorRT for RTX 1.7, at every build on a CPU


def is_strongly_typed(trt: Any) -> bool:
    """Whether this release takes the precision from the network's own types."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def has_calibrators(trt: Any) -> bool:
    """Whether this release can find the ranges of a weakly typed INT8 network itself: until 10.x."""
    return hasattr(trt, "IInt8EntropyCalibrator2")


def has_dla(trt: Any) -> bool:
    """Whether this release builds for the Deep Learning Accelerator: until 10.7, and again from 11.4.1 on.

    All of them have its names. Source: TensorRT 11.4.1 documentation, "Working with DLA".
    """
    version = parse_version(str(trt.__version__))[:3]
    return not is_for_rtx(trt) and (version < (10, 8) or version >= (11, 4, 1))


def place_on_dla(trt: Any, config: Any, core: int) -> None:
    """Have the builder put what it can on a core of the Deep Learning Accelerator, and the rest on the GPU."""
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def use_dla(runtime: Any, core: int | None) -> None:
    """Have engines that a runtime loads from now on run on a core of the Deep Learning Accelerator."""
    if core is not None:
        runtime.DLA_core = core


def network_flags(trt: Any, *, weak: bool = False) -> int:
    """Return the flags that a network is created with; ``weak`` asks for one without types, where there is a choice."""
    kinds = trt.NetworkDefinitionCreationFlag
    if hasattr(kinds, "STRONGLY_TYPED") and not weak:
        return 1 << int(kinds.STRONGLY_TYPED)
    return 1 << int(kinds.EXPLICIT_BATCH)


def set_precision(trt: Any, config: Any, precision: Precision, *, weak: bool = False) -> None:
    """Tell the builder the precision, where the network's types do not.

    FP32 switches TF32 off everywhere: with it, an "FP32" convolution keeps 10 of its 23 mantissa bits. The rest
    of an INT8 engine runs in FP16, which a weakly typed builder must be allowed.
    """
    if precision is Precision.FP32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if is_strongly_typed(trt) and not weak:
        return
    if precision is not Precision.FP32 and hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    if precision is Precision.INT8 and hasattr(trt.BuilderFlag, "INT8"):
        config.set_flag(trt.BuilderFlag.INT8)
    bound = weak or precision is Precision.FP16
    if bound and hasattr(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS"):
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def insist_on_half(trt: Any, layers: Iterable[Any], *, weak: bool = False) -> None:
    """Bind layers of a weakly typed network to FP16.

    The flag alone only allows FP16: a layer that runs faster in FP32 stays there (NvInfer.h 8.6.1 line 8772).
    """
    for layer in layers:
        if (weak or not is_strongly_typed(trt)) and hasattr(layer, "precision"):
            layer.precision = trt.DataType.HALF


def insist_on_int8(trt: Any, layers: Iterable[Any], names: Collection[str]) -> None:
    """Bind layers of a weakly typed network to INT8 by their names, and the others to FP16: the flag only allows it."""
    for layer in layers:
        if hasattr(layer, "precision"):
            layer.precision = trt.DataType.INT8 if str(layer.name) in names else trt.DataType.HALF


def calibrate(trt: Any, config: Any, calibrator: Any, profile: Any) -> None:
    """Have the builder take ranges from a calibrator, over batches of the size of a profile that no engine has.

    Source: docstring of set_calibration_profile: it "must be set" for a network with runtime dimensions, "MIN and MAX
    values will be overwritten by kOPT".
    """
    if has_calibrators(trt) and hasattr(config, "int8_calibrator"):
        config.int8_calibrator = calibrator
        config.set_calibration_profile(profile)


def computation_type(layer: Any, tensor: Any) -> Any:
    """Return the type that a layer computes in: the one that it was bound to, else that of its first input."""
    bound = hasattr(layer, "precision_is_set") and layer.precision_is_set
    return layer.precision if bound else tensor.dtype


def share_profile(trt: Any, config: Any) -> None:
    """Let several execution contexts use the same optimisation profile, where a release must be asked: 8.6.

    Each batch in flight has a context of its own. From 10.0 on they always may (NvInfer.h 10.3 line 8602).
    """
    if not is_strongly_typed(trt) and hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def is_for_rtx(trt: Any) -> bool:
    """Whether this is TensorRT for RTX, which compiles kernels where the engine runs."""
    return hasattr(trt, "IRuntimeCache")


def known_tuning(trt: Any) -> tuple[str, ...]:
    """Return what of a ``Tuning`` the builder can be told, by its fields' names.

    Engines of TensorRT for RTX are portable as they are, and its package has no lean runtime for a version-compatible
    engine (1.7: "Unable to load library: libnvinfer_lean.so.1").
    """
    common = ("optimization_level", "max_aux_streams")
    dla = ("dla",) if has_dla(trt) else ()
    return common if is_for_rtx(trt) else (*common, "version_compatible", "hardware_compatible", *dla)


def tune(trt: Any, config: Any, tuning: Tuning) -> None:
    """Tell the builder what it was asked to be told."""
    if tuning.optimization_level is not None:
        config.builder_optimization_level = tuning.optimization_level
    if tuning.max_aux_streams is not None:
        config.max_aux_streams = tuning.max_aux_streams
    if tuning.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if tuning.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def keeps_timings(trt: Any) -> bool:
    """Whether builds can share what they measured of kernels; for RTX they measure nothing (deprecated in 1.2)."""
    return not is_for_rtx(trt)


def allow_capture(trt: Any, config: Any) -> None:
    """Have the engine work in memory that its user gives, where that is not a matter of course: RTX.

    Without it a stream that is being captured is refused. Source: TensorRT for RTX 1.2, release notes.
    """
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def make_runtime_config(trt: Any, engine: Any) -> tuple[Any, Any]:
    """Return the settings for execution contexts and their cache of compiled kernels: RTX only, else None twice.

    Kernels for a new shape are compiled before they first run: a graph that is captured then has the kernels
    that it keeps, not the slower ones that RTX runs until the background compiler is done.
    """
    if not hasattr(trt, "IRuntimeCache") or not hasattr(engine, "create_runtime_config"):
        return None, None
    runtime_config = engine.create_runtime_config()
    runtime_config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    cache = runtime_config.create_runtime_cache()
    return runtime_config, cache


def use_cache(runtime_config: Any, cache: Any) -> bool:
    """Have the execution contexts of these settings use a cache, filled before; say whether they do."""
    return hasattr(runtime_config, "set_runtime_cache") and bool(runtime_config.set_runtime_cache(cache))


def create_execution(trt: Any, engine: Any, runtime_config: Any) -> Any:
    """Return a new execution context that has no device memory yet, or None where TensorRT refuses.

    Left to itself TensorRT allocates for the largest shape of the profile, for every context, and keeps it
    (NvInferRuntime.h, ExecutionContextAllocationStrategy::kSTATIC).
    """
    if not hasattr(trt, "ExecutionContextAllocationStrategy"):
        return engine.create_execution_context_without_device_memory()
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if runtime_config is None:
        return engine.create_execution_context(strategy)
    runtime_config.set_execution_context_allocation_strategy(strategy)
    return engine.create_execution_context(runtime_config)


def memory_limit(engine: Any) -> int:
    """Return the device memory that a context of any shape needs at most, bytes."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def memory_needed(engine: Any, execution: Any) -> int:
    """Return the device memory that a context needs for the shape that is set, bytes."""
    if not hasattr(execution, "update_device_memory_size_for_shapes"):
        return memory_limit(engine)
    return int(execution.update_device_memory_size_for_shapes())


def set_memory(execution: Any, address: int, size: int) -> None:
    """Give a context its device memory; it stays in use until the work that was enqueued is done."""
    if hasattr(execution, "set_device_memory"):
        execution.set_device_memory(address, size)
    else:
        execution.device_memory = address


def is_capturable(execution: Any, stream_handle: int) -> bool:
    """Whether a context's work can be captured into a CUDA graph, as far as the release says beforehand."""
    if not hasattr(execution, "is_stream_capturable"):
        return True
    return bool(execution.is_stream_capturable(stream_handle))


def is_harmless(message: str) -> bool:
    """Whether an error that TensorRT logged can be ignored."""
    return message.startswith(_HARMLESS)


def describe_parser_error(parser_error: Any) -> str:
    """Return what the ONNX parser found wrong, on one line, with the node where the release names it."""
    text = " ".join(str(parser_error.desc()).split())
    if not hasattr(parser_error, "node_operator") or not parser_error.node_operator():
        return text
    return f"{parser_error.node_operator()} {parser_error.node_name()}: {text}"


def attach_monitor(
    trt: Any, config: Any, progress: Callable[[str, int, int], None] | None, interrupts: Sequence[int]
) -> Any:
    """Have the builder report its progress and stop once ``interrupts`` fills, where the release can.

    An exception in the callback (Ctrl-C among them) must not cross TensorRT's C++ frames: it is kept, the build
    is cancelled, and whoever built raises it.

    Returns:
        The monitor, with the attribute ``failure``; it must outlive ``config``. None where there is none.
    """
    if not hasattr(trt, "IProgressMonitor") or not hasattr(config, "progress_monitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return self.failure is None and not interrupts

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self._totals.pop(phase_name, 0))

        def _report(self, phase: str, done: int) -> None:
            if self.failure is not None or interrupts or progress is None:
                return
            try:
                progress(phase, done, self._totals.get(phase, done))
            except BaseException as error:  # noqa: BLE001 - raised again by whoever built
                self.failure = error

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor
