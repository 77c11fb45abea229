"""The calibration table: a method, the range of every tensor, and the hashes that tie them to images and model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import ArtefactError, UsageError
from engines.files import read_sealed_document, write_sealed_document
from engines.graph import OnnxModel

METHODS = ("mse", "entropy", "minmax", "percentile")
QAT_METHOD = "qat"  # ranges that quantisation-aware fine-tuning learnt; no calibration finds them
DEFAULT_METHOD = "mse"
MINIMUM_IMAGES = 128
DEFAULT_IMAGES = 256
DEFAULT_SEED = 0
DEFAULT_PERCENTILE = 99.99

# onnxruntime's histogram spans -max..max. Its own default of 128 bins for 128 levels makes the entropy method
# find what minmax finds; TensorRT uses 2,048 bins, and 128 levels for the magnitudes, so 256 for both signs.
HISTOGRAM_BINS = 2048
QUANTIZED_BINS = 256


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a calibration is asked for.

    Attributes:
        method: One of :data:`METHODS`.
        seed: The seed that chose the images; kept in the table.
        percentile: For ``percentile``: how much of a tensor's values the range holds, in percent; half of
            the rest is cut on either side.

    Raises:
        UsageError: Another method, or a percentile outside 50 to 100.
    """

    method: str = DEFAULT_METHOD
    seed: int = DEFAULT_SEED
    percentile: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        """Check the values."""
        if self.method not in METHODS:
            raise UsageError(
                f"there is no calibration method {self.method!r}",
                remedy=f"choose one of {', '.join(METHODS)}",
            )
        if not 50 < self.percentile <= 100:
            raise UsageError(
                f"percentile {self.percentile} is not in 50..100", remedy="99.9 to 99.999 is usual"
            )


KIND = "edge-dsc/calibration-table"
SCHEMA_VERSION = 1
_SEAL = "table_sha256"


@dataclass(frozen=True)
class CalibrationImage:
    """An image that was calibrated on: its path below the folder of all of them, its class, its hash."""

    name: str
    label: str
    sha256: str


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CalibrationTable:
    """Ranges of activation tensors, tied to a model, a preprocess and images.

    The same inputs give the same bytes.

    Attributes:
        method: How the ranges were found: one of :data:`calibration.table.METHODS`, or ``qat`` where
            quantisation-aware fine-tuning learnt them with the weights; then the images are those of the training.
        parameters: The method's own settings, such as ``{"percentile": 99.99, "histogram_bins": 2048}``.
        seed: The seed that chose the images.
        ranges: ``(lowest, highest)`` of each tensor, float32 values in the tensor's own unit, as found;
            what a signed or unsigned graph makes of them is :func:`calibration.qdq.quantize`'s affair.
        onnx_sha256: Hash of the FP32 model's file.
        preprocess_sha256: Hash of the contract's preprocess.
        images: The images, sorted.
        skipped: The images that could not be read, sorted.
        versions: Versions of the packages that the ranges depend on.
        channel_factors: Tensors whose channels are multiplied by factors before they are quantised, with one
            positive factor a channel (:mod:`calibration.rewrites`); their ranges are of the tensors after that.
    """

    method: str
    parameters: Mapping[str, float]
    seed: int
    ranges: Mapping[str, tuple[float, float]]
    onnx_sha256: str
    preprocess_sha256: str
    images: tuple[CalibrationImage, ...]
    skipped: tuple[SkippedImage, ...] = field(default=())
    versions: Mapping[str, str]
    channel_factors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values, sorted."""
        return {
            "method": self.method,
            "parameters": dict(sorted(self.parameters.items())),
            "seed": self.seed,
            "onnx_sha256": self.onnx_sha256,
            "preprocess_sha256": self.preprocess_sha256,
            "versions": dict(sorted(self.versions.items())),
            "ranges": {name: list(self.ranges[name]) for name in sorted(self.ranges)},
            "channel_factors": {
                name: list(self.channel_factors[name]) for name in sorted(self.channel_factors)
            },
            "images": [
                asdict(image) for image in sorted(self.images, key=lambda image: (image.label, image.name))
            ],
            "skipped": [asdict(image) for image in sorted(self.skipped, key=lambda image: image.name)],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> CalibrationTable:
        """Rebuild a table from JSON values.

        Raises:
            ArtefactError: A field is missing, unknown or of the wrong type, or a value makes no sense.
        """
        try:
            table = cls(
                **{
                    **values,
                    "ranges": {
                        name: (float(low), float(high)) for name, (low, high) in values["ranges"].items()
                    },
                    "channel_factors": {
                        name: tuple(float(factor) for factor in factors)
                        for name, factors in values.get("channel_factors", {}).items()
                    },
                    "images": tuple(CalibrationImage(**image) for image in values["images"]),
                    "skipped": tuple(SkippedImage(**image) for image in values["skipped"]),
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{source} is no calibration table: {error}", remedy=_renew(source)
            ) from error
        wrong = _nonsense(table)
        if wrong:
            raise ArtefactError(f"{source} {wrong}", remedy=_renew(source))
        return table


def save_table(path: Path, table: CalibrationTable) -> None:
    """Write a table, sealed with a hash of its own content; no time in it: same inputs, same bytes."""
    write_sealed_document(path, KIND, SCHEMA_VERSION, table.to_dict(), seal=_SEAL)


def load_table(path: Path) -> CalibrationTable:
    """Read a table.

    Raises:
        ArtefactError: Missing, of another kind or version, edited by hand, or senseless.
    """
    body = read_sealed_document(path, KIND, SCHEMA_VERSION, seal=_SEAL, renew=calibrate_command(out=path))
    return CalibrationTable.from_dict(body, source=str(path))


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
    contract = model.contract
    if table.preprocess_sha256 != contract.preprocess_sha256:
        raise ArtefactError(
            f"the calibration table is of another preprocess ({table.preprocess_sha256[:12]}) "
            f"than {model.path} ({contract.preprocess_sha256[:12]})",
            remedy=remedy,
        )
    seen = model.sha256
    if table.onnx_sha256 != seen:
        raise ArtefactError(
            f"the calibration table is of another model (ONNX {table.onnx_sha256[:12]}) "
            f"than {model.path} ({seen[:12]})",
            remedy=remedy,
        )


def calibrate_command(
    *, model: Path | None = None, method: str = DEFAULT_METHOD, out: Path | None = None
) -> str:
    """Return the command line that makes a table anew; what is not known stands as MODEL, DIR and TABLE."""
    words = ["edge-dsc", "calibrate", str(model or "MODEL"), "--calib-data", "DIR", "--calib-method", method]
    return shlex.join([*words, "--out", str(out or "TABLE")])


def _renew(source: str) -> str:
    return f"make it anew: {calibrate_command(out=Path(source))}"


def _nonsense(table: CalibrationTable) -> str | None:
    """Say what in a table cannot be true, or None."""
    if table.method not in (*METHODS, QAT_METHOD):
        return f"names the unknown method {table.method!r}"
    for name, (low, high) in table.ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            return f"holds no range for {name}: {low}..{high}"
    for name, factors in table.channel_factors.items():
        if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
            return f"holds senseless channel factors for {name}"
    if not table.ranges:
        return "holds no ranges"
    if len(table.images) < MINIMUM_IMAGES and table.method != QAT_METHOD:
        return f"was made on {len(table.images)} images, at least {MINIMUM_IMAGES} are needed"
    return None
