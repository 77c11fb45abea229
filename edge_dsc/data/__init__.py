"""Folders of X-rays: finding the samples, splitting them by patient, reading them, and phantoms to try it with."""

from __future__ import annotations

from edge_dsc.data.discover import Dataset, Sample, discover
from edge_dsc.data.split import PARTS, Split, keep_split, load_split, save_split, split_dataset

__all__ = [
    "PARTS",
    "Dataset",
    "Sample",
    "Split",
    "discover",
    "keep_split",
    "load_split",
    "save_split",
    "split_dataset",
]
