"""What a study's answers say: figures with intervals by patient, paired differences, and non-inferiority."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.evaluate.agreement import (
    Estimate,
    LabelledImages,
    Weights,
    beyond_all,
    bootstrap,
    compare_answers,
    divide,
    interval_of,
    resample_patients,
)
from edge_dsc.evaluate.confidence import weighted_auroc
from edge_dsc.evaluate.metrics import Metrics, classification_metrics
from engines.record import Change

YES, NO, OPEN = "yes", "no", "not decided"
_NORMAL = 1.959964  # of the two-sided 95 % interval
_POWER = 0.841621  # of a chance of 80 %
_LEAST_TRAININGS = 3  # fewer say nothing of how trainings differ


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One figure of several trainings.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation (n - 1); None of a single training.
        values: The figures, one for each training.
    """

    mean: float
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise figures, at least one."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, tuple(float(value) for value in values))


class ClassFindings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class of a network.

    Attributes:
        images: Rows of this class, those of all trainings together.
        recall: Share of them that got this class.
        auroc: Area under the receiver operating characteristic of this class against the rest, mean over the
            trainings; None where a training was judged on this class alone, or without it.
    """

    images: int
    recall: Estimate
    auroc: Estimate | None


class Quality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How right a network is, over all its trainings.

    Attributes:
        rows: Answers that were judged: an image counts once for each training that it judged.
        images: Different images among them.
        patients: Patients that they are of.
        accuracy: Of each training.
        pooled_accuracy: Over all rows, with its interval by patient.
        loss: Cross-entropy of each training, nats.
        precision: Macro mean over the classes, of each training.
        recall: The same.
        f1: The same.
        per_class: By class name.
    """

    rows: int
    images: int
    patients: int
    accuracy: Spread
    pooled_accuracy: Estimate
    loss: Spread
    precision: Spread
    recall: Spread
    f1: Spread
    per_class: Mapping[str, ClassFindings]


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two networks on the same images, training by training.

    Attributes:
        reference: The network that is held against.
        candidate: The network in question.
        rows: Pairs of answers.
        images: Different images among them.
        patients: Patients that they are of.
        accuracy: Of both over all pairs; the interval of the difference draws patients.
        macro_f1: The same.
        lost: Pairs in which only the reference is right.
        won: Pairs in which only the candidate is right.
        by_training: Difference of accuracy in each pair of trainings.
        over_trainings: The difference of accuracy with an interval that draws trainings as well as patients; None of
            fewer than three.
    """

    reference: str
    candidate: str
    rows: int
    images: int
    patients: int
    accuracy: Change
    macro_f1: Change
    lost: int
    won: int
    by_training: tuple[float, ...]
    over_trainings: Estimate | None


class NonInferiority(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a network is not inferior to another by more than a margin.

    Attributes:
        difference: What it is concluded from.
        margin: Percentage points of accuracy that may be lost.
        answer: ``yes``, ``no`` or ``not decided``.
        images_needed: Different images that would decide it; None where it is decided, or where none would.
        over_trainings: The answer of the interval that draws trainings too; None of fewer than three.
    """

    difference: Difference
    margin: float
    answer: str
    images_needed: int | None
    over_trainings: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What a network answered on the images that judge, one row for each training and image.

    Attributes:
        name: The network.
        labels: C class names.
        trainings: Seed or fold of each of N rows.
        images: Path of each row's image.
        patients: Its patient.
        true: Its class ``[N]``.
        probabilities: ``[N, C]``.
    """

    name: str
    labels: Sequence[str]
    trainings: NDArray[np.int64]
    images: Sequence[str]
    patients: Sequence[str]
    true: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def rows_by_training(self) -> list[NDArray[np.int64]]:
        """Return the rows of each training, in the order of seeds or folds."""
        return [np.flatnonzero(self.trainings == number) for number in np.unique(self.trainings)]


def measure_quality(judged: Judged, seed: int = 0) -> Quality:
    """Measure a network over all its trainings.

    Args:
        judged: Its answers, at least one.
        seed: Seed of the draws.
    """
    parts = judged.rows_by_training()
    metrics: list[Metrics] = [
        classification_metrics(judged.true[rows], judged.probabilities[rows], judged.labels) for rows in parts
    ]
    right = judged.probabilities.argmax(axis=1) == judged.true
    of_class = [judged.true == index for index in range(len(judged.labels))]
    present = [index for index, rows in enumerate(of_class) if rows.any()]
    recalls = [_share_of(right[rows], rows) for rows in of_class]
    curves = [_mean_auroc(judged, index, parts) for index in range(len(judged.labels))]
    found = bootstrap(
        lambda weights: np.stack(
            [
                _share_of(right, np.ones_like(right))(weights),
                *(recalls[index](weights) for index in present),
                *(curves[index](weights) for index in present),
            ]
        ),
        judged.patients,
        seed,
    )
    recall = dict(zip(present, found[1 : 1 + len(present)], strict=True))
    auroc = dict(zip(present, found[1 + len(present) :], strict=True))
    patients = np.asarray(judged.patients)
    have = {index: len(np.unique(patients[of_class[index]])) for index in present}
    lack = {index: len(np.unique(patients[~of_class[index]])) for index in present}
    return Quality(
        rows=len(right),
        images=len(set(judged.images)),
        patients=len(set(judged.patients)),
        accuracy=Spread.of([found.accuracy for found in metrics]),
        pooled_accuracy=beyond_all(found[0], len(set(judged.patients))),
        loss=Spread.of([found.loss for found in metrics]),
        precision=Spread.of([found.precision for found in metrics]),
        recall=Spread.of([found.recall for found in metrics]),
        f1=Spread.of([found.f1 for found in metrics]),
        per_class={
            judged.labels[index]: ClassFindings(
                images=int(of_class[index].sum()),
                recall=beyond_all(recall[index], have[index]),
                auroc=beyond_all(auroc[index], min(have[index], lack[index]))
                if math.isfinite(auroc[index].value)
                else None,
            )
            for index in present
        },
    )


def compare_judged(reference: Judged, candidate: Judged, seed: int = 0) -> Difference | None:
    """Hold a network against another on the images that both answered in trainings of the same seed or fold.

    Networks of one seed share their split, so that each image is a pair within a training; the pairs of all trainings
    are pooled, and intervals draw whole patients with all their pairs.

    Args:
        reference: Its answers.
        candidate: The other's, of the same classes.
        seed: Seed of the draws.

    Returns:
        None where they share nothing.
    """
    keys = {key: row for row, key in enumerate(zip(reference.trainings, reference.images, strict=True))}
    pairs = [
        (keys[key], row)
        for row, key in enumerate(zip(candidate.trainings, candidate.images, strict=True))
        if key in keys
    ]
    if not pairs:
        return None
    first, second = (np.array(rows) for rows in zip(*pairs, strict=True))
    paths, patients = ([names[row] for row in first] for names in (reference.images, reference.patients))
    images = LabelledImages(
        true=reference.true[first], labels=reference.labels, paths=paths, patients=patients
    )
    before, after = reference.probabilities[first], candidate.probabilities[second]
    found = compare_answers(images, before, after, name=reference.name, seed=seed)
    moved = (after.argmax(axis=1) == images.true).astype(float) - (before.argmax(axis=1) == images.true)
    trainings = reference.trainings[first]
    seen = {"lost": found.lost, "won": found.won, "patients": len(set(patients))}
    widened = _beyond_no_event(found.accuracy.low, found.accuracy.high, **seen)
    whole = _over_trainings(moved, patients, trainings, seed)
    return Difference(
        reference=reference.name,
        candidate=candidate.name,
        rows=len(pairs),
        images=len(set(paths)),
        patients=len(set(patients)),
        accuracy=Change(found.accuracy.reference, found.accuracy.candidate, *widened),
        macro_f1=found.macro_f1,
        lost=found.lost,
        won=found.won,
        by_training=tuple(float(moved[trainings == number].mean()) for number in np.unique(trainings)),
        over_trainings=whole and Estimate(whole.value, *_beyond_no_event(whole.low, whole.high, **seen)),
    )


def judge_noninferiority(difference: Difference, margin: float) -> NonInferiority:
    """Say whether the candidate loses no more than a margin: by the interval of the paired difference.

    ``yes`` where the whole 95 % interval lies above -margin, ``no`` where it lies below, else it is not decided: a
    one-sided test at 2.5 %. The images that would decide it are those whose interval would clear the margin with a
    chance of 80 %, were the observed difference the true one, and the observed discordance with its clustering in
    patients and trainings that of further images.

    Args:
        difference: The pairs.
        margin: Percentage points, above 0; to be chosen before the answers are known.

    Source:
        Piaggio and others, Reporting of noninferiority and equivalence randomized trials, JAMA 308 (2012), figure 1;
        Nam, Establishing equivalence of two treatments and sample size requirements in matched-pairs design,
        Biometrics 53 (1997), for the size: (z_0.975 + z_0.8)^2 variance / (difference + margin)^2.
    """
    change, limit = difference.accuracy, -margin / 100
    answer = _answer(change.low, change.high, limit)
    whole = difference.over_trainings
    return NonInferiority(
        difference=difference,
        margin=margin,
        answer=answer,
        images_needed=_images_needed(difference, limit) if answer == OPEN else None,
        over_trainings=_answer(whole.low, whole.high, limit) if whole else None,
    )


def _answer(low: float, high: float, limit: float) -> str:
    if low > limit:
        return YES
    return NO if high < limit else OPEN


def _images_needed(difference: Difference, limit: float) -> int | None:
    change = difference.accuracy
    gap = abs(change.difference - limit)
    if gap < 1e-9:
        return None  # the observed difference is the margin itself: no number of images would part them
    deviation = (change.high - change.low) / (2 * _NORMAL)
    return math.ceil(difference.images * (deviation * (_NORMAL + _POWER) / gap) ** 2)


def _beyond_no_event(low: float, high: float, *, lost: int, won: int, patients: int) -> tuple[float, float]:
    """Widen an interval that no loss, or no gain, stands behind: drawn again and again, nothing stays nothing.

    Source:
        Hanley and Lippman-Hand, JAMA 249 (1983): no event in n does not exclude a rate of 3/n at 95 %; n is the number
        of patients here.
    """
    unseen = min(1.0, 3 / patients)
    return low if lost else max(-1.0, low - unseen), high if won else min(1.0, high + unseen)


def _over_trainings(
    moved: NDArray[np.float64], patients: Sequence[str], trainings: NDArray[np.int64], seed: int
) -> Estimate | None:
    """Return the mean of a difference with an interval that draws patients and, independently, trainings.

    Source:
        Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007): both factors of a crossed design are
        drawn; its intervals are wide rather than narrow.
    """
    numbers, place = np.unique(trainings, return_inverse=True)
    count = len(numbers)
    if count < _LEAST_TRAININGS:
        return None
    rng = np.random.default_rng([seed, count])
    means = []
    for weights in resample_patients(patients, seed):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=len(weights))
        both = weights * drawn[:, place]
        total = both.sum(axis=1)
        means.append(divide(both @ moved, total))
    found = np.concatenate(means)
    return Estimate(float(moved.mean()), *interval_of(found[np.isfinite(found)]))


def _share_of(right: NDArray[np.bool_], rows: NDArray[np.bool_]) -> Callable[[Weights], NDArray[np.float64]]:
    """Return what gives the weighted share of right answers among some rows, ``[r]``; NaN of none."""

    def share(weights: Weights) -> NDArray[np.float64]:
        chosen = weights[:, rows]
        total = chosen.sum(axis=1)
        return divide(chosen @ right, total)

    return share


def _mean_auroc(
    judged: Judged, index: int, parts: Sequence[NDArray[np.int64]]
) -> Callable[[Weights], NDArray[np.float64]]:
    """Return what gives a class's AUROC, mean over the trainings: scores of two trainings have no common scale."""

    def mean(weights: Weights) -> NDArray[np.float64]:
        each = np.stack(
            [
                weighted_auroc(
                    judged.probabilities[rows, index], judged.true[rows] == index, weights[:, rows]
                )
                for rows in parts
            ]
        )
        known = np.isfinite(each)
        total = np.where(known, each, 0.0).sum(axis=0)
        count = known.sum(axis=0)
        return divide(total, count.astype(np.float64))

    return mean
