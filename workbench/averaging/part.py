"""Training runs as bricks: `{checkpoints: FOLDER}` is the average of the checkpoints that a trainer saved. At most 11 names."""

from workbench.ground.parts import Part

PART = Part(commands={"recipe soup": "averaging.commands.soup"}, runs="averaging.window")
