"""A synthetic document of a search, as `search` writes it: conditional dimensions, candidates that failed or were given up, a random arm."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from worlds.report_document import CONFIGURATIONS, make_document

from workbench.compare.comparison import Comparison

Row = dict[str, Any]
SPACE: dict[str, Row] = {
    "mix.merge": {"choices": ["task_arithmetic", "ties", "dare_linear"]},
    "mix.lambda": {"low": 0.2, "high": 2.0, "log": False, "step": None},
    "mix.density": {"low": 0.01, "high": 1.0, "log": True, "step": None},
    "mix.bricks.triage": {"low": 0.5, "high": 1.5, "log": False, "step": None},
}
CONTROLS = {
    "base": (0.08, 0.88), "add": (0.31, 0.86), "reverse": (0.30, 0.87), "triage": (0.35, 0.88), "average": (0.44, 0.885),
    "toy": (0.70, 0.85), "task-arithmetic-1": (0.72, 0.84),
}  # fmt: skip
ROLES = {
    "base": "base",
    "add": "brick",
    "reverse": "brick",
    "triage": "brick",
    "average": "average",
    "task-arithmetic-1": "average",
}
ITEMS = {"search": 450, "test": 460}
OF_OBJECTIVE = {"items": {"search": 450, "test": 230}, "clusters": {"search": 78, "test": 80}}


def make_search(trials: int = 40, *, random: int = 0, objectives: int = 1, seed: int = 0, comparison: bool = True) -> Row:
    """The document of a search with so many candidates and objectives; every seventh failed, about every third was given up."""
    rng = np.random.default_rng(seed)
    done = [_trial(rng, arm, i, objectives) for arm, n in (("search", trials), ("random", random)) for i in range(n)]
    full = [t for t in done if t["scores"] and not t["stopped"]]
    searched = [t for t in full if t["arm"] == "search"]
    front = [t["name"] for t in searched if not any(_covers(o["scores"], t["scores"]) and o is not t for o in searched)]
    winner = max(searched, key=lambda t: t["scores"][0])["name"] if searched else None
    chosen = front[:8] if objectives == 2 else [winner] if winner else []
    drawn = [t for t in full if t["arm"] == "random"]
    best = [max(drawn, key=lambda t: t["scores"][0])["name"]] if drawn else []
    scores = {t["name"]: t["scores"] for t in full}
    controls = [
        {
            "name": name,
            "role": ROLES.get(name, "configuration"),
            "scores": list(values[:objectives]),
            "intervals": [None] * objectives,
        }
        for name, values in CONTROLS.items()
    ]
    names = ["smoke", "smoke/retention"][:objectives]
    return {
        "version": 1, "name": "toy", "key": "da01b81b379ca79d23d05260213112da", "directory": "runs/search/toy-da01b81b",
        "command": None, "sampler": "tpe", "seed": 0,
        "objectives": [{"name": n, "lower": False, "terms": [["smoke", "add", "exact_match"], ["smoke", "triage", "acc"]], **OF_OBJECTIVE} for n in names],
        "space": SPACE, "items": ITEMS, "stages": [75, 150, 225], "controls": controls, "trials": done,
        "importances": {n: {"mix.lambda": 0.7134, "mix.merge": 0.2531, "mix.bricks.triage": 0.0335} for n in names} if trials > 3 else {},
        "winner": winner if objectives == 1 else None, "recipes": {n: f"runs/search/toy-da01b81b/{'winner' if objectives == 1 else n}.yaml" for n in chosen},
        "best_control": "task-arithmetic-1", "warnings": [],
        "test": {
            "baseline": "task-arithmetic-1",
            "rows": [*(_row(n, list(v[:objectives])) for n, v in CONTROLS.items()), *(_row(n, scores[n]) for n in chosen), *(_row(n, scores[n], "random") for n in best)],
            "against": {n: [_against(_row(n, scores[n]), o, i) for i, o in enumerate(names)] for n in (*chosen, *best)},
            "comparison": compared([*chosen, *best] if comparison else []) | ({} if comparison else {"rows": []}),
        },
        **({} if objectives == 1 else {"front": chosen, "hypervolume": _areas(rng, trials)}),
    }  # fmt: skip


def unfinished(document: Row, total: int | None) -> Row:
    """The document of a search that has not tested anything yet, and has so many candidates in all."""
    known = {key: value for key, value in document.items() if key not in ("test", "unbeaten")}
    objectives = {"front": []} if "front" in document else {}
    progress = {"done": len(document["trials"]), "total": total}
    return {**known, "winner": None, "recipes": {}, **objectives, "progress": progress}


def all_given_up(objectives: int = 1) -> Row:
    """A search whose ten candidates all fell behind the brick `triage`, which beats the other controls."""
    document = make_search(0, objectives=objectives)
    brick = next(c for c in document["controls"] if c["name"] == "triage")
    brick["scores"] = [0.9, 0.9][:objectives]
    row = next(r for r in document["test"]["rows"] if r["name"] == "triage")
    row |= {"search": brick["scores"], "test": [0.88, 0.87][:objectives]}
    trials = [
        {
            "arm": "search",
            "number": i,
            "name": f"trial-{i}",
            "values": {"mix.merge": "ties", "mix.lambda": 0.3 + 0.1 * i, "mix.bricks.triage": 1.0},
            "scores": [0.5 + 0.01 * i] * objectives,
            "digest": f"{i:032x}",
            "stage": 0,
            "stopped": True,
            "items": 75,
            "beaten_by": "triage",
            "seconds": {"all": 2.5},
        }
        for i in range(10)
    ]
    unbeaten = [{"name": "triage", "role": "brick", "search": row["search"], "test": row["test"]}]
    return {
        **document,
        "trials": trials,
        "best_control": "triage",
        "winner": None,
        "unbeaten": unbeaten,
        "test": {**document["test"], "baseline": "triage"},
    }


def compared(candidates: list[str]) -> Row:
    """The comparison of the tested configurations, where candidates have the recipe's name before their own."""
    bricks = ["add", "reverse", "triage"]
    table = {
        n: CONFIGURATIONS.get(n, (ROLES.get(n, "configuration"), bricks, CONFIGURATIONS["starter-ties"][2])) for n in CONTROLS
    }
    table |= {f"toy-{n}": ("configuration", bricks, CONFIGURATIONS["starter-ties"][2]) for n in candidates}
    document = make_document(tasks=["add", "reverse", "triage", "retention"], configurations=table)
    for c in document["configurations"]:
        c["recipe"] = "recipes/toy.yaml" if c["name"] == "toy" else None
    return Comparison.of(document, "comparison").to_dict()


