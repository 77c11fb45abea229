"""What a run says of itself to Prometheus: rate, latency, age, errors, classes, unsure answers, drift of the input.

:class:`Monitor` knows neither the page nor a camera: whatever answers pictures may feed one and offer its text.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.errors import EdgeDscError
from engines.packages import load
from engines.record import EngineRecord

DEFAULT_UNSURE = 0.6  # the best class of an unsure answer stays under it
RECENT = 1000  # answers that the share of unsure ones and the drift are taken over
FEWEST = 100  # of them, below which no drift is given: single pictures differ more than sets of them
_FLOOR = 1e-4  # a bin that one of both sets leaves empty has no finite index
# 0.25 ms to 10 s, about 2 to 2.5 a step: a small network on a GPU, a large one on a processor, a camera far away.
_SECONDS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class InputDrift:
    """How far the grey levels of the last :data:`RECENT` pictures are from those of a calibration's images.

    Any thread may add, any other may ask.

    Attributes:
        reference: Those levels, ``int64 [engines.images.LEVEL_BINS]``.
        description: What the index says, for a metric.
    """

    description = (
        f"Population stability index of the grey levels of the last {RECENT} pictures against the images of "
        f"the calibration; NaN before {FEWEST}."
    )

    def __init__(self, reference: NDArray[np.int64]) -> None:
        """Begin without a picture."""
        self.reference = reference
        self._lock = threading.Lock()
        self._seen: deque[NDArray[np.int64]] = deque(maxlen=RECENT)
        self._sums = np.zeros(len(reference), np.int64)

    def add(self, levels: NDArray[np.int64]) -> None:
        """Take a picture's grey levels, as :func:`engines.images.count_levels` gives them."""
        with self._lock:
            if len(self._seen) == RECENT:
                self._sums -= self._seen[0]
            self._seen.append(levels)
            self._sums += levels

    def value(self) -> float:
        """Return :func:`stability_index`; NaN of fewer than :data:`FEWEST` pictures."""
        with self._lock:
            return stability_index(self.reference, self._sums) if len(self._seen) >= FEWEST else float("nan")


