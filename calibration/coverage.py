"""Whether a calibration set was large and even enough: what it holds, and whether its ranges have settled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from calibration.chain import Chain, Floats, Pixels, chunks, map_in_threads, runs_in_pieces
from calibration.collect import watch_tensors
from calibration.layers import tensors_to_calibrate
from calibration.qdq import activation_ranges
from calibration.rewrites import Bounds, fold_norms, scale_channels
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable, calibrate_command
from engines.files import DocumentKind
from engines.graph import OnnxModel
from engines.text_table import align_rows

if TYPE_CHECKING:
    from onnx import ModelProto

PARTS = 8  # of the set, added one after the other

# Above these the report warns. Rules of thumb: no source gives any.
LOPSIDED = 3.0  # largest class / smallest class
SETTLED = 0.10  # growth of a tensor's mean range between half and all of the images
SATURATED = 0.01  # of a tensor's values beyond the range
IMAGES_A_PATIENT = 2.0
MOST_ROWS = 24  # of tensors in the table, and of warnings about them

_HEADER = ("tensor", "range", "seen", "deviation", "saturated", "max at half", "drift")


class TensorCoverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the images fill one tensor.

    Attributes:
        name: The tensor.
        low: Lower end of the table's range.
        high: Upper end of it.
        smallest: Smallest value seen.
        largest: Largest value seen.
        deviation: Standard deviation of all values.
        saturated: Share of values beyond the range, 0..1.
        growth: Largest magnitude after 1/8, 2/8, ... of the images, relative to that after all of them.
        drift: Difference between the mean of the images' largest magnitudes over the first half and over all,
            relative to the latter.
    """

    name: str
    low: float
    high: float
    smallest: float
    largest: float
    deviation: float
    saturated: float
    growth: tuple[float, ...]
    drift: float


class Coverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a calibration set holds and what it gives.

    Attributes:
        method: The table's method.
        classes: Images of each class.
        patients: Different patients, or None where they are not known.
        images: Images in all.
        tensors: One entry per range, in the order of the graph.
        warnings: What speaks against the set; empty where nothing does.
    """

    method: str
    classes: Mapping[str, int]
    patients: int | None
    images: int
    tensors: tuple[TensorCoverage, ...]
    warnings: tuple[str, ...]

    @property
    def shown(self) -> list[TensorCoverage]:
        """The tensors that fit into a table: all, or those that still move most, in the order of the graph."""
        most = sorted(self.tensors, key=lambda tensor: -tensor.drift)[:MOST_ROWS]
        return [tensor for tensor in self.tensors if tensor in most]

    def text(self) -> str:
        """Return the report as a table and a verdict; of a large network the tensors that still move most."""
        held = ", ".join(f"{name} {count}" for name, count in self.classes.items())
        whose = f" of {self.patients} patients" if self.patients is not None else ""
        rows = [
            (
                tensor.name,
                f"{tensor.low:.4g}..{tensor.high:.4g}",
                f"{tensor.smallest:.4g}..{tensor.largest:.4g}",
                f"{tensor.deviation:.3g}",
                f"{tensor.saturated:.3%}",
                f"{tensor.growth[PARTS // 2 - 1]:.0%}",
                f"{tensor.drift:.1%}",
            )
            for tensor in self.shown
        ]
        table = align_rows(_HEADER, rows, numeric=False)
        hidden = len(self.tensors) - len(rows)
        if hidden:
            table += f"\nand {hidden} more tensors that drift less"
        verdict = [f"warning: {line}" for line in self.warnings] or [
            "the set is even and its ranges have settled"
        ]
        return "\n".join([f"{self.images} images{whose}: {held}", table, *verdict])


COVERAGE = DocumentKind(
    name="edge-dsc/calibration-coverage", version=1, body=Coverage, renew=calibrate_command()
)


def measure_coverage(
    model: OnnxModel,
    table: CalibrationTable,
    images: CalibrationSet,
    patients: Mapping[str, str] | None = None,
) -> Coverage:
    """Look at a table's images once more: their classes, and how they fill the ranges.

    The images are taken in the order of their draw, so that each part of the set holds all classes.

    Args:
        model: The deployed FP32 graph.
        table: The table that was made of these images.
        images: The images; at least :data:`PARTS`.
        patients: The patient of each image by its hash, where known.
    """
    pixels: Pixels = images.pixels[list(images.drawn)]
    graph = fold_norms(model.proto)
    measure = _measure_chain if runs_in_pieces(model.proto) else _measure_graph
    tensors = measure(graph, table, pixels)
    classes = Counter(image.label for image in images.images)
    known = None if patients is None else len({patients[image.sha256] for image in images.images})
    return Coverage(
        method=table.method,
        classes=dict(sorted(classes.items())),
        patients=known,
        images=len(images.images),
        tensors=tensors,
        warnings=_warnings(classes, known, model.contract.labels, tensors),
    )


def save_coverage(path: Path, coverage: Coverage) -> None:
    """Write the report as a JSON document."""
    COVERAGE.save(path, coverage)


def _measure_chain(model: ModelProto, table: CalibrationTable, pixels: Pixels) -> tuple[TensorCoverage, ...]:
    """Look at the input of every layer, with its channels as they are scaled."""
    scaled = scale_channels(model, table.channel_factors)
    ranges = activation_ranges(scaled, table, signed=False)
    chain = Chain(scaled, signed=False)
    bounds = [ranges[layer.input] for layer in chain.layers]

    def measure(part: slice) -> list[_Part]:
        values = chain.start(pixels[part])
        found = []
        for index, ends in enumerate(bounds):
            found.append(_measure(values, ends))
            if index + 1 < len(bounds):
                values = chain.step(index, values, None, int8=False)
        return found

    parts = zip(*map_in_threads(measure, chunks(len(pixels))), strict=True)
    return tuple(
        _summarise(layer.input, ends, found)
        for layer, ends, found in zip(chain.layers, bounds, parts, strict=True)
    )


def _measure_graph(graph: ModelProto, table: CalibrationTable, pixels: Pixels) -> tuple[TensorCoverage, ...]:
    """Look at every tensor that has a range."""
    ranges = activation_ranges(graph, table, signed=False, pairs=tensors_to_calibrate(graph))
    names = [name for node in graph.graph.node for name in node.output if name in ranges]

    def measure(values: Sequence[Floats]) -> list[_Part]:
        return [_measure(array, ranges[name]) for name, array in zip(names, values, strict=True)]

    parts = zip(*watch_tensors(graph, names, pixels, measure), strict=True)
    return tuple(_summarise(name, ranges[name], found) for name, found in zip(names, parts, strict=True))


@dataclass(frozen=True)
class _Part:
    """What is known of one tensor over a chunk of images."""

    count: int
    total: float
    squares: float
    outside: int
    lows: Floats  # the smallest value of each image
    highs: Floats  # the largest


def _measure(values: Floats, bounds: Bounds) -> _Part:
    flat = values.reshape(len(values), -1)
    lows, highs = flat.min(axis=1), flat.max(axis=1)
    low, high = bounds
    within = low <= lows.min() and highs.max() <= high
    return _Part(
        count=values.size,
        total=float(values.sum(dtype=np.float64)),
        squares=float(np.square(values, dtype=np.float64).sum()),
        outside=0 if within else int(((values < low) | (values > high)).sum()),
        lows=lows,
        highs=highs,
    )


def _summarise(name: str, bounds: Bounds, parts: Sequence[_Part]) -> TensorCoverage:
    lows, highs = (np.concatenate([getattr(part, end) for part in parts]) for end in ("lows", "highs"))
    magnitudes = [float(value) for value in np.maximum(np.abs(lows), np.abs(highs))]
    number = len(magnitudes)
    top = max(magnitudes) or 1.0
    ends = [max(1, number * part // PARTS) for part in range(1, PARTS + 1)]
    count = sum(part.count for part in parts)
    mean = sum(part.total for part in parts) / count
    half, whole = magnitudes[: number // 2], sum(magnitudes) / number
    return TensorCoverage(
        name=name,
        low=bounds[0],
        high=bounds[1],
        smallest=float(lows.min()),
        largest=float(highs.max()),
        deviation=max(0.0, sum(part.squares for part in parts) / count - mean * mean) ** 0.5,
        saturated=sum(part.outside for part in parts) / count,
        growth=tuple(max(magnitudes[:end]) / top for end in ends),
        drift=abs(sum(half) / len(half) / whole - 1) if whole else 0.0,
    )


def _warnings(
    classes: Mapping[str, int],
    patients: int | None,
    labels: Sequence[str],
    tensors: Sequence[TensorCoverage],
) -> tuple[str, ...]:
    found = []
    missing = sorted(set(labels) - set(classes))
    if missing:
        found.append(f"the set has no image of {', '.join(missing)}: its values may lie beyond the ranges")
    rare, common = min(classes, key=lambda k: (classes[k], k)), max(classes, key=lambda k: (classes[k], k))
    if classes[common] > LOPSIDED * classes[rare]:
        found.append(f"the set is lopsided: {classes[common]} images of {common}, {classes[rare]} of {rare}")
    images = sum(classes.values())
    if patients is not None and images > IMAGES_A_PATIENT * patients:
        found.append(f"{images} images come from only {patients} patients")
    about = []
    for tensor in tensors:
        if tensor.drift > SETTLED:
            about.append(f"{tensor.name} still moves by {tensor.drift:.0%} in the second half: add images")
        if tensor.saturated > SATURATED:
            about.append(f"{tensor.name} saturates in {tensor.saturated:.1%} of its values")
    if len(about) > MOST_ROWS:
        about[MOST_ROWS:] = [f"and {len(about) - MOST_ROWS} more warnings like these"]
    return tuple(found + about)
