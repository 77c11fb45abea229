from __future__ import annotations

import pytest

from edge_dsc.infer.classify import ordered_map


def times_ten(group: list[int]) -> list[int]:
    return [item * 10 for item in group]


def test_an_idle_source_lets_go_of_what_waits() -> None:
    taken = []

    def source():
        for item in (1, 2, None, None, 3):
            taken.append(item)
            yield item

    results = ordered_map(times_ten, source(), threads=4)
    assert (next(results), taken) == (10, [1, 2, None])
    assert list(results) == [20, None, None, 30]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 100])
def test_every_item_has_its_result_in_order(count: int) -> None:
    assert list(ordered_map(times_ten, range(count), threads=3)) == [item * 10 for item in range(count)]


def test_an_error_comes_at_its_place() -> None:
    results = ordered_map(lambda group: [6 // item for item in group], [3, 2, 1, 1, 0, 1], threads=2)
    assert [next(results) for _ in range(4)] == [2, 3, 6, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
