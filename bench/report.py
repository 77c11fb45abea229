"""The latency report: every sample, packed, with all that was known of the machine, as an object and as JSON."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from bench.plan import Plan
from engines.errors import ArtefactError, UsageError
from engines.files import DocumentKind

Samples = NDArray[np.int64]  # latencies in nanoseconds, [calls]
_BYTES = 8
_LARGEST = 1 << 30  # bytes that one block may unpack to
_LONGEST_NS = 10**16  # sums of many still fit into 64 bits
_ASCENDING = "ascending:"  # then the differences are packed, from 0 on


def as_samples(values: Iterable[int]) -> Samples:
    """Return latencies in nanoseconds as ``int64 [n]``.

    Raises:
        ValueError: No value, or one that is no whole number, negative or too large.
    """
    numbers = list(values)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"sample {number!r} is not a whole number of nanoseconds")
    try:
        samples = np.array(numbers, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"a sample is too large: {error}") from error
    return checked(samples)


def checked(samples: Samples) -> Samples:
    """Return the samples themselves.

    Raises:
        ValueError: There are none, or one is negative or longer than 115 days.
    """
    if not len(samples):
        raise ValueError("there are no samples")
    smallest, largest = np.min(samples), np.max(samples)
    if smallest < 0:
        raise ValueError(f"sample {smallest} is negative")
    if largest > _LONGEST_NS:
        raise ValueError(f"a sample is too large: {largest} ns")
    return samples


def rounded_samples(samples: Samples, bits: int) -> Samples:
    """Return samples in ascending order, each rounded to so many significant bits.

    With 12 bits the error is at most one part in 4,096.
    """
    values = np.sort(samples)
    _, exponents = np.frexp(values.astype(np.float64))
    steps = np.int64(1) << np.maximum(0, exponents - bits).astype(np.int64)
    rounded: Samples = (values + steps // 2) // steps * steps
    return rounded


def encode_samples(samples: Samples) -> str:
    """Pack samples: little-endian int64, sorted into byte planes (all lowest bytes first), zlib, base64.

    The upper planes are nearly constant and vanish; exactness costs about three characters a sample. Samples in
    ascending order are packed as differences, with the word ``ascending:`` before them.
    """
    values, mark = samples, ""
    differences = np.diff(values, prepend=np.int64(0))
    if differences.min() >= 0:
        values, mark = differences, _ASCENDING
    data = values.astype("<i8", casting="safe").tobytes()
    planes = b"".join(data[plane::_BYTES] for plane in range(_BYTES))
    return mark + base64.b64encode(zlib.compress(planes, 6)).decode("ascii")


def decode_samples(packed: object) -> Samples:
    """Undo :func:`encode_samples`; a plain list of whole numbers is accepted too.

    Raises:
        ValueError: Neither of the two, damaged, empty or with a negative sample.
    """
    if isinstance(packed, list):
        return as_samples(packed)
    if not isinstance(packed, str):
        raise ValueError(f"samples are {type(packed).__name__}, not packed text or a list")
    values = _unpack(packed.removeprefix(_ASCENDING))
    if packed.startswith(_ASCENDING):
        if len(values) and values.min() < 0:
            raise ValueError("the packed samples are damaged: they descend")
        values = values.cumsum()
    return checked(values)


def _unpack(text: str) -> Samples:
    try:
        unpack = zlib.decompressobj()
        planes = unpack.decompress(base64.b64decode(text, validate=True), _LARGEST)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the packed samples are damaged: {error}") from error
    count, rest = divmod(len(planes), _BYTES)
    if rest or not unpack.eof:
        raise ValueError("the packed samples are cut short")
    columns = np.frombuffer(planes, dtype=np.uint8).reshape(_BYTES, count)
    samples = np.ascontiguousarray(columns.T).view("<i8").reshape(count).astype(np.int64)
    return samples


MOST_EXACT = 1_000_000  # samples of one report that are kept to the nanosecond: about 3.5 MB
SIGNIFICANT_BITS = 12  # an error of one part in 4,096 at most, a hundredth of the margin that a verdict needs


class BlockSamples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The latencies of one block.

    Attributes:
        opening: Which opening of its subject it is of, from 0 on; in one opening all subjects are opened anew.
        round: The round it was measured in; blocks of one round stand close in time and are compared in pairs.
        start_ns: When its first turn began, nanoseconds since the first block of the report.
        samples_ns: Latency of each call in nanoseconds, ``int64 [calls]``, in the order of the calls, all its turns.
        turns_ns: Median latency of each turn in nanoseconds, ``int64 [turns]``, 0 where a turn has no sample. Turn i of
            one subject stands beside turn i of the others of the round. None where that is not known.
        refused: Samples that were left out because the clock jumped backwards in them.
        stages_ns: Stage such as ``h2d`` -> its median time in nanoseconds, of calls beside the samples or of the
            same ones; empty where the runtime does not report stages.
        dropped: Requests that arrived at a fixed rate and were dropped because a newer one had come.

    Raises:
        ValueError: No sample or a negative one, or a number that cannot be.
    """

    opening: int
    round: int
    start_ns: int
    samples_ns: Samples
    turns_ns: Samples | None = None
    refused: int = 0
    stages_ns: Mapping[str, float] = msgspec.field(default_factory=dict)
    dropped: int = 0

    def __post_init__(self) -> None:
        """Check the samples and the numbers."""
        checked(self.samples_ns)
        if self.turns_ns is not None:
            checked(self.turns_ns)
        for name in ("opening", "round", "refused", "dropped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}")
        for stage, nanoseconds in self.stages_ns.items():
            if not 0 <= nanoseconds < float("inf"):
                raise ValueError(f"stage {stage!r} took {nanoseconds!r} ns")

    def __eq__(self, other: object) -> bool:
        """Compare by value; arrays alone would answer with an array."""
        return isinstance(other, BlockSamples) and self._values() == other._values()

    def _values(self) -> dict[str, Any]:
        turns = None if self.turns_ns is None else self.turns_ns.tolist()
        return {**msgspec.structs.asdict(self), "samples_ns": self.samples_ns.tolist(), "turns_ns": turns}

    @cached_property
    def median_ns(self) -> float:
        """Median of the samples, nanoseconds."""
        return float(np.median(self.samples_ns))


