"""Tables of docs/merging*.md and docs/results.md about single merge methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pools_figure
from cells import block, points, signed, table

from workbench.scores.paired import paired

WUDI = "benchmarks/results/wudi.json"
MISSING_ROWS = "benchmarks/results/missing-rows.json"
POOLS, POOLS_FIGURE = "benchmarks/results/merge-pools.json", "merging-pools.svg"
OTHER_POOLS = "benchmarks/results/merge-pools-other.json"
ADVICE = "benchmarks/results/advice-pools.json"
MANY = "benchmarks/results/advice-many.json"
FORWARD = "benchmarks/results/merge-forward.json"
FAR = "benchmarks/results/far-bricks.json"
ADAPTERS = "benchmarks/results/many-adapters.json"
REASONING = "benchmarks/results/reasoning.json"


@block("missing_rows", MISSING_ROWS)
def missing_rows_block(found: dict[str, Any]) -> str:
    """Bits per byte of a model with another one's tokenizer, by how the rows of missing tokens are made."""
    rows = []
    for row in found["rows"]:
        left = [f"{value:.2f}" for value in (row.get("residual") or {}).values()]
        rows.append([row["rows"], f"{row['bits_per_byte']:.2f}", f"{row['tokens_scored']:,}", ", ".join(left)])
    lacking, shared = next((row["lacking"], row["shared"]) for row in found["rows"] if "shared" in row)
    note = (
        f"The starter base with the tokenizer of a donor: the base with {found['tokens']:,} tokens of its own, trained on pages of Python's reference, "
        f"whose rows were trained for {found['steps']} steps. The base lacks {lacking:,} of these tokens and shares {shared:,}. Scored on {found['pages']} other "
        f"pages, {found['bytes'] / 1000:,.0f} kB. Unexplained: mean share of a donor's row that its combination leaves."
    )
    return table(["rows of missing tokens", "bits per byte", "tokens", "unexplained"], rows, left=1) + "\n\n" + note


ARMS = ("average", "sum", "sum, auto", "tsv", "tsv, auto", "ties")
HEADS = ("pool", "RV", "norm, %", "advice", "kept", *ARMS, "best of the grid")


@block("merge-pools", POOLS)
def pools_block(found: dict[str, Any]) -> str:
    """Pools of bricks: the figure, then what the advice keeps beside other merges, then a table of all pools."""
    rows = [row for row in found["rows"] if row["scores"]["sum"]["kept"] is not None]
    lines, refused = _pool_lines(rows, found["grid"])
    picture = f"![What merges keep of the bricks' skills, by how much the bricks have in common]({POOLS_FIGURE})"
    return "\n\n".join(
        [picture, _advice_sentences(rows, found["grid"]), table(HEADS, lines, left=1), _pools_note(found, refused)]
    )


@block("merge-pools-other", OTHER_POOLS)
def other_pools_block(found: dict[str, Any]) -> str:
    """The same pools on another language model."""
    rows = [{**row, "family": found["base"]} for row in found["rows"] if row["scores"]["sum"]["kept"] is not None]
    lines, _ = _pool_lines(rows, found["grid"])
    retained = sum(row["base"] for row in rows) / len(rows)
    note = (
        f"As above, on {found['base']}, whose bricks are trained with the settings of the starter's. The base answers {points(retained)} % of the retention items, and merges by the advice "
        f"{points(_mean(row['scores'][name]['retention'] for row in rows if (name := pools_figure.advised(row, found['grid']))))} %."
    )
    return table(HEADS, lines, left=1) + "\n\n" + note


def _pool_lines(rows: Sequence[dict[str, Any]], grid: dict[str, Any]) -> tuple[list[list[str]], list[float]]:
    """Return the lines of a table of pools, and what the best merge keeps of each pool that is left out, because no merge is advised."""
    lines: list[list[str]] = []
    refused: list[float] = []
    for family, pool in dict.fromkeys((row["family"], row["pool"]) for row in rows):
        same = [row for row in rows if (row["family"], row["pool"]) == (family, pool)]
        values = {arm: _mean(row["scores"][arm]["kept"] for row in same) for arm in grid}
        best = max(values, key=lambda arm: values[arm])
        advised = [pools_figure.advised(row, grid) for row in same]
        scored = [row["scores"][name]["kept"] for row, name in zip(same, advised, strict=True) if name]
        if family == "llama" and not scored:
            refused.append(max(values.values()))
            continue
        rv = [value for row in same for value in row["rv"].values()]
        norms = [value for row in same for value in row["norms"].values()]
        lines.append(
            [
                f"{family}: {pool}",
                _range(rv, 1, ".2f"),
                _range(norms, 100, ".2g"),
                ", ".join(dict.fromkeys(name or "no merge" for name in advised)),
                points(_mean(scored)) if scored else "",
                *(points(values[arm]) for arm in ARMS),
                f"{points(values[best])} ({best})",
            ]
        )
    return lines, refused


