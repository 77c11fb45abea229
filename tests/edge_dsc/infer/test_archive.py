"""An archive through a small Ray of this machine, started once for all tests."""

from __future__ import annotations

import csv
import dataclasses
import http.server
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

# Not imported here: how it starts depends on the environment of its import.
if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

import pyarrow
import pyarrow.parquet

from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.infer import archive
from edge_dsc.infer.archive import (
    ARCHIVE,
    MANIFEST,
    ArchiveRequest,
    Folder,
    classify_archive,
    list_files,
    part_name,
    plan_pool,
)
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.infer.stop import Stop
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.record import load_record, save_record

# Ray's own: files that it leaves open, and its own use of what is deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "default::ResourceWarning", "default::DeprecationWarning", "default::FutureWarning"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two processors, on loopback, as ``--ray`` without an address starts it."""
    with archive._joined(archive.LOCAL):
        yield


@pytest.fixture(scope="module")
def engine(deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dsc`` in FP32 for onnxruntime. Read only."""
    out = tmp_path_factory.mktemp("archive-engine") / "dsc.engine"
    return build_engine(BuildRequest(model=deployed_models["dsc"], runtime="onnxruntime", out=out)).path


@pytest.fixture(scope="module")
def images(textures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty textures, one file that is no image, and one that is empty. Read only."""
    folder = tmp_path_factory.mktemp("archive") / "images"
    folder.mkdir()
    for index, path in enumerate(sorted(textures.rglob("*.png"))[:20]):
        shutil.copy(path, folder / f"{index:02}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG but no more")
    (folder / "=1+1.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def alone(engine: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The rows of ``infer`` on one machine, by path, as CSV has them."""
    out = tmp_path_factory.mktemp("alone") / "rows.csv"
    infer_source(InferRequest(engine=engine, source=str(images), out=out))
    return {row["path"]: row for row in read_csv(out)}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every row of every part, as text where it is CSV."""
    parts = sorted(out.glob("part-*"))
    if out.suffix == ".csv":
        return [row for part in parts for row in read_csv(part)]
    return [row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()]


def as_text(row: dict[str, Any]) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in row.items()}


@pytest.fixture(scope="module")
def finished(
    engine: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, Any, Any]:
    """A folder of CSV parts with what the run said of itself. Read only."""
    out = tmp_path_factory.mktemp("finished") / "rows.csv"
    seen: list[tuple[str, int, int]] = []
    said: list[str] = []
    request = ArchiveRequest(engine=engine, source=str(images), out=str(out))
    return (
        out,
        classify_archive(request, progress=lambda *step: seen.append(step), say=said.append),
        seen,
        said,
    )


def test_csv_parts_hold_the_rows_of_one_machine_bit_for_bit(
    finished: tuple[Path, Any, Any, Any], images: Path, alone: dict[str, dict[str, str]]
) -> None:
    out, summary, seen, said = finished
    assert (summary.answered, summary.failed, summary.files, summary.interrupted) == (20, 2, 22, False)
    rows = rows_of(out)
    assert {row["path"]: row for row in rows} == alone
    assert len(rows) == 22
    assert alone[str(images / "=1+1.png")]["error"]
    assert seen[-1] == ("classifying", 22, 22)
    assert [step[1] for step in seen] == sorted({step[1] for step in seen})
    assert said == [f"22 files in parts of 1, {summary.actors} actors on {summary.actors} processors"]
    manifest = ARCHIVE.load(out / MANIFEST)
    assert (manifest.files, manifest.answered, manifest.failed, manifest.finished) == (22, 20, 2, True)
    assert summary.line().startswith("20 images classified, 2 could not be read, ")


def test_a_stop_keeps_the_parts_and_resume_answers_the_others(
    engine: Path, images: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    stop, out = Stop(), tmp_path / "rows.parquet"
    request = ArchiveRequest(engine=engine, source=str(images), out=str(out))
    first = classify_archive(request, progress=lambda *_: stop.ask(), stop=stop)
    assert first.interrupted and 0 < first.answered + first.failed < 22
    assert "go on with --resume" in first.line()
    assert not ARCHIVE.load(out / MANIFEST).finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    resume = ArchiveRequest(engine=engine, source=str(images), out=str(out), resume=True)
    again = classify_archive(resume)
    assert again.resumed == len(before) and again.answered + again.failed == 22 - len(before)
    rows = rows_of(out)
    assert len(rows) == 22 and {row["path"]: as_text(row) for row in rows} == alone
    assert {path: path.stat().st_mtime_ns for path in before} == before
    manifest = ARCHIVE.load(out / MANIFEST)
    assert (manifest.answered, manifest.failed, manifest.finished) == (20, 2, True)
    nothing = classify_archive(resume)
    assert (nothing.resumed, nothing.answered, nothing.parts, nothing.interrupted) == (22, 0, 0, False)


def test_rows_of_another_engine_or_of_nobody_are_not_mixed(
    finished: tuple[Path, Any, Any, Any], engine: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    shutil.copytree(finished[0], out)
    request = ArchiveRequest(engine=engine, source=str(images), out=str(out))
    with pytest.raises(UsageError, match="holds an archive run"):
        classify_archive(request)
    resume = ArchiveRequest(engine=engine, source=str(images), out=str(out), resume=True)
    with pytest.raises(ArtefactError, match=r"was decided by nothing, not \{"):
        classify_archive(dataclasses.replace(resume, abstain=0.5))
    part = next(out.glob("part-*"))
    part.write_bytes(b"\xff")
    with pytest.raises(ArtefactError, match=f"{part.name} is damaged") as caught:
        classify_archive(resume)
    assert caught.value.remedy == "remove it: --resume answers its files again"
    other = ARCHIVE.load(out / MANIFEST)
    ARCHIVE.save(out / MANIFEST, replace(other, engine_sha256="0" * 64))
    with pytest.raises(ArtefactError, match="rows of another engine"):
        classify_archive(resume)
    (out / MANIFEST).unlink()
    with pytest.raises(UsageError, match="is not empty, and no archive run of ours"):
        classify_archive(resume)


def test_an_address_is_read_and_written_like_a_folder(
    engine: Path, images: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").mkdir()
    out = f"file://{tmp_path}/rows.csv"
    summary = classify_archive(ArchiveRequest(engine=engine, source=f"file://{images}", out=out))
    rows = {row["path"].removeprefix("file://"): row for row in rows_of(tmp_path / "rows.csv")}
    assert set(rows) == set(alone) and summary.files == 22
    for path, row in rows.items():
        if not alone[path]["error"]:
            assert {**row, "path": path} == alone[path]
        assert bool(row["error"]) == bool(alone[path]["error"])


def test_lists_name_each_file_once(tmp_path: Path) -> None:
    names = ["a.png", "s3://bucket/b.png", "a.png"]
    (tmp_path / "names.txt").write_text("\n".join([*names, "", " "]))
    pyarrow.parquet.write_table(pyarrow.table({"path": [*names, None]}), tmp_path / "names.parquet")
    for source in ("names.txt", "names.parquet"):
        assert list_files(str(tmp_path / source)) == (["a.png", "s3://bucket/b.png"], None)


def test_parquet_parts_hold_the_same_with_numbers_and_a_decision(
    engine: Path, images: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "rows.parquet"
    classify_archive(ArchiveRequest(engine=engine, source=str(images), out=str(out), abstain=0.0))
    rows = rows_of(out)
    decided = {row["path"]: row.pop("decision") for row in rows}
    assert {row["path"]: as_text(row) for row in rows} == alone
    assert {path: decision or "" for path, decision in decided.items()} == {
        path: row["label"] for path, row in alone.items()
    }
    kinds = pyarrow.parquet.read_schema(next(out.glob("part-*")))
    assert (kinds.field("probability").type, kinds.field("error").type) == (
        pyarrow.float64(),
        pyarrow.string(),
    )


def test_a_killed_actor_costs_nothing_but_time(
    engine: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def kill(phase: str, done: int, total: int) -> None:
        if not killed and done >= total // 4:
            pids = actor_processes()
            killed.extend(pids)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    request = ArchiveRequest(engine=engine, source=str(images), out=str(tmp_path / "rows.csv"))
    summary = classify_archive(request, progress=kill)
    assert killed
    counts = Counter(row["path"] for row in rows_of(tmp_path / "rows.csv"))
    assert set(counts.values()) == {1} and len(counts) == summary.answered + summary.failed == 22
    assert not list((tmp_path / "rows.csv").glob(".*"))


def actor_processes() -> list[int]:
    """The processes of actors of the Ray that this process started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            environment = (entry / "environ").read_bytes() if title.startswith(b"ray::MapWorker") else b""
        except OSError:
            continue
        if os.environ["RAY_AUTH_TOKEN"].encode() in environment:
            found.append(int(entry.name))
    return found


def test_what_an_actor_cannot_do_ends_the_run_with_its_reason(
    engine: Path, images: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.engine"
    foreign.write_bytes(b"no engine")
    record = load_record(engine)
    digest = archive.sha256_bytes(b"no engine")
    save_record(
        foreign, replace(record, engine=foreign.name, engine_bytes=9, engine_sha256=digest, onnx="gone.onnx")
    )
    with pytest.raises(ArtefactError, match="onnxruntime cannot load"):
        classify_archive(ArchiveRequest(engine=foreign, source=str(images), out=str(tmp_path / "rows.csv")))


def test_sources_that_are_no_archive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no archive"):
        list_files("rtsp://u:secret@host/live")
    with pytest.raises(BadInputError, match="there is no file"):
        list_files(str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="no address of a store"):
        list_files("nosuch://bucket/x")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadInputError, match="names no file"):
        list_files(str(tmp_path / "empty.txt"))
    pyarrow.parquet.write_table(pyarrow.table({"name": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(BadInputError, match="holds no column 'path'"):
        list_files(str(tmp_path / "x.parquet"))


@pytest.fixture
def refusing_store() -> Iterator[str]:
    """An address of an object store that gives nobody anything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=x"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_store_without_rights_is_said_with_its_name(refusing_store: str) -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"cannot read s3://hospital/xrays: .*ACCESS_DENIED"
    ) as caught:
        list_files(f"s3://key:secret@hospital/xrays?{refusing_store}")
    assert "secret" not in str(caught.value)
    assert caught.value.remedy == "check the address, and what its credentials allow"


def test_what_the_out_must_be_called(engine: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.jsonl: with --ray it is a folder of parts"):
        classify_archive(ArchiveRequest(engine=engine, source=str(images), out=str(tmp_path / "rows.jsonl")))
    assert list(tmp_path.iterdir()) == []


RECORD: Any = SimpleNamespace(runtime="onnxruntime")
GPU_RECORD: Any = SimpleNamespace(runtime="tensorrt")


def test_the_pool_stays_below_the_cluster(engine: Path) -> None:
    request = ArchiveRequest(engine=engine, source="x", out="rows.csv")
    pool = plan_pool({"CPU": 8.0}, {"CPU": 6.0}, RECORD, request)
    assert (pool.actors, pool.cpus, pool.gpus, pool.threads) == (6, 0.9, 0, 1)
    pool = plan_pool({"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}, GPU_RECORD, request)
    assert (pool.actors, pool.cpus, pool.gpus, pool.threads) == (2, 7.2, 1, 8)
    stored = ArchiveRequest(engine=engine, source="s3://b/x", out="rows.csv")
    assert plan_pool({"CPU": 2.0}, {"CPU": 2.0}, RECORD, stored).threads == 8
    with pytest.raises(EnvironmentProblem, match=r"Ray has 4 processors, 0\.5 of them free; one is needed"):
        plan_pool({"CPU": 4.0}, {"CPU": 0.5}, RECORD, request)
    with pytest.raises(EnvironmentProblem, match="Ray has 0 GPUs, 0 of them free"):
        plan_pool({"CPU": 4.0}, {"CPU": 4.0}, GPU_RECORD, request)


def test_an_address_where_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentProblem, match=f"nobody answers at 127.0.0.1:{port}: ") as caught:
        archive._require_listener(f"127.0.0.1:{port}")
    assert "ray start --head" in caught.value.remedy
    for nonsense in ("head", "head:port", "[::1"):
        with pytest.raises(UsageError, match="is no address"):
            archive._require_listener(nonsense)


def test_a_token_is_asked_for_and_statistics_are_off() -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    import ray

    host, port = ray.get_runtime_context().gcs_address.split(":")
    assert host == "127.0.0.1"
    code = f"import ray; ray.init(address='{host}:{port}', logging_level='ERROR')"
    wrong = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run(
        [sys.executable, "-c", code], env=wrong, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "oken" in done.stderr


def test_a_part_is_named_after_its_files() -> None:
    assert part_name(["a", "b"], ".csv") == part_name(["a", "b"], ".csv") != part_name(["b", "a"], ".csv")
    assert part_name(["\udcff.png"], ".csv").endswith(".csv")


def test_a_folder_of_this_machine_and_the_same_by_address(tmp_path: Path) -> None:
    for where in (str(tmp_path / "a"), f"file://{tmp_path}/b"):
        folder = Folder.at(where)
        assert folder.names() == []
        if folder.store is not None:
            (tmp_path / "b").mkdir()
        folder.write("x", b"1")
        assert (folder.names(), folder.read("x")) == (["x"], b"1")
        with pytest.raises(EnvironmentProblem, match=r"cannot read .*/gone"):
            folder.read("gone")


def test_the_command_line_knows_an_address_and_the_lack_of_one(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_dsc.cli.app import app

    asked: list[ArchiveRequest] = []

    def note(request: ArchiveRequest, **_: object) -> Any:
        asked.append(request)
        return SimpleNamespace(line=lambda: "done")

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            app(["infer", *words], prog_name="edge-dsc")
        return int(ended.value.code or 0)

    monkeypatch.setattr(archive, "classify_archive", note)
    out = ["--out", "s3://bucket/rows.parquet"]
    assert run(str(engine), "xrays", "--ray", *out, "--resume") == 0
    assert run("--ray", str(engine), "xrays", *out, "--limit", "2") == 0
    assert run(str(engine), "xrays", *out, "--ray", "10.0.0.5:6379", "--abstain", "0.5") == 0
    assert [(one.address, one.source, one.out) for one in asked] == [
        ("local", "xrays", out[1]), ("local", "xrays", out[1]), ("10.0.0.5:6379", "xrays", out[1]),
    ]  # fmt: skip
    assert (asked[0].resume, asked[1].limit, asked[2].abstain) == (True, 2, 0.5)
    for more in ([], [*out, "--serve", "0"], [*out, "--cam"]):
        assert run(str(engine), "xrays", "--ray", *more) == 2
        assert "--ray writes rows and nothing else, to --out" in capsys.readouterr().err
