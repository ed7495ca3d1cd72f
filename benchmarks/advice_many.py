"""Merge, route, or both, with eight and sixteen bricks: what `workbench brick advise --measure` proposes, and what each way keeps and costs.

    python benchmarks/advice_many.py
    python benchmarks/advice_many.py --pools eight --folder DIR      one pool; DIR keeps bricks and scores, so that a later call goes on
    python benchmarks/advice_many.py --folder DIR --prices           measures the times again, on an idle machine

The eight bricks are those of the starter base, of which two answer the same prompts in opposite ways. The sixteen are these and a second
training of each. Every way is scored on held-out items, 384 in all, each brick on its own ones; routers are fitted on the bricks' training
rows and choose for each item. `--prices` fits them on a few rows, because a decision takes as long whatever a router was fitted on. Results go to benchmarks/results/advice-many.json after every pool.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pool_starter import PROJECT, StarterTraining, StarterWorld
from record import parser_of, write_results

from workbench.advice.advise import advise
from workbench.advice.groups import Group
from workbench.advice.runner import Runner
from workbench.models.texts import Text, read_texts
from workbench.route.deciding import samples
from workbench.run.device import Work

SKILLS = ("add", "reverse", "triage", "actions", "glossary", "record", "date-dmy", "date-mdy")
QUADS = (("add", "triage", "glossary", "date-dmy"), ("reverse", "actions", "record", "date-mdy"))  # the two dates apart
POOLS = {"eight": 1, "sixteen": 2}
ITEMS = 384
COMMANDS = ("python benchmarks/advice_many.py --folder DIR", "python benchmarks/advice_many.py --folder DIR --prices")
WORK = Work(torch.device("cpu"), 2)
TSV = {"merge": "tsv", "weights": "auto"}


def main() -> None:
    """Score every way of each pool, and write the results file."""
    parser = parser_of(__doc__, "advice-many")
    parser.add_argument("--pools", nargs="+", choices=list(POOLS), default=list(POOLS))
    parser.add_argument("--folder", type=Path, help="folder of the bricks and scores to keep")
    parser.add_argument("--prices", action="store_true", help="measure times again, of pools that are kept")
    options = parser.parse_args()
    rows, head = [], {"command": " && ".join(COMMANDS)} if options.prices else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for pool in options.pools:
            kept = folder / f"{pool}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(scored(pool, StarterWorld(folder, 0))), "utf-8")
            if options.prices:
                kept.write_text(json.dumps(priced(json.loads(kept.read_text("utf-8")), StarterWorld(folder, 0))), "utf-8")
            rows.append(json.loads(kept.read_text("utf-8")))
            write_results(options.out, {**head, "items": ITEMS, "rows": rows})


def scored(pool: str, world: StarterWorld) -> dict[str, Any]:
    """Return what the advice says of a pool, and the answers of every way on held-out items."""
    bricks, own = trained(pool, world)
    advice = advise(bricks, str(world.base), own, project=world.folder, work=WORK, measured=True)
    runner = Runner(bricks, str(world.base), items(pool), world.folder, WORK, ITEMS // len(bricks))
    runner.fit_on({name: read_texts(file, name) for name, file in own.items()})
    alone = {name: runner.run(name, {"merge": "task_arithmetic", "bricks": [name]}, [name]).right[name] for name in bricks}
    found: dict[str, Any] = {}
    for label, step in {"one merge": TSV, "average": {"merge": "average"}}.items():
        found[label] = {"right": listed(runner.run(label, step).right)}
    for label, groups in ways(pool, advice.groups).items():
        routed, price, ties = runner.route(groups)
        found[label] = {"right": listed(routed.right), "groups": len(groups), "price": price.to_dict(), "ties": ties}
        print(pool, label, price, flush=True)
    document = advice.to_dict()
    said = {key: document[key] for key in ("regime", "says", "step", "groups", "reasons", "warnings", "trial")}
    return {"pool": pool, "advice": said, "alone": listed(alone), "ways": found}


def trained(pool: str, world: StarterWorld) -> tuple[dict[str, str], dict[str, Path]]:
    """Return brick -> directory, and brick -> file of its training rows; bricks that are missing are trained."""
    trainings = {name_of(skill, draw): StarterTraining((skill,), draw=draw) for draw in range(POOLS[pool]) for skill in SKILLS}
    bricks = {name: str(world.brick(training, 0)) for name, training in trainings.items()}
    return bricks, {name: world.texts(training) for name, training in trainings.items()}


def priced(row: dict[str, Any], world: StarterWorld) -> dict[str, Any]:
    """Return a pool's results with the prices of its routes measured again."""
    pool = row["pool"]
    bricks, own = trained(pool, world)
    runner = Runner(bricks, str(world.base), items(pool), world.folder, WORK, 1)
    runner.fit_on({name: read_texts(file, name)[:40] for name, file in own.items()})
    advised = [Group.model_validate(group) for group in row["advice"]["groups"]]
    for label, groups in ways(pool, advised).items():
        with patch.object(samples, "built_in", return_value=samples.built_in()[::20]):
            _, price, _ = runner.route(groups)
        row["ways"][label]["price"] = price.to_dict()
        print(pool, label, price, flush=True)
    return row


def name_of(skill: str, draw: int) -> str:
    return skill if not draw else f"{skill}-{draw + 1}"


def items(pool: str) -> dict[str, list[Text]]:
    """Return brick -> held-out items: the bricks of one skill share its items among them."""
    found, draws = {}, POOLS[pool]
    for draw in range(draws):
        for skill in SKILLS:
            rows = read_texts(PROJECT / "evals" / "tasks" / "data" / f"{skill}.jsonl", skill)
            found[name_of(skill, draw)] = rows[draw::draws]
    return found


def ways(pool: str, advised: list[Group]) -> dict[str, list[Group]]:
    """Return ways to route: between the advised groups, between single bricks, and between merges of more and more skills."""
    draws = range(POOLS[pool])
    names = [name_of(skill, draw) for draw in draws for skill in SKILLS]
    pairs = [(one, two) for quad in QUADS for one, two in (quad[:2], quad[2:])]

    def merged(skills: tuple[str, ...]) -> Group:
        return Group(name="-".join(skills), bricks=[name_of(skill, draw) for skill in skills for draw in draws], step=TSV)

    found = {
        "advised groups": advised,
        "pairs of skills": [merged(pair) for pair in pairs],
        "two halves": [merged(quad) for quad in QUADS],
    }
    single = {"every brick": [Group(name=name, bricks=[name], step=None) for name in names]}
    return found | (single if len(advised) < len(names) else {})


def listed(right: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: [int(value) for value in values] for name, values in right.items()}


if __name__ == "__main__":
    main()
