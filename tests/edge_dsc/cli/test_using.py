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


@pytest.fixture(scope="module")
def cam_engine(built_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with class activation maps, in a folder of its own."""
    from edge_dsc.build.engine import BuildRequest, build_engine

    out = tmp_path_factory.mktemp("cam") / "cam.engine"
    request = BuildRequest(model=built_run / "model.onnx", runtime="onnxruntime", cam=True, out=out)
    return build_engine(request).path


def test_infer_decides_by_thresholds_and_shows_where_the_evidence_lies(
    edge_dsc: Any, cam_engine: Path, textures: Path, tmp_path: Path
) -> None:
    words = ["--threshold", "focal=0.000001", "--threshold", "diffuse=1", "--abstain", "1", "--cam"]
    drawn = tmp_path / "drawn"
    done = edge_dsc(
        "infer", cam_engine, textures / "focal", "--limit", "3", *words, "--annotate", drawn, "--json"
    )
    assert done.code == 0, done.err
    assert (done.json["schema_version"], done.json["abstained"]) == (2, 0)
    assert [row["decision"] for row in done.json["rows"]] == ["focal"] * 3
    assert all(0 <= row["outside_chest"] <= 1 for row in done.json["rows"])
    assert len(list(drawn.iterdir())) == 3
    undecided = edge_dsc("infer", cam_engine, textures / "focal", "--limit", "3", "--abstain", "1")
    assert "3 images classified, 3 of them left undecided" in undecided.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "focal"], "--threshold 'focal' is no threshold"),
        (["--threshold", "focal=nan"], "--threshold 'focal=nan' is no threshold"),
        (["--threshold", "focal=0.1", "--threshold", "focal=0.2"], "is no threshold but the second one"),
        (["--threshold", "covid19=0.3"], "there is no class 'covid19' to set a threshold for"),
        (["--cam"], "was built without class activation maps (build it with them: edge-dsc build-engine"),
    ],
)
@pytest.mark.parametrize("command", ["infer", "evaluate"])
def test_points_and_maps_that_an_engine_does_not_have_are_refused(
    edge_dsc: Any, engine: Path, textures: Path, command: str, words: list[str], said: str
) -> None:
    done = edge_dsc(command, engine, textures, *words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_evaluate_tells_what_probabilities_mean_and_where_the_evidence_lies(
    edge_dsc: Any, cam_engine: Path, textures: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "evaluation.json", tmp_path / "evaluation.html"
    words = ["--threshold", "focal=0.2", "--abstain", "0.5", "--cam"]
    done = edge_dsc("evaluate", cam_engine, textures, *words, "--out", out, "--html", page)
    assert done.code == 0, done.err
    for text in (
        "expected calibration error",
        "area under ROC",
        "operating point (focal from 0.2, others from 0.5): a class is called for",
        "Evidence for the most probable class outside the central chest",
        "Occlusion of 24 pictures",
    ):
        assert text in done.out
    found = json.loads(out.read_text())
    assert found["schema_version"] == 3 and found["confidence"]["temperature"] == 1.0
    assert set(found["confidence"]["curves"]) == {"clear", "diffuse", "focal"}
    text = page.read_text()
    for title in ("Right and wrong", "What the probabilities mean", "Operating point", "Where the evidence"):
        assert f"<h2>{title}" in text
    assert text.count('<svg viewBox="0 0 460') == 2
