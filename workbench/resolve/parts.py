"""Checks of multimodal bricks: the part that a step uses, and the tokens of the model that a result is put into."""

from __future__ import annotations

from workbench.errors import WorkbenchError
from workbench.resolve.checks import compare_configs
from workbench.resolve.resolved import Resolved
from workbench.steps import GrowMethod


def check_parts(resolved: Resolved) -> list[WorkbenchError]:
    """Return an error for each multimodal brick of `grow: components` that lacks `part: language`, or whose tokens the result lacks.

    Args:
        resolved: The recipe.
    """
    recipe, problems = resolved.recipe, []
    for i, step in enumerate(recipe.steps):
        if not (isinstance(step, GrowMethod) and step.composes):
            continue
        if i < len(recipe.steps) - 1:
            text = f"no step can follow `grow: {step.name}`, because steps work on text models"
            problems.append(recipe.error(("steps", i + 1), text, f"Make `grow: {step.name}` the last step."))
        for name in step.names():
            ref = recipe.fields.bricks.get(name)
            if ref is not None and ref.part is None and ref.kind != "recipe":
                text = f"brick '{name}' gives encoders to the result, so it must be a multimodal checkpoint with `part: language`"
                hint = f"Write `{name}: {{checkpoint: {ref.target}, part: language}}`."
                problems.append(recipe.error(("bricks", name), text, hint))
            elif (
                step.check == "full"
                and name in resolved.on_disk
                and (reason := compare_configs(resolved.on_disk[name], resolved.checkpoint))
            ):
                text = f"{reason[0].partition(';')[0]}, so its text decoder computes another function than the base with equal weights"
                hint = "Set `base:` to the text model that it was made from. `check: off` in the step writes the result nevertheless."
                problems.append(recipe.error(("steps", i, "from"), text, hint))
        block, source = recipe.fields.tokenizer, step.tokenizer_brick()
        if block is not None and block.source != source:
            text = f"the result has the configuration of brick '{source}', whose placeholders for images are tokens of its own tokenizer"
            problems.append(recipe.error(("tokenizer", "source"), text, f"Write `tokenizer: {{source: {source}}}`."))
    return problems
