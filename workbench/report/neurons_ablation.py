"""The section of ablations on the page of a model's neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from workbench.report.numbers import MISSING, fixed
from workbench.report.sections import Section
from workbench.report.tints import CHANGES, TintedTable, Tints, tinted

_TITLES = {
    "random": "Control: random neurons",
    "matched": "Control: random neurons of the same mean activation",
    "shuffled": "Control: neurons chosen by a shuffled label",
}
_PUBLISHED = "The paper's matrices have 6 of 7 (Llama-3-8B) and 7 of 7 dominant rows (Mistral-7B), and a coupling of 0.08 and 0.06 by this definition."


def ablation_section(document: Mapping[str, Any]) -> Section:
    """Return the section of the damage matrix and its controls."""
    names, controls = document["functions"], document["controls"]
    share = 100 * document["share"]
    within = document.get("between")
    ranged = {"the sets, within the range": within} if within else {}
    tables = {"the functions' sets": document, **ranged, **{kind: controls[kind] for kind in controls}}
    rows = [
        [name, f"{table['dominant_rows']} of {len(names)}", _coupling(table), _exceeds(table, names)]
        for name, table in tables.items()
    ]
    lead = [
        f"Each function's {share:g} % of the neurons are switched off, and the perplexity of every function is measured on "
        f"{document['items']} texts of tasks that did not choose them.",
        _claim(document),
        *([_range_claim(document, within)] if within else []),
        _PUBLISHED,
    ]
    matrices = [
        _matrix(
            "The functions' sets",
            document,
            names,
            f"mean overlap of two sets {document['overlap']['mean']:.2f}, by chance {document['overlap']['chance']:.2f}",
        )
    ]
    if within:
        matrices.append(_matrix("The functions' sets, within the range", within, names, ""))
    matrices += [_matrix(_TITLES[kind], table, names, "") for kind, table in controls.items()]
    return Section(
        "ablation",
        "Ablation",
        lead,
        ["switched off", "own function harmed most", "coupling", "sets harm their own function more"],
        rows,
        {
            "own function harmed most": "rows whose diagonal is the largest number",
            "coupling": "median over rows of the mean of the others divided by the diagonal, with its 95 % interval over tasks",
            "sets harm their own function more": "functions whose set harms them more than this control in 95 % of the resamplings",
        },
        (),
        (),
        matrices,
        [
            "Numbers: change of perplexity in percent, (PPL off − PPL) / PPL. A row is a set that is switched off, a column a function that is "
            "measured; tints are on a logarithmic scale, the same for all pages."
        ],
    )


def _claim(document: Mapping[str, Any]) -> str:
    names, dominant = document["functions"], document["dominant"]
    yes = [name for name, own in zip(names, dominant, strict=True) if own]
    no = [name for name, own in zip(names, dominant, strict=True) if not own]
    text = f"{len(yes)} of {len(names)} sets harm their own function most"
    if no:
        text += f"; not so those of {', '.join(no)}"
    matched = document["controls"].get("matched")
    if matched is not None:
        text += f". Of random neurons with the same mean activation, {matched['dominant_rows']} of {len(names)} do"
    return text + "."


def _range_claim(document: Mapping[str, Any], within: Mapping[str, Any]) -> str:
    """Return what a range of activation keeps of the damage to the own function and of the damage to others, as medians."""
    low, high = within["range"]
    everywhere, ranged = _medians(document), _medians(within)
    return (
        f"Switched off only while its activation lies between {fixed(low, 1)} and {fixed(high, 1)} standard deviations from its mean on the "
        f"function's own texts, a set changes the perplexity of its own function by {_percent(ranged[0])} % (everywhere: {_percent(everywhere[0])} %) "
        f"and that of other functions by {_percent(ranged[1])} % (everywhere: {_percent(everywhere[1])} %), as medians."
    )


def _medians(table: Mapping[str, Any]) -> tuple[float, float]:
    """Return the medians of the diagonal and of the other entries, in percent; infinite entries count as the largest."""
    cells = [(i == j, math.inf if v is None else 100 * v) for i, row in enumerate(table["changes"]) for j, v in enumerate(row)]
    return median(v for own, v in cells if own), median(v for own, v in cells if not own)


def _coupling(table: Mapping[str, Any]) -> str:
    if table["coupling"] is None:
        return MISSING
    low, high = table["interval"]
    return f"{table['coupling']:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def _exceeds(table: Mapping[str, Any], names: list[str]) -> str:
    if "exceeds" not in table:
        return ""
    return f"{sum(share >= 0.95 for share in table['exceeds'])} of {len(names)}"


def _matrix(title: str, table: Mapping[str, Any], names: list[str], caption: str) -> TintedTable:
    values = [(name, [100 * (v or 0.0) for v in row]) for name, row in zip(names, table["changes"], strict=True)]
    if all(row == values[0][1] for _, row in values):  # one set is the control of all functions
        values = [("all functions", values[0][1])]

    def within(row: int, column: int) -> tuple[float, float] | None:
        """Return a range that holds the value if its interval includes 0; older documents have no intervals."""
        low, high = (table.get(key) for key in ("low", "high"))
        if not low or not high or low[row][column] is None or low[row][column] > 0:
            return None
        return (-math.inf, math.inf) if high[row][column] is None or high[row][column] >= 0 else None

    neutral = "the 95 % interval includes 0, or the change is below 1 %"
    return tinted(title, caption, "off", names, values, Tints(_percent, CHANGES, " %", neutral, within))


def _percent(value: float) -> str:
    return f"{value:,.0f}".replace("-", "−")
