"""``selftest``: whether all of it works on this machine, in one folder that can be sent to somebody else.

Two networks are made on the spot, built for every runtime that builds here, in every precision, and run in every way
that there is. Each line says *pass*, *fail*, or *not here* with the reason.
"""

from __future__ import annotations

import contextlib
import enum
import json
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.machine import Gpu as Board
from bench.machine import environment, read_temperatures
from bench.plan import Plan, choose_plan
from bench.power import find_rails
from bench.report import Report, save_report
from bench.statistics import sample_median, stage_medians
from bench.trtexec import import_trtexec
from calibration.table import DEFAULT_METHOD, load_table
from edge_dsc import __version__
from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.deployed import fit_on_the_spot
from edge_dsc.build.engine import (
    BuildRequest,
    BuiltEngine,
    build_engine,
    graph_in_precision,
    precisions_to_try,
)
from edge_dsc.checks.doctor import examine
from edge_dsc.data import discover
from edge_dsc.data.loading import load_images
from edge_dsc.data.phantoms import CLASSES, draw_phantom, write_phantoms
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.latency.passes import memory_pass
from edge_dsc.latency.subjects import BenchOptions, measure_engines, measured_board
from edge_dsc.networks import ARCHITECTURES
from edge_dsc.page.document import Section, report_sections, save_page
from engines.contract import NVJPEG_RULE, ModelContract
from engines.cpu.ort import open_reference, open_session
from engines.errors import AccuracyGateError, ArtefactError, EdgeDscError, EnvironmentProblem, UsageError
from engines.files import ONNX_MODEL, DocumentKind, clear_folder, write_bytes, write_text
from engines.graph import load_model, seal_model
from engines.images import InputPixels, decode_image, shape_input
from engines.packages import load
from engines.record import BatchRange, Precision, Tuning, record_path
from engines.runtimes import (
    RUNTIME_NAMES,
    Progress,
    Runner,
    RunnerOptions,
    answer_batches,
    get_runtime,
    open_engine,
)
from engines.text_table import Table, render_text
from engines.trt.cache import memory_path
from engines.trt.cuda import fill_memory

BATCH = BatchRange(1, 4, 16)
_PER_CLASS = 50  # phantoms; all classes together are enough for a calibration
_MARKER = ".edge-dsc-selftest"
_MADE = (
    *("phantoms", "unseen", *ARCHITECTURES, "faults"),
    *("report.json", "camera.jsonl", "selftest.json", "selftest.html"),
)
_TRTEXEC = Path("/usr/src/tensorrt/bin/trtexec")  # where JetPack and NVIDIA's packages put it
# How far probabilities may be, on average, from what ONNX Runtime makes of the same graph, and how many answers must
# agree. GPUs multiply FP32 in TF32; where two runtimes round an INT8 value to different sides, the rest of the network
# sees a whole step, and a network that was made on the spot is less sure than a trained one.
_TOLERANCES = {
    Precision.FP32: (0.001, 0.95),
    Precision.FP16: (0.01, 0.95),
    Precision.BF16: (0.03, 0.9),
    Precision.INT8: (0.05, 0.85),
}
_CAMERA_FRAMES = 30
_TRTEXEC_S = 120  # it measures for 3
_NO_SUCH_GPU = 255
_PILE = 2 * BATCH.largest  # images: two batches at least overlap


