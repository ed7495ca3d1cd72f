"""Rendering of a comparison document as HTML, Markdown and JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workbench.errors import printable
from workbench.files import write_bytes
from workbench.report import beside, costs, decision, flips, forest, guard, marks, numbers, routed, scatter, sweeps, wording
from workbench.report.edits import COHORTS, fact_suites, heading
from workbench.report.facts import created, facts, self_check, suites
from workbench.report.files import with_tables
from workbench.report.glossary import glossary
from workbench.report.markdown import markdown, tables
from workbench.report.reading import finite, view_of
from workbench.report.tints import DIFFERENCE
from workbench.report.view import View

ROLE_WORDS = {
    "base": "base",
    "brick": "brick alone",
    "average": "plain average",
    "memory": "facts in the prompt",
    "finetune": "fine-tuned on the facts",
    "adapter": "LoRA on the facts and paraphrases",
    "configuration": "configuration",
}
SCRIPTS = ("report.js", "downloads.js", "filter.js", "diff.js", "items.js", "flips.js", "beside.js")
FILTERED = 20
"""Rows of the summary table from which on it can be filtered by name and brick."""
SUFFIXES = (".html", ".md", ".json")


def render(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write <out>.html, <out>.md and <out>.json and return their paths in that order.

    Each file is replaced as a whole. The HTML page needs no other file and makes no request. The JSON file is the document, with NaN and
    infinities as null.

    Args:
        document: The comparison document.
        out: Path of the files; it may end in one of the three suffixes.
    """
    document = finite(document)
    view = view_of(document)
    return write_files(out, html(document, view), markdown(document, view), document)


def page_text(document: Mapping[str, Any]) -> str:
    """Return the HTML page of a comparison document as text."""
    document = finite(document)
    return html(document, view_of(document))


def write_files(out: Path, page: str, text: str, document: Mapping[str, Any]) -> list[Path]:
    """Write HTML, Markdown and the document as JSON under one name; `out` may end in one of the three suffixes."""
    texts = (page, text, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_name(stem(out) + suffix) for suffix in SUFFIXES]
    for path, content in zip(paths, texts, strict=True):
        write_bytes(path, content.encode())
    return paths


def stem(out: Path) -> str:
    """Return the name that the three files share."""
    return out.name.removesuffix(out.suffix) if out.suffix in SUFFIXES else out.name


