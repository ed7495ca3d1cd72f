"""Composition by role (DAMC) against merges of the same kinds of bricks (NaiveMC): the source of the table in docs/routing-kinds.md.

    python benchmarks/roles.py
    python benchmarks/roles.py --seeds 1 --base-steps 100 --steps 50       a quick look

A small Llama is trained here on sixteen functions of four letters: it reads the letters and a marker, and writes four letters. A role is a
kind of token, as an image's patches are: spans between two markers hold codes that stand for letters, and the base has never seen them. A brick learns to answer
the base's functions on one role's codes. Two worlds differ in one thing: roles with codes of their own, and roles that share sixteen codes and read them
differently, which is a conflict.

NaiveMC has one adapter a role, which acts on all tokens; DAMC (arXiv 2402.12750) has two that are trained together, one for the role's tokens and one for text,
and composes them by `route: roles`. Both are trained on the same rows for equally many steps. Scored are held-out rows of each role, rows with two letters of
each of two roles, which no brick was trained on, and the base's own rows. A row counts if every token of the answer is the most likely one. Intervals are those
of a t distribution over pairs of seed and role. Results go to benchmarks/results/roles.json.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pool_worlds import BASE, LENGTH, LETTERS
from record import parser_of, write_results
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.adapters.export import write_adapter
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.materialize import materialize
from workbench.weights.lowrank import Factors

CPU = torch.device("cpu")
ROLES = 3
CODES = 16
MARKERS = [mark for r in range(ROLES) for mark in (f"<r{r}>", f"</r{r}>")]
WORDS = ["<eos>", ">", *LETTERS, *(f"B{i}" for i in range(len(BASE))), *MARKERS, *(f"c{i}" for i in range(ROLES * CODES))]
TOKEN = {word: i for i, word in enumerate(WORDS)}
RANK, BATCH, HELD_OUT = 8, 64, 600
WORLDS = ("codes of their own", "shared codes")
BRICKS = [f"r{r}" for r in range(ROLES)]
TEXT = [f"t{r}" for r in range(ROLES)]


def composed(weight: float) -> dict[str, Any]:
    """Return the step of DAMC with one weight for all adapters of text."""
    spans = {brick: {"between": [f"<{brick}>", f"</{brick}>"]} for brick in BRICKS}
    return {"route": "roles", "roles": spans, "text": dict.fromkeys(TEXT, weight)}


# Configuration -> the bricks it reads, and its step.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "NaiveMC, sum": ("one", {"merge": "task_arithmetic"}),
    "NaiveMC, average": ("one", {"merge": "average"}),
    "NaiveMC, ties": ("one", {"merge": "ties"}),
    "DAMC, text 1/3": ("two", composed(1 / 3)),
    "DAMC, text 1/2": ("two", composed(0.5)),
    "DAMC, text 1": ("two", composed(1.0)),
}


def main() -> None:
    """Train bases and bricks, compose them in every way, and write the results file."""
    parser = parser_of(__doc__, "roles")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=1000, help="training steps of a base, 64 rows each")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the bricks of a role, 64 rows each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for world in WORLDS:
                project = Path(folder) / f"{seed}-{world.replace(' ', '-')}"
                torch.manual_seed(seed)
                make_base(project / "base", options.base_steps, seed)
                for role in range(ROLES):
                    make_bricks(project, world, role, options.steps, seed)
                rows += scored(project, world, seed)
                print(*map(json.dumps, rows[-len(WAYS) - 3 :]), sep="\n", flush=True)
    settings = {"seeds": options.seeds, "base_steps": options.base_steps, "steps": options.steps, "items": HELD_OUT}
    write_results(options.out, {**settings, "summary": summary(rows), "rows": rows})


@cache
def code(world: str, role: int, letter: int) -> int:
    """Return the token id of a letter's code in a role."""
    table = random.Random(f"codes {role}").sample(range(CODES), CODES)
    return TOKEN[f"c{table[letter] + (0 if world == 'shared codes' else role * CODES)}"]


