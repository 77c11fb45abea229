"""What people give by mistake: one line that says what, the value seen and what to do, and the right exit code."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

ORT = ("--backend", "onnxruntime")


def refused(done: Any, code: int, *words: str) -> None:
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == code, done.err
    assert len(errors) == 1, done.err
    for word in words:
        assert word in errors[0]
    assert done.out == ""


def test_data_that_is_not_there(edge_dsc: Any, tmp_path: Path, engine: Path, run: Path) -> None:
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    for folder, words in ((nowhere, "does not exist"), (empty, "no images in class folders")):
        refused(edge_dsc("train", folder, "--out", tmp_path / "new"), 9, str(folder), words)
        refused(edge_dsc("calibrate", run, "--calib-data", folder), 9, str(folder), words)
        refused(edge_dsc("evaluate", engine, folder), 9, str(folder), words)
    refused(edge_dsc("infer", engine, nowhere), 9, "no file, folder or glob match")
    refused(edge_dsc("infer", engine, empty), 9, "no images in")
    assert not (tmp_path / "new").exists()


def test_links_that_lead_in_a_circle(edge_dsc: Any, tmp_path: Path, engine: Path, textures: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(edge_dsc("train", loop, "--out", tmp_path / "new"), 9, f"{loop} does not exist")
    refused(
        edge_dsc("infer", engine, textures, "--annotate", loop, "--limit", 1, "--json"),
        3,
        f"cannot write {loop}",
    )


def test_int8_without_calibration(edge_dsc: Any, run: Path) -> None:
    (run / "calibration.json").unlink()
    refused(edge_dsc("build-engine", run, "--int8", *ORT), 2, "INT8 needs calibration", "--calib-data DIR")


def test_flags_that_exclude_each_other(edge_dsc: Any, run: Path, textures: Path) -> None:
    refused(edge_dsc("build-engine", run, "--int8", "--fp16"), 2, "--fp16 and --int8 exclude each other")
    refused(edge_dsc("build-engine", run, "--fp16", "--calib-data", textures), 2, "no use in fp16", "--int8")
    refused(edge_dsc("build-engine", run, "--batch", "8:1"), 2, "'8:1' is no batch range", "1:8:32")
    refused(edge_dsc("build-engine", run, "--batch", "0"), 2, "'0' is no batch range")


def test_too_few_calibration_images(edge_dsc: Any, run: Path, textures: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for label in ("clear", "focal"):
        (few / label).mkdir(parents=True)
        for path in sorted((textures / label).iterdir())[:5]:
            shutil.copy(path, few / label)
    before = (run / "calibration.json").read_bytes()
    refused(edge_dsc("calibrate", run, "--calib-data", few), 9, "10", "128")
    assert (run / "calibration.json").read_bytes() == before


def test_a_table_of_another_model(edge_dsc: Any, run: Path, deployed_models: dict[str, Path]) -> None:
    shutil.copy(deployed_models["cnn"], run / "model.onnx")
    done = edge_dsc("build-engine", run, "--int8", *ORT)
    refused(done, 4, "calibration table is of another model", f"edge-dsc calibrate {run / 'model.onnx'}")


def test_an_onnx_that_is_not_ours(edge_dsc: Any, tmp_path: Path, run: Path) -> None:
    foreign = tmp_path / "foreign.onnx"
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    onnx.save(
        helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])),
        foreign,
    )
    refused(edge_dsc("build-engine", foreign, *ORT), 4, "not exported by edge-dsc", "edge-dsc export RUN")
    foreign.write_bytes(b"\x00\x01 not an ONNX file")
    refused(edge_dsc("build-engine", foreign, *ORT), 4, "is not an ONNX model")
    refused(edge_dsc("build-engine", tmp_path / "no.onnx", *ORT), 4, "cannot read", "No such file")
    truncated = run / "model.onnx"
    truncated.write_bytes(truncated.read_bytes()[:1000])
    refused(edge_dsc("build-engine", truncated, *ORT), 4, str(truncated))


def test_engines_that_are_not_what_their_record_says(edge_dsc: Any, engine: Path, textures: Path) -> None:
    record = engine.with_name(engine.name + ".json")
    sound = record.read_text()
    record.write_text(sound.replace('"fp32"', '"fp16"'))
    refused(edge_dsc("infer", engine, textures), 4, "was edited after it was made")
    record.write_text(sound)
    engine.write_bytes(engine.read_bytes()[:-1])
    refused(edge_dsc("bench", engine), 4, "bytes, its record says", "edge-dsc build-engine")
    record.unlink()
    refused(edge_dsc("evaluate", engine, textures), 4, "has no record beside it")
    refused(edge_dsc("inspect", engine), 4, "has no record beside it")


def test_a_stale_engine(
    edge_dsc: Any, engine: Path, textures: Path, deployed_models: dict[str, Path]
) -> None:
    shutil.copy(deployed_models["cnn"], engine.with_name("model.onnx"))
    refused(edge_dsc("infer", engine, textures), 4, "is stale", "edge-dsc build-engine")


def test_unknown_class_names(edge_dsc: Any, engine: Path, textures: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    (data / "clear").rename(data / "cats")
    refused(edge_dsc("evaluate", engine, data), 9, "does not know the class cats", "clear, focal, diffuse")


def test_a_split_that_is_not_there(edge_dsc: Any, engine: Path, textures: Path) -> None:
    refused(edge_dsc("evaluate", engine, textures, "--split", "test"), 2, "no split.json beside the engine")


def test_bad_images_get_an_error_row_each(
    edge_dsc: Any, engine: Path, textures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted((textures / "clear").iterdir())[0]
    shutil.copy(good, folder / "good.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    (folder / "truncated.png").write_bytes(good.read_bytes()[:500])
    import cv2

    cv2.imwrite(str(folder / "dot.png"), np.zeros((1, 1), np.uint8))
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20000).to_bytes(4, "big") * 2)
    done = edge_dsc("infer", engine, folder, "--json")
    assert done.code == 0
    errors = {Path(row["path"]).name: row["error"] for row in done.json["rows"]}
    assert errors.pop("good.png") is None
    words = {
        "empty.png": "0 bytes",
        "text.png": "no image",
        "truncated.png": "a truncated PNG",
        "dot.png": "1x1 pixels",
        "huge.png": "400 megapixels",
    }
    assert set(errors) == set(words)
    for name, word in words.items():
        assert word in errors[name]


def test_a_place_that_cannot_be_written(
    edge_dsc: Any, run: Path, engine: Path, textures: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    out = blocked / "x.json"
    refused(edge_dsc("calibrate", run, "--calib-data", textures, "--out", out), 3, f"cannot write {out}")
    refused(edge_dsc("build-engine", run, *ORT, "--out", out), 3, "cannot write", "--out")
    refused(edge_dsc("infer", engine, textures, "--out", blocked / "x.csv"), 3, "cannot write")
    refused(edge_dsc("bench", engine, "--iterations", 5, "--warmup", 0, "--out", out), 3, "cannot write")


def test_a_full_disk_leaves_the_old_engine(run: Path, engine: Path) -> None:
    before = engine.read_bytes()
    limit = 100_000  # bytes a file: the operating system refuses to write more, as a full disk does

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = "from edge_dsc.cli import main; main()"
    command = [sys.executable, "-c", code, "build-engine", str(run), *ORT]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=full, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert engine.read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (("calibrate", "{run}", "--calib-data", "{data}"), "calibration.select.read_inputs"),
        (("build-engine", "{run}", *ORT), "edge_dsc.build.engine.wanted_layers"),
        (("evaluate", "{engine}", "{data}"), "edge_dsc.infer.classify.read_bytes"),
        (("bench", "{engine}"), "edge_dsc.latency.subjects.input_noise"),
    ],
)
def test_ctrl_c_is_one_line_and_loses_nothing(
    edge_dsc: Any,
    run: Path,
    engine: Path,
    textures: Path,
    command: Any,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(target, interrupt)
    done = edge_dsc(*(word.format(run=run, engine=engine, data=textures) for word in command))
    assert done.code == 130, done.err
    assert "interrupted" in done.err and "Traceback" not in done.err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    ("package", "command", "words"),
    [
        ("onnxruntime", ("infer", "{engine}", "{data}"), "pip install edge-dsc"),
        ("cv2", ("infer", "{engine}", "{data}"), "JetPack"),
        ("onnx", ("build-engine", "{run}"), "pip install edge-dsc"),
        ("tensorflow", ("train", "{data}", "--out", "{run}/new"), "edge-dsc[train]"),
        ("tensorrt_rtx", ("build-engine", "{run}", "--backend", "tensorrt-rtx"), "edge-dsc[rtx]"),
        ("tensorrt", ("build-engine", "{run}", "--backend", "tensorrt"), "JetPack"),
    ],
)
def test_a_missing_package_says_what_to_install(
    run: Path, engine: Path, textures: Path, package: str, command: Any, words: str
) -> None:
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Blocker())
from edge_dsc.cli import main
main()
"""
    arguments = [word.format(run=run, engine=engine, data=textures) for word in command]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert words in done.stderr and "Traceback" not in done.stderr


