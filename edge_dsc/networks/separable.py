"""Separable twins: every ordinary convolution of a network larger than 1x1 becomes a depthwise and a pointwise one.

Three parts: the best separable approximation of a kernel (numpy alone), what the paper's formulas count of it, and
the surgery on a Keras graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.networks.architecture import count_parameters
from edge_dsc.networks.keras_files import load_keras
from edge_dsc.networks.paper import BATCH_NORM_MOMENTUM
from engines.contract import Count, Text
from engines.errors import BadInputError, UsageError
from engines.text_table import Table, printable, render_text

if TYPE_CHECKING:
    from keras import KerasTensor, Layer, Model

# A convolution on a picture (grey, RGB, RGBA): with the depthwise one first the whole network would see through as
# many filters as the picture has channels.
PICTURE_CHANNELS = 4
_RIDGE = 1e-4  # of a fit, as a share of the mean square of what it is made of
_TINY = 1e-12
_Float32 = NDArray[np.float32]
_Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitKernel:
    """A kernel as a depthwise and a pointwise one.

    Attributes:
        depthwise: ``float32 [h, w, channels, rank]``, as Keras' DepthwiseConv2D holds it.
        pointwise: ``float32 [1, 1, inputs, outputs]``, as Keras' Conv2D holds it.
        error: Norm of the difference over the norm of the kernel; 0 is the same function.
    """

    depthwise: _Float32
    pointwise: _Float32
    error: float


def split_kernel(kernel: NDArray[np.floating], rank: int = 1, groups: int = 1) -> SplitKernel:
    """Return the best depthwise-then-pointwise approximation of a kernel, in the least squares sense.

    What an input channel gives to the outputs is a matrix ``[h * w, outputs]``; its leading singular vectors are the
    best spatial filters for that channel and their best weights in every output.
    Source: Guo and others, Network Decoupling: From Regular to Depthwise Separable Convolutions, arXiv 1808.05517
    (2018); optimal by Eckart and Young (1936).

    Args:
        kernel: ``[h, w, inputs per group, outputs]``, as Keras' Conv2D holds it.
        rank: Spatial filters per input channel; more than ``min(h * w, outputs per group)`` has no use, and that many
            are exact.
        groups: Groups of the convolution.

    Returns:
        Depthwise ``[h, w, inputs, rank]`` and pointwise ``[1, 1, inputs per group * rank, outputs]`` of the groups.
    """
    height, width, inputs, outputs = kernel.shape
    taps, share = height * width, outputs // groups
    matrices = kernel.astype(np.float64).reshape(taps, inputs, groups, share).transpose(2, 1, 0, 3)
    filters, weights, error = _leading_products(matrices, min(rank, taps, share))
    rank = filters.shape[-1]
    depthwise = filters.transpose(2, 0, 1, 3).reshape(height, width, groups * inputs, rank)
    pointwise = weights.transpose(1, 2, 0, 3).reshape(1, 1, inputs * rank, outputs)
    return SplitKernel(
        depthwise=depthwise.astype(np.float32), pointwise=pointwise.astype(np.float32), error=error
    )


def split_kernel_pointwise_first(kernel: NDArray[np.floating]) -> SplitKernel:
    """Return the best pointwise-then-depthwise approximation: one mixture of the inputs and one filter per output.

    Args:
        kernel: ``[h, w, inputs, outputs]``.

    Returns:
        Depthwise ``[h, w, outputs, 1]`` and pointwise ``[1, 1, inputs, outputs]``; exact for one input channel, and
        for equal ones.
    """
    height, width, inputs, outputs = kernel.shape
    matrices = kernel.astype(np.float64).reshape(height * width, inputs, outputs).transpose(2, 0, 1)
    filters, weights, error = _leading_products(matrices, 1)
    depthwise = filters.transpose(1, 0, 2).reshape(height, width, outputs, 1)
    pointwise = weights.transpose(1, 2, 0).reshape(1, 1, inputs, outputs)
    return SplitKernel(
        depthwise=depthwise.astype(np.float32), pointwise=pointwise.astype(np.float32), error=error
    )


def fit_kernel(
    kernel: NDArray[np.floating], patches: _Float64, wanted: _Float64, *, rank: int = 1, groups: int = 1
) -> SplitKernel:
    """Return the depthwise and pointwise kernels that come nearest to what a kernel gives on real inputs.

    :func:`split_kernel` is best for inputs whose neighbouring pixels have nothing to do with each other. Those of a
    network are smooth. Here the same decomposition is weighted by how the pixels under the kernel go together in every
    channel, which finds the filters; the pointwise weights then follow by least squares, up to a bias.
    Source: Zhang, Zou, He and Sun, Accelerating Very Deep Convolutional Networks for Classification and Detection,
    arXiv 1505.06798 (2015): responses are reconstructed, not kernels.

    Args:
        kernel: ``[h, w, inputs per group, outputs]``.
        patches: The pixels under the kernel at some places, ``[inputs, places, h * w]``.
        wanted: What the kernel is to give there, ``[places, outputs]``.
        rank: As of :func:`split_kernel`.
        groups: As of :func:`split_kernel`.

    Returns:
        As :func:`split_kernel`; the error is the share of the wanted deviation from the mean that is missed there.
    """
    height, width, inputs, outputs = kernel.shape
    taps, share = height * width, outputs // groups
    matrices = kernel.astype(np.float64).reshape(taps, inputs, groups, share).transpose(2, 1, 0, 3)
    patches = patches - patches.mean(axis=1, keepdims=True)
    roots = _roots(patches.swapaxes(1, 2) @ patches / patches.shape[1])
    weighted = roots @ matrices.reshape(-1, taps, share)
    filters = np.linalg.solve(roots, _leading_products(weighted, min(rank, taps, share))[0])
    rank = filters.shape[-1]
    responses = (patches @ filters).reshape(groups, inputs, -1, rank).transpose(0, 2, 1, 3)
    responses = responses.reshape(groups, -1, inputs * rank)
    aims = (wanted - wanted.mean(axis=0)).reshape(-1, groups, share).transpose(1, 0, 2)
    squares = responses.swapaxes(1, 2) @ responses
    weights = np.linalg.solve(_ridged(squares), responses.swapaxes(1, 2) @ aims)
    missed, total = np.linalg.norm(aims - responses @ weights), np.linalg.norm(aims)
    # As much of their size on either side, so that one learning rate suits both.
    by_filter = weights.reshape(groups * inputs, rank, share)
    sizes = np.linalg.norm(by_filter, axis=2), np.linalg.norm(filters, axis=1)
    balance = np.sqrt(np.maximum(sizes[0], _TINY) / np.maximum(sizes[1], _TINY))
    filters = filters * balance[:, None, :]
    weights = (by_filter / balance[..., None]).reshape(groups, inputs * rank, share)
    depthwise = filters.transpose(1, 0, 2).reshape(height, width, groups * inputs, rank)
    pointwise = weights.transpose(1, 0, 2).reshape(1, 1, inputs * rank, outputs)
    return SplitKernel(
        depthwise=depthwise.astype(np.float32),
        pointwise=pointwise.astype(np.float32),
        error=float(missed / total) if total else 0.0,
    )


def _ridged(squares: _Float64) -> _Float64:
    """Return positive definite matrices near to some that may be singular: channels may be dead, or alike."""
    size = squares.shape[-1]
    mean = np.trace(squares, axis1=-2, axis2=-1)[..., None, None] / size
    ridged: _Float64 = squares + (_RIDGE * mean + _TINY) * np.eye(size)
    return ridged


def _roots(covariances: _Float64) -> _Float64:
    """Return the symmetric square roots of covariances ``[..., n, n]``."""
    values, vectors = np.linalg.eigh(_ridged(covariances))
    roots: _Float64 = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ vectors.swapaxes(-1, -2)
    return roots


def _leading_products(matrices: _Float64, rank: int) -> tuple[_Float64, _Float64, float]:
    """Approximate matrices ``[..., a, b]`` by products ``[..., a, rank] @ [..., rank, b]``; the error is that of all.

    Both factors get the root of the singular value, so that one learning rate suits both.
    """
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    total, lost = float(np.sum(values**2)), float(np.sum(values[..., rank:] ** 2))
    roots = np.sqrt(values[..., :rank])
    left, right = left[..., :rank], right[..., :rank, :]
    # A pair of singular vectors is unique up to its sign: the largest entry of the filter is positive.
    largest = np.take_along_axis(left, np.abs(left).argmax(axis=-2, keepdims=True), axis=-2)
    signs = np.where(largest < 0, -1.0, 1.0)
    left = left * signs * roots[..., None, :]
    right = right * signs.swapaxes(-1, -2) * roots[..., :, None]
    return left, right, (lost / total) ** 0.5 if total else 0.0


class SeparatedLayer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one convolution, in the paper's letters; biases and BatchNorm are not counted, as there.

    Attributes:
        name: The convolution's; one inside a nested model as ``model/name``.
        kernel: Height and width; their product is the paper's Dk^2.
        inputs: M, channels.
        outputs: N, channels.
        groups: Of the convolution.
        rank: Spatial filters per input channel.
        pointwise_first: Whether the pointwise convolution comes first, and the depthwise one has N channels.
        positions: Pixels of the input and of the output; None where the network takes any size.
        error: Relative error of the nearest kernel, which needs no images.
        missed: Share of the original's deviation that the fitted pair misses on images; None where none were there.
    """

    name: Text
    kernel: tuple[Count, Count]
    inputs: Count
    outputs: Count
    groups: Count = 1
    rank: Count = 1
    pointwise_first: bool = False
    positions: tuple[Count, Count] | None = None
    error: float = 0.0
    missed: float | None = None

    @property
    def taps(self) -> int:
        """The paper's Dk^2."""
        return self.kernel[0] * self.kernel[1]

    @property
    def ordinary(self) -> int:
        """Formula (1): Dk^2 M N."""
        return self.taps * self.inputs * self.outputs // self.groups

    @property
    def depthwise(self) -> int:
        """Formula (2): Dk^2 M for each rank; Dk^2 N where it comes second."""
        return self.taps * (self.outputs if self.pointwise_first else self.inputs * self.rank)

    @property
    def pointwise(self) -> int:
        """Formula (3): M N for each rank."""
        return self.inputs * self.rank * self.outputs // self.groups

    @property
    def separable(self) -> int:
        """Formula (4): M (Dk^2 + N) for each rank."""
        return self.depthwise + self.pointwise

    @property
    def ratio(self) -> float:
        """(4) over (1): 1/N + 1/Dk^2 for each rank; 1/M + 1/Dk^2 where the pointwise one comes first."""
        return self.separable / self.ordinary

    @property
    def multiply_adds(self) -> tuple[int, int] | None:
        """Of one picture, before and after: every weight is used once per pixel of its convolution's output."""
        if self.positions is None:
            return None
        before, after = self.positions
        pointwise = self.pointwise * (before if self.pointwise_first else after)
        return self.ordinary * after, self.depthwise * after + pointwise


