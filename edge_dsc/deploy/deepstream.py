"""DeepStream: nvinfer's configuration for a model, and the model with the input that nvinfer can give it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from calibration.table import check_table, load_table
from calibration.tensorrt import encode_scale, tensor_scales, write_cache
from edge_dsc.deploy.triton import replaced_folder
from engines.contract import ModelContract
from engines.cpu.ort import open_session
from engines.errors import ArtefactError, UsageError
from engines.files import read_regular
from engines.graph import OnnxModel, load_model
from engines.record import EngineRecord, Precision, load_record

CONFIG = "config_infer.txt"
_MODEL, _LABELS, _CACHE = "model.onnx", "labels.txt", "calibration.cache"
_FIRST_LINE = "# Made by edge-dsc deploy deepstream"
_INPUT = "frames"  # of the changed model, unless its graph has a tensor of that name
_MODES = {Precision.FP32: 0, Precision.INT8: 1, Precision.FP16: 2}  # nvinfer's network-mode
_RGB, _GREY = 0, 2  # nvinfer's model-color-format
_AGAIN = "export it again: edge-dsc export RUN"
# Where a pipeline cannot be equal to infer, whatever is configured.
LIMITS = (
    "resize: nvinfer scales in one step with a filter of its own; infer halves by means of 2x2, then by area",
    "decoder: a pipeline's pictures come as NV12 of a video; infer decodes files to all 256 grey values",
    "input: nvinfer gives float32, so this model takes that instead of uint8: the same values, four times the bytes",
    "confidence: probabilities are the graph's own; infer applies the model's temperature to them",
    "files: no DICOM, no 16-bit pictures, no EXIF orientation",
)


@dataclass(frozen=True)
class DeepStreamFolder:
    """What was written.

    Attributes:
        out: The folder.
        network_mode: nvinfer's number for the precision.
        limits: Where the pipeline cannot be equal to ``infer``.
    """

    out: Path
    network_mode: int
    limits: tuple[str, ...] = LIMITS


def write_deepstream(engine: Path, out: Path, *, tensorrt: str = "10.3.0") -> DeepStreamFolder:
    """Write a folder that ``nvinfer`` runs: configuration, model, labels and, for INT8, a calibration cache.

    nvinfer builds its own engine from the model. It computes ``y = net-scale-factor * (x - offset)`` in float32 for
    each channel; the model's own scale is inside its weights, so the factor is 1 and the offsets are 0. The model is
    proven here to answer such an input bit for bit as the engine's model answers ``uint8``.

    Args:
        engine: An engine; its record names model, precision and calibration table.
        out: New, empty, or written by this before.
        tensorrt: The release of TensorRT that the pipeline has, for the calibration cache.

    Raises:
        ArtefactError: Engine, model or table is refused.
        UsageError: Mixed precision, a table that no cache can hold, or a folder that holds something else.

    Source: DeepStream Plugin Guide, Gst-nvinfer: the pre-processing function and the keys of ``[property]``.
    """
    record = load_record(engine)
    if record.precision not in _MODES:
        raise UsageError(
            f"nvinfer knows no {record.precision.value} precision", remedy="build an engine in fp16 or int8"
        )
    model = load_model(engine.parent / record.onnx)
    if model.sha256 != record.onnx_sha256:
        raise ArtefactError(
            f"{model.path} changed after the build", remedy=f"rebuild it: {record.build_command}"
        )
    taken = take_planar_floats(model)
    _prove_equal(model, taken)
    cache = _cache(engine, record, model, taken, tensorrt) if record.precision is Precision.INT8 else None
    with replaced_folder(out, _our_names) as folder:
        (folder / _MODEL).write_bytes(taken.SerializeToString(deterministic=True))
        (folder / _LABELS).write_text(
            ";".join(_label(name) for name in model.contract.labels) + "\n", encoding="utf-8"
        )
        if cache is not None:
            (folder / _CACHE).write_text(cache)
        (folder / CONFIG).write_text(_config(record, model.contract), encoding="utf-8")
    return DeepStreamFolder(out, _MODES[record.precision])


def take_planar_floats(model: OnnxModel) -> onnx.ModelProto:
    """Return a model with the input ``float32 [N, channels, height, width]`` of whole values 0..255.

    Raises:
        ArtefactError: Something else than a cast takes the model's input.
    """
    taken = onnx.ModelProto()
    taken.CopyFrom(model.proto)
    graph, contract = taken.graph, model.contract
    users = [node for node in graph.node if contract.input_name in node.input]
    if not users or any(node.op_type != "Cast" for node in users):
        raise ArtefactError(f"the first node of {model.path} is no Cast", remedy=_AGAIN)
    shape = [graph.input[0].type.tensor_type.shape.dim[0].dim_param or "N", contract.channels]
    used = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    candidates = itertools.chain([_INPUT], (f"{_INPUT}{number}" for number in itertools.count(2)))
    name = next(candidate for candidate in candidates if candidate not in used)
    planar = helper.make_tensor_value_info(name, TensorProto.FLOAT, [*shape, contract.height, contract.width])
    graph.input[0].CopyFrom(planar)
    order = [0, 2, 3, 1] if contract.layout == "NHWC" else [0, 1, 2, 3]
    turn = helper.make_node("Transpose", [name], [contract.input_name], name=name, perm=order)
    graph.node.insert(0, turn)
    del taken.metadata_props[:]  # its contract says uint8, and is not this input's
    onnx.checker.check_model(taken)
    return taken


def _prove_equal(model: OnnxModel, taken: onnx.ModelProto) -> None:
    """Hold the changed model against the model on noise, bit for bit.

    Raises:
        ArtefactError: An answer differs.
    """
    contract = model.contract
    grey = np.random.default_rng(0).integers(0, 256, (4, *contract.input_shape), np.uint8)
    planes = grey if contract.layout == "NCHW" else np.moveaxis(grey, -1, 1)
    floats = np.ascontiguousarray(planes.astype(np.float32))
    answers = []
    for proto, feed in (
        (model.proto, {contract.input_name: grey}),
        (taken, {taken.graph.input[0].name: floats}),
    ):
        session = open_session(proto.SerializeToString(), str(model.path), threads=1, remedy=_AGAIN)
        answers.append(session.run([contract.output_name], feed)[0])
    if answers[0].tobytes() != answers[1].tobytes():
        raise ArtefactError(f"{model.path} answers floats otherwise than uint8", remedy=_AGAIN)


def _cache(
    engine: Path, record: EngineRecord, model: OnnxModel, taken: onnx.ModelProto, tensorrt: str
) -> str:
    """Return TensorRT's text cache of the engine's table, with lines for what was put in front."""
    path = engine.parent / (record.calibration or "calibration.json")
    table = load_table(path)
    check_table(table, model, path=path)
    text = write_cache(table, model.proto, tensorrt)
    scales = tensor_scales(table, model.proto)
    cast = next(node for node in model.proto.graph.node if model.contract.input_name in node.input)
    scale = scales.get(cast.output[0], scales.get(model.contract.input_name, 255 / 127))
    front = (taken.graph.input[0].name, model.contract.input_name, cast.output[0])
    added = [name for name in front if name not in scales]
    return text + "".join(f"{name}: {encode_scale(scale)}\n" for name in added)


def _label(name: str) -> str:
    """Return a class name as one of a line that semicolons divide."""
    if ";" in name:
        raise UsageError(
            f"the class {name!r} holds a semicolon, which divides nvinfer's labels", remedy="rename it"
        )
    return name


def settings(record: EngineRecord, contract: ModelContract) -> Mapping[str, object]:
    """Return the keys of nvinfer's ``[property]`` that the contract and the record decide."""
    colour = contract.channels == 3
    int8 = {"int8-calib-file": _CACHE} if record.precision is Precision.INT8 else {}
    return {
        "onnx-file": _MODEL,
        "labelfile-path": _LABELS,
        **int8,
        "batch-size": record.batch.best,
        "network-mode": _MODES[record.precision],
        "network-type": 1,  # a classifier
        "process-mode": 1,  # whole frames
        "infer-dims": f"{contract.channels};{contract.height};{contract.width}",
        "network-input-order": 0,  # NCHW
        "model-color-format": _RGB if colour else _GREY,
        "net-scale-factor": 1,
        "offsets": ";".join(["0"] * contract.channels),
        "maintain-aspect-ratio": 0,  # the contract stretches; no border is added
        "output-blob-names": contract.output_name,
        "classifier-threshold": 0,
    }


def _config(record: EngineRecord, contract: ModelContract) -> str:
    lines = [f"{_FIRST_LINE}: {record.precision.value} of {contract.architecture}."]
    lines += ["# y = net-scale-factor * (x - offset) is the model's input. Not equal to edge-dsc infer:"]
    lines += [f"# - {limit}" for limit in LIMITS]
    lines += ["[property]", *(f"{name}={value}" for name, value in settings(record, contract).items())]
    return "\n".join(lines) + "\n"


def _our_names(folder: Path) -> set[str]:
    try:
        ours = read_regular(folder / CONFIG).decode(errors="replace").startswith(_FIRST_LINE)
    except OSError:
        ours = False
    if not ours:
        raise ArtefactError(
            f"there is no {CONFIG} of ours in {folder}", remedy="choose another folder with --out"
        )
    # nvinfer writes the engine that it builds beside the model.
    return {CONFIG, _MODEL, _LABELS, _CACHE, *(path.name for path in folder.glob(f"{_MODEL}_b*.engine"))}
