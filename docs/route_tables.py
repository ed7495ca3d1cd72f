"""The tables of docs/routing.md and docs/serving.md: accuracy of routers, retrieval among many skills, and the load of a server."""

from __future__ import annotations

from typing import Any

from cells import SIGNED, SIGNS, block, interval, points, signed, table

from workbench.compare.routing import RoutedBeside, advice

ROUTING = "benchmarks/results/route-accuracy.json"
RETRIEVAL = "benchmarks/results/route-retrieval.json"
ABSTAIN = "benchmarks/results/route-abstain.json"
KERNEL = "benchmarks/results/route.json"
BESIDE = "benchmarks/results/merge-or-route.json"
ROLES = "benchmarks/results/roles.json"


def _accuracy(found: dict[str, Any]) -> str:
    """Share of prompts whose brick has the highest score, for each router and set."""
    names = [row["set"] for row in _rows(found, "ridge") if "right_score" in row]
    lines = []
    for router in found["routers"]:
        rows = {row["set"]: row for row in _rows(found, router)}
        lines.append([f"`{router}`", *(_percent(rows[name]["right_score"]) for name in names)])
    counts = {row["set"]: row["prompts"] for row in _rows(found, "ridge")}
    fewer = [
        f"`{router}` has {found['routers'][router]['fields']['samples']} prompts a brick and is asked every {_ordinal(every)} prompt"
        for router, every in found["every"].items()
        if every > 1 and router in found["routers"]
    ]
    place = f" on {found['base']}" if "base" in found else ""
    note = (
        f"Percent of prompts whose brick, or one that it is tied with, has the highest score, before any prompt goes to the base; "
        f"{found['samples']} calibration prompts a brick, {len(found['bricks'])} bricks{place}. {'; '.join(fewer)}{'. ' * bool(fewer)}"
    )
    heads = ["router", *(f"{name} (n = {counts[name]})" for name in names)]
    return "\n\n".join([table(heads, lines, left=1), note])


block("route_accuracy", ROUTING)(_accuracy)
block("route-accuracy-gemma", ROUTING.replace(".json", "-gemma.json"))(_accuracy)


@block("route_abstain", ABSTAIN)
def abstain_block(found: dict[str, Any]) -> str:
    """False abstention, wrong bricks and false routing by the way in which a prompt is written."""
    columns = [row for row in found["routers"] if not row["negatives"]]
    told = {(row["set"], row["router"]): row for row in found["routers"] if row["negatives"]}
    sets = {row["set"]: row for column in columns for row in column["sets"]}
    lines = []
    for inside in (True, False):
        for name in sorted(sets, key=lambda name: name == "near misses"):
            if ("to_base" in sets[name]) is inside:
                lines.append([name if inside else f"**{name}**", *(_costs(column, name) for column in columns)])
    marks = [told.get((column["set"], column["router"])) for column in columns]
    for name, set_ in (("plain", "plain"), ("**near misses**", "near misses")):
        lines.append([f"{name}, other near misses as `negatives`", *(_costs(row, set_) if row else "" for row in marks)])
    note = (
        "Plain rows, prompts that a brick is for: percent that went to the base, then percent that went to a wrong brick. Bold rows, requests "
        "that no brick is for: percent that went to a brick. The number of prompts in parentheses. Near misses are about the same things "
        "as a skill and ask for something else; in the last two rows the router knows "
        f"{' and '.join(str(row['negatives']) for row in marks if row)} near misses of other kinds. "
    )
    heads = ["prompts", *(f"`{column['router']}`, {column['set']} bricks" for column in columns)]
    return "\n\n".join([table(heads, lines, left=1), note])


def _costs(column: dict[str, Any], name: str) -> str:
    row = next((row for row in column["sets"] if row["set"] == name), None)
    if row is None:
        return ""
    if "to_base" in row:
        return f"{_percent(row['to_base'])} / {_percent(row['wrong_brick'])} ({row['prompts']})"
    return f"{_percent(1 - row['kept_by_base'])} ({row['prompts']})"


@block("route_retrieval", RETRIEVAL)
def retrieval_block(found: dict[str, Any]) -> str:
    """Recall by number of skills."""
    sizes = sorted({row["bricks"] for row in found["rows"]})
    lines = []
    for router in dict.fromkeys(row["router"] for row in found["rows"]):
        rows = {row["bricks"]: row for row in found["rows"] if (row["router"], row["templates"]) == (router, "unseen")}
        lines.append([f"`{router}`", *(f"{rows[s]['recall_1']:.2f} / {rows[s]['recall_3']:.2f}" for s in sizes)])
    least = min(row["recall_1"] for row in found["rows"] if row["templates"] == "seen")
    note = (
        f"Recall@1 / recall@3 on prompts of unseen templates, by number of bricks; on seen templates, recall@1 is {least:.2f} or more; {found['prompts']} calibration prompts a brick in three templates. "
        "Synthetic skills: eight operations on eight kinds of words, so that every skill shares its operation with seven others and its "
        "words with seven others. "
    )
    heads = ["router", *(f"{size} bricks" for size in sizes)]
    return "\n\n".join([table(heads, lines, left=1), note])


