"""Every error that edge-dsc raises on purpose, one exit code a class.

EdgeDscError                 1  unexpected
├── UsageError               2  the command asks for something impossible
├── EnvironmentProblem       3  a package, a GPU, a permission or disk space is missing
│   └── UnansweredError      3  a server did not answer these pictures; it may answer the next
├── ArtefactError            4  a file of ours is stale, foreign, damaged or renamed
├── AccuracyGateError        5  the engine loses more accuracy than allowed
├── LatencyRegressionError   6  slower than allowed
├── UnstableError            7  too noisy, or too few samples, for an answer
├── NotComparableError       8  the two reports measure different things
└── BadInputError            9  the user's data cannot be used
    └── ImageError           9  one image cannot be used; the rest can
"""

from __future__ import annotations

from engines.text_table import printable

_LONGEST = 1000  # characters of either half of an error: what it quotes may come from a stranger


class EdgeDscError(Exception):
    """An error with its remedy.

    Args:
        what: What happened, with the value seen. One line.
        remedy: What the reader can do about it. One line.
        details: Lines that explain it, such as a table; shown before the error itself.
    """

    exit_code = 1

    def __init__(self, what: str, *, remedy: str, details: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.details = details

    def __str__(self) -> str:
        """One line, safe for a terminal: what happened, then what to do; the middle of a long one is left out."""
        return printable(f"{_shortened(self.what)} ({_shortened(self.remedy)})")


def _shortened(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


class UsageError(EdgeDscError):
    """The command line asks for something that cannot be done."""

    exit_code = 2


class EnvironmentProblem(EdgeDscError):
    """This machine lacks something: a package, a GPU, a permission, disk space."""

    exit_code = 3


class UnansweredError(EnvironmentProblem):
    """A server did not answer these pictures; a run over many goes on without them."""


class ArtefactError(EdgeDscError):
    """A file that edge-dsc wrote is stale, foreign, damaged or renamed."""

    exit_code = 4


class AccuracyGateError(EdgeDscError):
    """The engine loses more accuracy, or has less precision, than was asked for."""

    exit_code = 5


class LatencyRegressionError(EdgeDscError):
    """An engine became slower than allowed."""

    exit_code = 6


class UnstableError(EdgeDscError):
    """The measurement is too noisy, or too short, for an answer."""

    exit_code = 7


class NotComparableError(EdgeDscError):
    """Two reports measure different things."""

    exit_code = 8


class BadInputError(EdgeDscError):
    """The user's data cannot be used."""

    exit_code = 9


class ImageError(BadInputError):
    """One image cannot be used; a run over many images goes on without it."""
