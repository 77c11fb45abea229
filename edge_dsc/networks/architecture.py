"""A network and its name: built by it, and held against it when it is read back from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_dsc.networks.keras_files import read_network
from edge_dsc.networks.paper import build_network, deployed_network
from engines.errors import ArtefactError

if TYPE_CHECKING:
    from keras import Model


def load_network(path: Path, architecture: str, classes: int) -> Model:
    """Read a ``.keras`` file, without running code from it (safe mode), and hold it against what it should be.

    Args:
        path: The file.
        architecture: What :func:`build_network` built, or :func:`fold_network` made of that.
        classes: Number of classes.

    Raises:
        ArtefactError: Keras cannot read it, or it is another network.
        EnvironmentProblem: TensorFlow is missing.
    """
    loaded = read_network(path)
    trained, deployed = build_network(architecture, classes), deployed_network(architecture, classes)
    if _form_of(loaded) not in (_form_of(trained), _form_of(deployed)):
        raise ArtefactError(
            f"{path} is not the {architecture} of {classes} classes that its run records",
            remedy="train again: edge-dsc train DATA --overwrite",
        )
    return loaded


def _form_of(model: Model) -> list[object]:
    """Return what has to be equal in two networks for one to stand for the other, whatever their weights."""
    layers = [
        (layer.name, type(layer).__name__, [tuple(weight.shape) for weight in layer.weights])
        for layer in model.layers
    ]
    ends = [getattr(model, end, None) for end in ("input_shape", "output_shape")]
    return [model.name, type(model).__name__, ends, layers]
