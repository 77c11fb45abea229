from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double_cuda import DoubleCuda, DoubleDriver
from double_tensorrt import DoubleTensorRt

import edge_dsc.checks.selftest as selftest
from edge_dsc.build.deployed import fit_on_the_spot
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.checks.doctor import Examination
from edge_dsc.checks.inspection import inspect_path
from edge_dsc.checks.selftest import SELFTEST, Outcome, SelfTest, SelfTestPlan, format_selftest, run_selftest
from edge_dsc.data.phantoms import CLASSES, draw_phantom
from engines import packages
from engines.contract import ModelContract
from engines.cpu.ort import open_session
from engines.errors import EdgeDscError, EnvironmentProblem, UsageError
from engines.images import prepare_pixels
from engines.record import BatchRange
from engines.runtimes import RunnerOptions
from engines.trt import cuda as cuda_driver
from engines.trt import nvjpeg, runtime
from engines.trt.cache import MemoryFile

SHORT: dict[str, Any] = {"seconds": 0.2, "warmup_seconds": 0.0, "method": "minmax"}
MEMORY = ("host_peak_bytes", "host_before_bytes", "device_bytes")


def ignore(*_: object) -> None:
    pass


def outcomes(found: SelfTest) -> dict[str, str]:
    return {finding.name: finding.outcome.value for finding in found.findings}


