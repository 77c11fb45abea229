"""What passes of their own found, as tables of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.bootstrap import sample_median
from bench.report import Report
from bench.table import Table, milliseconds

_MIB = 1 << 20


@dataclass(frozen=True)
class Roof:
    """The best that a machine could do with some work.

    Attributes:
        intensity: Multiply-adds a byte.
        nanoseconds: The shortest time: all multiply-adds, or all bytes, at the ceiling's rate.
        bound: Which of the two takes longer: ``compute`` or ``memory``.
    """

    intensity: float
    nanoseconds: float
    bound: str

    @classmethod
    def of(cls, limits: Mapping[str, float]) -> Roof:
        """Derive it from a subject's pass ``limits``."""
        compute = limits["multiply_adds"] / limits["multiply_adds_per_s"] * 1e9
        memory = limits["bytes"] / limits["bytes_per_s"] * 1e9
        bound = "compute" if compute >= memory else "memory"
        return cls(limits["multiply_adds"] / limits["bytes"], max(compute, memory), bound)


def pass_tables(report: Report) -> tuple[Table, ...]:
    """Return a table for each kind of pass that the report holds."""
    return tuple(
        table for table in (_limits_table(report), _power_table(report), _memory_table(report)) if table.rows
    )


def scenario_tables(report: Report) -> tuple[Table, ...]:
    """Return what a scenario asks for beside latencies: drops and misses of a camera, throughput of a pile."""
    return tuple(table for table in (_camera_table(report), _throughput_table(report)) if table.rows)


def _camera_table(report: Report) -> Table:
    rows = []
    fps = report.plan.fps
    for subject in report.measured if fps else ():
        answered = len(subject.samples_ns)
        late = int((subject.ordered_ns > 1e9 / (fps or 1)).sum())
        dropped = sum(block.dropped for block in subject.blocks)
        cells = (
            f"{dropped:,}",
            f"{dropped / (answered + dropped):.2%}",
            f"{late:,}",
            f"{late / answered:.2%}",
        )
        rows.append((subject.name, f"{answered + dropped:,}", *cells))
    return Table(
        title=f"Frames at {fps:g} fps" if fps else "",
        header=("engine", "arrived", "dropped", "of arrived", "late", "of answered"),
        rows=tuple(rows),
        notes=("dropped: a newer frame had come; late: answered after the next frame had come",),
    )


def _throughput_table(report: Report) -> Table:
    told = [subject for subject in report.measured if "engine_batch" in subject.description]
    rows = tuple(
        (
            subject.name,
            str(subject.description["engine_batch"]),
            str(subject.description["concurrency"]),
            f"{subject.description['batch'] / sample_median(subject) * 1e9:,.1f}",
        )
        for subject in told
    )
    return Table(
        title="Throughput of a pile of images", header=("engine", "batch", "threads", "images/s"), rows=rows
    )


def _power_table(report: Report) -> Table:
    rows = tuple(
        (
            subject.name,
            str(power["rail"]),
            f"{power['idle_w']:.2f}",
            f"{power['busy_w']:.2f}",
            f"{power['joules'] * 1e3:.3f}",
            f"{power['calls'] / power['seconds']:.1f}",
        )
        for subject in report.measured
        for power in subject.passes.get("power", ())
    )
    return Table(
        title="Power, in a pass of its own",
        header=("engine", "rail", "idle, W", "busy, W", "mJ a request", "requests a second"),
        rows=rows,
        notes=("energy of a request: (busy - idle) / throughput, of this rail alone",),
    )


def _limits_table(report: Report) -> Table:
    rows = []
    peak: dict[str, float] = {}
    for subject in report.measured:
        found = subject.passes.get("limits")
        if found:
            roof = Roof.of(found)
            median = sample_median(subject)
            peak = found
            rows.append(
                (
                    subject.name,
                    f"{found['multiply_adds'] / 1e6:,.1f}",
                    f"{found['bytes'] / 1e6:,.2f}",
                    f"{roof.intensity:.1f}",
                    roof.bound,
                    milliseconds(roof.nanoseconds),
                    milliseconds(median),
                    f"{roof.nanoseconds / median:.0%}",
                )
            )
    header = (
        "engine",
        "M multiply-adds",
        "MB moved",
        "per byte",
        "bound by",
        "roof, ms",
        "median, ms",
        "of roof",
    )
    notes = (
        (
            f"ceilings measured here: {peak['multiply_adds_per_s'] / 1e9:.1f} G multiply-adds/s (FP32 matrix product), "
            f"{peak['bytes_per_s'] / 1e9:.1f} GB/s (copy)",
            "moved: input, output and weights of each layer, none kept in a cache; INT8 may pass an FP32 ceiling",
        )
        if peak
        else ()
    )
    return Table(title="Limits of the machine (roofline)", header=header, rows=tuple(rows), notes=notes)


def _memory_table(report: Report) -> Table:
    found = ((subject.name, subject.passes.get("memory")) for subject in report.measured)
    rows = tuple(
        (
            name,
            f"{memory['host_peak_bytes'] / _MIB:.1f}",
            f"{(memory['host_peak_bytes'] - memory['host_before_bytes']) / _MIB:.1f}",
            "-" if memory.get("device_bytes") is None else f"{memory['device_bytes'] / _MIB:.1f}",
        )
        for name, memory in found
        if memory
    )
    return Table(
        title="Memory of a process that runs only this engine",
        header=("engine", "host peak, MiB", "of it after start, MiB", "device, MiB"),
        rows=rows,
        notes=(
            "host: resident memory; before the engine is opened Python and its packages are loaded",
            "device: what the engine adds to the used memory of a discrete GPU (NVML)",
        ),
    )
