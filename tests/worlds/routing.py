"""Calibration prompts of bricks on the tiny models: each brick has words of its own, some templates, and a content word of all bricks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from workbench.steps import RouteContext

CONTENT = [f"w{i}" for i in range(40, 60)]


def prompts(brick: int, count: int = 16, templates: int = 4, seed: int = 0) -> list[str]:
    """Prompts of a brick: `templates` orders of the brick's own eight words, with a content word in between."""
    draw = random.Random(f"{brick} {seed}")
    words = [f"w{8 * brick + i}" for i in range(8)]
    orders = [random.Random(f"{brick} {t}").sample(words, 8) for t in range(templates)]
    found = []
    for i in range(count):
        order, word = orders[i % templates], draw.choice(CONTENT)
        at = draw.randrange(2, 6)
        found.append(" ".join([*order[:at], word, *order[at:]]))
    return found


def outside(count: int = 16, seed: int = 0) -> list[str]:
    """Prompts of content words alone."""
    draw = random.Random(f"outside {seed}")
    return [" ".join(draw.choices(CONTENT, k=8)) for _ in range(count)]


def requests() -> list[tuple[str, str]]:
    """Tasks and requests that no brick is for, in words of the tiny models, in the place of the built-in ones, which these cannot read."""
    return [(str(i % 28), text) for i, text in enumerate(outside(280, seed=7))]


BUILT_IN = "workbench.route.deciding.samples.built_in"
"""Name of the function that `requests` stands for."""


def context(model: Any, tokenizer: Any, calibration: dict[str, list[str]], **fields: Any) -> RouteContext:
    """Return the context that a route method is fitted with."""
    return RouteContext(model, tokenizer, torch.device("cpu"), calibration, **fields)


def write_prompts(folder: Path, bricks: dict[str, int], **options: Any) -> None:
    """Write a calibration file NAME.jsonl for each brick."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in bricks.items():
        rows = [json.dumps({"prompt": text, "completion": "w1"}) for text in prompts(number, **options)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
