"""README.md of a result: inputs, recipe and licenses, with metadata for the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.bricks.card import Axes, axes_of, renamed, without_paths
from workbench.ground import yamldoc
from workbench.ground.errors import printable
from workbench.ground.tables import as_markdown, markdown_rows
from workbench.models.sentences import sentence_class
from workbench.models.skeleton import loading_class
from workbench.resolve.findings import base_title
from workbench.resolve.resolved import Resolved
from workbench.run.kind import shapes_before
from workbench.run.record import FactsSaid, Packing

if TYPE_CHECKING:
    from workbench.activations.sets import NeuronSet

HEADER = re.compile(r"---[ \t]*\n(.*?\n)---[ \t]*\n", re.DOTALL)
"""The YAML header of a README.md, which a match finds at its beginning."""
# Class of transformers -> task of the hub, which selects the code that the hub shows for loading the model.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "SentenceTransformer": "sentence-similarity",
}

# Identifiers of licenses that the hub knows and that models often have; other names go into `license_name`. huggingface_hub has no list:
# the server checks. Source: huggingface.co/docs/hub/repositories-licenses.
_HUB_LICENCES = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl",
    "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "lppl-1.3c", "ms-pl",
    "apple-ascl", "mpl-2.0", "odc-by", "odbl", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl",
    "other",
})  # fmt: skip


def model_card(resolved: Resolved, record: dict[str, Any], recipe_text: str) -> str:
    """Return the README.md of a result, with the recipe and with YAML metadata for the hub.

    Args:
        resolved: The recipe.
        record: The run's record.
        recipe_text: Text of the recipe file.
    """
    recipe = resolved.recipe
    stated = resolved.licences
    adapter = recipe.fields.output.form == "adapter"
    composed = any(getattr(step, "composes", False) for step in recipe.steps)
    config = shapes_before(resolved, len(recipe.steps)).config if composed else resolved.checkpoint.config
    sentences = None if adapter else sentence_class(resolved.base_path)
    loader = "AutoModelForCausalLM" if adapter else sentences or loading_class(config)
    written = recipe.fields.model_dump(mode="json")
    title = renamed(base_title(resolved), recipe.project)
    lines = ["---", yamldoc.dump(_metadata(resolved, loader)).strip(), "---", "", f"# {recipe.name}", ""]
    if recipe.fields.description:
        lines += [recipe.fields.description, ""]
    rows = [("base", as_markdown(title), resolved.base_digest, as_markdown(stated["base"]))]
    roles = {name: f"brick `{name}`" for name in resolved.parents} | ({recipe.donor: "tokenizer"} if recipe.donor else {})
    rows += [
        (role, as_markdown(resolved.bricks[n].public_name), resolved.digests[n], as_markdown(stated[n]))
        for n, role in roles.items()
    ]
    rows += [
        (f"{n.kind} `{folder}`", as_markdown(n.name), n.digest(), "part of the base") for folder, n in _neurons(resolved).items()
    ]
    shown = ([role, name, f"`{digest[:12]}`", licence] for role, name, digest, licence in rows)
    lines += ["## Inputs", "", *markdown_rows(["role", "model", "digest", "license"], shown)]
    lines += _axes_table(resolved)
    if data := resolved.data_licences:
        trained = (
            [f"`{brick}`", as_markdown(renamed(name, recipe.project)), as_markdown(licence)] for brick, name, licence in data
        )
        lines += ["", *markdown_rows(["brick", "trained on", "license"], trained)]
    if warnings := record.get("warnings", resolved.warnings):
        lines += ["", *(f"- {_line(w)}" for w in warnings)]
    for step in record.get("steps", ()):
        if not step.get("blocks"):
            continue
        from workbench.grow.expansion.records import stack_parts

        if layers := [[part, as_markdown(source)] for part, source in stack_parts(step)]:
            lines += ["", f"## Layers of `{step['id']}`", "", *markdown_rows(["part", "source"], layers)]
    if grown := [step for step in record.get("steps", ()) if "check" in step or "grow" in step]:
        from workbench.grow.expansion.records import GrowthCheck, removal_line

        found = [f"- `{step['id']}`: {text}" for step in grown if (text := removal_line(step))]
        found += [f"- `{step['id']}`: {GrowthCheck.model_validate(step['check']).line()}" for step in grown if "check" in step]
        lines += ["", "## Growth", "", *found] if found else []
    if recipe.fields.output.config:
        rows_of_config = ([f"`{name}`", as_markdown(yamldoc.flow(value))] for name, value in recipe.fields.output.config.items())
        lines += ["", *markdown_rows(["changed in config.json", "value"], rows_of_config)]
    if found := record["output"].get("packing"):
        lines += ["", f"Stored as the base: {Packing.model_validate(found).line()}."]
    if recipe.fields.output.form == "checkpoint":
        library, call = ("sentence_transformers", loader) if sentences else ("transformers", f"{loader}.from_pretrained")
        code = ["```python", f"from {library} import {loader}", "", f'model = {call}("DIRECTORY")', "```"]
        lines += ["", "## Loading", "", *code]
    lines += _routing(resolved, record)
    if said := record.get("said"):
        told = {name: _line(FactsSaid.model_validate(row).in_words) for name, row in said.items()}
        lines += ["", "## Facts", "", *(f"- `{name}`: the model says {text}" for name, text in told.items())]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe_text)), default=0))
    versions, digest = record["versions"], record["output"]["digest"]
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe_text.strip(), fence, "", "## Provenance", ""]
    lines += [
        f"{'Adapter' if adapter else 'Configuration'} digest `{digest}`, recipe key `{resolved.key}`, made with brick-workbench "
        f"{versions['brick-workbench']} on torch {versions['torch']}.",
        "",
    ]
    return without_paths("\n".join(lines), recipe.project, written)


def _metadata(resolved: Resolved, loader: str) -> dict[str, object]:
    """Return the header of a card, for a model that a class of transformers loads."""
    recipe, licences = resolved.recipe, set(resolved.licences.values())
    verbs = sorted({step.verb for step in recipe.steps})
    library = "sentence-transformers" if sentence_class(resolved.base_path) == loader else "transformers"
    base = recipe.fields.base_name if resolved.base_revision else None
    bricks = {name: resolved.bricks[name].revision for name in resolved.parents}
    bases = hub_ids(base, recipe.fields.model_dump(mode="json")["bricks"], bricks)
    relation = "merge" if "merge" in verbs else "adapter" if recipe.router else "finetune"
    licence = licence_fields(licences.pop() if len(licences) == 1 else "other") if licences != {"unknown"} else {}
    return {
        "library_name": "peft" if recipe.fields.output.form == "adapter" else library,
        **({"pipeline_tag": tag} if (tag := _TASKS.get(loader)) else {}),
        **({"base_model": bases} if bases else {}),
        "base_model_relation": relation,
        "tags": [*verbs, "brick-workbench"],
        **{name: value for name, value in licence.items() if value},
    }


def hub_ids(base: str | None, references: object, revisions: Mapping[str, str | None]) -> list[str]:
    """Return `base_model` of a card: hub ids, because the hub refuses others, of the base, if it has one, and of bricks with a commit."""
    refs = references if isinstance(references, Mapping) else {}
    ids = [base, *(_target(refs.get(name)) for name, revision in revisions.items() if revision)]
    return list(dict.fromkeys(name.partition("@")[0] for name in ids if name))


def _target(ref: Any) -> str | None:
    """Return the directory or hub id that a recipe's brick names."""
    if isinstance(ref, Mapping):
        return next((str(ref[key]) for key in ("adapter", "checkpoint", "brick", "path") if ref.get(key)), None)
    return str(ref) if ref else None


