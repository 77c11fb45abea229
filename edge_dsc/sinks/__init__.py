"""Where answers go: rows, drawn pictures, a window, a page."""

from __future__ import annotations

from typing import Protocol

from edge_dsc.loop.answers import Answer


class Sink(Protocol):
    """Takes every answer in order; called by the loop's thread alone."""

    def write(self, answer: Answer) -> None:
        """Take one answer.

        Raises:
            EnvironmentProblem: The disk is full, or the place cannot be written.
        """
        ...

    def close(self) -> None:
        """Finish what is open."""
        ...
