"""Stage 1: the network to be converted is trained, by a recipe, from augmented batches."""

from micelab.train.answers import accuracy
from micelab.train.recipe import RECIPES, TrainConfig
from micelab.train.run import STORAGE, train

__all__ = ["RECIPES", "STORAGE", "TrainConfig", "accuracy", "train"]
