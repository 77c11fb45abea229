from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.compare import compare_within, require_stable, unstable_subjects
from bench.machine import crowded, read_scheduled, waiting_share
from bench.tables import render_report
from engines.errors import UnstableError

Make = Callable[..., Any]


def state(ran_ms: int | None, waited_ms: int | None) -> dict[str, Any]:
    return {
        "ran_ns": None if ran_ms is None else ran_ms * 10**6,
        "waited_ns": None if waited_ms is None else waited_ms * 10**6,
    }


@pytest.mark.parametrize(
    ("states", "share"),
    [
        ([state(100, 50), state(150, 60), state(190, 60)], 0.1),
        ([state(100, 50), state(190, 50)], 0.0),
        ([state(100, 50), state(0, 60)], 1.0),  # the thread that had run has ended
        ([state(100, 50), state(100, 50)], None),
        ([state(100, 50)], None),
        ([state(None, None), state(None, None)], None),
        ([{}, {}], None),
        ([], None),
    ],
)
def test_the_share_is_of_the_time_that_the_process_wanted(
    states: list[dict[str, Any]], share: float | None
) -> None:
    assert waiting_share(states) == share


def test_up_to_the_limit_nothing_is_said() -> None:
    assert crowded([state(0, 0), state(95, 5)]) == ()
    assert crowded([state(0, 0), state(94, 6)]) == (
        "other programs had the processor for 6% of the time that the measurement wanted it, 5% is the limit",
    )


def test_a_crowded_measurement_is_unstable_and_says_so(subject: Make, report: Make) -> None:
    steady = (subject("a", [[5]] * 6), subject("b", [[6]] * 6))
    require_stable(report(*steady, states=(state(0, 0), state(97, 3))))
    made = report(*steady, states=(state(0, 0), state(60, 40)))
    (line,) = unstable_subjects(made)
    assert line.startswith("other programs had the processor for 40% of the time")
    with pytest.raises(UnstableError, match="other programs had the processor for 40%"):
        require_stable(made)
    assert f"* unstable: {line}" in render_report(made).splitlines()
    assert compare_within(made).cautions == (line,)


def test_this_process_runs_and_its_time_grows() -> None:
    before = read_scheduled()
    if before["ran_ns"] is None:
        pytest.skip("this kernel keeps no account")
    sum(range(2_000_000))
    after = read_scheduled()
    assert after["ran_ns"] is not None and after["ran_ns"] > before["ran_ns"]
    assert after["waited_ns"] is not None and after["waited_ns"] >= 0


def test_a_kernel_without_the_account_tells_nothing(tmp_path: Path) -> None:
    assert read_scheduled(tmp_path) == {"ran_ns": None, "waited_ns": None}
