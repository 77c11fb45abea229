"""How often a comparison cries wolf, and how often it finds what is there: an engine against itself.

    python bench/scripts/false_alarms.py ENGINE                     200 quick comparisons of equals
    python bench/scripts/false_alarms.py ENGINE --slower 5          the second one 5 % slower
    python bench/scripts/false_alarms.py ENGINE --slower 2 --seconds 60
    python bench/scripts/false_alarms.py ENGINE --one-after-the-other

Each comparison measures the engine twice as ``edge-dsc bench`` would, as two subjects in interleaved rounds, and
counts the verdict at several margins. A slowdown is planted by spinning after each call for a share of its
own time. ``--one-after-the-other`` measures the two in turn, as two benchmark runs would, and compares the medians:
that is what interleaving is against. ``--comparisons`` and ``--seconds`` shorten all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy

from bench.bootstrap import Interval, block_medians, paired_ratio, unpaired_ratio
from bench.measure import Subject, measure
from bench.plan import Plan, choose_plan
from bench.statistics import Verdict, judge
from engines.runtimes import open_engine

MARGINS = (0.0, 0.01, 0.03)


def main() -> None:
    """Compare again and again, and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of one subject")
    parser.add_argument("--warmup", type=float, default=2.0, help="of the first comparison")
    parser.add_argument("--slower", type=float, default=0.0, help="percent")
    parser.add_argument("--one-after-the-other", action="store_true")
    options = parser.parse_args()
    with open_engine(options.engine) as runner:
        shape = (runner.record.batch.best, *runner.record.contract.input_shape)
        pixels = numpy.random.default_rng(0).integers(0, 256, shape, "uint8")
        subjects = [
            Subject(name="first", call=lambda: runner.run(pixels)),
            Subject(name="second", call=slowed(lambda: runner.run(pixels), options.slower / 100)),
        ]
        compare = one_after_the_other if options.one_after_the_other else interleaved
        found = []
        for index in range(options.comparisons):
            plan = choose_plan(
                seconds=options.seconds, warmup_seconds=0 if index else options.warmup, seed=index
            )
            found.append(compare(subjects, plan))
    print(json.dumps(summary(options, found), indent=1))  # noqa: T201


def slowed(call: Callable[[], object], share: float) -> Callable[[], object]:
    """Return a call that takes ``share`` longer than the given one."""
    if share == 0:
        return call
    clock = time.perf_counter_ns

    def slow() -> None:
        start = clock()
        call()
        end = clock()
        until = end + (end - start) * share
        while clock() < until:
            pass

    return slow


def interleaved(subjects: list[Subject], plan: Plan) -> Interval:
    """Compare as ``edge-dsc bench`` does."""
    first, second = measure(subjects, plan, read_environment=dict).subjects
    return paired_ratio(block_medians(first), block_medians(second), seed=plan.seed)


def one_after_the_other(subjects: list[Subject], plan: Plan) -> Interval:
    """Compare two measurements of which the second begins when the first has ended."""
    first, second = (measure([subject], plan, read_environment=dict).subjects[0] for subject in subjects)
    return unpaired_ratio(first, second, seed=plan.seed)


def summary(options: argparse.Namespace, found: list[Interval]) -> dict[str, object]:
    """Count the verdicts."""
    ratios = numpy.array([interval.value for interval in found])
    widths = numpy.array([interval.high - interval.low for interval in found])
    return {
        "engine": options.engine.name,
        "order": "one after the other" if options.one_after_the_other else "interleaved",
        "comparisons": len(found),
        "seconds": options.seconds,
        "planted_percent": options.slower,
        "load": os.getloadavg()[0],
        "ratio_median": round(float(numpy.median(ratios)), 4),
        "ratio_extremes": [round(float(ratios.min()), 4), round(float(ratios.max()), 4)],
        "interval_width_median": round(float(numpy.median(widths)), 4),
        "verdicts": {
            f"margin {margin:.0%}": {
                verdict.value: sum(judge(interval, margin) is verdict for interval in found)
                for verdict in Verdict
            }
            for margin in MARGINS
        },
    }


if __name__ == "__main__":
    main()
