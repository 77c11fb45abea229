"""Studies whose trainings nobody trained, and processes that say what a training's says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edge_dsc.study.trainings import Study, StudyOptions, Training, open_study

Command = Callable[[Study, Training, Sequence[int], str], list[str]]
SEEDS = 2


@pytest.fixture
def options(textures: Path, tmp_path: Path) -> StudyOptions:
    return StudyOptions(data=textures, out=tmp_path / "study", seeds=SEEDS, bench=False)


@pytest.fixture
def study(options: StudyOptions) -> Study:
    """A study of cnn and dsc, without augmentation and with it, over two seeds; nothing is trained."""
    with open_study(options) as found:
        return found


@pytest.fixture
def speaking() -> Callable[..., Command]:
    """Make a training's process that says some words, runs some code, and ends."""

    def make(*words: dict[str, object], code: str = "", only: dict[str, str] | None = None) -> Command:
        lines = [json.dumps(word) for word in words]

        def command(study: Study, training: Training, cores: Sequence[int], scope: str) -> list[str]:
            end = (only or {}).get(training.folder, code)
            script = f"import sys\nfor line in {lines!r}: print(line, flush=True)\n{end}"
            return [sys.executable, "-S", "-c", script, training.folder, ",".join(map(str, cores)), scope]

        return command

    return make
