"""Training of a LoRA adapter or of all weights, on prompts and completions."""

from workbench.train.fit import Progress
from workbench.train.rows import IGNORED, collate, encode, read_rows
from workbench.train.run import train
from workbench.train.spec import TrainSpec

__all__ = ["IGNORED", "Progress", "TrainSpec", "collate", "encode", "read_rows", "train"]
