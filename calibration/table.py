"""The calibration table: a method, the range of every tensor, and the hashes that tie them to images and model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from engines.contract import Count, Number, Seed, Sha256, Text
from engines.errors import ArtefactError, UsageError
from engines.files import DocumentKind
from engines.graph import OnnxModel
from engines.images import LEVEL_BINS

METHODS = ("mse", "entropy", "minmax", "percentile")
# Found by TensorRT's own calibrators, for a build without Q/DQ pairs; with the name of its algorithm in a cache.
TENSORRT_METHODS = {"tensorrt-entropy": "EntropyCalibration2", "tensorrt-minmax": "MinMaxCalibration"}
QAT_METHOD = "qat"  # ranges that quantisation-aware fine-tuning learnt; no calibration finds them
DEFAULT_METHOD = "mse"
MINIMUM_IMAGES = 128
DEFAULT_SEED = 0
DEFAULT_PERCENTILE = 99.99
# Of the signed graph's weights. Learnt in chains alone (calibration.chain.rounding).
ROUNDINGS = ("nearest", "adaround")
DEFAULT_ROUNDING = "adaround"

# onnxruntime's histogram spans -max..max. Its own default of 128 bins for 128 levels makes the entropy method
# find what minmax finds; TensorRT uses 2,048 bins, and 128 levels for the magnitudes, so 256 for both signs.
HISTOGRAM_BINS = 2048
QUANTIZED_BINS = 256


# A search finds 1 to 1,000 (calibration.chain.search); far beyond it weights overflow, and the engine answers nonsense.
_Factor: TypeAlias = Annotated[float, Meta(ge=1e-6, le=1e6)]
_Base64: TypeAlias = Annotated[str, Meta(max_length=1 << 24, pattern=r"\A[A-Za-z0-9+/]*={0,2}\Z")]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a calibration is asked for.

    Attributes:
        method: One of :data:`METHODS`.
        seed: The seed that chose the images; kept in the table.
        percentile: For ``percentile``: how much of a tensor's values the range holds, in percent; half of
            the rest is cut on either side.
        rounding: One of :data:`ROUNDINGS`; None takes :data:`DEFAULT_ROUNDING` where the network allows it.
        bias_correction: Whether the mean error of each channel goes into its bias; None does it where the network
            allows it.

    Raises:
        UsageError: Another method or rounding, or a percentile outside 50 to 100.
    """

    method: str = DEFAULT_METHOD
    seed: int = DEFAULT_SEED
    percentile: float = DEFAULT_PERCENTILE
    rounding: str | None = None
    bias_correction: bool | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.method not in METHODS:
            raise UsageError(
                f"there is no calibration method {self.method!r}",
                remedy=f"choose one of {', '.join(METHODS)}",
            )
        if self.rounding not in (None, *ROUNDINGS):
            raise UsageError(
                f"there is no rounding {self.rounding!r}", remedy=f"choose one of {', '.join(ROUNDINGS)}"
            )
        if not 50 < self.percentile <= 100:
            raise UsageError(
                f"percentile {self.percentile} is not in 50..100", remedy="99.9 to 99.999 is usual"
            )


class CalibrationImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that was calibrated on: its path below the folder of all of them, its class, its hash."""

    name: str
    label: str
    sha256: Text


class SkippedImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that could not be read, and why."""

    name: str
    reason: str


class Correction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was learnt of a layer of the signed graph (:mod:`calibration.chain.rounding`).

    Attributes:
        bias: What is added to the bias of each output channel, in the output's own unit; empty adds nothing.
        rounded_up: Whether each weight is rounded up or down to its grid: one bit for each, in the order in which the
            weight is stored, eight to a byte, in base64; empty rounds to nearest.
    """

    bias: tuple[Number, ...] = ()
    rounded_up: _Base64 = ""


class CalibrationTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ranges of activation tensors, tied to a model, a preprocess and images.

    The same inputs give the same bytes.

    Attributes:
        method: How the ranges were found: one of :data:`METHODS`; one of :data:`TENSORRT_METHODS`; or ``qat`` where
            quantisation-aware fine-tuning learnt them with the weights; then the images are those of the training.
        parameters: The method's own settings, such as ``{"percentile": 99.99, "histogram_bins": 2048}``.
        seed: The seed that chose the images.
        onnx_sha256: Hash of the FP32 model's file.
        preprocess_sha256: Hash of the contract's preprocess.
        versions: Versions of the packages that the ranges depend on.
        ranges: ``(lowest, highest)`` of each tensor in the tensor's own unit, as found; what a signed or unsigned
            graph makes of them is up to :func:`calibration.qdq.quantize`.
        channel_factors: Tensors whose channels are multiplied by factors before they are quantised, with one
            positive factor per channel (:mod:`calibration.rewrites`); their ranges are of the tensors after that.
        images: The images.
        skipped: The images that could not be read.
        pixel_levels: How many pixels of these images, as the network takes them, lie in each of
            :data:`engines.images.LEVEL_BINS` equal parts of grey 0..255; empty in tables before version 3, and in those
            of training. What a run sees is held against it (:mod:`edge_dsc.infer.live_page.monitoring`).
        corrections: By name of the layer, what was learnt for the signed graph beyond its ranges; layers that are not
            named are rounded to nearest. Empty in tables before version 4.
    """

    method: Text
    parameters: Mapping[Text, Seed | Number]
    seed: Seed
    onnx_sha256: Sha256
    preprocess_sha256: Sha256
    versions: Mapping[Text, Text]
    ranges: Mapping[Text, tuple[Number, Number]]
    channel_factors: Mapping[Text, tuple[_Factor, ...]] = msgspec.field(default_factory=dict)
    images: tuple[CalibrationImage, ...]
    skipped: tuple[SkippedImage, ...] = ()
    pixel_levels: tuple[Count, ...] = ()
    corrections: Mapping[Text, Correction] = msgspec.field(default_factory=dict)

    @property
    def implicit(self) -> bool:
        """Whether TensorRT found the ranges for itself: no Q/DQ graph is made of them."""
        return self.method in TENSORRT_METHODS

    def describe_corrections(self) -> str:
        """Say what was learnt for the signed graph; empty where nothing was."""
        learnt = sum(bool(each.rounded_up) for each in self.corrections.values())
        shifted = sum(bool(each.bias) for each in self.corrections.values())
        parts = [f"roundings of {learnt} layers learnt by AdaRound"] if learnt else []
        parts += [f"biases of {shifted} layers corrected"] if shifted else []
        return ", ".join(parts)


