"""TensorRT and TensorRT for RTX as runtimes: what works here, building, opening."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines import packages
from engines.errors import ArtefactError, EnvironmentProblem
from engines.files import write_bytes
from engines.record import EngineRecord, Precision, Tuning, read_engine
from engines.runtimes import (
    DEFAULT_OPTIONS,
    LAYER_RUNS,
    Availability,
    BuildOptions,
    BuildResult,
    EngineLayer,
    RunnerOptions,
    without_calibrators,
)
from engines.trt import versions
from engines.trt.builder import build_plan
from engines.trt.census import INSPECTOR
from engines.trt.cuda import Gpu, bound_device, find_gpu
from engines.trt.loaded import StoredEngine
from engines.trt.runner import TrtRunner
from engines.trt.versions import RTX_GPUS, RTX_INT8

_AMPERE_PLUS = "compute capability 8.0 and later"
_SAME_MEMORY = 0.9
_NO_GPU = "run it on a machine with an NVIDIA GPU and its driver, or build with --backend onnxruntime"


@dataclass(frozen=True, kw_only=True)
class TensorRtRuntime:
    """A runtime that builds TensorRT plans and runs them through pycuda.

    Attributes:
        name: Name in the runtimes' table.
        package: Import name of the TensorRT module.
        distributions: Names under which that module may have been installed.
        builds_on_cpu: Whether building needs no GPU.
        portable_to: The GPUs that its engines run on; empty where they run on the one they were built on.
        int8_doubt: What to say of INT8 engines until an inspector showed how each layer runs; empty says nothing.
        signed_activations: True: TensorRT takes symmetric activations only.
        float_precision: FP16: every GPU that TensorRT supports has it.
        precisions: All that it builds here.
        runs_on_cpu: False.
    """

    name: str
    package: str
    distributions: tuple[str, ...]
    builds_on_cpu: bool
    portable_to: str
    int8_doubt: str = ""
    signed_activations: bool = True
    float_precision: Precision = Precision.FP16
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.MIXED)
    runs_on_cpu: bool = False

    def availability(self) -> Availability:
        """Say what works here; never raises."""
        version = packages.installed_version(self.package, *self.distributions)
        if version is None:
            reason = f"{self.package} is not installed"
            return Availability(None, reason, reason)
        gpu, reason = find_gpu()
        no_run = None if gpu else reason
        if gpu and not packages.is_installed("pycuda"):
            no_run = "pycuda is not installed"
        return Availability(version, None if gpu or self.builds_on_cpu else reason, no_run)

    def weight_bits(self) -> int:
        """Say 8: a GPU sums in 32 bits."""
        return 8

    def rest_in_half(self) -> bool:
        """Say whether this release takes the precision from the graph's own types, so that FP16 must be in them.

        Raises:
            EnvironmentProblem: The package is missing.
        """
        return versions.is_strongly_typed(packages.load(self.package))

    def require_calibrators(self, method: str) -> None:
        """Refuse a release without calibrators: 11 and later, and all for RTX.

        Raises:
            EnvironmentProblem: The package is missing.
            UsageError: It has none.
        """
        trt = packages.load(self.package)
        if not versions.has_calibrators(trt):
            raise without_calibrators(f"{self.name} {trt.__version__}", method)

    def build(self, model: bytes, out: Path, options: BuildOptions) -> BuildResult:
        """Build an engine file from a serialised ONNX model that is already in the wanted precision.

        Raises:
            AccuracyGateError: The engine would not run in the precision asked for.
            ArtefactError: TensorRT cannot read the model.
            EnvironmentProblem: TensorRT or the GPU is missing, or ``out`` cannot be written.
        """
        trt = packages.load(self.package)
        gpu, reason = find_gpu(options.device)
        if gpu is None and not self.builds_on_cpu:
            raise EnvironmentProblem(f"{self.name} cannot build here: {reason}", remedy=_NO_GPU)
        with bound_device(options.device) if gpu is not None else contextlib.nullcontext():
            plan = build_plan(trt, model, options, has_gpu=gpu is not None)
        write_bytes(out, plan.data)
        doubted = self.int8_doubt and options.precision is Precision.INT8 and plan.layers_source != INSPECTOR
        return BuildResult(
            layers=plan.layers,
            layers_source=plan.layers_source,
            platform=self._platform(gpu, options.tuning),
            notes=(*plan.notes, self.int8_doubt) if doubted else plan.notes,
            layer_types=plan.layer_types,
            gpu_layers=plan.gpu_layers,
        )

    def inspect_layers(
        self, engine: Path, record: EngineRecord, device: int = 0
    ) -> tuple[tuple[EngineLayer, ...], str | None]:
        """Return the layers with TensorRT's own times of them, and the engine inspector's report.

        Raises:
            ArtefactError: Not the engine of this record, built by another version or for another device.
            EnvironmentProblem: No GPU, no driver, a missing package.
        """
        # Without a graph, which would tell no times.
        plain = RunnerOptions(
            slots=1, graph=False, memory="device", batch=record.batch.smallest, device=device
        )
        with self.open_runner(engine, record, plain) as runner:
            return runner.inspect_layers(LAYER_RUNS)

    def open_runner(
        self, engine: Path, record: EngineRecord, options: RunnerOptions = DEFAULT_OPTIONS
    ) -> TrtRunner:
        """Load an engine, its content held against its record.

        Raises:
            ArtefactError: Not the engine of this record, built by another version or for another device.
            EnvironmentProblem: No GPU, no driver, a missing package.
        """
        version = self.availability().version
        if version is None:
            packages.load(self.package)
        gpu, reason = find_gpu(options.device)
        here = {"version": version or "unknown", **self._platform(gpu, record.tuning)}
        _check_origin(record, {"version": record.runtime_version, **record.platform}, here, options.device)
        if gpu is None:
            raise EnvironmentProblem(f"{self.name} cannot run here: {reason}", remedy=_NO_GPU)
        trt, cuda = packages.load(self.package), packages.load("pycuda.driver")
        stored = StoredEngine(read_engine(engine, record), record, engine, gpu)
        return TrtRunner(trt, cuda, stored, options)

    def _platform(self, gpu: Gpu | None, tuning: Tuning) -> dict[str, str]:
        """What an engine is tied to."""
        facts = {"package": self.package, "machine": platform.machine()}
        if self.portable_to:
            return {**facts, "hardware_compatibility": self.portable_to}
        portable = tuning.hardware_compatible
        facts |= {"system": platform.system(), "hardware_compatibility": _AMPERE_PLUS if portable else "none"}
        if gpu is None or portable:
            return facts
        return facts | gpu.facts()


TENSORRT = TensorRtRuntime(
    name="tensorrt",
    package="tensorrt",
    distributions=("tensorrt",),
    builds_on_cpu=False,
    portable_to="",
)
TENSORRT_RTX = TensorRtRuntime(
    name="tensorrt-rtx",
    package="tensorrt_rtx",
    distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    builds_on_cpu=True,
    portable_to=RTX_GPUS,
    int8_doubt=RTX_INT8,
)


def _check_origin(
    record: EngineRecord, there: Mapping[str, str], here: Mapping[str, str], device: int
) -> None:
    """Hold where an engine was built against this machine, in what both sides name.

    What an engine is portable to is no such fact: it says which of the others count.
    """
    differences = [
        f"{key} {there[key]} there, {here[key]} here"
        for key in there
        if key in here
        and key != "hardware_compatibility"
        and not _same(key, there[key], here[key])
        and not (key == "version" and record.tuning.version_compatible and _loads(there[key], here[key]))
    ]
    if differences:
        choice = f" --device {device}" if device else ""
        raise ArtefactError(
            f"{record.engine} was built elsewhere: {'; '.join(differences)}",
            remedy=f"rebuild it here: {record.build_command.removesuffix(choice)}{choice}",
        )


def _same(key: str, there: str, here: str) -> bool:
    """Compare a fact of two platforms, by what matters of it.

    8.6.1 and 8.6.1.post1 are the same library; what the system keeps of a module's memory changes with its release,
    and JetPack 6.2 calls the same board "Super".
    """
    if key == "version":
        return packages.parse_version(there) == packages.parse_version(here)
    if key == "memory":
        less, more = sorted(sum(packages.parse_version(text)[:1]) for text in (there, here))
        return less >= _SAME_MEMORY * more
    return there.removesuffix(" Super") == here.removesuffix(" Super")


def _loads(there: str, here: str) -> bool:
    """Whether a release loads a version-compatible engine of an earlier one: of its series, or of that before."""
    built, loading = packages.parse_version(there), packages.parse_version(here)
    return built <= loading and (built[0], loading[0]) in {(8, 8), (8, 10), (10, 10), (10, 11), (11, 11)}
