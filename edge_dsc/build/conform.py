"""Any image classifier as a deployed graph: one input of raw pixels, one output of probabilities, any batch.

What comes in is a float32 ONNX graph of whatever exporter: channels first or last, one channel or three, fixed batch or
dynamic, logits or probabilities. ONNX Runtime's own optimiser folds constants and shapes; the rest is done here, each
step for one of these differences, and :mod:`edge_dsc.build.front` folds the preparation of the pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from edge_dsc.build.deployed import IR_VERSION, OPSET
from edge_dsc.build.front import Front, drop_unused, fold_front, fresh_name, store_constant
from engines.contract import ModelContract
from engines.cpu.ort import simplify_graph
from engines.errors import ArtefactError, BadInputError
from engines.text_table import printable

OPSETS = range(13, 21)  # what calibration.qdq makes INT8 graphs for; another one is converted
LOGITS, PROBABILITIES = "logits", "probabilities"
# What may stand behind the operator that gives the answers.
_BEHIND = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze"})
_WHAT_IT_GIVES = {"Softmax": PROBABILITIES}
_ONNX = ("", "ai.onnx")
_LONGEST_NAME = 120
_NO_CLASSES = frozenset({"Sigmoid", "HardSigmoid"})  # each output an answer of its own


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What becomes of a pixel 0..255 before a network sees it: ``(pixel * scale - mean) / std``.

    Attributes:
        scale: Such as 1/255.
        mean: One number, or one for each channel of the network.
        std: Likewise, none of them zero.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def apply(self, pixels: NDArray[np.uint8], channels: int) -> NDArray[np.float32]:
        """Return ``float32 [N, H, W, channels]`` for ``uint8 [N, H, W, 1]``, repeated, or ``[N, H, W, channels]``."""
        wide = np.broadcast_to(pixels, (*pixels.shape[:3], channels)).astype(np.float64)
        found: NDArray[np.float64] = (wide * self.scale - np.array(self.mean)) / np.array(self.std)
        return found.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class SourceGraph:
    """What a foreign classifier takes and gives, as far as its graph says.

    Attributes:
        input_name: Its one input, float32.
        output_name: Its one output, float32.
        channels_first: NCHW, or NHWC.
        channels: 1 or 3.
        height: None where it is dynamic.
        width: Likewise.
        batch: None where it is dynamic.
        classes: How many answers it gives for an image; None where the graph does not say. One answer is the
            probability of the second of two classes.
        gives: :data:`LOGITS` or :data:`PROBABILITIES`; None where each output is an answer of its own (Sigmoid).
    """

    input_name: str
    output_name: str
    channels_first: bool
    channels: int
    height: int | None
    width: int | None
    batch: int | None
    classes: int | None
    gives: str | None


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A deployed graph.

    Attributes:
        proto: The graph, checked, with the contract in its metadata.
        front: What became of the preparation of the pixels.
    """

    proto: ModelProto
    front: Front


