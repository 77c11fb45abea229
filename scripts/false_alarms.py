"""How often a comparison cries wolf, and how often it finds what is there: an engine against itself.

    python scripts/false_alarms.py ENGINE --out quick.jsonl --slower 0 0 5            100 quick runs
    python scripts/false_alarms.py ENGINE --out standard.jsonl --slower 2 --plan standard --runs 15
    python scripts/false_alarms.py ENGINE --out turns.jsonl --one-after-the-other

Each run measures the engine and, for every number after ``--slower``, the same engine once more, so many percent
slower, as ``edge-dsc bench`` would: batch 1, one thread, as subjects in interleaved rounds. Each of them is compared
with the first, and the verdict of ``edge-dsc compare`` is kept. A slowdown is planted by spinning after each call for a
share of its own time. ``--one-after-the-other`` measures them in turn and compares two reports: that is what
interleaving is against. Every run is appended to ``--out`` at once; the same command goes on after the last one
there, and prints the counts of all of them. ``--seconds`` shortens the plan.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from turns import script_parser

from bench.compare import Ratio, Rules, compare_reports, compare_within
from bench.measure import Subject, measure
from bench.plan import PLANS, Plan, choose_plan
from bench.statistics import Verdict
from engines.runtimes import open_engine


def main() -> None:
    """Compare again and again, and print one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="one line per run; started or continued")
    parser.add_argument("--runs", type=int, default=100, help="in all, those in --out included")
    parser.add_argument("--plan", choices=sorted(PLANS), default="quick")
    parser.add_argument("--seconds", type=float, help="measured time of one subject, instead of the plan's")
    parser.add_argument("--warmup", type=float, default=2.0, help="before the first run, seconds")
    parser.add_argument("--slower", type=float, nargs="+", default=[0.0], help="percent")
    parser.add_argument("--one-after-the-other", action="store_true")
    options = parser.parse_args()
    settings = {
        "engine": options.engine.name,
        "order": "one after the other" if options.one_after_the_other else "interleaved",
        "plan": options.plan if options.seconds is None else f"{options.seconds:g} s",
        "planted_percent": options.slower,
    }
    done = read_done(options.out, settings)
    compare = one_after_the_other if options.one_after_the_other else interleaved
    with open_engine(options.engine, threads=1) as runner:
        shape = (1, *runner.record.contract.input_shape)
        pixels = np.random.default_rng(0).integers(0, 256, shape, "uint8")
        subjects = [
            Subject(name=f"{place}: +{percent:g} %", call=slowed(lambda: runner.run(pixels), percent / 100))
            for place, percent in enumerate([0.0, *options.slower])
        ]
        warm_up(subjects, options.warmup)
        for index in range(len(done), options.runs):
            plan = choose_plan(options.plan, seconds=options.seconds, warmup_seconds=0, seed=index)
            done.append({**settings, "found": [kept(row) for row in compare(subjects, plan)]})
            with options.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(done[-1]) + "\n")
    print(json.dumps({**settings, "runs": len(done), "found": summary(done)}, indent=1))  # noqa: T201


def read_done(path: Path, settings: dict[str, object]) -> list[dict[str, Any]]:
    """Return the runs that the file holds with the same settings."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if settings.items() <= row.items()]


def warm_up(subjects: list[Subject], seconds: float) -> None:
    """Run all subjects without keeping anything."""
    if seconds > 0:
        measure(subjects, choose_plan(seconds=seconds, warmup_seconds=0), read_environment=dict)


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


def interleaved(subjects: list[Subject], plan: Plan) -> Sequence[Ratio]:
    """Compare as ``edge-dsc bench`` and ``edge-dsc compare`` with one report do."""
    return compare_within(measure(subjects, plan, read_environment=dict), rules=Rules(seed=plan.seed)).rows


def one_after_the_other(subjects: list[Subject], plan: Plan) -> Sequence[Ratio]:
    """Compare reports of which each was begun when the one before had ended."""
    first, *others = (
        measure([Subject(name="engine", call=subject.call)], plan, read_environment=dict)
        for subject in subjects
    )
    rows = (compare_reports(first, other, Rules(seed=plan.seed)).rows[0] for other in others)
    return [replace(row, candidate=subject.name) for row, subject in zip(rows, subjects[1:], strict=True)]


def kept(found: Ratio) -> dict[str, object]:
    """Return what is kept of a comparison."""
    return {
        "candidate": found.candidate,
        "verdict": found.verdict.value,
        "ratio": round(found.ratio.value, 5),
        "low": round(found.ratio.low, 5),
        "high": round(found.ratio.high, 5),
        "p": found.p_value,
        "load": round(os.getloadavg()[0], 2),
    }


def summary(done: list[dict[str, Any]]) -> dict[str, dict[str, object]]:
    """Count the verdicts of each slowdown; equals are counted together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in (row for run in done for row in run["found"]):
        groups.setdefault(row["candidate"].partition(": ")[2], []).append(row)
    return {planted: counts(rows) for planted, rows in groups.items()}


def counts(rows: list[dict[str, Any]]) -> dict[str, object]:
    """Count the verdicts of comparisons, and say how their ratios scatter."""
    ratios = np.array([row["ratio"] for row in rows])
    verdicts = Counter(row["verdict"] for row in rows)
    return {
        "comparisons": len(rows),
        "verdicts": {verdict.value: verdicts[verdict.value] for verdict in Verdict},
        "1_outside_interval": sum(not row["low"] <= 1 <= row["high"] for row in rows),
        "ratio_median": round(float(np.median(ratios)), 4),
        "ratio_extremes": [float(ratios.min()), float(ratios.max())],
        "interval_width_median": round(float(np.median([row["high"] - row["low"] for row in rows])), 4),
        "load": [min(row["load"] for row in rows), max(row["load"] for row in rows)],
    }


if __name__ == "__main__":
    main()
