"""TensorRT's log and CUDA's errors, turned into errors of ours."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from engines.errors import ArtefactError, EnvironmentProblem
from engines.record import EngineRecord
from engines.text_table import printable
from engines.trt.cuda import GraphError
from engines.trt.versions import is_harmless

_KEPT = 20  # messages; the first one tells the cause
_REMEDY = "see edge-dsc doctor; free GPU memory, or use a smaller batch"
_loggers: dict[int, tuple[Any, Any]] = {}  # id of a TensorRT module -> the module, its logger


def process_logger(trt: Any) -> Any:
    """Return the process's one logger for a TensorRT; its lists ``errors`` and ``warnings`` are empty.

    TensorRT keeps the first logger that it is given as the global one (NVIDIA/TensorRT#1475) and reports through it
    from then on. A logger that went away with its builder left TensorRT with a dead one: seen with TensorRT for RTX
    1.7 as a build that hung in its first message. So there is one, and it lives as long as the process.
    """
    if id(trt) not in _loggers:
        _loggers[id(trt)] = (trt, _make_logger(trt))
        # Modules are emptied when Python ends, and what is left of TensorRT then still reports.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_loggers[id(trt)][1]))
    logger = _loggers[id(trt)][1]
    forget_errors(logger)
    logger.warnings.clear()
    logger.listener = None
    return logger


def _make_logger(trt: Any) -> Any:
    """Return a logger that keeps the first errors; its class is made here because its base may not be installed."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.listener: Callable[[str], None] | None = None

        def log(self, severity: Any, msg: str) -> None:
            text = printable(" ".join(msg.split()))
            wrong = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            if wrong and len(self.errors) < _KEPT and not is_harmless(msg):
                self.errors.append(text)
            if severity == trt.ILogger.WARNING:
                self.warnings.append(text)
            if self.listener is not None:
                self.listener(f"[{getattr(severity, 'name', severity)}] {text}")

    return Logger()


def describe_warnings(logger: Any) -> tuple[str, ...]:
    """Return how often TensorRT warned since the logger was taken, and the first words; nothing where it did not."""
    if not logger.warnings:
        return ()
    return (
        f"TensorRT gave {len(logger.warnings)} warnings (--verbose shows all): {logger.warnings[0][:300]}",
    )


def first_error(logger: Any, default: str = "it gave no reason") -> str:
    """Return the first error that TensorRT logged."""
    return str(logger.errors[0]) if logger.errors else default


def forget_errors(logger: Any) -> None:
    """Empty the list, so that the next failure is reported with its own first message."""
    logger.errors.clear()


class Faults:
    """Words every failure with the engine's name and the first message of TensorRT's log.

    Attributes:
        record: The engine's record.
        logger: TensorRT's logger.
    """

    def __init__(self, record: EngineRecord, logger: Any, cuda: Any) -> None:
        """Remember whose failures these are.

        Args:
            record: The engine's record.
            logger: TensorRT's logger, from :func:`process_logger`.
            cuda: The module ``pycuda.driver``.
        """
        self.record = record
        self.logger = logger
        self._cuda = cuda

    def problem(self, action: str, reason: str) -> EnvironmentProblem:
        """Return the error for something that does not work here and now.

        Args:
            action: ``open``, ``run`` or ``close``.
            reason: What failed.
        """
        logged = first_error(self.logger, "")
        self.forget()  # the next failure has a cause of its own
        return EnvironmentProblem(
            f"{self.record.runtime} cannot {action} {self.record.engine}: {reason}"
            + (f"; first error logged: {logged}" if logged else ""),
            remedy=_REMEDY,
        )

    def refused(self, reason: str = "") -> ArtefactError:
        """Return the error for an engine that TensorRT, or the contract, does not accept."""
        return ArtefactError(
            f"{self.record.runtime} refuses {self.record.engine}: {reason or first_error(self.logger)}",
            remedy=f"rebuild it: {self.record.build_command}",
        )

    def forget(self) -> str:
        """Empty TensorRT's log of errors and return the first of them, or an empty text."""
        logged = first_error(self.logger, "")
        forget_errors(self.logger)
        return logged

    @contextlib.contextmanager
    def told(self, action: str) -> Iterator[None]:
        """Turn CUDA's errors in a block into ours.

        Raises:
            EnvironmentProblem: CUDA failed.
        """
        try:
            yield
        except (self._cuda.Error, GraphError) as error:
            raise self.problem(action, str(error)) from error

    def current(self, context: Any, action: str) -> CurrentContext:
        """Return a block in which a context is current and CUDA's errors become ours; it can be entered again."""
        return CurrentContext(self, context, action, (self._cuda.Error, GraphError))


class CurrentContext:
    """Makes the device's context current for a block.

    A class, because it is entered for every batch: a generator would cost microseconds each time.
    """

    def __init__(
        self, faults: Faults, context: Any, action: str, failures: tuple[type[Exception], ...]
    ) -> None:
        """Remember what to do; see :meth:`Faults.current`."""
        self._faults = faults
        self._action = action
        self._failures = failures
        self._push, self._pop = context.push, context.pop

    def __enter__(self) -> None:
        """Push the context.

        Raises:
            EnvironmentProblem: CUDA refuses.
        """
        try:
            self._push()
        except self._failures as error:
            raise self._faults.problem(self._action, str(error)) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Pop it.

        Raises:
            EnvironmentProblem: CUDA failed in the block, or refuses.
        """
        try:
            self._pop()
        except self._failures as failure:
            raise self._faults.problem(self._action, str(failure)) from (error or failure)
        if isinstance(error, self._failures):
            raise self._faults.problem(self._action, str(error)) from error
