"""What synthetic images are worth, and what the networks cost that make them.

python -m edge_dsc.training.synthesis.worth ARCHITECTURE SIZE FILTERS BATCH measures one pair of networks, in a process
of its own: the high-water mark of memory belongs to a process and never falls.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc import IMPORTED_FROM
from edge_dsc.data.split import Split
from edge_dsc.data.synthetic import FeatureFigures, NetworkCost, Worth
from edge_dsc.networks import load_keras, load_network, multiply_adds
from edge_dsc.training.fit import seed_everything
from edge_dsc.training.run_folder import MODEL_FILE, load_training_record
from edge_dsc.training.synthesis.began import (
    Began,
    BeganPair,
    build_discriminator,
    build_generator,
    draw_latent,
)
from engines.errors import EnvironmentProblem, UsageError
from engines.images import resize_to
from engines.packages import load

if TYPE_CHECKING:
    from keras import Model

COPY_SHARE = 0.5  # of the median distance between real neighbours: below it an image is a near copy
NEIGHBOURS = 3  # Source: Kynkaanniemi et al. (2019), section 3.
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Source: Wang, Simoncelli and Bovik (2003), section 4.2.
_WINDOW = 11  # pixels of MS-SSIM's window, a side
_PAIRS = 100
_HALVINGS = 10  # random halves over which a Frechet distance is the mean
_BATCH = 16
_STEPS = 10
_FLOAT_BYTES = 4

_Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained network up to its last layer: what its features say is alike, is.

    Attributes:
        run: Its run.
        model_sha256: Hash of its ``model.keras``.
        size: Height and width of its input.
        features: The network without its last layer.
    """

    run: Path
    model_sha256: str
    size: int
    features: Model

    def __call__(self, images: NDArray[np.uint8]) -> _Floats:
        """Return the features ``[N, D]`` of images ``[N, H, W]``, resized as every image is."""
        scaled = np.stack([resize_to(image, self.size, self.size) for image in images])[..., None]
        found = []
        for start in range(0, len(scaled), _BATCH):
            part = scaled[start : start + _BATCH]
            batch = np.zeros((_BATCH, *scaled.shape[1:]), np.float32)  # one size: traced once
            batch[: len(part)] = part
            found.append(self.features.predict_on_batch(batch)[: len(part)])
        return np.concatenate(found).astype(np.float64)


