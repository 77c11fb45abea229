"""The latency report: raw samples with all that was known of the machine, as an object and as JSON."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.plan import Plan
from bench.samples import checked, decode_samples, encode_samples, rounded_samples
from engines.errors import ArtefactError, EdgeDscError
from engines.files import read_sealed_document, write_sealed_document

if TYPE_CHECKING:
    from bench.samples import Samples


KIND = "edge-dsc/latency-report"
SCHEMA_VERSION = 2  # 2: controls, storage, stages
_SEAL = "report_sha256"
_MEASURE = "edge-dsc bench ENGINE..."


@dataclass(frozen=True, kw_only=True)
class BlockSamples:
    """The latencies of one block.

    Attributes:
        round: The round it was measured in; blocks of one round stand close in time and are compared in pairs.
        start_ns: When it began, nanoseconds since the first block of the report.
        samples_ns: Latency of each call in nanoseconds, ``int64 [calls]``, in the order of the calls.
        refused: Samples that were left out because the clock jumped backwards in them.
        stages_ns: Stage such as ``h2d`` -> its median time in nanoseconds, of calls beside the samples or of the
            same ones; empty where nothing tells stages.
        dropped: Requests that arrived at a fixed rate and were dropped because a newer one had come.
    """

    round: int
    start_ns: int
    samples_ns: Samples
    refused: int = 0
    stages_ns: Mapping[str, float] = field(default_factory=dict)
    dropped: int = 0

    def __post_init__(self) -> None:
        """Check the samples.

        Raises:
            ValueError: None, or a negative one, or a number that cannot be.
        """
        checked(self.samples_ns)
        if self.round < 0 or self.refused < 0 or self.dropped < 0:
            raise ValueError(f"round {self.round} with {self.refused} refused samples cannot be")
        for stage, value in self.stages_ns.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"stage {stage!r} took {value!r} ns")

    @cached_property
    def median_ns(self) -> float:
        """Median of the samples, nanoseconds."""
        return float(np.median(np.frombuffer(self.samples_ns, dtype=np.int64)))


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What the warm-up of a subject was like.

    Attributes:
        seconds: How long it took.
        calls: How many calls it made.
        stable: Whether the block median had come to rest when it ended.
    """

    seconds: float = 0.0
    calls: int = 0
    stable: bool = False


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the samples of a report are kept.

    Attributes:
        in_order: Whether each block has its samples in the order of the calls; else they ascend.
        significant_bits: What each sample is rounded to; None where every nanosecond is kept.
    """

    in_order: bool = True
    significant_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class SubjectReport:
    """What was measured of one subject.

    Attributes:
        name: Its name, unique in the report.
        description: What it is: JSON values such as precision, runtime, batch, threads, hashes, switches.
        blocks: Its blocks in the order of measuring; empty where it failed at once.
        warmup: Its warm-up.
        refused: Samples refused because the clock jumped backwards, those of dropped blocks included.
        error: Why it was not measured to the end, or None.
        passes: What passes of their own found, as JSON values by name: ``power``, ``memory``, ``limits``.
        control_of: The subject that this one is, measured a second time; None for all others.
    """

    name: str
    description: Mapping[str, Any]
    blocks: tuple[BlockSamples, ...]
    warmup: WarmUp = field(default_factory=WarmUp)
    refused: int = 0
    error: str | None = None
    control_of: str | None = None
    passes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples_ns(self) -> Samples:
        """All samples in the order of measuring, ``int64 [calls]``, nanoseconds."""
        joined = array("q")
        for block in self.blocks:
            joined.extend(block.samples_ns)
        return joined

    @cached_property
    def ordered_ns(self) -> Any:
        """All samples ascending, ``int64 [calls]``, nanoseconds: sorted once, every statistic asks for it."""
        return np.sort(np.frombuffer(self.samples_ns, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Report:
    """A latency report.

    Attributes:
        subjects: What was measured, in the order that the subjects were given in.
        plan: How.
        environment: Where: the machine at the start.
        environment_end: The machine at the end.
        created: UTC time of the start, ISO 8601.
        interrupted: Whether the user stopped it; what was measured until then is here.
        storage: How the samples are kept.
        states: What the machine did: :func:`bench.machine.read_state` after each round, with ``at_ns``,
            nanoseconds since the first block.
        schema_version: Version of this description.
    """

    subjects: tuple[SubjectReport, ...]
    plan: Plan
    environment: Mapping[str, Any]
    environment_end: Mapping[str, Any]
    created: str
    interrupted: bool = False
    storage: Storage = field(default_factory=Storage)
    states: tuple[Mapping[str, Any], ...] = ()
    schema_version: int = SCHEMA_VERSION

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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, samples packed by :func:`bench.samples.encode_samples`."""
        return {
            "created": self.created,
            "interrupted": self.interrupted,
            "plan": self.plan.to_dict(),
            "storage": dict(vars(self.storage)),
            "states": [dict(state) for state in self.states],
            "environment": dict(self.environment),
            "environment_end": dict(self.environment_end),
            "subjects": [_subject_to_dict(subject) for subject in self.subjects],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> Report:
        """Rebuild a report from JSON values.

        Raises:
            ArtefactError: A field is missing or of the wrong type; samples are empty, negative or no numbers.
        """
        try:
            report = cls(
                subjects=tuple(_subject_from_dict(subject) for subject in values["subjects"]),
                plan=Plan(**values["plan"]),
                environment=dict(values["environment"]),
                environment_end=dict(values["environment_end"]),
                created=str(values["created"]),
                interrupted=bool(values["interrupted"]),
                storage=Storage(**values["storage"]),
                states=tuple(dict(state) for state in values["states"]),
            )
        except KeyError as error:
            raise _unreadable(source, f"{error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise _unreadable(source, str(error)) from error
        except EdgeDscError as error:
            raise _unreadable(source, error.what) from error
        names = [subject.name for subject in report.subjects]
        if len(set(names)) != len(names):
            raise _unreadable(source, "two subjects have the same name")
        for control in report.controls:
            if control.control_of not in names:
                raise _unreadable(
                    source, f"{control.name!r} controls {control.control_of!r}, which is not there"
                )
        if not report.measured and not report.failed:
            raise _unreadable(source, "it holds no measured subject")
        return report


def save_report(path: Path, report: Report) -> None:
    """Write a report, sealed with a hash of its own content.

    Raises:
        EnvironmentProblem: The place cannot be written.
    """
    write_sealed_document(path, KIND, SCHEMA_VERSION, report.to_dict(), seal=_SEAL)


def load_report(path: Path) -> Report:
    """Read a report and check its seal and every sample.

    Raises:
        ArtefactError: Missing, truncated, edited, foreign, of a future version, or with impossible samples.
    """
    body = read_sealed_document(
        path, KIND, SCHEMA_VERSION, seal=_SEAL, renew=_MEASURE, older={1: _from_version_1}
    )
    return Report.from_dict(body, source=str(path))


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Version 1 kept every sample as it was, and knew no controls."""
    return {**body, "storage": dict(vars(Storage())), "states": []}


def _unreadable(source: str, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{source} is no readable latency report: {reason}", remedy=f"measure again: {_MEASURE}"
    )


def _subject_to_dict(subject: SubjectReport) -> dict[str, Any]:
    blocks = [
        {
            **_field_values(block),
            "samples_ns": encode_samples(block.samples_ns),
            "stages_ns": dict(block.stages_ns),
        }
        for block in subject.blocks
    ]
    return {
        **_field_values(subject),
        "description": dict(subject.description),
        "passes": dict(subject.passes),
        "warmup": dict(vars(subject.warmup)),
        "blocks": blocks,
    }


def _subject_from_dict(values: Mapping[str, Any]) -> SubjectReport:
    name = str(values["name"])
    try:
        blocks = tuple(
            BlockSamples(**{**block, "samples_ns": decode_samples(block["samples_ns"])})
            for block in values["blocks"]
        )
        warmup = WarmUp(**values["warmup"])
        return SubjectReport(**{**values, "name": name, "blocks": blocks, "warmup": warmup})
    except (TypeError, ValueError) as error:
        raise ValueError(f"subject {name!r}: {error}") from error


def _field_values(instance: BlockSamples | SubjectReport) -> dict[str, Any]:
    """Return the fields alone, without what was derived from them and kept."""
    return {known.name: getattr(instance, known.name) for known in fields(instance)}


MOST_EXACT = 1_000_000  # samples of one report that are kept to the nanosecond: about 3.5 MB
SIGNIFICANT_BITS = 12  # an error of one part in 4,096 at most, a hundredth of the margin that a verdict needs


def compact_report(report: Report, *, most_exact: int = MOST_EXACT) -> Report:
    """Return the report itself, or, where it has too many samples, one with rounded samples in ascending order.

    No sample is dropped and no block is merged, so medians, tails, ratios and their intervals are those of the
    exact report within the rounding. What is lost is the order of the calls within a block.

    Args:
        report: The report.
        most_exact: The largest number of samples that stay as they are.
    """
    blocks = [block for subject in report.subjects for block in subject.blocks]
    if sum(len(block.samples_ns) for block in blocks) <= most_exact:
        return report
    return replace(
        report,
        subjects=tuple(_compact_subject(subject) for subject in report.subjects),
        storage=Storage(in_order=False, significant_bits=SIGNIFICANT_BITS),
    )


def _compact_subject(subject: SubjectReport) -> SubjectReport:
    return replace(
        subject,
        blocks=tuple(
            replace(block, samples_ns=rounded_samples(block.samples_ns, SIGNIFICANT_BITS))
            for block in subject.blocks
        ),
    )