class WarmUp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the warm-up of a subject was like.

    Attributes:
        seconds: How long it took.
        calls: How many calls it made.
        stable: Whether the block median had come to rest when it ended.
    """

    seconds: float = 0.0
    calls: int = 0
    stable: bool = False


class Storage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the samples of a report are kept.

    Attributes:
        in_order: Whether each block has its samples in the order of the calls; else they ascend.
        significant_bits: What each sample is rounded to; None where every nanosecond is kept.
    """

    in_order: bool = True
    significant_bits: int | None = None


class SubjectReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """What was measured of one subject.

    Attributes:
        name: Its name, unique in the report.
        description: What it is: JSON values such as precision, runtime, batch, threads, hashes, switches.
        blocks: Its blocks in the order of measuring; empty where it failed at once.
        warmup: The warm-up of its first opening.
        refused: Samples refused because the clock jumped backwards, those of dropped blocks included.
        error: Why it was not measured to the end, or None.
        control_of: The subject that this one is, opened and measured a second time; None for all others.
        passes: What passes of their own found, as JSON values by name: ``power``, ``memory``, ``limits``.
    """

    name: str
    description: Mapping[str, Any]
    blocks: tuple[BlockSamples, ...]
    warmup: WarmUp = msgspec.field(default_factory=WarmUp)
    refused: int = 0
    error: str | None = None
    control_of: str | None = None
    passes: Mapping[str, Any] = msgspec.field(default_factory=dict)

    @property
    def samples_ns(self) -> Samples:
        """All samples in the order of measuring, ``int64 [calls]``, nanoseconds."""
        return np.concatenate([np.empty(0, np.int64), *(block.samples_ns for block in self.blocks)])

    @cached_property
    def ordered_ns(self) -> Samples:
        """All samples ascending, ``int64 [calls]``, nanoseconds: sorted once, every statistic asks for it."""
        return np.sort(self.samples_ns)


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A latency report.

    Attributes:
        created: UTC time of the start, ISO 8601.
        interrupted: Whether the user stopped it; what was measured until then is here.
        plan: How it was measured.
        storage: How the samples are kept.
        states: What the machine did: :func:`bench.machine.read_state` after each round, with ``at_ns``,
            nanoseconds since the first block.
        environment: Where: the machine at the start.
        environment_end: The machine at the end.
        subjects: What was measured, in the order that the subjects were given in.
    """

    created: str
    interrupted: bool = False
    plan: Plan
    storage: Storage = msgspec.field(default_factory=Storage)
    states: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, Any]
    environment_end: Mapping[str, Any]
    subjects: tuple[SubjectReport, ...]

    @property
    def measured(self) -> tuple[SubjectReport, ...]:
        """The subjects that have samples, controls left out."""
        return tuple(subject for subject in self.subjects if subject.blocks and subject.control_of is None)

    @property
    def controls(self) -> tuple[SubjectReport, ...]:
        """The subjects that are another one, measured a second time, and have samples."""
        return tuple(
            subject for subject in self.subjects if subject.blocks and subject.control_of is not None
        )

    @property
    def failed(self) -> tuple[SubjectReport, ...]:
        """The subjects that ended in an error."""
        return tuple(subject for subject in self.subjects if subject.error is not None)


_Positive: TypeAlias = Annotated[float, Meta(gt=0)]


class _State(TypedDict, total=False):
    """What is computed with of :attr:`Report.states`; a state may hold more, and so may the others here."""

    at_ns: int
    cpu_mhz: float | None
    gpu_mhz: float | None
    hottest_c: float | None
    throttle_events: int | None
    cooling: list[str]
    ran_ns: int | None
    waited_ns: int | None


class _Description(TypedDict, total=False):
    batch: Annotated[int, Meta(ge=1)]


class _Limits(TypedDict):
    multiply_adds: _Positive
    multiply_adds_per_s: _Positive
    bytes: _Positive
    bytes_per_s: _Positive


class _Power(TypedDict):
    rail: str
    idle_w: float
    busy_w: float
    joules: float
    calls: int
    seconds: _Positive


class _Memory(TypedDict, total=False):
    error: str
    host_peak_bytes: int | None
    host_before_bytes: int | None
    device_bytes: int | None


class _Passes(TypedDict, total=False):
    limits: _Limits | None
    power: list[_Power]
    memory: _Memory | None


class _OpenFields(TypedDict):
    """The fields that are open to what other versions add."""

    states: list[_State]
    descriptions: list[_Description]
    passes: list[_Passes]


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Version 1 kept every sample as it was, and knew no controls; what else came later has a default."""
    return {**body, "storage": {"in_order": True, "significant_bits": None}, "states": []}