class Outcome(str, enum.Enum):
    """How a line of the test ended."""

    PASS = "pass"
    FAIL = "fail"
    NOT_HERE = "not here"


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the test.

    Attributes:
        name: What was tried, such as ``tensorrt dsc int8: answers``.
        outcome: How it ended.
        words: What was seen, or why it failed or cannot be tried here.
        values: The same as JSON values.
    """

    name: str
    outcome: Outcome
    words: str
    values: Mapping[str, Any] = msgspec.field(default_factory=dict)


class SelfTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All lines, and where they were seen.

    Attributes:
        created: UTC time of the start, ISO 8601.
        edge_dsc: Version.
        seconds: How long it took.
        environment: The machine, as in a latency report.
        findings: The lines in the order of trying.
    """

    created: str
    edge_dsc: str
    seconds: float
    environment: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The lines that failed."""
        return tuple(finding for finding in self.findings if finding.outcome is Outcome.FAIL)


SELFTEST = DocumentKind(name="edge-dsc/selftest", version=1, body=SelfTest, renew="edge-dsc selftest")

Say = Callable[[str], None]
Seen = tuple[str, Mapping[str, Any]]


class _NotHereError(Exception):
    """Something cannot be tried on this machine; the text says why."""


@dataclass(frozen=True, kw_only=True)
class SelfTestPlan:
    """What a self-test tries and where it goes.

    Attributes:
        out: The folder of everything that it makes.
        camera: A camera or stream, as ``infer`` takes it; None tries none.
        seconds: Measured time of each engine. Seconds.
        seed: Seed of the phantoms and weights.
        device: Which GPU, as CUDA numbers them.
        warmup_seconds: Time before the measured one. Seconds.
        method: How the INT8 ranges are found.
    """

    out: Path
    camera: str | None = None
    seconds: float = 2.0
    seed: int = 0
    device: int = 0
    warmup_seconds: float = 0.5
    method: str = DEFAULT_METHOD


def run_selftest(plan: SelfTestPlan, *, progress: Progress, say: Say) -> SelfTest:
    """Try everything and write ``selftest.json``, ``selftest.html`` and what the lines are about.

    Raises:
        UsageError: The folder holds something that no self-test made.
        EnvironmentProblem: The folder cannot be written, or there are GPUs, but not so many.
        KeyboardInterrupt: Ctrl-C; the lines until then are written.
    """
    board = measured_board(RUNTIME_NAMES, plan.device)
    clear_folder(plan.out, _MARKER, _MADE, "self-test")
    created, started = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    test = _Test(plan, progress, say, board)
    try:
        test.run()
    finally:  # what was seen until Ctrl-C is worth keeping
        found = SelfTest(
            created=created,
            edge_dsc=__version__,
            seconds=round(time.monotonic() - started, 1),
            environment=environment(gpu=board),
            findings=tuple(test.findings),
        )
        SELFTEST.save(plan.out / "selftest.json", found)
        latency = report_sections(test.report) if test.report is not None else ()
        sections = [Section("Lines", (selftest_table(found),)), *latency]
        summary = "What was tried on this machine, and what came of it."
        save_page(plan.out / "selftest.html", "edge-dsc selftest", sections, summary=summary)
    return found


def selftest_table(found: SelfTest) -> Table:
    """Return the lines as a table."""
    rows = tuple((finding.outcome.value, finding.name, finding.words) for finding in found.findings)
    counts = {outcome: sum(row[0] == outcome.value for row in rows) for outcome in Outcome}
    words = ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items())
    return Table(
        title=f"Self-test: {words}, in {found.seconds:.0f} s",
        header=("outcome", "what", "seen"),
        rows=rows,
        numeric=False,
    )


def format_selftest(found: SelfTest) -> str:
    """Return the lines as text."""
    return render_text(selftest_table(found))


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A network that was made here."""

    path: Path
    table: Path | None
    pixels: NDArray[np.uint8]  # [N, height, width, channels], of phantoms that nothing was fitted to
    reference: NDArray[np.float32]  # [N, classes], by ONNX Runtime in FP32


