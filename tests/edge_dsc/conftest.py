"""The command line in this process; phantoms and trained runs, made once a session; and a camera in the network."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.build.qat import QatOptions, QatResult, fine_tune
from edge_dsc.checks.doctor import Examination, examine
from edge_dsc.cli.app import app
from edge_dsc.data.phantoms import write_phantoms
from edge_dsc.networks import build_network
from edge_dsc.training import TrainOptions, TrainProgress, TrainResult, train

PER_CLASS = 18  # two steps an epoch, of 16
MakeOnce = Callable[[str, Callable[[Path], Any]], Any]


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


EdgeDsc = Callable[..., Outcome]


@pytest.fixture
def edge_dsc(capsys: pytest.CaptureFixture[str]) -> EdgeDsc:
    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments], prog_name="edge-dsc")
        said = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def built_run(
    deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, textures: Path
) -> Path:
    """A folder with model.onnx, calibration.json and an FP32 and an INT8 engine of onnxruntime."""
    from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
    from edge_dsc.build.engine import BuildRequest, build_engine
    from engines.record import BatchRange, Precision

    run = tmp_path_factory.mktemp("run")
    model = Path(shutil.copy(deployed_models["dsc"], run / "model.onnx"))
    table = run_calibration(CalibrationRequest(model=model, data=textures, method="minmax", images=128)).path
    for precision, calibration in ((Precision.FP32, None), (Precision.INT8, table)):
        request = BuildRequest(
            model=model,
            precision=precision,
            runtime="onnxruntime",
            batch=BatchRange(1, 1, 4),
            calibration=calibration,
        )
        build_engine(request)
    return run


@dataclass(frozen=True)
class TrainedRun:
    """A short run and what its callbacks told."""

    result: TrainResult
    options: TrainOptions
    reports: list[TrainProgress]


@pytest.fixture(scope="session")
def phantom_folder(make_once: MakeOnce) -> Path:
    """Phantoms of each class and one damaged file. Read only."""

    def draw(folder: Path) -> Path:
        write_phantoms(folder / "phantoms", PER_CLASS, seed=0)
        (folder / "phantoms" / "clear" / "damaged.png").write_bytes(b"\x89PNG but no more")
        return folder / "phantoms"

    return Path(make_once("trained", draw))


def _run(architecture: str, data: Path, out: Path) -> tuple[TrainResult, TrainOptions, list[TrainProgress]]:
    options = TrainOptions(data=data, out=out / "run", architecture=architecture, epochs=2, seed=3)
    reports: list[TrainProgress] = []
    return train(options, progress=reports.append), options, reports


@pytest.fixture(scope="session")
def dsc_run(phantom_folder: Path, make_once: MakeOnce) -> TrainedRun:
    """Two epochs of ``dsc``. Read only; copy the folder before you change it."""
    return TrainedRun(*make_once("dsc_run", partial(_run, "dsc", phantom_folder)))


@contextlib.contextmanager
def _small_pictures(side: int = 64) -> Iterator[None]:
    """The paper's networks on small pictures: the same layers, at 64 x 64 in a twelfth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("paper", "architecture"):
            patch.setattr(f"edge_dsc.networks.{module}.INPUT_SIDE", side)
        patch.setattr(build_network, "__defaults__", (side,))
        yield


@pytest.fixture(scope="session")
def small_pictures() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """``with small_pictures(side=64):`` the paper's networks take pictures of that size."""
    return _small_pictures


@pytest.fixture
def small_networks() -> Iterator[None]:
    """The paper's networks take 64 x 64 pixels."""
    with _small_pictures():
        yield


@pytest.fixture(scope="session")
def cnn_run(phantom_folder: Path, make_once: MakeOnce) -> TrainedRun:
    """Two epochs of ``cnn`` on 64 x 64 pixels, to be used with ``small_networks``. Read only, as ``dsc_run``."""
    with _small_pictures():
        return TrainedRun(*make_once("cnn_run", partial(_run, "cnn", phantom_folder)))


@pytest.fixture(scope="session")
def tuned_run(dsc_run: TrainedRun, phantom_folder: Path, make_once: MakeOnce) -> tuple[QatOptions, QatResult]:
    """One epoch of fine-tuning ``dsc`` for INT8. Read only."""

    def tune(folder: Path) -> tuple[QatOptions, QatResult]:
        run = dsc_run.result.run
        options = QatOptions(data=phantom_folder, run=run, out=folder / "run", epochs=1, seed=3)
        return options, fine_tune(options)

    return make_once("tuned_run", tune)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def few_calibrate() -> Iterator[None]:
    """Calibrate on 24 images and more: whole lines are walked on as few as they can."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("table", "select"):
            patch.setattr(f"calibration.{module}.MINIMUM_IMAGES", 24)
        yield


@pytest.fixture(scope="session")
def examination(make_once: MakeOnce) -> Examination:
    """What ``doctor`` finds here: it imports every package there is, in processes of their own."""
    return make_once("examination", lambda folder: examine())  # type: ignore[no-any-return]


def grey_jpeg(value: int, height: int = 64, width: int = 64) -> bytes:
    """A JPEG of one grey value."""
    return bytes(cv2.imencode(".jpg", np.full((height, width), value, np.uint8))[1])


@dataclass
class NetworkCamera:
    """MJPEG over HTTP on loopback: each connection gets the next script, its last bytes may be half a picture.

    Attributes:
        scripts: What each connection in turn is sent after the headers; the last one is repeated.
        content_type: Of the response.
        encoding: Of the response.
        status: Of the response.
        requests: Headers of each request.
    """

    scripts: list[bytes] = field(default_factory=list)
    content_type: str = "multipart/x-mixed-replace; boundary=frame"
    encoding: str = "identity"
    status: int = 200
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    @staticmethod
    def part(jpeg: bytes, *, length: bool = True) -> bytes:
        head = f"Content-Length: {len(jpeg)}\r\n" if length else ""
        return f"--frame\r\nContent-Type: image/jpeg\r\n{head}\r\n".encode() + jpeg + b"\r\n"


@pytest.fixture
def network_camera() -> Iterator[NetworkCamera]:
    camera = NetworkCamera()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script = camera.scripts[min(len(camera.requests), len(camera.scripts) - 1)]
            camera.requests.append(dict(self.headers.items()))
            self.send_response(camera.status)
            self.send_header("Content-Type", camera.content_type)
            self.send_header("Content-Encoding", camera.encoding)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a reader may refuse the rest
                self.wfile.write(script)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    camera.url = f"http://127.0.0.1:{server.server_port}/cam"
    yield camera
    server.shutdown()
    server.server_close()
    thread.join()


def write_video(path: Path, values: range) -> None:
    """A 64x64 MJPEG video at 10 frames a second, one grey value a frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    assert writer.isOpened()
    for value in values:
        writer.write(np.full((64, 64, 3), value, np.uint8))
    writer.release()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Twelve frames, grey values 0, 20, ... 220."""
    write_video(tmp_path / "video.avi", range(0, 240, 20))
    return tmp_path / "video.avi"


@pytest.fixture
def jpeg() -> Any:
    return grey_jpeg