class Separation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a twin differs from its original.

    Attributes:
        original: Name of the network it was made of.
        batch_norm: Whether BatchNorm was put after the pairs that had none.
        layers: The separated ones, in the network's order.
        left_alone: Convolutions larger than 1x1 that stay: (name, reason).
        parameters: Of the feature extractor, as :func:`edge_dsc.networks.count_parameters` counts: before, after.
    """

    original: Text
    batch_norm: bool
    layers: tuple[SeparatedLayer, ...]
    left_alone: tuple[tuple[Text, Text], ...]
    parameters: tuple[Count, Count]


def format_separation(separation: Separation) -> str:
    """Return the paper's formulas (1) to (4) layer by layer, as a table of text with what was left alone below."""
    rows = [_row(layer) for layer in separation.layers]
    layers = separation.layers
    sums = [sum(getattr(layer, name) for layer in layers) for name in _FORMULAS]
    counted = [layer.multiply_adds for layer in layers]
    work = [sum(pair[side] for pair in counted if pair) if all(counted) else None for side in (0, 1)]
    ratio = sums[3] / sums[0]
    rows.append(
        ("together", "", "", "", *(f"{n:,}" for n in sums), f"{ratio:.4f}", *map(_count, work), "", "")
    )
    before, after = separation.parameters
    notes = [
        "(4)/(1) is 1/N + 1/Dk^2, and r times that for the r filters of a higher rank",
        "error: of the nearest kernel, relative; missed: of the output's deviation, by the pair fitted on images",
        *(
            f"{layer.name}: pointwise first, so (2) is Dk^2 N, (4) N (Dk^2 + M) and (4)/(1) 1/M + 1/Dk^2"
            for layer in layers
            if layer.pointwise_first
        ),
        *(f"left alone: {name}, {reason}" for name, reason in separation.left_alone),
        f"the feature extractor, with biases and BatchNorm: {before:,} parameters, of the twin {after:,}"
        f" ({1 - after / before:.2%} fewer)",
    ]
    table = Table(
        title=f"separable twin of {separation.original}", header=_HEADER, rows=tuple(rows), notes=tuple(notes)
    )
    return render_text(table)