def open_classifier(run: Path, split: Split) -> Classifier:
    """Read a trained run whose features are to be used.

    Raises:
        ArtefactError: It is no finished run.
        UsageError: It was trained with another split: then it may have learnt from what this one holds back.
    """
    record = load_training_record(run)
    if record.split_sha256 != split.sha256:
        raise UsageError(
            f"{run} was trained with another split than this synthesis",
            remedy="give a run of the same data, --seed, --fold and --keep-split",
        )
    model = load_network(
        run / MODEL_FILE,
        record.architecture,
        len(record.labels),
        config_sha256=record.network.config_sha256,
    )
    features = load_keras().Model(model.input, model.layers[-1].input)
    return Classifier(run=run, model_sha256=record.model_sha256, size=record.network.size, features=features)


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """The training images, and how near one comes to another.

    Attributes:
        images: ``[N, H, W]``.
        nearest: Of each the distance to the nearest other one, ``[N]``; grey levels.
    """

    images: NDArray[np.uint8]
    nearest: _Floats

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> Neighbours:
        """Measure how near training images come to each other."""
        distances = pixel_distances(images, images)
        np.fill_diagonal(distances, np.inf)
        return cls(images=images, nearest=distances.min(axis=1))

    @property
    def copy_below(self) -> float:
        """The distance below which an image is a near copy of a training image."""
        return COPY_SHARE * float(np.median(self.nearest))

    def find(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], _Floats]:
        """Return of each image the index of the nearest training image, and its distance."""
        distances = pixel_distances(images, self.images)
        return distances.argmin(axis=1), distances.min(axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class MadeImages:
    """The images that a generator made.

    Attributes:
        pixels: ``[N, H, W]``.
        draws: Which draw each was made of.
        nearest: Index of the training image that each is nearest to.
        distances: From it.
        copies: Images that were dropped as near copies.
    """

    pixels: NDArray[np.uint8]
    draws: list[int]
    nearest: list[int]
    distances: list[float]
    copies: int


def pixel_distances(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> _Floats:
    """Return the root mean square difference in grey levels of each image and each other one, ``[N, M]``."""
    one, other = (part.reshape(len(part), -1).astype(np.float64) for part in (images, others))
    return np.asarray(_distances(one, other) / one.shape[1] ** 0.5, np.float64)


def _distances(points: _Floats, others: _Floats) -> _Floats:
    """Return Euclidean distances ``[N, M]`` of points ``[N, D]`` and ``[M, D]``."""
    squares = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * points @ others.T
    found: _Floats = np.sqrt(np.maximum(squares, 0))
    return found


def frechet_distance(points: _Floats, others: _Floats) -> float:
    """Return the Frechet distance of two sets of features ``[N, D]``, each taken as one normal distribution.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, equation 6.
    """
    one, other = np.cov(points, rowvar=False), np.cov(others, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(one))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # The trace of (one other)^(1/2): its eigenvalues are those of root other root, which is symmetric.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ np.atleast_2d(other) @ root), 0)).sum()
    apart = ((points.mean(axis=0) - others.mean(axis=0)) ** 2).sum()
    return max(float(apart + np.trace(np.atleast_2d(one)) + np.trace(np.atleast_2d(other)) - 2 * shared), 0.0)


def covered_share(points: _Floats, among: _Floats, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of points ``[N, D]`` that lie among others ``[M, D]``.

    A point does that lies no further from one of them than that one's own ``neighbours``-th nearest other one. Of
    synthetic images among real ones it is precision, the other way round recall.

    Source: Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, NeurIPS 2019.
    """
    own = np.sort(_distances(among, among), axis=1)  # each one's distance to itself comes first
    reach = own[:, min(neighbours, len(among) - 1)]
    return float((_distances(points, among) <= reach).any(axis=1).mean())


def similarity_scales(size: int) -> int:
    """Return how many scales MS-SSIM has for images of a size: the smallest must hold its window."""
    return max(scales for scales in range(1, len(_WEIGHTS) + 1) if size >> (scales - 1) >= _WINDOW)


def mean_similarity(images: NDArray[np.uint8], seed: int) -> float:
    """Return the mean MS-SSIM of random pairs of images ``[N, H, W]``, at most :data:`_PAIRS`.

    Source: Wang, Simoncelli and Bovik, Multiscale Structural Similarity, Asilomar 2003; to measure the diversity of a
    generator: Odena, Olah and Shlens, ICML 2017. Weights of scales that a small image lacks are given to the others.
    """
    tensorflow = load("tensorflow")
    rng = np.random.default_rng(seed)
    pairs = np.array([rng.choice(len(images), 2, replace=False) for _ in range(_PAIRS)])
    weights = np.array(_WEIGHTS[: similarity_scales(images.shape[1])])
    ones, others = (tensorflow.constant(images[pairs[:, side], :, :, None]) for side in (0, 1))
    found = tensorflow.image.ssim_multiscale(
        ones, others, max_val=255, power_factors=tuple(weights / weights.sum()), filter_size=_WINDOW
    )
    return float(found.numpy().mean())


def measure_worth(
    made: MadeImages, neighbours: Neighbours, classifier: Classifier | None, *, seed: int
) -> Worth:
    """Hold synthetic images against the real ones that their generator learnt from.

    Args:
        made: At least two.
        neighbours: The real ones.
        classifier: Gives features; without one there are no figures of them.
        seed: Of random pairs and halves.
    """
    real = neighbours.images
    return Worth(
        real=len(real),
        copies=made.copies,
        copy_below=neighbours.copy_below,
        nearest=median(made.distances),
        nearest_real=float(np.median(neighbours.nearest)),
        similarity=mean_similarity(made.pixels, seed),
        similarity_real=mean_similarity(real, seed),
        scales=similarity_scales(real.shape[1]),
        features=None if classifier is None else _measure_features(made.pixels, real, classifier, seed),
    )


def _measure_features(
    synthetic: NDArray[np.uint8], real: NDArray[np.uint8], classifier: Classifier, seed: int
) -> FeatureFigures:
    """Compare two sets by their features, always as many of each: a set's size moves all of these figures."""
    made, true = classifier(synthetic), classifier(real)
    rng = np.random.default_rng(seed)
    half = min(len(true) // 2, len(made))
    apart, alike = [], []
    for _ in range(_HALVINGS):
        order = rng.permutation(len(true))
        drawn = made[rng.permutation(len(made))[:half]]
        apart.append(frechet_distance(true[order[:half]], drawn))
        alike.append(frechet_distance(true[order[:half]], true[order[half : 2 * half]]))
    equal = min(len(made), len(true))
    return FeatureFigures(
        run=classifier.run.resolve().name,
        model_sha256=classifier.model_sha256,
        dimensions=made.shape[1],
        images=half,
        frechet=float(np.mean(apart)),
        frechet_real=float(np.mean(alike)),
        precision=covered_share(made[:equal], true[:equal]),
        recall=covered_share(true[:equal], made[:equal]),
    )


def count_costs(began: Began) -> NetworkCost:
    """Count what a pair of networks costs: parameters, multiply-adds, and the numbers that learning keeps."""
    generator, discriminator = build_generator(began), build_discriminator(began)
    made, judged = generator.count_params(), discriminator.count_params()
    kept = (
        4 * (made + judged) + made
    )  # weight, gradient and two moments of each; the average of the generator's
    return NetworkCost(
        architecture=began.architecture,
        generator=made,
        discriminator=judged,
        multiply_adds=multiply_adds(generator) + multiply_adds(discriminator),
        state_bytes=_FLOAT_BYTES * kept,
    )


def measure_costs(began: Began) -> NetworkCost:
    """Count what a pair of networks costs, and measure a step of it in a process of its own.

    Raises:
        EnvironmentProblem: The process failed.
    """
    arguments = (began.architecture, str(began.size), str(began.filters), str(began.batch))
    done = subprocess.run(
        [sys.executable, "-m", "edge_dsc.training.synthesis.worth", *arguments],
        cwd=IMPORTED_FROM,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(
            f"a step of {began.architecture} cannot be measured: {reason[:300]}",
            remedy="leave --compare out, or free memory",
        )
    return msgspec.structs.replace(count_costs(began), **json.loads(done.stdout.splitlines()[-1]))


def probe_step(began: Began, clock: Callable[[], float] = time.perf_counter) -> dict[str, float | int]:
    """Take some steps on noise; return their median time and the memory that they took beyond TensorFlow's own."""
    seed_everything(0)
    load_keras().ops.convert_to_numpy(load("tensorflow").zeros(1))  # TensorFlow has begun
    before = _peak_bytes()
    pair = BeganPair(began)
    real = np.random.default_rng(0).uniform(-1, 1, (began.batch, began.size, began.size, 1))
    latent = draw_latent([0], began.batch, began)
    times = []
    for _ in range(1 + _STEPS):
        started = clock()
        pair.step(real.astype(np.float32), latent, 0.0)
        times.append(clock() - started)
    return {"step_seconds": median(times[1:]), "peak_bytes": _peak_bytes() - before}  # the first one compiles


def _peak_bytes() -> int:
    """Return the most memory that this process had resident so far (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    """Print one line of JSON."""
    architecture, *numbers = sys.argv[1:]
    size, filters, batch = map(int, numbers)
    began = replace(Began(), architecture=architecture, size=size, filters=filters, batch=batch)
    print(json.dumps(probe_step(began)))  # noqa: T201


if __name__ == "__main__":
    main()
