"""Care of bricks, edits and the installation: bricks are measured, fetched, trained, extracted, baked and verified, edits are solved again. At most 104 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={
        "doctor": "upkeep.commands.doctor.doctor",
        "recipe diff": "upkeep.commands.recipediff.diff",
        "brick show": "upkeep.commands.bricks.show",
        "brick fetch": "upkeep.commands.bricks.fetch",
        "brick train": "upkeep.commands.bricks.train",
        "brick extract": "upkeep.commands.bricks.extract",
        "brick bake": "upkeep.commands.bricks.bake",
        "brick verify": "upkeep.commands.bricks.verify",
        "edit rebase": "upkeep.commands.rebase.rebase",
    },
    documents={
        "recipe diff": "upkeep.recipediff.RecipeDifference",
        "brick show": "upkeep.bricks.ShownBrick",
        "brick train": ["bricks.card.ShownCard"],
        "brick extract": "upkeep.extract.Extraction",
        "brick bake": "run.record.RunResult",
        "edit rebase": "upkeep.rebase.Rebased",
        "doctor": "upkeep.doctor.Checkup",
    },
)
