"""The engine record: what an engine is, beside the engine, checked before anything is deserialised."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from engines.contract import (
    LARGEST_MODEL,
    Count,
    ModelContract,
    Name,
    PathName,
    Seconds,
    Sha256,
    Text,
    upgrade_contract,
)
from engines.errors import ArtefactError
from engines.files import DocumentKind, sha256_bytes, sha256_file

SUFFIX = ".json"  # model.engine -> model.engine.json
DEFAULT_WORKSPACE_MIB = 1024
_BUILD = "edge-dsc build-engine MODEL.onnx"
_REBUILD = f"build the engine again: {_BUILD}"

# Figures between -1 and 1, with what rounding adds.
_Share: TypeAlias = Annotated[float, Meta(ge=-1.001, le=1.001)]
_Batch: TypeAlias = Annotated[int, Meta(ge=1, le=65536)]
_FileName: TypeAlias = Annotated[str, Meta(max_length=255, pattern=r"\A[^/\x00]+\Z")]
_FilePath: TypeAlias = Annotated[str, Meta(max_length=4096, pattern=r"\A[^\x00]+\Z")]
_Command: TypeAlias = Annotated[str, Meta(max_length=32768)]


class Precision(str, enum.Enum):
    """The element type that an engine's convolutions run in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"  # of an FP32 graph: the range of FP32, 8 bits of its mantissa
    INT8 = "int8"
    MIXED = "mixed"  # some layers in INT8, some in float, as a search found best


class BatchRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Smallest, best and largest batch that an engine takes.

    Raises:
        ValueError: Not ``1 <= smallest <= best <= largest``.
    """

    smallest: _Batch = 1
    best: _Batch = 1
    largest: _Batch = 1

    def __post_init__(self) -> None:
        """Check the order."""
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ValueError(f"batch {self} is not 1 <= MIN <= OPT <= MAX")

    def __str__(self) -> str:
        """As the command line takes it: ``1:8:32``."""
        return f"{self.smallest}:{self.best}:{self.largest}"


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure of the reference and of the engine, with a paired interval of their difference.

    Attributes:
        reference: The reference's figure, 0..1.
        candidate: The engine's, 0..1.
        low: Lower end of the 95 % interval of candidate - reference.
        high: Its upper end.
    """

    reference: _Share
    candidate: _Share
    low: _Share
    high: _Share

    @property
    def difference(self) -> float:
        """Candidate - reference: negative where the engine is worse."""
        return self.candidate - self.reference


class Flip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image whose most probable class differs.

    Attributes:
        path: The image.
        label: Its true class.
        reference: The class that the reference gives it.
        candidate: The class that the engine gives it.
    """

    path: str
    label: str
    reference: str
    candidate: str


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one engine's answers differ from a reference's on the same images.

    Attributes:
        reference: What the reference is.
        images: Images that both answered.
        same_top1: Of these, how many got the same most probable class.
        accuracy: Of both.
        macro_f1: Of both.
        lost: Images that the reference has right and the engine wrong.
        won: Images that the engine has right and the reference wrong.
        mcnemar_p: Two-sided p of McNemar's exact test on ``lost`` and ``won``.
        reference_calibration_error: Expected calibration error of the reference, 0..1.
        candidate_calibration_error: Of the engine.
        largest_difference: Largest absolute difference of any probability.
        flipped: The images whose top class differs.
    """

    reference: str
    images: Annotated[int, Meta(ge=1, le=1 << 40)]
    same_top1: Count
    accuracy: Change
    macro_f1: Change
    lost: Count
    won: Count
    mcnemar_p: _Share
    reference_calibration_error: _Share
    candidate_calibration_error: _Share
    largest_difference: _Share
    flipped: tuple[Flip, ...]


