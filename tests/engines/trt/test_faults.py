from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from engines.trt.faults import describe_warnings, first_error, process_logger


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2


def test_only_errors_are_kept_on_one_line_each() -> None:
    logger = process_logger(SimpleNamespace(ILogger=ILogger))
    assert first_error(logger) == "it gave no reason"
    logger.log(ILogger.WARNING, "a warning")
    logger.log(ILogger.INTERNAL_ERROR, "Thread context has not been set! Using global log stream.")
    logger.log(ILogger.ERROR, "first\n  line")
    logger.log(ILogger.INTERNAL_ERROR, "second")
    assert logger.errors == ["first line", "second"]
    assert logger.warnings == ["a warning"]
    assert first_error(logger) == "first line"


def test_a_flood_is_cut_off() -> None:
    logger = process_logger(SimpleNamespace(ILogger=ILogger))
    for number in range(100):
        logger.log(ILogger.ERROR, f"error {number}")
    assert (len(logger.errors), first_error(logger)) == (20, "error 0")


def test_a_process_has_one_logger_for_each_tensorrt() -> None:
    one, other = SimpleNamespace(ILogger=ILogger), SimpleNamespace(ILogger=ILogger)
    logger = process_logger(one)
    logger.log(ILogger.ERROR, "of an earlier build")
    assert process_logger(one) is logger
    assert first_error(logger) == "it gave no reason"
    assert process_logger(other) is not logger


def test_the_logger_outlives_every_module() -> None:
    code = """
import sys
from types import SimpleNamespace
from engines.trt.faults import process_logger

class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2
    def __del__(self, say=sys.stdout.write):
        say("gone")

process_logger(SimpleNamespace(ILogger=ILogger))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_warnings_are_counted_and_every_line_is_heard() -> None:
    module = SimpleNamespace(ILogger=ILogger)
    logger, heard = process_logger(module), list[str]()
    assert describe_warnings(logger) == ()
    logger.listener = heard.append
    for number in range(30):
        logger.log(ILogger.WARNING, f"use\n another {number}\x1b[31m")
    assert describe_warnings(logger) == (
        "TensorRT gave 30 warnings (--verbose shows all): " + heard[0].removeprefix("[2] "),
    )
    assert heard[0].startswith("[2] use another 0") and "\x1b" not in heard[0]
    assert describe_warnings(process_logger(module)) == ()
    logger.log(ILogger.WARNING, "nobody listens any more")
    assert len(heard) == 30