def licence_fields(licence: str) -> dict[str, object]:
    """Return the fields of a card's header that state a license; the hub refuses an identifier that it does not know."""
    known = licence.lower() in _HUB_LICENCES
    return {"license": licence.lower() if known else "other", "license_name": None if known else licence}


def with_header(text: str, fields: Mapping[str, object]) -> str:
    """Return a card with fields of its YAML header set, or left out where the value is None; the rest is unchanged."""
    match = HEADER.match(text)
    header, rest = (match[1], text[match.end() :]) if match else ("", text)
    for name, value in fields.items():
        header = re.sub(rf"^{re.escape(name)}:.*\n(?:[ \t-].*\n|\n)*", "", header, flags=re.MULTILINE)
        if value is not None:
            header += yamldoc.dump({name: value})
    return f"---\n{header}---\n{rest}"


def _routing(resolved: Resolved, record: dict[str, Any]) -> list[str]:
    """Return how the result chooses among its bricks, and how it is loaded; empty without a router."""
    step = resolved.recipe.router
    if step is None:
        return []
    names = ", ".join(f"`{name}`" for name in resolved.recipe.used_bricks(step))
    rest = "" if step.name == "fixed" else ", and leaves prompts that are unlike all of their calibration prompts to the base"
    lines = ["", "## Routing", "", f"The router `{step.name}` chooses among {names} for each prompt{rest}."]
    measured = record["steps"][-1].get("router", {}) if record.get("steps") else {}
    accuracy = measured.get("accuracy", {}).get("held_out_templates", {}).get("plain")
    if isinstance(accuracy, (int, float)):
        lines[-1] += (
            f" On calibration prompts whose template it had not seen, it chose the right brick for {100 * accuracy:.1f} %."
        )
    return [
        *lines,
        "",
        "```python",
        "import workbench",
        "",
        'model = workbench.load("DIRECTORY")  # forward and generate choose bricks; model.routing says which',
        "```",
    ]


def _neurons(resolved: Resolved) -> dict[str, NeuronSet]:
    """Return directory -> set of neurons, for the sets that steps use."""
    named = [named[1] for step in resolved.recipe.steps if (named := step.neuron_set())]
    return {folder: resolved.neurons(folder) for folder in dict.fromkeys(named)}


def _axes_table(resolved: Resolved) -> list[str]:
    """Return a table of the axes of the bricks and sets of neurons; empty if there are none."""
    axes = {name: resolved.on_disk[name].axes for name in resolved.parents if name in resolved.on_disk}
    axes |= {
        folder: axes_of("neurons", Axes(), experts=neurons.kind == "experts") for folder, neurons in _neurons(resolved).items()
    }
    if not axes:
        return []
    names = list(Axes.model_fields)
    rows = ([f"`{brick}`", *(values[name].replace("_", " ") for name in names)] for brick, values in axes.items())
    return ["", *markdown_rows(["brick", *names], rows)]


def _line(warning: str) -> str:
    """Return a warning as one line without HTML, because it can contain names from other people's files."""
    return " ".join(printable(warning).split()).replace("<", "\\<")
