from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.infer.camera import LiveSource
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.infer.sinks import Outputs
from edge_dsc.infer.source import Frame, ListedFiles
from edge_dsc.infer.stop import Stop
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.record import BatchRange


@pytest.fixture(scope="module")
def engine(deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "dsc.engine"
    request = BuildRequest(
        model=deployed_models["dsc"], runtime="onnxruntime", batch=BatchRange(1, 1, 4), out=out
    )
    return build_engine(request).path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (256, 256), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), noise)
    (folder / "1.png").write_text("text")
    return folder


def infer(engine: Path, source: Path, out: Path | None, *, keep: bool = False):
    return infer_source(InferRequest(engine=engine, source=str(source), out=out, threads=2, keep_rows=keep))


def test_csv_and_json_lines_hold_the_same_rows(engine: Path, folder: Path, tmp_path: Path) -> None:
    summary = infer(engine, folder, tmp_path / "a.csv", keep=True)
    infer(engine, folder, tmp_path / "a.jsonl")
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == summary.rows
    assert [
        {key: "" if value is None else str(value) for key, value in line.items()} for line in lines
    ] == rows
    assert list(lines[0]) == ["path", "label", "probability", "p_clear", "p_focal", "p_diffuse", "error"]
    assert [line["path"] for line in lines] == [str(folder / f"{i}.png") for i in range(3)]
    assert sum(lines[0][f"p_{name}"] for name in ("clear", "focal", "diffuse")) == pytest.approx(1, abs=2e-6)
    assert lines[1]["label"] is None and "is damaged or no image (4 bytes" in lines[1]["error"]
    assert (summary.images, summary.answered, summary.failed) == (3, 2, 1)


