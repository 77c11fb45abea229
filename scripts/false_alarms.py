"""How often a comparison cries wolf, and how often it finds what is there: files of the same bytes.

    python scripts/false_alarms.py ENGINE --out quick.jsonl --slower 0 0 0 0 5 --runs 34
    python scripts/false_alarms.py ENGINE --out standard.jsonl --slower 0 0 1 2 --plan standard --runs 10
    python scripts/false_alarms.py ENGINE --out turns.jsonl --one-after-the-other

Each run is a process of its own, as each ``edge-dsc bench`` is. It copies the engine once for every number after
``--slower``, measures the copies against each other, batch 1, one thread, and makes the copy so many percent slower by
spinning after each call for a share of its own time. Spinning costs a little more than its time: the next call finds
cooler caches, and so does the code that spins (0.2 to 0.7 % of a call of 1 ms, measured within one session).
All pairs of equals are compared with each other, and each slower copy with every equal: four equals and one slower are
six and four comparisons. The verdict of ``edge-dsc compare`` is kept. ``--one-after-the-other`` measures the copies in
turn and compares reports: that is what interleaving is against. Every run is appended to ``--out`` at once; the same
command goes on after the last one there, and prints the counts of all of them. ``--seconds`` shortens the plan,
``--openings 1`` measures as version 2 of the report did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from turns import script_parser

from bench.compare import Ratio, compare_reports, compare_subjects
from bench.measure import Opened, Subject, measure
from bench.plan import PLANS, Plan, choose_plan
from bench.statistics import Verdict
from edge_dsc.latency.subjects import input_noise
from engines.runtimes import open_engine


def main() -> None:
    """Compare again and again, and print one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="one line per run; started or continued")
    parser.add_argument("--runs", type=int, default=34, help="in all, those in --out included")
    parser.add_argument("--plan", choices=sorted(PLANS), default="quick")
    parser.add_argument("--seconds", type=float, help="measured time of one copy, instead of the plan's")
    parser.add_argument("--warmup", type=float, help="shortest warm-up of one copy, instead of the plan's")
    parser.add_argument("--openings", type=int, help="of each copy, instead of the plan's")
    parser.add_argument(
        "--slower", type=float, nargs="+", default=[0.0] * 4, help="percent, one for each copy"
    )
    parser.add_argument("--one-after-the-other", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # one run in this process, by its seed
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run(options)))  # noqa: T201
        return
    settings = {
        "engine": options.engine.name,
        "order": "one after the other" if options.one_after_the_other else "interleaved",
        "plan": options.plan if options.seconds is None else f"{options.seconds:g} s",
        "openings": options.openings,
        "planted_percent": options.slower,
    }
    done = read_done(options.out, settings)
    for index in range(len(done), options.runs):
        command = [sys.executable, *sys.argv, "--one", str(index)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        done.append({**settings, "found": json.loads(found)})
        with options.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(done[-1]) + "\n")
    print(json.dumps({**settings, "runs": len(done), "found": summary(done)}, indent=1))  # noqa: T201


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """Make the copies, measure and compare them."""
    plan = choose_plan(
        options.plan,
        seconds=options.seconds,
        warmup_seconds=options.warmup,
        openings=options.openings,
        seed=options.one,
    )
    compare = one_after_the_other if options.one_after_the_other else interleaved
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for place, percent in enumerate(options.slower):
            copy = Path(folder, str(place), options.engine.name)
            copy.parent.mkdir()
            for suffix in ("", ".json"):
                shutil.copyfile(f"{options.engine}{suffix}", f"{copy}{suffix}")
            subjects.append(subject_of(copy, f"{place}: +{percent:g} %", percent / 100))
        return [kept(row) for row in compare(subjects, plan)]


def subject_of(engine: Path, name: str, slower: float) -> Subject:
    """Return an engine as ``edge-dsc bench`` measures it, made slower by a share of its time."""

    def opened(stack: ExitStack) -> Opened:
        runner = stack.enter_context(open_engine(engine, threads=1))
        pixels = input_noise(runner, 1)
        return Opened(slowed(lambda: runner.run(pixels), slower))

    return Subject(name=name, open=opened)


def read_done(path: Path, settings: dict[str, object]) -> list[dict[str, Any]]:
    """Return the runs that the file holds with the same settings."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if settings.items() <= row.items()]


def slowed(call: Callable[[], object], share: float) -> Callable[[], object]:
    """Return a call that spins for a share of its time after it; the call itself where the share is 0."""
    if share == 0:
        return call
    clock = time.perf_counter_ns

    def slow() -> None:
        start = clock()
        call()
        end = clock()
        until = end + int((end - start) * share)
        while clock() < until:
            pass

    return slow


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return which is compared with which: two equals, or one of them with a slower one."""
    return [pair for pair in combinations(names, 2) if any(name.endswith("+0 %") for name in pair)]


def interleaved(subjects: list[Subject], plan: Plan) -> Sequence[Ratio]:
    """Compare as ``edge-dsc bench`` and ``edge-dsc compare`` with one report do."""
    report = measure(subjects, plan, read_environment=dict)
    return [compare_subjects(report, *pair) for pair in pairs([subject.name for subject in subjects])]


def one_after_the_other(subjects: list[Subject], plan: Plan) -> Sequence[Ratio]:
    """Compare reports of which each was begun when the one before had ended."""
    reports = {
        subject.name: measure([replace(subject, name="engine")], plan, read_environment=dict)
        for subject in subjects
    }
    return [
        replace(compare_reports(reports[first], reports[second]).rows[0], candidate=second)
        for first, second in pairs(list(reports))
    ]


def kept(found: Ratio) -> dict[str, object]:
    """Return what is kept of a comparison."""
    return {
        "candidate": found.candidate,
        "verdict": found.verdict.value,
        "ratio": round(found.ratio.value, 5),
        "low": round(found.ratio.low, 5),
        "high": round(found.ratio.high, 5),
        "p": found.p_value,
        "within": None if found.paired is None else round(found.paired.within, 5),
        "between": None if found.paired is None else round(found.paired.between, 5),
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
