"""Three kinds of tokens with bricks that conflict: what a merge of the bricks keeps, and what bricks on their own tokens keep.

    python benchmarks/roles.py
    python benchmarks/roles.py --seeds 1 --steps 40      a quick look

In every role the same words follow each other in another order: a text continues each word by a permutation of its own, and so does each role between its
markers. The base, a small Llama, learns the texts; each brick, a LoRA adapter, learns the words of one role after its marker. Three bricks therefore ask for three
different successors of the same word. Scored is the share of right successors in new texts with spans of all roles: for the base, each brick alone, NaiveMC
(sum, mean and TIES of the adapters, on all tokens) and DAMC (`route: roles`, with the mean of the adapters on text, and with the base on text). Results go to
benchmarks/results/roles.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from record import parser_of, write_results

ROLES = ("a", "b", "c")
MARKERS = [mark for role in ROLES for mark in (f"<{role}>", f"</{role}>")]
WORDS = 40
FIRST = 2 + len(MARKERS)
"""Id of the first word; before it are <unk>, <eos> and the markers."""
SPAN = 8
"""Words of a text's part, and of a span."""
BRICKS = "bricks: {a: bricks/a, b: bricks/b, c: bricks/c}\n"
RECIPES = {
    "base": "steps: []\n",
    **{f"brick {role}": f"{BRICKS}steps: [{{merge: task_arithmetic, bricks: [{role}]}}]\n" for role in ROLES},
    "NaiveMC, sum": f"{BRICKS}steps: [{{merge: task_arithmetic}}]\n",
    "NaiveMC, mean": f"{BRICKS}steps: [{{merge: task_arithmetic, lambda: 0.3333333333}}]\n",
    "NaiveMC, TIES": f"{BRICKS}steps: [{{merge: ties}}]\n",
}
_SPANS = ", ".join(f'{role}: {{between: ["<{role}>", "</{role}>"]}}' for role in ROLES)
_THIRD = ", ".join(f"{role}: 0.3333333333" for role in ROLES)
RECIPES["DAMC, mean on text"] = f"{BRICKS}steps: [{{route: roles, roles: {{{_SPANS}}}, text: {{{_THIRD}}}}}]\n"
RECIPES["DAMC, base on text"] = f"{BRICKS}steps: [{{route: roles, roles: {{{_SPANS}}}}}]\n"


class World:
    """Successors of each word, in texts and in each role."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.next = {name: torch.randperm(WORDS, generator=self.generator) + FIRST for name in ("text", *ROLES)}

    def chain(self, name: str) -> list[int]:
        """Words that follow each other as in texts or in a role, from a random one."""
        words = [int(torch.randint(WORDS, (), generator=self.generator)) + FIRST]
        while len(words) < SPAN:
            words.append(int(self.next[name][words[-1] - FIRST]))
        return words

    def row(self, names: tuple[str, ...]) -> tuple[list[int], list[str]]:
        """The tokens of a text with these parts, and for each token the part whose successor it is; "" for others."""
        tokens, parts = list[int](), list[str]()
        for name in names:
            words = self.chain(name)
            marks = [2 + MARKERS.index(mark) for mark in (f"<{name}>", f"</{name}>")] if name in ROLES else []
            tokens += [*marks[:1], *words, *marks[1:]]
            parts += [*[""] * len(marks[:1]), "", *[name] * (SPAN - 1), *[""] * len(marks[1:])]
        return tokens, parts


def config() -> Any:
    """A Llama of two layers, 64 wide."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=FIRST + WORDS, max_position_embeddings=128, eos_token_id=1, bos_token_id=None, **sizes)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<eos>", *MARKERS, *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def trained(model: Any, world: World, kinds: list[tuple[str, ...]], steps: int, rate: float) -> Any:
    """Train the parameters that have gradients on random texts of some parts; only successors are learned."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        rows = [world.row(kinds[step % len(kinds)]) for _ in range(16)]
        tokens = torch.tensor([row[0] for row in rows])
        labels = torch.tensor([[t if part else -100 for t, part in zip(*row, strict=True)] for row in rows])
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def make(project: Path, world: World, steps: int) -> None:
    """Train and save the base and the bricks."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    (project / "recipes").mkdir()
    trained(LlamaForCausalLM(config()), world, [("text", "text")], 3 * steps, 3e-3).save_pretrained(project / "base")
    save_tokenizer(project / "base")
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for role in ROLES:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(project / "base"), LoraConfig(**lora))
        trained(model, world, [(role,), ("text", role)], 2 * steps, 3e-3).save_pretrained(project / "bricks" / role)


def scored(project: Path, text: str, world: World, count: int) -> dict[str, float]:
    """Share of right successors of a configuration, in texts and in each role, on texts with all parts."""
    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.materialize import materialize

    file = project / "recipes" / "tried.yaml"
    file.write_text(f"version: 1\nbase: base\n{text}", "utf-8")
    model = materialize(resolve(load_recipe(file)), torch.device("cpu"))
    right: dict[str, list[bool]] = {}
    world.generator.manual_seed(10_000)
    for _ in range(count):
        order = [ROLES[i] for i in torch.randperm(len(ROLES), generator=world.generator).tolist()]
        tokens, parts = world.row(("text", *(name for role in order for name in (role, "text"))))
        with torch.no_grad():
            guessed = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        for place, part in enumerate(parts):
            if part:
                right.setdefault(part, []).append(guessed[place - 1] == tokens[place])
    return {part: sum(found) / len(found) for part, found in sorted(right.items())}


def main() -> None:
    """Train the models of each seed, score every configuration, and write the results file."""
    parser = parser_of(__doc__, "roles")
    parser.add_argument("--seeds", type=int, default=3, help="number of worlds, with models of their own")
    parser.add_argument(
        "--steps", type=int, default=150, help="training steps: three times as many for the base, twice for a brick"
    )
    parser.add_argument("--texts", type=int, default=40, help="texts that are scored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        world = World(seed)
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), world, options.steps)
            for name, text in RECIPES.items():
                rows.append({"configuration": name, "seed": seed, "right": scored(Path(folder), text, world, options.texts)})
                print(rows[-1], flush=True)
    write_results(options.out, {"seeds": options.seeds, "steps": options.steps, "texts": options.texts, "rows": rows})


if __name__ == "__main__":
    main()