def test_standard_output_gets_csv(engine: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infer(engine, folder, None)
    assert capsys.readouterr().out.splitlines()[0] == "path,label,probability,p_clear,p_focal,p_diffuse,error"


def test_a_folder_of_bad_images_is_an_error_with_the_rows_kept(
    engine: Path, folder: Path, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadInputError, match="none of the 3 images"):
        infer(engine, folder, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().count("is empty (0 bytes)") == 3


def test_other_suffixes_are_refused(engine: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.xls"):
        infer(engine, folder, tmp_path / "a.xls")


def test_a_video_gives_a_row_for_every_frame(engine: Path, video: Path, tmp_path: Path) -> None:
    outputs = Outputs(annotate=tmp_path / "drawn.avi", unsure=(1.0, tmp_path / "unsure"))
    request = InferRequest(
        engine=engine, source=str(video), out=tmp_path / "a.jsonl", threads=2, outputs=outputs
    )
    summary = infer_source(request)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["frame"] for row in rows] == list(range(12))
    assert [row["seconds"] for row in rows] == [index / 10 for index in range(12)]
    assert {row["path"] for row in rows} == {str(video)} and all(row["latency_ms"] > 0 for row in rows)
    assert (summary.source_kind, summary.images, summary.answered, summary.note) == ("video", 12, 12, None)
    assert summary.latency["median_ms"] is not None and summary.age is None
    drawn = cv2.VideoCapture(str(tmp_path / "drawn.avi"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 12
    drawn.release()
    assert len(list((tmp_path / "unsure").iterdir())) == 12


def test_a_truncated_video_is_noted(engine: Path, video: Path, tmp_path: Path) -> None:
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 3 // 4])
    summary = infer(engine, video, tmp_path / "a.csv")
    assert "states 12 frames" in summary.line()


def test_a_video_that_was_stopped_is_not_called_damaged(engine: Path, video: Path, tmp_path: Path) -> None:
    stop = Stop()
    stop.signal = "SIGINT"
    stop.ask()
    summary = infer_source(InferRequest(engine=engine, source=str(video), out=tmp_path / "a.csv"), stop=stop)
    assert (summary.interrupted, summary.note) == (True, None)


def test_a_camera_answers_with_the_age_of_each_frame(
    engine: Path, network_camera: Any, jpeg: Any, tmp_path: Path
) -> None:
    network_camera.scripts = [b"".join(network_camera.part(jpeg(value)) for value in range(0, 250, 10))]
    url = network_camera.url.replace("http://", "http://me:secret@")
    out = tmp_path / "a.jsonl"
    said: list[str] = []
    request = InferRequest(
        engine=engine, source=url, out=out, limit=1, keep_rows=True, outputs=Outputs(serve=0)
    )
    summary = infer_source(request, say=said.append)
    row = json.loads(out.read_text())
    assert row["age_ms"] >= row["latency_ms"] > 0
    assert row["path"] == summary.source == network_camera.url.replace("http://", "http://me:***@")
    assert summary.age is not None and summary.age["max_ms"] == pytest.approx(row["age_ms"], abs=1e-3)
    assert (summary.source_kind, summary.images, summary.rows) == ("live", 1, [])
    assert any(line.startswith("live page: http://127.0.0.1:") for line in said)
    assert "secret" not in f"{summary}{said}"


def test_a_frame_of_a_camera_has_its_row_before_the_next_one_is_taken(
    engine: Path, network_camera: Any, jpeg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network_camera.scripts = [network_camera.part(jpeg(9))]
    out = tmp_path / "a.jsonl"
    rows: list[int] = []

    def items(source: LiveSource, stop: Stop) -> Any:
        for index in range(3):
            rows.append(out.read_text().count("\n"))
            yield Frame(index=index, pixels=jpeg(50), captured=0.0)

    monkeypatch.setattr(LiveSource, "items", items)
    infer_source(InferRequest(engine=engine, source=network_camera.url, out=out, threads=4))
    assert rows == [0, 1, 2]


def test_a_limit_ends_the_run(engine: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    summary = infer_source(InferRequest(engine=engine, source=str(folder), out=out, limit=2))
    assert (summary.answered + summary.failed, summary.images, summary.interrupted) == (2, 3, False)


def test_a_stop_ends_after_the_picture_at_hand(engine: Path, folder: Path, tmp_path: Path) -> None:
    stop = Stop()
    stop.ask()
    out = tmp_path / "a.csv"
    summary = infer_source(InferRequest(engine=engine, source=str(folder), out=out), stop=stop)
    assert summary.answered == 1 and len(out.read_text().splitlines()) == 2


def test_paths_come_from_standard_input(
    engine: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{folder / name}.png\n" for name in "210")))
    summary = infer(engine, Path("-"), tmp_path / "a.jsonl", keep=True)
    assert [row["path"] for row in summary.rows] == [str(folder / f"{name}.png") for name in "210"]
    assert (summary.source_kind, summary.images, summary.answered, summary.failed) == ("list", None, 2, 1)


def test_silence_on_standard_input_does_not_count_as_a_picture(
    engine: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(source: ListedFiles, stop: Stop) -> Any:
        yield from (None, folder / "0.png", None, None, folder / "2.png", folder / "0.png")

    monkeypatch.setattr(ListedFiles, "items", silent)
    out = tmp_path / "a.csv"
    summary = infer_source(InferRequest(engine=engine, source="-", out=out, limit=2))
    with out.open(newline="") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == [str(folder / f"{i}.png") for i in (0, 2)]
    assert summary.answered == 2


def test_progress_counts_what_is_left(engine: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    steps: list[tuple[str, int, int]] = []

    def run(**options: Any) -> None:
        steps.clear()
        request = InferRequest(engine=engine, source=str(folder), out=out, **options)
        infer_source(request, progress=lambda *step: steps.append(step))

    run(limit=1)
    assert steps == [("classifying", 1, 1)]
    run(resume=True)
    assert steps == [("classifying", 1, 2), ("classifying", 2, 2)]


def test_rows_of_another_engine_are_not_gone_on_with(
    engine: Path, deployed_models: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cnn.engine"
    build_engine(
        BuildRequest(model=deployed_models["cnn"], runtime="onnxruntime", batch=BatchRange(), out=other)
    )
    out = tmp_path / "a.csv"
    infer_source(InferRequest(engine=other, source=str(folder), out=out, limit=2))
    rows = out.read_bytes() + b"half a"
    out.write_bytes(rows)
    request = InferRequest(engine=engine, source=str(folder), out=out, resume=True)
    with pytest.raises(ArtefactError, match=r"another engine wrote .*a\.csv, or .*0\.png changed since"):
        infer_source(request)
    assert out.read_bytes() == rows
    assert infer_source(replace(request, engine=other)).resumed == 2


def test_what_has_no_second_time_cannot_be_resumed(engine: Path, video: Path, tmp_path: Path) -> None:
    for source in (str(video), "/dev/video9"):
        request = InferRequest(engine=engine, source=source, out=tmp_path / "a.csv", resume=True)
        with pytest.raises(UsageError, match=r"--resume cannot go on with .*files, folders and globs"):
            infer_source(request)
    with pytest.raises(UsageError, match="--resume needs the file to go on with"):
        infer_source(InferRequest(engine=engine, source=str(video), resume=True))


def test_nothing_there_is_said_and_the_old_rows_stay(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    out = tmp_path / "a.csv"
    out.write_text("old")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "no.avi", "/dev/video99", "http://127.0.0.1:1/", "-"):
        with pytest.raises(BadInputError, match="no path came" if source == "-" else None):
            infer_source(InferRequest(engine=engine, source=str(source), out=out))
    assert out.read_text() == "old"


def test_a_camera_of_bad_frames_alone_does_not_give_its_password_away(
    engine: Path, network_camera: Any, tmp_path: Path
) -> None:
    network_camera.scripts = [network_camera.part(b"no jpeg\xff\xd9")]
    url = network_camera.url.replace("http://", "http://me:secret@")
    request = InferRequest(engine=engine, source=url, out=tmp_path / "rows.csv", limit=1, give_up_s=0)
    with pytest.raises(BadInputError) as caught:
        infer_source(request)
    assert "secret" not in str(caught.value) and "http://me:***@127.0.0.1" in str(caught.value)
    assert "secret" not in (tmp_path / "rows.csv").read_text()