class Validation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An accuracy gate that an engine went through; part of its record.

    Attributes:
        images: Which images: where they lie, and why these.
        images_sha256: Hash of the sorted hashes of their files.
        answered_by: Who gave the engine's answers: the engine itself, or its graph on ONNX Runtime.
        max_drop: The budget: most that accuracy may fall, percentage points.
        skipped: Images that could not be read.
        agreement: The engine against the FP32 model.
    """

    images: str
    images_sha256: str
    answered_by: str
    max_drop: Annotated[float, Meta(ge=0, le=100)]
    skipped: Count
    agreement: Agreement

    @property
    def drop(self) -> float:
        """How far accuracy fell, percentage points; negative where it rose."""
        return 0.0 - 100 * self.agreement.accuracy.difference

    @property
    def passed(self) -> bool:
        """Whether the drop is within the budget."""
        # Shares of whole images: what lies beyond the budget by less than a millionth is rounding.
        return self.drop <= self.max_drop + 1e-6


class Tuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a builder was told beside precision, batch and memory; None and False leave it to the runtime.

    Attributes:
        optimization_level: 0 (a quick build) to 5 (a long search for kernels).
        max_aux_streams: Streams that the engine may use beside its caller's.
        version_compatible: The engine loads in later releases of the runtime too.
        hardware_compatible: It runs on all GPUs of compute capability 8.0 and later.
        dla: Core of the Deep Learning Accelerator that runs what it can; the GPU runs the rest.
    """

    optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    max_aux_streams: Annotated[int, Meta(ge=0, le=64)] | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla: Annotated[int, Meta(ge=0, le=15)] | None = None


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that must be known about an engine before it is loaded.

    Attributes:
        engine: File name of the engine, without folders.
        engine_sha256: Hash of the engine file.
        engine_bytes: Size of the engine file.
        runtime: Name in the runtimes' table.
        runtime_version: Version of the runtime that built it.
        platform: What else the engine is tied to: operating system, architecture, GPU, compute capability.
        precision: What was asked for and proven.
        batch: The optimisation profile.
        contract: The model's contract.
        onnx: Path of the FP32 ONNX model, relative to the record's folder where it lies below or beside it.
        onnx_sha256: Hash of that model.
        calibration: Path of the calibration table, relative like ``onnx``; None without one, and in records of
            version 1, which did not keep it.
        calibration_sha256: Hash of the calibration table, for INT8.
        workspace_mib: Scratch memory that the builder was given, MiB.
        tuning: What else the builder was told.
        layers: Layers with weights (convolutions, dense) counted by the precision they run in,
            such as ``{"INT8": 7, "FP32": 2}``.
        layers_source: Where that count comes from.
        layer_types: The same by name, such as ``{"stem": "INT8"}``, in the order of the graph; empty where the
            runtime does not tell the layers apart, and in records of older versions.
        gpu_layers: Of an engine for the Deep Learning Accelerator: layers that run on the GPU, by TensorRT's names.
        weight_bits: Of the INT8 weights whose products are summed over channels: 7 where the processor that built it
            would not sum products of 8 exactly, else 8; None where no layer is in INT8.
        float_layers: Layers that were left in floating point on purpose, by name; for INT8 and mixed.
        validation: The accuracy gate that the engine went through, where one was asked for.
        notes: What the builder wants the reader to know, such as a CPU on which INT8 is slower.
        build_seconds: Time of the build.
        build_command: The command that builds it again.
        edge_dsc: Version of edge-dsc.
        created: UTC time, ISO 8601.
    """

    engine: _FileName
    engine_sha256: Sha256
    engine_bytes: Count
    runtime: PathName
    runtime_version: Text
    platform: Mapping[Text, Text]
    precision: Precision
    batch: BatchRange
    contract: ModelContract
    onnx: _FilePath
    onnx_sha256: Sha256
    calibration: _FilePath | None = None
    calibration_sha256: Sha256 | None
    workspace_mib: Annotated[int, Meta(ge=1, le=1 << 24)] = DEFAULT_WORKSPACE_MIB
    tuning: Tuning = Tuning()
    layers: Mapping[Text, Count]
    layers_source: Text
    build_seconds: Seconds
    build_command: _Command
    edge_dsc: Text
    created: Text
    notes: tuple[Text, ...] = ()
    layer_types: Mapping[Name, Text] = msgspec.field(default_factory=dict)
    gpu_layers: tuple[Name, ...] = ()
    weight_bits: Annotated[int, Meta(ge=7, le=8)] | None = None
    float_layers: tuple[Name, ...] = ()
    validation: Validation | None = None


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Fill in what version 1 gained under its own number, one release after the other, and what version 2 added."""
    later = {"calibration": None, "workspace_mib": DEFAULT_WORKSPACE_MIB}
    return {"layer_types": {}, "float_layers": [], "validation": None, **later, **body}


