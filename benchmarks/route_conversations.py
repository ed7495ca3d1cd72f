"""Routing of the last message of a conversation: follow-ups on a brick's topic, requests that leave it, and those for another brick.

    python benchmarks/route_conversations.py

A router of six bricks is fitted as recipes/route-six.yaml fits it, with near misses of other kinds as `negatives`. It is asked for the brick
of the last message of every conversation of evals/routing/conversations.jsonl, alone and within its conversation under the base's chat
template. `FOLLOWING` was chosen on the rows whose part is `chosen`; those of `held` were written afterwards.
Results go to benchmarks/results/route-conversations.json.
"""

from __future__ import annotations

from typing import Any

import torch
from record import parser_of, write_results
from route_abstain import PROJECT, RECIPES, load, near_negatives, rows_of

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.models.prompts import encode_text
from workbench.recipe.recipe import load_recipe
from workbench.route.deciding.pooling import FOLLOWING
from workbench.route.deciding.router import BASE
from workbench.route.mixing.live import Routing
from workbench.steps import RouteContext


def main() -> None:
    """Fit, ask, and write the results file."""
    options = parser_of(__doc__, "route-conversations").parse_args()
    torch.set_num_threads(1)
    routing, tokenizer = routed()
    rows = []
    for row in rows_of("evals/routing/conversations.jsonl"):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(row["turns"])]
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        found = {
            way: routing.label(routing.decide([tokens]).weights[0])
            for way, tokens in (("alone", encode_text(tokenizer, row["turns"][-1])), ("conversation", whole))
        }
        rows.append({**row, "found": found})
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        group = groups.setdefault(f"{row['part']} {row['kind']}", {"n": 0, "alone": 0, "conversation": 0})
        group["n"] += 1
        for way, brick in row["found"].items():
            group[way] += brick == (row["brick"] or BASE)
    wrong = [
        {"id": row["id"], "found": row["found"]["conversation"]}
        for row in rows
        if row["found"]["conversation"] != (row["brick"] or BASE)
    ]
    document = {"bricks": list(routing.bricks), "following": FOLLOWING, "threshold": routing.router.threshold, "groups": groups}
    write_results(options.out, {**document, "wrong": wrong})


def routed() -> tuple[Routing, Any]:
    """Return the routing of six bricks, and the tokenizer."""
    model, tokenizer = load()
    step: Any = load_recipe(PROJECT / RECIPES["six"]).router
    prompts = step.prompts(PROJECT)
    router = step.fit(RouteContext(model, tokenizer, torch.device("cpu"), prompts, negatives=near_negatives(list(prompts))))
    factors = {name: linear_factors(Adapter(PROJECT / "bricks" / name, name)) for name in prompts}
    return Routing(model, tokenizer, router, factors), tokenizer


if __name__ == "__main__":
    main()
