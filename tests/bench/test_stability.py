from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.compare import require_stable, unstable_subjects
from engines.errors import UnstableError

Make = Callable[..., Any]


def test_steady_blocks_are_stable_whatever_their_tail(subject: Make, report: Make) -> None:
    made = report(subject("a", [[100, 100, 10_000], [101, 101, 90_000], [99, 99, 99], [100], [100]]))
    assert unstable_subjects(made) == ()
    require_stable(made)


def test_scattered_and_few_blocks_are_named(subject: Make, report: Make) -> None:
    made = report(
        subject("noisy", [[100], [150], [100], [60], [130], [80]]),
        subject("short", [[100]] * 4),
        subject("fine", [[100]] * 5),
        subject("dead", [], error="gone"),
    )
    assert unstable_subjects(made) == (
        "noisy's block medians scatter by 37 %, 10 % is the limit",
        "short has 4 blocks, 5 are needed",
    )
    with pytest.raises(UnstableError, match=r"noisy's block medians .*; short has 4 blocks") as caught:
        require_stable(made)
    assert caught.value.remedy
