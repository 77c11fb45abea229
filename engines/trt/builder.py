"""From ONNX bytes to a serialised TensorRT engine, with every answer of TensorRT checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from engines.errors import ArtefactError, EnvironmentProblem
from engines.record import Precision
from engines.runtimes import BuildOptions, check_precision
from engines.trt import census, versions
from engines.trt.faults import first_error, process_logger

_TF32_NOTE = "TF32 is off: FP32 layers keep all 23 bits of their mantissa"


@dataclass(frozen=True)
class Plan:
    """A serialised engine and what was found out about it.

    Attributes:
        data: The engine: a buffer.
        layers: Layers with weights counted by precision.
        layers_source: Where that count comes from.
        notes: Warnings for the reader.
        layer_types: The same by the layers' names; empty where the names are not known.
    """

    data: Any
    layers: dict[str, int]
    layers_source: str
    notes: tuple[str, ...]
    layer_types: dict[str, str] = field(default_factory=dict)


def build_plan(trt: Any, model: bytes, options: BuildOptions, *, has_gpu: bool) -> Plan:
    """Parse a model that is already in the wanted precision and build an engine.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        model: The serialised ONNX model.
        options: What is asked for.
        has_gpu: Whether the engine can be loaded here, to inspect it.

    Raises:
        AccuracyGateError: Its layers would not run in the precision asked for.
        ArtefactError: TensorRT cannot read the model.
        EnvironmentProblem: TensorRT cannot build here.
    """
    logger = process_logger(trt)
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as error:  # pybind11's answer to a null pointer
        raise _cannot_build(trt, logger, str(error)) from error
    network = builder.create_network(versions.network_flags(trt))
    if network is None:
        raise _cannot_build(trt, logger, "no network")
    parser = _parse(trt, logger, network, model)
    named = census.network_layer_types(trt, network)
    layers = census.count_types(named)
    if versions.is_strongly_typed(trt):
        check_precision(layers, options)
    data = _serialize(trt, logger, builder, network, options)
    del parser  # it owns the weights until the builder has run
    notes = (_TF32_NOTE,) if options.precision is Precision.FP32 else ()
    plan = Plan(data, layers, census.NETWORK, notes, dict(named))
    return _prove(trt, logger, plan, options, has_gpu=has_gpu)


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


def _serialize(trt: Any, logger: Any, builder: Any, network: Any, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    if config is None:
        raise _cannot_build(trt, logger, "no builder config")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector reports nothing without it
    versions.set_precision(trt, config, options.precision)
    versions.share_profile(trt, config)
    profile = builder.create_optimization_profile()
    if profile is None:
        raise _cannot_build(trt, logger, "no optimization profile")
    tensor, batch = network.get_input(0), options.batch
    shapes = [(size, *tuple(tensor.shape)[1:]) for size in (batch.smallest, batch.best, batch.largest)]
    profile.set_shape(tensor.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise _cannot_build(trt, logger, f"batch {batch} is refused for {tensor.name} {tuple(tensor.shape)}")
    monitor = versions.attach_monitor(trt, config, options.progress)
    plan = builder.build_serialized_network(network, config)
    failure = monitor.failure if monitor is not None else None
    del config  # it holds the monitor by a bare pointer, so it goes first
    if failure is not None:
        raise failure
    if plan is None:
        raise _cannot_build(trt, logger, "no engine")
    return plan


def _prove(trt: Any, logger: Any, plan: Plan, options: BuildOptions, *, has_gpu: bool) -> Plan:
    """Hold the built engine against the precision asked for.

    A strongly typed network proves it by its types; the inspector's count replaces that where it names the type
    of every layer. A weakly typed builder was free to choose, so only the inspector's count stands.
    """
    report = census.inspect_plan(trt, logger, plan.data) if has_gpu else None
    seen = census.count_engine_layers(report) if report is not None else {}
    complete = sum(seen.values()) == sum(plan.layers.values()) and census.UNKNOWN not in seen
    if complete or not versions.is_strongly_typed(trt):
        check_precision(seen, options)
        named = census.engine_layer_types(report or "", plan.layer_types)
        # A name that the inspector does not give leaves the layers without names: the count still holds.
        named = named if len(named) == len(plan.layer_types) else {}
        return Plan(plan.data, seen, census.INSPECTOR, plan.notes, named)
    if report is None:
        return plan
    words = ", ".join(f"{count} in {name}" for name, count in sorted(seen.items())) or "none"
    note = f"the engine inspector names these layers with weights after fusion: {words}"
    return replace(plan, notes=(*plan.notes, note))


def _name(trt: Any) -> str:
    return f"{trt.__name__} {trt.__version__}"


def _cannot_build(trt: Any, logger: Any, default: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{_name(trt)} cannot build: {first_error(logger, default)}",
        remedy="see edge-dsc doctor, or choose another --backend",
    )
