"""Advice before merging and editing: how bricks relate and how to merge them, the barrier between models, and what is wrong with facts. At most 153 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={
        "brick advise": "advice.commands.advise.advise",
        "brick barrier": "advice.commands.barrier.barrier",
        "facts check": "advice.commands.facts.check",
    },
    documents={
        "brick advise": "advice.result.Advice",
        "brick barrier": "advice.barrier.Barrier",
        "facts check": "advice.facts.FactsReport",
    },
)
