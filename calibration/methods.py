"""How ranges can be found, and how many real images that takes."""

from __future__ import annotations

from dataclasses import dataclass

from engines.errors import UsageError

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