def describe_source(model: ModelProto) -> SourceGraph:
    """Say what a classifier takes and gives.

    Raises:
        BadInputError: Not one input of images and one output, or with a type or a shape that no classifier has.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    for what, values in (("inputs", inputs), ("outputs", model.graph.output)):
        if len(values) != 1:
            names = ", ".join(value.name for value in values) or "none"
            raise BadInputError(
                f"the model has {len(values)} {what}: {names}",
                remedy="export it with one input and one output",
            )
        if values[0].type.tensor_type.elem_type != TensorProto.FLOAT:
            kind = TensorProto.DataType.Name(values[0].type.tensor_type.elem_type).lower()
            raise BadInputError(
                f"{values[0].name} among the {what} is {kind}, not float32", remedy="export it in float32"
            )
    shape, answers = _dims(inputs[0]), _dims(_inferred_output(model))
    if len(shape) != 4:
        raise BadInputError(
            f"the input {inputs[0].name} has the shape {_shown(shape)}",
            remedy="export it for images: four axes",
        )
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        raise BadInputError(
            f"the input {inputs[0].name} has the shape {_shown(shape)}: no axis of one or three channels is certain",
            remedy="export it as [N, C, H, W] or [N, H, W, C] with C 1 or 3",
        )
    height, width = (shape[2], shape[3]) if first else (shape[1], shape[2])
    classes = answers[1] if len(answers) > 1 else None
    if len(answers) < 2 or any(length not in (1, None) for length in answers[2:]):
        raise BadInputError(
            f"the output {model.graph.output[0].name} has the shape {_shown(answers)}",
            remedy="a classifier gives [N, classes]; export the part that does",
        )
    return SourceGraph(
        input_name=inputs[0].name,
        output_name=model.graph.output[0].name,
        channels_first=first,
        channels=(shape[1] if first else shape[3]) or 1,
        height=height,
        width=width,
        batch=shape[0],
        classes=classes,
        gives=_gives(model),
    )


def _dims(value: ValueInfoProto) -> list[int | None]:
    # An open one has a name, nothing, or from some exporters -1.
    return [dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim]


def _shown(shape: list[int | None]) -> str:
    return f"[{', '.join('?' if length is None else str(length) for length in shape)}]"


def _inferred_output(model: ModelProto) -> ValueInfoProto:
    """Return the output as shape inference sees it: some exporters leave its shape out."""
    inferred: ValueInfoProto = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0]
    return inferred


def _gives(model: ModelProto) -> str | None:
    """Say what the outputs are, by the last operator that computes."""
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(model.graph.output[0].name)
    while node is not None and node.op_type in _BEHIND:
        node = producers.get(node.input[0])
    if node is not None and node.op_type in _NO_CLASSES:
        return None
    # The softmax of log-probabilities is the probabilities: LogSoftmax needs no case of its own.
    return _WHAT_IT_GIVES.get(node.op_type if node is not None else "", LOGITS)


def deploy_any(
    model: ModelProto,
    contract: ModelContract,
    normalisation: Normalisation | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    gives: str | None = None,
) -> Deployed:
    """Make the deployed graph of any image classifier.

    Args:
        model: A float32 classifier with one input and one output, such as tf2onnx or PyTorch exports it; it is not
            changed.
        contract: Of the graph to be made; its size is the network's, its colour what the network will be fed with. A
            network of three channels under a grey contract sees the grey picture in all three.
        normalisation: What the network wants beyond what its own graph does; None feeds it pixels 0..255.
        metadata: More metadata properties.
        gives: :data:`LOGITS` or :data:`PROBABILITIES`; None looks at the last operator.

    Returns:
        A checked model: ``uint8 [N, H, W, C]`` in, Cast first, ``float32 [N, classes]`` probabilities out; every node
        with a name of its own. Equal to the original up to rounding: compare them.

    Raises:
        BadInputError: The graph is none of an image classifier, or does not fit the contract.
        ArtefactError: ONNX Runtime cannot run it.
    """
    work = ModelProto()
    work.CopyFrom(model)
    _to_opset(work)
    source = describe_source(work)
    _check_fit(source, contract)
    _store_constants(work)
    _free_batch(work, source, contract)
    work = _simplified(work)
    _rename_clashes(work, contract)
    source = describe_source(work)
    _attach_pixels(work, source, contract, normalisation or Normalisation())
    _attach_probabilities(work, source, contract, gives or source.gives or LOGITS)
    work, front = fold_front(work)
    _finish(work, contract, dict(metadata or {}))
    return Deployed(proto=work, front=front)


def _to_opset(model: ModelProto) -> None:
    """Bring a graph, in place, to an opset that INT8 graphs are made for."""
    found = next((entry.version for entry in model.opset_import if entry.domain in _ONNX), 0)
    if found in OPSETS:
        return
    try:
        converted = onnx.version_converter.convert_version(model, OPSET)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInputError(
            f"the model's opset {found} cannot be brought to {OPSET}: {reason}",
            remedy=f"export it with an opset from {OPSETS.start} to {OPSETS.stop - 1}",
        ) from error
    model.CopyFrom(converted)


def check_labels(outputs: int | None, labels: int) -> None:
    """Refuse labels that do not fit a network's outputs; one output is the probability of the second of two classes.

    Raises:
        BadInputError: Their numbers differ.
    """
    if outputs is not None and labels != (2 if outputs == 1 else outputs):
        raise BadInputError(
            f"the network has {outputs} output{'s' if outputs > 1 else ''}, and there are {labels} labels",
            remedy="name one label for each output, in their order"
            if outputs > 1
            else "name two labels, the one that it answers last",
        )


def _check_fit(source: SourceGraph, contract: ModelContract) -> None:
    for side, seen, wanted in (
        ("height", source.height, contract.height),
        ("width", source.width, contract.width),
    ):
        if seen not in (None, wanted):
            raise BadInputError(
                f"the network's {side} is {seen}, not {wanted}", remedy=f"give its own size: {seen}"
            )
    if contract.channels > source.channels:
        raise BadInputError("the network takes one grey channel, not colour", remedy="use --colour grey")
    check_labels(source.classes, len(contract.labels))


def _store_constants(model: ModelProto) -> None:
    """Turn Constant nodes into stored tensors, in place."""
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        (entry,) = node.attribute
        value = onnx.helper.get_attribute_value(entry)
        if entry.name == "value":
            value = onnx.numpy_helper.to_array(value)
        elif entry.name in ("value_float", "value_floats"):
            value = np.array(value, np.float32)
        elif entry.name in ("value_int", "value_ints"):
            value = np.array(value, np.int64)
        else:  # strings, which no classifier computes with
            continue
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
        model.graph.node.remove(node)


def _free_batch(model: ModelProto, source: SourceGraph, contract: ModelContract) -> None:
    """Make the batch dynamic and all else static, in place: ends, and the Reshapes that repeat a fixed batch."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    first = {
        value.name: value.type.tensor_type.shape.dim[0].dim_value
        for value in (*inferred.value_info, *inferred.input)
        if value.type.tensor_type.shape.dim
    }
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node if source.batch else ():
        if node.op_type != "Reshape" or node.input[1] not in stored:
            continue
        shape = onnx.numpy_helper.to_array(stored[node.input[1]]).copy()
        if first.get(node.input[0]) == source.batch and shape.size and shape[0] == source.batch:
            shape[0] = 0  # as it comes
            node.input[1] = store_constant(model, f"{node.output[0]}.shape", shape)
    del model.graph.value_info[:]
    sides = [contract.height, contract.width]
    sides = [source.channels, *sides] if source.channels_first else [*sides, source.channels]
    image = next(value for value in model.graph.input if value.name == source.input_name)
    image.CopyFrom(onnx.helper.make_tensor_value_info(image.name, TensorProto.FLOAT, ["N", *sides]))
    for dim in model.graph.output[0].type.tensor_type.shape.dim[:1]:
        dim.dim_param = "N"


