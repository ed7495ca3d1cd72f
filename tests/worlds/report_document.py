"""A synthetic comparison document: item rows are drawn first and every number is computed from them."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from worlds.report_additions import FAMILIES, complete, judge_harm

Row = dict[str, Any]
Floats = NDArray[np.float64]

ALPHA = 0.05
MARGIN = 0.02
TOLERANCE = 0.05
CHOICES = ["billing", "delivery", "account", "returns"]
# task: (metric, chance, role, owner, number of items, number of templates)
TASKS: dict[str, tuple[str, float, str, str | None, int, int]] = {
    "add": ("exact_match", 0.0, "skill", "add", 60, 20),
    "reverse": ("exact_match", 0.0, "skill", "reverse", 60, 20),
    "triage": ("acc", 0.25, "skill", "triage", 120, 24),
    "dates-eu": ("exact_match", 0.0, "skill", "dates-eu", 60, 20),
    "dates-us": ("exact_match", 0.0, "skill", "dates-us", 60, 20),
    "retention": ("acc", 0.5, "retention", None, 240, 40),
}
# configuration: (role, parents, share of items right per task in the order of TASKS)
CONFIGURATIONS: dict[str, tuple[str, list[str], list[float]]] = {
    "base": ("base", [], [0.05, 0.03, 0.33, 0.33, 0.30, 0.88]),
    "add": ("brick", ["add"], [0.86, 0.05, 0.32, 0.32, 0.32, 0.86]),
    "reverse": ("brick", ["reverse"], [0.06, 0.80, 0.30, 0.33, 0.28, 0.87]),
    "triage": ("brick", ["triage"], [0.05, 0.04, 0.91, 0.30, 0.31, 0.88]),
    "dates-eu": ("brick", ["dates-eu"], [0.04, 0.02, 0.33, 0.92, 0.02, 0.87]),
    "dates-us": ("brick", ["dates-us"], [0.05, 0.04, 0.34, 0.03, 0.93, 0.86]),
    "average": ("average", ["add", "reverse", "triage"], [0.31, 0.22, 0.66, 0.34, 0.30, 0.88]),
    "starter-task-arithmetic": (
        "configuration",
        ["add", "reverse", "triage"],
        [0.72, 0.61, 0.83, 0.30, 0.28, 0.85],
    ),
    "starter-ties": ("configuration", ["add", "reverse", "triage"], [0.75, 0.66, 0.82, 0.34, 0.30, 0.87]),
    "over-scaled": ("configuration", ["add", "reverse", "triage"], [0.10, 0.04, 0.27, 0.05, 0.06, 0.60]),
    "dates-conflict": ("configuration", ["dates-eu", "dates-us"], [0.05, 0.03, 0.34, 0.52, 0.47, 0.86]),
}
RECIPE = """\
# workbench run recipes/{name}.yaml
version: 1
base: ./bricks/starter/base
bricks:
{bricks}
steps:
  - id: mix
    merge: {method}
    lambda: {scale}
