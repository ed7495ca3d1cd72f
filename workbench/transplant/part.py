"""Adapters for other models: `workbench brick transplant` carries a LoRA adapter to a model of other depth, width or tokenizer. At most 66 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"brick transplant": "transplant.commands.transplant"},
    documents={"brick transplant": "transplant.transplant.Transplant"},
)
