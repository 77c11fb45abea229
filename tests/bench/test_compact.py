from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.compare import compare_subjects
from bench.report import MOST_EXACT, SIGNIFICANT_BITS, Storage, compact_report, load_report, save_report
from bench.samples import as_samples, rounded_samples
from bench.statistics import summarise
from bench.tables import render_report

Make = Callable[..., Any]


def lognormal(seed: int, blocks: int, count: int) -> list[list[int]]:
    return np.random.default_rng(seed).lognormal(np.log(5e5), 0.05, (blocks, count)).astype(int).tolist()


def test_samples_are_rounded_to_significant_bits_and_ascend() -> None:
    assert list(rounded_samples(as_samples([4097, 4095, 0, 1, 8195, 2**40 + 1]), 12)) == [
        0,
        1,
        4095,
        4098,
        8196,
        2**40,
    ]
    values = np.random.default_rng(0).integers(1, 2**50, 20_000)
    rounded = np.array(rounded_samples(as_samples(values.tolist()), SIGNIFICANT_BITS))
    assert np.all(np.abs(rounded / np.sort(values) - 1) <= 1 / 4096)


def test_a_report_of_ordinary_length_stays_as_it_is(subject: Make, report: Make) -> None:
    made = report(subject("a", lognormal(0, 6, 100)))
    assert compact_report(made) is made
    assert compact_report(made, most_exact=600) is made
    assert made.storage == Storage(in_order=True, significant_bits=None)
    assert MOST_EXACT == 1_000_000


def test_what_a_long_report_says_stays_within_the_rounding(subject: Make, report: Make) -> None:
    made = report(subject("a", lognormal(0, 20, 2000)), subject("b", lognormal(1, 20, 2000)))
    small = compact_report(made, most_exact=10)
    for exact, rounded in zip(made.subjects, small.subjects, strict=True):
        left, right = summarise(exact), summarise(rounded)
        assert left.count == right.count == 40_000
        assert right.median == pytest.approx(left.median, rel=1 / 4096)
        for percentile, found in left.tails.items():
            assert found is not None and right.tails[percentile].bound == pytest.approx(
                found.bound, rel=1 / 4096
            )
    assert compare_subjects(small, "a", "b").ratio.value == pytest.approx(
        compare_subjects(made, "a", "b").ratio.value, rel=1 / 2048
    )
    assert "* every call is kept, rounded to 12 significant bits (0.024 %)" in render_report(small)


def test_a_long_report_of_eight_engines_is_small(subject: Make, report: Make, tmp_path: Path) -> None:
    # A tenth of the blocks of eight engines of half a millisecond over 600 s; the page's 5 MiB are 512 KiB here.
    made = report(*(subject(f"e{index}", lognormal(index, 30, 4000)) for index in range(8)))
    small = compact_report(made, most_exact=100_000)
    save_report(tmp_path / "r.json", small)
    assert (tmp_path / "r.json").stat().st_size < 512 * 1024
    assert load_report(tmp_path / "r.json") == small