output: {{form: checkpoint, dtype: bfloat16}}
eval: [starter]
seed: 0
"""


@dataclass(frozen=True)
class Answers:
    """Answers of all configurations to one task: [configuration, item], and the clusters [item]."""

    right: Floats
    cluster: NDArray[np.int64]
    items: list[Row]
    answers: list[list[Row]]


def make_document(seed: int = 0, **options: Any) -> dict[str, Any]:
    """The document; `items`, `tasks`, `configurations` replace item counts and the tables above."""
    document = _document(seed, options)
    complete(document, seed)
    return document


def make_large(items: int = 2000) -> dict[str, Any]:
    """Ten configurations, each of which changes every item of one task: prompts of 60 words, four choices."""
    rng = np.random.default_rng(0)
    letters = rng.choice(list("abcdefghilmnoprstu"), (3000, 9))
    words = ["".join(row[:n]) for row, n in zip(letters, rng.integers(2, 10, 3000), strict=True)]
    names = list(CONFIGURATIONS)
    big = make_document(items=items, tasks=["triage"], configurations={n: CONFIGURATIONS[n] for n in names})
    prompts = [" ".join(words[i] for i in row) for row in rng.integers(0, len(words), (items, 60))]
    for name in big["flips"]:
        logs = np.round(-10 * rng.random((2, items, 4)), 6).tolist()
        big["flips"][name] = [
            {
                **{"task": "triage", "id": f"triage-{i:05d}", "cluster": f"t{i % 24}", "prompt": prompts[i]},
                **{"gold": i % 4, "choices": CHOICES},
                "baseline": {"response": None, "metrics": {"acc": 0.0}, "loglikelihoods": logs[0][i]},
                "configuration": {"response": None, "metrics": {"acc": 1.0}, "loglikelihoods": logs[1][i]},
            }
            for i in range(items)
        ]
    return big


def _document(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    tasks = {t: (*row[:4], options.get("items") or row[4], row[5]) for t, row in TASKS.items()}
    tasks = {t: tasks[t] for t in options.get("tasks", tasks)}
    table = dict(options.get("configurations", CONFIGURATIONS))
    names = list(table)
    answers = {t: _answers(t, tasks[t], table, seed) for t in tasks}
    rows = _rows(names, tasks, answers)
    sizes = {name: sum(r["family"] == name for r in rows) for name in FAMILIES}
    configurations = [_configuration(n, i, table, tasks, answers, seed) for i, n in enumerate(names)]
    return {
        "version": 1,
        "baseline": "base",
        "rows": rows,
        "configurations": configurations,
        "tasks": [
            {
                "task": t,
                "metric": m,
                "n": n,
                "clusters": k,
                "chance": c,
                "role": role,
                "owner": owner,
                "suite": "starter",
                "plan": "5f0c1d9a7b3e4c2288d1f0a6e9b7c4d3",
            }
            for t, (m, c, role, owner, n, k) in tasks.items()
        ],
        "interference": _interference(rows, table, list(tasks)),
        "family": {
            "size": sizes["compared"],
            **sizes,
            "alpha": ALPHA,
            "correction": "max-t",
            "min_effect": MARGIN,
            "text": f"primary metric of {len(tasks)} tasks x {len(names) - 1} configurations against base"
            + "; 1 guarded task apart; controls apart",
        },
        "flips": {n: _flips(n, i, tasks, answers) for i, n in enumerate(names) if n != "base"},
        "provenance": {
            "suites": ["starter"],
            "plans": ["5f0c1d9a7b3e4c2288d1f0a6e9b7c4d3"],
            "versions": {
                "workbench": "0.1.0",
                "torch": "2.13.0",
                "transformers": "5.24.0",
                "lm-eval": "0.4.13",
            },
            "device": "cpu, 2 threads",
            "command": "workbench eval recipes/*.yaml --suite starter && workbench report --suite starter",
            "created": "2026-11-24T09:30:00Z",
        },
        "warnings": [
            "add, reverse: 60 items each detect differences of about 15 points and more; smaller ones "
            "cannot be told apart at this size."
        ],
    }


def _answers(task: str, spec: tuple[Any, ...], table: dict[str, Any], seed: int) -> Answers:
    """Draws right or wrong per item from a shared difficulty, so that configurations agree on hard items."""
    metric, chance, _, _, n, clusters = spec
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    cluster = np.arange(n) % clusters
    hard = 0.5 * rng.normal(size=clusters)[cluster] + rng.normal(size=n)
    column = list(TASKS).index(task)
    choices = (["is", "are"] if chance == 0.5 else CHOICES) if metric == "acc" else None
    items = [_item(task, i, int(cluster[i]), choices, rng) for i in range(n)]
    right, answers = [], []
    base_noise = rng.normal(size=n)
    for name, (role, _, shares) in table.items():
        share = min(max(shares[column], 0.01), 0.99)
        noise = base_noise if role == "base" else 0.75 * base_noise + 0.66 * rng.normal(size=n)
        score = (hard + noise) / math.sqrt(2.25)
        hit = (score < stats.norm.ppf(share)).astype(float)
        right.append(hit)
        answers.append([_answer(items[i], bool(hit[i]), metric, rng, name) for i in range(n)])
    return Answers(np.array(right), cluster, items, answers)


def _item(task: str, i: int, cluster: int, choices: list[str] | None, rng: np.random.Generator) -> Row:
    a, b = (int(x) for x in rng.integers(10, 99, 2))
    word = "".join(rng.choice(list("abcdefghklmnoprstuvw"), 6))
    prompt, gold = {
        "add": (
            f"Shop note {cluster}: {a} boxes arrive and {b} more are ordered. Boxes in total:",
            str(a + b),
        ),
        "reverse": (f"Task {cluster}. Write the letters of '{word}' from last to first:", word[::-1]),
        "triage": (
            f"Message {i}: my order {a}{b} from last week, about {word}. Which desk answers it?\nDesk:",
            "",
        ),
        "dates-eu": (
            f"Form {cluster}: 0{a % 9 + 1}/0{b % 9 + 1}/2026, in words:",
            f"{a % 9 + 1} of month {b % 9 + 1}",
        ),
        "dates-us": (
            f"Form {cluster}: 0{a % 9 + 1}/0{b % 9 + 1}/2026, in words:",
            f"{b % 9 + 1} of month {a % 9 + 1}",
        ),
        "retention": (f"The {word} near the {'doors' if i % 2 else 'door'}", ""),
    }[task]
    return {
        "task": task,
        "id": f"{task}-{i:05d}",
        "cluster": f"t{cluster:02d}",
        "prompt": prompt,
        "gold": int(rng.integers(len(choices))) if choices else gold,
        "choices": choices,
    }


def _answer(item: Row, right: bool, metric: str, rng: np.random.Generator, name: str) -> Row:
    if item["choices"] is None:
        response = item["gold"] if right else ["", "I am not sure.", item["gold"][::-1] + "1"][int(rng.integers(3))]
        return {"response": response, "metrics": {metric: float(right)}, "loglikelihoods": None}
    logs = -3.0 - 4.0 * rng.random(len(item["choices"]))
    gold = item["gold"]
    pick = gold if right else int((gold + 1 + rng.integers(len(logs) - 1)) % len(logs))
    logs[pick] = logs.max() + 0.05 + 2.0 * rng.random()
    return {
        "response": None,
        "metrics": {metric: float(right)},
        "loglikelihoods": [round(float(x), 5) for x in logs],
    }


def _clustered(d: Floats, cluster: NDArray[np.int64]) -> tuple[float, float, int]:
    """Mean of paired differences, its cluster-robust standard error, and the number of clusters."""
    k = int(cluster.max()) + 1
    sums, sizes = np.bincount(cluster, d, k), np.bincount(cluster, minlength=k)
    mean = float(d.mean())
    return mean, float(np.sqrt(((sums - mean * sizes) ** 2).sum() * k / (k - 1)) / d.size), k


def _rows(names: list[str], tasks: dict[str, Any], answers: dict[str, Answers]) -> list[Row]:
    """Rows; each family is corrected by itself."""
    rows: list[Row] = []
    for i, name in enumerate(names):
        for task, spec in tasks.items():
            if name == "base":
                continue
            right = answers[task].right
            d = right[i] - right[0]
            mean, se, k = _clustered(d, answers[task].cluster)
            p = float(2 * stats.t.sf(abs(mean) / se, k - 1)) if se > 0 else None
            rows.append(
                {
                    "configuration": name,
                    "role": CONFIGURATIONS.get(name, ("configuration",))[0],
                    "task": task,
                    "metric": spec[0],
                    "value": float(right[i].mean()),
                    "baseline_value": float(right[0].mean()),
                    "diff": mean,
                    "p": p,
                    "n": d.size,
                    "clusters": k,
                    "se": se,
                    "wins": int((d > 0).sum()),
                    "losses": int((d < 0).sum()),
                }
            )
    families: dict[Any, list[Row]] = {}
    for row in rows:
        control, guarded = row["role"] != "configuration", tasks[row["task"]][2] == "retention"
        row |= {
            "family": "guarded" if guarded else "controls" if control else "compared",
            "tolerance": TOLERANCE if guarded else None,
        }
        families.setdefault((guarded, control), []).append(row)
    for members in families.values():
        tested = sorted((r for r in members if r["p"] is not None), key=lambda r: float(r["p"]))
        highest = 0.0
        for rank, row in enumerate(tested):
            highest = max(highest, min(1.0, row["p"] * (len(tested) - rank)))
            row["p_adj"], row["level"] = highest, ALPHA / (len(tested) - rank)
    for row in rows:
        _decide(row)
        if row.get("family") == "guarded":
            judge_harm(row)
    return rows


def _decide(row: Row) -> None:
    """Adds intervals and the verdict; removes the helper fields."""
    se, level, df = row.pop("se"), row.pop("level", ALPHA), row["clusters"] - 1
    t, wide = stats.t.ppf(1 - ALPHA / 2, df), stats.t.ppf(1 - level / 2, df)
    row["low"], row["high"] = float(row["diff"] - t * se), float(row["diff"] + t * se)
    row["low_adj"], row["high_adj"] = float(row["diff"] - wide * se), float(row["diff"] + wide * se)
    row["mde"] = float((wide + stats.norm.ppf(0.8)) * se) if se > 0 else None
    row["needs"], row["p_adj"], row["reason"] = None, row.get("p_adj"), None
    if se == 0:
        row["verdict"] = "no item changed"
    elif row["p_adj"] < ALPHA:
        row["verdict"] = "better" if row["diff"] > 0 else "worse"
    elif row["low_adj"] > -MARGIN and row["high_adj"] < MARGIN:
        row["verdict"] = "equivalent"
    else:
        row["verdict"] = "cannot tell"
        row["needs"] = math.ceil(row["n"] * (row["mde"] / max(abs(row["diff"]), MARGIN)) ** 2)


def _estimate(values: Floats) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _configuration(
    name: str, i: int, table: dict[str, Any], tasks: dict[str, Any], answers: dict[str, Answers], seed: int
) -> Row:
    role, parents, _ = table[name]
    rng = np.random.default_rng([seed, i])
    scores: dict[str, Row] = {}
    kept: dict[str, Row] = {}
    draws: list[Floats] = []
    for task, (_, chance, task_role, owner, n, _) in tasks.items():
        right = answers[task].right
        value = float(right[i].mean())
        pick = rng.integers(0, n, (400, n))
        sample = right[i][pick].mean(1)
        scores[task] = {
            "value": value,
            **_estimate(sample),
            "corrected": (value - chance) / (1 - chance),
            "n": n,
        }
        if task_role == "skill":
            draws.append((sample - chance) / (1 - chance))
        if owner in parents and owner in table and role != "brick":
            best = list(table).index(owner)
            ratio = (sample - chance) / (right[best][pick].mean(1) - chance)
            kept[task] = {
                "value": (value - chance) / (float(right[best].mean()) - chance),
                **_estimate(ratio),
            }
    skills = [scores[t]["corrected"] for t, spec in tasks.items() if spec[2] == "skill"]
    kept_mean = None
    if kept:
        kept_mean = {k: float(np.mean([e[k] for e in kept.values()])) for k in ("value", "low", "high")}
    recipe = RECIPE.format(
        name=name,
        method="ties" if "ties" in name else "task_arithmetic",
        scale="3.0" if name == "over-scaled" else "1.0",
        bricks="\n".join(f"  {p}: ./bricks/{p}" for p in parents) or "  {}",
    )
    return {
        "name": name,
        "role": role,
        "digest": f"{zlib.crc32(name.encode()):08x}" * 4,
        "parents": parents,
        "aliases": [],
        "recipe": f"recipes/{name}.yaml" if role == "configuration" else None,
        "recipe_text": recipe if role == "configuration" else None,
        "seconds": 11.0 + 1.7 * i,
        "mean": {"value": float(np.mean(skills)), **_estimate(np.mean(draws, axis=0))} if skills else None,
        "kept": kept,
        "kept_mean": kept_mean,
        "scores": scores,
    }


def _interference(rows: list[Row], table: dict[str, Any], tasks: list[str]) -> Row:
    bricks = [n for n, row in table.items() if row[0] == "brick"]
    at = {(r["configuration"], r["task"]): r for r in rows}
    return {
        "bricks": bricks,
        "tasks": tasks,
        **{k: [[at[b, t][k] for t in tasks] for b in bricks] for k in ("diff", "verdict")},
        **{k: [[at[b, t][k + "_adj"] for t in tasks] for b in bricks] for k in ("low", "high")},
    }


def _flips(name: str, i: int, tasks: dict[str, Any], answers: dict[str, Answers]) -> list[Row]:
    return [
        {
            **answers[t].items[j],
            "baseline": answers[t].answers[0][j],
            "configuration": answers[t].answers[i][j],
        }
        for t in tasks
        for j in np.flatnonzero(answers[t].right[i] != answers[t].right[0])
    ]
