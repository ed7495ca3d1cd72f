"""Tables of docs/growing-results.md and docs/carrying.md: what growth costs, how grown models score, and how carried adapters do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cells import block, interval, points, signed, table

COST, STARTER = "benchmarks/results/grow-M.json", "benchmarks/results/starter-grow.json"
SPLIT = "benchmarks/results/split-ffn.json"
BRICKS = "benchmarks/results/transplant-bricks.json"
PRUNE, PRUNE_FIGURE = "benchmarks/results/prune.json", "growing-pruned.svg"


@block("grow-cost", COST)
def cost_block(found: dict[str, Any]) -> str:
    """Bytes, seconds and memory of every operator, beside the floor and mergekit."""
    rows = []
    for row in found["rows"]:
        ours, checked, theirs = row["unchecked"], row["checked"], row.get("mergekit")
        rows.append(
            [
                row["operator"],
                _giga(row["bytes"]),
                f"{ours['cpu']:.1f}",
                f"{checked['cpu']:.1f}",
                f"{row['floor']['cpu']:.1f}",
                _giga(checked["peak"]),
                f"{theirs['cpu']:.1f}" if theirs else "",
                _giga(theirs["peak"]) if theirs else "",
                f"{row['ratio']:.1f}" if theirs else "",
            ]
        )
    heads = [
        "operator",
        "writes, GB",
        "CPU s",
        "with `check: tensors`",
        "reading and writing alone, CPU s",
        "peak, GB",
        "mergekit, CPU s",
        "mergekit, peak, GB",
        "ratio of CPU s",
    ]
    note = f"The base has {_giga(found['base_bytes'])} GB; one core, start-up included; the ratio is of `check: off`, the peak of `check: tensors`."
    return table(heads, rows, left=1) + f"\n\n{note}"


def _giga(count: float) -> str:
    return f"{count / 1e9:.2f}"


@block("grow-starter", STARTER)
def starter_block(found: dict[str, Any]) -> str:
    """Models that grow from two skills beside merges of the same bricks."""
    tasks = [t["task"] for t in found["tasks"] if t["role"] in ("skill", "retention")]
    primary = {t["task"]: t["metric"] for t in found["tasks"]}
    cells: dict[tuple[str, str], dict[str, Any]] = {
        (r["configuration"], r["task"]): r for r in found["rows"] if r["metric"] == primary.get(r["task"])
    }
    rows = []
    for shown in found["configurations"]:
        name, kept = shown["name"], shown["kept"]
        rows.append(
            [
                f"`{name}`",
                *(_score(cells, found, name, task) for task in tasks),
                *(interval(kept.get(b)) for b in ("add", "reverse")),
            ]
        )
    note = (
        "Scores in percent with 95 % intervals, all items; kept: the share of a brick's own gain over the base. `starter-two` is the sum of `add` and "
        "`reverse`, `starter-glossary` of the three."
    )
    return table(["configuration", *tasks, "kept of `add`", "kept of `reverse`"], rows, left=1) + "\n\n" + note


def _score(cells: dict[tuple[str, str], dict[str, Any]], found: dict[str, Any], name: str, task: str) -> str:
    """A configuration's score; the base's stands in the others' rows."""
    if (name, task) in cells:
        return points(cells[name, task]["value"])
    return points(next((r["baseline_value"] for r in found["rows"] if r["task"] == task), None))


@block("grow-split", SPLIT)
def split_block(found: dict[str, Any]) -> str:
    """Dense layers as experts without training."""
    rows = [["dense", "", "", "100 %", f"{found['perplexity']:,.1f}", ""]]
    for row in (row for row in found["rows"] if row["selector"] in _ROUTERS):
        low, high = row["shared"]
        rows.append(
            [
                f"`{row['method']}`",
                _ROUTERS[row["selector"]],
                str(low) if low == high else f"{low} to {high}",
                f"{points(row['captured'])} %",
                f"{row['perplexity']:,.1f}",
                f"{row['rise']:.2f} [{row['low']:.2f}, {row['high']:.2f}]".replace("-", "−"),
            ]
        )
    count = found["experts"]
    note = (
        f"{found['base'].capitalize()}, {count} experts of which a token uses {round((1 - found['sparsity']) * count)}, no training. Loss on "
        f"{found['data']['items']} texts of held-out tasks of {found['data']['file']}, whose other tasks calibrate; 95 % intervals over tasks. Mass: "
        f"share of |activation| times the norm of the output column that the selected experts have. {found.get('note', '')} "
    )
    heads = ["partition", "selector", "shared experts", "mass", "perplexity", "rise of the loss, nats"]
    return table(heads, rows) + f"\n\n{note}"


_ROUTERS = {
    "oracle": "oracle",
    "centroid": "`router: gate`",
    "ridge": "`router: ridge`",
}


