"""Training of a LoRA adapter, or of all weights, on prompts and completions."""

from workbench.train.fit import Notice, Progress, reports
from workbench.train.new import train_parameters
from workbench.train.rows import batch_loss, collate, encode, read_replay
from workbench.train.run import train
from workbench.train.spec import HubData, TrainSpec
from workbench.train.texts import training_cost, training_texts

__all__ = [
    "HubData",
    "Notice",
    "Progress",
    "TrainSpec",
    "batch_loss",
    "collate",
    "encode",
    "read_replay",
    "reports",
    "train",
    "train_parameters",
    "training_cost",
    "training_texts",
]