@dataclass
class _Test:
    """The lines so far, and what they go on with."""

    plan: SelfTestPlan
    progress: Progress
    say: Say
    board: Board | None = None  # the GPU as NVML knows it
    findings: list[Finding] = field(default_factory=list)
    networks: dict[str, _Network] = field(default_factory=dict)
    engines: list[BuiltEngine] = field(default_factory=list)
    report: Report | None = None

    @property
    def running(self) -> RunnerOptions:
        """How engines of a GPU run where nothing else is tried."""
        return RunnerOptions(device=self.plan.device)

    @property
    def runnable(self) -> list[BuiltEngine]:
        """The engines that run here."""
        return [engine for engine in self.engines if engine.runs_here]

    def run(self) -> None:
        """Try everything."""
        self.look()
        self.make_networks()
        for runtime in RUNTIME_NAMES:
            self.build(runtime)
        for runtime in RUNTIME_NAMES:
            self.run_in_every_way(runtime)
        self.measure()
        self.line("nvJPEG", _nvjpeg)
        self.line("camera", self._camera)

    def line(self, name: str, action: Callable[[], Seen]) -> bool:
        """Try something, note how it ended, and say whether it passed."""
        values: Mapping[str, Any] = {}
        try:
            words, values = action()
            outcome = Outcome.PASS
        except _NotHereError as reason:
            outcome, words = Outcome.NOT_HERE, str(reason)
        except Exception as error:  # noqa: BLE001  whatever goes wrong is what this is for
            kind = "" if isinstance(error, EdgeDscError) else f"{type(error).__name__}: "
            outcome, words = Outcome.FAIL, " ".join(f"{kind}{error}".split())
        seen = msgspec.json.decode(msgspec.json.encode(values))  # as it is once the document is loaded
        self.findings.append(Finding(name=name, outcome=outcome, words=words, values=seen))
        self.say(f"{outcome.value:8}  {name}: {words}")
        return outcome is Outcome.PASS

    def look(self) -> None:
        """Look at the machine: packages, sensors."""
        self.line("environment", _environment)
        self.line("temperature sensors", _temperatures)
        self.line("power sensors", partial(_rails, self.board))

    def make_networks(self) -> None:
        """Draw phantoms, fit both networks to them, and calibrate."""
        data, unseen = self.plan.out / "phantoms", self.plan.out / "unseen"
        for root, per_class, seed in ((data, _PER_CLASS, 0), (unseen, 16, 1)):
            write_phantoms(root, per_class, self.plan.seed + seed, self.progress)
        for architecture in ARCHITECTURES:
            self.line(f"{architecture}: made", partial(self._make, architecture, data, unseen))

    def _make(self, architecture: str, data: Path, unseen: Path) -> Seen:
        contract = ModelContract(labels=CLASSES, architecture=architecture)
        path = self.plan.out / architecture / "model.onnx"
        training = _labelled(data, contract)
        write_bytes(path, seal_model(fit_on_the_spot(contract, *training, seed=self.plan.seed)), ONNX_MODEL)
        model = load_model(path)
        session = open_session(model.proto.SerializeToString(), str(path), threads=1, remedy="see doctor")
        pixels, answers = _labelled(unseen, contract)
        reference: NDArray[np.float32] = session.run(None, {contract.input_name: pixels})[0]
        self.networks[architecture] = _Network(path=path, table=None, pixels=pixels, reference=reference)
        request = CalibrationRequest(model=path, data=data, method=self.plan.method)
        calibrated = run_calibration(request, self.progress)
        self.networks[architecture] = replace(self.networks[architecture], table=calibrated.path)
        right = float((reference.argmax(axis=1) == answers).mean())
        words = f"{right:.0%} of {len(pixels)} unseen phantoms right, calibrated on {len(calibrated.table.images)}"
        return words, {"accuracy": right, "images": len(pixels)}

    def build(self, runtime: str) -> None:
        """Build both networks in every precision."""
        reason = get_runtime(runtime).availability().no_build
        if reason is not None:
            self.line(f"{runtime}: build", partial(_refuse, reason))
            return
        for architecture, network in self.networks.items():
            for precision in precisions_to_try(runtime):
                name = f"{runtime} {architecture} {precision.value}: build"
                self.line(name, partial(self._build, self._request(runtime, network, precision)))
        if self.networks:
            architecture, network = next(iter(self.networks.items()))
            for precision, kind in ((Precision.INT8, "int8"), (Precision.FP16, "float16")):
                request = self._request(runtime, network, precision, input=kind)
                name = f"{runtime} {architecture} {precision.value}, {kind} pixels: build"
                self.line(name, partial(self._build, request))
            one = BatchRange(1, 1, 1)
            request = self._request(runtime, network, Precision.FP16, batch=one, tuning=Tuning(dla=0))
            self.line(f"{runtime} {architecture} fp16 on DLA core 0: build", partial(self._build, request))

    def _request(self, runtime: str, network: _Network, precision: Precision, **more: Any) -> BuildRequest:
        """Return what builds a network of this test; what is special stands in the engine's name."""
        words = [precision.value, *([more["input"]] if "input" in more else [])]
        if (core := more.get("tuning", Tuning()).dla) is not None:
            words.append(f"dla{core}")
        return BuildRequest(
            model=network.path,
            precision=precision,
            runtime=runtime,
            batch=more.pop("batch", BATCH),
            calibration=network.table if precision is Precision.INT8 else None,
            out=network.path.with_name(f"{network.path.parent.name}-{'-'.join(words)}.{runtime}.engine"),
            device=None if get_runtime(runtime).runs_on_cpu else self.plan.device,
            **more,
        )

    def _build(self, request: BuildRequest) -> Seen:
        runtime = request.runtime
        try:
            built = build_engine(request)
        except (EnvironmentProblem, UsageError) as error:
            if request.tuning.dla is None:
                raise
            raise _NotHereError(error.what) from error  # the runtime, the release or the device has none
        except AccuracyGateError as error:
            if not get_runtime(runtime).runs_on_cpu:
                raise
            raise _NotHereError(f"this processor cannot: {error.what}") from error
        self.engines.append(built)
        record = built.record
        layers = ", ".join(f"{count} {kind}" for kind, count in record.layers.items())
        words = f"{layers} by the {record.layers_source}, {record.build_seconds:.1f} s"
        if record.tuning.dla is not None:
            words += f"; on the GPU: {', '.join(record.gpu_layers) or 'nothing'}"
        return words, {"record": record_path(built.path).name, "layers": dict(record.layers)}

    def run_in_every_way(self, runtime: str) -> None:
        """Hold answers against ONNX Runtime, and try every switch and some mistakes on one engine."""
        mine = [engine for engine in self.engines if engine.record.runtime == runtime]
        reason = get_runtime(runtime).availability().no_run
        if mine and reason is not None:
            self.line(f"{runtime}: run", partial(_refuse, reason))
            return
        for engine in mine:
            name = f"{runtime} {_title(engine)}"
            self.line(f"{name}: answers", partial(self._answers, engine))
            self.line(f"{name}: layers", partial(_layers, engine, self.plan.device))
        if mine:
            ways = _Ways(
                mine[0].path, self._network_of(mine[0]).pixels, self.plan.out / "faults", self.running
            )
            for name, action in ways.all().items():
                self.line(f"{runtime}: {name}", action)

    def _network_of(self, engine: BuiltEngine) -> _Network:
        return self.networks[engine.record.contract.architecture]

    def _answers(self, engine: BuiltEngine) -> Seen:
        """Hold an engine against ONNX Runtime on the graph that it was built from; FP32 stands beside it."""
        network, record = self._network_of(engine), engine.record
        table = load_table(network.table) if record.precision is Precision.INT8 and network.table else None
        model, runtime = load_model(network.path).proto, get_runtime(record.runtime)
        graph = graph_in_precision(model, record.precision, table, runtime, contract=record.contract)
        pixels = shape_input(network.pixels, record.contract)
        with open_reference(graph, record) as reference:
            expected = _answer_all(reference, pixels)
        with open_engine(engine.path, options=self.running) as runner:
            answers, runs = _answer_all(runner, pixels), dict(runner.description)
        difference, agreement = float(np.abs(answers - expected).mean()), _agreement(answers, expected)
        with_fp32 = _agreement(answers, network.reference)
        words = (
            f"{difference:.1e} on average from ONNX Runtime's probabilities on the same graph, {agreement:.0%} of the "
            f"answers agree; {with_fp32:.0%} with FP32"
        )
        most, least = _TOLERANCES[record.precision]
        if not difference <= most or agreement < least:
            raise EdgeDscError(words, remedy=f"{most} and {least:.0%} are allowed")
        values = {"mean_difference": difference, "agreement": agreement, "agreement_with_fp32": with_fp32}
        return words, {**values, "runs": runs}

    def measure(self) -> None:
        """Measure all engines that run here, and hold trtexec's times against ours."""
        self.line("latency", self._measure)
        for engine in self.runnable:
            self.line(f"{engine.path.stem}: memory", partial(_memory, engine.path, self.plan.device))
        plans = [engine for engine in self.runnable if not get_runtime(engine.record.runtime).runs_on_cpu]
        if not plans:
            self.line("trtexec", partial(_refuse, "no TensorRT engine runs here"))
        for engine in plans:
            self.line(f"{engine.path.stem}: trtexec", partial(self._trtexec, engine))

    def _measure(self) -> Seen:
        if not self.runnable:
            raise _NotHereError("no engine runs here")
        plan = choose_plan(
            seconds=self.plan.seconds,
            warmup_seconds=self.plan.warmup_seconds,
            openings=5,
            seed=self.plan.seed,
        )
        engines = [engine.path for engine in self.runnable]
        options = BenchOptions(running=self.running)
        report = measure_engines(engines, plan, options, progress=self.progress)
        self.report = report
        save_report(self.plan.out / "report.json", report)
        medians = {subject.name: sample_median(subject) / 1e6 for subject in report.measured}
        stages = {subject.name: stage_medians(subject) for subject in report.measured}
        if report.failed:
            failed = "; ".join(f"{subject.name}: {subject.error}" for subject in report.failed)
            raise EdgeDscError(failed, remedy="report.json has the others")
        words = ", ".join(f"{name} {median:.3f} ms" for name, median in medians.items())
        return words, {"medians_ms": medians, "stages_ns": stages}

    def _trtexec(self, engine: BuiltEngine) -> Seen:
        tool = shutil.which("trtexec") or (str(_TRTEXEC) if _TRTEXEC.is_file() else None)
        if tool is None:
            raise _NotHereError(f"trtexec is neither on PATH nor {_TRTEXEC}")
        if engine.record.runtime != "tensorrt":
            raise _NotHereError(f"trtexec does not run engines of {engine.record.runtime}")
        contract = engine.record.contract
        times = engine.path.with_suffix(".trtexec.json")
        shape = "x".join(map(str, (1, *contract.input_shape)))
        command = [tool, f"--loadEngine={engine.path}", f"--shapes={contract.input_name}:{shape}"]
        command += [f"--exportTimes={times}", "--duration=3", "--useSpinWait"]
        command += [f"--device={self.plan.device}"]
        if engine.record.tuning.dla is not None:
            command.append(f"--useDLACore={engine.record.tuning.dla}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRTEXEC_S, check=False)
        write_text(engine.path.with_suffix(".trtexec.txt"), done.stdout + done.stderr)
        if done.returncode != 0:
            raise EdgeDscError(f"trtexec ended with {done.returncode}", remedy="its words are in the folder")
        theirs = sample_median(import_trtexec(times).measured[0]) / 1e6
        measured = self.report.measured if self.report is not None else ()
        ours = {subject.name: sample_median(subject) / 1e6 for subject in measured}.get(engine.path.stem)
        words = "was not measured" if ours is None else f"{ours:.3f} ms"
        seen = f"{theirs:.3f} ms by the GPU's clock, ours from call to answer {words}"
        return seen, {"trtexec_ms": theirs, "ours_ms": ours}

    def _camera(self) -> Seen:
        """Answer some frames of the camera that was named."""
        if self.plan.camera is None:
            raise _NotHereError("none was named: --camera csi://0")
        if not self.runnable:
            raise _NotHereError("no engine runs here")
        request = InferRequest(
            engine=self.runnable[0].path,
            source=self.plan.camera,
            out=self.plan.out / "camera.jsonl",
            limit=_CAMERA_FRAMES,
            give_up_s=10.0,
            running=self.running,
        )
        summary = infer_source(request, say=self.say)
        return summary.line(), {"answered": summary.answered, "dropped": summary.dropped, "age": summary.age}


@dataclass(frozen=True)
class _Ways:
    """One engine and every way to run it, right ones and wrong ones."""

    engine: Path
    pixels: NDArray[np.uint8]
    faults: Path
    running: RunnerOptions

    def all(self) -> dict[str, Callable[[], Seen]]:
        return {
            "batches": self.batches,
            "graph and no graph": self.graphs,
            "slots": self.slots,
            "a pile": self.pile,
            "kinds of memory": self.memory,
            "memory kept": self.memory_kept,
            "waiting": self.waiting,
            "stage times": self.stages,
            "device": self.device,
            "another thread": self.another_thread,
            "a truncated engine": self.truncated,
            "an edited record": self.edited,
            "no memory left": self.full_memory,
        }

    def _on_a_gpu(self, runner: Runner, what: str) -> None:
        if get_runtime(runner.record.runtime).runs_on_cpu:
            raise _NotHereError(f"{runner.record.runtime} runs on the processor: it has no {what}")

    def batches(self) -> Seen:
        """Every size of batch gives the answers of single pictures."""
        with open_engine(self.engine, options=self.running) as runner:
            single = _answer_all(runner, self.pixels, 1)
            sizes = [
                size for size in (2, 3, BATCH.best, BATCH.largest) if size <= runner.record.batch.largest
            ]
            differences = {
                size: _difference(_answer_all(runner, self.pixels, size), single) for size in sizes
            }
        _require(max(differences.values()) <= 1e-3, f"answers differ by size of batch: {differences}")
        words = ", ".join(f"{size}: {difference:.0e}" for size, difference in differences.items())
        return f"differences to single pictures, {words}", {"differences": _texts(differences)}

    def graphs(self) -> Seen:
        return self._compare("graph", {"graph": self.running, "no graph": replace(self.running, graph=False)})

    def memory(self) -> Seen:
        return self._compare(
            "memory of its own",
            {kind: replace(self.running, memory=kind) for kind in ("device", "mapped", "auto")},
        )

    def waiting(self) -> Seen:
        return self._compare(
            "device to wait for", {"spin": self.running, "sleep": replace(self.running, blocking_wait=True)}
        )

    def _compare(self, what: str, ways: Mapping[str, RunnerOptions]) -> Seen:
        """Run in several ways, which must answer alike; say how long a batch of one takes in each."""
        answers, medians, runs = {}, {}, {}
        for name, options in ways.items():
            with open_engine(self.engine, options=options) as runner:
                self._on_a_gpu(runner, what)
                answers[name] = _answer_all(runner, self.pixels, 1)
                medians[name] = _median_ms(partial(runner.run, self.pixels[:1]))
                runs[name] = dict(runner.description)
        first = next(iter(answers.values()))
        differences = {name: _difference(found, first) for name, found in answers.items()}
        _require(max(differences.values()) <= 1e-5, f"answers differ: {differences}")
        words = ", ".join(f"{name} {median:.3f} ms" for name, median in medians.items())
        return f"equal answers; {words}", {"medians_ms": medians, "runs": runs}

    def slots(self) -> Seen:
        """Several batches in flight give the same answers."""
        rates, runs = {}, {}
        with open_engine(self.engine, options=self.running) as runner:
            expected = _answer_all(runner, self.pixels, 1)
        for slots in (1, 2, 4):
            with open_engine(self.engine, options=replace(self.running, slots=slots)) as runner:
                self._on_a_gpu(runner, "slots")
                started = time.perf_counter()
                found = _answer_all(runner, self.pixels, 1)
                rates[slots] = len(found) / (time.perf_counter() - started)
                runs[slots] = dict(runner.description)
                _require(_difference(found, expected) <= 1e-5, f"answers differ with {slots} slots")
        words = ", ".join(f"{slots}: {rate:.0f} images/s" for slots, rate in rates.items())
        return f"equal answers; {words}", {"images_per_s": _texts(rates), "runs": _texts(runs)}

    def pile(self) -> Seen:
        """As ``bench --offline`` has it: the next batch is submitted before the one before it is collected."""
        with open_engine(self.engine, options=self.running) as runner:
            self._on_a_gpu(runner, "batches in flight")
        plan = Plan(
            iterations=6,
            rounds=2,
            openings=1,
            warmup_seconds=0.1,
            warmup_limit_seconds=0.2,
            lead_in=1,
        )
        rates: dict[int, dict[int, float]] = {}
        for slots in (1, 2):
            options = BenchOptions(offline=_PILE, control=False, running=replace(self.running, slots=slots))
            report = measure_engines([self.engine], plan, options)
            _require(not report.failed, "; ".join(f"{each.name}: {each.error}" for each in report.failed))
            for subject in report.measured:
                size = subject.description["engine_batch"]
                rate = 1e9 * _PILE / sample_median(subject)
                rates.setdefault(size, {})[slots] = rate
        words = "; ".join(
            f"batches of {size}: {rate[1]:.0f} images/s one by one, {rate[2]:.0f} overlapping"
            for size, rate in rates.items()
        )
        return words, {"images_per_s": {str(size): _texts(rate) for size, rate in rates.items()}}

    def memory_kept(self) -> Seen:
        """What one run chose between copies and mapped memory, the next one takes."""
        copy, choices = self._copy("memory"), []
        for _ in range(2):
            with open_engine(copy, options=self.running) as runner:
                self._on_a_gpu(runner, "memory of its own")
                choices.append((runner.description["memory"], runner.description["memory_choice"]))
        path = memory_path(copy)
        if choices[0][1] == "the GPU has its own":
            raise _NotHereError("the GPU has memory of its own: there is nothing to choose")
        _require(path.is_file(), f"nothing was kept: {choices[0][1]}")
        _require(
            choices[0][0] == choices[1][0] and choices[1][1].endswith("as kept beside the engine"),
            f"the second run did otherwise: {choices}",
        )
        return f"{choices[0][0]}: {choices[0][1]}; then the same", {"choices": choices}

    def device(self) -> Seen:
        """The GPU that was asked for runs; one more than there are is refused by number."""
        with open_engine(self.engine, options=self.running) as runner:
            self._on_a_gpu(runner, "GPU")
            runs = runner.description["device"]
        _require(
            runs.split()[0] == str(self.running.device), f"asked for {self.running.device}, runs on {runs}"
        )
        try:
            open_engine(self.engine, options=replace(self.running, device=_NO_SUCH_GPU)).close()
        except EnvironmentProblem as error:
            return f"runs on {runs}; {error.what}", {"device": runs}
        raise EdgeDscError(f"GPU {_NO_SUCH_GPU} was opened", remedy="it must be refused")

    def stages(self) -> Seen:
        options = replace(self.running, slots=1, time_stages=True)
        with open_engine(self.engine, options=options) as runner:
            self._on_a_gpu(runner, "stages")
            times: dict[str, list[int]] = {}
            for _ in range(100):
                ticket = runner.submit(self.pixels[:1])
                runner.collect(ticket)
                for stage, taken in (ticket.stages_ns or {}).items():
                    times.setdefault(stage, []).append(taken)
        _require(bool(times), "no stage was timed")
        medians = {stage: statistics.median(taken) / 1e3 for stage, taken in times.items()}
        return ", ".join(f"{stage} {taken:.1f} us" for stage, taken in medians.items()), {
            "medians_us": medians
        }

    def another_thread(self) -> Seen:
        """A thread of its own either gets the same answers, or is refused by name."""
        with open_engine(self.engine, options=self.running) as runner:
            expected, seen = runner.run(self.pixels[:1]), list[object]()

            def run() -> None:
                try:
                    seen.append(_difference(runner.run(self.pixels[:1]), expected))
                except RuntimeError as error:
                    seen.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            if runner.thread_safe:
                _require(seen == [0.0], f"another thread got {seen}")
                return "equal answers", {}
            _require(bool(seen) and isinstance(seen[0], RuntimeError), f"another thread got {seen}")
            _require(_difference(runner.run(self.pixels[:1]), expected) == 0, "the runner was harmed by it")
            return f"refused: {seen[0]}", {}

    def truncated(self) -> Seen:
        copy = self._copy("truncated")
        copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])
        return _refused(copy)

    def edited(self) -> Seen:
        copy = self._copy("edited")
        record = record_path(copy)
        body = json.loads(record.read_text(encoding="utf-8"))
        body["contract"]["labels"].reverse()
        record.write_text(json.dumps(body), encoding="utf-8")
        return _refused(copy)

    def _copy(self, name: str) -> Path:
        copy = self.faults / name / self.engine.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        for source in (self.engine, record_path(self.engine)):
            shutil.copyfile(source, copy.parent / source.name)
        return copy

    def full_memory(self) -> Seen:
        """A GPU without memory left is an error in words, and nothing is broken by it."""
        with open_engine(self.engine, options=self.running) as runner:
            self._on_a_gpu(runner, "memory of its own")
        with _full_memory(self.running.device) as held:
            try:
                open_engine(self.engine, options=replace(self.running, slots=4)).close()
                words = "it opens even so"
            except EnvironmentProblem as error:
                words = f"refused: {error.what}"
        with open_engine(self.engine, options=self.running) as runner:
            runner.run(self.pixels[:1])
        return f"with {held >> 20} MiB held, {words}; it runs again afterwards", {}


