"""Training of a LoRA adapter, or of all weights, on prompts and completions."""

from workbench.train.fit import Notice, Progress, Reports, reports
from workbench.train.rows import CROSS_ENTROPY, Objective, batch_loss, collate, distillation, encode, read_replay
from workbench.train.run import TrainFiles, train, train_parameters
from workbench.train.spec import HubData, TrainSpec
from workbench.train.texts import training_cost, training_texts

__all__ = [
    "CROSS_ENTROPY",
    "HubData",
    "Notice",
    "Objective",
    "Progress",
    "Reports",
    "TrainFiles",
    "TrainSpec",
    "batch_loss",
    "collate",
    "distillation",
    "encode",
    "read_replay",
    "reports",
    "train",
    "train_parameters",
    "training_cost",
    "training_texts",
]
