"""Tables of docs/editing-streams.md, docs/editing.md, docs/forgetting.md and docs/editing-results-single.md: what edits change, and what they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cells import block, interval, points, signed, table

STREAM = "benchmarks/results/edit-stream.json"
STREAM_STARTER = "benchmarks/results/edit-stream-starter.json"
STEER = "benchmarks/results/steer.json"
FORGETTING = "benchmarks/results/forgetting.json"
PRESERVING = "benchmarks/results/edit-preserving.json"
ADAPTER = "benchmarks/results/edit-adapter.json"
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
        f"`memit` on layer {found['layer']} of {_model(found['base'])}, {found['batch']} rows at a time; {found['updates']} of {found['rows']:,} rows update an earlier fact. Said: percent of facts with "
        f"all tokens of the current target the most likely ones. Perplexity is that of other text, {start['perplexity']:.2f} before the stream. A row takes {min(costs):.3f} to {max(costs):.3f} CPU s in windows "
        f"of {windows[0]['rows']} rows; the last window takes {flat['both']:.2f} times the first full one, its solve {flat['solve']:.2f} times. Peak memory grows from {windows[0]['peak'] / 1e6:.0f} to "
        f"{windows[-1]['peak'] / 1e6:.0f} MB."
    )
    heads = ["rows", "facts", "latest batch said", "all said", "ten oldest said", "perplexity"]
    return table(heads, lines, left=0) + "\n\n" + note


def _model(base: str) -> str:
    return "the starter base" if base == "starter" else "a fixture of 0.6 M parameters"


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


@block("edit-preserving", PRESERVING)
def preserving_block(found: dict[str, Any]) -> str:
    """Scores of edits that preserve prompts, of their controls, and the paired differences from memit."""
    return _draws(found, [], {row["row"]: [] for row in found["rows"]})


@block("edit-adapter", ADAPTER)
def adapter_block(found: dict[str, Any]) -> str:
    """Scores of facts in adapters, of their controls, the paired differences from memit, and CPU seconds a fact."""
    facts = found["draws"] * found["count"]
    lines = {row["row"]: [f"{row['seconds'] / facts:.1f}" if "step" in row else ""] for row in found["rows"]}
    return (
        _draws(found, ["CPU s a fact"], lines)
        + " What an earlier row has solved is taken from the cache, and its seconds count there: values of memit, and neurons at subjects without ends."
    )


SENTENCE = {
    "memit": "`memit`",
    "patch at subjects, then ends": "`patch` at subjects and ends",
    "adapter from memit": "a LoRA from `memit`",
    "memory": "facts in the prompt",
}
"""Arms of the README's sentence, and their names in it."""


@block("edits", ADAPTER, cited=False)
def edits_block(found: dict[str, Any]) -> str:
    """The README's sentence about edits: what some arms say, keep and end."""
    scores = {row["row"]: row["scores"] for row in found["rows"]}
    tasks = ("efficacy", "paraphrase", "neighbours-strict", "generated")
    parts = [
        f"{name} {', '.join(points(scores[arm][task]['value']) for task in tasks)}"
        for arm, name in SENTENCE.items()
        if arm in scores
    ]
    facts = found["draws"] * found["count"]
    return f"Edits of {facts} CounterFact facts reach, in percent (said, said in unseen wordings, strict neighbours unchanged, answer and stop): {'; '.join(parts)} ([intervals](docs/editing-results-single.md#adapters-and-neurons))."


def _draws(found: dict[str, Any], further: list[str], cells_of: Mapping[str, list[str]]) -> str:
    """Return the table of a measurement on draws of facts.

    Args:
        found: The results.
        further: Heads of further columns.
        cells_of: Arm -> its cells in these columns.
    """
    heads = {
        "efficacy": "said",
        "paraphrase": "paraphrases",
        "neighbours": "neighbours",
        "neighbours-strict": "strict neighbours",
        "generated": "answer and stop",
        "retention": "retention",
    }
    tasks = [task for task in heads if task in found["rows"][0]["scores"]]
    lines = []
    for row in found["rows"]:
        cells = [interval(row["scores"][task]) for task in tasks]
        change = signed(row["perplexity_change"]) if "step" in row else ""
        lines.append([row["row"], *cells, change, *cells_of[row["row"]]])
        if row["against"]:
            lines.append(["", *(_difference(row["against"][task]) for task in tasks), "", *("" for _ in further)])
    count = next(iter(found["rows"][0]["scores"].values()))["n"]
    note = (
        f"{found['draws']} draws of {found['count']} CounterFact facts ({count} in all) on {_base(found)}. Percent of items with 95 % intervals over facts; below each row the paired "
        f"difference from memit, in points. {'The column perplexity' if further else 'The last column'} is the change of the perplexity of other text in percent."
    )
    return table(["arm", *(heads[task] for task in tasks), "perplexity", *further], lines, left=1) + "\n\n" + note


def _base(found: Mapping[str, Any]) -> str:
    return "the starter base" if found.get("base", STARTER) == STARTER else str(found["base"])


def _difference(found: Mapping[str, float]) -> str:
    return f"{signed(found['diff'])} [{signed(found['low'])}, {signed(found['high'])}]"
