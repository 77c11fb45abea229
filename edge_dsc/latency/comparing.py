"""``compare``: report files in, one comparison out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bench.compare import Comparison, Control, Ratio, compare_reports, compare_within
from bench.fleet import Fleet, compare_fleet
from bench.report import Report, load_report
from engines.errors import UsageError


def compare_files(reports: Sequence[Path], *, allow: Collection[str], margin: float) -> Comparison | Fleet:
    """Compare the engines of one report with its first, two reports engine by engine, or lay out many as a matrix.

    Args:
        reports: One report file, the baseline's and the candidate's, or three and more of a fleet.
        allow: Conditions that may differ.
        margin: Smallest difference worth a word, as a fraction.

    Raises:
        UsageError: A margin below 0, or a report given twice among many.
        ArtefactError: A report is damaged or foreign.
        NotComparableError: Different conditions, or nothing to compare with.
    """
    if not 0 <= margin < 1:
        raise UsageError(f"the margin is {margin * 100:g} %", remedy="give a --margin of 0 to 99 percent")
    if len(reports) > 2:
        return compare_fleet(_load_fleet(reports), allow=allow, margin=margin)
    loaded = [load_report(path) for path in reports]
    if len(loaded) == 2:
        return compare_reports(loaded[0], loaded[1], allow=allow, margin=margin)
    return compare_within(loaded[0], allow=allow, margin=margin)


def _load_fleet(paths: Sequence[Path]) -> dict[str, Report]:
    stems = [path.stem for path in paths]
    names = [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice", remedy="give each report once")
    return {name: load_report(path) for name, path in zip(names, paths, strict=True)}


def comparison_to_dict(found: Comparison | Fleet) -> dict[str, Any]:
    """Return a comparison as JSON-ready values."""
    if isinstance(found, Fleet):
        return _fleet_to_dict(found)
    return {
        "rows": [ratio_to_dict(row) for row in found.rows],
        "only_baseline": list(found.only_baseline),
        "only_candidate": list(found.only_candidate),
        "allowed": list(found.allowed),
        "cautions": list(found.cautions),
        "controls": [_control_to_dict(control) for control in found.controls],
    }


def _fleet_to_dict(fleet: Fleet) -> dict[str, Any]:
    devices = [
        {
            **vars(device),
            "medians_ns": dict(device.medians_ns),
            "ratios": {name: ratio_to_dict(ratio) for name, ratio in device.ratios.items()},
            "cautions": list(device.cautions),
            "controls": [_control_to_dict(control) for control in device.controls],
        }
        for device in fleet.devices
    ]
    return {
        "engines": list(fleet.engines),
        "devices": devices,
        "margin": fleet.margin,
        "allowed": list(fleet.allowed),
    }


def _control_to_dict(control: Control) -> dict[str, Any]:
    return {**vars(control), "ratio": dict(vars(control.ratio)), "verdict": control.verdict.value}


def ratio_to_dict(ratio: Ratio) -> dict[str, Any]:
    """Return a ratio as JSON-ready values; times in nanoseconds."""
    return {
        **vars(ratio),
        "ratio": dict(vars(ratio.ratio)),
        "verdict": ratio.verdict.value,
        "allowed": list(ratio.allowed),
    }