def test_reports_that_cannot_be_compared(edge_dsc: Any, engine: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for path, batch in ((one, 1), (two, 2)):
        assert edge_dsc(
            "bench", engine, "--iterations", 40, "--warmup", 0, "--batch", batch, "--out", path
        ).code in (0, 7)  # noise of this machine: the report is written all the same
    refused(edge_dsc("compare", one, two), 8, "batch is 1 and 2", "--allow batch")
    assert edge_dsc("compare", one, two, "--allow", "batch").code == 0
    refused(edge_dsc("compare", one), 8, "two engines are needed")
    refused(edge_dsc("compare", one, one, one), 2, "one.json is given twice")
    refused(edge_dsc("compare", one, two, one, "--fail-if-slower", 5), 2, "--fail-if-slower with 3 reports")
    document = json.loads(one.read_text())
    two.write_text(json.dumps({**document, "created": "later"}))
    refused(edge_dsc("compare", one, two), 4, "was edited")
    two.write_text(one.read_text()[:200])
    refused(edge_dsc("compare", one, two), 4, "not valid JSON")
    refused(edge_dsc("bench", engine, "--batch", 99), 2, "takes batches of 1 to 4, not 99")


def test_files_that_are_not_ours(edge_dsc: Any, tmp_path: Path) -> None:
    refused(edge_dsc("inspect", tmp_path / "no"), 9, "there is no")
    note = tmp_path / "note.txt"
    note.write_text("x")
    refused(edge_dsc("inspect", note), 9, "is no file that edge-dsc wrote")
    other = tmp_path / "other.json"
    other.write_text('{"kind": "else"}')
    refused(edge_dsc("inspect", other), 9, "kind: else")


def test_the_demo_spares_other_folders(edge_dsc: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    refused(edge_dsc("demo", "--out", tmp_path), 2, "is not empty and no earlier demo")
    assert (tmp_path / "precious").read_text() == "x"
