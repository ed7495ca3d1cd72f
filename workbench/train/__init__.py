"""Training of a LoRA adapter or of all weights, on prompts and completions."""

from workbench.train.fit import Notice, Progress, reports
from workbench.train.new import train_parameters
from workbench.train.rows import IGNORED, collate, encode, read_replay
from workbench.train.run import train
from workbench.train.spec import HubData, TrainSpec
from workbench.train.texts import training_cost, training_texts

__all__ = [
    "IGNORED",
    "HubData",
    "Notice",
    "Progress",
    "TrainSpec",
    "collate",
    "encode",
    "read_replay",
    "reports",
    "train",
    "train_parameters",
    "training_cost",
    "training_texts",
]
