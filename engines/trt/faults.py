"""Failures of TensorRT and CUDA around one engine, turned into our errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from engines.errors import ArtefactError, EnvironmentProblem
from engines.record import EngineRecord
from engines.trt.capture import GraphError
from engines.trt.log import first_error, forget_errors

_REMEDY = "see edge-dsc doctor; free GPU memory, or use a smaller batch"


class Faults:
    """Words every failure with the engine's name and the first message of TensorRT's log.

    Attributes:
        logger: TensorRT's logger.
    """

    def __init__(self, record: EngineRecord, logger: Any, cuda: Any) -> None:
        """Remember whose failures these are.

        Args:
            record: The engine's record.
            logger: TensorRT's logger, from :func:`engines.trt.log.make_logger`.
            cuda: The module ``pycuda.driver``.
        """
        self._record = record
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
            f"{self._record.runtime} cannot {action} {self._record.engine}: {reason}"
            + (f"; first error logged: {logged}" if logged else ""),
            remedy=_REMEDY,
        )

    def refused(self, reason: str = "") -> ArtefactError:
        """Return the error for an engine that TensorRT, or the contract, does not accept."""
        return ArtefactError(
            f"{self._record.runtime} refuses {self._record.engine}: {reason or first_error(self.logger)}",
            remedy=f"rebuild it: {self._record.build_command}",
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
