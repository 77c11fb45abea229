"""From ONNX bytes to a serialised TensorRT engine, with every answer of TensorRT checked."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from engines.errors import ArtefactError, EnvironmentProblem
from engines.record import BatchRange, Precision
from engines.runtimes import BuildOptions, check_precision, check_tuning
from engines.trt import census, versions
from engines.trt.cache import TimingCache
from engines.trt.faults import describe_warnings, first_error, process_logger

_UNKNOWN = "unknown precision"
_TF32_NOTE = "TF32 is off: FP32 layers keep all 23 bits of their mantissa"


@dataclass(frozen=True)
class Plan:
    """A serialised engine and what was found out about it.

    Attributes:
        data: The engine: a buffer.
        layers: Layers with weights counted by precision.
        layers_source: Where that count comes from.
        notes: Warnings for the reader.
        layer_types: The same by the layers' names.
        gpu_layers: Of a build for the Deep Learning Accelerator: the layers that the GPU runs.
    """

    data: Any
    layers: dict[str, int]
    layers_source: str
    notes: tuple[str, ...]
    layer_types: dict[str, str]
    gpu_layers: tuple[str, ...] = ()


def build_plan(trt: Any, model: bytes, options: BuildOptions, *, has_gpu: bool) -> Plan:
    """Parse a model that is already in the wanted precision and build an engine.

    Ctrl-C ends the build at its next step, where the release reports steps, and after it elsewhere (8.6).

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        model: The serialised ONNX model.
        options: What is asked for.
        has_gpu: Whether the engine can be loaded here, to inspect it.

    Raises:
        AccuracyGateError: Its layers would not run in the precision asked for.
        ArtefactError: TensorRT cannot read the model.
        EnvironmentProblem: TensorRT cannot build here.
        UsageError: The release knows something of ``options.tuning`` not.
    """
    check_tuning(options.tuning, versions.known_tuning(trt), _name(trt))
    with _keep_signals() as interrupts:
        return _build(trt, model, options, has_gpu=has_gpu, interrupts=interrupts)


@contextlib.contextmanager
def _keep_signals() -> Iterator[list[int]]:
    """Keep Ctrl-C and SIGTERM until the block is over; the list that is given fills when they come.

    What their handlers raise while TensorRT logs, as it does all the time, would be printed and dropped by its Python
    binding (pyCore.cpp 8.6.1 line 529, 10.3 line 666).
    """
    came: list[int] = []
    kept: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():  # a signal goes to no other thread
        for kind in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(kind)
            if callable(handler):  # else it is ignored, or the system's own
                kept[kind] = handler
                signal.signal(kind, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)
        if came:
            kept[came[0]](came[0], None)


def _build(
    trt: Any, model: bytes, options: BuildOptions, *, has_gpu: bool, interrupts: Sequence[int]
) -> Plan:
    logger = process_logger(trt)
    logger.listener = options.log
    try:
        plan = _make_plan(trt, logger, model, options, has_gpu=has_gpu, interrupts=interrupts)
    finally:
        logger.listener = None
    return replace(plan, notes=(*plan.notes, *describe_warnings(logger)))


def _make_plan(
    trt: Any, logger: Any, model: bytes, options: BuildOptions, *, has_gpu: bool, interrupts: Sequence[int]
) -> Plan:
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as error:  # pybind11's answer to a null pointer
        raise _cannot_build(trt, logger, str(error)) from error
    implicit, dla = options.implicit, options.tuning.dla
    _check_dla(trt, builder, dla)
    weak = _is_weak(trt, options)
    network = builder.create_network(versions.network_flags(trt, weak=weak))
    if network is None:
        raise _cannot_build(trt, logger, "no network")
    parser = _parse(trt, logger, network, model)
    if implicit is not None and implicit.layers:
        versions.insist_on_int8(trt, census.weighted_layers(trt, network), implicit.layers)
    if options.precision is Precision.FP16:
        versions.insist_on_half(trt, census.weighted_layers(trt, network), weak=weak)
    types = census.network_layer_types(trt, network)
    check_precision(Counter(types.values()), options)
    tensor = network.get_input(0)
    if dla is not None:
        # It has no dynamic dimensions, and is asked about each layer before there is a profile.
        tensor.shape = (options.batch.best, *tuple(tensor.shape)[1:])
    data, notes, gpu_layers = _serialize(trt, logger, builder, network, options, interrupts)
    del parser  # it owns the weights until the builder has run
    if options.precision is Precision.FP32:
        notes = (_TF32_NOTE, *notes)
    plan = Plan(data, Counter(types.values()), census.NETWORK, notes, types, gpu_layers)
    shapes = {tensor.name: (options.batch.best, *tuple(tensor.shape)[1:])}
    found = census.inspect_plan(trt, logger, data, shapes, dla=dla) if has_gpu else None
    if found is not None:
        return _prove(plan, found, options)
    if implicit is not None:
        check_precision({_UNKNOWN: len(types)}, options)
    return plan


def _is_weak(trt: Any, options: BuildOptions) -> bool:
    """Whether the network is to have no types although the release has such networks.

    Implicit INT8 needs that, and so does the Deep Learning Accelerator as long as a release has calibrators: it takes
    FP16 and INT8 by the builder's flags there, and by types from 11.4.1 on. Source: TensorRT documentation of 8.6 and
    10.7, "Working with DLA", and of 11.4.1, "Strongly Typed Networks for DLA".
    """
    return options.implicit is not None or (options.tuning.dla is not None and versions.has_calibrators(trt))


def _check_dla(trt: Any, builder: Any, core: int | None) -> None:
    count = int(builder.num_DLA_cores) if core is not None else 0
    if core is None or core < count:
        return
    cores = f"the DLA cores {', '.join(map(str, range(count)))}" if count else "no DLA"
    raise EnvironmentProblem(
        f"{_name(trt)} finds {cores} on this device, not core {core}",
        remedy="give another --dla" if count else "leave --dla out",
    )


def _parse(trt: Any, logger: Any, network: Any, model: bytes) -> Any:
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model):
        return parser
    count = parser.num_errors
    first = versions.describe_parser_error(parser.get_error(0)) if count else first_error(logger)
    more = f" (and {count - 1} more errors)" if count > 1 else ""
    raise ArtefactError(
        f"{_name(trt)} cannot read the model: {first}{more}",
        remedy="export it again: edge-dsc export RUN, or choose another --backend",
    )


def _serialize(
    trt: Any, logger: Any, builder: Any, network: Any, options: BuildOptions, interrupts: Sequence[int]
) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """Build; returns the serialised engine, what is to be said of it, and the layers that DLA leaves to the GPU."""
    implicit = options.implicit
    with contextlib.nullcontext() if implicit is None else implicit.calibrator(trt) as calibrator:
        config = builder.create_builder_config()
        if config is None:
            raise _cannot_build(trt, logger, "no builder config")
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
        # The inspector reports nothing without it.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        versions.set_precision(trt, config, options.precision, weak=_is_weak(trt, options))
        versions.share_profile(trt, config)
        versions.allow_capture(trt, config)
        versions.tune(trt, config, options.tuning)
        timings = None
        if options.timing_cache is not None and versions.keeps_timings(trt):
            timings = TimingCache(trt, config, options.timing_cache)
        gpu_layers = _place_layers(trt, config, network, options.tuning.dla)
        tensor = network.get_input(0)
        _add_profiles(trt, logger, builder, config, tensor, options.batch)
        if calibrator is not None:
            size = calibrator.get_batch_size()
            profile = _make_profile(trt, logger, builder, tensor, BatchRange(size, size, size))
            versions.calibrate(trt, config, calibrator, profile)
        monitor = versions.attach_monitor(trt, config, options.progress, interrupts)
        data = builder.build_serialized_network(network, config)
        failure = monitor.failure if monitor is not None else None
        notes = () if data is None or timings is None else timings.save(config)
        del config  # it holds monitor and calibrator by bare pointers, so it goes first
        if failure is not None:
            raise failure
        if data is None:
            raise _cannot_build(trt, logger, "no engine")
        return data, notes, gpu_layers


def _place_layers(trt: Any, config: Any, network: Any, core: int | None) -> tuple[str, ...]:
    """Put the network on a core of the Deep Learning Accelerator; return the layers that stay on the GPU.

    With the fallback allowed TensorRT says nothing of them.

    Raises:
        EnvironmentProblem: All layers with weights are among them.
    """
    if core is None:
        return ()
    versions.place_on_dla(trt, config, core)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    left = [
        layer for layer in layers if layer.type != trt.LayerType.CONSTANT and not config.can_run_on_DLA(layer)
    ]
    names = tuple(str(layer.name) for layer in left)
    if {str(layer.name) for layer in census.weighted_layers(trt, network)} <= set(names):
        raise EnvironmentProblem(
            f"DLA core {core} runs no layer with weights of this network in this precision",
            remedy="leave --dla out; --verbose shows what TensorRT says of each layer",
        )
    return names


def _add_profiles(trt: Any, logger: Any, builder: Any, config: Any, tensor: Any, batch: BatchRange) -> None:
    """Give the engine its range of batches; a single image, of a camera say, gets kernels chosen for it alone."""
    ranges = [batch, BatchRange()] if batch.smallest == 1 < batch.largest else [batch]
    for sizes in ranges:
        if config.add_optimization_profile(_make_profile(trt, logger, builder, tensor, sizes)) < 0:
            raise _cannot_build(
                trt, logger, f"batch {sizes} is refused for {tensor.name} {tuple(tensor.shape)}"
            )


def _make_profile(trt: Any, logger: Any, builder: Any, tensor: Any, sizes: BatchRange) -> Any:
    profile = builder.create_optimization_profile()
    if profile is None:
        raise _cannot_build(trt, logger, "no optimization profile")
    image = tuple(tensor.shape)[1:]
    profile.set_shape(tensor.name, *[(size, *image) for size in (sizes.smallest, sizes.best, sizes.largest)])
    return profile


def _prove(plan: Plan, found: census.Inspection, options: BuildOptions) -> Plan:
    """Hold the built engine against the precision asked for.

    The types of the parsed network bind the builder: strongly typed networks by their nature, weakly typed ones by
    the precision that was set for each layer. The inspector's word replaces them wherever it has one. Of implicit INT8
    it alone is believed: no tensor of that network is INT8.
    """
    seen = census.engine_layer_types(found.report, plan.layer_types)
    # What DLA runs is one layer to the inspector: there the precision that was set, and obeyed, is the proof.
    on_dla = plan.layer_types.keys() - set(plan.gpu_layers) if options.tuning.dla is not None else set[str]()
    unseen = {} if options.implicit is None else dict.fromkeys(plan.layer_types.keys() - on_dla, _UNKNOWN)
    types = {**plan.layer_types, **unseen, **seen}
    check_precision(Counter(types.values()), options)
    source = census.INSPECTOR
    notes = (
        *plan.notes,
        f"each batch in flight takes up to {found.memory_bytes / (1 << 20):.1f} MiB of device memory, by its size,"
        f" beside the {len(memoryview(plan.data)) / (1 << 20):.1f} MiB of the engine",
    )
    if not seen:
        source = census.NETWORK
        notes = (*notes, "the engine inspector does not tell the precision of any layer with weights")
    elif len(seen) < len(types):
        source = f"{census.INSPECTOR} for {len(seen)} of {len(types)} layers, else {census.NETWORK}"
    return replace(plan, layers=Counter(types.values()), layers_source=source, notes=notes, layer_types=types)


def _name(trt: Any) -> str:
    return f"{trt.__name__} {trt.__version__}"


def _cannot_build(trt: Any, logger: Any, default: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{_name(trt)} cannot build: {first_error(logger, default)}",
        remedy="see edge-dsc doctor, or choose another --backend",
    )