_FORMULAS = ("ordinary", "depthwise", "pointwise", "separable")
_HEADER = (
    "layer", "kernel", "M", "N", "(1) Dk^2 M N", "(2) Dk^2 M", "(3) M N", "(4) M (Dk^2+N)", "(4)/(1)",
    "multiply-adds", "of the twin", "error", "missed",
)  # fmt: skip


def _row(layer: SeparatedLayer) -> tuple[str, ...]:
    kernel = f"{layer.kernel[0]}x{layer.kernel[1]}"
    kernel += f" g{layer.groups}" if layer.groups > 1 else ""
    kernel += f" r{layer.rank}" if layer.rank > 1 else ""
    counts = [f"{getattr(layer, name):,}" for name in ("inputs", "outputs", *_FORMULAS)]
    work = [_count(number) for number in layer.multiply_adds or (None, None)]
    missed = "" if layer.missed is None else f"{layer.missed:.3f}"
    return (layer.name, kernel, *counts, f"{layer.ratio:.4f}", *work, f"{layer.error:.3f}", missed)


def _count(number: int | None) -> str:
    return "any size" if number is None else f"{number:,}"


@dataclass(frozen=True, kw_only=True)
class SeparationOptions:
    """How to make a twin.

    Attributes:
        rank: Spatial filters per input channel, the depth multiplier.
        batch_norm: Put BatchNorm between a pair and its activation, where none follows.
        layers: Names, or patterns with ``*``, of the convolutions to separate; with ``^`` in front those to leave
            alone. Without a name all are separated.
    """

    rank: int = 1
    batch_norm: bool = True
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a rank that is none.

        Raises:
            UsageError: It is below 1.
        """
        if self.rank < 1:
            raise UsageError(f"the rank {self.rank}", remedy="give 1 or more filters per input channel")

    def wants(self, name: str) -> bool:
        """Whether a convolution is to be separated."""
        to_separate = [pattern for pattern in self.layers if not pattern.startswith("^")]
        alone = [pattern[1:] for pattern in self.layers if pattern.startswith("^")]
        if any(fnmatchcase(name, pattern) for pattern in alone):
            return False
        return not to_separate or any(fnmatchcase(name, pattern) for pattern in to_separate)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A convolution of the original and what stands for it in the twin.

    Attributes:
        original: The convolution.
        layers: The pair: one SeparableConv2D, or two layers, of which the last holds the bias.
        pointwise_first: Whether the first of the two is the pointwise one.
        norm: The BatchNorm after it, None where there is none.
        added: Whether that BatchNorm is new; then it has no weights of the original.
    """

    original: Layer
    layers: tuple[Layer, ...]
    pointwise_first: bool
    norm: Layer | None
    added: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Twin:
    """A network and what it was made of.

    Attributes:
        model: The twin, with weights made of the original's; takes and gives what the original does.
        original: The original.
        separation: What was done.
        pairs: By convolution.
    """

    model: Model
    original: Model
    separation: Separation
    pairs: tuple[Pair, ...]


