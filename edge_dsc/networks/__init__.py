"""Networks by name, as Keras models: the paper's two and their deployed forms, and their files.

Importing this package loads no Keras.
"""

from __future__ import annotations

from edge_dsc.networks.architecture import load_network
from edge_dsc.networks.keras_files import load_keras, save_network
from edge_dsc.networks.paper import (
    ARCHITECTURES,
    BLOCKS,
    FEATURE_EXTRACTOR_PARAMETERS,
    build_network,
    feature_extractor_parameters,
    fold_batch_norm,
    fold_network,
    fold_separable_stem,
    fold_stem,
)

__all__ = [
    "ARCHITECTURES",
    "BLOCKS",
    "FEATURE_EXTRACTOR_PARAMETERS",
    "build_network",
    "feature_extractor_parameters",
    "fold_batch_norm",
    "fold_network",
    "fold_separable_stem",
    "fold_stem",
    "load_keras",
    "load_network",
    "save_network",
]
