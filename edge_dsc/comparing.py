"""``compare``: report files in, one comparison out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bench.compare import Comparison, Ratio, compare_reports, compare_within
from bench.report import load_report
from engines.errors import UsageError


def compare_files(reports: Sequence[Path], *, allow: Collection[str], margin: float) -> Comparison:
    """Compare the engines of one report with its first, or two reports engine by engine.

    Args:
        reports: One report file, or the baseline's and the candidate's.
        allow: Conditions that may differ.
        margin: Smallest difference worth a word, as a fraction.

    Raises:
        UsageError: More than two reports, or a margin below 0.
        ArtefactError: A report is damaged or foreign.
        NotComparableError: Different conditions, or nothing to compare with.
    """
    if not 0 <= margin < 1:
        raise UsageError(f"the margin is {margin * 100:g} %", remedy="give a --margin of 0 to 99 percent")
    if len(reports) > 2:
        raise UsageError(f"{len(reports)} reports are given", remedy="give one or two")
    loaded = [load_report(path) for path in reports]
    if len(loaded) == 2:
        return compare_reports(loaded[0], loaded[1], allow=allow, margin=margin)
    return compare_within(loaded[0], allow=allow, margin=margin)


def comparison_to_dict(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON-ready values."""
    return {
        "rows": [ratio_to_dict(row) for row in found.rows],
        "only_baseline": list(found.only_baseline),
        "only_candidate": list(found.only_candidate),
        "allowed": list(found.allowed),
        "cautions": list(found.cautions),
        "controls": [
            {**vars(control), "ratio": dict(vars(control.ratio)), "verdict": control.verdict.value}
            for control in found.controls
        ],
    }


def ratio_to_dict(ratio: Ratio) -> dict[str, Any]:
    """Return a ratio as JSON-ready values; times in nanoseconds."""
    return {
        **vars(ratio),
        "ratio": dict(vars(ratio.ratio)),
        "verdict": ratio.verdict.value,
        "allowed": list(ratio.allowed),
    }
