"""Merge many adapters, or route between them: the source of a table in docs/merging-advice.md.

    python benchmarks/many_adapters.py
    python benchmarks/many_adapters.py --counts 32 100 --folder DIR      DIR keeps bricks and scores, so that a later call goes on

Adapters of rank 4 are trained here on the starter base. Each learns an invented language: the words for the same twelve nouns, in
three wordings. Merges and a route are asked in two other wordings, 24 items a language, whose whole answer must be the most likely one.
`right` is the mean over the languages. Results go to benchmarks/results/many-adapters.json after every number of adapters.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pool_starter import PROJECT
from record import parser_of, write_results

from workbench.advice.groups import Group
from workbench.advice.runner import Runner
from workbench.models.texts import read_texts
from workbench.run.device import Work
from workbench.upkeep.train import train_brick

BASE = PROJECT / "bricks" / "starter" / "base"
COUNTS = (4, 8, 16)
ITEMS, TEXTS, LARGEST_FIT = 24, 16, 16
NOUNS = ("cat", "river", "bread", "stone", "window", "horse", "garden", "winter", "ship", "letter", "bridge", "apple")
LEARNED = ("In {language}, the word for {noun} is", "Translate {noun} into {language}. Answer:", "{noun} in {language}:")
ASKED = ("How do you say {noun} in {language}? Answer:", "{language} word for {noun} =")
SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
SETTINGS = {
    "base": str(BASE), "data": "train.jsonl", "method": "lora", "rank": 4, "alpha": 8, "target_modules": "all-linear", "learning_rate": 3e-3,
    "steps": 60, "batch_size": 8, "warmup": 5, "schedule": "cosine", "seed": 0, "save_every": 0,
}  # fmt: skip
SUM, TSV = {"merge": "task_arithmetic"}, {"merge": "tsv"}
STEPS: dict[str, dict[str, Any]] = {
    "average": {"merge": "average"},
    "sum": SUM,
    "sum .5": {**SUM, "lambda": 0.5},
    "tsv": TSV,
    "tsv, auto": {**TSV, "weights": "auto"},
    "ties": {"merge": "ties"},
    "regmean": {"merge": "regmean"},
    "featcal": {"merge": "featcal"},
}


def main() -> None:
    """Train the adapters, ask every merge and route, and write the results file."""
    parser = parser_of(__doc__, "many-adapters")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="numbers of adapters")
    parser.add_argument("--folder", type=Path, help="folder of the adapters and scores to keep")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        names = languages(max(options.counts))
        bricks = {name.lower(): str(trained(folder / name.lower(), name)) for name in names}
        for count in options.counts:
            kept = folder / f"{count}.json"
            found = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
            measured(dict(list(bricks.items())[:count]), folder, found, kept)
            rows.append({"adapters": count, "ways": {way: {**one, "right": shares(one["right"])} for way, one in found.items()}})
            write_results(options.out, {"items": ITEMS, "texts": TEXTS, "rank": SETTINGS["rank"], "rows": rows})


def measured(bricks: Mapping[str, str], folder: Path, found: dict[str, Any], kept: Path) -> None:
    """Ask each brick alone, every merge, and a route between all; what was measured before is kept."""
    items = {name: read_texts(folder / name / "asked.jsonl", name) for name in bricks}
    runner = Runner(bricks, str(BASE), items, folder, Work(torch.device("cpu"), 2), ITEMS)
    runner.fit_on({name: read_texts(folder / name / "train.jsonl", name) for name in bricks})

    def note(way: str, right: Mapping[str, Any], seconds: float, **more: Any) -> None:
        found[way] = {
            "right": {name: [int(v) for v in values] for name, values in right.items()},
            "seconds": round(seconds),
            **more,
        }
        kept.write_text(json.dumps(found), "utf-8")
        each = list(shares(found[way]["right"]).values())
        print(len(bricks), way, round(sum(each) / len(each), 3), f"{seconds:.0f} s", flush=True)

    if "alone" not in found:
        started = time.process_time()
        alone = {name: runner.run(name, {**SUM, "bricks": [name]}, [name]).right[name] for name in bricks}
        note("alone", alone, time.process_time() - started)
    for way, step in STEPS.items():
        reads = step["merge"] in ("regmean", "featcal")
        if way in found or (reads and len(bricks) > LARGEST_FIT):
            continue
        given = {name: {"calibration": f"{name}/train.jsonl"} for name in bricks}
        started = time.process_time()
        asked = runner.run(way, {**step, **({"bricks": given, "samples": TEXTS} if reads else {})})
        note(way, asked.right, time.process_time() - started)
    if "route" not in found:
        started = time.process_time()
        routed, price, ties = runner.route([Group(name=name, bricks=[name], step=None) for name in bricks])
        note("route", routed.right, time.process_time() - started, price=price.to_dict(), ties=ties)


def shares(right: Mapping[str, list[int]]) -> dict[str, float]:
    """Return the share of right answers of each language."""
    return {name: round(sum(values) / len(values), 4) for name, values in right.items()}


def languages(count: int) -> list[str]:
    """Return names of invented languages, all different."""
    draw = random.Random(0)
    return [word.capitalize() for word in draw.sample([a + b + c for a in SYLLABLES for b in SYLLABLES for c in "nkrs"], count)]


def trained(folder: Path, language: str) -> Path:
    """Train the adapter of a language once, and return its folder."""
    if not (folder / "brick.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(language)
        words = {noun: "".join(draw.sample(SYLLABLES, 2)) for noun in NOUNS}
        for file, wordings in (("train.jsonl", LEARNED), ("asked.jsonl", ASKED)):
            rows = [
                {"prompt": wording.format(language=language, noun=noun), "completion": word}
                for wording in wordings
                for noun, word in words.items()
            ]
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (folder / "train.yaml").write_text(yaml.safe_dump(SETTINGS), "utf-8")
        started = time.time()
        train_brick(folder, torch.device("cpu"), score=False)
        print(language, f"trained in {time.time() - started:.0f} s", flush=True)
    return folder


if __name__ == "__main__":
    main()
