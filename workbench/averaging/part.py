"""Training runs as bricks: `{checkpoints: FOLDER}` is the average of the checkpoints that a trainer saved. At most 10 names."""

from workbench.ground.parts import Part

PART = Part(runs="averaging.window")
