"""Where the evidence for answers lies: shares outside the central chest by class, held against occlusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.evaluate.agreement import Estimate, beyond_all, bootstrap, divide
from edge_dsc.infer.classify import SMALLEST, prepare_picture
from edge_dsc.page.heat import CENTRAL_MARGIN, OUTSIDE_AREA, outside_share
from engines.contract import ModelContract
from engines.images import InputPixels
from engines.runtimes import Runner
from engines.text_table import Table

OCCLUDED_IMAGES = 24
_TILES = 7  # a side; with 224 pixels a tile hides 32 of them
# Blurred with half a tile's side, a part keeps its brightness and loses what is in it. Grey or black would bring edges
# that are in no X-ray, and these have features of their own.
# Source: Fong and Vedaldi, Interpretable Explanations of Black Boxes by Meaningful Perturbation, ICCV 2017.
_BLUR = 1 / (2 * _TILES)  # deviation, of the side


class ClassEvidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images whose most probable class is this one.

    Attributes:
        images: Those with evidence for it.
        outside: Mean share of that evidence outside the central chest.
    """

    images: int
    outside: Estimate

    @property
    def warns(self) -> bool:
        """Whether more of it lies outside than of evidence that had no place of its own."""
        return self.outside.value > OUTSIDE_AREA


class Occlusion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What hiding parts of pictures does, which needs no maps.

    Attributes:
        images: Pictures that were looked at.
        correlation: Mean over them of the correlation between the evidence in a tile and what the class's score,
            against the mean of all classes, loses where the tile is blurred; None where nothing changed.
        changed: Share of them whose most probable class changes where all but the central chest is blurred.
    """

    images: int
    correlation: Estimate | None
    changed: Estimate


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the evidence for answers lies.

    Attributes:
        central_margin: What the central chest leaves out on each side, a share of the side.
        outside_area: Share of the picture outside it.
        per_class: By class name; without classes that are never the most probable.
        occlusion: The check by another way.
    """

    central_margin: float
    outside_area: float
    per_class: Mapping[str, ClassEvidence]
    occlusion: Occlusion


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplainedImages:
    """Images with what an engine answered and why.

    Attributes:
        paths: Files of N images.
        patients: Patient of each.
        top: Most probable class of each, ``[N]``.
        evidence: For that class, by place, ``[N, height, width]``.
    """

    paths: Sequence[Path]
    patients: Sequence[str]
    top: NDArray[np.int64]
    evidence: NDArray[np.float32]


def measure_evidence(images: ExplainedImages, runner: Runner, seed: int = 0) -> Evidence:
    """Measure where the evidence lies, and hide parts of some of the pictures as a check.

    Args:
        images: What was answered, at least one.
        runner: What answered.
        seed: Seed of the draws.
    """
    shares = [outside_share(one) for one in images.evidence]
    values = np.array([np.nan if share is None else share for share in shares])
    per_class = {}
    for index, label in enumerate(runner.record.contract.labels):
        rows = np.flatnonzero((images.top == index) & np.isfinite(values)).tolist()
        if rows:
            outside = _mean(values[rows], [images.patients[row] for row in rows], seed)
            per_class[label] = ClassEvidence(images=len(rows), outside=outside)
    return Evidence(
        central_margin=CENTRAL_MARGIN,
        outside_area=OUTSIDE_AREA,
        per_class=per_class,
        occlusion=_occlude(images, runner, seed),
    )


def _mean(values: NDArray[np.float64], patients: Sequence[str], seed: int) -> Estimate:
    (found,) = bootstrap(lambda weights: divide(weights @ values, weights.sum(axis=1))[None], patients, seed)
    return found


