"""Tables of the pages on search, memories, fusing and fact files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import BLOCKS, block, interval, points, signed, table
from stores import RUNS, STORES

WINNER = "benchmarks/results/search-winner.json"
SPEED = "benchmarks/results/search.json"
PARTS = {"compose": "weights", "score": "scoring", "load": "loading the base", "rest": "drawing, comparing, keeping"}


@block("search-winner", WINNER)
def winner_block(found: dict[str, Any]) -> str:
    """The winner of each search beside the best control, on test items."""
    heads = [
        "search",
        "seed",
        "winner",
        "best control",
        "winner, test",
        "control, test",
        "difference",
        "verdict",
        "optimism",
        "kept",
        "stopped early",
        "minutes",
    ]
    rows = [_winner(row) for row in found["rows"]]
    same = "equal" if all(row["same_bytes"] for row in found["rows"]) else "NOT equal"
    items = found["rows"][0]["items"]
    note = (
        f"Scores in percent, differences in points with 95 % intervals, paired by item. {found['trials']} candidates a search, "
        f"{items['search']} items to search; \"kept\" is the winner's share of the bricks' mean on their own tasks, in percent; minutes stand where no control had been scored before. Each winner's "
        f"recipe was run in a new process: the weights were {same} to those that were scored."
    )
    return table(heads, rows, left=4) + "\n\n" + note


def _winner(row: Mapping[str, Any]) -> list[str]:
    line, scores = row["against"], row["scores"]
    method, *weights = row["values"].values()
    test = line["test"]
    return [
        row["search"],
        str(row["seed"]),
        f"{method} {' '.join(f'{w:.2f}' for w in weights)}",
        row["control"].removeprefix("s-"),
        points(scores["winner"]["test"]),
        points(scores["control"]["test"]),
        f"{signed(test['diff'])} [{signed(test['low'])}, {signed(test['high'])}]",
        line["verdict"],
        signed(line["optimism"]),
        points(row["kept"]),
        str(row["given_up"]),
        f"{row['seconds'] / 60:.1f}" if row["whole"] else "",
    ]


@block("search-speed", SPEED)
def speed_block(found: dict[str, Any]) -> str:
    """Seconds of the same candidates by a search, by a search without early stops, and by command lines."""
    ways = {
        "search": "`workbench search`",
        "in_full": "the same, every candidate on all items",
        "peer": "`mergekit-yaml` and `lm_eval`, one call each a candidate",
    }
    peer = found["peer"]
    rows = []
    for way, text in ways.items():
        took = found[way]
        alone = sum(took["parts"].values()) if "parts" in took else took["wall"]
        ratios = (
            [f"{peer['wall'] / alone:.1f}", f"{peer['wall'] / took['wall']:.1f}", f"{peer['cpu'] / took['cpu']:.1f}"]
            if way != "peer"
            else [""] * 3
        )
        rows.append([text, f"{alone:.0f}", f"{took['wall']:.0f}", f"{took['cpu']:.0f}", *ratios, _parts(took)])
    some = (
        ""
        if found["by_peer"] == found["candidates"]
        else f"The peer's time is that of {found['by_peer']} candidates, scaled up. "
    )
    note = f"{found['candidates']} candidates, {sum(found['items'].values())} items, seconds; ratios are the peer's time over ours. {some}"
    heads = [
        "way",
        "candidates, wall s",
        "whole call, wall s",
        "CPU s",
        "ratio, candidates",
        "ratio, whole call",
        "ratio, CPU",
        "where wall seconds go",
    ]
    return table(heads, rows, left=1) + f"\n\n{note}"


def _parts(way: Mapping[str, Any]) -> str:
    if "parts" not in way:
        return f"merging {way['merge']:.0f}, scoring {way['score']:.0f}"
    parts = {PARTS[k]: v for k, v in way["parts"].items()}
    told = [f"{name} {seconds:.0f}" for name, seconds in parts.items()]
    return ", ".join([*told, f"start-up, the base's own score, test {way['wall'] - sum(parts.values()):.0f}"])


STATEMENTS = 5
CREDIBILITY = "benchmarks/results/credibility.json"
UPDATES = "benchmarks/results/memory-updates.json"


@block("memory-updates", UPDATES)
def updates_block(found: dict[str, Any]) -> str:
    """Write how a model answers after facts of its memory are created, updated and deleted."""
    changes = ("before", "create", "update", "delete")
    lines = [
        [f"`{row['method']}`", answer, *(interval(row[answer][change]["exact"]) for change in changes)]
        for row in found["rows"]
        for answer in ("new answer", "true answer")
    ]
    restored = " and ".join(
        f"{row['restored']['texts']} texts and {row['restored']['logits']} vectors of logits with `{row['method']}`"
        for row in found["rows"]
    )
    note = (
        f"{found['facts']} CounterFact facts in a memory that also has {found['others']} others, on the starter base; each cell is the percentage of greedy texts that are the answer up to a full stop or line break, with its 95 % interval. "
        f"A fact is created with a new answer and updated to the true one. After all are deleted, these are bit for bit those from before, of {found['facts']} each: {restored}."
    )
    return table(["method", "said", "before", "created", "updated", "deleted"], lines, left=2) + "\n\n" + note


@block("credibility", CREDIBILITY)
def credibility_block(found: dict[str, Any]) -> str:
    """Share of runs in which the right one of contradicting statements leads, by rounds of feedback."""
    rounds = list(found["rows"][0]["led"])
    lines = [
        [row["way"], *(f"{100 * row['led'][n] / found['runs']:.0f}" for n in rounds)]
        for row in found["rows"]
        if row["statements"] == STATEMENTS
    ]
    note = (
        f"Percent of {found['runs']} simulated runs in which the right one of {STATEMENTS} statements leads alone, after so many rounds of feedback for each; {100 * found['wrong']:.0f} % of the "
        "feedback is wrong. In a round, the leading statement is used. `best possible` knows the rate of wrong feedback and that one statement is right."
    )
    heads = ["way", *(f"{n} round{'s' * (n != '1')} each" for n in rounds)]
    return table(heads, lines, left=1) + "\n\n" + note


FUSE = "benchmarks/results/fuse.json"


@block("fuse", FUSE)
def fuse_block(found: dict[str, Any]) -> str:
    """Bits per byte of the base on held-out text, by what it was trained on, with gains over the base."""
    rows = []
    for row in found["rows"]:
        over = (
            f"{_percent(row['over_texts'])} [{_percent(row['over_low'])}, {_percent(row['over_high'])}]"
            if "over_texts" in row
            else ""
        )
        gain = f"{_percent(row['gain'])} [{_percent(row['low'])}, {_percent(row['high'])}]"
        rows.append([row["configuration"], f"{row['bits_per_byte']:.3f}", gain, over])
    aligned = next(row["fused"] for row in found["rows"] if row.get("fused"))
    note = (
        f"The starter base, trained for {found['steps']} steps on {found['texts']} texts of Python's reference with a learning rate of {found['rate']:g}; means of {found['seeds']} seeds. "
        f"The teacher is the same base with {found['tokens']:,} tokens of its own, trained for {found['teacher_steps']} steps on other pages; it has a distribution for "
        f"{100 * aligned['models']['teacher']['aligned']:.0f} % of the learned tokens. Scored on {found['scored']} texts of pages that neither has seen, {found['bytes'] / 1000:,.0f} kB. Gains are shares of the base's "
        "bits per byte, with 95 % intervals over the texts, paired. The paper's gains over its base, on BBH, are +5.16 % for fusing and +1.86 % for training on the texts alone. The ensemble "
        f"has the mean of both models' probabilities of each span between two shared ends of tokens."
    )
    return (
        table(["configuration", "bits per byte", "gain over the base", "more than the texts alone"], rows, left=1) + "\n\n" + note
    )


def _percent(value: float) -> str:
    return f"{100 * value:+.2f} %".replace("-", "−")


WORDINGS = "benchmarks/results/fact-wordings.json"
PAIRS = {
    "relations, one": "two templates of one relation",
    "zsRE": "zsRE, prompt and rephrasing",
    "WikiBigEdit": "WikiBigEdit, prompt and rephrasing",
    "relations, two": "templates of two relations of one subject",
}
WAYS = ("forms", "encoder", "both")


@block("fact_wordings", WORDINGS)
def wordings_block(found: dict[str, Any]) -> str:
    """Pairs that are taken for one question, by forms alone, by the encoder, and by either."""
    counts = {(row["pairs"], row["way"]): row for row in found["rows"]}
    rows = table(
        ["pairs", "one question", "number", "forms, relations", "encoder", "either"],
        (
            [label, "no" if pairs == "relations, two" else "yes", str(counts[pairs, "forms"]["count"])]
            + [str(counts[pairs, way]["found"]) for way in WAYS]
            for pairs, label in PAIRS.items()
        ),
    )
    highest = found["highest_of_two_relations"][0]
    right, wrong = (counts[pairs, "encoder"]["found"] for pairs in ("relations, one", "relations, two"))
    note = (
        f"Pairs reported as one question, with {found['encoder']} and its threshold {found['threshold']:.2f}. "
        f"Of the {right + wrong} pairs of templates that the encoder reports, {right} are right; the most similar wrong one "
        f"({highest['similarity']:.2f}) is {highest['prompts'][0]!r} and {highest['prompts'][1]!r}."
    )
    return f"{rows}\n\n{note}"


def stores_block(project: Path) -> str:
    """Return a row for each folder of stored results: what it holds, and which parts of a model its keys cover."""
    named = {"runs": RUNS, **STORES}.items()
    rows = ([f"`{name}/`", store.holds, ", ".join(store.parts.split())] for name, store in named if store.parts)
    return table(["folder", "holds", "keys cover"], rows, left=3)


BLOCKS["stores"] = stores_block