@block("transplant-bricks", BRICKS)
def bricks_block(found: dict[str, Any]) -> str:
    """Bricks carried to siblings of their base: scores by way, beside training on the sibling with as many steps."""
    skills = found["skills"]
    lines = []
    for sibling in found["siblings"]:
        # The base and its bricks are the same for all siblings: their rows stand once.
        own = [row for row in found["rows"] if row["sibling"] == sibling]
        own = own if sibling == found["siblings"][0] else [row for row in own if row["way"] not in ("base", "brick")]
        for way in dict.fromkeys(row["way"] for row in own):
            rows = {skill: [r for r in own if (r["way"], r["skill"]) == (way, skill)] for skill in skills}
            some = [row for group in rows.values() for row in group]
            matched = [row["matched"] for row in some if "matched" in row]
            chance = [row["chance"] for row in some if "chance" in row]
            refused = sum(not row["above"] for row in some if "above" in row)
            kept = [
                sum(r["kept"] for r in group) / len(group)
                for group in rows.values()
                if group and group[0].get("kept") is not None
            ]
            lines.append(
                [
                    sibling,
                    _WAYS.get(way, f"`{way}`") + (f" ({refused} refused)" if refused else ""),
                    f"{_mean(matched):.2f} ({_mean(chance):.2f})".replace("-", "−") if matched else "",
                    *(_of_seeds(group) for group in rows.values()),
                    points(_mean(kept)) if kept else "",
                ]
            )
    note = (
        f"Scores in percent with 95 % intervals; of trainings the mean over {found['seeds']} seeds with their range. Matched: mean correlation of units on "
        f"held-out texts, in brackets with exchanged tokens (chance). Kept: mean over the bricks of the share of a brick's own gain. Trained: {found['steps']} steps "
        f"on {found['texts']} texts of the skill, from the way with the lowest loss on held-out texts, or from a new adapter. {found.get('note', '')} "
    )
    heads = ["sibling", "way", "matched", *skills, "kept"]
    return table(heads, lines) + f"\n\n{note}"


@block("grow-prune", PRUNE)
def prune_block(found: dict[str, Any]) -> str:
    """Models without a share of their layers, before and after training, in words of perplexity and retention."""
    rows = [["the model before", "", *_pruned_cells(found["before"]), "", "", "", ""]]
    for row in found["rows"]:
        pruned, trained = row["pruned"], row["trained"]
        difference = trained["difference"]
        rows.append(
            [
                _CHOICES.get(row["arm"], row["arm"]),
                ", ".join(map(str, row["gone"])),
                *_pruned_cells(pruned),
                *_pruned_cells(trained),
                f"{signed(difference['diff'])} [{signed(difference['low'])}, {signed(difference['high'])}]",
                f"{row['training_seconds'] / 60:,.0f}",
            ]
        )
    note = (
        f"{found['base'].capitalize()} without {len(found['rows'][0]['gone'])} of its {found['layers']} layers; perplexity on {found['texts']['held_out']} texts that neither chose "
        f"layers nor trained, retention in percent of {found['before']['retention']['n']} items with 95 % intervals. Training: {found['steps']} steps of "
        f"{found['batch_size']} texts of up to {found['length']} tokens, all parameters, on the distributions of the model before. Difference: points of "
        f"retention against the model before, paired by item, after training. Chosen on {found['texts']['calibration']} texts. "
        f"{found['note'] + ' ' if 'note' in found else ''}"
    )
    heads = ["removed by", "layers", "perplexity", "retention", "trained: perplexity", "retention", "difference", "CPU min"]
    picture = f"![Perplexity and retention of pruned models, before and after training]({PRUNE_FIGURE})"
    return f"{picture}\n\n{table(heads, rows)}\n\n{note}"


@block("grow-prune-neurons", "benchmarks/results/prune-neurons.json")
def neurons_block(found: dict[str, Any]) -> str:
    """Models without a share of their neurons, by several criteria, before and after training."""
    states = [("pruned", ""), *([("trained", "trained: ")] if found["steps"] else [])]
    heads = [f"{prefix}{name}" for _, prefix in states for name in ("perplexity", "other text", "retention")]
    rows = [["the model before", *_neuron_cells(found["before"]), *[""] * 3 * (len(states) - 1)]]
    rows += [
        [_FITS.get(row["arm"], row["arm"]), *(cell for name, _ in states for cell in _neuron_cells(row.get(name)))]
        for row in found["rows"]
    ]
    training = (
        f" Training: {found['steps']} steps of {found['batch_size']} texts of up to {found['length']} tokens, all parameters, on the distributions of the model before."
        if found["steps"]
        else ""
    )
    note = (
        f"{found['base'].capitalize()} without {points(found['share'])} % of the neurons of every layer, chosen on {found['calibration']} texts; perplexity on {found['held_out']} others of the "
        f"same kind and on the workbench's plain text, retention in percent of {found['before']['retention']['n']} items with 95 % intervals.{training}"
    )
    return f"{table(['chosen by', *heads], rows)}\n\n{note} "


def _neuron_cells(state: dict[str, Any] | None) -> list[str]:
    """Perplexity of texts of the kind that chose the neurons and of other text, and retention; nothing for what was not trained."""
    if state is None:
        return [""] * 3
    perplexity, retention = _pruned_cells(state)
    return [perplexity, f"{state['other']:,.1f}", retention]


_FITS = {"fitted": "`grow: prune`", "not fitted": "the same, outputs not fitted"}


def _pruned_cells(state: dict[str, Any]) -> list[str]:
    """Perplexity and retention of a model."""
    perplexity = state["perplexity"]
    text = f"{perplexity:,.1f}" if perplexity < 1000 else f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.1e}"
    return [text, interval(state["retention"])]


_CHOICES = {"influence": "`by: influence`", "perplexity": "`by: perplexity`", "last": "the last layers"}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _of_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """A score with its interval, or the mean over seeds with its range."""
    if len(rows) <= 1:
        return interval(rows[0]) if rows else ""
    values = [row["value"] for row in rows]
    return f"{points(_mean(values))} ({points(min(values))}–{points(max(values))})"


_WAYS = {
    "base": "the base",
    "brick": "the brick on its base",
    "sibling": "the sibling",
    "from the transplant": "best way, trained",
    "anew": "new adapter, trained",
}
