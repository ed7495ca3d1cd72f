"""Accuracy of routers on the eight starter bricks. The results file is written after every router.

Every router is fitted on 64 prompts a brick from the bricks' training files. It is asked for the bricks of test items, of templates that no
training file has (evals/routing), of copies in lower case, behind greetings and under the chat template, and of the second of two
requests. How often it sends them to the base is measured by route_abstain.py.

python benchmarks/route_accuracy.py
python benchmarks/route_accuracy.py --only text    # measures one router again, and keeps the others of the results file
python benchmarks/route_accuracy.py --base DIR --out FILE    # another base; `arrow`, which reads its bricks, is left out
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import keep_head, parser_of, write_results

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import read_prompts
from workbench.recipe.methods import methods
from workbench.route.deciding.checking import Asked, judged
from workbench.route.deciding.hidden import ChatFrame, pooled, token_rows
from workbench.steps import Prompts, RouteContext

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
BRICKS = ("add", "reverse", "triage", "actions", "glossary", "record", "date-dmy", "date-mdy")
SAMPLES = 64
# Router -> method, fields, and of how many prompts one is asked: routers that run whole passes for each prompt get fewer of them.
ROUTERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ridge": ("ridge", {}, 1),
    "centroid": ("centroid", {}, 1),
    "text": ("text", {}, 1),
    "arrow": ("arrow", {"samples": 16}, 8),
}
# Greetings that no copy of a calibration prompt has.
GREETINGS = (
    "Dear assistant, ",
    "Sorry to bother you again, but here is another one for today. ",
    "Good evening! I hope that your day went well. ",
    "ok next: ",
)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROJECT / name).read_text("utf-8").splitlines()]


def sets(tokenizer: Any) -> dict[str, list[Asked]]:
    """Name -> prompts with the brick that should answer."""
    tasks = {name: rows_of(f"evals/tasks/data/{name}.jsonl") for name in BRICKS}
    test = [Asked(row["prompt"], name) for name, rows in tasks.items() for row in rows[::5]]
    half = test[::2]
    paraphrases, looked_at = (
        [Asked(row["prompt"], row["brick"]) for row in rows_of(f"evals/routing/{name}.jsonl")]
        for name in ("unseen", "development")
    )
    found = {
        "test items": test,
        "unseen templates": paraphrases,
        "lower case": [Asked(asked.prompt.lower(), asked.brick) for asked in half],
        "behind a greeting": [Asked(GREETINGS[i % len(GREETINGS)] + asked.prompt, asked.brick) for i, asked in enumerate(half)],
        "unseen, greeting": [
            Asked(GREETINGS[i % len(GREETINGS)] + asked.prompt, asked.brick) for i, asked in enumerate(paraphrases)
        ],
        "development templates": looked_at,
        "two requests": [Asked(row["prompt"], row["brick"]) for row in rows_of("evals/routing/two-requests.jsonl")],
    }
    if tokenizer.chat_template:
        template = [[{"role": "user", "content": asked.prompt}] for asked in paraphrases]
        chat = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in template]
        frame = ChatFrame.of(tokenizer)
        found["unseen, chat template"] = [
            Asked(frame.message(text), asked.brick) for text, asked in zip(chat, paraphrases, strict=True)
        ]
    return found


def accuracy(model: Any, tokenizer: Any, names: Sequence[str], found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Add router -> its record, and one summary for each set, for the named routers."""
    calibration = {name: read_prompts(PROJECT / f"bricks/{name}/train.jsonl", name, SAMPLES) for name in BRICKS}
    factors = {name: linear_factors(Adapter(PROJECT / "bricks" / name, name)) for name in BRICKS}
    context = RouteContext(model, tokenizer, torch.device("cpu"), calibration, factors=factors.__getitem__)
    asked = sets(tokenizer)
    states: dict[str, torch.Tensor] = {}
    for label, (name, fields, every) in ((label, ROUTERS[label]) for label in names):
        start = time.process_time()
        step: Any = methods()[f"route:{name}"].model_validate({"route": name, "calibration": "{brick}", **fields})
        router = step.fit(context)
        fitting = time.process_time() - start
        rows = []
        for part, prompts in asked.items():
            taken = prompts[::every]
            texts = [one.prompt for one in taken]
            tokens = token_rows(tokenizer, texts)
            if router.layer is not None and part not in states:
                states[part] = pooled(model, tokens, router.layer, router.window)
            hidden = None if router.layer is None else states[part]
            decisions = router.decide(Prompts(texts, hidden, router.measure(model, tokens)))
            rows.append(judged(part, taken, decisions, BRICKS, router.choice.ties).summary().to_dict())
        found[label] = {
            "sets": rows,
            "fields": fields,
            "record": router.record,
            "fit_cpu_seconds": round(fitting, 1),
            "threshold": router.threshold,
            "ties": [list(group) for group in router.choice.ties],
        }
        print(label, json.dumps({row["set"]: round(row["right_score"], 3) for row in rows}), flush=True)
        keep()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results file."""
    parser = parser_of(__doc__, "route-accuracy")
    parser.add_argument("--only", nargs="*", choices=list(ROUTERS), help="measure these routers again")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the model")
    options = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(options.base)
    before = json.loads(options.out.read_text("utf-8")) if options.only else {}
    routers: dict[str, Any] = {label: before["routers"][label] for label in ROUTERS if label in before.get("routers", {})}
    every = {label: every for label, (_, _, every) in ROUTERS.items()}
    other = {} if options.base == BASE else {"base": options.base.name}
    document = {**other, "bricks": list(BRICKS), "samples": SAMPLES, "every": every, "routers": routers}

    def write() -> None:
        write_results(options.out, document)
        if options.only:
            keep_head(options.out, before, options.only)

    readable = [name for name in ROUTERS if not other or name != "arrow"]
    accuracy(model, tokenizer, options.only or readable, routers, write)


if __name__ == "__main__":
    main()