class Monitor:
    """Counts answers in a registry of its own; any thread may observe, any other may read.

    Attributes:
        reference: Grey levels of the images that INT8 was calibrated on, ``int64 [engines.images.LEVEL_BINS]``; None
            where no table gives them: then no drift is offered.
    """

    def __init__(
        self,
        labels: Sequence[str],
        about: Mapping[str, str],
        *,
        reference: NDArray[np.int64] | None = None,
        unsure_below: float = DEFAULT_UNSURE,
    ) -> None:
        """Begin at zero.

        Args:
            labels: Class names, in the order of the probabilities.
            about: What answers, such as :func:`describe_engine` says: labels of ``edge_dsc_engine_info``.
            reference: See above; :func:`reference_levels` finds it.
            unsure_below: An answer is unsure whose best class stays under it, 0..1.

        Raises:
            EnvironmentProblem: ``prometheus_client`` is missing.
        """
        client = load("prometheus_client")
        self.reference = reference
        self._unsure_below = unsure_below
        self._registry = registry = client.CollectorRegistry()
        self._lock = threading.Lock()
        self._unsure: deque[bool] = deque(maxlen=RECENT)
        self._input = InputDrift(reference) if reference is not None else None
        self._dropped_before = 0
        client.Info("edge_dsc_engine", "The engine that answers.", registry=registry).info(dict(about))
        counter, gauge, histogram = client.Counter, client.Gauge, client.Histogram
        by_class = counter("edge_dsc_answers", "Answers by their top class.", ["label"], registry=registry)
        self._answers = [by_class.labels(label) for label in labels]
        self._errors = counter("edge_dsc_errors", "Pictures without an answer.", registry=registry)
        self._dropped = counter(
            "edge_dsc_dropped_frames", "Frames that a newer one replaced.", registry=registry
        )
        self._latency = histogram(
            "edge_dsc_latency_seconds",
            "Decoding to answer, without waiting.",
            registry=registry,
            buckets=_SECONDS,
        )
        self._age = histogram(
            "edge_dsc_age_seconds",
            "From a camera's frame to its answer.",
            registry=registry,
            buckets=_SECONDS,
        )
        self._unsure_count = counter(
            "edge_dsc_unsure_answers",
            "Answers whose best class stays under the threshold.",
            registry=registry,
        )
        gauge("edge_dsc_unsure_threshold", "That threshold.", registry=registry).set(unsure_below)
        share = gauge("edge_dsc_unsure_share", f"Unsure answers among the last {RECENT}.", registry=registry)
        share.set_function(self._unsure_share)
        if self._input is not None:
            drift = gauge("edge_dsc_input_drift_psi", self._input.description, registry=registry)
            drift.set_function(self.drift)

    def observe(
        self,
        probabilities: Sequence[float] | None,
        *,
        latency_s: float = 0.0,
        age_s: float | None = None,
        dropped: int | None = None,
        levels: NDArray[np.int64] | None = None,
    ) -> None:
        """Count an answer.

        Args:
            probabilities: One for each class; None for a picture that got an error.
            latency_s: Decoding, preprocessing and executing it. Seconds; not counted for an error.
            age_s: From a camera's frame to the answer. Seconds.
            dropped: Frames that newer ones replaced since the camera was opened.
            levels: Grey levels of the network's input, by :func:`engines.images.count_levels`.
        """
        if age_s is not None:
            self._age.observe(age_s)
        unsure = None
        if probabilities is None:
            self._errors.inc()
        else:
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            unsure = probabilities[best] < self._unsure_below
            self._answers[best].inc()
            self._latency.observe(latency_s)
        with self._lock:
            if unsure is not None:
                self._unsure.append(unsure)
            if dropped is not None:
                # A camera that was opened anew may count from zero again.
                new = dropped - self._dropped_before if dropped >= self._dropped_before else dropped
                self._dropped_before = dropped
            else:
                new = 0
        if levels is not None and self._input is not None:
            self._input.add(levels)
        if unsure:
            self._unsure_count.inc()
        if new:
            self._dropped.inc(new)

    def drift(self) -> float:
        """Return how far the input of the last :data:`RECENT` pictures is from the calibration's; NaN of too few."""
        return self._input.value() if self._input is not None else float("nan")

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the metrics as text with its content type.

        Args:
            accept: The request's ``Accept`` header, by which Prometheus asks for its own format or OpenMetrics.
        """
        encode, content_type = load("prometheus_client.exposition").choose_encoder(accept)
        text: bytes = encode(self._registry)
        return text, str(content_type)

    def _unsure_share(self) -> float:
        with self._lock:
            return sum(self._unsure) / len(self._unsure) if self._unsure else float("nan")


def describe_engine(record: EngineRecord) -> dict[str, str]:
    """Return what tells one engine's metrics from another's."""
    return {
        "engine": record.engine,
        "sha256": record.engine_sha256,
        "architecture": record.contract.architecture,
        "precision": record.precision.value,
        "runtime": record.runtime,
    }


def stability_index(reference: NDArray[np.int64], seen: NDArray[np.int64]) -> float:
    """Return the population stability index of two histograms over the same bins: 0 where they are alike.

    ``sum((seen - reference) * ln(seen / reference))`` of the shares of each bin, an empty bin taken as a share of 1e-4.
    By the usual rule of thumb below 0.1 is no shift, above 0.25 a large one.

    Source: Siddiqi, Credit Risk Scorecards (Wiley 2006), chapter 10; it is Jeffreys' divergence (Proc. R. Soc. A 186,
    1946).

    Args:
        reference: Counts ``int64 [bins]``.
        seen: Counts ``int64 [bins]``.

    Raises:
        ValueError: One of them is empty, or they have different bins.
    """
    if reference.shape != seen.shape or not reference.sum() or not seen.sum():
        raise ValueError(
            f"no index of {reference.sum()} and {seen.sum()} counts, {reference.shape} {seen.shape}"
        )
    expected = np.maximum(reference / reference.sum(), _FLOOR)
    actual = np.maximum(seen / seen.sum(), _FLOOR)
    return float(((actual - expected) * np.log(actual / expected)).sum())


def reference_levels(engine: Path, record: EngineRecord) -> tuple[NDArray[np.int64] | None, str]:
    """Return the grey levels of the images that an engine's network was calibrated on.

    They are in the calibration table: that of the engine's record, else the one beside the ONNX model.

    Args:
        engine: The engine file.
        record: Its record.

    Returns:
        Counts ``int64 [engines.images.LEVEL_BINS]``, or None; and the table's path, or why there are none.
    """
    from calibration.table import load_table

    beside = (engine.parent / record.onnx).with_name("calibration.json")
    path = engine.parent / record.calibration if record.calibration is not None else beside
    try:
        table = load_table(path)
    except EdgeDscError as error:
        return None, error.what
    if table.onnx_sha256 != record.onnx_sha256:
        return None, f"{path} is of another model"
    if not table.pixel_levels:
        return None, f"{path} was made before tables kept grey levels: calibrate again"
    return np.array(table.pixel_levels, np.int64), str(path)