def _simplified(model: ModelProto) -> ModelProto:
    """Return the graph after ONNX Runtime's optimisations, with static Reshapes."""
    try:
        found = onnx.load_model_from_string(simplify_graph(model.SerializeToString()))
    except ArtefactError as error:
        raise BadInputError(error.what, remedy="export it again, for ONNX Runtime to run") from error
    if any(node.domain not in _ONNX for node in found.graph.node):
        found = model
    _make_reshapes_static(found)
    _turn_flattened_weights(found)
    drop_unused(found)
    return found


def _make_reshapes_static(model: ModelProto) -> None:
    """Replace shapes that a graph computes of its batch (tf2onnx's Flatten) by constants, in place."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: _dims(value) for value in (*inferred.value_info, *inferred.output)}
    stored = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] not in stored:
            batch, *rest = shapes.get(node.output[0]) or [None, None]
            if batch is None and None not in rest:
                static = np.array([-1, *(length or 0 for length in rest)], np.int64)
                node.input[1] = store_constant(model, f"{node.output[0]}.shape", static)


def _turn_flattened_weights(model: ModelProto) -> None:
    """Leave out, in place, the Transpose to channels last before Flatten: the dense layer's rows take its order."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: _dims(value) for value in (*inferred.value_info, *inferred.input)}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    takers = Counter(name for node in model.graph.node for name in node.input)
    for dense in model.graph.node:
        flat = makers.get(dense.input[0])
        turned = makers.get(flat.input[0]) if flat is not None and flat.op_type == "Reshape" else None
        if flat is None or turned is None or dense.op_type not in ("Gemm", "MatMul"):
            continue
        options = {
            entry.name: onnx.helper.get_attribute_value(entry)
            for entry in (*dense.attribute, *turned.attribute)
        }
        sides = (shapes.get(turned.input[0]) or [None])[1:]
        alone = takers[flat.output[0]] == takers[turned.output[0]] == 1
        if turned.op_type != "Transpose" or options.get("perm") != [0, 2, 3, 1] or options.get("transA"):
            continue
        if not alone or len(sides) != 3 or None in sides or dense.input[1] not in stored:
            continue
        weight = onnx.numpy_helper.to_array(stored[dense.input[1]])
        rows = weight.T if options.get("transB") else weight
        channels, height, width = (length or 0 for length in sides)
        if rows.shape[0] != channels * height * width:
            continue
        rows = rows.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(rows.shape)
        dense.input[1] = store_constant(
            model, f"{dense.input[1]}.turned", rows.T if options.get("transB") else rows
        )
        flat.input[0] = turned.input[0]


