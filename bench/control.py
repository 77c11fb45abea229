"""The A/A control: a subject measured a second time, under another name, must not differ from itself.

Everything that tells the two apart is the machine's or the harness's, so it is in every other ratio too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.bootstrap import LEAST_BLOCKS, Interval, block_medians, paired_ratio
from bench.report import Report
from bench.statistics import MARGIN, Verdict, judge

if TYPE_CHECKING:
    from bench.measure import Subject


@dataclass(frozen=True, kw_only=True)
class Control:
    """How a subject's second measurement relates to its first.

    Attributes:
        subject: Name of the subject.
        ratio: Second / first with its 95 % interval, taken within rounds.
        verdict: What that shows; anything but "no significant difference" means that the machine was not steady.
    """

    subject: str
    ratio: Interval
    verdict: Verdict

    @property
    def differs(self) -> bool:
        """Whether the subject differs from itself."""
        return self.verdict is not Verdict.NO_DIFFERENCE

    def words(self) -> str:
        """Say it in one line."""
        numbers = f"{self.ratio.value:.3f} ({self.ratio.low:.3f} to {self.ratio.high:.3f})"
        end = "differs from itself: the machine was not steady" if self.differs else self.verdict.value
        return f"control: {self.subject} measured twice, ratio {numbers}: {end}"


def control_subject(subject: Subject) -> Subject:
    """Return the same subject once more, as its own control."""
    return replace(subject, name=f"{subject.name} (control)", control_of=subject.name, stages=None)


def find_controls(report: Report, *, margin: float = MARGIN, seed: int = 0) -> tuple[Control, ...]:
    """Judge every control of a report that shares at least 5 rounds with its subject.

    Args:
        report: The report.
        margin: The smallest difference worth a word, as a fraction.
        seed: Seed of the bootstrap.
    """
    subjects = {subject.name: subject for subject in report.measured}
    found = []
    for control in report.controls:
        subject = subjects.get(control.control_of or "")
        if subject is None:
            continue
        first, second = block_medians(subject), block_medians(control)
        if len(first.keys() & second.keys()) < LEAST_BLOCKS or min(first.values()) <= 0:
            continue
        ratio = paired_ratio(first, second, seed=seed)
        found.append(Control(subject=subject.name, ratio=ratio, verdict=judge(ratio, margin)))
    return tuple(found)
