"""TensorRT's log: kept, not printed, so that the first error can stand in ours."""

from __future__ import annotations

from typing import Any

from engines.trt.versions import is_harmless

_KEPT = 20  # messages; the first one tells the cause


def make_logger(trt: Any) -> Any:
    """Return a logger that keeps the first errors in its list ``errors``.

    The class is made here because its base class comes from a package that may be missing.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            wrong = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            if wrong and len(self.errors) < _KEPT and not is_harmless(msg):
                self.errors.append(" ".join(msg.split()))

    return Logger()


def first_error(logger: Any, default: str = "it gave no reason") -> str:
    """Return the first error that TensorRT logged."""
    return str(logger.errors[0]) if logger.errors else default


def forget_errors(logger: Any) -> None:
    """Empty the list, so that the next failure is told by its own first message."""
    logger.errors.clear()
