"""One walk over every causal language model that transformers builds tiny: what merges, edits, grows and routes, each checked by a number."""

from __future__ import annotations

import json
import re
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from worlds.causal import causal_types
from worlds.dense import write_facts_file, write_text
from worlds.family import CLOSE, Family, Outcome, WrongError, build, error_of, loaded, outcome
from worlds.family_merges import adapters, by_mergekit, core, evaluated, merge, slices
from worlds.growing import FAMILIES, GROWN, STEPS
from worlds.jsonl import write_jsonl
from worlds.tiny import WORDS, tensors_of

import workbench
from workbench.models.architecture import is_conv1d
from workbench.route.deciding import samples

EDIT = (
    "steps: [{{edit: rome, facts: facts.jsonl, layers: [{layer}], position: subject_last, contexts: 0, statistics: text.txt, "
    "tokens_per_input: 4, steps: 25, learning_rate: 0.5, clamp: 20.0, confidence: 0.3, refine: 0}}]\noutput: {{dtype: float32}}\n"
)
ROUTE = (
    "bricks: {one: {adapter: adapters/one}, two: {adapter: adapters/two}}\n"
    "steps: [{route: ridge, calibration: 'calibration/{brick}.jsonl', samples: 12}]\n"
)
MULTIMODAL = (
    "qwen3_5:Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe:Qwen3_5MoeForConditionalGeneration",
    "mistral3:Mistral3ForConditionalGeneration",
    "llama4:Llama4ForConditionalGeneration",
    "qwen3_vl:Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
)
"""TYPE:CLASS of multimodal models whose causal language model is another class, or that have none."""
DOMAIN = {"one": range(4), "two": range(30, 34)}
BY_TABLE = "by tests/grow/test_growth_table.py"
GROWTHS = {**{name: STEPS[name] for name in ("depth", "neurons")}, "experts": "{grow: experts, experts: 2}"}
TOKENS = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(3))


def families() -> list[str]:
    """Return every type of model with a causal language model, and `MULTIMODAL`."""
    return [*causal_types(), *MULTIMODAL]


def walk(family: str, folder: Path, mergekit: bool = False) -> dict[str, Outcome]:
    """Merge, score, edit, grow and route one family.

    Args:
        family: A type of model, or TYPE:CLASS.
        folder: A folder that does not exist yet.
        mergekit: Whether mergekit merges the fine-tunes, too.

    Returns:
        "class", the names of `MERGES`, "eval", "edit", "grow: NAME", "route" and perhaps "mergekit" -> the outcome.

    Raises:
        NotTinyError: If the class cannot be built tiny.
    """
    kind, _, name = family.partition(":")
    with patch("transformers.AutoTokenizer.from_pretrained", _words):
        made = build(kind, name, folder)
        foreign = {"mergekit": outcome(lambda: by_mergekit(made))} if mergekit else {}
        return _walked(kind, made) | foreign


def _words(place: str, **_options: Any) -> Any:
    """Load the tokenizer of whole words; transformers' Auto class gives some types of model rules of their own."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(place)


MERGES = {"merge": merge, "adapters": adapters, "core": core, "slices": slices}


def _walked(kind: str, family: Family) -> dict[str, Outcome]:
    found = {"class": Outcome("works", family.kind.__name__)}
    for label, operation in MERGES.items():
        found[label] = outcome(lambda operation=operation: operation(family))  # type: ignore[misc]
    if fails := _forward_fails(family.base):
        return {
            **found,
            **dict.fromkeys(("eval", "edit", *(f"grow: {label}" for label in GROWTHS), "route"), Outcome("untested", fails)),
        }
    found["eval"] = outcome(lambda: evaluated(family))
    found["edit"] = outcome(lambda: edit(family))
    for label in GROWTHS:
        if family.kind is family.causal and kind in FAMILIES and kind in GROWN.get(label, "").split():
            found[f"grow: {label}"] = Outcome("works", BY_TABLE)
            continue
        found[f"grow: {label}"] = outcome(lambda label=label: grow(family, label))  # type: ignore[misc]
    return {**found, "route": outcome(lambda: route(family))}


def _forward_fails(model: Any) -> str:
    """Return the error of transformers' own forward pass with padding; empty if there is none."""
    mask = torch.ones_like(TOKENS)
    mask[0, -3:] = 0
    try:
        with torch.no_grad():
            model(input_ids=TOKENS, attention_mask=mask)
    except Exception as error:  # noqa: BLE001  whatever it raises, the model cannot be run
        return f"transformers cannot run the model: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return ""


def edit(family: Family) -> str:
    """Write one fact with ROME: one weight changes, by rank 1, and the fact's loss falls in transformers' own model."""
    folder = family.project.path
    (fact,) = write_facts_file(folder / "facts.jsonl", 1)
    write_text(folder / "text.txt")
    places = family.project.resolve("steps: []\n", "plain.yaml").base.layout.edited()
    layer = [*places, 0, 0][min(1, max(0, len(places) - 1))]
    place = Path(family.project.run(EDIT.format(layer=layer), "edit.yaml")["model"])
    before, after = tensors_of(folder / "base"), tensors_of(place)
    changed = [name for name in before if not torch.equal(before[name].float(), after[name])]
    if len(changed) != 1:
        raise WrongError(f"the edit changes {changed[:5]} instead of one weight")
    values = torch.linalg.svdvals(after[changed[0]].double() - before[changed[0]].double())
    if not values[1] <= 1e-4 * values[0]:
        raise WrongError(f"the change of {changed[0]} has singular values {values[:3].tolist()}, not one")
    prompt = [WORDS.index(word) for word in fact["prompt"].replace("{subject}", fact["subject"]).split()]
    target = WORDS.index(fact["target"])
    losses = [_loss(model, prompt, target) for model in (family.base, loaded(family.kind, place))]
    if not losses[1] < losses[0] - 0.2:
        raise WrongError(f"the fact's loss was {losses[0]:.2f} and is {losses[1]:.2f}")
    return f"rank 1, loss {losses[0]:.1f} to {losses[1]:.1f}"