@pytest.fixture(scope="module", autouse=True)
def _quick(examination: Examination) -> Iterator[None]:
    """Leave out what takes long and is no subject here: looking at every package again, medians of many runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "examine", lambda: examination)
        patch.setattr(selftest, "_median_ms", functools.partial(selftest._median_ms, calls=3))
        yield


@pytest.fixture(scope="module")
def tested(make_once: Any) -> tuple[SelfTest, Path, list[str]]:
    """What the whole test finds on a machine without a GPU."""

    def look(folder: Path) -> tuple[SelfTest, Path, list[str]]:
        out, said = folder / "out", list[str]()
        plan = SelfTestPlan(out=out, **SHORT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "find_gpu", lambda *_: (None, "no CUDA driver"))
            return run_selftest(plan, progress=ignore, say=said.append), out, said

    return make_once("selftest", look)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_on_a_processor_everything_passes_or_says_why_not(tested: tuple[SelfTest, Path, list[str]]) -> None:
    found, _, said = tested
    assert found.failed == ()
    seen = outcomes(found)
    for network in ("dsc", "cnn"):
        for precision in ("fp32", "int8"):
            assert seen[f"onnxruntime {network} {precision}: build"] == "pass"
            assert seen[f"onnxruntime {network} {precision}: answers"] == "pass"
            assert seen[f"{network}-{precision}.onnxruntime: memory"] == "pass"
            assert seen[f"tensorrt-rtx {network} {precision}: build"] == "pass"
            line = f"onnxruntime {network} {precision}: layers"
            words = next(each.words for each in found.findings if each.name == line)
            assert re.fullmatch(r"\d+ in \d+ us, .+ in \d+ us", words)
    for line in ("batches", "another thread", "a truncated engine", "an edited record"):
        assert seen[f"onnxruntime: {line}"] == "pass"
    for line in (
        "graph and no graph",
        "slots",
        "a pile",
        "kinds of memory",
        "memory kept",
        "waiting",
        "stage times",
        "device",
        "no memory left",
    ):
        assert seen[f"onnxruntime: {line}"] == "not here"
    special = ("int8, int8 pixels", "fp16, float16 pixels", "fp16 on DLA core 0")
    assert [seen[f"tensorrt-rtx dsc {kind}: build"] for kind in special] == ["pass", "pass", "not here"]
    assert seen["onnxruntime dsc int8, int8 pixels: answers"] == "pass"
    assert seen["onnxruntime dsc fp16 on DLA core 0: build"] == seen["nvJPEG"] == "not here"
    assert seen["tensorrt-rtx: run"] == seen["camera"] == seen["trtexec"] == "not here"
    assert seen["latency"] == seen["environment"] == "pass"
    assert len(said) >= len(found.findings)


@pytest.mark.slow
def test_the_folder_holds_what_was_seen(tested: tuple[SelfTest, Path, list[str]]) -> None:
    found, out, _ = tested
    loaded = SELFTEST.load(out / "selftest.json")
    assert json.dumps(SELFTEST.to_builtins(loaded)) == json.dumps(SELFTEST.to_builtins(found))
    assert inspect_path(out / "selftest.json")["what"] == "selftest"
    page = (out / "selftest.html").read_text()
    assert "onnxruntime dsc fp32: answers" in page and "no CUDA driver" in page
    assert {"report.json", "dsc", "cnn"} <= {entry.name for entry in out.iterdir()}
    text = format_selftest(found)
    counts = {name: list(outcomes(found).values()).count(name) for name in ("pass", "fail", "not here")}
    assert text.startswith(f"Self-test: {counts['pass']} pass, 0 fail, {counts['not here']} not here, in ")


def test_only_an_earlier_self_test_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty and no earlier self-test"):
        run_selftest(SelfTestPlan(out=tmp_path), progress=ignore, say=ignore)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_ctrl_c_keeps_the_lines_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_test: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest._Test, "make_networks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_selftest(SelfTestPlan(out=tmp_path / "out"), progress=ignore, say=ignore)
    found = SELFTEST.load(tmp_path / "out/selftest.json")
    assert [finding.name for finding in found.findings] == [
        "environment",
        "temperature sensors",
        "power sensors",
    ]
    assert "temperature sensors" in (tmp_path / "out/selftest.html").read_text()


def test_what_lies_beside_an_earlier_self_test_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest._Test, "run", ignore)
    plan = SelfTestPlan(out=tmp_path / "out")
    run_selftest(plan, progress=ignore, say=ignore)
    (plan.out / "mine.txt").write_text("keep")
    (plan.out / "dsc").mkdir()
    (plan.out / "dsc" / "old.engine").write_text("goes")
    run_selftest(plan, progress=ignore, say=ignore)
    assert (plan.out / "mine.txt").read_text() == "keep"
    assert not (plan.out / "dsc").exists()


def test_whatever_goes_wrong_is_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    test = selftest._Test(SelfTestPlan(out=tmp_path), ignore, said.append)
    assert not test.line("odd", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not test.line("gone", lambda: selftest._refuse("no camera"))
    assert test.line("fine", lambda: ("seen", {"value": 1}))
    assert [(finding.name, finding.outcome, finding.words) for finding in test.findings] == [
        ("odd", Outcome.FAIL, "ZeroDivisionError: division by zero"),
        ("gone", Outcome.NOT_HERE, "no camera"),
        ("fine", Outcome.PASS, "seen"),
    ]
    assert said == [
        "fail      odd: ZeroDivisionError: division by zero",
        "not here  gone: no camera",
        "pass      fine: seen",
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], DoubleCuda]:
    """``gpu(release)``: a machine with stand-ins of one TensorRT release and of pycuda."""

    def have(release: str) -> DoubleCuda:
        cuda = DoubleCuda()
        driver, trt = DoubleDriver(cuda), DoubleTensorRt(release, cuda)
        real = packages.load
        doubles = {"tensorrt": trt, "pycuda.driver": cuda}
        monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
        monkeypatch.setattr(packages, "load", lambda name: doubles[name] if name in doubles else real(name))
        monkeypatch.setattr(selftest, "load", lambda name: doubles[name])
        monkeypatch.setattr(
            packages, "installed_version", lambda name, *_: trt.__version__ if name == "tensorrt" else None
        )
        monkeypatch.setattr(packages, "is_installed", lambda name: True)
        monkeypatch.setattr(nvjpeg, "find_gpu", lambda: (None, "no CUDA driver"))
        monkeypatch.setattr(selftest, "RUNTIME_NAMES", ("tensorrt",))
        monkeypatch.setattr(selftest, "memory_pass", lambda *_, **__: dict.fromkeys(MEMORY, 1 << 20))
        return cuda

    return have


@pytest.mark.slow
def test_on_a_gpu_every_way_to_run_is_tried(
    gpu: Callable[[str], DoubleCuda], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = gpu("10.3")
    monkeypatch.setattr(selftest, "ARCHITECTURES", ("dsc",))
    plan = SelfTestPlan(out=tmp_path / "out", device=1, **SHORT)
    retained: set[int] = set()
    monkeypatch.setattr(cuda, "Device", lambda index, make=cuda.Device: retained.add(index) or make(index))
    found = run_selftest(plan, progress=ignore, say=ignore)
    assert retained == {1}  # whatever was run or filled, the first GPU was left alone
    seen = outcomes(found)
    words = {finding.name: finding.words for finding in found.findings}
    assert words["tensorrt dsc int8: layers"] == (
        "9 in 11250 us, __myl_CastMulConvMaxRe_myl0_8 [profile 1] in 2250 us"
    )
    assert {name: words[name] for name, outcome in seen.items() if outcome == "fail"} == {}
    ways = ("graph and no graph", "slots", "kinds of memory", "waiting", "stage times", "no memory left")
    assert {seen[f"tensorrt: {way}"] for way in (*ways, "a pile", "device")} == {"pass"}
    assert (seen["tensorrt: memory kept"], words["tensorrt: memory kept"]) == (
        "not here",
        "the GPU has memory of its own: there is nothing to choose",
    )
    assert words["tensorrt: device"] == (
        "runs on 1 (Second double); there is no GPU 255: the CUDA driver finds 2, numbered 0 to 1"
    )
    assert re.fullmatch(
        r"batches of 1: \d+ images/s one by one, \d+ overlapping; batches of 4: .*; batches of 16: .*",
        words["tensorrt: a pile"],
    )
    for kind in ("int8, int8 pixels", "fp16, float16 pixels", "fp16 on DLA core 0"):
        assert seen[f"tensorrt dsc {kind}: build"] == seen[f"tensorrt dsc {kind}: answers"] == "pass"
    assert "; on the GPU: flatten, dense, " in words["tensorrt dsc fp16 on DLA core 0: build"]
    assert (tmp_path / "out/dsc/dsc-int8.tensorrt.inspector.json").read_text().startswith("{")
    assert words["tensorrt: another thread"].startswith(
        "refused: the runner of dsc-fp32.tensorrt.engine belongs"
    )
    runs = next(finding.values["runs"] for finding in found.findings if finding.name.endswith(": slots"))
    assert {way["execution"] for way in runs.values()} == {"CUDA graph"}


def test_where_memory_is_shared_the_choice_must_be_kept(
    gpu: Callable[[str], DoubleCuda],
    deployed_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu("10.3").integrated = True
    model = Path(shutil.copy(deployed_models["dsc"], tmp_path / "model.onnx"))
    engine = build_engine(BuildRequest(model=model, runtime="tensorrt", batch=BatchRange(1, 2, 4))).path
    ways = selftest._Ways(engine, np.zeros((4, 224, 224, 1), np.uint8), tmp_path / "faults", RunnerOptions())
    words, values = ways.memory_kept()
    assert re.fullmatch(
        r"(device|mapped): measured in turns at batch 2, device \d+ us, mapped \d+ us, "
        r"kept in dsc-fp32\.tensorrt\.engine\.memory\.json; then the same",
        words,
    )
    assert values["choices"][1][1].endswith("as kept beside the engine")
    monkeypatch.setattr(MemoryFile, "find", lambda *_: None)  # as if nothing could be read again
    with pytest.raises(EdgeDscError, match="the second run did otherwise"):
        ways.memory_kept()
    monkeypatch.setattr(MemoryFile, "_path", None)
    shutil.rmtree(tmp_path / "faults")
    with pytest.raises(EdgeDscError, match=r"nothing was kept: .*, not kept"):
        ways.memory_kept()


def test_a_gpu_that_is_not_there_ends_it_before_anything_is_made(
    gpu: Callable[[str], DoubleCuda], tmp_path: Path
) -> None:
    gpu("10.3")
    with pytest.raises(EnvironmentProblem, match="there is no GPU 2: the CUDA driver finds 2"):
        run_selftest(SelfTestPlan(out=tmp_path / "out", device=2), progress=ignore, say=ignore)
    assert not (tmp_path / "out").exists()


def test_a_network_made_on_the_spot_has_learnt_and_is_the_same_every_time() -> None:
    contract = ModelContract(labels=CLASSES, architecture="dsc")
    answers = np.arange(48) % 3
    drawn = [
        prepare_pixels(draw_phantom(CLASSES[answer], seed), contract, name="phantom")
        for seed, answer in enumerate(answers)
    ]
    pixels = np.stack(drawn)
    made = [fit_on_the_spot(contract, pixels, answers, seed=0) for _ in range(2)]
    assert made[0].SerializeToString(deterministic=True) == made[1].SerializeToString(deterministic=True)
    session = open_session(made[0].SerializeToString(), "x", threads=1, remedy="")
    found = session.run(None, {contract.input_name: pixels})[0]
    assert (found.argmax(axis=1) == answers).mean() > 0.9
