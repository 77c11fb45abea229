"""Report files compared: one with itself, two side by side, many as a matrix of devices and engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.compare import (
    CONDITIONS,
    DEFAULT_RULES,
    Comparison,
    Control,
    Ratio,
    Rules,
    check_conditions,
    compare_reports,
    compare_subjects,
    compare_within,
    find_controls,
    report_cautions,
    subject_conditions,
)
from bench.report import Report, load_report
from bench.statistics import MARGIN, sample_median
from engines.errors import NotComparableError, UnstableError, UsageError

_NAMES = ("jetson", "gpu", "machine", "cpu")  # of a device: the first that its environment knows


@dataclass(frozen=True, kw_only=True)
class Device:
    """One report of a fleet.

    Attributes:
        name: What the machine is, unique in the fleet.
        source: Where the report came from.
        medians_ns: Engine name -> median latency of all its samples, nanoseconds.
        ratios: Engine name -> its ratio to the fleet's first engine on this device, paired.
        cautions: What makes the ground unfirm.
        controls: What was opened and measured twice.
    """

    name: str
    source: str
    medians_ns: Mapping[str, float]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()
    controls: tuple[Control, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A matrix of devices and engines.

    Attributes:
        engines: Every engine of the reports, in the order of their first appearance.
        devices: One per report, in the order given.
        margin: The margin that ratios were judged by.
        allowed: Conditions that differ between reports and were allowed to.
    """

    engines: tuple[str, ...]
    devices: tuple[Device, ...]
    margin: float = MARGIN
    allowed: tuple[str, ...] = ()

    @property
    def controls(self) -> tuple[Control, ...]:
        """The controls of all devices."""
        return tuple(control for device in self.devices for control in device.controls)


def compare_files(reports: Sequence[Path], *, allow: Collection[str], margin: float) -> Comparison | Fleet:
    """Compare the engines of one report with its first, two reports engine by engine, or lay out many as a matrix.

    Args:
        reports: One report file, the baseline's and the candidate's, or three and more of a fleet.
        allow: Conditions that may differ.
        margin: Smallest difference worth a word, as a fraction.

    Raises:
        UsageError: A margin below 0, an unknown condition, or a report given twice among many.
        ArtefactError: A report is damaged or foreign.
        NotComparableError: Different conditions, or nothing to compare with.
    """
    if not 0 <= margin < 1:
        raise UsageError(f"the margin is {margin * 100:g} %", remedy="give a --margin of 0 to 99 percent")
    unknown = sorted(key for key in allow if key.partition(".")[0] not in CONDITIONS)
    if unknown:
        raise UsageError(
            f"--allow {unknown[0]!r} is no condition", remedy=f"conditions are {', '.join(CONDITIONS)}"
        )
    rules = Rules(allow=allow, margin=margin)
    if len(reports) > 2:
        names = _source_names(reports)
        return compare_fleet(
            {name: load_report(path) for name, path in zip(names, reports, strict=True)}, rules
        )
    first, *second = map(load_report, reports)
    return compare_reports(first, second[0], rules) if second else compare_within(first, rules=rules)


def _source_names(paths: Sequence[Path]) -> list[str]:
    """Name report files by their stems, where two have one stem by their paths."""
    stems = [path.stem for path in paths]
    names = [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice", remedy="give each report once")
    return names


def compare_fleet(reports: Mapping[str, Report], rules: Rules = DEFAULT_RULES) -> Fleet:
    """Put reports of many machines beside each other.

    Machines may differ, that is what a fleet is for. An engine's batch, threads and switches may not, nor may
    the scenario.

    Args:
        reports: Where each report came from -> the report.
        rules: How.

    Raises:
        NotComparableError: Conditions that differ: the text names the report and the keys.
    """
    allowed = _check_fleet(reports, rules.allow)
    engines = tuple(dict.fromkeys(subject.name for report in reports.values() for subject in report.measured))
    within = replace(rules, allow=())  # on one device nothing may differ
    devices = []
    for name, (source, report) in zip(_device_names(reports), reports.items(), strict=True):
        ratios, refused = _ratios(report, engines, within)
        failed = [f"{subject.name} failed: {subject.error}" for subject in report.failed]
        device = Device(
            name=name,
            source=source,
            medians_ns={subject.name: sample_median(subject) for subject in report.measured},
            ratios=ratios,
            cautions=report_cautions(report, *failed, *refused),
            controls=find_controls(report, within),
        )
        devices.append(device)
    return Fleet(engines=engines, devices=tuple(devices), margin=rules.margin, allowed=allowed)


def _ratios(report: Report, engines: Sequence[str], rules: Rules) -> tuple[dict[str, Ratio], list[str]]:
    """Compare each engine that the report measured with the first; return the ratios and why others have none."""
    measured = {subject.name for subject in report.measured}
    ratios, refused = {}, []
    for engine in engines[1:]:
        if engine in measured and engines[0] in measured:
            try:
                ratios[engine] = compare_subjects(report, engines[0], engine, rules)
            except (NotComparableError, UnstableError) as error:
                refused.append(f"{engine}: {error.what.removeprefix(f'{engine}: ')}")
    return ratios, refused


def _check_fleet(reports: Mapping[str, Report], allow: Collection[str]) -> tuple[str, ...]:
    """Hold every report against the first one that has the engine."""
    differing: list[str] = []
    scenario: dict[str, object] | None = None
    seen: dict[str, Mapping[str, object]] = {}
    for source, report in reports.items():
        here: dict[str, object] = {"scenario": report.plan.scenario}
        scenario = scenario or here
        differing += check_conditions(scenario, here, allow, f"{source}: ")
        for subject in report.measured:
            conditions = subject_conditions(subject)
            first = seen.setdefault(subject.name, conditions)
            differing += check_conditions(first, conditions, allow, f"{source}: {subject.name}: ")
    return tuple(dict.fromkeys(differing))


def _device_names(reports: Mapping[str, Report]) -> list[str]:
    """Name the machines; where two have one name, their sources tell them apart."""
    plain = []
    for report in reports.values():
        known = (report.environment.get(key) for key in _NAMES)
        plain.append(str(next((name for name in known if name), "unknown machine")))
    return [
        name if plain.count(name) == 1 else f"{name} ({source})"
        for name, source in zip(plain, reports, strict=True)
    ]
