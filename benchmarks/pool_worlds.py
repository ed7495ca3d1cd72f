"""Small models with skills, made here within minutes: the pools of bricks that benchmarks/merge_pools.py merges.

A base reads a marker and four letters and writes four letters. It is trained on sixteen functions of the letters, each with a marker of its own, and copies the
letters behind sixteen other markers. A skill is one of these functions behind another marker, as fine-tuning elicits what a language model has learned before. A brick is a
LoRA adapter or a full fine-tune that learned one skill or two, with a quarter of its rows replayed from the base's functions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

LETTERS = [chr(97 + i) for i in range(16)]
WORDS = ["<eos>", ">", *LETTERS, *(f"B{i}" for i in range(16)), *(f"S{i}" for i in range(16))]
TOKEN = {word: i for i, word in enumerate(WORDS)}
LENGTH = 4
HELD_OUT = 200
Function = Callable[[Sequence[int]], list[int]]


def _cipher(seed: int) -> Function:
    table = random.Random(seed).sample(range(16), 16)
    return lambda letters: [table[x] for x in letters]


def _order(*places: int) -> Function:
    return lambda letters: [letters[i] for i in places]


BASE: list[Function] = [
    _order(0, 1, 2, 3),
    _order(1, 2, 3, 0),
    _order(2, 3, 0, 1),
    _order(0, 0, 0, 0),
    _order(3, 0, 2, 1),
    _order(2, 2, 1, 1),
    lambda x: [(a + 1) % 16 for a in x],
    lambda x: [(a + 3) % 16 for a in x],
    lambda x: sorted(x, reverse=True),
    *(_cipher(seed) for seed in range(100, 107)),
]
RATE = 1e-3
"""Learning rate of adapters."""


@dataclass(frozen=True)
class Task:
    """One of the base's functions under a marker."""

    marker: str
    function: int

    def rows(self, count: int, seed: int) -> torch.Tensor:
        """Return [count, 2 + 2·LENGTH] token ids: marker, letters, `>` and the answer."""
        draw = random.Random(f"{self.marker} {seed}")
        made = []
        for _ in range(count):
            letters = [draw.randrange(16) for _ in range(LENGTH)]
            answer = BASE[self.function](letters)
            made.append([TOKEN[self.marker], *(2 + x for x in letters), TOKEN[">"], *(2 + x for x in answer)])
        return torch.tensor(made)


BASE_TASKS = [Task(f"B{i}", i) for i in range(len(BASE))]
COPIES = [Task(f"S{i}", 0) for i in range(16)]
"""The base answers a skill's marker with a copy of the letters, as a language model answers every prompt with something."""


def skill(number: int, marker: int | None = None) -> Task:
    """Return a skill by its number; another marker makes two skills contradict each other."""
    return Task(f"S{number if marker is None else marker}", number)


@dataclass(frozen=True)
class Training:
    """Settings of one brick.

    Attributes:
        tasks: What it learns.
        rank: Rank of the adapter; None for a full fine-tune.
        modules: Its target modules; None for all linear layers.
        draw: Seed of initialization and rows.
    """

    tasks: tuple[Task, ...]
    rank: int | None = 8
    modules: str | None = None
    draw: int = 0

    def name(self) -> str:
        """Return a name that tells the settings."""
        kind = "full" if self.rank is None else f"r{self.rank}"
        return "-".join(
            [
                *(f"{t.marker}f{t.function}" for t in self.tasks),
                kind,
                *([self.modules] if self.modules else []),
                str(self.draw),
            ]
        )


MODULES = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}


@dataclass(frozen=True)
class World:
    """A base on disk with its bricks.

    Attributes:
        folder: Project folder.
        seed: Seed of the base.
    """

    folder: Path
    seed: int

    @property
    def base(self) -> Path:
        """Directory of the base."""
        return self.folder / "base"

    def model(self, path: Path | None = None) -> PreTrainedModel:
        """Return the base, or another model of its shape."""
        model: PreTrainedModel = LlamaForCausalLM.from_pretrained(path or self.base, dtype=torch.float32)
        return model

    def make_base(self, steps: int) -> float:
        """Train the base once, and return its accuracy on its own functions."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.base / "config.json").is_file():
            torch.manual_seed(self.seed)
            model = _new()
            train(model, [*BASE_TASKS, *COPIES], steps, 2e-3, self.seed, replay=0.0)
            model.save_pretrained(self.base)
            _save_tokenizer(self.base)
        return self.retention(self.model())

    def accuracy(self, model: Any, task: Task) -> float:
        """Return the share of held-out rows whose whole answer is the most likely one."""
        right = self.answers(model, task)
        return sum(right) / len(right)

    def answers(self, model: Any, task: Task) -> list[bool]:
        """Return for each held-out row whether its whole answer is the most likely one."""
        rows = task.rows(HELD_OUT, seed=-1)
        start = rows.shape[1] - LENGTH
        with torch.no_grad():
            best = model(input_ids=rows).logits[:, start - 1 : -1].argmax(-1)
        return [bool(right) for right in (best == rows[:, start:]).all(1)]

    def texts(self, training: Training) -> Path:
        """Write rows of a brick's skills, which are not held out, and return their file."""
        out = self.folder / f"{training.name()}.jsonl"
        rows = [row for task in training.tasks for row in task.rows(64, seed=-2).tolist()]
        out.write_text("".join(json.dumps({"text": " ".join(WORDS[i] for i in row)}) + "\n" for row in rows), "utf-8")
        return out

    def retention(self, model: Any) -> float:
        """Return the mean accuracy on the base's functions."""
        return sum(self.accuracy(model, task) for task in BASE_TASKS) / len(BASE_TASKS)

    def brick(self, training: Training, steps: int) -> Path:
        """Train a brick once, and return its directory."""
        out = self.folder / "bricks" / training.name()
        if (out / "done").is_file():
            return out
        model = self.model()
        torch.manual_seed(1000 * self.seed + training.draw)
        if training.rank is None:
            train(model, training.tasks, steps, 1e-3, training.draw)
            model.save_pretrained(out)
            _save_tokenizer(out)
        else:
            chosen = MODULES[training.modules] if training.modules else [m for named in MODULES.values() for m in named]
            config = LoraConfig(
                r=training.rank,
                lora_alpha=2 * training.rank,
                target_modules=chosen,
                task_type="CAUSAL_LM",
            )
            tuned: Any = get_peft_model(model, config)
            tuned.peft_config["default"].base_model_name_or_path = str(self.base)
            train(tuned, training.tasks, steps, RATE, training.draw)
            tuned.save_pretrained(out)
        (out / "done").touch()
        return out


def _new() -> PreTrainedModel:
    common = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0}
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=16, **shape, **common))


def train(model: Any, tasks: Sequence[Task], steps: int, rate: float, seed: int, replay: float = 0.25, batch: int = 64) -> None:
    """Train on rows of the tasks and, for a share of each batch, of the base's functions; the loss counts answers alone."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        old = int(batch * replay)
        parts = [draw.choice(tasks).rows(8, draw.getrandbits(40)) for _ in range((batch - old) // 8)]
        parts += [draw.choice(BASE_TASKS).rows(8, draw.getrandbits(40)) for _ in range(old // 8)]
        rows = torch.cat(parts)
        labels = rows.clone()
        labels[:, : rows.shape[1] - LENGTH] = -100
        optimizer.zero_grad()
        model(input_ids=rows, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _save_tokenizer(out: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(TOKEN, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>").save_pretrained(out)
