from __future__ import annotations

from pathlib import Path

import pytest

from edge_dsc.build.gate import GateOptions
from engines.errors import UsageError


@pytest.mark.parametrize("drop", [-0.1, 101, float("nan")])
def test_a_budget_that_makes_no_sense(drop: float) -> None:
    with pytest.raises(UsageError, match="a budget of"):
        GateOptions(data=Path("x"), max_drop=drop)