def _rename_clashes(model: ModelProto, contract: ModelContract) -> None:
    """Free the names of the contract's ends, in place."""
    for name in (contract.input_name, contract.output_name):
        taken = {value for node in model.graph.node for value in (*node.input, *node.output)}
        if name in taken:
            _rename(model, name, fresh_name(model, f"{name}.source"))


def _rename(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        if value.name == old:
            value.name = new


def _attach_pixels(
    model: ModelProto, source: SourceGraph, contract: ModelContract, normalisation: Normalisation
) -> None:
    """Put the way from raw pixels to the network's input before it, in place."""
    made: list[NodeProto] = []
    tensor = contract.input_name

    def add(op: str, name: str, *more: str, **attributes: Any) -> None:
        nonlocal tensor
        name = fresh_name(model, name)
        made.append(onnx.helper.make_node(op, [tensor, *more], [name], name=name, **attributes))
        tensor = name

    add("Cast", "pixels", to=TensorProto.FLOAT)
    if source.channels_first and contract.channels == 1:
        static = np.array([-1, 1, contract.height, contract.width], np.int64)
        add("Reshape", "planes", store_constant(model, "planes.shape", static))
    elif source.channels_first:
        add("Transpose", "channels_first", perm=[0, 3, 1, 2])
    axis = 1 if source.channels_first else 3
    if contract.channels < source.channels:
        add("Concat", "three_equal", tensor, tensor, axis=axis)
    std = np.array(normalisation.std)
    shape = (-1, 1, 1) if source.channels_first else (-1,)
    factor, shift = (normalisation.scale / std), (-np.array(normalisation.mean) / std)
    for op, name, values, idle in (("Mul", "scaled", factor, 1.0), ("Add", "normalised", shift, 0.0)):
        if np.any(values != idle):
            add(op, name, store_constant(model, f"{name}.by", values.astype(np.float32).reshape(shape)))
    made[-1].output[0] = source.input_name
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in (*made, *model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.input[:]
    pixels: list[str | int | None] = ["N", *contract.input_shape]
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(contract.input_name, TensorProto.UINT8, pixels)
    )


def _attach_probabilities(
    model: ModelProto, source: SourceGraph, contract: ModelContract, gives: str
) -> None:
    """Make ``float32 [N, classes]`` probabilities of what the network gives, in place."""
    tensor, columns, last = source.output_name, source.classes or len(contract.labels), contract.output_name

    def add(op: str, name: str, *inputs: str, **attributes: Any) -> str:
        name = name if name == last else fresh_name(model, name)
        model.graph.node.append(onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    if len(_dims(model.graph.output[0]) or _dims(_inferred_output(model))) != 2:
        static = store_constant(model, "answers.shape", np.array([-1, columns], np.int64))
        tensor = add("Reshape", "answers", tensor, static)
    if columns == 1:  # the probability of the second class
        tensor = add("Sigmoid", "second", tensor) if gives == LOGITS else tensor
        one = store_constant(model, "one", np.array(1, np.float32))
        add("Concat", last, add("Sub", "first", one, tensor), tensor, axis=1)
    elif gives == LOGITS:
        add("Softmax", last, tensor, axis=1)
    else:
        _rename(model, tensor, last)
    del model.graph.output[:]
    answers: list[str | int | None] = ["N", len(contract.labels)]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(contract.output_name, TensorProto.FLOAT, answers)
    )


def _finish(model: ModelProto, contract: ModelContract, metadata: dict[str, str]) -> None:
    """Name the nodes, leave out what the exporter noted for itself, and check, in place."""
    taken: set[str] = set()
    for place, node in enumerate(model.graph.node):
        # A name stands in tables, and an exporter's notes may hold the paths of its machine.
        wanted = printable(node.name)[:_LONGEST_NAME] or f"{node.op_type}_{place}"
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        node.name = wanted
        node.doc_string = ""
        if hasattr(node, "metadata_props"):
            del node.metadata_props[:]
    graph = onnx.helper.make_graph(
        model.graph.node,
        contract.architecture,
        model.graph.input,
        model.graph.output,
        model.graph.initializer,
    )
    opset = next(entry for entry in model.opset_import if entry.domain in _ONNX)
    made = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", opset.version)],
        ir_version=IR_VERSION,
        producer_name="edge-dsc",
    )
    onnx.helper.set_model_props(made, {**contract.to_metadata(), **metadata})
    try:
        onnx.checker.check_model(made, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInputError(f"the model is no valid graph: {reason}", remedy="export it again") from error
    model.CopyFrom(made)