def separate_network(original: Model, options: SeparationOptions | None = None) -> Twin:
    """Build the separable twin of a network; the network is left as it is.

    Every ``Conv2D`` larger than 1x1 becomes a depthwise and a pointwise convolution: strides, dilation and padding go
    to the depthwise one, bias and activation to the second of the pair. A grouped convolution becomes separable
    within its groups. One on a picture, with few input channels, becomes pointwise first: the paper's stem. The
    kernels are the best approximation of the original's; pictures of equal channels are recognised where a
    Concatenate makes them of one tensor, and are exact. Everything else is copied, nested models included.

    The twin of ``cnn`` is ``dsc``, name by name: see :func:`edge_dsc.networks.build_network` for its 4,640.

    Args:
        original: A functional or sequential model with its weights.
        options: Rank, BatchNorm, which layers.

    Raises:
        BadInputError: No functional model, or no convolution that could be separated.
        UsageError: A name in ``options.layers`` that no convolution larger than 1x1 has.
        EnvironmentProblem: TensorFlow is missing.
    """
    surgery = _Surgery(options or SeparationOptions())
    if not _is_graph(original):
        raise BadInputError(
            f"the network {original.name} is no graph of layers but code of its own ({type(original).__name__})",
            remedy="give a functional or sequential Keras model that is built",
        )
    model = surgery.rebuild(original)
    surgery.refuse_strange_names()
    if not surgery.layers:
        listed = "; ".join(f"{layer}: {reason}" for layer, reason in surgery.left_alone)
        raise BadInputError(
            f"{original.name} has no convolution to separate ({listed or 'none is larger than 1x1'})",
            remedy="give a network with ordinary convolutions, another --rank or other --layers",
        )
    surgery.set_weights()
    separation = Separation(
        original=printable(original.name),
        batch_norm=surgery.options.batch_norm,
        layers=tuple(surgery.layers),
        left_alone=tuple(surgery.left_alone),
        parameters=(_count_features(original), _count_features(model)),
    )
    return Twin(model=model, original=original, separation=separation, pairs=tuple(surgery.pairs))


