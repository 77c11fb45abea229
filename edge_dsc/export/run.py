"""Export a run: fold, convert, write the deployed graph, and prove it against Keras."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_dsc.data.discover import Sample
from edge_dsc.data.loading import load_images
from edge_dsc.data.split import Split, load_split
from edge_dsc.export.conversion import convert_to_onnx
from edge_dsc.export.folding import fold_network
from edge_dsc.export.surgery import deploy_graph
from edge_dsc.networks import load_network
from edge_dsc.training.loop import predict
from edge_dsc.training.record import MODEL_FILE, SPLIT_FILE, TrainingRecord, load_training_record
from engines.contract import ModelContract
from engines.errors import AccuracyGateError, ArtefactError, BadInputError
from engines.files import canonical_json, write_bytes
from engines.packages import load
from engines.runtimes import Progress

PARENTS_KEY = "edge_dsc.parents"
PARITY_TOLERANCE = 1e-5
_PARITY_IMAGES = 32

Model = Any
Proto = Any


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export gave.

    Attributes:
        path: The ONNX file.
        parity: Largest difference of a probability between Keras and onnxruntime.
        images: Real images that were compared.
        contract: The contract inside.
    """

    path: Path
    parity: float
    images: int
    contract: ModelContract


def export_run(
    run: Path, *, out: Path | None = None, data: Path | None = None, progress: Progress | None = None
) -> ExportResult:
    """Export a run's network to ONNX in its deployed form.

    Args:
        run: A run folder that :func:`edge_dsc.training.train` wrote.
        out: The ONNX file; by default ``model.onnx`` in the run folder.
        data: Where the run's images are now; by default where they were at training.
        progress: Called before and after each phase.

    Returns:
        The result; the same run gives the same bytes every time.

    Raises:
        ArtefactError: The run is incomplete, or a file of it is not the one recorded.
        BadInputError: None of the run's images are there to compare with.
        AccuracyGateError: The exported network answers differently; nothing is written.
        EnvironmentProblem: TensorFlow or tf2onnx is missing, or the place cannot be written.
    """
    report = progress or (lambda phase, done, total: None)
    record = load_training_record(run)
    split = load_split(run / SPLIT_FILE)
    if split.sha256 != record.split_sha256:
        raise ArtefactError(
            f"{run / SPLIT_FILE} is not the split of its run",
            remedy="train again: edge-dsc train DATA --overwrite",
        )
    contract = ModelContract(labels=record.labels, architecture=record.architecture)
    pixels = load_images(*_parity_samples(split, data), contract).pixels
    report("loading", 0, 3)
    model = load_network(run / MODEL_FILE)
    report("converting", 1, 3)
    proto = _deployed(model, contract, record)
    report("comparing", 2, 3)
    parity = measure_parity(model, proto, pixels)
    if not parity <= PARITY_TOLERANCE:
        raise AccuracyGateError(
            f"the exported network differs from Keras by {parity:.1e} on {len(pixels)} images, "
            f"more than {PARITY_TOLERANCE:.0e}",
            remedy="nothing was written; install the tested versions (constraints.txt) or train again",
        )
    target = out or run / "model.onnx"
    write_bytes(target, proto.SerializeToString(deterministic=True))
    report("comparing", 3, 3)
    return ExportResult(path=target, parity=parity, images=len(pixels), contract=contract)


def measure_parity(model: Model, proto: Proto, pixels: Any) -> float:
    """Return the largest difference between a Keras model's and an ONNX model's answers.

    Args:
        model: Keras, taking ``float32 [N, 224, 224, 1]``.
        proto: The deployed ``onnx.ModelProto``.
        pixels: ``uint8 [N, 224, 224, 1]``.
    """
    onnxruntime = load("onnxruntime")
    numpy = load("numpy")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: pixels})
    return float(numpy.abs(answers - predict(model, pixels)).max())


def _deployed(model: Model, contract: ModelContract, record: TrainingRecord) -> Proto:
    parents = canonical_json({MODEL_FILE: record.model_sha256}).decode()
    return deploy_graph(convert_to_onnx(fold_network(model)), contract, {PARENTS_KEY: parents})


def _parity_samples(split: Split, data: Path | None) -> tuple[Path, list[Sample]]:
    """Choose images evenly from the held-out parts, those that are there."""
    root = data or split.root
    samples = [
        sample
        for part in ("evaluation", "test", "validation")
        for sample in split.samples(part)
        if (root / sample.path).is_file()
    ]
    if not samples:
        raise BadInputError(
            f"none of the run's held-out images are below {root}",
            remedy="name the folder with the images of the training: --data DIR",
        )
    stride = max(1, len(samples) // _PARITY_IMAGES)
    return root, samples[::stride][:_PARITY_IMAGES]
