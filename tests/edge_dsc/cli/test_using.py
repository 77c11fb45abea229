"""Commands that use an engine: rows, figures, and their ``--json``, one object on standard output."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_dsc.cli.options import Running, running_options
from engines.runtimes import DEFAULT_OPTIONS, RunnerOptions


def test_infer_prints_csv(edge_dsc: Any, engine: Path, textures: Path) -> None:
    done = edge_dsc("infer", engine, textures / "focal")
    assert done.code == 0
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["path"] for row in rows] == sorted(str(path) for path in (textures / "focal").iterdir())
    assert "30 images classified" in done.err


def test_infer_json_is_one_object(edge_dsc: Any, engine: Path, textures: Path, tmp_path: Path) -> None:
    done = edge_dsc("infer", engine, f"{textures}/clear/00*.png", "--out", tmp_path / "a.jsonl", "--json")
    assert done.json["kind"] == "edge-dsc/infer-result"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert done.json["rows"] == lines and len(lines) == 10


def test_evaluate_against_itself_agrees(edge_dsc: Any, engine: Path, textures: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    done = edge_dsc("evaluate", engine, textures, "--reference", engine, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json == json.loads(out.read_text())
    assert done.json["agreement"]["same_top1"] == done.json["images"] == 150
    assert done.json["agreement"]["largest_difference"] == 0
    text = edge_dsc("evaluate", engine, textures, "--reference", engine).out
    assert "same class for 150 of 150 images (100.00%)" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--slots", "3"], "--slots"),
        (["--no-graph"], "--graph"),
        (["--wait", "sleep"], "--wait"),
        (["--device", "0"], "--device"),
    ],
)
@pytest.mark.parametrize("command", ["infer", "bench"])
def test_what_is_for_a_gpu_is_refused_for_the_processor(
    edge_dsc: Any, engine: Path, textures: Path, command: str, words: list[str], named: str
) -> None:
    arguments = [engine, textures] if command == "infer" else [engine]
    done = edge_dsc(command, *arguments, *words)
    assert done.code == 2
    assert f"{engine} is of onnxruntime, which runs on the processor: {named} is for a GPU" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--gpu-memory", "managed"],
            "--gpu-memory 'managed' is no choice (choose one of auto, device, mapped)",
        ),
        (["--wait", "poll"], "--wait 'poll' is no choice (choose one of spin, sleep)"),
    ],
)
def test_words_that_are_no_choice_are_refused(
    edge_dsc: Any, engine: Path, textures: Path, words: list[str], said: str
) -> None:
    done = edge_dsc("infer", engine, textures, *words)
    assert done.code == 2 and said in done.err


def test_how_a_gpu_engine_runs_is_handed_on(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.runtimes.get_runtime", lambda name: SimpleNamespace(runs_on_cpu=False))
    assert running_options([engine], Running()) is DEFAULT_OPTIONS
    found = running_options([engine], Running(slots=3, graph=False, memory="mapped", wait="sleep", device=1))
    assert found == RunnerOptions(slots=3, graph=False, memory="mapped", blocking_wait=True, device=1)
    assert running_options([engine], Running(graph=True)) == RunnerOptions()
    assert running_options([engine], Running(device=0)) == RunnerOptions()


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "ENGINE", "DATA"),
        ("inspect", "ENGINE", "--layers"),
    ],
)
def test_a_gpu_is_refused_by_name_wherever_one_can_be_named(
    edge_dsc: Any, engine: Path, textures: Path, arguments: tuple[str, ...]
) -> None:
    places = {"ENGINE": engine, "DATA": textures}
    done = edge_dsc(*[places.get(word, word) for word in arguments], "--device", "1")
    assert done.code == 2
    assert f"{engine} is of onnxruntime, which runs on the processor: --device is for a GPU" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("build-engine", "RUN", "--backend", "onnxruntime"),
            "onnxruntime runs on the processor: --device is",
        ),
        (
            ("debug", "RUN", "--calib-data", "DATA", "--backend", "onnxruntime"),
            "onnxruntime runs on the processor: --device is",
        ),
        (
            ("calibrate", "RUN", "--calib-data", "DATA"),
            "ranges by mse are found on the processor: --device is",
        ),
        (("inspect", "RUN"), "--device has no use where nothing runs"),
    ],
)
def test_a_gpu_is_refused_where_none_is_concerned(
    edge_dsc: Any, run: Path, textures: Path, arguments: tuple[str, ...], words: str
) -> None:
    before = sorted(run.iterdir())
    places = {"RUN": run, "DATA": textures}
    done = edge_dsc(*[places.get(word, word) for word in arguments], "--device", "1")
    assert (done.code, done.out) == (2, "")
    assert words in done.err and "leave" in done.err
    assert sorted(run.iterdir()) == before
