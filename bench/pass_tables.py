"""What passes of their own found, as tables of text."""

from __future__ import annotations

from bench.report import Report
from bench.table import Table

_MIB = 1 << 20


def pass_tables(report: Report) -> tuple[Table, ...]:
    """Return a table for each kind of pass that the report holds."""
    return tuple(table for table in (_power_table(report), _memory_table(report)) if table.rows)


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


def _memory_table(report: Report) -> Table:
    found = ((subject.name, subject.passes.get("memory")) for subject in report.measured)
    rows = tuple(
        (
            name,
            f"{memory['host_peak_bytes'] / _MIB:.1f}",
            f"{(memory['host_peak_bytes'] - memory['host_before_bytes']) / _MIB:.1f}",
        )
        for name, memory in found
        if memory
    )
    return Table(
        title="Memory of a process that runs only this engine",
        header=("engine", "peak, MiB", "of it after start, MiB"),
        rows=rows,
        notes=(
            "resident memory of the host; before the engine is opened Python and its packages are loaded",
        ),
    )
