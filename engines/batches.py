"""The check that every runner makes of the batch it is given."""

from __future__ import annotations

from typing import Any

from engines.errors import BadInputError
from engines.record import EngineRecord


class BatchCheck:
    """Holds a batch against an engine's record; made once, called before every run."""

    def __init__(self, record: EngineRecord) -> None:
        """Note what the record says of its inputs."""
        self._shape = record.contract.input_shape
        self._dtype = record.contract.dtype
        self._smallest = record.batch.smallest
        self._largest = record.batch.largest
        self._engine = record.engine
        self._rebuild = record.build_command

    def __call__(self, batch: Any) -> None:
        """Accept ``uint8 [N, height, width, 1]`` with N in the engine's range.

        Raises:
            BadInputError: Another type, shape or size.
        """
        shape: tuple[int, ...] = getattr(batch, "shape", ())
        if (
            len(shape) == 4
            and shape[1:] == self._shape
            and batch.dtype == self._dtype
            and self._smallest <= shape[0] <= self._largest
        ):
            return
        seen = f"{getattr(batch, 'dtype', type(batch).__name__)} {list(shape)}"
        height, width, channels = self._shape
        largest = f"N from {self._smallest} to {self._largest}"
        raise BadInputError(
            f"{self._engine} takes {self._dtype} [N, {height}, {width}, {channels}], {largest}, not {seen}",
            remedy=f"give another batch, or build with another --batch: {self._rebuild}",
        )
