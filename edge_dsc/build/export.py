"""``export``: from a trained run to the deployed ONNX model, proven equal to Keras.

tf2onnx converts the folded network. Of the paper's two only the weights and the order of the layers are taken from its
result; the deployed graph is written anew around them, so that it does not depend on how tf2onnx arranges casts and
reshapes. Every other network keeps its graph, with what lies before its first convolutions folded into these
(:mod:`edge_dsc.build.conform`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_dsc.build.conform import PROBABILITIES, deploy_any
from edge_dsc.build.deployed import OPSET, assemble_network, chain_of
from edge_dsc.data.loading import load_images
from edge_dsc.data.purposes import images_to_compare
from edge_dsc.data.split import SPLIT_FILE, load_split
from edge_dsc.networks import (
    ARCHITECTURES,
    NetworkChoice,
    fold_network,
    load_keras,
    load_network,
    open_network,
)
from edge_dsc.training.fit import predict
from edge_dsc.training.run_folder import MODEL_FILE, TrainingRecord, load_training_record
from engines.contract import ModelContract
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, EdgeDscError, UsageError
from engines.files import ONNX_MODEL, canonical_json, require_writable, sha256_bytes, write_bytes
from engines.graph import OnnxModel, seal_model
from engines.packages import load
from engines.runtimes import Progress

if TYPE_CHECKING:
    from keras import Model
    from onnx import ModelProto, NodeProto

INPUT_NAME = "image"
PARENTS_KEY = "edge_dsc.parents"
PARITY_TOLERANCE = 1e-5  # of the paper's networks
DEEP_TOLERANCE = 1e-4  # of every other: what float32 leaves of hundreds of layers, in another order of sums
_PARITY_IMAGES = 32
_GLUE = frozenset(
    {"Cast", "Concat", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export gave.

    Attributes:
        model: The ONNX model, as it was written.
        parity: Largest difference of a probability between Keras and onnxruntime.
        images: Real images that were compared.
    """

    model: OnnxModel
    parity: float
    images: int

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.model.path

    @property
    def contract(self) -> ModelContract:
        """The contract inside."""
        return self.model.contract


