"""What INT8 does in each layer: at its output, at the logits, in decisions, in time."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.chain import Chain, Grid, quantized_chain
from calibration.mixed import squared_error
from calibration.table import CalibrationTable
from engines.errors import BadInputError, EnvironmentProblem
from engines.packages import load
from engines.runtimes import Progress

Model = Any  # onnx.ModelProto
Array = Any

RUNS = 30
_WEIGHTED = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
    | {"QGemm", "QLinearMatMul", "MatMulInteger", "ConvInteger"}
)


def time_layers(model: Model, layers: Sequence[str], pixels: Array) -> dict[str, float]:
    """Return the median time of each layer for one image on one thread, ms.

    ONNX Runtime renames what it fuses, but runs a chain in its order: the n-th node with weights of a run is
    the n-th layer. A layer's time holds what was fused into it, and not what stays beside it.

    Args:
        model: A graph in FP32, or unsigned INT8.
        layers: Names of all its layers with weights, in order.
        pixels: ``uint8 [N, height, width, 1]``; its first image is run :data:`RUNS` times.

    Returns:
        ``{layer: ms}``; empty where ONNX Runtime fused layers with one another, so that they cannot be told apart.

    Raises:
        EnvironmentProblem: No place for the profile.
    """
    ort = load("onnxruntime")
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = ort.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            session = ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                # It would turn float layers between two pairs back into INT8.
                disabled_optimizers=["WeightBiasQuantization"],
            )
            for _ in range(RUNS + 1):
                session.run(None, {model.graph.input[0].name: pixels[:1]})
            events = json.loads(Path(session.end_profiling()).read_text())
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write a profile: {error}", remedy="set TMPDIR to a place with some space"
        ) from error
    return _by_layer(events, layers)


def _by_layer(events: list[dict[str, Any]], layers: Sequence[str]) -> dict[str, float]:
    kernels = [
        event
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith("_kernel_time")
        and event["args"].get("op_name") in _WEIGHTED
    ]
    kernels.sort(key=lambda event: event["ts"])
    count = len(layers)
    if len(kernels) != count * (RUNS + 1):
        return {}
    warm = kernels[count:]
    return {
        name: statistics.median(event["dur"] for event in warm[index::count]) / 1000
        for index, name in enumerate(layers)
    }


_CHUNK = 16  # images


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What happens when one layer alone runs in INT8, or alone does not.

    Attributes:
        name: Name of the layer.
        op: ``Conv``, ``MatMul`` or ``Gemm``.
        depthwise: Whether it is a depthwise convolution, where INT8 seldom pays.
        output_error: Alone in INT8: root mean square error of what the next layer gets (behind bias, ReLU and
            pooling), relative to that tensor's root mean square.
        logit_error: Alone in INT8: mean squared error of the centred logits, summed over the classes.
        flips: Alone in INT8: images whose top class changes.
        logit_error_without: All others in INT8 and this one in float: the same error.
        flips_without: All others in INT8 and this one in float: images whose top class changes.
        time_ms: Its own time for one image by precision, such as ``{"FP32": 0.05, "INT8": 0.09}``, where a
            runtime told; empty elsewhere.
    """

    name: str
    op: str
    depthwise: bool
    output_error: float
    logit_error: float
    flips: int
    logit_error_without: float
    flips_without: int
    time_ms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The sensitivity of all layers of a network.

    Attributes:
        layers: One entry for each layer that INT8 is meant for, in the order of the graph.
        logit_error: All of them in INT8: mean squared error of the centred logits, summed over the classes.
        flips: All of them in INT8: images whose top class changes.
        images: Images that this was measured on.
        signed: On the signed grid of TensorRT, or the unsigned one of onnxruntime.
    """

    layers: tuple[LayerSensitivity, ...]
    logit_error: float
    flips: int
    images: int
    signed: bool

    @property
    def worst(self) -> LayerSensitivity:
        """The layer whose return to float would help most."""
        return min(self.layers, key=lambda layer: (layer.logit_error_without, layer.name))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "images": self.images,
            "signed": self.signed,
            "logit_error": self.logit_error,
            "flips": self.flips,
            "layers": [{**asdict(layer), "time_ms": dict(layer.time_ms)} for layer in self.layers],
        }


def measure_sensitivity(
    model: Model,
    table: CalibrationTable,
    pixels: Array,
    *,
    signed: bool,
    times: Mapping[str, Mapping[str, float]] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Run each layer alone in INT8, and each alone in float, and compare with the float network.

    Args:
        model: The deployed FP32 graph.
        table: Its calibration table.
        pixels: ``uint8 [N, height, width, 1]``.
        signed: Which kind of INT8 graph.
        times: For each layer, its time by precision in ms, where a runtime told.
        progress: Called with (phase, images done, images in all).

    Raises:
        BadInputError: No images.
    """
    if len(pixels) == 0:
        raise BadInputError("no images to measure sensitivity on", remedy="give a folder of real X-rays")
    chain, grids = quantized_chain(model, table, signed=signed)
    count = len(chain.layers) - 1
    tallies = [_Tally() for _ in range(count)]
    whole = _Tally()
    for start in range(0, len(pixels), _CHUNK):
        _measure_batch(chain, grids, pixels[start : start + _CHUNK], tallies, whole)
        if progress is not None:
            progress("sensitivity", min(start + _CHUNK, len(pixels)), len(pixels))
    layers = tuple(
        LayerSensitivity(
            name=layer.name,
            op=layer.op,
            depthwise=layer.depthwise,
            output_error=(tally.output / tally.power) ** 0.5 if tally.power else 0.0,
            logit_error=tally.alone / len(pixels),
            flips=tally.flips,
            logit_error_without=tally.without / len(pixels),
            flips_without=tally.flips_without,
            time_ms=(times or {}).get(layer.name, {}),
        )
        for layer, tally in zip(chain.layers[:-1], tallies, strict=True)
    )
    return Sensitivity(
        layers=layers,
        logit_error=whole.alone / len(pixels),
        flips=whole.flips,
        images=len(pixels),
        signed=signed,
    )