@contextlib.contextmanager
def _full_memory(device: int) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(fill_memory(load("pycuda.driver"), device))
        except EnvironmentProblem as error:
            raise _NotHereError(f"{error.what}: {error.remedy}") from error
        yield held


def _environment() -> Seen:
    found = examine()
    return f"{found.machine}, Python {found.python}, to do: {'; '.join(found.to_do) or 'nothing'}", (
        msgspec.to_builtins(found)
    )


def _temperatures() -> Seen:
    zones = read_temperatures(Path("/"))
    if not zones:
        raise _NotHereError("no thermal zone can be read")
    return ", ".join(f"{name} {value:.0f} °C" for name, value in zones), {"celsius": dict(zones)}


def _rails(board: Board | None) -> Seen:
    rails = find_rails(gpu=board)
    if not rails:
        raise _NotHereError("no rail can be read (INA3221, RAPL, NVML)")
    watts = {rail.name: rail.watts() for rail in rails}
    return ", ".join(f"{name} {value} W" for name, value in watts.items()), {"watts": watts}


def _title(engine: BuiltEngine) -> str:
    record = engine.record
    title = f"{record.contract.architecture} {record.precision.value}"
    if record.tuning.dla is not None:
        return f"{title} on DLA core {record.tuning.dla}"
    return title if record.contract.dtype == "uint8" else f"{title}, {record.contract.dtype} pixels"