def made_rows(world: str, roles: Sequence[int], count: int, draw: random.Random) -> torch.Tensor:
    """Return rows of token ids: the letters, plain or as the codes of one role or of two, then the function's marker, `>` and the answer."""
    found = []
    for _ in range(count):
        letters = [draw.randrange(len(LETTERS)) for _ in range(LENGTH)]
        number = draw.randrange(len(BASE))
        row = [2 + x for x in letters] if not roles else []
        for place, role in enumerate(roles):
            part = letters[place * LENGTH // len(roles) : (place + 1) * LENGTH // len(roles)]
            row += [TOKEN[f"<r{role}>"], *(code(world, role, x) for x in part), TOKEN[f"</r{role}>"]]
        found.append([*row, TOKEN[f"B{number}"], TOKEN[">"], *(2 + x for x in BASE[number](letters))])
    return torch.tensor(found)


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the answers."""
    labels = rows.clone()
    labels[:, :-LENGTH] = -100
    found: torch.Tensor = model(input_ids=rows, labels=labels).loss
    return found


def descend(model: Any, parameters: Sequence[torch.Tensor], steps: int, rate: float, batches: Iterator[torch.Tensor]) -> None:
    """Train some parameters on batches of rows."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, next(batches)))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def make_base(out: Path, steps: int, seed: int) -> None:
    """Train the base on plain rows, and write it with its tokenizer."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0, max_position_embeddings=32, **shape)
    model, draw = LlamaForCausalLM(config), random.Random(f"base {seed}")
    descend(model, list(model.parameters()), steps, 2e-3, (made_rows("", (), BATCH, draw) for _ in iter(int, 1)))
    model.save_pretrained(out)
    words = Tokenizer(models.WordLevel(TOKEN, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>").save_pretrained(out)


@contextmanager
def adapters(model: Any, parts: Sequence[dict[str, Factors]], role: int) -> Iterator[None]:
    """Add low-rank updates to the linear layers while the block runs: one for all tokens, or one for the role's tokens and one for text."""
    inside: list[torch.Tensor] = []

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        tokens = given["input_ids"]
        opened = (tokens == TOKEN[f"<r{role}>"]).cumsum(1) - (tokens == TOKEN[f"</r{role}>"]).cumsum(1)
        inside[:] = [((opened > 0) | (tokens == TOKEN[f"</r{role}>"])).float()[..., None]]

    def adding(name: str) -> Any:
        def hook(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            masks = (1.0,) if len(parts) == 1 else (inside[0], 1 - inside[0])
            for mask, part in zip(masks, parts, strict=True):
                output = output + mask * (args[0] @ part[name].right.T @ part[name].left.T)
            return output

        return hook

    handles = [model.register_forward_pre_hook(note, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_hook(adding(name)) for name in parts[0]]
    yield
    for handle in handles:
        handle.remove()


def make_bricks(project: Path, world: str, role: int, steps: int, seed: int) -> None:
    """Train the bricks of a role: `one` for all tokens, and the pair `two`; three rows of four have the role's codes, the fourth is plain."""
    model = LlamaForCausalLM.from_pretrained(project / "base", dtype=torch.float32).requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    for kind, names in (("one", (f"r{role}",)), ("two", (f"r{role}", f"t{role}"))):
        torch.manual_seed(1000 * seed + role)
        draw = random.Random(f"bricks {seed} {role}")
        parts = [
            {
                n: Factors(
                    torch.zeros(m.out_features, RANK, requires_grad=True),
                    torch.empty(RANK, m.in_features).uniform_(-1, 1).div_(m.in_features**0.5).requires_grad_(),
                )
                for n, m in layers.items()
            }
            for _ in names
        ]
        batches = (made_rows(world, (role,) if n % 4 else (), BATCH, draw) for n in range(steps))
        parameters = [one for part in parts for factors in part.values() for one in (factors.left, factors.right)]
        with adapters(model, parts, role):
            descend(model, parameters, steps, 4e-3, batches)
        for name, part in zip(names, parts, strict=True):
            found = {f"{n}.weight": Factors(one.left.detach(), one.right.detach()) for n, one in part.items()}
            write_adapter(project / kind / name, found, "base")


def scored(project: Path, world: str, seed: int) -> list[dict[str, Any]]:
    """Score the base, every brick alone and every composition on all kinds of rows."""
    pairs = [(a, b) for a in range(ROLES) for b in range(ROLES) if a != b]
    kinds: dict[str, list[Any]] = {"text": [()], "role": [(r,) for r in range(ROLES)], "two roles": pairs}
    tests = {
        roles: made_rows(world, roles, HELD_OUT, random.Random(f"test {seed} {roles}"))
        for many in kinds.values()
        for roles in many
    }
    alone: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
        "one brick": lambda r: ("one", {"merge": "task_arithmetic", "bricks": [f"r{r}"]}),
        "a pair": lambda r: (
            "two",
            {"route": "roles", "roles": {f"r{r}": {"between": [f"<r{r}>", f"</r{r}>"]}}, "text": {f"t{r}": 1}},
        ),
    }
    found: list[dict[str, Any]] = [{"way": "base", **accuracies(made(project, "one", None), kinds, tests)}]
    for way, of in alone.items():
        own = [accuracies(made(project, *of(r)), {"role": [(r,)], "text": [()]}, tests) for r in range(ROLES)]
        found.append({"way": way, "role": [one["role"][0] for one in own], "text": [one["text"][0] for one in own]})
    found += [{"way": way, **accuracies(made(project, *step), kinds, tests)} for way, step in WAYS.items()]
    return [{"world": world, "seed": seed, **row} for row in found]


def made(project: Path, kind: str, step: dict[str, Any] | None) -> Any:
    """Return a configuration as a model."""
    names = [*BRICKS, *(TEXT if kind == "two" else ())]
    data = {"version": 1, "base": "base", "bricks": {n: f"{kind}/{n}" for n in names}, "steps": [step] if step else []}
    if step is None:
        del data["bricks"]
    return materialize(resolve(from_data({**data, "output": {"dtype": "float32"}}, project)), CPU)


@torch.no_grad()
def accuracies(model: Any, kinds: dict[str, list[Any]], tests: dict[Any, torch.Tensor]) -> dict[str, list[float]]:
    """Return the share of rows whose whole answer is the most likely one, for each set of roles of each kind."""
    found: dict[str, list[float]] = {}
    for kind, many in kinds.items():
        for roles in many:
            rows = tests[roles]
            best = model(input_ids=rows).logits[:, -LENGTH - 1 : -1].argmax(-1)
            found.setdefault(kind, []).append(float((best == rows[:, -LENGTH:]).all(1).float().mean()))
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each world and configuration, the means and the difference from the best NaiveMC in percentage points, with intervals."""
    found = []
    for world in WORLDS:
        values = {
            way: {
                kind: np.array([row.get(kind, []) for row in rows if (row["world"], row["way"]) == (world, way)])
                for kind in ("role", "two roles", "text")
            }
            for way in dict.fromkeys(row["way"] for row in rows)
        }
        best = max((way for way in values if way.startswith("NaiveMC")), key=lambda way: values[way]["role"].mean())
        for way, kinds in values.items():
            row: dict[str, Any] = {"world": world, "way": way}
            row |= {kind: spread(100 * many) for kind, many in kinds.items() if many.size}
            if way.startswith("DAMC"):
                row["over"] = {"way": best, "role": spread(100 * (kinds["role"] - values[best]["role"]))}
                row["over"]["two roles"] = spread(100 * (kinds["two roles"] - values[best]["two roles"]))
            found.append(row)
    return found


def spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return the mean and its 95 % interval of a t distribution over all seeds and roles."""
    flat = values.flatten()
    half = stats.t.ppf(0.975, flat.size - 1) * flat.std(ddof=1) / flat.size**0.5 if flat.size > 1 else float("nan")
    return {"mean": float(flat.mean()), "low": float(flat.mean() - half), "high": float(flat.mean() + half)}


if __name__ == "__main__":
    main()