def _count_features(model: Model) -> int:
    return count_parameters(model)["feature_extractor"]


def _is_graph(model: object) -> bool:
    """Whether a model is functional, or sequential and built: only these know their layers' inputs."""
    keras = load_keras()
    if isinstance(model, keras.Sequential):
        return bool(model.built and model.inputs)
    return isinstance(model, keras.Model) and hasattr(model, "operations")


@dataclass(frozen=True, kw_only=True)
class _Level:
    """One model of a nest of models: how its layers are called, and which feed nothing but BatchNorm."""

    prefix: str
    names: frozenset[str]
    normed: frozenset[str]


@dataclass
class _Surgery:
    """A twin under construction: Keras walks the original's graph and calls us for every layer."""

    options: SeparationOptions
    layers: list[SeparatedLayer] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    # What stands for a layer; a layer that is called twice keeps one.
    _standing: dict[int, Callable[..., Any]] = field(default_factory=dict)
    _weights: list[tuple[Layer, list[NDArray[Any]]]] = field(default_factory=list)
    # Tensors that are so many copies of another one; the tensor is kept, or its id could come again.
    _copies: dict[int, tuple[KerasTensor, int]] = field(default_factory=dict)
    _outputs: dict[int, tuple[KerasTensor, int]] = field(default_factory=dict)  # of a pair, by its number

    def rebuild(self, model: Model, prefix: str = "") -> Model:
        """Return the twin of a model, its weights still to be set."""
        keras = load_keras()
        if isinstance(model, keras.Sequential):
            model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
        level = _level(model, prefix)
        return keras.models.clone_model(
            model, clone_function=lambda layer: layer, call_function=partial(self._call, level)
        )

    def refuse_strange_names(self) -> None:
        """Refuse a name that none of the convolutions has.

        Raises:
            UsageError: There is one.
        """
        known = [layer.name for layer in self.layers] + [name for name, _ in self.left_alone]
        for pattern in self.options.layers:
            if not any(fnmatchcase(name, pattern.removeprefix("^")) for name in known):
                raise UsageError(
                    f"--layers {pattern}: no convolution larger than 1x1 has that name",
                    remedy=f"choose among {', '.join(known[:20])}{' ...' if len(known) > 20 else ''}"
                    if known
                    else "the network has none",
                )

    def set_weights(self) -> None:
        """Give every layer of the twin its weights."""
        for layer, values in self._weights:
            layer.set_weights(values)

    def _call(self, level: _Level, layer: Layer, *args: Any, **options: Any) -> Any:
        """Call what stands for a layer."""
        if id(layer) not in self._standing:
            self._standing[id(layer)] = self._stand_for(level, layer, args)
        outputs = self._standing[id(layer)](*args, **options)
        self._follow_copies(layer, args, outputs)
        return outputs

    def _follow_copies(self, layer: Layer, args: tuple[Any, ...], outputs: Any) -> None:
        """Remember a tensor of equal channels, or one that is such a tensor scaled or padded."""
        layers = load_keras().layers
        if type(layer) is layers.Concatenate and len({id(tensor) for tensor in args[0]}) == 1:
            self._copies[id(outputs)] = (outputs, len(args[0]))
        elif args and id(args[0]) in self._copies:
            alike = type(layer) is layers.Rescaling and np.ndim(layer.scale) == np.ndim(layer.offset) == 0
            if alike or type(layer) is layers.ZeroPadding2D:
                self._copies[id(outputs)] = (outputs, self._copies[id(args[0])][1])

    def _stand_for(self, level: _Level, layer: Layer, args: tuple[Any, ...]) -> Callable[..., Any]:
        keras = load_keras()
        if _is_graph(layer):
            inner: Callable[..., Any] = self.rebuild(layer, f"{level.prefix}{layer.name}/")
            return inner
        if type(layer) is keras.layers.Conv2D and max(layer.kernel_size) > 1:
            name = printable(level.prefix + layer.name)
            reason = self._reason_to_leave(name, layer)
            if reason is None:
                return self._separate(level, layer, args[0])
            self.left_alone.append((name, reason))
        clone: Callable[..., Any] = type(layer).from_config(layer.get_config())
        if getattr(layer, "weights", None):
            self._weights.append((clone, layer.get_weights()))
        number = self._outputs[id(args[0])][1] if args and id(args[0]) in self._outputs else None
        if number is not None and isinstance(layer, keras.layers.BatchNormalization):
            self.pairs[number] = replace(self.pairs[number], norm=clone)
        return clone

    def _reason_to_leave(self, name: str, layer: Layer) -> str | None:
        inputs = layer.kernel.shape[2]
        if not self.options.wants(name):
            return "as asked"
        if inputs == 1:
            return "its groups have one input channel: it is depthwise already"
        if layer.strides[0] != layer.strides[1]:
            return f"strides {layer.strides[0]}x{layer.strides[1]}, which Keras' depthwise convolution lacks"
        separated = _describe(name, layer, self.options.rank)
        if separated.separable >= separated.ordinary:
            sizes = f"{separated.separable:,} weights instead of {separated.ordinary:,}"
            return f"a pair of rank {separated.rank} would be no smaller, {sizes}"
        return None

    def _separate(self, level: _Level, layer: Layer, tensor: KerasTensor) -> Callable[..., Any]:
        """Make the pair that stands for a convolution, with BatchNorm and activation where they are to follow."""
        described = _describe(printable(level.prefix + layer.name), layer, self.options.rank)
        base = _free_base(level, layer)
        kernel = _even_out(np.asarray(layer.kernel), self._copies.get(id(tensor), (tensor, 1))[1])
        # A pair that is pointwise first has no BatchNorm: the paper's stem has none.
        first = described.pointwise_first
        followed = layer.name in level.normed and _is_linear(layer)
        normed = self.options.batch_norm and not first and not followed
        made = (
            _pointwise_first(layer, base, kernel)
            if first
            else _depthwise_first(layer, base, kernel, described.rank, linear=normed)
        )
        if layer.use_bias:
            made.weights[-1].append(np.asarray(layer.bias))
        self._weights += zip(made.layers, made.weights, strict=True)
        norm = _batch_norm(layer, base) if normed else None
        self.pairs.append(
            Pair(
                original=layer,
                layers=tuple(made.layers),
                pointwise_first=first,
                norm=norm,
                added=normed,
            )
        )
        self.layers.append(
            msgspec.structs.replace(described, error=made.error, positions=_positions(layer, tensor))
        )
        after = [norm, *_activation(layer, base)] if normed else []
        return partial(self._run_pair, len(self.pairs) - 1, [*made.layers, *after])

    def _run_pair(self, number: int, chain: list[Layer], tensor: KerasTensor) -> KerasTensor:
        for layer in chain:
            tensor = layer(tensor)
        self._outputs[id(tensor)] = (tensor, number)
        return tensor


