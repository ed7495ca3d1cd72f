"""README.md of a result: lineage, recipe and licences, with the hub's metadata."""

from __future__ import annotations

from typing import Any

import yaml

from workbench.bricks import Brick, read_licence, read_title
from workbench.resolve import Resolved

# Licences that forbid or may forbid what a merge is usually made for; unknown counts as such.
_CAUTION = ("-nc", "non-commercial", "noncommercial", "-nd", "research", "other", "unknown")


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
    metadata: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation",
        "base_model": [base_title(resolved), *(_reference(resolved.bricks[n]) for n in resolved.parents)],
        "base_model_relation": "merge" if "merge" in verbs else "finetune",
        "tags": [*verbs, "brick-workbench"],
    }  # fmt: skip
    if known:
        metadata["license"] = known[0] if len(known) == 1 and "unknown" not in found.values() else "other"
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {recipe.name}", ""]
    if recipe.fields.description:
        lines += [recipe.fields.description, ""]
    lines += ["## Inputs", "", "| role | what | digest | licence |", "| --- | --- | --- | --- |",
              f"| base | {base_title(resolved)} | `{resolved.base_digest[:12]}` | {found['base']} |"]  # fmt: skip
    lines += [
        f"| brick `{n}` | {_reference(resolved.bricks[n])} | `{resolved.digests[n][:12]}` | {found[n]} |"
        for n in resolved.parents
    ]
    if resolved.warnings:
        lines += ["", *(f"- {w}" for w in resolved.warnings)]
    lines += ["", "## Recipe", "", "```yaml", recipe_text.strip(), "```", "", "## Provenance", "",
              f"{'Adapter' if adapter else 'Configuration'} digest `{record['output']['digest']}`, recipe key `{resolved.key}`, made with brick-workbench "
              f"{record['versions']['brick-workbench']} on torch {record['versions']['torch']}.", ""]  # fmt: skip
    return "\n".join(lines)


def _reference(brick: Brick | Resolved) -> str:
    """A brick without local paths: its recipe's name, its hub id, or its folder's name."""
    if isinstance(brick, Resolved):
        return f"recipe {brick.recipe.name}"
    if brick.card:
        return brick.card.name
    return brick.path.parent.parent.name.removeprefix("models--").replace("--", "/") if brick.revision else brick.path.name