@dataclass
class _Tally:
    output: float = 0.0
    power: float = 0.0
    alone: float = 0.0
    flips: int = 0
    without: float = 0.0
    flips_without: int = 0


def _measure_batch(
    chain: Chain, grids: list[Grid], pixels: Array, tallies: list[_Tally], whole: _Tally
) -> None:
    last = len(chain.layers) - 1
    floats = [chain.start(pixels)]
    for index in range(last + 1):
        floats.append(chain.step(index, floats[-1], None, int8=False))
    reference = floats[-1]
    rounded = floats[0]
    for index, tally in enumerate(tallies):
        alone = chain.step(index, floats[index], grids[index], int8=True)
        expected = floats[index + 1]
        tally.output += float(np.square(alone - expected, dtype=np.float64).sum())
        tally.power += float(np.square(expected, dtype=np.float64).sum())
        logits = chain.finish(index + 1, alone)
        tally.alone += squared_error(reference, logits)
        tally.flips += _changed(reference, logits)
        grid = chain.input_grid(index, grids, int8=False)
        logits = _finish_int8(chain, grids, index + 1, chain.step(index, rounded, grid, int8=False))
        tally.without += squared_error(reference, logits)
        tally.flips_without += _changed(reference, logits)
        rounded = chain.step(index, rounded, grids[index], int8=True)
    logits = _finish_int8(chain, grids, last, rounded)
    whole.alone += squared_error(reference, logits)
    whole.flips += _changed(reference, logits)


def _finish_int8(chain: Chain, grids: list[Grid], index: int, values: Array) -> Array:
    for place in range(index, len(chain.layers)):
        int8 = not chain.layers[place].last
        values = chain.step(place, values, chain.input_grid(place, grids, int8=int8), int8=int8)
    return values


def _changed(reference: Array, logits: Array) -> int:
    return int((reference.argmax(axis=1) != logits.argmax(axis=1)).sum())