def export_run(
    run: Path,
    *,
    out: Path | None = None,
    data: Path | None = None,
    architecture: str | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a run's network to ONNX in its deployed form.

    Args:
        run: A run folder that :func:`edge_dsc.training.train` wrote.
        out: The ONNX file; by default ``model.onnx`` in the run folder.
        data: Where the run's images are now; by default where they were at training.
        architecture: The function that built the network, ``module:function``, for one with code of its own, which is
            never run because a file says so.
        progress: Called before and after each phase.

    Returns:
        The result; the same run gives the same bytes every time.

    Raises:
        ArtefactError: The run is incomplete, or a file of it is not the one recorded.
        BadInputError: None of the run's images are there to compare with.
        AccuracyGateError: The exported network answers differently; nothing is written.
        UsageError: Another function than the one that the run was trained with.
        EnvironmentProblem: TensorFlow or tf2onnx is missing, or the place cannot be written.
    """
    report = progress or (lambda phase, done, total: None)
    target = out or run / "model.onnx"
    if out is not None:
        require_writable(out, ONNX_MODEL)
    record = load_training_record(run)
    split = load_split(run / SPLIT_FILE)
    if split.sha256 != record.split_sha256 or split.labels != record.labels:
        raise ArtefactError(
            f"{run / SPLIT_FILE} is not the split of its run",
            remedy="train again: edge-dsc train DATA --overwrite",
        )
    root = data or split.root
    samples = images_to_compare(split, lambda sample: (root / sample.path).is_file())
    if not samples:
        raise BadInputError(
            f"none of the run's held-out images are below {root}",
            remedy="name the folder with the images of the training: --data DIR",
        )
    evenly = samples[:: max(1, len(samples) // _PARITY_IMAGES)][:_PARITY_IMAGES]
    side = record.network.size
    contract = ModelContract(
        labels=record.labels,
        architecture=record.architecture,
        height=side,
        width=side,
        temperature=record.temperature,
    )
    pixels = load_images(root, evenly, contract).pixels
    report("loading", 0, 3)
    trained = _load_trained(run, record, architecture)
    report("converting", 1, 3)
    parents = {PARENTS_KEY: canonical_json({MODEL_FILE: record.model_sha256}).decode()}
    if record.architecture in ARCHITECTURES:
        proto = deploy_graph(convert_to_onnx(fold_network(trained)), contract, parents)
        tolerance = PARITY_TOLERANCE
    else:
        proto = deploy_any(convert_to_onnx(trained), contract, None, parents, gives=PROBABILITIES).proto
        tolerance = DEEP_TOLERANCE
    report("comparing", 2, 3)
    parity = measure_parity(trained, proto, pixels)
    if not parity <= tolerance:
        raise AccuracyGateError(
            f"the exported network differs from Keras by {parity:.1e} on {len(pixels)} images, "
            f"more than {tolerance:.0e}",
            remedy="nothing was written; install the tested versions (constraints.txt) or train again",
        )
    data_bytes = seal_model(proto)
    write_bytes(target, data_bytes, ONNX_MODEL)
    report("comparing", 3, 3)
    model = OnnxModel(target, sha256_bytes(data_bytes), proto, contract)
    return ExportResult(model=model, parity=parity, images=len(pixels))


def _load_trained(run: Path, record: TrainingRecord, architecture: str | None) -> Model:
    """Read a run's network; where a person named the function that builds it, from that and the run's weights."""
    network = None
    if architecture is not None:
        network = open_network(NetworkChoice(architecture=architecture, size=record.network.size))
        if network.name != record.architecture:
            raise UsageError(
                f"{run} is of {record.architecture}, not of {architecture}",
                remedy=f"name what it was trained with: {record.network.source}",
            )
    return load_network(
        run / MODEL_FILE,
        record.architecture,
        len(record.labels),
        config_sha256=record.network.config_sha256,
        network=network,
    )


def measure_parity(trained: Model, proto: ModelProto, pixels: NDArray[np.uint8]) -> float:
    """Return the largest difference between a Keras model's and an ONNX model's answers.

    Args:
        trained: Takes ``float32 [N, H, W, 1]``.
        proto: The deployed graph.
        pixels: ``uint8 [N, H, W, 1]``.
    """
    onnxruntime = load("onnxruntime")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: pixels})
    return float(np.abs(answers - predict(trained, pixels)).max())


def convert_to_onnx(model: Model) -> ModelProto:
    """Convert a Keras model with one input ``float32 [N, H, W, C]``.

    Returns:
        The model as tf2onnx writes it, with a channels-first input.

    Raises:
        EnvironmentProblem: tf2onnx is missing.
    """
    keras = load_keras()
    tensorflow = load("tensorflow")
    if isinstance(
        model, keras.Sequential
    ):  # tf2onnx looks for its outputs by names that only functional models keep
        image = keras.Input(model.input_shape[1:])
        model = keras.Model(image, model(image), name=model.name)
    with warnings.catch_warnings():
        # tf2onnx 1.17 and TensorFlow call each other's and numpy's deprecated names; nothing a user can act on.
        warnings.simplefilter("ignore")
        tf2onnx = load("tf2onnx")
        logging.getLogger("tf2onnx").setLevel(logging.ERROR)
        # Keras 3 models only convert with an explicit signature (onnx/tensorflow-onnx#2329).
        signature = [
            tensorflow.TensorSpec((None, *model.input_shape[1:]), tensorflow.float32, name=INPUT_NAME)
        ]
        proto: ModelProto
        proto, _ = tf2onnx.convert.from_keras(
            model, input_signature=signature, opset=OPSET, inputs_as_nchw=[INPUT_NAME]
        )
    return proto


def deploy_graph(converted: ModelProto, contract: ModelContract, metadata: dict[str, str]) -> ModelProto:
    """Write the deployed graph of what tf2onnx made of a folded network.

    Raises:
        EdgeDscError: tf2onnx gave another chain of nodes than the network has.
    """
    weights = _weights_of(converted, chain_of(contract.architecture))
    return assemble_network(contract, weights, metadata)


def _weights_of(converted: ModelProto, chain: Sequence[tuple[str, str]]) -> list[list[NDArray[np.float32]]]:
    """Return kernel and bias of every node of the chain; tf2onnx optimises a bias of zeros away."""
    steps: list[list[NodeProto]] = []  # a node, and the Add of its bias
    for node in converted.graph.node:
        if node.op_type == "Add" and steps:
            steps[-1] = [steps[-1][0], node]
        elif node.op_type not in _GLUE:
            steps.append([node])
    found = [nodes[0].op_type for nodes in steps]
    if found != [op for _, op in chain]:
        raise EdgeDscError(
            f"tf2onnx gave an unexpected graph: {' '.join(found)}",
            remedy="install the tested versions: pip install -c constraints.txt 'edge-dsc[train]'",
        )
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in converted.graph.initializer}
    return [[stored[name] for node in nodes for name in node.input if name in stored] for nodes in steps]
