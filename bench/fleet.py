"""Many reports beside each other: a matrix of devices and engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bench.compare import (
    Control,
    Ratio,
    check_conditions,
    compare_subjects,
    find_controls,
    subject_conditions,
    unstable_subjects,
)
from bench.machine import throttling
from bench.report import Report
from bench.statistics import MARGIN, sample_median
from engines.errors import NotComparableError, UnstableError

_NAMES = ("jetson", "gpu", "machine", "cpu")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One report of a fleet.

    Attributes:
        name: What the machine is, unique in the fleet.
        source: Where the report came from.
        medians_ns: Engine name -> median latency of all its samples, nanoseconds.
        ratios: Engine name -> its ratio to the fleet's first engine on this device, paired.
        cautions: What makes the ground unfirm.
        controls: What was measured twice.
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
        devices: One a report, in the order given.
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


def compare_fleet(
    reports: Mapping[str, Report],
    *,
    allow: Collection[str] = (),
    margin: float = MARGIN,
    seed: int = 0,
) -> Fleet:
    """Put reports of many machines beside each other.

    Machines may differ, that is what a fleet is for. An engine's batch, threads and switches may not, nor may
    the scenario.

    Args:
        reports: Where each report came from -> the report.
        allow: Conditions that may differ.
        margin: The smallest difference worth a word, as a fraction.
        seed: Seed of the bootstrap.

    Raises:
        NotComparableError: Conditions that differ: the text names the report and the keys.
    """
    allowed = _check_fleet(reports, allow)
    engines = tuple(dict.fromkeys(subject.name for report in reports.values() for subject in report.measured))
    names = _device_names(reports)
    devices = tuple(
        _device(name, source, report, engines, margin, seed)
        for name, (source, report) in zip(names, reports.items(), strict=True)
    )
    return Fleet(engines=engines, devices=devices, margin=margin, allowed=allowed)


def _device(
    name: str, source: str, report: Report, engines: Sequence[str], margin: float, seed: int
) -> Device:
    measured = {subject.name: subject for subject in report.measured}
    cautions = ["the measurement was interrupted"] if report.interrupted else []
    cautions += [f"{subject.name} failed: {subject.error}" for subject in report.failed]
    ratios = {}
    for engine in engines[1:]:
        if engine in measured and engines[0] in measured:
            try:
                ratios[engine] = compare_subjects(
                    report, engines[0], engine, margin=margin, seed=seed, test=False
                )
            except (NotComparableError, UnstableError) as error:
                cautions.append(f"{engine}: {error.what.removeprefix(f'{engine}: ')}")
    return Device(
        name=name,
        source=source,
        medians_ns={engine: sample_median(subject) for engine, subject in measured.items()},
        ratios=ratios,
        cautions=(*cautions, *throttling(report.states), *unstable_subjects(report)),
        controls=find_controls(report, margin=margin, seed=seed),
    )


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