@block("route_kernel", KERNEL)
def kernel_block(found: dict[str, Any]) -> str:
    """Time of PEFT's mixed batches and Arrow over the kernel's, and memory of a call, by number of bricks."""
    kinds = {
        "kernel one": "one brick",
        "peft one": "one brick, PEFT",
        "kernel mixed": "mixed batch",
        "peft mixed": "mixed batch, PEFT",
        "peft arrow": "Arrow, PEFT",
    }
    lines = []
    for kind, name in kinds.items():
        cells = [
            f"{row[kind].get('ratio', 1.0):.2f}, {row[kind].get('decode_ratio', 1.0):.2f}, {row[kind]['peak_mb']:.0f} MB"
            for row in found["results"]
        ]
        lines.append([name, *cells])
    note = (
        f"Time of a call relative to the kernel's call next to it (one brick to one brick, the others to the mixed batch), for a prompt and for one "
        f"token a row, as in a step of generation; and its peak memory beyond model and adapters. Batches of {found['rows']} rows of {found['tokens']} tokens in float32, adapters of rank "
        f"{found['rank']} on all linear layers, {found['threads']} thread. "
    )
    heads = ["", *(f"bricks: {row['bricks']}" for row in found["results"])]
    return "\n\n".join([table(heads, lines, left=1), note])


@block("merge_or_route", BESIDE)
def beside_block(found: dict[str, Any]) -> str:
    """Routed recipes beside merges of the same bricks: skills, retention, false routing, and what the report advises."""
    parts: list[str] = []
    for part in found["found"]:
        skills = [task for task in part["tasks"] if task["role"] == "skill"]
        retention = next(task["task"] for task in part["tasks"] if task["role"] == "retention")
        rows = {(row["configuration"], row["task"]): row for row in part["rows"]}
        others = {
            (row["configuration"], row["task"]): row["other"]["value"] * row["n"] for row in (part.get("routing") or {})["tasks"]
        }
        lines = []
        for c in part["configurations"]:
            if c["role"] == "brick":
                continue
            back = rows.get((c["name"], retention))
            change = (
                f"{signed(back['diff'])} [{signed(back['low_adj'])}, {signed(back['high_adj'])}] {SIGNS[back['verdict']]}"
                if back
                else ""
            )
            wrong = [
                f"{others[c['name'], t['task']]:.0f} of {t['n']}" for t in part["tasks"] if others.get((c["name"], t["task"]))
            ]
            false = (", ".join(wrong) or "none") if (c["name"], retention) in others else ""
            scores = [points((c["scores"].get(task["task"]) or {}).get("value")) for task in skills]
            lines.append([c["name"], interval(c["kept_mean"]), *scores, change, false])
        heads = [
            "configuration",
            "kept",
            *(t["task"] for t in skills),
            f"{retention}, difference",
            "false routing",
        ]
        shown = [] if parts else [table(heads, lines, left=1)]  # the second one has the same order
        kept = {c["name"]: (c["kept_mean"] or {}).get("value") for c in part["configurations"]}
        beside = [RoutedBeside.model_validate(row) for row in part["routing"]["beside"]]
        advised = " ".join(advice(row, kept[row.configuration]) for row in beside)
        parts += [f"`recipes/{part['recipe']}.yaml`:", *shown, advised]
    note = (
        f"Scores in percent of {skills[0]['n']} items a task. Kept: share of the best single brick's score on each task, its oracle, corrected for "
        f"chance, mean over skills, with a 95 % interval. Difference from the base in points, adjusted interval; {SIGNED}. False routing: items of a task that "
        "another brick than its own answered. The merges have the fields of the starter recipes, untuned. "
    )
    return "\n\n".join([*parts, note])


