"""Whether a report is firm ground for an answer."""

from __future__ import annotations

from bench.bootstrap import LEAST_BLOCKS, block_medians
from bench.co_load import crowded
from bench.control import find_controls
from bench.report import Report
from bench.statistics import spread
from engines.errors import UnstableError

UNSTABLE_SPREAD = 0.10  # of the block medians, as a fraction of their median


def unstable_subjects(report: Report) -> tuple[str, ...]:
    """Return why the report is no firm ground, one line a subject; empty when all is well.

    A subject is unstable when it has fewer than 5 blocks, or when its block medians scatter by more than 10 %; a
    report is when a subject differs from its own second measurement, or when other programs had the processor.

    Source:
        pyperf calls a benchmark unstable when the standard deviation is more than 10 % of the mean
        (``pyperf check``); here it is taken between blocks, with a robust estimate, because the tail
        within a block is the subject's own.
    """
    lines = []
    for subject in report.measured:
        medians = list(block_medians(subject).values())
        if len(medians) < LEAST_BLOCKS:
            lines.append(f"{subject.name} has {len(medians)} blocks, {LEAST_BLOCKS} are needed")
        elif spread(medians) > UNSTABLE_SPREAD:
            scatter = spread(medians) * 100
            lines.append(f"{subject.name}'s block medians scatter by {scatter:.0f} %, 10 % is the limit")
    lines += crowded(report.states)
    return (*lines, *(control.words() for control in find_controls(report) if control.differs))


def require_stable(report: Report) -> None:
    """Fail where a subject is unstable.

    Raises:
        UnstableError: Names every such subject.
    """
    lines = unstable_subjects(report)
    if lines:
        raise UnstableError(
            "; ".join(lines), remedy="quieten the machine, fix its clocks, or measure for longer"
        )
