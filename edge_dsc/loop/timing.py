"""Times of a loop that runs for days, in a fixed amount of memory."""

from __future__ import annotations

import math
from collections import deque

_STEP = math.log(1.02)  # a bucket is 2 % wide
_FLOOR_MS = 1e-3


class TimeHistogram:
    """Counts durations in buckets 2 % wide: quantiles to 1 %, a few hundred numbers however long it runs.

    Attributes:
        count: Durations added.
        largest_ms: The longest, exactly.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest_ms = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, milliseconds: float) -> None:
        """Count one duration."""
        self.count += 1
        self.largest_ms = max(self.largest_ms, milliseconds)
        bucket = math.floor(math.log(max(milliseconds, _FLOOR_MS) / _FLOOR_MS) / _STEP)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def quantile(self, fraction: float) -> float | None:
        """Return the duration below which ``fraction`` of all lie, to 1 %; None where nothing was added."""
        rank = math.ceil(fraction * self.count)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= max(rank, 1):
                return min(_FLOOR_MS * math.exp((bucket + 0.5) * _STEP), self.largest_ms)
        return None

    def to_dict(self) -> dict[str, float | None]:
        """Return ``median_ms``, ``p99_ms`` and ``max_ms``, rounded to a microsecond; None where too few."""
        median = self.quantile(0.5)
        p99 = self.quantile(0.99) if self.count >= 100 else None
        return {
            "median_ms": round(median, 3) if median is not None else None,
            "p99_ms": round(p99, 3) if p99 is not None else None,
            "max_ms": round(self.largest_ms, 3) if self.count else None,
        }


class RecentRate:
    """Answers a second over the last hundred or so."""

    def __init__(self, window: int = 120) -> None:
        self._times: deque[float] = deque(maxlen=window)

    def add(self, now: float) -> None:
        """Note an answer at a monotonic time, in seconds."""
        self._times.append(now)

    def per_second(self) -> float | None:
        """Return the rate, or None before the second answer."""
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])