class _Made(NamedTuple):
    """The convolutions of a pair, their weights in Keras' order without the bias, and the kernel's error."""

    layers: list[Layer]
    weights: list[list[_Float32]]
    error: float


def _depthwise_first(layer: Layer, base: str, kernel: _Float32, rank: int, *, linear: bool) -> _Made:
    layers = load_keras().layers
    split = split_kernel(kernel, rank, layer.groups)
    second = {"use_bias": layer.use_bias, "activation": None if linear else layer.activation}
    spatial = {**_spatial(layer), "depth_multiplier": rank}
    if layer.groups == 1:
        one = layers.SeparableConv2D(layer.filters, **spatial, **second, name=f"{base}_separable")
        return _Made([one], [[split.depthwise, split.pointwise]], split.error)
    depthwise = layers.DepthwiseConv2D(**spatial, use_bias=False, name=f"{base}_depthwise")
    shared = {"groups": layer.groups, "data_format": layer.data_format, "dtype": layer.dtype_policy}
    pointwise = layers.Conv2D(layer.filters, 1, **shared, **second, name=f"{base}_pointwise")
    return _Made([depthwise, pointwise], [[split.depthwise], [split.pointwise]], split.error)


def _pointwise_first(layer: Layer, base: str, kernel: _Float32) -> _Made:
    layers = load_keras().layers
    split = split_kernel_pointwise_first(kernel)
    shared = {"data_format": layer.data_format, "dtype": layer.dtype_policy}
    # Without a bias: what the depthwise one pads with stays zero, as in the original.
    pointwise = layers.Conv2D(layer.filters, 1, use_bias=False, **shared, name=f"{base}_pointwise")
    depthwise = layers.DepthwiseConv2D(
        **_spatial(layer), use_bias=layer.use_bias, activation=layer.activation, name=f"{base}_depthwise"
    )
    return _Made([pointwise, depthwise], [[split.pointwise], [split.depthwise]], split.error)


