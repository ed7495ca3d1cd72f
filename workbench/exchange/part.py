"""What others wrote: scores of `lm_eval --log_samples`, the stores of other projects and machines, and files for mergekit. At most 186 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={
        "scores import": "exchange.commands.import_",
        "scores pull": "exchange.commands.pull",
        "recipe import": "exchange.commands.import_recipe",
    },
    documents={"scores import": ["scores.groups.ImportedScores"], "scores pull": "exchange.pull.Pulled"},
)
