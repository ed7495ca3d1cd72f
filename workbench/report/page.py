"""The page of a comparison, and what the pages of all reports share."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import BytecodeCache, ChoiceLoader, Environment, PackageLoader, StrictUndefined, __version__
from jinja2.bccache import Bucket
from markupsafe import Markup

from workbench.compare.comparison import Comparison
from workbench.ground import numbers as words
from workbench.ground.errors import printable
from workbench.ground.files import read_memo, write_memo
from workbench.ground.project import remembered
from workbench.report import decision, forest, items, marks, methods, numbers, scatter, sweeps, wording
from workbench.report.edits import COHORTS, counted, fact_suites, heading
from workbench.report.files import with_tables
from workbench.report.markdown import tables
from workbench.report.provenance import checks, created, facts, glossary, self_check
from workbench.report.tints import DIFFERENCE

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
PACKAGE = "workbench.report"
FILTERED = 20
"""Rows of the summary table from which on it can be filtered by name and brick."""


@dataclass(frozen=True)
class Viewer:
    """What a page of `workbench view` has that a page in a file has not.

    Attributes:
        links: Name and path of each part of the viewer.
        place: Name of the part that the page belongs to.
        version: Number of a page that grows, which its stream of events compares with the newest; None for other pages.
    """

    links: Sequence[tuple[str, str]]
    place: str
    version: int | None = None


def html(view: Comparison, viewer: Viewer | None = None) -> str:
    """Return the page as text; the template escapes all values of the document.

    Args:
        view: The comparison.
        viewer: The viewer that shows the page; None for a file.
    """
    flip_counts = items.counts(view)
    base = view.configuration(view.baseline)
    front, sizes = scatter.retention_plot(view), scatter.size_plot(view)
    leading, many = decision.leading(view), len(view.judged) > decision.UNFOLDED or bool(view.sweeps)
    bricks = dict.fromkeys(brick for c in view.by_role for brick in c.parents)
    context = {
        **differences(view, leading if many else None),
        "viewer": viewer,
        "title": wording.title(view),
        "leaders": decision.leaders(view),
        "many": many,
        "front": front,
        "filtered": len(view.by_role) >= FILTERED,
        "filter_bricks": sorted(bricks),
        "harm": (wording.harm_in_one if view.recommendation and len(view.judged) > decision.SENTENCES else wording.harm)(view),
        "scope": wording.scope(view),
        "summary": wording.sentences(view),
        "without_average": wording.without_average(view),
        "withheld": wording.withheld(view),
        "missing": wording.missing_controls(view),
        "interference_text": wording.interference(view),
        "glossary": glossary(view),
        "methods": methods.paragraph(view),
        "bibtex": methods.bibtex(view),
        "difference_matrix": marks.differences(view),
        "interference_matrix": marks.interference(view),
        "scatters": [sizes] if sizes else [],
        "self_check": self_check(view),
        "checks": checks(view),
        "diff_pair": wording.diff_pair(view),
        "sized": {k: any(getattr(c, k) is not None for c in view.by_role) for k in ("parameters", "bytes")},
        "costs": {c.name: decision.cost_cells(c.costs) for c in view.by_role},
        "cost_heads": list(zip(decision.COST_HEADS, decision.COST_NOTES, strict=True)),
        "costs_unknown": decision.unknown_costs({c.name: c.costs for c in view.by_role}),
        "kept_span": marks.kept_span(view),
        "mean_span": marks.mean_span(view),
        "baseline_mean": base.mean.value if base is not None and base.mean is not None else None,
        "forgotten": any(c.forgetting for c in view.by_role),
        "forgetting_span": marks.forgetting_span(view),
        "changing": [t for t in view.tasks if t.contrast is None],
        "correction": {role: wording.chance_correction(view, role) for role in ("skill", "retention")},
        "kept": [c for c in view.by_role if c.kept_mean or c.kept],
        "kept_tasks": [t for t in view.tasks if any(t.name in c.kept for c in view.by_role)],
        "flips": flip_counts,
        "packed": items.pack(view),
        "first_flip": next((c.name for c in view.named if flip_counts.get(c.name)), next(iter(flip_counts), "")),
        "beside": items.beside(view),
        "columns": 5 + len(view.tasks),
        "fact_suites": fact_suites(view),
        "swept": sweeps.figures(view),
        "seeds_alone": [sweeps.sentence(grid) for grid in sweeps.grids(view) if not grid.across],
        "routed": decision.answered(view),
        "routed_heads": decision.ROUTED_HEADS,
        "routed_text": decision.share_text,
        "advice": decision.advised(view),
        "facts": facts(view),
        "command": view.provenance.command,
        "suites": view.provenance.suites,
        "created": created(view),
        "rank": lambda c: sum({"better": 1, "worse": -1}.get(d.verdict, 0) for d in view.compared(c.name, view.tasks)),
    }
    styles = ("report.css", "curves.css", "beside.css")
    return with_tables(filled("report.html.j2", context, SCRIPTS, styles), tables(view))


def differences(view: Comparison, leading: Container[str] | None = None) -> dict[str, Any]:
    """Return the template variables of the panels of differences; `leading` are the configurations that they show, None for all."""
    return {
        "view": view,
        "unit_of": lambda task: numbers.unit_of(view, task),
        "panels": forest.panels(view, leading),
        "own_units": any(numbers.unit_of(view, t.name).scale != numbers.POINTS.scale for t in view.tasks),
        "lower": [t.name for t in view.tasks if t.lower],
        "companions": " and ".join(dict.fromkeys(d.companion.metric for d in view.rows if d.companion)).capitalize(),
    }


def filled(
    template: str, context: Mapping[str, Any], scripts: Sequence[str], styles: Sequence[str], package: str = PACKAGE
) -> str:
    """Return a filled template as text, with the shared helpers of all reports and with scripts and styles inlined.

    Args:
        template: File name of the template.
        context: Its variables.
        scripts: File names of its scripts.
        styles: File names of its style sheets.
        package: Package whose folder `templates` has these files; what it lacks is one of the report's own.
    """
    context = {"viewer": None, **context}
    if context["viewer"] is not None:
        scripts, styles = (*scripts, "view.js"), (*styles, "view.css")
    script, digest = inlined(scripts, package)
    parts = {
        "style": Markup("".join(asset(name, package) for name in styles)),  # noqa: S704 - files of this package
        "script": Markup(script),  # noqa: S704 - files of this package
        "script_hash": digest,
    }
    return printable(_environment(package).get_template(template).render(context, **parts, **_helpers()))


def inlined(scripts: Sequence[str], package: str = PACKAGE) -> tuple[str, str]:
    """Return the script of a page with scripts of these file names, and its hash as a content security policy names it."""
    script = '"use strict";\n(() => {\n' + "".join(asset(name, package) for name in scripts) + "})();\n"
    return script, "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


class _Compiled(BytecodeCache):
    """Compiled templates in the user's cache, for jinja, which compiles one again if its text has another digest."""

    def load_bytecode(self, bucket: Bucket) -> None:
        """Read a compiled template, if there is one."""
        if memo := read_memo(_place(bucket), code=str):
            bucket.bytecode_from_string(base64.b64decode(memo["code"]))

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Write a compiled template, if that is possible."""
        with suppress(OSError):
            write_memo(_place(bucket), {"code": base64.b64encode(bucket.bytecode_to_string()).decode()})


def _place(bucket: Bucket) -> Path:
    """Return the file of a compiled template; its name has what decides the code besides the template's text."""
    return remembered("templates", f"{bucket.key}-{__version__}-escaped-trimmed")


@cache
def _environment(package: str) -> Environment:
    """Return the environment of a package's templates, which keeps compiled ones: a watched page is filled again and again."""
    loader = ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, PACKAGE))])
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found.bytecode_cache = _Compiled()
    found.filters["prose"] = marks.prose
    return found


def _helpers() -> dict[str, Any]:
    """Return the functions and constants that all templates use."""
    return {
        "points": numbers.POINTS,
        "percent": numbers.PERCENT,
        "about": words.about,
        "count": words.count,
        "p_value": words.p_value,
        "seconds": words.seconds,
        "small": words.small,
        "amount": words.amount,
        "size": words.size,
        "detectable": marks.detectable,
        "difference_scale": DIFFERENCE,
        "family": marks.family,
        "heading": heading,
        "cohort_words": COHORTS,
        "what": wording.what,
        "counted": counted,
        "nats": numbers.NATS,
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


def asset(name: str, package: str = PACKAGE) -> str:
    """Return the text of a file in the folder `templates` of a package, or of the report if the package lacks it."""
    own = resources.files(package) / "templates" / name
    return (own if own.is_file() else resources.files(PACKAGE) / "templates" / name).read_text("utf-8")
