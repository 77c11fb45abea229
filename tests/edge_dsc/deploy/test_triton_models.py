"""A real server on loopback: the same answers as here, whole files, metrics, and what happens when it goes away."""

from __future__ import annotations

import csv
import re
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from bench.plan import Plan
from bench.statistics import stage_medians
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.deploy.triton import (
    RunningTriton,
    ServerRequest,
    TritonProgram,
    TritonRequest,
    start_triton,
    write_repository,
)
from edge_dsc.infer.classify import classify_files
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.infer.live_page.monitoring import FEWEST
from edge_dsc.infer.served import ServedModel, ServedRunner, parse_server
from edge_dsc.latency.subjects import BenchOptions, measure_engines
from engines.errors import ArtefactError, EnvironmentProblem, UnansweredError
from engines.packages import load
from engines.runtimes import open_engine

pytestmark = pytest.mark.slow


@pytest.fixture
def served(server: RunningTriton) -> ServedModel:
    return parse_server(f"grpc://127.0.0.1:{server.grpc}/dsc")


@pytest.fixture(scope="module")
def pictures(textures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty good pictures and a damaged one."""
    folder = tmp_path_factory.mktemp("pictures")
    for path in (textures / "focal").iterdir():
        shutil.copy(path, folder)
    (folder / "005.png").write_bytes(b"\x89PNG but no more")
    return folder


def infer(engine: Any, source: Path, out: Path) -> list[str]:
    infer_source(InferRequest(engine=engine, source=str(source), out=out, threads=2))
    return out.read_text().splitlines()


def test_rows_are_those_of_this_machine(
    edge_dsc: Any, served: ServedModel, engine: Path, pictures: Path, tmp_path: Path
) -> None:
    expected = infer(engine, pictures, tmp_path / "here.csv")
    done = edge_dsc("infer", engine, pictures, "--server", served, "--out", tmp_path / "there.csv")
    assert (done.code, done.err.count("29 images classified, 1 could not be read")) == (0, 1), done.err
    assert (tmp_path / "there.csv").read_text().splitlines() == expected
    done = edge_dsc("infer", pictures, "--server", served, "--threads", 2)
    assert done.out.splitlines() == expected


def test_probabilities_and_maps_are_bit_equal_at_every_batch_size(served: ServedModel, engine: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 1), np.uint8)
    with ServedRunner(served) as there, open_engine(engine) as here:
        for size in (1, 3, 8):
            assert there.run(pixels[:size]).tobytes() == here.run(pixels[:size]).tobytes()
            found, expected = there.explain(pixels[:size]), here.explain(pixels[:size])
            assert found[1].shape == (size, 3, 14, 14)
            assert [values.tobytes() for values in found] == [values.tobytes() for values in expected]
        assert there.record.engine_sha256 == here.record.engine_sha256
        assert there.description["execution"].startswith("triton ")


def ask_front(client: Any, data: bytes, **options: Any) -> Any:
    grpc = load("tritonclient.grpc")
    given = grpc.InferInput("file", [1, len(data)], "UINT8")
    given.set_data_from_numpy(np.frombuffer(data, np.uint8)[None])
    return client.infer("dsc_files", [given], **options)


@pytest.fixture
def client(server: RunningTriton) -> Iterator[Any]:
    """A client that knows nothing of edge-dsc."""
    with load("tritonclient.grpc").InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        yield client


def metric(server: RunningTriton, name: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics") as stream:
        text = stream.read().decode()
    found = re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)
    return {
        re.sub(r'.*(?:label|reason|threshold|copy)="([^"]*)".*', r"\1", labels): float(value)
        for labels, value in found
    }


def test_the_front_takes_whole_files_and_counts_what_it_answers(
    server: RunningTriton, client: Any, engine: Path, pictures: Path
) -> None:
    paths = sorted(pictures.iterdir())
    before = {name: metric(server, f"edge_dsc_{name}_total") for name in ("answers", "errors", "unsure")}
    with open_engine(engine) as runner:
        expected = list(classify_files(paths, runner, threads=1))
    labels = runner.record.contract.labels
    with ThreadPoolExecutor(8) as pool:  # so that files of different lengths share a batch
        found = list(pool.map(lambda path: answer_or_error(client, path), paths))
    for path, answer, seen in zip(paths, expected, found, strict=True):
        if answer.probabilities is None or answer.top is None:
            assert "StatusCode.INVALID_ARGUMENT] the file is damaged or no image (16 bytes" in seen, path
            continue
        row = seen.as_numpy("probabilities")
        # Batches of other sizes may sum in another order.
        assert row.shape == (1, 3) and np.allclose(row[0], answer.probabilities, atol=1e-6)
        assert seen.as_numpy("label").tobytes().decode() == labels[answer.top]
        assert seen.as_numpy("probability").tolist() == [[row.max()]]
    after = {name: metric(server, f"edge_dsc_{name}_total") for name in before}
    added = {name: {key: after[name][key] - old for key, old in before[name].items()} for name in before}
    tops = [answer.top for answer in expected]
    assert added["answers"] == {label: tops.count(index) for index, label in enumerate(labels)}
    assert added["errors"] == {"picture": 1, "model": 0}
    unsure = [max(answer.probabilities) < 0.5 for answer in expected if answer.probabilities]
    assert added["unsure"] == {"0.5": sum(unsure)}


def test_each_copy_of_the_front_says_how_far_its_pictures_are_from_the_calibration(
    server: RunningTriton, client: Any, tmp_path: Path
) -> None:
    """The calibration's were evenly grey; the index itself is held in tests/edge_dsc/infer/test_monitoring.py."""
    copies = {"dsc_files_0_0", "dsc_files_0_1"}
    assert set(metric(server, "edge_dsc_input_drift_psi")) == copies  # and none of a front without a table
    cv2.imwrite(str(tmp_path / "dark.png"), np.zeros((64, 64), np.uint8))
    data = (tmp_path / "dark.png").read_bytes()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask_front(client, data), range(2 * FEWEST)))
    seen = metric(server, "edge_dsc_input_drift_psi")
    assert set(seen) == copies and any(value > 1 for value in seen.values())