@block("advice-pools", ADVICE)
def advice_block(found: dict[str, Any]) -> str:
    """What `brick advise` says of bricks that are scaled, copied, opposed or ordinary, and what its merges score."""
    rows = []
    for row in found["rows"]:
        scores = {arm: _mean(by_skill.values()) for arm, by_skill in row["accuracies"].items()}
        grid = {arm: value for arm, value in scores.items() if "advice" not in arm}
        best = max(grid, key=lambda arm: grid[arm])
        advised = []
        for way, arm in (("weights", "advice from weights"), ("measured", "measured advice")):
            said = [f"without {name}" for name in row[way]["left_out"]] + ["warning"] * bool(row[way]["warnings"])
            advised.append(f"{points(scores.get(arm))} ({', '.join(said)})" if said else points(scores.get(arm)))
        cells = [*advised, points(scores["average of all"]), points(scores["average"]), f"{points(grid[best])} ({best})"]
        rows.append([row["pool"], ", ".join(row["bricks"]), *cells])
    heads = ["pool", "bricks", "advice from weights", "with `--measure`", "average", "of those kept", "best of the grid"]
    note = (
        f"Percent of {found['items']} held-out items a skill, answered exactly; the mean over the skills. The advice is scored with λ = 1 unless it was measured to "
        "be clearly worse; the written recipe sweeps λ. The average is that of all named bricks, then that of those that the measured advice keeps. "
        f"The best of the grid is chosen on the same items."
    )
    return f"{table(heads, rows)}\n\n{note}"


@block("advice-many", MANY)
def many_block(found: dict[str, Any]) -> str:
    """Write what one merge, a route and merges in a route keep of eight and sixteen bricks, and what they cost."""
    lines = []
    for row in found["rows"]:
        alone = row["alone"]
        lines.append([row["pool"], "each brick alone", f"{len(alone)}", points(_mean(_flat(alone))), "", "", ""])
        for way, one in row["ways"].items():
            pair = paired(_flat(alone), [value for name in alone for value in one["right"][name]])
            low, high = pair.interval()
            price = one.get("price")
            size, seconds = (
                (f"{price['bytes'] / 1e6:.0f}", f"{price['seconds'] / price['merged_seconds']:.2f}") if price else ("0", "1")
            )
            change = f"{signed(pair.diff)} [{signed(low)}, {signed(high)}]"
            lines.append(
                [row["pool"], way, f"{one['groups']}" if price else "", points(_mean(_flat(one["right"]))), change, size, seconds]
            )
    heads = [
        "bricks",
        "way",
        "adapters",
        "right, %",
        "against each brick alone, points",
        "MB beside the base",
        "time of an answer",
    ]
    said = [f"{row['pool'].capitalize()}: `--measure` advises {_said(row['advice'])}." for row in found["rows"]]
    note = (
        f"{found['items']} held-out items, each brick asked its own, answered exactly; 95 % intervals. One merge is `tsv` with `weights: auto`, as are the merges of "
        "several skills; the bricks of one skill are averaged in the advised groups. Two of the eight skills write the same dates in opposite ways, which a router "
        "cannot tell apart: half of their items are lost to every way. Time: to read a prompt and to write 8 tokens, relative to the same without a router."
    )
    return f"{' '.join(said)}\n\n{table(heads, lines)}\n\n{note}"


def _flat(by_brick: dict[str, list[int]]) -> list[int]:
    """Return the answers of all bricks, in order."""
    return [value for values in by_brick.values() for value in values]


def _said(advice: dict[str, Any]) -> str:
    """Return what the advice recommends, as the end of a sentence."""
    step = advice["step"] or {}
    if "route" in step:
        several = sum(len(group["bricks"]) > 1 for group in advice["groups"])
        return f"a route between {len(advice['groups'])} groups" + (
            f", {several} of which have several bricks" if several else ""
        )
    return f"`{step['merge']}`" if step else "no merge"


