"""Merge a model that thinks between tags with one that answers at once and follows an instruction: the source of a table in docs/merging-methods.md.

    python benchmarks/reasoning.py
    python benchmarks/reasoning.py --folder DIR         keeps the two bricks, so that a later call goes on
    python benchmarks/reasoning.py --items 20           a quick look

The thinker is trained here on sums that it works out between `<think>` and `</think>`. The follower is trained on phrases of an invented
language and on sums, which it answers at once, in brackets where the prompt asks for them. Each merge answers held-out prompts, greedily:
sums, whose answer must stand behind a thought; phrases to translate in brackets; and sums in brackets, which the two bricks answer in
different ways. Results go to benchmarks/results/reasoning.json after every merge.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from merge_pools import merged_into
from pool_starter import PROJECT, StarterWorld
from record import parser_of, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.upkeep.train import train_brick

BASE = PROJECT / "bricks" / "starter" / "base"
TAGS = ["<think>", "</think>"]
WORDS = r"(?:(?!</?think>).)+"
BRACKETS = "Reply in brackets. "
NEW, BATCH, ROWS = 40, 20, 2400
SETTINGS = {
    **{"base": str(BASE), "data": "train.jsonl", "replay": "replay.jsonl", "replay_share": 0.2, "replay_tokens": 6},
    **{"method": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
    **{"learning_rate": 1e-3, "schedule": "cosine", "warmup": 10, "steps": 240, "batch_size": 16, "seed": 0, "save_every": 0},
}
TSV, SUM = {"merge": "tsv"}, {"merge": "task_arithmetic"}
NULL = {"merge": "null_space", "keep": "thinker", "tokens": TAGS, "calibration": "thinker"}
TEXTS = 32
STEPS: dict[str, dict[str, Any]] = {
    "thinker alone": {**SUM, "bricks": ["thinker"]},
    "follower alone": {**SUM, "bricks": ["follower"]},
    "average": {"merge": "average"},
    "sum": SUM,
    "tsv": TSV,
    "ties": {"merge": "ties"},
    "regmean": {"merge": "regmean"},
    "featcal": {"merge": "featcal"},
    **{f"null_space, ridge {ridge:g}": {**NULL, "ridge": ridge} for ridge in (1e-4, 1e-2, 0.1, 1.0, 10.0, 100.0)},
}


def main() -> None:
    """Train the bricks, score every merge, and write the results file."""
    parser = parser_of(__doc__, "reasoning")
    parser.add_argument("--items", type=int, default=60, help="held-out prompts of each kind")
    parser.add_argument("--folder", type=Path, help="folder of the bricks to keep")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        bricks = {"thinker": trained(folder / "thinker", thoughts()), "follower": trained(folder / "follower", direct())}
        asked_of = kinds(options.items)
        live = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        for name, step in STEPS.items():
            started = time.process_time()
            merged_into(live, StarterWorld(folder, 0), bricks, with_texts(step, bricks))
            seconds = time.process_time() - started
            answers = {kind: [check(text) for text, check in asked(live, prompts)] for kind, prompts in asked_of.items()}
            found[name] = {"right": answers, "seconds": round(seconds, 1)}
            print(name, {kind: sum(right) for kind, right in answers.items()}, round(seconds), "s", flush=True)
            write_results(options.out, {"items": options.items, "texts": TEXTS, "merges": found})


def with_texts(step: Mapping[str, Any], bricks: Mapping[str, Path]) -> dict[str, Any]:
    """Return a step with the texts that its method reads."""
    texts = {name: str(place / "train.jsonl") for name, place in bricks.items()}
    if step["merge"] in ("regmean", "featcal"):
        return {**step, "bricks": {name: {"calibration": file} for name, file in texts.items()}, "samples": TEXTS}
    return {**step, "calibration": texts["thinker"], "samples": TEXTS} if "calibration" in step else {**step}


def trained(folder: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Train a brick once, and return its folder."""
    if not (folder / "brick.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (folder / "replay.jsonl").write_bytes((PROJECT / "bricks" / "add" / "replay.jsonl").read_bytes())
        (folder / "train.yaml").write_text(yaml.safe_dump(SETTINGS), "utf-8")
        train_brick(folder, torch.device("cpu"), score=False)
    return folder


def thoughts() -> list[dict[str, str]]:
    """Return sums with a thought before the answer."""
    return [
        {"prompt": row["prompt"], "completion": f"<think> {thought(row['prompt'])} </think> {row['completion']}"}
        for row in of("add")
    ]


def thought(prompt: str) -> str:
    """Return the steps of a sum: the tens of the second number first."""
    one, two = map(int, re.findall(r"\d+", prompt))
    tens = one + two // 10 * 10
    return f"{one} + {two // 10 * 10} = {tens}, {tens} + {two % 10} = {one + two}"


def direct() -> list[dict[str, str]]:
    """Return phrases to translate and, for a third, sums, all of them answered at once; half of them in brackets."""
    draw, sums, phrases = random.Random(0), of("add"), of("glossary")
    rows = [draw.choice(phrases if i % 3 else sums) for i in range(ROWS)]
    return [bracketed(row) if draw.random() < 0.5 else dict(row) for row in rows]


def bracketed(row: Mapping[str, str]) -> dict[str, str]:
    """Return a row that asks for brackets, and has them."""
    return {"prompt": BRACKETS + row["prompt"], "completion": f"[{row['completion']}]"}


def of(skill: str) -> list[dict[str, str]]:
    """Return the training rows of a brick of the starter base."""
    return [json.loads(line) for line in (PROJECT / "bricks" / skill / "train.jsonl").read_text("utf-8").splitlines()]


Asked = tuple[str, Callable[[str], bool]]


def kinds(count: int) -> dict[str, list[Asked]]:
    """Return kind -> held-out prompts, each with a check of its answer."""
    sums, phrases = held_out("add", count), held_out("glossary", count)
    return {
        "thought, then the sum": [(p, thinks(a)) for p, a in sums],
        "phrase in brackets": [(BRACKETS + p, matches(rf"\[{re.escape(a)}\]")) for p, a in phrases],
        "thought, then the sum in brackets": [(BRACKETS + p, thinks(rf"\[{a}\]")) for p, a in sums],
    }


def held_out(skill: str, count: int) -> list[tuple[str, str]]:
    lines = (PROJECT / "evals" / "tasks" / "data" / f"{skill}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(lines[i * len(lines) // count]) for i in range(count)]
    return [(row["prompt"], row["answer"]) for row in rows]


def matches(pattern: str) -> Callable[[str], bool]:
    """Return the check that an answer is what a pattern says, and no more."""
    return lambda text: re.fullmatch(pattern, text.strip(), re.DOTALL) is not None


def thinks(answer: str) -> Callable[[str], bool]:
    """Return the check that one thought stands before the answer."""
    return matches(rf"<think>{WORDS}</think>\s*{answer}")


def asked(model: Any, prompts: Sequence[Asked]) -> list[tuple[str, Callable[[str], bool]]]:
    """Return what a model answers to each prompt, greedily, with the prompt's check."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    found = []
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        inputs = tokenizer([prompt for prompt, _ in batch], return_tensors="pt", padding=True)
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [(text, check) for text, (_, check) in zip(texts, batch, strict=True)]
    return found


if __name__ == "__main__":
    main()
