"""Engines and a repository made of them, and a real server on it: one for all tests of a process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from calibration.table import CalibrationImage, CalibrationTable, save_table
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.deploy.triton import (
    RunningTriton,
    ServerRequest,
    TritonProgram,
    TritonRequest,
    find_triton,
    start_triton,
    write_repository,
)
from engines.errors import EnvironmentProblem
from engines.files import sha256_file
from engines.images import LEVEL_BINS
from engines.record import BatchRange, load_record, save_record


def built(model: Path, out: Path) -> Path:
    request = BuildRequest(model=model, runtime="onnxruntime", batch=BatchRange(1, 4, 8), cam=True, out=out)
    return build_engine(request).path


@pytest.fixture(scope="session")
def engine(deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP32 engine with maps, for 1 to 8 pictures. Read only; copy it with its record before you change it.

    Beside its model lies a calibration table, whose images were evenly grey.
    """
    folder = tmp_path_factory.mktemp("engine")
    model = Path(shutil.copy(deployed_models["dsc"], folder / "dsc.onnx"))
    table = CalibrationTable(
        method="minmax",
        parameters={},
        seed=0,
        onnx_sha256=sha256_file(model),
        preprocess_sha256="0" * 64,
        versions={},
        ranges={"image": (0.0, 1.0)},
        images=tuple(CalibrationImage(f"{index}.png", "clear", f"{index}") for index in range(128)),
        pixel_levels=(10,) * LEVEL_BINS,
    )
    save_table(folder / "calibration.json", table)
    return built(model, folder / "dsc.engine")


ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def program() -> TritonProgram:
    """The server; CONTRIBUTING says how it comes into ``.triton``."""
    ours = ROOT / ".triton" / "pytriton" / "tritonserver"
    with pytest.MonkeyPatch.context() as patch:
        if "EDGE_DSC_TRITON" not in os.environ and ours.is_dir():
            patch.setenv("EDGE_DSC_TRITON", str(ours))
        try:
            return find_triton()
        except EnvironmentProblem as missing:
            pytest.skip(missing.what)


@pytest.fixture(scope="session")
def server(
    engine: Path, program: TritonProgram, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningTriton]:
    """A server with the models dsc and dsc_files, those of a changed engine, and one of a stranger."""
    work = tmp_path_factory.mktemp("triton")
    repository = work / "repository"
    changed = Path(shutil.copy(engine, work / "changed.engine"))
    save_record(changed, msgspec.structs.replace(load_record(engine), engine=changed.name))
    write_repository(TritonRequest(engines=[engine, changed], out=repository, unsure=0.5))
    plan = repository / "changed" / "1" / changed.name
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    (repository / "theirs" / "1").mkdir(parents=True)
    (repository / "theirs" / "1" / "model.py").write_text(
        "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
    )
    (repository / "theirs" / "config.pbtxt").write_text(
        'backend: "python" max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: 1 }'
        ' output { name: "y" data_type: TYPE_FP32 dims: 1 }'
    )
    words = ("--exit-on-error=false", "--strict-readiness=false")
    running = start_triton(ServerRequest(repository=repository, work=work, arguments=words), program)
    yield running
    running.stop(kill=True)
