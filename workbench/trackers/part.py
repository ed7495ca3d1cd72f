"""Scores and searches as runs of MLflow or Weights & Biases, for `--log`. At most 21 names."""

from workbench.ground.parts import Part

PART = Part(trackers="trackers.runs")
