"""Bricks on a tiny model that a router chooses by the words of a prompt, and the same bricks under PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from worlds.jsonl import write_jsonl
from worlds.tiny import LORA_MODULES, WORDS, live, save_adapter

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.models.prompts import load_tokenizer
from workbench.route.mixing.live import Routing, attach
from workbench.steps.route import Decisions, Prompts

RANKS = {"one": 4, "two": 8, "three": 16}
WORD = {"one": "w1", "two": "w2", "three": "w3"}
"""Brick -> the word that calls it in prompts of `WordRouter`."""
DOMAIN = {"one": range(10), "two": range(20, 30), "three": range(40, 50)}
"""Brick -> numbers of the words of its calibration prompts."""


def save_ranks(base: Path, out: Path, family: str = "llama") -> dict[str, Path]:
    """Adapters of ranks 4, 8 and 16; the second is rsLoRA, and the third lacks a module that the others have."""
    modules = LORA_MODULES[family]
    save_adapter(base, out / "one", seed=11, family=family, r=4)
    save_adapter(base, out / "two", seed=12, family=family, r=8, use_rslora=True, lora_alpha=4)
    save_adapter(base, out / "three", seed=13, family=family, r=16, target_modules=modules[1:])
    return {name: out / name for name in RANKS}


def factors(places: Mapping[str, Path]) -> dict[str, Any]:
    """Brick -> module -> (A, B)."""
    return {name: linear_factors(Adapter(place, f"brick '{name}'")) for name, place in places.items()}


def peft_of(base: Path, places: Mapping[str, Path], dtype: torch.dtype = torch.float32) -> Any:
    """The base with the same adapters under PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    first, *others = places
    wrapped = PeftModel.from_pretrained(model, places[first], adapter_name=first)
    for name in others:
        wrapped.load_adapter(places[name], adapter_name=name)
    return wrapped.eval()


@dataclass(frozen=True)
class WordRouter:
    """A router by words: the brick whose word stands last in a prompt; the base where there is none."""

    bricks: tuple[str, ...] = tuple(RANKS)
    layer: int | None = None
    window: int = 16
    threshold: float | None = 0.5
    method: str = "word"
    record: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def decide(self, prompts: Prompts) -> Decisions:
        self.seen.extend(prompts.texts)
        weights = torch.zeros(len(prompts.texts), len(self.bricks))
        for row, text in zip(weights, prompts.texts, strict=True):
            called = [name for word in text.split() for name in self.bricks if word == WORD[name]]
            if called:
                row[self.bricks.index(called[-1])] = 1.0
        return Decisions(weights, weights.clone(), weights.sum(1))

    def measure(self, model: Any, rows: Sequence[Sequence[int]]) -> None:
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}


def routed(base: Path, places: Mapping[str, Path], router: Any = None) -> tuple[Any, Routing]:
    """The float32 base with a router, and its routing."""
    model = live(base)
    routing = attach(model, load_tokenizer(base), router or WordRouter(), factors(places))
    return model, routing


def ids(text: str) -> torch.Tensor:
    """A row of tokens [1, time] of words."""
    return torch.tensor([[WORDS.index(word) for word in text.split()]])


def write_calibration(folder: Path, prompts: int = 12) -> None:
    """Files calibration/NAME.jsonl in a project: different prompts of each brick's own words."""
    (folder / "calibration").mkdir(exist_ok=True)
    for name in DOMAIN:
        write_jsonl(folder / "calibration" / f"{name}.jsonl", [{"prompt": text} for text in domain_prompts(name, prompts)])


def domain_prompts(brick: str, count: int, start: int = 0) -> list[str]:
    """Different prompts of the words of a brick's domain."""
    words = [f"w{number}" for number in DOMAIN[brick]]
    size = len(words)
    return [
        " ".join(words[(i * 3 + j * (1 + i % 4) + i // size) % size] for j in range(6 + i % 3))
        for i in range(start, start + count)
    ]
