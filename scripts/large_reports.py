"""How large a long report is, how fast it opens, and how fast fifty reports become one matrix.

    python scripts/large_reports.py [--seconds 600] [--engines 8] [--reports 50]

The samples are drawn: engines of 0.46 to 2 ms with heavy tails and drifting blocks, as many calls as would fit into the
time. Opening is what ``edge-dsc compare`` and the page do after Python has started: reading, checking the seal and
every sample, all statistics, the text; then the page.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from turns import Result, script_parser, time_call

from bench.fleet import compare_files
from bench.machine import environment, read_state
from bench.plan import PLANS, Plan
from bench.report import BlockSamples, Report, SubjectReport, compact_report, load_report, save_report
from bench.statistics import MARGIN
from bench.tables import render_comparison, render_report
from edge_dsc.page.document import report_sections, save_page

_MEDIANS_NS = (4.6e5, 1.5e6, 1.4e6, 1.55e6, 6e5, 9e5, 2e6, 5e5)


def main() -> None:
    """Make the reports, open them, and print."""
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of one engine")
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument(
        "--reports", type=int, default=50, help="of the matrix, each of four engines and 10 s"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder) / "long.json"
        made = draw_report(replace(PLANS["publish"], seconds=options.seconds), options.engines, seed=0)
        calls = sum(len(block.samples_ns) for subject in made.subjects for block in subject.blocks)
        save_report(long, compact_report(made))
        print(f"{options.engines} engines and the control, {options.seconds:g} s each, {calls:,} calls")  # noqa: T201
        print(f"report: {long.stat().st_size / 2**20:.2f} MiB")  # noqa: T201
        report = timed("reading it", lambda: load_report(long))
        timed("all statistics as text", lambda: render_report(report))
        page = long.with_suffix(".html")
        timed("the page, after that", lambda: save_page(page, "Latency report", report_sections(report)))
        print(f"page: {page.stat().st_size / 2**10:.0f} KiB")  # noqa: T201
        fleet = [Path(folder) / f"device{index}.json" for index in range(options.reports)]
        for index, path in enumerate(fleet):
            drawn = draw_report(PLANS["quick"], 4, seed=index)
            save_report(path, replace(drawn, environment={**drawn.environment, "machine": path.stem}))
        timed(
            f"matrix of {options.reports} reports, read, compared, as text",
            lambda: render_comparison(compare_files(fleet, allow=(), margin=MARGIN)),
        )


def timed(what: str, call: Callable[[], Result]) -> Result:
    """Call, and print the wall and the processor time."""
    result, times = time_call(call)
    print(f"{what}: {times.wall:.2f} s ({times.processor:.2f} s of processor time)")  # noqa: T201
    return result


def draw_report(plan: Plan, engines: int, *, seed: int) -> Report:
    """Return a report of drawn samples; its first engine has a control."""
    rng = np.random.default_rng(seed)
    medians = {f"engine{index}": _MEDIANS_NS[index % len(_MEDIANS_NS)] for index in range(engines)}
    subjects = [draw_subject(name, median, plan, rng) for name, median in medians.items()]
    control = replace(draw_subject("engine0 (control)", medians["engine0"], plan, rng), control_of="engine0")
    here = environment()
    states = tuple({"at_ns": round(index * 1e9), **read_state()} for index in range(plan.rounds))
    return Report(
        subjects=(*subjects, control),
        plan=plan,
        environment=here,
        environment_end=here,
        created="2026-01-01T00:00:00+00:00",
        states=states,
    )


def draw_subject(name: str, median_ns: float, plan: Plan, rng: np.random.Generator) -> SubjectReport:
    """Return one subject: blocks that drift by 1 %, calls with the tails of Student's t with 3 degrees."""
    calls = int(plan.seconds / plan.rounds * 1e9 / median_ns)
    blocks = []
    openings = [opening for opening, rounds in enumerate(plan.rounds_of_openings()) for _ in rounds]
    for index, opening in enumerate(openings):
        spread = rng.normal(0, 0.01) + 0.02 * rng.standard_t(3, calls)
        samples = (median_ns * np.exp(spread)).astype(np.int64)
        turn = max(20, int(25e6 / median_ns))  # calls
        medians = np.median(samples[: calls // turn * turn].reshape(-1, turn), axis=1).astype(np.int64)
        blocks.append(
            BlockSamples(
                opening=opening,
                round=index,
                start_ns=round(index * 1e9),
                samples_ns=samples,
                turns_ns=medians if len(medians) else None,
            )
        )
    return SubjectReport(name=name, description={"batch": 1, "threads": 1}, blocks=tuple(blocks))


if __name__ == "__main__":
    main()