def _trial(rng: np.random.Generator, arm: str, number: int, objectives: int) -> Row:
    method = str(rng.choice(SPACE["mix.merge"]["choices"]))
    lam = float(f"{rng.uniform(0.2, 2.0):.4g}")
    values: Row = {"mix.merge": method, "mix.lambda": lam}
    if method != "task_arithmetic":
        values["mix.density"] = float(f"{10 ** rng.uniform(-2, 0):.4g}")
    values["mix.bricks.triage"] = float(f"{rng.uniform(0.5, 1.5):.4g}")
    head: Row = {"arm": arm, "number": number, "name": f"{'trial' if arm == 'search' else 'random'}-{number}", "values": values}
    if number % 7 == 5:
        return {**head, "scores": None, "error": "weights are not finite", "seconds": {"all": 1.0}}
    level = 0.78 - 0.35 * (lam - 0.9) ** 2 + 0.03 * rng.normal() + (0.04 if method == "ties" else 0.0)
    scores = [round(float(np.clip(level, 0, 1)), 6), round(float(0.9 - 0.05 * lam + 0.01 * rng.normal()), 6)][:objectives]
    stopped = level < 0.66
    whole = {} if stopped else {"intervals": [[round(s - 0.03, 6), round(s + 0.03, 6)] for s in scores]}
    return {
        **head, **whole, "scores": scores, "digest": f"{number:032x}", "stage": 0 if stopped else 2, "stopped": stopped,
        "items": 75 if stopped else ITEMS["search"], "beaten_by": "task-arithmetic-1" if stopped else None, "seconds": {"all": 2.5},
    }  # fmt: skip


def _covers(a: list[float], b: list[float]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _row(name: str, scores: list[float], part: str = "found") -> Row:
    """On test items a control has 0.01 less than on search items, a candidate 0.03."""
    loss = 0.01 if name in CONTROLS else 0.03
    digest = f"{zlib.crc32(name.encode()):08x}" * 4
    return {
        "name": name,
        "part": "control" if name in CONTROLS else part,
        "digest": digest,
        "same_as": None,
        "search": scores,
        "test": [round(s - loss, 6) for s in scores],
        "optimism": [round(loss - 0.01, 6)] * len(scores),
    }


def _against(row: Row, objective: str, index: int) -> Row:
    control = CONTROLS["task-arithmetic-1"][index]
    search, test = round(row["search"][index] - control, 6), round(row["test"][index] - control + 0.01, 6)
    gaps = [{"diff": d, "low": round(d - 0.04, 6), "high": round(d + 0.04, 6), "p": 0.01, "clusters": 40} for d in (test, search)]
    verdict = "better" if gaps[0]["low"] > 0 else "worse" if gaps[0]["high"] < 0 else "cannot tell"
    reason = "the interval includes 0" if verdict == "cannot tell" else None
    return {
        "objective": objective,
        "test": gaps[0],
        "search": gaps[1],
        "verdict": verdict,
        "reason": reason,
        "optimism": round(search - test, 6),
    }


def _areas(rng: np.random.Generator, trials: int) -> list[float]:
    return [round(float(v), 6) for v in 0.012 + np.maximum.accumulate(0.02 * rng.random(trials) * np.linspace(0.3, 1, trials))]