def _from_version_2(body: dict[str, Any]) -> dict[str, Any]:
    """Add what version 3 added."""
    return {"tuning": {}, **body}


def _from_version_3(body: dict[str, Any]) -> dict[str, Any]:
    """Add what version 4 added."""
    return {"gpu_layers": [], **body}


def _from_version_4(body: dict[str, Any]) -> dict[str, Any]:
    """Bring the contract to version 2, as version 5 has it."""
    return {**body, "contract": upgrade_contract(body["contract"])}


def _from_version_5(body: dict[str, Any]) -> dict[str, Any]:
    """Add what version 6 added; until then all INT8 weights had 8 bits."""
    return {"weight_bits": 8 if "INT8" in body["layers"] else None, **body}


RECORD = DocumentKind(
    name="edge-dsc/engine-record",
    version=6,
    body=EngineRecord,
    renew=_BUILD,
    seal="record_sha256",
    older={
        1: _from_version_1,
        2: _from_version_2,
        3: _from_version_3,
        4: _from_version_4,
        5: _from_version_5,
    },
)


def record_path(engine: Path) -> Path:
    """Return the path of the record that belongs to an engine."""
    return engine.with_name(engine.name + SUFFIX)


def save_record(engine: Path, record: EngineRecord) -> Path:
    """Write the record beside its engine, sealed with a hash of its own content, and return its path."""
    path = record_path(engine)
    RECORD.save(path, record)
    return path


def load_record(engine: Path) -> EngineRecord:
    """Read and check an engine's record, and the engine file against it, before anything is deserialised.

    Raises:
        ArtefactError: No engine, no record, or one that was edited; an engine that was renamed, truncated,
            replaced or is not of this record; an ONNX model that changed since the build.
    """
    record = peek_record(engine)
    _check_content(engine, record, sha256_file(engine))
    return record


def peek_record(engine: Path) -> EngineRecord:
    """Do all of :func:`load_record` but hash the engine: :func:`read_engine` does that to the bytes that it reads.

    Raises:
        ArtefactError: As :func:`load_record`.
    """
    if not engine.is_file():
        raise ArtefactError(f"there is no engine {engine}", remedy=_REBUILD)
    path = record_path(engine)
    if not path.is_file():
        raise ArtefactError(f"{engine} has no record beside it ({path.name})", remedy=_REBUILD)
    record = RECORD.load(path)
    record.contract.check(str(path))
    remedy = f"rebuild it: {record.build_command}"
    if record.engine != engine.name:
        raise ArtefactError(f"{engine} was renamed: its record is of {record.engine}", remedy=remedy)
    size = engine.stat().st_size
    if size != record.engine_bytes:
        raise ArtefactError(
            f"{engine} has {size} bytes, its record says {record.engine_bytes}", remedy=remedy
        )
    model = engine.parent / record.onnx
    if _changed(model, record.onnx_sha256):
        raise ArtefactError(f"{engine} is stale: {model} changed after the build", remedy=remedy)
    return record


def _changed(model: Path, sha256: str) -> bool:
    """Say whether a model that lies where a record says is another one; the engine travels without it."""
    try:
        size = model.stat().st_size
        # A model has at least a byte, and one of /proc may never end.
        return model.is_file() and not (0 < size <= LARGEST_MODEL and sha256_file(model) == sha256)
    except (OSError, ValueError):  # none there, or the place is no path of this system
        return False


def read_engine(engine: Path, record: EngineRecord) -> bytes:
    """Read an engine file once and hold the very bytes that will be loaded against its record.

    Raises:
        ArtefactError: The file cannot be read, or is not the engine of this record.
    """
    try:
        data = engine.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {engine}: {error.strerror}", remedy=_REBUILD) from error
    _check_content(engine, record, sha256_bytes(data))
    return data


def _check_content(engine: Path, record: EngineRecord, sha256: str) -> None:
    if sha256 != record.engine_sha256:
        raise ArtefactError(
            f"{engine} is not the engine of its record (SHA-256 differs)",
            remedy=f"rebuild it: {record.build_command}",
        )