def _occlude(images: ExplainedImages, runner: Runner, seed: int) -> Occlusion:
    """Hide tiles of some pictures, evenly chosen, one after the other, and then all but the central chest."""
    chosen = np.unique(np.linspace(0, len(images.paths) - 1, OCCLUDED_IMAGES).astype(int)).tolist()
    correlations, patients, changed = [], [], []
    for row in chosen:
        pixels = prepare_picture(images.paths[row], runner.record.contract).pixels
        assert isinstance(pixels, np.ndarray), "it was answered a moment ago"
        answers = _answer(runner, _hidden(pixels, runner.record.contract))
        logits = np.log(np.maximum(answers.astype(np.float64), SMALLEST))
        scores = (logits - logits.mean(axis=1, keepdims=True))[:, images.top[row]]
        lost = scores[0] - scores[1:-1]
        held = cv2.resize(images.evidence[row], (_TILES, _TILES), interpolation=cv2.INTER_AREA).ravel()
        if np.ptp(lost) > 0 and np.ptp(held) > 0:
            correlations.append(float(np.corrcoef(lost, held)[0, 1]))
            patients.append(images.patients[row])
        changed.append(float(answers[-1].argmax() != answers[0].argmax()))
    whole = [images.patients[row] for row in chosen]
    return Occlusion(
        images=len(chosen),
        correlation=_mean(np.array(correlations), patients, seed) if correlations else None,
        changed=beyond_all(_mean(np.array(changed), whole, seed), len(set(whole))),
    )


def _hidden(pixels: InputPixels, contract: ModelContract) -> InputPixels:
    """Return a picture as it is, with each tile blurred in turn, and with all but the central chest blurred.

    Args:
        pixels: ``contract.input_shape``.
        contract: Says which axes are the sides.

    Returns:
        ``[1 + tiles + 1, *contract.input_shape]``.
    """
    planes = np.moveaxis(pixels, 0, -1) if contract.layout == "NCHW" else pixels
    height, width = planes.shape[:2]
    smooth = cv2.GaussianBlur(planes.astype(np.float32), (0, 0), _BLUR * max(height, width))
    blurred = np.round(smooth).reshape(planes.shape).astype(planes.dtype)
    copies = [planes]
    rows, columns = (np.linspace(0, side, _TILES + 1).round().astype(int) for side in (height, width))
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            copies.append(planes.copy())
            copies[-1][top:bottom, left:right] = blurred[top:bottom, left:right]
    down, across = round(height * CENTRAL_MARGIN), round(width * CENTRAL_MARGIN)
    inside = np.s_[down : height - down, across : width - across]
    bare = blurred.copy()
    bare[inside] = planes[inside]
    stacked = np.stack([*copies, bare])
    return np.ascontiguousarray(np.moveaxis(stacked, -1, 1)) if contract.layout == "NCHW" else stacked


def _answer(runner: Runner, pixels: InputPixels) -> NDArray[np.float32]:
    """Run any number of pictures in batches that the engine takes."""
    batch, count = runner.record.batch, len(pixels)
    answers = []
    for start in range(0, count, batch.best):
        part = pixels[start : start + batch.best]
        missing = batch.smallest - len(part)
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing > 0 else part
        answers.append(runner.run(padded)[: len(part)])
    return np.concatenate(answers)


def evidence_table(found: Evidence) -> Table:
    """Return where the evidence for each class lies, with a warning where much lies outside the central chest."""
    rows = []
    notes = [
        f"The central chest is the picture without {found.central_margin:.1%} on each side; outside lies"
        f" {found.outside_area:.1%} of its area."
    ]
    for label, one in found.per_class.items():
        share = f"{one.outside.value:.1%} [{one.outside.low:.1%}, {one.outside.high:.1%}]"
        rows.append((label, str(one.images), share, "HIGH" if one.warns else "no"))
        if one.warns:
            notes.append(
                f"warning: {one.outside.value:.0%} of the evidence for {label} lies outside the central chest, more"
                " than its share of the area: the network may know the class by something else than the lungs (markers,"
                " borders, the device)"
            )
    check = found.occlusion
    if check.correlation is not None:
        notes.append(
            f"Occlusion of {check.images} pictures, tile by tile: correlation with the evidence"
            f" {check.correlation.value:.2f} [{check.correlation.low:.2f}, {check.correlation.high:.2f}]."
        )
    notes.append(
        f"With all but the central chest blurred {check.changed.value:.0%}"
        f" [{check.changed.low:.0%}, {check.changed.high:.0%}] of them get another class."
    )
    return Table(
        title="Evidence for the most probable class outside the central chest",
        header=("class", "images", "outside", "high"),
        rows=tuple(rows),
        notes=tuple(notes),
    )
