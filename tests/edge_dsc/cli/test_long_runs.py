"""What cameras, disks and people do to a run that lasts: each once, with the real program."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from edge_dsc.infer.camera import Patience
from edge_dsc.infer.inference import InferRequest, infer_source

PROGRAM = [sys.executable, "-c", "from edge_dsc.cli import main; main()"]


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [*PROGRAM, *(str(argument) for argument in arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
    )


def write_rows(engine: Path, source: Path, out: Path) -> bytes:
    infer_source(InferRequest(engine=engine, source=str(source), out=out, threads=2))
    return out.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_every_row_and_ends_well(engine: Path, textures: Path, number: signal.Signals) -> None:
    first, second = sorted(textures.rglob("*.png"))[:2]
    with start("infer", engine, "-") as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(f"{first}\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("path,label,probability")
        assert process.stdout.readline().startswith(str(first))
        engine.write_bytes(b"another engine")  # the one that runs was loaded whole
        process.stdin.write(f"{second}\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(str(second))
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stdout.read() == ""
        assert "2 images classified" in (said := process.stderr.read())
        assert "(interrupted after 2)" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_killed_and_resumed_is_the_same_as_never_killed(
    engine: Path, textures: Path, tmp_path: Path, suffix: str, edge_dsc: Any
) -> None:
    out = tmp_path / f"rows{suffix}"
    with start("infer", engine, textures, "--out", out, "--threads", 1) as process:
        while process.poll() is None and not (out.exists() and out.stat().st_size > 2000):
            os.sched_yield()
        process.kill()
    partial = out.read_bytes()
    out.write_bytes(partial[:-7])  # whatever the kill left: the last row is half
    done = edge_dsc("infer", engine, textures, "--out", out, "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["resumed"] + done.json["answered"] == done.json["images"] == 150
    assert done.json["resumed"] > 5
    assert out.read_bytes() == write_rows(engine, textures, tmp_path / f"whole{suffix}")
    again = edge_dsc("infer", engine, textures, "--out", out, "--resume", "--json")
    assert (again.code, again.json["resumed"], again.json["answered"]) == (0, 150, 0)


def test_resuming_another_source_is_refused(
    engine: Path, textures: Path, tmp_path: Path, edge_dsc: Any
) -> None:
    out = tmp_path / "rows.csv"
    before = write_rows(engine, textures / "focal", out)
    done = edge_dsc("infer", engine, textures, "--out", out, "--resume")
    assert done.code == 4 and "row 1 of" in done.err and "without --resume" in done.err
    assert out.read_bytes() == before
    assert edge_dsc("infer", engine, textures, "--resume").code == 2
    assert edge_dsc("infer", engine, "/dev/video9", "--resume", "--out", out).code == 2


@pytest.mark.slow
def test_a_termination_leaves_no_half_written_file(run: Path, tmp_path: Path) -> None:
    writing = """
from pathlib import Path
import sys, edge_dsc.build.engine as building
from edge_dsc.cli import main
from engines.files import atomic_path
def write(*arguments, **options):
    with atomic_path(Path("half.engine")) as temporary:
        temporary.write_bytes(b"half")
        print("begun", flush=True)
        sys.stdin.read()
building.build_engine = write
main()
"""
    command = [sys.executable, "-c", writing, "build-engine", run]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    (tmp_path / "empty").mkdir()
    with subprocess.Popen(command, text=True, cwd=tmp_path / "empty", **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.wait(30) == 143
        assert process.stderr.read() == ""
    assert not list((tmp_path / "empty").iterdir())


def test_ctrl_c_before_the_command_begins_is_silent() -> None:
    starting = """
import sys
class Interrupted:
    def find_spec(self, name, *rest):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from edge_dsc.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", starting, "doctor"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.slow
def test_a_closed_pipe_ends_the_run_quietly(engine: Path, textures: Path) -> None:
    with start("infer", engine, textures) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line(engine: Path, textures: Path, tmp_path: Path) -> None:
    import resource

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    out = tmp_path / "rows.csv"
    with start("infer", engine, textures, "--out", out, preexec_fn=full) as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 3, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    rows = out.read_bytes()[:4000].count(b"\n") - 1
    assert len(errors) == 1 and f"after {rows} rows" in errors[0] and "--resume" in errors[0]
    infer_source(InferRequest(engine=engine, source=str(textures), out=out, threads=2, resume=True))
    assert out.read_bytes() == write_rows(engine, textures, tmp_path / "whole.csv")


def test_truncated_and_lying_images_cost_one_row_each(
    engine: Path, textures: Path, tmp_path: Path, edge_dsc: Any
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    good = sorted(textures.rglob("*.png"))[0]
    for name in ("0.png", "4.png"):
        shutil.copy(good, folder / name)
    (folder / "1.png").write_bytes(good.read_bytes()[:-100])
    (folder / "2.jpg").write_bytes(good.read_bytes())  # a PNG with another name is a PNG
    (folder / "3.png").write_bytes(b"GIF89a" + bytes(100))
    done = edge_dsc("infer", engine, folder)
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.code == 0
    assert [bool(row["error"]) for row in rows] == [False, True, False, True, False]
    assert "3 images classified, 2 could not be read" in done.err


def test_a_camera_unplugged_in_mid_frame_comes_back(
    engine: Path, network_camera: Any, jpeg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = functools.partial(Patience, backoff_s=(0.01,))
    monkeypatch.setattr("edge_dsc.infer.inference.Patience", impatient)
    whole, torn = network_camera.part(jpeg(80)), network_camera.part(jpeg(200))
    network_camera.scripts = [whole + torn[: len(torn) // 2]]
    lines: list[str] = []
    out = tmp_path / "rows.jsonl"
    request = InferRequest(engine=engine, source=network_camera.url, out=out, limit=4)
    summary = infer_source(request, say=lines.append)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == summary.answered == 4 and summary.failed == 0
    assert len({row["probability"] for row in rows}) == 1  # nothing was made of the half picture
    assert [row["frame"] for row in rows] == sorted({row["frame"] for row in rows})
    assert rows[-1]["frame"] == 3 + rows[-1]["dropped"]
    assert summary.reconnects >= 3 and "is gone: trying to open it again" in lines[0]


@pytest.mark.slow
def test_two_loops_in_one_process(engine: Path, textures: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one.csv", tmp_path / "two.csv"]
    threads = [threading.Thread(target=write_rows, args=(engine, textures, out)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert outs[0].read_bytes().count(b"\n") == 151


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    script = Path(__file__).parents[3] / "scripts" / "memory_flat.py"
    done = subprocess.run(
        [sys.executable, script, "--frames", "20000"],
        cwd=script.parents[1], env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every frame has exactly one row: True" in done.stdout
