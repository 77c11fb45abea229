from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from bench.plan import Plan
from bench.report import BlockSamples, Report, SubjectReport

MakeReport = Callable[..., Report]


@pytest.fixture
def make_report() -> MakeReport:
    return _make_report


def _make_report(
    medians_ms: Mapping[str, float | Sequence[float]],
    *,
    samples: int = 3,
    spread: float = 0.0,
    stages: Mapping[str, float] | None = None,
    passes: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    states: tuple[Any, ...] = (),
) -> Report:
    """Make a report with one block per second: of each median given, or twenty of a single one."""
    rng = np.random.default_rng(3)
    subjects = []
    for name, given in medians_ms.items():
        medians = [given] * 20 if isinstance(given, int | float) else given
        blocks = tuple(
            BlockSamples(
                opening=index // 4,
                round=index,
                start_ns=index * 10**9,
                samples_ns=array(
                    "q", np.round(median * 1e6 * rng.lognormal(0, spread, samples)).astype(int).tolist()
                ),
                stages_ns=dict(stages or {}),
            )
            for index, median in enumerate(medians)
        )
        subjects.append(SubjectReport(name=name, description={}, blocks=blocks, passes=dict(passes or {})))
    machine = dict(environment or {})
    return Report(
        subjects=tuple(subjects),
        plan=Plan(),
        environment=machine,
        environment_end=machine,
        created="2026-11-01T12:00:00+00:00",
        states=states,
    )
