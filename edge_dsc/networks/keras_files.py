"""Keras and networks from elsewhere: the one place that imports it, reads and writes its files, and calls a function.

A ``.keras`` file may come from anyone, so no code of it runs (safe mode). A function runs because a person named it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import platform
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from engines.contract import LARGEST_MODEL
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.files import require_unpacked
from engines.packages import load

if TYPE_CHECKING:
    from keras import Model

_MOST_UNPACKED = 2 * LARGEST_MODEL  # the largest model, and what an optimizer kept beside its weights


def load_keras() -> ModuleType:
    """Import Keras on TensorFlow, with TensorFlow's start-up messages off the terminal.

    All of edge-dsc gets Keras here, and not before it trains or exports: TensorFlow takes seconds to import, and a
    machine that only runs engines has none.

    Raises:
        EnvironmentProblem: TensorFlow or Keras is missing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if platform.machine().lower() in ("x86_64", "amd64"):
        # TensorFlow uses oneDNN by itself only on processors with AVX-512's instructions for networks. On one with AVX2
        # (two cores of an AMD EPYC) a step of training takes 0.4 to 0.5 of the time with it, prediction 0.25 to 0.35.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
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


def read_network(
    path: Path, *, remedy: str = "train again, or use the versions named in training.json"
) -> Model:
    """Read a ``.keras`` file, without running code from it (safe mode).

    Args:
        path: The file.
        remedy: What to do where it cannot be read.

    Raises:
        ArtefactError: Keras cannot read it: damaged, or with code of its own (a Lambda layer, a class of its own),
            or unpacking to more than any network here needs.
        EnvironmentProblem: TensorFlow is missing.
    """
    keras = load_keras()
    try:
        if zipfile.is_zipfile(path):
            require_unpacked(path, _MOST_UNPACKED)
        with _keras_on_numpy_2():
            return keras.models.load_model(path, compile=False, safe_mode=True)
    # A file that asks for a layer of PyTorch ends in ImportError, a deep one in RecursionError, a RuntimeError.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError) as error:
        # Its later sentences advise what must not be done: to run the file's code all the same.
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise ArtefactError(
            f"Keras cannot load {path}: {reason}",
            remedy=remedy,
        ) from error


def load_function(name: str) -> Callable[..., object]:
    """Import a function that a person named; all code of its module runs.

    Args:
        name: ``module:function`` of a module that is installed or on PYTHONPATH, or ``FILE.py:function``. A module is
            never taken from the working folder by its name alone: there a file must be named as one.

    Raises:
        UsageError: No such name.
        BadInputError: The module is not there, does not import, or has no such function.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name.isidentifier():
        raise UsageError(f"{name!r} names no function", remedy="write module:function or FILE.py:function")
    try:
        if module_name.endswith(".py"):
            module = _run_file(Path(module_name))
        else:
            with _without_working_folder():
                module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInputError(
            f"{module_name} cannot be imported: {type(error).__name__}: {reason}",
            remedy="install it, set PYTHONPATH, or name its file: FILE.py:function",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInputError(f"{module_name} has no function {function_name}", remedy="name one that it has")
    return cast(Callable[..., object], function)


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _without_working_folder() -> Iterator[None]:
    """Take the working folder from the import path, where ``python -m`` puts it, unless PYTHONPATH names it."""
    kept, here = list(sys.path), Path.cwd()
    named = {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    if here not in named:
        sys.path[:] = [entry for entry in kept if entry and Path(entry) != here]
    try:
        yield
    finally:
        sys.path[:] = kept


@contextlib.contextmanager
def _keras_on_numpy_2() -> Iterator[None]:
    """Quieten numpy 2 about Keras 3.15's variables, which take no ``copy`` keyword in ``__array__``."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="__array__ implementation doesn't accept", category=DeprecationWarning
        )
        yield
