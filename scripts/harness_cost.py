"""What the harness costs beside the call that it times: an empty call in its loop against the same call in a bare one.

    python scripts/harness_cost.py [--calls 1000000] [--rounds 9]

``in a sample`` is what an empty call's latency comes to: it is part of every latency that is reported. ``beside a
call`` is the time of a whole turn of the loop above the bare loop's: it costs patience and is in no latency.
"""

from __future__ import annotations

import statistics
import time

from turns import script_parser

from bench.measure import Subject, always_open, measure
from bench.plan import Plan


def main() -> None:
    """Measure and print, nanoseconds."""
    parser = script_parser(__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    plan = Plan(iterations=options.calls, rounds=1, warmup_seconds=0, lead_in=0)
    subject = Subject(name="nothing", open=always_open(nothing))
    inside, beside = [], []
    for _ in range(options.rounds):
        start = time.process_time_ns()
        report = measure([subject], plan, read_environment=dict, read_machine=dict)
        whole = time.process_time_ns() - start
        start = time.process_time_ns()
        for _ in range(options.calls):
            nothing()
        bare = time.process_time_ns() - start
        inside.append(report.subjects[0].blocks[0].median_ns - bare / options.calls)
        beside.append((whole - bare) / options.calls)
    for name, found in (("in a sample", inside), ("beside a call", beside)):
        low, high = min(found), max(found)
        print(f"{name}: {statistics.median(found):.0f} ns, {low:.0f} to {high:.0f}")  # noqa: T201


def nothing() -> None:
    """Do what an empty request does."""


if __name__ == "__main__":
    main()