@block("roles", ROLES)
def roles_block(found: dict[str, Any]) -> str:
    """Bricks of three roles, alone and composed, where roles have codes of their own; the order is the same where they share codes."""
    kinds = {"role": "one role", "two roles": "two roles in a prompt", "text": "text alone"}
    first = found["summary"][0]["world"]
    lines = []
    for row in found["summary"]:
        if row["world"] == first and row["way"] != "base":
            over = row.get("over")
            gap = f"{_levels(over['role'], '+.0f')}" if over else ""
            lines.append([row["way"], *(_levels(row[kind], ".0f", 0.0, 100.0) if kind in row else "" for kind in kinds), gap])
    note = (
        f"Percent of {found['items']} held-out prompts a set whose whole answer is right; a small Llama and bricks trained by the script, three roles, "
        f"{found['seeds']} seeds. Intervals, 95 %: a t distribution over pairs of seed and role. `one brick` and `a pair` are the bricks of one role alone, as NaiveMC and DAMC train them. "
        "A base of four layers has little room for sums of adapters: the paper's NaiveMC loses less. "
    )
    heads = ["configuration", *kinds.values(), "one role, above the best NaiveMC"]
    return table(heads, lines, left=1) + "\n\n" + note


def _levels(found: dict[str, float], form: str, least: float = -100.0, most: float = 100.0) -> str:
    """A mean in percent with its interval, which ends where the values do."""
    values = (min(max(found[key], least), most) for key in ("mean", "low", "high"))
    mean, low, high = (f"{value:{form}}".replace("-", "−") for value in values)
    return f"{mean} [{low}, {high}]"


def _rows(found: dict[str, Any], router: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = found["routers"][router]["sets"]
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


@block("route_conversations", "benchmarks/results/route-conversations.json")
def conversations_block(found: dict[str, Any]) -> str:
    """Where the last messages of conversations go, alone and within the conversation."""
    kinds = {"stay": "follow-ups", "leave": "requests that no brick is for", "switch": "requests for another brick"}
    rows = []
    for name, group in found["groups"].items():
        part, kind = name.split()
        rows.append(
            [
                kinds[kind],
                "chose the margin" if part == "chosen" else "held out",
                *(str(group[key]) for key in ("n", "alone", "conversation")),
            ]
        )
    heads = ["last messages", "conversations", "number", "right alone", "right in the conversation"]
    note = f"`ridge` on {len(found['bricks'])} bricks with near misses. A message on the topic of the one before has its confidence raised by {found['following']:g}."
    return f"{table(heads, rows)}\n\n{note} "


@block("serve-load", "benchmarks/results/serve-load.json")
def load_block(found: dict[str, Any]) -> str:
    """Answers, latencies and memory of a server with one client and with many, in both data types."""
    rows, notes = [], []
    for dtype, part in found["dtypes"].items():
        load, memory, changes = part["load"], part["memory"], part["changes"]
        for clients, state in ((1, part["alone"]), (found["clients"], load)):
            first = f"{state['first_piece']['p50']:.2f}" if "first_piece" in state else ""
            numbers = [f"{state['tokens_per_second']:.1f}", f"{state['p50']:.2f}", f"{state['p99']:.2f}", first]
            rows.append([dtype, str(clients), f"{state['answers']:,}", *numbers])
        lost, added = load["statuses"].get("lost", 0), load["bricks"].get("glossary", 0)
        notes.append(
            f"{dtype}: {lost} answers lost, {load['wrong']} with another text or brick than alone; a brick added in {changes['add']:.0f} s gave {added} answers, and was removed in "
            f"{changes['rm']:.0f} s; {memory['before']:,.0f} MB before, {memory['later']:,.0f} after a tenth of the time, {memory['end']:,.0f} at the end."
        )
    seconds = next(iter(found["dtypes"].values()))["load"]["seconds"]
    heads = ["data type", "clients", "answers", "tokens per second", "median s", "99 % s", "first piece, median s"]
    note = f"The starter base with three bricks, {seconds:.0f} seconds, texts of at most {found['most_tokens']} tokens, half of them streams. {' '.join(notes)} "
    return f"{table(heads, rows, left=1)}\n\n{note}"


@block("assistant", "benchmarks/results/assistant.json")
def assistant_block(found: dict[str, Any]) -> str:
    """Scores of the assistant before and after its change, and by lm-eval through its server."""
    served, marks = found["served"], {found["added"]: ", added", found["removed"]: ", removed"}
    rows = []
    for task, row in found["before"].items():
        states = [interval(found[state][task]) for state in ("base", "before", "after")]
        rows.append([f"`{task}`{marks.get(task, '')}", str(row["n"]), *states, points(served.get(task))])
    (said,) = found["said"].values()
    note = (
        f"Percent right with 95 % intervals. After the edit the model says {said['said']} of {said['facts']} facts. The last column is lm-eval's `local-completions`, "
        "which asked the changed assistant's server for the same items. "
    )
    heads = ["task", "items", "base", "assistant", "changed", "changed, served"]
    return table(heads, rows, left=1) + "\n\n" + note
