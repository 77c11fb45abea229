"""The A/A control: a subject measured a second time, under another name, must not differ from itself.

Everything that tells the two apart is the machine's or the harness's, so it is in every other ratio too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.bootstrap import LEAST_BLOCKS, Interval, block_medians, paired_ratio
from bench.report import Report
from bench.signed_rank import signed_rank_chance
from bench.statistics import MARGIN, Verdict, judge

if TYPE_CHECKING:
    from bench.measure import Subject


@dataclass(frozen=True, kw_only=True)
class Control:
    """How a subject's second measurement relates to its first.

    Attributes:
        subject: Name of the subject.
        ratio: Second / first with its 95 % interval, taken within rounds.
        verdict: What that shows; faster or slower means that the machine was not steady.
    """

    subject: str
    ratio: Interval
    verdict: Verdict

    @property
    def differs(self) -> bool:
        """Whether the subject differs from itself by more than the margin."""
        return self.verdict in (Verdict.FASTER, Verdict.SLOWER)

    def words(self) -> str:
        """Say it in one line."""
        numbers = f"{self.ratio.value:.3f} ({self.ratio.low:.3f} to {self.ratio.high:.3f})"
        if self.differs:
            end = "differs from itself: the machine was not steady"
        elif self.verdict is Verdict.NO_DIFFERENCE:
            end = self.verdict.value
        else:
            end = f"{self.verdict.value} than itself: other differences as small may be the machine's, too"
        return f"control: {self.subject} measured twice, ratio {numbers}: {end}"


def control_subject(subject: Subject) -> Subject:
    """Return the same subject once more, as its own control."""
    return replace(subject, name=f"{subject.name} (control)", control_of=subject.name, stages=None)


def find_controls(
    report: Report, *, margin: float = MARGIN, seed: int = 0, test: bool = False
) -> tuple[Control, ...]:
    """Judge every control of a report that shares at least 5 rounds with its subject.

    Args:
        report: The report.
        margin: The smallest difference worth a word, as a fraction.
        seed: Seed of the bootstrap.
        test: Make Wilcoxon's test too, as :func:`bench.compare.compare_subjects` does.
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
        chance = signed_rank_chance(first, second) if test else None
        found.append(Control(subject=subject.name, ratio=ratio, verdict=judge(ratio, margin, chance)))
    return tuple(found)
