"""`eval`, `compare` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli._options import (
    BaselineOpt,
    BatchOpt,
    DeviceOpt,
    JsonOpt,
    LimitOpt,
    QuietOpt,
    RunsOpt,
    SetOpt,
    SubjectsArg,
    SuiteOpt,
    VerboseOpt,
)
from workbench.cli._output import out
from workbench.cli._subjects import compare_scores, eval_command, imported_scores, open_subjects
from workbench.cli.run import relative
from workbench.errors import WorkbenchError, nearest

if TYPE_CHECKING:
    from workbench.compare import Comparison
    from workbench.scores import Scores


def evaluate(
    names: SubjectsArg, settings: SetOpt = None, suite: SuiteOpt = None, baseline: BaselineOpt = None, device: DeviceOpt = "auto",
    batch_size: BatchOpt = 32, limit: LimitOpt = None,
    controls: Annotated[bool, typer.Option(help="Score the base, each brick alone and their average too.")] = True,
    runs_dir: RunsOpt = None, json: JsonOpt = False, quiet: QuietOpt = False, verbose: VerboseOpt = False,
) -> None:  # fmt: skip
    """Score recipes and models with lm-eval, and the recipes' controls once. Scores are kept by content: nothing is scored twice.

    A finished run of a recipe gets the scores into its README.md.
    """
    from workbench.controls import score_all
    from workbench.engine import pick_device
    from workbench.scorecard import card_scores

    out.quiet, out.verbose = quiet or json, verbose
    opened = open_subjects(names, settings, suite, runs_dir, controls, batch_size, limit, fetch=True)
    against = opened.baseline(baseline)
    if baseline and against not in (known := [entry.name for entry in opened.entries]):  # before anything is scored
        raise WorkbenchError(f"--baseline {baseline} is not among what is scored. {nearest(baseline, known)}", None, 2)
    scores = score_all(opened.entries, opened.plans, opened.store, device=pick_device(device), events=out.event)
    recipes_alone = not controls and baseline is None and any(e.resolved.recipe.path for e in opened.entries)
    comparison = None
    if len(opened.entries) > 1 and not recipes_alone:
        comparison = compare_scores(opened.store, scores, against, opened.project)
    for card in card_scores(opened.entries, scores, comparison, opened.runs):
        out.say(f"scores put into {relative(card)}")
    if json:
        out.json(_documents(scores))
    else:
        _table(comparison, scores)


def compare(
    names: SubjectsArg, settings: SetOpt = None, suite: SuiteOpt = None, baseline: BaselineOpt = None, batch_size: BatchOpt = 32, limit: LimitOpt = None,
    runs_dir: RunsOpt = None, json: JsonOpt = False,
) -> None:  # fmt: skip
    """Compare what is scored, paired item by item: recipes, models, or imported runs of --suite. Exit 3 if one that is named is
    worse than the baseline on a primary metric."""
    from workbench.controls import stored

    if imported := imported_scores(names, suite, runs_dir):
        scores, store, project = imported
        named = [s.configuration.name for s in scores]
        found = compare_scores(store, scores, baseline or named[0], project)
    else:
        opened = open_subjects(names, settings, suite, runs_dir, True, batch_size, limit)
        scores, missing = stored(opened.entries, opened.plans, opened.store)
        named = [e.name for e in opened.entries if e.role == "configuration"]
        against = opened.baseline(baseline)
        if lacking := [name for name in missing if name in named or name == (against or "base")]:
            raise WorkbenchError(
                f"not scored yet on {', '.join(p.suite.suite for p in opened.plans)}: {', '.join(lacking)}",
                eval_command(names, suite, settings, limit, batch_size),
            )
        found = compare_scores(opened.store, scores, against, opened.project)
    document = found.document()
    if json:
        out.json({"baseline": document["baseline"], "rows": document["rows"]})
    else:
        _rows(document)
    if any(row.configuration in named for row in found.worse):
        raise typer.Exit(3)


def report(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes, models or imported runs to show; default: all of recipes/ that are scored, or all runs of an imported --suite.", show_default=False)] = None,
    settings: SetOpt = None, suite: SuiteOpt = None, baseline: BaselineOpt = None,
    to: Annotated[Path, typer.Option("-o", "--out", help="The HTML file; .md and .json go beside it.")] = Path("reports/report.html"),
    batch_size: BatchOpt = 32, limit: LimitOpt = None, runs_dir: RunsOpt = None, quiet: QuietOpt = False,
) -> None:  # fmt: skip
    """Write the comparison as one offline HTML page, Markdown and JSON."""
    from workbench.controls import stored
    from workbench.report import render

    out.quiet = quiet
    if imported := imported_scores(names or [], suite, runs_dir):
        scores, store, project = imported
        against: str | None = baseline or scores[0].configuration.name
    else:
        every = names or [str(p) for p in sorted(Path("recipes").glob("*.yaml"))]
        if not every:
            raise WorkbenchError("no recipes/ here and none given", "workbench report recipes/NAME.yaml", 2)
        opened = open_subjects(every, settings, suite, runs_dir, True, batch_size, limit, lenient=not names)
        scores, missing = stored(opened.entries, opened.plans, opened.store)
        hint = eval_command(names or [], suite, settings, limit, batch_size)
        if names and (lacking := [e.name for e in opened.entries if e.name in missing and e.role == "configuration"]):
            raise WorkbenchError(f"not scored yet: {', '.join(lacking)}", hint)
        if not scores:
            raise WorkbenchError("nothing is scored yet", hint)
        if missing:
            out.say(f"not scored on every suite: {', '.join(missing)}")
        store, project, against = opened.store, opened.project, opened.baseline(baseline)
    document = compare_scores(store, scores, against, project).document()
    for path in render(document, to):
        out.line(str(relative(path)))


def _table(comparison: Comparison | None, scores: list[Scores]) -> None:
    """One row a configuration: its primary scores with intervals, and what the comparison says of them."""
    if comparison is None:
        out.table(["configuration", "task", "metric", "n", "score", "95 %"], [
            [s.configuration.name, task, metric, str(t.n), f"{m.value:.3f}", f"{m.low:.3f}-{m.high:.3f}"]
            for s in scores for task, t in s.tasks.items() for metric, m in t.metrics.items()], right=(3, 4, 5))  # fmt: skip
        return
    document = comparison.document()
    tasks = document["tasks"]
    verdict = {(r["configuration"], r["task"]): r["verdict"] for r in document["rows"]}
    rows = []
    for c in document["configurations"]:
        cells = [c["name"], _interval(c["mean"])]
        for task in tasks:
            found = c["scores"].get(task["task"])
            mark = {"better": " +", "worse": " -"}.get(verdict.get((c["name"], task["task"]), ""), "  ")
            cells.append(_interval(found) + mark if found else "")
        cells.append(_interval(c["kept_mean"]))
        rows.append(cells)
    heads = ["configuration", "mean", *(f"{t['task']} (n={t['n']})" for t in tasks), "kept"]
    out.table(heads, rows, right=range(1, len(heads)))
    out.say(
        f"scores in %, 95 % intervals; mean over skills, chance-corrected; kept: share of the best parents' skills; "
        f"+ better, - worse than {document['baseline']} (Holm over {document['family']['size']} comparisons)"
    )
    for warning in document["warnings"]:
        out.warn(warning)


def _interval(found: dict[str, Any] | None) -> str:
    if not found or found.get("value") is None:
        return ""
    value, low, high = (100 * found[k] if found.get(k) is not None else None for k in ("value", "low", "high"))
    return f"{value:.0f}" if low is None or high is None else f"{value:.0f} [{low:.0f}, {high:.0f}]"


def _rows(document: dict[str, Any]) -> None:
    out.table(
        ["configuration", "task", "metric", "diff", "95 %", "adjusted", "p adj", "n", "verdict"],
        [[r["configuration"], r["task"], r["metric"], f"{100 * r['diff']:+.1f}", _range(r["low"], r["high"]), _range(r["low_adj"], r["high_adj"]),
          "" if r["p_adj"] is None else f"{r['p_adj']:.3g}", str(r["n"]), r["verdict"] + (f" (needs about n = {r['needs']})" if r.get("needs") else "")]
         for r in document["rows"]], right=range(3, 8))  # fmt: skip
    out.say(
        f"differences in points against {document['baseline']}; {document['family']['text']}; Holm at {document['family']['alpha']}"
    )


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def _documents(scores: list[Scores]) -> Any:
    """The `eval --json` documents: one a suite, a list where there are several."""
    found: dict[str, dict[str, Any]] = {}
    for s in scores:
        document = found.setdefault(s.plan, {"suite": s.suite, "plan": s.plan, "configurations": []})
        document["configurations"].append({
            "name": s.configuration.name, "digest": s.configuration.digest,
            "tasks": {t: {"n": r.n, **{m: {"value": v.value, "low": v.low, "high": v.high} for m, v in r.metrics.items()}}
                      for t, r in s.tasks.items()}})  # fmt: skip
    return next(iter(found.values())) if len(found) == 1 else list(found.values())
