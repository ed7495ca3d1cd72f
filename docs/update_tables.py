"""Tables of docs/editing-streams.md, docs/editing.md, docs/forgetting.md and docs/editing-results.md: what edits change, and what they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cells import block, interval, points, signed, table

STREAM = "benchmarks/results/edit-stream.json"
STREAM_STARTER = "benchmarks/results/edit-stream-starter.json"
SEQUENCE = "benchmarks/results/edit-sequence.json"
STEER = "benchmarks/results/steer.json"
FORGETTING = "benchmarks/results/forgetting.json"
SETS = {"everyday-held": "everyday", "counterfact_1000": "CounterFact"}
"""Files of facts -> what their facts are called."""
STARTER = "bricks/starter/base"


@block("edit-stream", STREAM)
def stream_block(found: dict[str, Any]) -> str:
    """Write the table of a stream on the fixture."""
    return _stream(found)


@block("edit-stream-starter", STREAM_STARTER)
def starter_stream_block(found: dict[str, Any]) -> str:
    """Write the table of a stream on the starter base."""
    return _stream(found)


def _stream(found: dict[str, Any]) -> str:
    """Shares of facts that the model says after a number of rows, and perplexity; the cost of a row below."""
    start, *checkpoints = found["checkpoints"]
    lines = [
        [
            f"{p['rows']:,}",
            f"{p['facts']:,}",
            *(f"{100 * p[name]:.0f}" for name in ("latest", "all", "oldest")),
            f"{p['perplexity']:.2f}",
        ]
        for p in checkpoints
    ]
    windows, flat = found["windows"], found["flat"]
    costs = [row["both"] for row in windows]
    note = (
        f"`memit` on layer {found['layer']} of {_model(found['base'])}, {found['batch']} rows at a time; {found['updates']} of {found['rows']:,} rows update an earlier fact. Said: percent of facts. "
        f"Perplexity of other text was {start['perplexity']:.2f} before the stream. A row takes {min(costs):.3f} to {max(costs):.3f} CPU s; the last {windows[0]['rows']} rows take {flat['both']:.2f} times the first "
        f"full window. Peak memory: {windows[0]['peak'] / 1e6:.0f} to {windows[-1]['peak'] / 1e6:.0f} MB."
    )
    heads = ["rows", "facts", "latest batch said", "all said", "ten oldest said", "perplexity"]
    return table(heads, lines, left=0) + "\n\n" + note


def _model(base: str) -> str:
    return "the starter base" if base == "starter" else "a fixture of 0.6 M parameters"


@block("edit-sequence", SEQUENCE)
def sequence_block(found: dict[str, Any]) -> str:
    """Write what edits that are solved batch after batch say at their checkpoints."""
    kinds = ("efficacy", "oldest", "paraphrase", "neighbours")
    lines = [
        [f"`{name}`", f"{p['facts']:,}", *(interval(p[kind]) for kind in kinds), f"{p['perplexity']:.1f}"]
        for name, edit in found["edits"].items()
        for p in edit["checkpoints"][1 :: max(1, len(edit["checkpoints"]) - 2)]  # the first one and the last one
    ]
    base = next(iter(found["edits"].values()))["checkpoints"][0]
    note = (
        f"CounterFact facts, {found['batch']} at a time, layer {found['layer']} of the starter base; percent of prompts with 95 % intervals over facts. Oldest: the first "
        f"fifty. Perplexity of other text was {base['perplexity']:.1f} before."
    )
    heads = ["edit", "facts", "said", "oldest said", "paraphrases", "neighbours unchanged", "perplexity"]
    return table(heads, lines, left=1) + "\n\n" + note


@block("steer", STEER)
def steer_block(found: dict[str, Any]) -> str:
    """Write what a direction changes in continuations, by strength, and the accuracy on `retention` beside it."""
    tasks = list(found["rows"][0].get("retention", ()))
    lines = [
        [
            f"{row['direction']}{', with the LoRA `' + row['with'] + '`' if 'with' in row else ''}",
            f"{row['strength']:g}",
            "none said" if row["share"] is None else points(row["share"]),
            points(row["different_words"]),
            *(interval(row["retention"][task]["acc"]) for task in tasks),
        ]
        for row in found["rows"]
    ]
    counts = [f"{task} (n = {found['rows'][0]['retention'][task]['n']})" for task in tasks]
    note = (
        f"After layer {found['layer']} of the starter base, continuations of {found['tokens']} tokens, greedy. The share is that of capital letters among letters, or of bad words among good and bad ones; "
        f"different words are a share of all. All columns in percent."
    )
    return table(["direction", "strength", "share", "different words", *counts], lines, left=1) + "\n\n" + note


@block("forgetting", FORGETTING)
def forgetting_block(found: dict[str, Any]) -> str:
    """Capitals unlearned at several strengths; the chosen weights of each kind marked."""
    tasks = list(found["rows"][0]["scores"])
    heads = [f"{task} (n = {found['rows'][0]['scores'][task]['n']})" for task in tasks]
    rows = []
    for row in found["rows"]:
        weights = [f"{row[brick]:+g}".replace("-", "−") if row[brick] else "" for brick in ("learned", "kept")]
        rows.append([*weights, *(interval(row["scores"][task]) for task in tasks), "chosen" if row.get("chosen") else ""])
    note = "Scores in percent of items with 95 % intervals; the first row is the base."
    return table(["learned", "kept", *heads, ""], rows) + f"\n\n{note}"


def _scorecard(found: dict[str, Any]) -> str:
    """Scores of facts in adapters and neurons, marked where the paired difference from memit excludes 0, and CPU seconds a fact."""
    heads = {
        "efficacy": "said",
        "paraphrase": "paraphrases",
        "typo": "typo",
        "lower-case": "lower case",
        "behind-text": "behind text",
        "translated": "translated",
        "chat": "chat",
        "same-subject": "same subject",
        "neighbours-strict": "strict neighbours",
        "generated": "answer and stop",
        "retention": "retention",
    }
    tasks = [task for task in heads if task in found["rows"][0]["scores"]]
    count = found["rows"][0]["scores"][tasks[0]]["n"]
    lines = []
    for row in found["rows"]:
        cells = [f"{interval(row['scores'][task])}{_mark((row['against'] or {}).get(task))}" for task in tasks]
        step = "step" in row
        of_step = (
            [signed(row["perplexity_change"]), f"{100 * row['change']:,.0f}", f"{row['seconds'] / count:.1f}"]
            if step
            else [""] * 3
        )
        lines.append([row["row"], *cells, *of_step])
    note = (
        f"{_drawn(found)} on {_base(found)}. Percent of items with 95 % intervals over facts; + and − mark a paired difference "
        f"from memit whose interval excludes 0. Perplexity: change for other text in percent. ΔW: largest change of a matrix in percent of its norm. What an earlier row has solved is taken from the cache. "
    )
    return table(["arm", *(heads[task] for task in tasks), "perplexity", "ΔW", "CPU s a fact"], lines, left=1) + "\n\n" + note


for _name in ("edit-scorecard", "edit-everyday", "edit-gemma"):  # CounterFact, everyday facts, another base
    block(_name, f"benchmarks/results/{_name}.json")(_scorecard)


def _drawn(found: Mapping[str, Any]) -> str:
    """Say which facts were taught, and how many at once."""
    draws, count, name = found["draws"], found["count"], SETS.get(found.get("facts", ""), "CounterFact")
    return f"{count} {name} facts at once" if draws == 1 else f"{draws} draws of {count} {name} facts ({draws * count} in all)"


def _base(found: Mapping[str, Any]) -> str:
    return "the starter base" if found.get("base", STARTER) == STARTER else str(found["base"])


def _mark(difference: Mapping[str, float] | None) -> str:
    """Return the sign of a difference whose interval excludes 0."""
    if difference is None or difference["low"] <= 0 <= difference["high"]:
        return ""
    return " +" if difference["low"] > 0 else " −"