def _from_version_2(body: dict[str, Any]) -> dict[str, Any]:
    """Version 2 opened every subject once, controls not at all: they were the same session; a block was one turn."""
    subjects = [
        {**subject, "blocks": [{**block, "opening": 0} for block in subject["blocks"]]}
        for subject in body["subjects"]
    ]
    return {**body, "plan": {**body["plan"], "openings": 1, "turn_seconds": None}, "subjects": subjects}


def _from_version_3(body: dict[str, Any]) -> dict[str, Any]:
    """Version 3 measured in turns, but did not keep which samples were of which."""
    return body


def _encode(value: object) -> object:
    if isinstance(value, np.ndarray):
        return encode_samples(value)
    raise TypeError(f"a latency report cannot hold a {type(value).__name__}")


REPORT = DocumentKind(
    name="edge-dsc/latency-report",
    # 2: controls, storage, stages. 3: openings, turns. 4: medians of turns. bench/latency-report.schema.json
    # describes it.
    version=4,
    body=Report,
    renew="edge-dsc bench ENGINE...",
    seal="report_sha256",
    older={1: _from_version_1, 2: _from_version_2, 3: _from_version_3},
    encode=_encode,
    decode=lambda _type, packed: decode_samples(packed),
)


def save_report(path: Path, report: Report) -> None:
    """Write a report, its samples packed, sealed with a hash of its own content.

    Raises:
        EnvironmentProblem: The place cannot be written.
    """
    REPORT.save(path, report)


def load_report(path: Path) -> Report:
    """Read a report and check its seal, every field and every sample.

    Raises:
        ArtefactError: Missing, truncated, edited, foreign, of a later version, or with impossible values.
    """
    try:
        report = REPORT.load(path)
        open_fields = {
            "states": report.states,
            "descriptions": [subject.description for subject in report.subjects],
            "passes": [subject.passes for subject in report.subjects],
        }
        msgspec.convert(open_fields, _OpenFields, strict=True)
        problem = _contradiction(report)
    except UsageError as error:  # the plan's
        problem = error.what
    except msgspec.ValidationError as error:
        problem = str(error)
    if problem is not None:
        raise ArtefactError(
            f"{path} is no readable {REPORT.name}: {problem}", remedy=f"make it again: {REPORT.renew}"
        )
    return report


def _contradiction(report: Report) -> str | None:
    """Say what fields of a report cannot stand together, or None."""
    names = [subject.name for subject in report.subjects]
    if len(set(names)) != len(names):
        return "two subjects have the same name"
    for control in report.controls:
        if control.control_of not in names:
            return f"{control.name!r} controls {control.control_of!r}, which is not there"
    return None if report.measured or report.failed else "it holds no measured subject"


def compact_report(report: Report, *, most_exact: int = MOST_EXACT) -> Report:
    """Return the report itself, or, where it has too many samples, one with rounded samples in ascending order.

    No sample is dropped and no block is merged, so medians, tails, ratios and their intervals are those of the
    exact report within the rounding. What is lost is the order of the calls within a block.

    Args:
        report: The report.
        most_exact: The largest number of samples that stay as they are.
    """
    if sum(len(block.samples_ns) for subject in report.subjects for block in subject.blocks) <= most_exact:
        return report
    subjects = [
        msgspec.structs.replace(subject, blocks=tuple(map(_compact_block, subject.blocks)))
        for subject in report.subjects
    ]
    storage = Storage(in_order=False, significant_bits=SIGNIFICANT_BITS)
    return msgspec.structs.replace(report, subjects=tuple(subjects), storage=storage)


def _compact_block(block: BlockSamples) -> BlockSamples:
    return msgspec.structs.replace(block, samples_ns=rounded_samples(block.samples_ns, SIGNIFICANT_BITS))