def _range(values: Sequence[float], factor: float, form: str) -> str:
    """Return the smallest and the largest of some values."""
    low, high = (format(factor * value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _advice_sentences(rows: Sequence[dict[str, Any]], grid: dict[str, Any]) -> str:
    """Return what the recommended merges keep beside fixed ones and the best of the grid, for each base, with intervals over pools."""
    said = []
    for family, name in pools_figure.FAMILIES.items():
        same = [(row, arm) for row in rows if row["family"] == family and (arm := pools_figure.advised(row, grid)) is not None]
        if len(same) < 2:
            continue
        own = [row["scores"][arm]["kept"] for row, arm in same]
        parts = []
        others = {"the best of the grid": list(grid), "the average": ["average"], "the sum": ["sum"]}
        for text, arms in others.items():
            best = [max(row["scores"][arm]["kept"] for arm in arms) for row, _ in same]
            pair = paired(best, own, [row["pool"] for row, _ in same])
            low, high = pair.interval()
            parts.append(f"{signed(pair.diff)} [{signed(low)}, {signed(high)}] against {text}")
        none = sum(1 for row in rows if row["family"] == family) - len(same)
        also = f" It recommends no merge for {none} other {'pools' if none > 1 else 'pool'}." if none else ""
        said.append(
            f"{name[0].upper()}{name[1:]}: on the {len(same)} pools for which the advice names a merge, that merge keeps {points(_mean(own))} %: {', '.join(parts)}.{also}"
        )
    return " ".join(said)


def _pools_note(found: dict[str, Any], refused: Sequence[float]) -> str:
    """Return how the pools were made and measured."""
    seeds = 1 + max(row["seed"] for row in found["rows"])
    return (
        f"Percent of the bricks' own gain that a merge keeps: the mean over the tasks that the bricks learned, and over {seeds} trainings of base and bricks for "
        "`llama`. Differences are points, with 95 % intervals that resample pools. The best of the grid is chosen on the same items, so that it is an upper bound. "
        "Norm: that of a brick's delta, relative to the base's tensors. `llama` are models of four layers that answer with four letters; their bricks change them far more than "
        f"adapters change a language model. The {len(refused)} kinds of `llama` pools without a recommended merge are left out: the best merge keeps {points(min(refused))} to "
        f"{points(max(refused))} % there."
    )


@block("merge-forward", FORWARD)
def forward_block(found: dict[str, Any]) -> str:
    """Pools of bricks: what merges in forward order keep beside RegMean, tsv and the sum; then other settings, the mean over the pools."""
    pools = [row for row in found["rows"] if row["arms"]]
    arms = [arm for arm in pools[0]["arms"] if not arm.startswith("regmean, ")]  # merged inputs were removed: docs/limits.md
    settings = [arm for arm in arms if "," in arm]
    chosen = [arm for arm in arms if arm not in settings]
    rows = []
    for row in pools:
        family = row["family"] if row["family"] == "starter" else f"{row['family']} {row['seed']}"
        cells = [f"{points(row['arms'][arm]['kept'])} ({points(row['arms'][arm]['retention'])})" for arm in chosen]
        ahead = row["arms"]["featcal"]["against"]
        cells.append(f"{signed(ahead['diff'])} [{points(ahead['low'])}, {points(ahead['high'])}]")
        rows.append([f"{family}: {row['pool']}", *cells])
    first = table(["pool", *chosen, "featcal − regmean"], rows, left=1)
    by_family = {family: [row["arms"] for row in pools if row["family"] == family] for family in ("starter", "llama")}
    rows = [
        [
            arm,
            *(
                f"{points(_mean(row[arm]['kept'] for row in same))} ({points(_mean(row[arm]['retention'] for row in same))})"
                for same in by_family.values()
                if same
            ),
        ]
        for arm in ("featcal", *settings)
    ]
    second = table(["setting", *(family for family, same in by_family.items() if same)], rows, left=1)
    note = (
        f"Percent of the bricks' own gain that a merge keeps, and in brackets the accuracy on what the base knew; {found['texts']} texts a brick. "
        "Starter: its own adapters. llama: bases of four layers with bricks of their own, as in benchmarks/merge_pools.py. The last column is the "
        "paired difference of `featcal` from `regmean`, with a 95 % interval over items. Settings: the mean over the pools. `featcal, sum 1` "
        f"starts from the whole sum, with the anchor there. {_learned_sentence(pools)}"
    )
    return f"{first}\n\n{second}\n\n{note}"


def _learned_sentence(pools: Sequence[dict[str, Any]]) -> str:
    """Say what learned weights keep beside `featcal` on the starter base, and how much longer they take."""
    of = [(row["pool"], row["arms"]["learned"], row["arms"]["featcal"]) for row in pools if row["family"] == "starter"]
    said = [
        f"{name} {signed(one['against']['diff'])} [{points(one['against']['low'])}, {points(one['against']['high'])}] in {one['seconds'] / other['seconds']:.1f} times the time"
        for name, one, other in of
    ]
    return f"`learned` against `featcal` on the starter base: {'; '.join(said)}."


@block("reasoning", REASONING)
def reasoning_block(found: dict[str, Any]) -> str:
    """A model that thinks between tags, merged with one that follows an instruction: what each merge still does."""
    kinds = list(next(iter(found["merges"].values()))["right"])
    rows = [
        [name, *(points(_mean(merge["right"][kind])) for kind in kinds), f"{merge['seconds']:.0f}"]
        for name, merge in found["merges"].items()
    ]
    note = (
        f"Percent of {found['items']} held-out prompts of each kind, answered greedily and wholly right. The thinker was trained on sums, with a thought between tags before "
        "each answer; the follower on phrases of an invented language and on sums, all answered at once, in brackets where the prompt asks for them. Both are LoRA adapters "
        f"of rank 16 of the starter base. Methods that read texts read {found['texts']} of each brick's, `null_space` those of the thinker. The bricks answer the last kind of prompt in different ways."
        " Seconds of one core for the merge; all but the first `null_space` find its inputs in the cache."
    )
    return table(["merge", *kinds, "seconds"], rows, left=1) + "\n\n" + note


@block("far-bricks", FAR)
def far_block(found: dict[str, Any]) -> str:
    """Bricks far from their base: what merges, trainings and a route keep, the mean over the pools of each kind."""
    ways = list(found["rows"][0]["ways"])
    pools = list(dict.fromkeys(row["pool"] for row in found["rows"]))
    rows = []
    for way in ways:
        of = {pool: [row["ways"][way] for row in found["rows"] if row["pool"] == pool and way in row["ways"]] for pool in pools}
        every = [one for same in of.values() for one in same]
        left = [one["retention"] for one in every if "retention" in one]
        rows.append(
            [
                way,
                *(points(_mean(one["kept"] for one in same)) if same else "" for same in of.values()),
                points(_mean(left)) if left else "",
                f"{_mean(one['seconds'] for one in every):.1f}",
            ]
        )
    seeds = len({row["seed"] for row in found["rows"]})
    note = (
        f"Percent of the bricks' own gain that is kept, the mean over {seeds} trainings of base and bricks; then the accuracy on the base's own functions, and seconds of a core, means over all pools. "
        f"Every way but `average` and `tsv` reads the same {found['rows_a_brick']} rows of each brick's tasks; ways that train replay as many rows of the base's functions, and take the 200 steps of a brick."
    )
    return table(["way", *pools, "retention", "seconds"], rows, left=1) + "\n\n" + note


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


@block("many-adapters", ADAPTERS)
def adapters_block(found: dict[str, Any]) -> str:
    """Four and more adapters that learned different answers for the same nouns: what merges and a route answer."""
    ways = list(dict.fromkeys(way for row in found["rows"] for way in row["ways"]))
    rows = []
    for way in ways:
        of_way = [row["ways"].get(way) for row in found["rows"]]
        cells = [points(sum(one["right"].values()) / len(one["right"])) if one else "" for one in of_way]
        rows.append([way, *cells, *(f"{one['seconds']:,}" if one else "" for one in of_way[-1:])])
    note = (
        f"Percent of {found['items']} items a language in two new wordings, answered exactly; the mean over the languages. Adapters of rank {found['rank']}; "
        f"`regmean` and `featcal` read {found['texts']} texts of each. Seconds of the processor for the largest number, with the answers. "
    )
    return table(["way", *(f"{row['adapters']} adapters" for row in found["rows"]), "seconds"], rows, left=1) + "\n\n" + note


@block("wudi", WUDI)
def wudi_block(found: dict[str, Any]) -> str:
    """The merged delta of `wudi` beside the sum of the bricks' deltas: length, direction, projections on the bricks."""
    names = {
        "length_ratio": "length, over that of the sum",
        "cosine": "cosine with the sum",
        "least_projection": "smallest projection on a brick's delta, over that delta's squared length",
    }
    rows = [
        [text, *(f"{found[key][part]:.2f}".replace("-", "−") for part in ("mean", "low", "high"))] for key, text in names.items()
    ]
    bricks = ", ".join(f"`{name}`" for name in found["bricks"])
    note = (
        f"Bricks {bricks} of [`{found['recipe']}`](../{found['recipe']}), all weights 1, {found['layers']} linear layers; "
        f"Frobenius norms, one number a layer."
    )
    return table([f"merged delta, over {found['layers']} layers", "mean", "lowest", "highest"], rows, left=1) + "\n\n" + note
