"""What a graph does to the pixels before its first convolutions, folded into the weights of these.

Scaling, mean and deviation, one grey channel made three, channels in another order: all of it is affine, so that what
a convolution takes is ``matrix @ pixels + offset`` at every place of the picture. The matrix goes into the kernel, the
offset into the bias, and the network takes raw pixels.

Only the border needs care. A convolution pads what it takes with zeros, and zero is not what a pixel of zero becomes:
with the offset in the bias, the border would count as black instead of as the network's own zero. In the order of what
they cost, these are exact:

- no padding: nothing to do;
- a grey level that becomes zero in every channel (all means equal, such as ``x / 127.5 - 1``): the pixels are padded
  with it, by a Pad in front of the convolution;
- else a constant plane beside the pixels: its kernel holds the offset, and the zeros around it end the offset where the
  picture ends. It holds 128, the middle of the pixels: centred for INT8 it is zero inside the picture, so that its
  rounded kernel moves no result there. Runtimes of NVIDIA pad the first layer's channels to four or more anyway.

A map of constants added behind the convolution would be exact, too, but as large as its output, and it would stand
between the convolution and its ReLU, which every runtime fuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

PLANE = 128.0  # value of the constant plane
_LARGEST_PIXEL = 255.0
_SAME = 1e-9  # of a grey level and of weights computed in float64, relative
_Floats = NDArray[np.float64]
_Border = tuple[int, int, int, int]  # rows above, columns left, rows below, columns right
_NO_BORDER: _Border = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Front:
    """What became of the operators between the pixels and the first convolutions.

    Attributes:
        folded: Their kinds, in the order of the graph; empty where nothing was folded.
        border: How the padding of the first convolutions stays exact: one word or two for each that pads.
        kept: Why they are still there; None where they were folded.
    """

    folded: tuple[str, ...] = ()
    border: tuple[str, ...] = ()
    kept: str | None = None

    def __str__(self) -> str:
        """As one sentence for a person."""
        if self.kept is not None:
            return f"what prepares the pixels stays in the graph: {self.kept}"
        border = f"; its border: {', '.join(self.border)}" if self.border else ""
        return f"folded into the first convolution: {', '.join(self.folded) or 'nothing'}{border}"


@dataclass(frozen=True, kw_only=True)
class _Planes:
    """A tensor whose every channel is an affine function of the picture's channels, place by place.

    Attributes:
        matrix: ``float64 [channels, channels of the picture]``.
        offset: ``float64 [channels]``.
        axes: The order of its axes, of N, C, H and W; a tensor of one channel may lack C.
        size: Height and width of the picture, without a border.
        border: What was padded around the picture.
        beyond: ``float64 [channels]``: the value there.
    """

    matrix: _Floats
    offset: _Floats
    axes: str
    size: tuple[int, int]
    border: _Border = _NO_BORDER
    beyond: _Floats

    @property
    def channels(self) -> int:
        return len(self.offset)

    @property
    def sides(self) -> list[int]:
        """Height and width with the border."""
        top, left, bottom, right = self.border
        return [self.size[0] + top + bottom, self.size[1] + left + right]

    def affine(self, factor: _Floats, shift: _Floats) -> _Planes:
        """Return ``factor * self + shift``; both ``[1]`` or ``[channels]``, and of one channel they make several."""
        channels = max(self.channels, len(factor), len(shift))
        return replace(
            self,
            matrix=np.broadcast_to(factor[:, None] * self.matrix, (channels, self.matrix.shape[1])),
            offset=np.broadcast_to(factor * self.offset + shift, channels),
            beyond=np.broadcast_to(factor * self.beyond + shift, channels),
        )

    def take(self, places: Any, axes: str | None = None) -> _Planes:
        """Return some of the channels."""
        return replace(
            self,
            matrix=self.matrix[places],
            offset=self.offset[places],
            beyond=self.beyond[places],
            axes=axes or self.axes,
        )


_Rule = Callable[["_Trace", NodeProto], "list[_Planes] | None"]


class _Trace:
    """Follows the pixels through a graph as far as they stay affine.

    Attributes:
        planes: What is known of each tensor on the way.
        passed: The nodes behind which they still are.
        takers: The nodes that end the way.
    """

    def __init__(self, model: ModelProto, start: str, picture: _Planes) -> None:
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.planes = {start: picture}
        self.passed: list[NodeProto] = []
        self.takers: list[NodeProto] = []
        for node in model.graph.node:
            if not any(name in self.planes for name in node.input):
                continue
            rule = _RULES.get(node.op_type)
            found = rule(self, node) if rule else None
            if found is None:
                self.takers.append(node)
                continue
            self.passed.append(node)
            self.planes.update(zip(node.output, found, strict=False))  # Dropout's mask is no picture

    def source(self, node: NodeProto) -> _Planes | None:
        """Return what a node takes first; None where the pixels come in elsewhere."""
        return self.planes.get(node.input[0])

    def constant(self, node: NodeProto, place: int) -> NDArray[Any] | None:
        """Return a stored input of a node; None where there is none."""
        name = node.input[place] if place < len(node.input) else ""
        return onnx.numpy_helper.to_array(self._stored[name]) if name in self._stored else None

    def integers(self, node: NodeProto, place: int) -> list[int] | None:
        """Return a stored input of whole numbers."""
        found = self.constant(node, place)
        return None if found is None else [int(value) for value in found.reshape(-1)]


def fold_front(model: ModelProto) -> tuple[ModelProto, Front]:
    """Fold what lies between the pixels and the first convolutions into these.

    Args:
        model: A graph with static height, width and channels that casts its input ``uint8 [N, H, W, C]`` to float32
            first; it is not changed.

    Returns:
        The graph, and what was done. Where the front holds an operator that is not affine, or ends in something else
        than convolutions of stored weights, the graph comes back as it is.
    """
    folded = ModelProto()
    folded.CopyFrom(model)
    image = folded.graph.input[0]
    height, width, channels = (dim.dim_value for dim in image.type.tensor_type.shape.dim[1:])
    cast = next(node for node in folded.graph.node if image.name in node.input)
    picture = _Planes(
        matrix=np.eye(channels),
        offset=np.zeros(channels),
        axes="NHWC",
        size=(height, width),
        beyond=np.zeros(channels),
    )
    trace = _Trace(folded, cast.output[0], picture)
    kept = _obstacle(folded, trace)
    plans = [] if kept else [_plan(trace, node) for node in trace.takers]
    if kept or None in plans:
        return folded, Front(kept=kept or "it pads the picture twice, with different values")
    gone = {node.output[0] for node in (*trace.passed, cast)}
    kinds = tuple(dict.fromkeys(node.op_type for node in trace.passed if node.op_type != "Identity"))
    for node in reversed(folded.graph.node):
        if node.output[0] in gone:
            folded.graph.node.remove(node)
    source = fresh_name(folded, "planes" if channels == 1 else "channels_first")
    nodes = [cast, _to_channels_first(folded, cast.output[0], source, picture)]
    for node, plan in zip(trace.takers, plans, strict=True):
        assert plan is not None
        nodes += _apply(folded, node, plan, source)
    for place, node in enumerate(nodes):
        folded.graph.node.insert(place, node)
    drop_unused(folded)
    return folded, Front(folded=kinds, border=tuple(plan.word for plan in plans if plan and plan.word))


def _obstacle(model: ModelProto, trace: _Trace) -> str | None:
    """Say what keeps the front from being folded."""
    outputs = {value.name for value in model.graph.output}
    for node in trace.takers:
        planes, weight = trace.source(node), trace.constant(node, 1)
        if node.op_type != "Conv":
            return f"{node.op_type} takes it"
        if planes is None or weight is None or weight.ndim != 4 or planes.axes != "NCHW":
            return "a convolution takes it without stored weights"
        if len(node.input) > 2 and trace.constant(node, 2) is None:
            return "a convolution takes it without a stored bias"
    return "no convolution takes it" if not trace.takers or outputs & set(trace.planes) else None


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A convolution of raw pixels that stands for one of normalised ones.

    Attributes:
        kernel: ``float64 [outputs, channels of the picture, height, width]``; with a plane one channel more.
        bias: ``float64 [outputs]``.
        pads: What the convolution pads with zeros.
        frame: What a Pad in front of it puts around the pixels, with the grey ``level``.
        level: See ``frame``.
        plane: Whether it takes the constant plane.
        word: How the border stays exact; empty where there is none.
    """

    kernel: _Floats
    bias: _Floats
    pads: _Border = _NO_BORDER
    frame: _Border = _NO_BORDER
    level: float = 0.0
    plane: bool = False
    word: str = ""


