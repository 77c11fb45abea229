"""What an accuracy gate found: one engine's answers against a reference's on the same labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """A figure of the reference and of the engine, with a paired interval of their difference.

    Attributes:
        reference: The reference's figure, 0..1.
        candidate: The engine's, 0..1.
        low: Lower end of the 95 % interval of candidate - reference.
        high: Its upper end.
    """

    reference: float
    candidate: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """Candidate - reference: negative where the engine is worse."""
        return self.candidate - self.reference


@dataclass(frozen=True)
class Flip:
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


@dataclass(frozen=True, kw_only=True)
class Agreement:
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
    images: int
    same_top1: int
    accuracy: Change
    macro_f1: Change
    lost: int
    won: int
    mcnemar_p: float
    reference_calibration_error: float
    candidate_calibration_error: float
    largest_difference: float
    flipped: tuple[Flip, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**asdict(self), "flipped": [asdict(flip) for flip in self.flipped]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Agreement:
        """Rebuild from JSON values.

        Raises:
            KeyError, TypeError: A field is missing or unknown.
        """
        return cls(
            **{
                **values,
                "accuracy": Change(**values["accuracy"]),
                "macro_f1": Change(**values["macro_f1"]),
                "flipped": tuple(Flip(**flip) for flip in values["flipped"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Validation:
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
    max_drop: float
    skipped: int
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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**vars(self), "agreement": self.agreement.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Validation:
        """Rebuild from JSON values.

        Raises:
            KeyError, TypeError: A field is missing or unknown.
        """
        return cls(**{**values, "agreement": Agreement.from_dict(values["agreement"])})
