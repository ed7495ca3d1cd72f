"""Scores in the README.md of a finished run: a section for readers and `model-index` metadata for the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from workbench.compare.comparison import Comparison
from workbench.compare.differences import Difference
from workbench.evaluate.lineup import LineupEntry
from workbench.ground.files import write_bytes
from workbench.ground.manifest import changing, described
from workbench.ground.tables import as_markdown, markdown_rows
from workbench.run.card import with_header
from workbench.run.directory import run_for
from workbench.scores.store import Scores

BEGIN, END = "<!-- scores:begin -->", "<!-- scores:end -->"
_SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)


def card_scores(
    entries: Sequence[LineupEntry],
    scores: Sequence[Scores],
    comparison: Comparison | None,
    runs: Path,
    warn: Callable[[str], None],
) -> list[Path]:
    """Write the scores of recipes into the README.md of their finished runs, and seal them again.

    A run is updated only if its recorded configuration has the digest that was scored. Partial scores are not written.

    Args:
        entries: The scored configurations.
        scores: Their scores.
        comparison: Comparison whose differences and verdicts the section shows, if there is one.
        runs: Folder of the runs.
        warn: Hears of runs whose files are not as written, which are left alone.

    Returns:
        The README.md files that hold the scores now.
    """
    by_entry: dict[str, list[Scores]] = {}
    for s in scores:
        by_entry.setdefault(s.configuration.name, []).append(s)
    written = []
    for entry in entries:
        complete = [s for s in by_entry.get(entry.name, []) if not s.partial]
        if entry.role != "configuration" or entry.resolved.recipe.path is None or not complete:
            continue
        run = run_for(runs, entry.resolved.recipe.name, entry.resolved.run_key)
        is_adapter = entry.resolved.recipe.fields.output.form == "adapter"  # its record has the adapter's digest; the key decides
        if not run.done or not (is_adapter or run.digest == complete[0].configuration.of_weights):
            continue
        if found := run.harm():
            warn(f"{run.path}: {described(found)}; its card gets no scores. Run its recipe again: the broken run is moved aside.")
            continue
        card = (run.adapter if is_adapter else run.model) / "README.md"
        if card.is_file():
            before = card.read_text("utf-8")
            after = with_scores(before, entry.name, complete, comparison)
            if after != before:
                with changing(card.parent, [card.name]):
                    write_bytes(card, after.encode())
            written.append(card)
    return written


def with_scores(text: str, name: str, scores: Sequence[Scores], comparison: Comparison | None) -> str:
    """Return a card with these scores in place of earlier ones; the rest is unchanged, byte for byte."""
    body = _SECTION.sub("\n", text).rstrip("\n") + "\n"
    if body.startswith("---\n"):
        body = with_header(body, model_index(name, scores))
    return f"{body}\n{BEGIN}\n" + "\n".join(_section(scores, comparison)) + f"\n{END}\n"


def model_index(name: str, scores: Sequence[Scores]) -> dict[str, Any]:
    """Return Hugging Face's `model-index` metadata, with one result per task."""
    results = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"name": f"{task} (suite {s.suite})", "type": task},
            "metrics": [
                {"type": metric, "value": round(m.value, 6), "name": f"{metric}, {t.n} items"} for metric, m in t.metrics.items()
            ],
        }
        for s in scores
        for task, t in s.tasks.items()
    ]
    return {"model-index": [{"name": name, "results": results}]}


def _section(scores: Sequence[Scores], comparison: Comparison | None) -> list[str]:
    """Return the lines of the README's section on scores."""
    rows = _rows(scores[0].configuration.digest, comparison)
    against = comparison.baseline if comparison else ""
    heads = ["task", "metric", "items", "score", *([against, "difference", "verdict"] if rows else [])]
    cells = []
    for s in scores:
        for task, t in s.tasks.items():
            for metric, m in t.metrics.items():
                line = [as_markdown(task), as_markdown(metric), str(t.n), _range(m.value, m.low, m.high)]
                if row := rows.get((task, metric)):
                    line += [f"{row.baseline_value:.3f}", _range(row.diff, row.low_adj, row.high_adj, "+"), _verdict(row)]
                cells.append([*line, *[""] * (len(heads) - len(line))])
    text = "Scores with 95 % intervals that account for clusters of items."
    if rows and comparison:
        family = comparison.family
        correction = "step-down max-T" if family.correction == "max-t" else "no correction"
        text += (
            f" Differences against {against} are paired by item, with adjusted intervals that decide the verdict "
            f"({correction} at {family.alpha:g}; {family.text})."
        )
        if any(row.tolerance is not None for row in rows.values()):
            text += " Safe: the interval, adjusted for all guarded comparisons, includes no loss as large as the tolerance."
    plans = ", ".join(f"`{s.plan[:12]}` ({s.suite})" for s in scores)
    text += f" Plan {plans}, lm-eval {scores[0].versions.get('lm_eval', '')}."
    return ["## Scores", "", *markdown_rows(heads, cells, left=2), "", text]


def _rows(digest: str, comparison: Comparison | None) -> dict[tuple[str, str], Difference]:
    """Return the comparison's rows of a configuration, which may have the name of another one with equal weights."""
    if not comparison:
        return {}
    names = {c.name for c in comparison.configurations if c.digest == digest}
    return {(row.task, row.metric): row for row in comparison.rows if row.configuration in names}


def _verdict(row: Difference) -> str:
    """Return the verdict, with the tolerance if the verdict depends on it."""
    decided = row.tolerance is not None and row.verdict != "no item changed"
    return f"{row.verdict} (tolerance {row.tolerance:g})" if decided else row.verdict


def _range(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    ends = "" if low is None or high is None or not math.isfinite(high - low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return "" if value is None else f"{value:{sign}.3f}{ends}"
