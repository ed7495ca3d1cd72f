"""README.md of a result: lineage, recipe and licences, with the hub's metadata."""

from __future__ import annotations

import re
from typing import Any

from workbench import yamldoc
from workbench.bricks import Brick, read_licence, read_title
from workbench.edit.greedy import told as said_in_words
from workbench.errors import WorkbenchError, as_markdown, printable
from workbench.grow.kept import told
from workbench.livemodels import loading_class
from workbench.resolve import Resolved

# Licences that forbid or may forbid what a merge is usually made for; unknown counts as such.
_UNKNOWN = ("unknown", "other")
_RESTRICTED = ("-nc", "non-commercial", "noncommercial", "-nd", "research")
_CAUTION = (*_RESTRICTED, *_UNKNOWN)
# transformers' class -> the hub's task, which decides the lines that the hub shows for loading.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
}


def base_title(resolved: Resolved) -> str:
    """The base in words, as its README names it (the starter base says that it is dequantised), else as the recipe does."""
    return read_title(resolved.base_path) or resolved.recipe.fields.base


def licences(resolved: Resolved) -> dict[str, str]:
    """Licence of the base and every brick that a step uses, "unknown" where none is stated."""
    found = {"base": read_licence(resolved.base_path) or "unknown"}
    for name in resolved.parents:
        brick = resolved.bricks[name]
        inner = brick.licence() if isinstance(brick, Brick) else ", ".join(sorted(set(licences(brick).values())))
        found[name] = inner or "unknown"
    return {name: licence.lower() for name, licence in found.items()}


def data_licences(resolved: Resolved) -> list[tuple[str, str, str]]:
    """Brick, data set and licence for all data that the bricks' cards name, "unknown" where none is stated."""
    found = []
    for name in resolved.parents:
        brick = resolved.bricks[name]
        if isinstance(brick, Resolved):
            found += [(f"{name}/{inner}", data, licence) for inner, data, licence in data_licences(brick)]
        else:
            found += [(name, data, (licence or "unknown").lower()) for data, licence in brick.data_licences().items()]
    return found


def require_licences(resolved: Resolved) -> None:
    """Errors: a licence of the base, of a brick that a step uses or of data that its card names is unknown or forbids uses."""
    stated = [(name if name == "base" else f"brick '{name}'", licence) for name, licence in licences(resolved).items()]
    stated += [(f"brick '{name}', data {data}", licence) for name, data, licence in data_licences(resolved)]
    bad = [f"{who}: {'restricted' if any(word in licence for word in _RESTRICTED) else 'unknown'} licence ({licence})"
           for who, licence in stated if any(word in licence for word in _CAUTION)]  # fmt: skip
    if bad:
        raise WorkbenchError(
            "--require-license: " + "; ".join(bad),
            "Name other inputs, or state a licence that you know: `license:` in the YAML header of the directory's README.md, "
            "`licence:` and `data_licences:` in a brick's brick.yaml.",
        )


def licence_warnings(resolved: Resolved) -> list[str]:
    """What of the licences a user should look at before sharing the result."""
    return [f"licence of {name}: {licence}" + (" (none stated)" if licence == "unknown" else "")
            for name, licence in licences(resolved).items() if any(word in licence for word in _CAUTION)]  # fmt: skip


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
