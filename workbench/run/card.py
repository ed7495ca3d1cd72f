"""README.md of a result: lineage, recipe and licences, with the hub's metadata."""

from __future__ import annotations

import re
from typing import Any

from workbench import yamldoc
from workbench.bricks.brick import Brick
from workbench.edit.greedy import told as said_in_words
from workbench.errors import as_markdown, printable
from workbench.grow.expansion.kept import told
from workbench.models.skeleton import loading_class
from workbench.resolve.licences import base_title, data_licences, licences
from workbench.resolve.resolved import Resolved

# transformers' class -> the hub's task, which decides the lines that the hub shows for loading.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
}


def model_card(resolved: Resolved, record: dict[str, Any], recipe_text: str) -> str:
    """README.md with YAML metadata (`base_model`, `base_model_relation`, tags) and the recipe."""
    recipe = resolved.recipe
    found = licences(resolved)
    known = sorted({value for value in found.values() if value != "unknown"})
    verbs = sorted({step.verb for step in recipe.steps})
    adapter = recipe.fields.output.form == "adapter"
    loader = "AutoModelForCausalLM" if adapter else loading_class(resolved.checkpoint.config)
    metadata: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        **({"pipeline_tag": tag} if (tag := _TASKS.get(loader)) else {}),
        "base_model": [base_title(resolved), *(_reference(resolved.bricks[n]) for n in resolved.parents)],
        "base_model_relation": "merge" if "merge" in verbs else "finetune",
        "tags": [*verbs, "brick-workbench"],
    }  # fmt: skip
    if known:
        metadata["license"] = known[0] if len(known) == 1 and "unknown" not in found.values() else "other"
    lines = ["---", yamldoc.dump(metadata).strip(), "---", "", f"# {recipe.name}", ""]
    if recipe.fields.description:
        lines += [recipe.fields.description, ""]
    lines += [
        "## Inputs",
        "",
        "| role | what | digest | licence |",
        "| --- | --- | --- | --- |",
        f"| base | {as_markdown(base_title(resolved))} | `{resolved.base_digest[:12]}` | {as_markdown(found['base'])} |",
    ]
    lines += [
        f"| brick `{n}` | {as_markdown(_reference(resolved.bricks[n]))} | `{resolved.digests[n][:12]}` | {as_markdown(found[n])} |"
        for n in resolved.parents
    ]
    if data := data_licences(resolved):
        lines += ["", "| brick | trained on | licence |", "| --- | --- | --- |"]
        lines += [f"| `{brick}` | {as_markdown(name)} | {as_markdown(licence)} |" for brick, name, licence in data]
    if resolved.warnings:
        lines += ["", *(f"- {_line(w)}" for w in resolved.warnings)]
    if grown := [f"- `{step['id']}`: {told(step['check'])}" for step in record.get("steps", ()) if "check" in step]:
        lines += ["", "## Growth", "", *grown]
    if recipe.fields.output.form == "checkpoint":
        lines += [
            "",
            "## Loading",
            "",
            "```python",
            f"from transformers import {loader}",
            "",
            f'model = {loader}.from_pretrained("DIRECTORY")',
            "```",
        ]
    if said := record.get("said"):
        lines += ["", "## Facts", "", *(f"- `{name}`: the model says {_line(said_in_words(row))}" for name, row in said.items())]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe_text)), default=0))
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe_text.strip(), fence, "", "## Provenance", "",
              f"{'Adapter' if adapter else 'Configuration'} digest `{record['output']['digest']}`, recipe key `{resolved.key}`, made with brick-workbench "
              f"{record['versions']['brick-workbench']} on torch {record['versions']['torch']}.", ""]  # fmt: skip
    return "\n".join(lines)


def _line(warning: str) -> str:
    """Return a warning of ours, with names from foreign files in it, as one line that holds no HTML."""
    return " ".join(printable(warning).split()).replace("<", "\\<")


def _reference(brick: Brick | Resolved) -> str:
    """A brick without local paths: its recipe's name, its hub id, or its folder's name."""
    if isinstance(brick, Resolved):
        return f"recipe {brick.recipe.name}"
    if brick.card:
        return brick.card.name
    return brick.path.parent.parent.name.removeprefix("models--").replace("--", "/") if brick.revision else brick.path.name
