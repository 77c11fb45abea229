"""Keras and its files: the one place that imports it, writes ``.keras`` files, and reads them in safe mode."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from engines.errors import ArtefactError
from engines.packages import load

if TYPE_CHECKING:
    from keras import Model


def load_keras() -> ModuleType:
    """Import Keras on TensorFlow, with TensorFlow's start-up messages off the terminal.

    All of edge-dsc gets Keras here, and not before it trains or exports: TensorFlow takes seconds to import, and a
    machine that only runs engines has none.

    Raises:
        EnvironmentProblem: TensorFlow or Keras is missing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with _silenced_stderr():
        tensorflow = load("tensorflow")
        # Two operations at once finish in any order, and with oneDNN that changes the last bits of a sum,
        # whatever enable_op_determinism says (TensorFlow 2.21; seen in the second step). One operation still
        # uses every core. Must come before TensorFlow's first operation; a host program's choice stands.
        with contextlib.suppress(RuntimeError):
            tensorflow.config.threading.set_inter_op_parallelism_threads(1)
        # It warns of retracing whenever several models predict in one process, as they do here.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        return load("keras")


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere while TensorFlow is imported.

    TensorFlow 2.21 writes six lines about oneDNN and missing CUDA drivers from C++ then, whatever its log level; they
    would stand before every message of ours. A failed import still comes as an exception.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def save_network(model: Model, path: Path) -> None:
    """Write a network as a ``.keras`` file."""
    with _keras_on_numpy_2():
        model.save(path)


def read_network(path: Path) -> Model:
    """Read a ``.keras`` file, without running code from it (safe mode).

    Raises:
        ArtefactError: Keras cannot read it.
        EnvironmentProblem: TensorFlow is missing.
    """
    keras = load_keras()
    try:
        with _keras_on_numpy_2():
            return keras.models.load_model(path, compile=False, safe_mode=True)
    # A file that asks for a layer of PyTorch ends in ImportError, a deep one in RecursionError, a RuntimeError.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(
            f"Keras cannot load {path}: {reason}",
            remedy="train again, or use the versions named in training.json",
        ) from error


@contextlib.contextmanager
def _keras_on_numpy_2() -> Iterator[None]:
    """Quieten numpy 2 about Keras 3.15's variables, which take no ``copy`` keyword in ``__array__``."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="__array__ implementation doesn't accept", category=DeprecationWarning
        )
        yield