def _nvjpeg() -> Seen:
    """How far nvJPEG's pixels are from OpenCV's, on a phantom in a JPEG of quality 95."""
    contract = ModelContract(labels=CLASSES, architecture="")
    data = bytes(cv2.imencode(".jpg", draw_phantom(CLASSES[0], 0))[1].tobytes())
    expected = decode_image(data, contract).astype(np.int16)
    try:
        seen = decode_image(data, msgspec.structs.replace(contract, decode=NVJPEG_RULE))
    except EnvironmentProblem as error:
        raise _NotHereError(error.what) from error
    if seen.shape != expected.shape:  # OpenCV's may be reduced
        raise EdgeDscError(f"nvJPEG gives {seen.shape}, OpenCV {expected.shape}", remedy="see doctor")
    apart = np.abs(seen - expected)
    words = f"{apart.mean():.3f} grey levels from OpenCV on average, {apart.max()} at most"
    _require(apart.mean() <= 1.0, words)
    return words, {"mean": float(apart.mean()), "largest": int(apart.max())}


def _labelled(root: Path, contract: ModelContract) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    dataset = discover(root)
    loaded = load_images(root, dataset.samples, contract)
    return loaded.pixels, np.array([contract.labels.index(sample.label) for sample in loaded.samples])


def _answer_all(runner: Runner, pixels: InputPixels, size: int = BATCH.best) -> NDArray[np.float32]:
    size = min(size, runner.record.batch.largest)
    parts = [pixels[first : first + size] for first in range(0, len(pixels) - len(pixels) % size, size)]
    rest = len(pixels) % size
    batches = enumerate([*parts, *([pixels[-rest:]] if rest else [])])
    return np.concatenate([answers for _, answers in answer_batches(runner, batches)])