def html(document: Mapping[str, Any], view: View, watched: int | None = None) -> str:
    """Return the page as text; the template escapes all values of the document.

    Args:
        document: The comparison document.
        view: Its view.
        watched: Number of the page of a report that a server shows while it grows (`report.watch`); None for a file.
    """
    flip_counts = flips.counts(document, view)
    base = view.configuration(view.baseline)
    front, sizes = scatter.retention_plot(view), scatter.size_plot(view)
    leading, many = decision.leading(view), len(view.judged) > decision.UNFOLDED or bool(view.sweeps)
    bricks = dict.fromkeys(brick for c in view.configurations for brick in c.parents)
    context = {
        "view": view,
        "watched": watched,
        "title": wording.title(view),
        "decision": decision.decision(view),
        "many": many,
        "front": front,
        "filtered": len(view.configurations) >= FILTERED,
        "filter_bricks": sorted(bricks),
        "harm": guard.harm_in_one(view) if view.recommendation and len(view.judged) > decision.SENTENCES else guard.harm(view),
        "headline": wording.headline(view),
        "scope": wording.scope(view),
        "summary": wording.summary(view),
        "findings": wording.findings(view),
        "without_average": wording.without_average(view),
        "missing": wording.missing_controls(view),
        "interference_text": wording.interference(view),
        "glossary": glossary(view),
        "panels": forest.panels(view, leading if many else None),
        "difference_matrix": marks.differences(view),
        "interference_matrix": marks.interference(view),
        "scatters": [sizes] if sizes else [],
        "self_check": self_check(view),
        "checked": any(c.checks for c in view.configurations),
        "diff_pair": wording.diff_pair(view),
        "own_units": any(t.unit.scale != numbers.POINTS.scale for t in view.tasks),
        "lower": [t.name for t in view.tasks if t.lower],
        "companions": " and ".join(dict.fromkeys(d.companion.metric for d in view.rows if d.companion)).capitalize(),
        "sized": {k: any(getattr(c, k) is not None for c in view.configurations) for k in ("parameters", "bytes")},
        "costs": {c.name: costs.cells(c.costs) for c in view.configurations},
        "cost_heads": list(zip(costs.HEADS, costs.NOTES, strict=True)),
        "costs_unknown": costs.unknown([{"name": c.name, "costs": c.costs} for c in view.configurations]),
        "kept_span": marks.kept_span(view),
        "mean_span": marks.mean_span(view),
        "baseline_mean": base.mean.value if base is not None and base.mean is not None else None,
        "forgotten": any(c.forgetting for c in view.configurations),
        "forgetting_span": marks.forgetting_span(view),
        "changing": [t for t in view.tasks if t.contrast is None],
        "correction": {role: wording.chance_correction(view, role) for role in ("skill", "retention")},
        "kept": [c for c in view.configurations if c.kept_mean or c.kept],
        "kept_tasks": [t for t in view.tasks if any(t.name in c.kept for c in view.configurations)],
        "flips": flip_counts,
        "packed": flips.pack(document, view),
        "first_flip": next((c.name for c in view.named if flip_counts.get(c.name)), next(iter(flip_counts), "")),
        "beside": beside.beside(document, view),
        "columns": 5 + len(view.tasks),
        "fact_suites": fact_suites(document, view),
        "swept": sweeps.figures(view),
        "seeds_alone": [sweeps.sentence(grid) for grid in sweeps.grids(view.sweeps) if not grid.across],
        "routed": routed.answered(document),
        "routed_heads": routed.HEADS,
        "routed_text": routed.shown,
        "advice": routed.advised(document),
        "facts": facts(view),
        "command": view.provenance.get("command"),
        "suites": suites(view),
        "created": created(view),
        "rank": lambda c: sum({"better": 1, "worse": -1}.get(d.word or "", 0) for d in view.compared(c.name, view.tasks)),
    }
    scripts = SCRIPTS if watched is None else (*SCRIPTS, "watch.js")
    styles = ("report.css", "curves.css", "beside.css")
    return with_tables(filled("report.html.j2", context, scripts, styles), tables(document, view))


def filled(template: str, context: Mapping[str, Any], scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Return a filled template as text, with the shared helpers of all reports and with scripts and styles inlined."""
    env = Environment(loader=PackageLoader("workbench.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    script = '"use strict";\n(() => {\n' + "".join(map(asset, scripts)) + "})();\n"
    parts = {
        "style": Markup("".join(map(asset, styles))),  # noqa: S704 - files of this package
        "script": Markup(script),  # noqa: S704 - files of this package
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return printable(env.get_template(template).render(context, **parts, **_helpers()))


def _helpers() -> dict[str, Any]:
    """Return the functions and constants that all templates use."""
    return {
        "points": numbers.POINTS,
        "percent": numbers.PERCENT,
        "about": numbers.about,
        "count": numbers.count,
        "p_value": numbers.p_value,
        "seconds": numbers.seconds,
        "small": numbers.small,
        "amount": numbers.amount,
        "size": numbers.size,
        "detectable": marks.detectable,
        "difference_scale": DIFFERENCE,
        "family": marks.family,
        "heading": heading,
        "cohort_words": COHORTS,
        "what": wording.what,
        "same_weights": wording.same_weights,
        "tip": marks.tip,
        "bracket": marks.bracket,
        "recipe_markup": marks.recipe_markup,
        "strip": marks.strip,
        "val": _value,
        "verdict_class": marks.verdict_class,
        "role_words": ROLE_WORDS,
    }


def _value(value: float | None, unit: numbers.Unit) -> Markup:
    """Return the attributes of a cell that CSV files are written from: the stored value and its unit."""
    return Markup('data-v="{}" data-unit="{}"').format("" if value is None else value, unit.stored)


def asset(name: str) -> str:
    """Return the text of a file in the templates folder."""
    return resources.files("workbench.report").joinpath("templates", name).read_text("utf-8")
