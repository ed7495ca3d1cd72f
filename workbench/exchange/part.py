"""Scores from elsewhere: what `lm_eval --log_samples` wrote, and the stores of other projects and machines. At most 66 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"scores import": "exchange.commands.import_", "scores pull": "exchange.commands.pull"},
    documents={"scores import": ["scores.groups.ImportedScores"], "scores pull": "exchange.pull.Pulled"},
)