def _spatial(layer: Layer) -> dict[str, Any]:
    """Return what the depthwise convolution inherits."""
    names = ("kernel_size", "strides", "padding", "dilation_rate", "data_format")
    return {name: getattr(layer, name) for name in names} | {"dtype": layer.dtype_policy}


def _batch_norm(layer: Layer, base: str) -> Layer:
    """Return a BatchNorm that changes nothing until it is trained or matched."""
    axis = 1 if layer.data_format == "channels_first" else -1
    return load_keras().layers.BatchNormalization(
        axis=axis, momentum=BATCH_NORM_MOMENTUM, dtype=layer.dtype_policy, name=f"{base}_norm"
    )


def _activation(layer: Layer, base: str) -> list[Layer]:
    keras = load_keras()
    if _is_linear(layer):
        return []
    if layer.activation is keras.activations.relu:
        return [keras.layers.ReLU(name=f"{base}_relu", dtype=layer.dtype_policy)]
    return [keras.layers.Activation(layer.activation, name=f"{base}_activation", dtype=layer.dtype_policy)]


def _is_linear(layer: Layer) -> bool:
    return layer.activation is None or layer.activation is load_keras().activations.linear


def _describe(name: str, layer: Layer, rank: int) -> SeparatedLayer:
    """Return what would become of a convolution, its error and its positions still to be filled in."""
    height, width, per_group, outputs = layer.kernel.shape
    first = layer.groups == 1 and per_group <= PICTURE_CHANNELS
    return SeparatedLayer(
        name=name,
        kernel=(height, width),
        inputs=per_group * layer.groups,
        outputs=outputs,
        groups=layer.groups,
        rank=1 if first else min(rank, height * width, outputs // layer.groups),
        pointwise_first=first,
    )


def _positions(layer: Layer, tensor: KerasTensor) -> tuple[int, int] | None:
    """Return the pixels of a convolution's input and output."""
    sizes = []
    for shape in (tensor.shape, layer.compute_output_shape(tensor.shape)):
        sides = shape[2:] if layer.data_format == "channels_first" else shape[1:3]
        if None in sides:
            return None
        sizes.append(int(np.prod(sides)))
    return sizes[0], sizes[1]


def _even_out(kernel: _Float32, copies: int) -> _Float32:
    """Return the kernel that treats all copies of its input alike and gives what it gave: exactly separable there."""
    if copies == 1 or kernel.shape[2] % copies:
        return kernel
    height, width, inputs, outputs = kernel.shape
    by_copy = kernel.reshape(height, width, copies, inputs // copies, outputs)
    mean: _Float32 = by_copy.mean(axis=2, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.broadcast_to(mean, by_copy.shape).reshape(kernel.shape)


def _free_base(level: _Level, layer: Layer) -> str:
    """Return what the names of a pair begin with: the convolution's own without ``_conv``, if all of them are free."""
    parts = ("separable", "depthwise", "pointwise", "norm", "relu", "activation")
    bases = (layer.name.removesuffix("_conv"), layer.name, f"{layer.name}_twin")
    free = (base for base in bases if not any(f"{base}_{part}" in level.names for part in parts))
    return next(free, f"{layer.name}_of_the_twin")


def _level(model: Model, prefix: str) -> _Level:
    """Read a model's graph: its layers' names, and those whose outputs go to BatchNorm alone."""
    consumers: dict[str, set[str]] = {}
    for entry in model.get_config()["layers"]:
        for source in _sources(entry["inbound_nodes"]):
            consumers.setdefault(source, set()).add(entry["class_name"])
    normed = frozenset(name for name, kinds in consumers.items() if kinds == {"BatchNormalization"})
    return _Level(prefix=prefix, names=frozenset(layer.name for layer in model.layers), normed=normed)


def _sources(nodes: object) -> Iterator[str]:
    """Yield the names of the layers that a serialised call takes its tensors from."""
    if isinstance(nodes, Mapping):
        if "keras_history" in nodes:
            yield nodes["keras_history"][0]
        nodes = list(nodes.values())
    if isinstance(nodes, list | tuple):
        for node in nodes:
            yield from _sources(node)
