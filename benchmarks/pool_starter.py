"""The starter base as a world of pools: bricks of the starter's skills, trained here with other seeds, ranks, modules and mixtures of skills."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.upkeep.train import train_brick

PROJECT = Path(__file__).resolve().parents[1]
MODULES = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
STARTER = PROJECT / "bricks" / "starter" / "base"
BATCH = 30


@dataclass(frozen=True)
class StarterTraining:
    """Settings of one brick.

    Attributes:
        tasks: Skills that it learns, in equal shares.
        rank: Rank of the adapter; None for a full fine-tune.
        modules: "attention" or "mlp"; None for all linear layers.
        draw: Seed.
    """

    tasks: tuple[str, ...]
    rank: int | None = 8
    modules: str | None = None
    draw: int = 0

    def name(self) -> str:
        """Return a name that tells the settings."""
        kind = "full" if self.rank is None else f"r{self.rank}"
        return "-".join([*self.tasks, kind, *([self.modules] if self.modules else []), f"s{self.draw}"])

    @property
    def is_shipped(self) -> bool:
        """True if the brick stands in bricks/."""
        return self == StarterTraining(self.tasks[:1])


def starter_pools(_draw: Any) -> dict[str, list[StarterTraining]]:
    """Return the pools: name -> trainings."""
    made = StarterTraining
    dates = [made(("date-dmy",), draw=i) for i in range(3)]
    full = [made((name,), rank=None) for name in ("reverse", "add", "date-dmy")]
    return {
        "disjoint-3": [made((name,)) for name in ("glossary", "record", "actions")],
        "disjoint-6": [made((name,)) for name in ("date-dmy", "reverse", "triage", "actions", "glossary", "record")],
        "same-3": dates,
        "same-2 and another": [*dates[:2], made(("reverse",))],
        "partial": [made(("add", "date-dmy")), made(("date-dmy", "reverse")), made(("reverse", "add"))],
        "full-3": full,
        "full-same-3": [full[1], *(made(("add",), rank=None, draw=i) for i in (1, 2))],
        "full and adapters": [full[0], made(("add",)), made(("triage",))],
        "ranks 4, 16, 64": [made(("add",), rank=4), made(("date-dmy",), rank=16), made(("reverse",), rank=64)],
        "same, ranks 4, 16, 64": [made(("add",), rank=4), made(("add",), rank=16, draw=1), made(("add",), rank=64, draw=2)],
        "modules": [made(("add",), modules="attention"), made(("date-dmy",), modules="mlp"), made(("reverse",))],
        "contradicting": [made(("date-dmy",)), made(("date-mdy",))],
    }


@dataclass(frozen=True)
class StarterWorld:
    """The starter base with bricks below a folder.

    Attributes:
        folder: Project folder.
        seed: Added to the seeds of trainings.
        items: Number of held-out items of a task.
        base: Directory of the base; on another one than the starter's, the same bricks are trained.
    """

    folder: Path
    seed: int
    items: int = 60
    base: Path = STARTER

    def make_base(self, _steps: int) -> float:
        """Return the accuracy on the retention items."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.retention(self.model())

    def model(self) -> Any:
        """Return the base in float32."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def brick(self, training: StarterTraining, _steps: int) -> Path:
        """Train a brick once with the settings of its first skill's shipped brick, and return its directory."""
        if training.is_shipped and not self.seed and self.base == STARTER:
            return PROJECT / "bricks" / training.tasks[0]
        out = self.folder / "bricks" / training.name()
        weights = out / "checkpoint" if training.rank is None else out
        if (out / "brick.yaml").is_file():
            return weights
        out.mkdir(parents=True, exist_ok=True)
        shipped = PROJECT / "bricks" / training.tasks[0]
        settings = yaml.safe_load((shipped / "train.yaml").read_text("utf-8"))
        settings = {
            key: value for key, value in settings.items() if key not in ("task", "skill", "prompt_format", "generator", "licence")
        }
        settings |= {"base": str(self.base), "seed": 100 * self.seed + training.draw, "save_every": 0}
        if training.rank is None:
            full = yaml.safe_load((PROJECT / "bricks" / "reverse-full" / "train.yaml").read_text("utf-8"))
            settings |= {key: full[key] for key in ("method", "learning_rate", "steps", "batch_size", "warmup", "schedule")}
            settings = {key: value for key, value in settings.items() if key not in ("rank", "alpha", "target_modules")}
        else:
            settings |= {"rank": training.rank, "alpha": 2 * training.rank}
            settings |= {"target_modules": MODULES[training.modules]} if training.modules else {}
        settings["steps"] = settings["steps"] * len(training.tasks)
        rows = [(PROJECT / "bricks" / task / "train.jsonl").read_text("utf-8").splitlines() for task in training.tasks]
        mixed = [line for lines in zip(*rows, strict=False) for line in lines]
        (out / "train.jsonl").write_text("\n".join(mixed) + "\n", "utf-8")
        if "replay" in settings:
            (out / "replay.jsonl").write_bytes((shipped / "replay.jsonl").read_bytes())
        (out / "train.yaml").write_text(yaml.safe_dump(settings), "utf-8")
        train_brick(out, torch.device("cpu"), score=False)
        return weights

    def accuracy(self, model: Any, task: str) -> float:
        """Return the share of items whose whole answer is the most likely one, token by token."""
        right = self.answers(model, task)
        return sum(right) / len(right)

    def answers(self, model: Any, task: str) -> list[bool]:
        """Return for each item whether its whole answer is the most likely one, token by token."""
        pairs = [(row["prompt"], row["answer"]) for row in _rows(task, self.items)]
        return [right for _, right in _scores(model, self._tokenizer(), pairs)]

    def texts(self, training: StarterTraining) -> Path:
        """Return the training rows of a brick's first skill."""
        return PROJECT / "bricks" / training.tasks[0] / "train.jsonl"

    def retention(self, model: Any) -> float:
        """Return the share of retention items whose right choice is the most likely one."""
        rows = _rows("retention", self.items)
        pairs = [(row["prompt"], choice) for row in rows for choice in row["choices"]]
        values = iter(_scores(model, self._tokenizer(), pairs))
        right: list[bool] = [_best([next(values)[0] for _ in row["choices"]]) == row["gold"] for row in rows]
        return sum(right) / len(right)

    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _rows(task: str, items: int) -> list[dict[str, Any]]:
    """Return items evenly spaced over the test file of a task."""
    lines = (PROJECT / "evals" / "tasks" / "data" / f"{task}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(lines[i * len(lines) // items]) for i in range(items)]


def _scores(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each answer after its prompt, and whether each of its tokens is the most likely one."""
    rows = []
    for prompt, answer in pairs:
        start = len(tokenizer(prompt)["input_ids"])
        rows.append((tokenizer(f"{prompt} {answer}")["input_ids"], start))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        width = max(len(rows[i][0]) for i in batch)
        ids = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in batch])
        mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (width - len(rows[i][0])) for i in batch])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for place, i in enumerate(batch):
            tokens, start = rows[i]
            wanted = torch.tensor(tokens[start:])
            predicted = logits[place, start - 1 : len(tokens) - 1].log_softmax(-1)
            value = float(predicted.gather(1, wanted[:, None]).sum())
            found[i] = (value, bool((predicted.argmax(-1) == wanted).all()))
    return [found[i] for i in range(len(rows))]