def _plan(trace: _Trace, node: NodeProto) -> _Plan | None:
    """Return the folded convolution; None where its border has two different values."""
    planes = trace.source(node)
    weight = trace.constant(node, 1)
    assert planes is not None and weight is not None, "looked at before"
    kernel = _dense(weight.astype(np.float64), int(_attribute(node, "group", 1)), planes.channels)
    given = trace.constant(node, 2)
    bias = np.zeros(len(kernel)) if given is None else given.astype(np.float64)
    own = _pads_of(node, kernel.shape[2:], planes.sides)
    beyond = planes.beyond
    if own != _NO_BORDER:
        if planes.border != _NO_BORDER and beyond.any():
            return None
        beyond = np.zeros(planes.channels)
    pads = _joined(own, planes.border)
    folded = np.einsum("ocij,ck->okij", kernel, planes.matrix)
    if pads == _NO_BORDER:
        return _Plan(kernel=folded, bias=bias + np.einsum("ocij,c->o", kernel, planes.offset))
    # With the value beyond the border in the bias, every channel ends in zero there.
    bias = bias + np.einsum("ocij,c->o", kernel, beyond)
    offset = planes.offset - beyond
    if not offset.any():
        return _Plan(kernel=folded, bias=bias, pads=pads)
    level = _level_of_zero(planes.matrix, offset)
    if level is not None:
        bias = bias + np.einsum("ocij,c->o", kernel, offset)
        return _Plan(kernel=folded, bias=bias, frame=pads, level=level, word=f"padded with grey {level:.6g}")
    plane = np.einsum("ocij,c->oij", kernel, offset)[:, None] / PLANE
    return _Plan(
        kernel=np.concatenate([folded, plane], axis=1),
        bias=bias,
        pads=pads,
        plane=True,
        word="a constant plane",
    )