def _median_ms(call: Callable[[], object], calls: int = 50) -> float:
    times = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return statistics.median(times)


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max())


def _agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())


def _layers(engine: BuiltEngine, device: int) -> Seen:
    """Time the layers, and keep what the runtime's own inspector says of them, word for word."""
    layers, report = get_runtime(engine.record.runtime).inspect_layers(engine.path, engine.record, device)
    path = engine.path.with_suffix(".inspector.json")
    if report is not None:
        write_text(path, report)
    times = {layer.name: layer.microseconds for layer in layers if layer.microseconds is not None}
    _require(bool(times), f"none of {len(layers)} layers has a time")
    slowest = max(times, key=times.__getitem__)
    words = f"{len(layers)} in {sum(times.values()):.0f} us, {slowest} in {times[slowest]:.0f} us"
    return words, {"layers": layers, "report": path.name if report is not None else None}


def _memory(engine: Path, device: int) -> Seen:
    found = memory_pass(engine, batch=1, threads=1, device=device)
    if "error" in found:
        raise EdgeDscError(str(found["error"]), remedy="see doctor")
    mib = {key: None if value is None else round(value / (1 << 20), 1) for key, value in found.items()}
    return f"host {mib['host_peak_bytes']} MiB at most, device {mib['device_bytes'] or 'unknown'}", found


def _refused(engine: Path) -> Seen:
    try:
        open_engine(engine).close()
    except ArtefactError as error:
        return f"refused: {error.what}", {}
    raise EdgeDscError("it was opened", remedy="such a file must be refused")


def _refuse(reason: str) -> Seen:
    raise _NotHereError(reason)


def _require(fine: bool, words: str) -> None:
    if not fine:
        raise EdgeDscError(words, remedy="send the folder of this test with a report of the defect")


def _texts(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}
