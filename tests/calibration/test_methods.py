from __future__ import annotations

import pytest

from calibration.table import METHODS, CalibrationOptions
from engines.errors import UsageError


def test_an_unknown_method_is_refused() -> None:
    assert METHODS == ("mse", "entropy", "minmax", "percentile")
    with pytest.raises(UsageError, match="no calibration method 'random'") as caught:
        CalibrationOptions(method="random")
    assert caught.value.remedy == "choose one of mse, entropy, minmax, percentile"


@pytest.mark.parametrize("percentile", [50, 100.1, float("nan")])
def test_a_percentile_outside_its_range_is_refused(percentile: float) -> None:
    with pytest.raises(UsageError, match="percentile"):
        CalibrationOptions(method="percentile", percentile=percentile)
