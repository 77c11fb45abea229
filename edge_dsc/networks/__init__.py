"""Networks as Keras models: the paper's two and their deployed forms, Keras' own with the paper's head, and anyone's.

Importing this package loads no Keras.
"""

from __future__ import annotations

from edge_dsc.networks.architecture import (
    NAMES,
    NO_WEIGHTS,
    Network,
    NetworkChoice,
    build_network,
    count_parameters,
    default_name,
    identify,
    layer_multiply_adds,
    load_network,
    multiply_adds,
    open_network,
    smallest_size,
)
from edge_dsc.networks.backbones import BACKBONES, IMAGENET
from edge_dsc.networks.forms import training_form
from edge_dsc.networks.keras_files import load_keras, save_network
from edge_dsc.networks.paper import (
    ARCHITECTURES,
    BLOCKS,
    FEATURE_EXTRACTOR_PARAMETERS,
    INPUT_SIDE,
    fold_batch_norm,
    fold_network,
    fold_separable_stem,
    fold_stem,
)

__all__ = [
    "ARCHITECTURES",
    "BACKBONES",
    "BLOCKS",
    "FEATURE_EXTRACTOR_PARAMETERS",
    "IMAGENET",
    "INPUT_SIDE",
    "NAMES",
    "NO_WEIGHTS",
    "Network",
    "NetworkChoice",
    "build_network",
    "count_parameters",
    "default_name",
    "fold_batch_norm",
    "fold_network",
    "fold_separable_stem",
    "fold_stem",
    "identify",
    "layer_multiply_adds",
    "load_keras",
    "load_network",
    "multiply_adds",
    "open_network",
    "save_network",
    "smallest_size",
    "training_form",
]
