"""Long reports in little space: beyond a million calls, every call is kept, but not its order nor its last digits."""

from __future__ import annotations

from dataclasses import replace

from bench.report import Report, Storage, SubjectReport
from bench.samples import rounded_samples

MOST_EXACT = 1_000_000  # samples of one report that are kept to the nanosecond: about 3.5 MB
SIGNIFICANT_BITS = 12  # an error of one part in 4,096 at most, a hundredth of the margin that a verdict needs


def compact_report(report: Report, *, most_exact: int = MOST_EXACT) -> Report:
    """Return the report itself, or, where it has too many samples, one with rounded samples in ascending order.

    No sample is dropped and no block is merged, so medians, tails, ratios and their intervals are those of the
    exact report within the rounding. What is lost is the order of the calls within a block.

    Args:
        report: The report.
        most_exact: The largest number of samples that stay as they are.
    """
    blocks = [block for subject in report.subjects for block in subject.blocks]
    if sum(len(block.samples_ns) for block in blocks) <= most_exact:
        return report
    return replace(
        report,
        subjects=tuple(_compact_subject(subject) for subject in report.subjects),
        storage=Storage(in_order=False, significant_bits=SIGNIFICANT_BITS),
    )


def _compact_subject(subject: SubjectReport) -> SubjectReport:
    return replace(
        subject,
        blocks=tuple(
            replace(block, samples_ns=rounded_samples(block.samples_ns, SIGNIFICANT_BITS))
            for block in subject.blocks
        ),
    )