def calibrate_command(
    *, model: Path | None = None, method: str = DEFAULT_METHOD, out: Path | None = None
) -> str:
    """Return the command line that makes a table again; what is not known stands as MODEL, DIR and TABLE."""
    words = ["edge-dsc", "calibrate", str(model or "MODEL"), "--calib-data", "DIR", "--calib-method", method]
    return shlex.join([*words, "--out", str(out or "TABLE")])


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Fill in what version 1 gained under its own number."""
    return {"channel_factors": {}, **body}


def _from_version_2(body: dict[str, Any]) -> dict[str, Any]:
    """Add what version 3 added."""
    return {"pixel_levels": [], **body}


def _from_version_3(body: dict[str, Any]) -> dict[str, Any]:
    """Add what version 4 added."""
    return {"corrections": {}, **body}


TABLE = DocumentKind(
    name="edge-dsc/calibration-table",
    version=4,
    body=CalibrationTable,
    renew=calibrate_command(),
    seal="table_sha256",
    older={1: _from_version_1, 2: _from_version_2, 3: _from_version_3},
)


def save_table(path: Path, table: CalibrationTable) -> None:
    """Write a table, sealed with a hash of its own content; sorted and without a time: same inputs, same bytes."""
    TABLE.save(
        path,
        msgspec.structs.replace(
            table,
            parameters=dict(sorted(table.parameters.items())),
            versions=dict(sorted(table.versions.items())),
            ranges=dict(sorted(table.ranges.items())),
            channel_factors=dict(sorted(table.channel_factors.items())),
            corrections=dict(sorted(table.corrections.items())),
            images=tuple(sorted(table.images, key=lambda image: (image.label, image.name))),
            skipped=tuple(sorted(table.skipped, key=lambda image: image.name)),
        ),
    )


def load_table(path: Path) -> CalibrationTable:
    """Read a table.

    Raises:
        ArtefactError: Missing, of another kind or version, edited by hand, or senseless.
    """
    renew = calibrate_command(out=path)
    table = TABLE.load(path, renew=renew)
    wrong = _nonsense(table)
    if wrong:
        raise ArtefactError(f"{path} {wrong}", remedy=f"make it again: {renew}")
    return table


def check_table(table: CalibrationTable, model: OnnxModel, *, path: Path | None = None) -> None:
    """Hold a table against the model that is to be quantised with it.

    Args:
        table: The table.
        model: The FP32 ONNX model.
        path: The table's own file, for the remedy.

    Raises:
        ArtefactError: The table is of another model, of other weights, or of another preprocess.
    """
    method = DEFAULT_METHOD if table.method == QAT_METHOD else table.method
    remedy = f"calibrate again: {calibrate_command(model=model.path, method=method, out=path)}"
    expected = model.contract.preprocess_sha256
    if table.preprocess_sha256 != expected:
        raise ArtefactError(
            f"the calibration table is of another preprocess ({table.preprocess_sha256[:12]}) "
            f"than {model.path} ({expected[:12]})",
            remedy=remedy,
        )
    if table.onnx_sha256 != model.sha256:
        raise ArtefactError(
            f"the calibration table is of another model (ONNX {table.onnx_sha256[:12]}) "
            f"than {model.path} ({model.sha256[:12]})",
            remedy=remedy,
        )


def _nonsense(table: CalibrationTable) -> str | None:
    """Say what in a table cannot be true, or None."""
    if table.method not in (*METHODS, *TENSORRT_METHODS, QAT_METHOD):
        return f"names the unknown method {table.method!r}"
    for name, (low, high) in table.ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            return f"holds no range for {name}: {low}..{high}"
    for name, factors in table.channel_factors.items():
        if not factors:
            return f"holds no channel factors for {name}"
    if not table.ranges:
        return "holds no ranges"
    levels = table.pixel_levels
    if levels and (len(levels) != LEVEL_BINS or not sum(levels)):
        return f"holds {len(levels)} grey levels of {sum(levels)} pixels"
    if table.implicit and "trt_version" not in table.parameters:
        return "does not say which release's cache it holds"
    if len(table.images) < MINIMUM_IMAGES and table.method != QAT_METHOD:
        return f"was made on {len(table.images)} images, at least {MINIMUM_IMAGES} are needed"
    return None