def answer_or_error(client: Any, path: Path) -> Any:
    try:
        return ask_front(client, path.read_bytes())
    except load("tritonclient.utils").InferenceServerException as error:
        return str(error)


def test_triton_itself_names_the_classes(client: Any, textures: Path, server: RunningTriton) -> None:
    wanted = load("tritonclient.grpc").InferRequestedOutput("probabilities", class_count=2)
    found = ask_front(client, (textures / "focal" / "000.png").read_bytes(), outputs=[wanted])
    first, second = (entry.decode().split(":") for entry in found.as_numpy("probabilities")[0])
    assert {first[2], second[2]} < {"clear", "focal", "diffuse"} and float(first[0]) > float(second[0])


def test_the_front_takes_dicom(client: Any, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    pixels = np.random.default_rng(1).integers(0, 256, (256, 256), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = pixels.tobytes()
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    answers = [ask_front(client, (tmp_path / name).read_bytes()) for name in ("a.png", "a.dcm")]
    assert len({answer.as_numpy("probabilities").tobytes() for answer in answers}) == 1
    assert len({answer.as_numpy("label").tobytes() for answer in answers}) == 1


def test_bench_reports_the_server_s_own_times(served: ServedModel, engine: Path) -> None:
    plan = Plan(iterations=10, rounds=5, warmup_seconds=0, lead_in=0)
    report = measure_engines([engine, served], plan, BenchOptions(control=False))
    here, there = report.subjects
    assert [subject.name for subject in report.subjects] == [str(engine), str(served)]
    assert (there.error, len(there.samples_ns)) == (None, 10)
    assert list(stage_medians(there)) == ["queue", "compute_input", "compute_infer", "compute_output"]
    assert there.description["runs"]["server"] == f"127.0.0.1:{served.port}"
    assert there.description["engine_sha256"] == here.description["engine_sha256"]


def test_another_model_on_the_server_is_refused(
    served: ServedModel, server: RunningTriton, deployed_models: dict[str, Path], tmp_path: Path
) -> None:
    cnn = build_engine(
        BuildRequest(model=deployed_models["cnn"], runtime="onnxruntime", out=tmp_path / "cnn.engine")
    )
    address = f"grpc://127.0.0.1:{server.grpc}"
    with pytest.raises(
        ArtefactError, match=r"has another contract than cnn\.engine: architecture 'dsc', not 'cnn'"
    ):
        ServedRunner(parse_server(str(served), expected=cnn.path))
    with pytest.raises(ArtefactError, match=r"theirs was not deployed by edge-dsc \(no record"):
        ServedRunner(parse_server(f"{address}/theirs"))
    with pytest.raises(ArtefactError, match="it is the front of a model"):
        ServedRunner(parse_server(f"{address}/dsc_files"))
    with pytest.raises(EnvironmentProblem, match=r"none is not ready: .*ready are: dsc, dsc_files, theirs"):
        ServedRunner(parse_server(f"{address}/none"))


def test_a_server_that_falls_in_the_middle_costs_rows_and_is_used_again_when_it_is_back(
    engine: Path, program: TritonProgram, pictures: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    write_repository(TritonRequest(engines=[engine], out=repository, front=False))
    request = ServerRequest(repository=repository, work=tmp_path / "work")
    running = [start_triton(request, program)]
    served = parse_server(f"grpc://127.0.0.1:{running[0].grpc}/dsc")

    def fall(phase: str, done: int, total: int) -> None:
        if done == 10:
            running[0].stop(kill=True)
            with pytest.raises(UnansweredError, match="gave no answer"), ServedRunnerOf(runner) as other:
                other.run(np.zeros((1, 224, 224, 1), np.uint8))
            again = ServerRequest(repository=repository, work=tmp_path / "work", grpc=served.port)
            running[0] = start_triton(again, program)

    runner = ServedRunner(served)
    try:
        summary = infer_source(
            InferRequest(engine=served, source=str(pictures), out=tmp_path / "a.csv", threads=2),
            progress=fall,
        )
    finally:
        runner.close()
        running[0].stop()
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lost = [row for row in rows if "gave no answer" in row["error"] or "is still away" in row["error"]]
    assert [row["path"] for row in rows] == sorted(str(path) for path in pictures.iterdir())
    assert summary.unanswered == len(lost) and summary.answered == 29 - len(lost)
    assert 0 < len(lost) < 15 and all(row["error"] == "" for row in rows[-5:])
    assert f"1 could not be read, {len(lost)} got no answer from the server" in summary.line()
    expected = {row["path"]: row for row in csv.DictReader(infer(engine, pictures, tmp_path / "b.csv"))}
    assert all(row == expected[row["path"]] for row in rows if row not in lost)


class ServedRunnerOf:
    """A runner that stays open behind the block."""

    def __init__(self, runner: ServedRunner) -> None:
        self._runner = runner

    def __enter__(self) -> ServedRunner:
        return self._runner

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("name", ["changed", "changed_files"])
def test_a_changed_engine_does_not_start(server: RunningTriton, name: str) -> None:
    """The model that runs it and, for engines that Triton loads by itself, the front refuse it."""
    with pytest.raises(
        EnvironmentProblem, match=rf"{name} is not ready: .*is not the engine of its record"
    ) as refused:
        ServedRunner(parse_server(f"grpc://127.0.0.1:{server.grpc}/{name}"))
    assert refused.value.remedy == "ready are: dsc, dsc_files, theirs"


def test_a_server_that_does_not_start_says_why(program: TritonProgram, tmp_path: Path) -> None:
    (tmp_path / "repository" / "a" / "1").mkdir(parents=True)
    (tmp_path / "repository" / "a" / "config.pbtxt").write_text("nonsense")
    request = ServerRequest(repository=tmp_path / "repository", work=tmp_path / "work")
    with pytest.raises(EnvironmentProblem, match=r"tritonserver ended with 1: .*failed to load") as refused:
        start_triton(request, program)
    (log,) = (tmp_path / "work").glob("*.log")
    assert refused.value.remedy == f"its log is {log}"
