from __future__ import annotations

from types import SimpleNamespace

from engines.trt.log import first_error, make_logger


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2


def test_only_errors_are_kept_on_one_line_each() -> None:
    logger = make_logger(SimpleNamespace(ILogger=ILogger))
    assert first_error(logger) == "it gave no reason"
    logger.log(ILogger.WARNING, "a warning")
    logger.log(ILogger.INTERNAL_ERROR, "Thread context has not been set! Using global log stream.")
    logger.log(ILogger.ERROR, "first\n  line")
    logger.log(ILogger.INTERNAL_ERROR, "second")
    assert logger.errors == ["first line", "second"]
    assert first_error(logger) == "first line"


def test_a_flood_is_cut_off() -> None:
    logger = make_logger(SimpleNamespace(ILogger=ILogger))
    for number in range(100):
        logger.log(ILogger.ERROR, f"error {number}")
    assert (len(logger.errors), first_error(logger)) == (20, "error 0")
