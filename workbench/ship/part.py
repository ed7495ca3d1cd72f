"""Results for others: `workbench push` sends them to the hub, and `workbench export` writes what LoRA servers need. At most 103 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"push": "ship.commands.push.push", "export": "ship.commands.export.app"},
    documents={
        "push": "ship.push.Pushed",
        "export write": "ship.export.Exported",
        "export check": "ship.expected.ServerCheck",
    },
)
