from __future__ import annotations

import pytest

from edge_dsc.loop.ordered import ordered_map


def test_an_idle_source_lets_go_of_what_waits() -> None:
    taken = []

    def source():
        for item in (1, 2, None, 3):
            taken.append(item)
            yield item

    results = ordered_map(lambda item: item * 10, source(), threads=4)
    assert (next(results), taken) == (10, [1, 2, None])
    assert list(results) == [20, 30]


def test_an_error_comes_at_its_place() -> None:
    results = ordered_map(lambda item: 6 // item, [3, 2, 0, 1], threads=2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
