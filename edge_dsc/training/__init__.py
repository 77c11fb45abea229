"""Training: recipes, augmentation, the loop, and the run folder."""

from __future__ import annotations

from edge_dsc.training.completion import TrainResult
from edge_dsc.training.options import RECIPES, Recipe, TrainOptions, TrainProgress
from edge_dsc.training.run import train

__all__ = ["RECIPES", "Recipe", "TrainOptions", "TrainProgress", "TrainResult", "train"]