def _level_of_zero(matrix: _Floats, offset: _Floats) -> float | None:
    """Return the one value of all the picture's channels, 0..255, that becomes zero in every channel."""
    direction = matrix.sum(axis=1)
    if not direction.any():
        return None
    level = float(-(direction @ offset) / (direction @ direction))
    left = np.abs(direction * level + offset).max()
    within = -_SAME <= level <= _LARGEST_PIXEL * (1 + _SAME)
    # Constants are stored in float32, so that equal means differ in their last bits.
    return level if within and left <= 1e-6 * np.abs(offset).max() else None


def _dense(weight: _Floats, groups: int, channels: int) -> _Floats:
    """Return a grouped kernel over all channels, with zeros for those of other groups."""
    if groups == 1:
        return weight
    outputs, per_group = weight.shape[:2]
    dense = np.zeros((outputs, channels, *weight.shape[2:]))
    for output in range(outputs):
        first = output // (outputs // groups) * per_group
        dense[output, first : first + per_group] = weight[output]
    return dense


def _pads_of(node: NodeProto, kernel: Sequence[int], sides: Sequence[int]) -> _Border:
    """Return what a convolution pads. Source: ONNX operators, Conv: ``auto_pad`` and ``pads``."""
    how = _attribute(node, "auto_pad", b"NOTSET")
    if how == b"VALID":
        return _NO_BORDER
    if how == b"NOTSET":
        top, left, bottom, right = _attribute(node, "pads", [0, 0, 0, 0])
        return (top, left, bottom, right)
    strides, dilations = _attribute(node, "strides", [1, 1]), _attribute(node, "dilations", [1, 1])
    begins, ends = [], []
    for side, size, stride, dilation in zip(sides, kernel, strides, dilations, strict=True):
        needed = (-(-side // stride) - 1) * stride + dilation * (size - 1) + 1 - side
        less, more = max(0, needed) // 2, -(-max(0, needed) // 2)
        begins.append(less if how == b"SAME_UPPER" else more)
        ends.append(more if how == b"SAME_UPPER" else less)
    return (begins[0], begins[1], ends[0], ends[1])


def _joined(one: _Border, other: _Border) -> _Border:
    top, left, bottom, right = (a + b for a, b in zip(one, other, strict=True))
    return (top, left, bottom, right)


def _to_channels_first(model: ModelProto, source: str, target: str, picture: _Planes) -> NodeProto:
    """One channel: its bytes stay where they are."""
    if picture.channels > 1:
        return onnx.helper.make_node("Transpose", [source], [target], name=target, perm=[0, 3, 1, 2])
    shape = store_constant(model, f"{target}.shape", np.array([-1, 1, *picture.size], np.int64))
    return onnx.helper.make_node("Reshape", [source, shape], [target], name=target)


def _apply(model: ModelProto, node: NodeProto, plan: _Plan, source: str) -> list[NodeProto]:
    """Turn a convolution into the planned one, in place; return what goes before it."""
    name = node.name or node.output[0]
    before: list[NodeProto] = []

    def pad(suffix: str, widths: Sequence[int], value: float) -> str:
        made = fresh_name(model, f"{name}.{suffix}")
        frame = store_constant(model, f"{made}.widths", np.array(widths, np.int64))
        level = store_constant(model, f"{made}.level", np.array(value, np.float32))
        before.append(onnx.helper.make_node("Pad", [source, frame, level], [made], name=made))
        return made

    if plan.plane:
        source = pad("plane", [0, 0, 0, 0, 0, 1, 0, 0], PLANE)
    elif plan.frame != _NO_BORDER:
        top, left, bottom, right = plan.frame
        source = pad("border", [0, 0, top, left, 0, 0, bottom, right], plan.level)
    kept = [
        entry for entry in node.attribute if entry.name not in ("auto_pad", "group", "kernel_shape", "pads")
    ]
    del node.attribute[:]
    node.attribute.extend(kept)
    shape = list(plan.kernel.shape[2:])
    for key, value in (("group", 1), ("kernel_shape", shape), ("pads", list(plan.pads))):
        node.attribute.append(onnx.helper.make_attribute(key, value))
    node.input[:] = [
        source,
        store_constant(model, f"{name}.folded_weight", plan.kernel.astype(np.float32)),
        store_constant(model, f"{name}.folded_bias", plan.bias.astype(np.float32)),
    ]
    return before


def store_constant(model: ModelProto, wanted: str, value: NDArray[Any]) -> str:
    """Store a constant under a name that the graph does not have yet, and return that name."""
    name = fresh_name(model, wanted)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def fresh_name(model: ModelProto, wanted: str) -> str:
    """Return a name that the graph does not have yet."""
    taken = {tensor.name for tensor in model.graph.initializer}
    taken.update(value.name for value in (*model.graph.input, *model.graph.output))
    taken.update(name for node in model.graph.node for name in (node.name, *node.output))
    while wanted in taken:
        wanted += "_"
    return wanted


def drop_unused(model: ModelProto) -> None:
    """Remove, in place, nodes that nothing takes from and stored tensors that no node takes."""
    needed = {value.name for value in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed.update(node.input)
            nodes.append(NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    kept = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    stored = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(stored)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((entry for entry in node.attribute if entry.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _axis(planes: _Planes, axis: int) -> str:
    return planes.axes[axis] if -len(planes.axes) <= axis < len(planes.axes) else ""


def _keep(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    planes = trace.source(node)
    to_float = node.op_type != "Cast" or _attribute(node, "to", 0) == TensorProto.FLOAT
    return [planes] if planes is not None and to_float else None


def _arithmetic(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    """Add, Sub, Mul and Div with a constant that is one number, or one for each channel."""
    place = 1 if trace.constant(node, 1) is not None else 0
    planes, constant = trace.planes.get(node.input[1 - place]), trace.constant(node, place)
    if planes is None or constant is None or constant.ndim > len(planes.axes):
        return None
    lengths = [1] * (len(planes.axes) - constant.ndim) + list(constant.shape)
    if any(length != 1 for axis, length in zip(planes.axes, lengths, strict=True) if axis != "C"):
        return None
    values = constant.astype(np.float64).reshape(-1)
    if planes.channels > 1 and len(values) not in (1, planes.channels):
        return None
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Add":
        return [planes.affine(one, values)]
    if node.op_type == "Sub":
        return [planes.affine(one, -values) if place == 1 else planes.affine(-one, values)]
    if node.op_type == "Mul":
        return [planes.affine(values, zero)]
    return [planes.affine(1 / values, zero)] if place == 1 and values.all() else None


def _batch_norm(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    planes = trace.source(node)
    given = [trace.constant(node, place) for place in range(1, 5)]
    if planes is None or _axis(planes, 1) != "C" or len([name for name in node.output if name]) > 1:
        return None
    numbers = [value.astype(np.float64) for value in given if value is not None]
    if len(numbers) < 4:
        return None
    gamma, beta, mean, variance = numbers
    factor = gamma / np.sqrt(variance + _attribute(node, "epsilon", 1e-5))
    return [planes.affine(factor, beta - factor * mean)]


def _transpose(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    planes = trace.source(node)
    if planes is None:
        return None
    order = _attribute(node, "perm", list(range(len(planes.axes)))[::-1])
    return [replace(planes, axes="".join(planes.axes[place] for place in order))]


def _reshape(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    """One that only moves the axis of the one channel, or moves nothing."""
    planes, shape = trace.source(node), trace.integers(node, 1)
    if planes is None or shape is None or len(shape) < 3:
        return None
    lengths = dict(zip("CHW", [planes.channels, *planes.sides], strict=True))
    orders = ["NCHW", "NHWC", "NHW"] if planes.channels == 1 else [planes.axes]
    if planes.axes.replace("C", "") != "NHW":
        orders = [planes.axes]
    for order in orders:
        if shape[1:] == [lengths[axis] for axis in order[1:]]:
            return [replace(planes, axes=order)]
    return None


def _squeeze(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    planes, axes = trace.source(node), trace.integers(node, 1)
    if planes is None or axes is None or len(axes) != 1:
        return None
    if node.op_type == "Squeeze":
        fits = _axis(planes, axes[0]) == "C" and planes.channels == 1
        return [replace(planes, axes=planes.axes.replace("C", ""))] if fits else None
    if "C" in planes.axes:
        return None
    place = axes[0] % (len(planes.axes) + 1)
    return [replace(planes, axes=planes.axes[:place] + "C" + planes.axes[place:])]


def _concat(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    parts = [trace.planes[name] for name in node.input if name in trace.planes]
    first = parts[0]
    alike = all((part.axes, part.border) == (first.axes, first.border) for part in parts)
    if len(parts) < len(node.input) or not alike or _axis(first, _attribute(node, "axis", 0)) != "C":
        return None
    return [
        replace(
            first,
            matrix=np.concatenate([part.matrix for part in parts]),
            offset=np.concatenate([part.offset for part in parts]),
            beyond=np.concatenate([part.beyond for part in parts]),
        )
    ]


def _gather(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    planes, places = trace.source(node), trace.constant(node, 1)
    if planes is None or places is None or places.ndim > 1:
        return None
    if _axis(planes, _attribute(node, "axis", 0)) != "C":
        return None
    axes = planes.axes if places.ndim else planes.axes.replace("C", "")
    return [planes.take(np.atleast_1d(places).astype(np.int64), axes)]


def _slice(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    planes = trace.source(node)
    starts, ends, axes = (trace.integers(node, place) for place in (1, 2, 3))
    if planes is None or starts is None or ends is None or axes is None or len(axes) != 1:
        return None
    steps = trace.integers(node, 4) or [1]
    if _axis(planes, axes[0]) != "C":
        return None
    # An end far below zero is how ONNX says "to the first one" when it counts down.
    last = None if steps[0] < 0 and ends[0] < -planes.channels else ends[0]
    return [planes.take(slice(starts[0], last, steps[0]))]


def _split(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    planes = trace.source(node)
    if planes is None or _axis(planes, _attribute(node, "axis", 0)) != "C":
        return None
    count = len(node.output)
    sizes = trace.integers(node, 1) or [-(-planes.channels // count)] * count
    ends = np.cumsum(sizes)
    return [planes.take(slice(end - size, end)) for size, end in zip(sizes, ends.tolist(), strict=True)]


def _pad(trace: _Trace, node: NodeProto) -> list[_Planes] | None:
    """One of height and width, by one value."""
    planes, widths = trace.source(node), trace.integers(node, 1)
    if planes is None or widths is None or _attribute(node, "mode", b"constant") != b"constant":
        return None
    if len(node.input) > 3 and node.input[3]:
        return None
    value = trace.constant(node, 2) if len(node.input) > 2 and node.input[2] else np.zeros(())
    rank = len(planes.axes)
    if value is None or min(widths) < 0 or len(widths) != 2 * rank:
        return None
    begins, ends = (
        dict(zip(planes.axes, widths[:rank], strict=True)),
        dict(zip(planes.axes, widths[rank:], strict=True)),
    )
    if any(begins.get(axis, 0) or ends.get(axis, 0) for axis in "NC"):
        return None
    added = (begins["H"], begins["W"], ends["H"], ends["W"])
    beyond = np.full(planes.channels, float(value.reshape(())))
    if added == _NO_BORDER:
        return [planes]
    if planes.border != _NO_BORDER and not np.array_equal(planes.beyond, beyond):
        return None
    return [replace(planes, border=_joined(planes.border, added), beyond=beyond)]


_RULES: dict[str, _Rule] = {
    "Add": _arithmetic,
    "BatchNormalization": _batch_norm,
    "Cast": _keep,
    "Concat": _concat,
    "Div": _arithmetic,
    "Dropout": _keep,
    "Gather": _gather,
    "Identity": _keep,
    "Mul": _arithmetic,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _arithmetic,
    "Transpose": _transpose,
    "Unsqueeze": _squeeze,
}
