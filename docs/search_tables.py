"""Tables of docs/search.md: what searches have found, and what they cost beside command lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cells import measured, of_results, points, signed, table

WINNER = "benchmarks/results/search-winner.json"
SPEED = "benchmarks/results/search.json"
PARTS = {"compose": "weights", "score": "scoring", "load": "loading the base", "rest": "drawing, comparing, keeping"}


@of_results(WINNER)
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
        f"recipe was run in a new process: the weights were {same} to those that were scored. {measured(found)} The source: [{WINNER}](../{WINNER})."
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


@of_results(SPEED)
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
    note = f"{found['candidates']} candidates, {sum(found['items'].values())} items, seconds; ratios are the peer's time over ours. {some}{measured(found)}"
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
    return table(heads, rows, left=1) + f"\n\n{note} The source: [{SPEED}](../{SPEED})."


def _parts(way: Mapping[str, Any]) -> str:
    if "parts" not in way:
        return f"merging {way['merge']:.0f}, scoring {way['score']:.0f}"
    parts = {PARTS[k]: v for k, v in way["parts"].items()}
    told = [f"{name} {seconds:.0f}" for name, seconds in parts.items()]
    return ", ".join([*told, f"start-up, the base's own score, test {way['wall'] - sum(parts.values()):.0f}"])


BLOCKS: dict[str, Callable[[Path], str]] = {"search-winner": winner_block, "search-speed": speed_block}
