"""Training: recipes, augmentation, the loop, and the run folder."""

from __future__ import annotations

from edge_dsc.training.recipes import RECIPES, Recipe, TrainOptions, TrainProgress
from edge_dsc.training.train import TrainResult, train

__all__ = ["RECIPES", "Recipe", "TrainOptions", "TrainProgress", "TrainResult", "train"]
