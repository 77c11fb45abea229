"""The spread between builds of one engine apart from the spread within each: tactics are chosen by noisy timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.bootstrap import LEAST_BLOCKS, block_medians
from bench.report import Report, SubjectReport
from engines.packages import load

BUILD_OF = "build_of"  # key of a subject's description: the engine that it is a build of


@dataclass(frozen=True, kw_only=True)
class BuildSpread:
    """How much builds of one engine differ.

    Attributes:
        engine: Name of the engine.
        builds: Number of builds.
        within: Standard deviation of one block's median, as a fraction, what hits whole rounds taken out.
        between: Standard deviation between builds, as a fraction, the part that ``within`` explains taken out.
        slowest: Slowest / fastest build, of the mean logarithms of their block medians.
        chance: Of such differences between equal builds (F test).
    """

    engine: str
    builds: int
    within: float
    between: float
    slowest: float
    chance: float


def build_spreads(report: Report) -> tuple[BuildSpread, ...]:
    """Return the spread of every engine that the report has two builds or more of, with at least 5 common rounds."""
    groups: dict[str, list[SubjectReport]] = {}
    for subject in report.measured:
        if BUILD_OF in subject.description:
            groups.setdefault(str(subject.description[BUILD_OF]), []).append(subject)
    found = (_spread(name, subjects) for name, subjects in groups.items() if len(subjects) > 1)
    return tuple(spread for spread in found if spread is not None)


def _spread(name: str, subjects: Sequence[SubjectReport]) -> BuildSpread | None:
    """Separate the two spreads by an analysis of variance with rounds as blocks.

    Source:
        Montgomery, Design and Analysis of Experiments, the randomized complete block design; the component
        between is (MS builds - MS error) / rounds (Searle, Casella and McCulloch, Variance Components, 1992).
    """
    np, stats = load("numpy"), load("scipy.stats")
    medians = [block_medians(subject) for subject in subjects]
    rounds = sorted(set.intersection(*(set(found) for found in medians)))
    if len(rounds) < LEAST_BLOCKS or min(min(found.values()) for found in medians) <= 0:
        return None
    logs = np.log([[found[index] for index in rounds] for found in medians])
    builds, count = logs.shape
    means = logs.mean(axis=1)
    rest = logs - means[:, None] - logs.mean(axis=0)[None, :] + logs.mean()
    freedom = (builds - 1) * (count - 1)
    error = float((rest**2).sum()) / freedom
    between = count * float(((means - means.mean()) ** 2).sum()) / (builds - 1)
    chance = float(stats.f.sf(between / error, builds - 1, freedom)) if error > 0 else float(between <= 0)
    return BuildSpread(
        engine=name,
        builds=builds,
        within=error**0.5,
        between=max(0.0, (between - error) / count) ** 0.5,
        slowest=float(np.exp(means.max() - means.min())),
        chance=chance,
    )
