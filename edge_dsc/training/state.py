"""The state of an unfinished run, saved after every epoch, from which training goes on bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import ArtefactError
from engines.files import write_bytes
from engines.packages import load

SCHEMA_VERSION = 1
FILE = "state.npz"
_ANEW = "begin anew: edge-dsc train DATA --overwrite"

Array = Any


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come.

    Attributes:
        settings: What decides the run: network, recipe, seed, split. A run goes on only with equal ones.
        epoch: Whole epochs done.
        history: One list of figures by name, a figure an epoch.
        variables: The model's variables, with the state of its random generators.
        optimizer: The optimizer's variables.
        best_epoch: Epoch of the lowest validation loss, counted from 1; 0 before the first.
        best_weights: The model's weights after that epoch.
    """

    settings: Mapping[str, Any]
    epoch: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    variables: list[Array] = field(default_factory=list)
    optimizer: list[Array] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: list[Array] = field(default_factory=list)


_ARRAYS = ("variables", "optimizer", "best_weights")


def save_state(path: Path, state: TrainState) -> None:
    """Write the state atomically: a killed run leaves the last whole epoch."""
    numpy = load("numpy")
    header = {
        "schema_version": SCHEMA_VERSION,
        "settings": dict(state.settings),
        "epoch": state.epoch,
        "history": state.history,
        "best_epoch": state.best_epoch,
        "counts": {name: len(getattr(state, name)) for name in _ARRAYS},
    }
    arrays = {f"{name}{index}": value for name in _ARRAYS for index, value in enumerate(getattr(state, name))}
    stream = io.BytesIO()
    numpy.savez(stream, header=numpy.frombuffer(json.dumps(header).encode(), numpy.uint8), **arrays)
    write_bytes(path, stream.getvalue())


def load_state(path: Path) -> TrainState:
    """Read a saved state.

    Raises:
        ArtefactError: Missing, damaged, or of another schema version.
    """
    numpy = load("numpy")
    try:
        with numpy.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            if header["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {header['schema_version']}")
            arrays = {
                name: [stored[f"{name}{index}"] for index in range(header["counts"][name])]
                for name in _ARRAYS
            }
            return TrainState(
                settings=header["settings"],
                epoch=header["epoch"],
                history=header["history"],
                best_epoch=header["best_epoch"],
                **arrays,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ArtefactError(f"{path} is no readable training state: {error}", remedy=_ANEW) from error
    except Exception as error:
        # zipfile.BadZipFile and zlib.error derive from Exception alone.
        if type(error).__module__ in ("zipfile", "zlib"):
            raise ArtefactError(f"{path} is damaged: {error}", remedy=_ANEW) from error
        raise
