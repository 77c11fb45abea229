"""A fleet as tables of text."""

from __future__ import annotations

from bench.fleet import Device, Fleet
from bench.statistics import Verdict
from bench.tables import Table, milliseconds

_SIGNS = {Verdict.FASTER: "faster", Verdict.SLOWER: "slower", Verdict.NO_DIFFERENCE: "same"}
_MISSING = "-"


def fleet_tables(fleet: Fleet) -> tuple[Table, ...]:
    """Return the medians, device by engine, and each engine's ratio to the first one on the same device."""
    medians = Table(
        title="Median latency, ms: device by engine",
        header=("device", *fleet.engines),
        rows=tuple((device.name, *_medians(device, fleet)) for device in fleet.devices),
        notes=_notes(fleet),
    )
    if len(fleet.engines) < 2:
        return (medians,)
    ratios = Table(
        title=f"Ratio to {fleet.engines[0]} on the same device, 95 % interval",
        header=("device", *fleet.engines[1:]),
        rows=tuple((device.name, *_ratios(device, fleet)) for device in fleet.devices),
        notes=(
            f"faster or slower: the whole interval is beyond {fleet.margin * 100:g} %",
            "ratio: the median over the rounds of the ratio within a round",
        ),
    )
    return (medians, ratios)


def _medians(device: Device, fleet: Fleet) -> list[str]:
    found = (device.medians_ns.get(engine) for engine in fleet.engines)
    return [_MISSING if median is None else milliseconds(median) for median in found]


def _ratios(device: Device, fleet: Fleet) -> list[str]:
    cells = []
    for engine in fleet.engines[1:]:
        found = device.ratios.get(engine)
        if found is None:
            cells.append(_MISSING)
        else:
            ratio = found.ratio
            cells.append(f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) {_SIGNS[found.verdict]}")
    return cells


def _notes(fleet: Fleet) -> tuple[str, ...]:
    notes = [f"{device.name}: {line}" for device in fleet.devices for line in device.cautions]
    if fleet.allowed:
        notes.append(f"allowed to differ: {', '.join(fleet.allowed)}")
    notes += [f"{device.name}: {control.words()}" for device in fleet.devices for control in device.controls]
    return tuple(dict.fromkeys(notes))
