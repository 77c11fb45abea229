"""Wilcoxon's signed-rank test of two subjects measured in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping

from engines.packages import load


def signed_rank_chance(baseline: Mapping[int, float], candidate: Mapping[int, float]) -> float:
    """Return the chance that equals would differ so one-sidedly over the rounds: the two-sided p-value.

    The ranks are of the logarithms of the ratios within rounds, so that twice and half weigh the same. It stands
    beside the interval: a tiny p-value says that there is a difference, not that it is worth a word.

    Args:
        baseline: Block median in nanoseconds by round, all above 0.
        candidate: Likewise.

    Raises:
        EnvironmentProblem: SciPy is missing.

    Source:
        Wilcoxon, Individual Comparisons by Ranking Methods, Biometrics Bulletin 1 (1945); rounds without a
        difference are left out, as there. ``scipy.stats.wilcoxon``: exact up to 50 rounds without ties, else
        the normal approximation with correction for ties.
    """
    np, stats = load("numpy"), load("scipy.stats")
    rounds = sorted(baseline.keys() & candidate.keys())
    logs = np.log([candidate[index] / baseline[index] for index in rounds])
    logs = logs[logs != 0]
    if not len(logs):
        return 1.0
    return float(stats.wilcoxon(logs).pvalue)