def grow(family: Family, label: str) -> str:
    """Grow the base, load the result with transformers and compare its logits with the base's."""
    from transformers import AutoModelForCausalLM

    step = GROWTHS[label][:-1]
    document = family.project.run(f"steps: [{step}, check: tensors}}]\noutput: {{dtype: float32}}\n", f"grow-{label}.yaml")
    grown = loaded(AutoModelForCausalLM if label == "experts" else family.kind, Path(document["model"]))
    before = _logits(family.base, TOKENS)
    error = error_of(_logits(grown, TOKENS)[..., : before.shape[-1]], before)
    if not error <= CLOSE:
        raise WrongError(f"the logits differ by {error:.1e} from those before the growth")
    return f"logits differ by {error:.0e}"


def route(family: Family) -> str:
    """Choose between two adapters from hidden states, and compare the logits of each with those of the base with that adapter merged."""
    folder = family.project.path
    calibration = folder / "calibration"
    calibration.mkdir()
    decoder = (
        family.base
        if family.causal is family.kind
        else family.causal.from_pretrained(folder / "base", dtype=torch.float32).eval()
    )
    module, changes = _save_adapters(family, decoder)
    for brick in DOMAIN:
        write_jsonl(calibration / f"{brick}.jsonl", [{"prompt": text} for text in _prompts(brick, 0)])
    # The reference code of state-space layers is slow: all 700 negatives would take longer than the rest of the walk.
    with patch.object(samples, "built_in", return_value=samples.built_in()[::20]):
        written = family.project.run(ROUTE, "route.yaml")["run"]
    routed = workbench.load(written, device="cpu")
    errors, right = [], 0
    for brick in DOMAIN:
        prompts = [_ids(text) for text in _prompts(brick, 12)]
        decided = routed.routing.decide([row[0].tolist() for row in prompts])
        named = [routed.routing.label(weights) for weights in decided.weights]
        right += named.count(brick)  # says little where weights are random
        row, weight = prompts[0], decoder.get_submodule(module).weight
        plain, kept = _logits(decoder, row), weight.detach().clone()
        with torch.no_grad():
            weight.add_(changes[brick])
        expected = _logits(decoder, row)
        with torch.no_grad():
            weight.copy_(kept)
        if not error_of(plain, expected) > 100 * CLOSE:
            raise WrongError(f"the adapter on {module} changes nothing")
        with routed.routing.fixed(brick):
            errors.append(error_of(_logits(routed, row), expected))
    if not max(errors) <= 10 * CLOSE:
        raise WrongError(f"the routed model's logits differ by {max(errors):.1e} from those of the merged adapter")
    return f"logits differ by {max(errors):.0e}, {right} of 24 prompts go to their brick"


def _save_adapters(family: Family, decoder: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Write a LoRA adapter a brick on one linear layer of the decoder; return the layer and each brick's change of its weight."""
    modules = [
        name
        for name, module in decoder.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_conv1d(module))
        and re.search(r"\.\d+\.", name)
        and not re.search(r"router|gate$|gate\.|vision|image|audio|indexer|cross", name)
    ]
    if not modules:
        raise WrongError("no linear layer")
    wanted = [name for name in modules if re.search(r"o_proj$|out_proj$|out_lin$|c_proj$|dense$|output", name)] or modules
    module = wanted[len(wanted) // 2]
    layer = decoder.get_submodule(module)
    conv1d = is_conv1d(layer)
    out, inputs = layer.weight.shape[::-1] if conv1d else layer.weight.shape
    changes = {}
    for seed, brick in enumerate(DOMAIN, 1):
        draw = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, inputs, generator=draw) * 0.3, torch.randn(out, 2, generator=draw) * 0.3
        place = family.project.path / "adapters" / brick
        place.mkdir(parents=True)
        save_file(
            {f"base_model.model.{module}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))},
            place / "adapter_model.safetensors",
        )
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": [module],
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": conv1d,
        }
        (place / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        changes[brick] = 2 * (b @ a).T if conv1d else 2 * b @ a
    return module, changes


def _prompts(brick: str, start: int) -> list[str]:
    """Twelve different prompts of the words of a brick's domain."""
    words = [f"w{number}" for number in DOMAIN[brick]]
    orders = list(permutations(words))
    return [" ".join(orders[i]) + f" {words[i % 4]}" * (i % 3) for i in range(start, start + 12)]


def _ids(text: str) -> torch.Tensor:
    return torch.tensor([[WORDS.index(word) for word in text.split()]])


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


def _loss(model: Any, prompt: list[int], target: int) -> float:
    return -float(_logits(model, torch.tensor([prompt]))[0, -1].log_softmax(-1)[target])
