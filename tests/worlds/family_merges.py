"""Merges of the walk over all families: fine-tunes, adapters, the core space, stacks of layers, and mergekit's own run beside them."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from worlds.commands import document
from worlds.family import CLOSE, Family, WrongError, error_of, loaded, save
from worlds.jsonl import write_jsonl
from worlds.suites import mini_suite
from worlds.tiny import WORDS, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.models.architecture import is_conv1d
from workbench.models.layout import stack_prefix

WEIGHTS = {"one": 0.7, "two": -0.4}
MERGE = (
    "bricks: {one: {checkpoint: one}, two: {checkpoint: two}}\n"
    "steps: [{merge: task_arithmetic, bricks: {one: 0.7, two: -0.4}}]\noutput: {dtype: float32}\n"
)


def merge(family: Family) -> str:
    """Merge two fine-tunes, load the result with transformers and compare every tensor with the sum that is computed here."""
    expected = two_tuned(family)
    place = Path(family.project.run(MERGE, "merge.yaml")["model"])
    stored, wanted = tensors_of(place), tensors_of(family.project.path / "base")
    if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in wanted.items()}:
        raise WrongError(f"the names or shapes on disk are not the base's: {sorted(set(stored) ^ set(wanted))[:5]}")
    return f"{len(stored)} tensors, difference {compared(loaded(family.kind, place).state_dict(), expected):.0e}"


def two_tuned(family: Family) -> dict[str, torch.Tensor]:
    """Write two fine-tunes of all weights, and return the tensors of their merge."""
    base = family.base.state_dict()
    expected = {name: tensor.double().clone() for name, tensor in base.items()}
    for seed, (brick, weight) in enumerate(WEIGHTS.items(), 1):
        tuned = finetuned(family, seed)
        save(tuned, family.project.path / brick)
        for name, tensor in tuned.state_dict().items():
            expected[name] += weight * (tensor.double() - base[name].double())
    return expected


def finetuned(family: Family, seed: int) -> Any:
    """The base with noise on every weight."""
    tuned = family.kind._from_config(family.base.config, dtype=torch.float32).eval()
    tuned.load_state_dict(family.base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return tuned


RANK, SCALE = 2, 2.0
LORA = (
    "bricks: {{one: {{adapter: ranked/one}}, two: {{adapter: ranked/two}}}}\n"
    "steps: [{{merge: {step}}}]\noutput: {{dtype: float32}}\n"
)
DENSE = "bricks: {one: {checkpoint: baked/one}, two: {checkpoint: baked/two}}\nsteps: [{merge: tsv}]\noutput: {dtype: float32}\n"
STACK = (
    "bricks: {one: {checkpoint: one}}\n"
    "steps: [{grow: stack, slices: [{layers: [0, 2]}, {brick: one, layers: [2, 4]}], check: tensors}]\noutput: {dtype: float32}\n"
)


def adapters(family: Family) -> str:
    """Merge two LoRA adapters on all linear layers of the language part, and compare every tensor with the base plus the products."""
    changes = save_ranked(family)
    base = family.base.state_dict()
    expected = {name: tensor.double().clone() for name, tensor in base.items()}
    for brick, weight in WEIGHTS.items():
        for name, change in changes[brick].items():
            expected[name] += weight * change.double()
    place = Path(family.project.run(LORA.format(step="task_arithmetic, bricks: {one: 0.7, two: -0.4}"), "lora.yaml")["model"])
    error = compared(loaded(family.kind, place).state_dict(), expected)
    return f"{len(changes['one'])} linear layers, difference {error:.0e}"


def core(family: Family) -> str:
    """Merge the adapters with TSV in the core space, and compare the deltas with TSV of the same deltas as dense checkpoints."""
    changes = save_ranked(family)
    base = family.base.state_dict()
    for brick, own in changes.items():
        tuned = family.kind._from_config(family.base.config, dtype=torch.float32).eval()
        tuned.load_state_dict({name: tensor + own[name] if name in own else tensor for name, tensor in base.items()})
        save(tuned, family.project.path / "baked" / brick)
    small = Path(family.project.run(LORA.format(step="tsv, space: core"), "core.yaml")["model"])
    whole = Path(family.project.run(DENSE, "dense.yaml")["model"])
    ours, theirs = (loaded(family.kind, place).state_dict() for place in (small, whole))
    worst = 0.0
    for name in changes["one"]:
        delta = theirs[name].double() - base[name].double()
        worst = max(worst, float((ours[name].double() - base[name].double() - delta).norm() / delta.norm()))
    if not worst <= 1e-3:
        raise WrongError(f"a delta differs by {worst:.1e} of its norm from that of dense checkpoints")
    return f"{len(changes['one'])} linear layers, difference {worst:.0e} of the deltas"


def slices(family: Family) -> str:
    """Stack two layers of the base and the others of a fine-tune, and compare every tensor with its source's."""
    tuned = finetuned(family, 1)
    save(tuned, family.project.path / "one")
    place = Path(family.project.run(STACK, "stack.yaml")["model"])
    base, other = family.base.state_dict(), tuned.state_dict()
    prefix = stack_prefix(family.base, family.base.config.get_text_config().num_hidden_layers)
    expected = {}
    for name, tensor in base.items():
        layer = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else ""
        expected[name] = (other if layer.isdigit() and int(layer) >= 2 else base)[name] if layer else tensor
    return f"difference {compared(loaded(family.kind, place).state_dict(), expected):.0e}"


def by_mergekit(family: Family) -> str:
    """Let mergekit merge the same two fine-tunes, and compare what transformers loads with the sum."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    folder = family.project.path
    models = [{"model": str(folder / brick), "parameters": {"weight": weight}} for brick, weight in WEIGHTS.items()]
    expected = two_tuned(family)
    named = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models, "dtype": "float32"}
    try:
        run_merge(MergeConfiguration.model_validate(named), str(folder / "foreign"), MergeOptions(quiet=True))
    except Exception as error:  # noqa: BLE001  whatever it raises, mergekit does not merge this family
        raise WorkbenchError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    model, info = family.kind.from_pretrained(folder / "foreign", dtype=torch.float32, output_loading_info=True)
    if lost := sorted(info["missing_keys"]):
        raise WrongError(f"{len(lost)} of {len(expected)} tensors are left out without an error, such as {lost[0]}")
    return f"difference {compared(model.state_dict(), expected):.0e}"


def compared(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a model's tensors from those that are computed here."""
    if set(found) != set(expected):
        raise WrongError(f"the tensors in memory are not the base's: {sorted(set(found) ^ set(expected))[:5]}")
    errors = {name: error_of(found[name], tensor) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= CLOSE:
        raise WrongError(f"{worst} differs by {errors[worst]:.1e} from the sum")
    return errors[worst]


def save_ranked(family: Family) -> dict[str, dict[str, torch.Tensor]]:
    """Write two LoRA adapters on all linear layers of the decoder's layers, and return brick -> weight -> its change."""
    linear = {
        name: module
        for name, module in family.base.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and re.search(r"\.\d+\.", name)
    }
    language = {name: m for name, m in linear.items() if not re.search(r"vision|visual|image|audio|(^|\.)encoder\.", name)}
    parts = language or linear  # some decoders call their layers an encoder
    if not parts:
        raise WrongError("no linear layer")
    changes: dict[str, dict[str, torch.Tensor]] = {}
    for seed, brick in enumerate(WEIGHTS, 11):
        draw, tensors, own = torch.Generator().manual_seed(seed), {}, {}
        for name, module in parts.items():
            conv1d = is_conv1d(module)
            out, inputs = module.weight.shape[::-1] if conv1d else module.weight.shape
            a, b = torch.randn(RANK, inputs, generator=draw) * 0.3, torch.randn(out, RANK, generator=draw) * 0.3
            tensors |= {f"base_model.model.{name}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
            own[f"{name}.weight"] = SCALE * ((b @ a).T if conv1d else b @ a)
        place = family.project.path / "ranked" / brick
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": RANK * SCALE,
            "target_modules": list(parts),
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": any(is_conv1d(module) for module in parts.values()),
        }
        (place / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        changes[brick] = own
    return changes


def evaluated(family: Family) -> str:
    """Score questions with three answers, and compare the accuracy with that of the logits of transformers' own model."""
    draw = random.Random(5)
    words = [word for word in WORDS if word.startswith("w")]
    rows = []
    for i in range(40):
        prompt = " ".join(draw.choices(words, k=3 + i % 4))
        choices = draw.sample(words, 3)
        with torch.no_grad():
            logits = family.base(input_ids=torch.tensor([[WORDS.index(word) for word in prompt.split()]])).logits[0, -1]
        best = max(range(3), key=lambda j: float(logits[WORDS.index(choices[j])]))
        gold = best if i % 3 else (best + 1) % 3
        rows.append({"id": f"m{i}", "prompt": prompt, "choices": choices, "gold": gold})
    mini_suite(family.project)
    write_jsonl(family.project.path / "evals" / "tasks" / "mini.jsonl", rows)
    before = Path.cwd()
    os.chdir(family.project.path)
    try:
        found = document("eval", "base", "--suite", "mini", "--no-controls", "--device", "cpu", "--trust-project-code")
    finally:
        os.chdir(before)
    (told,) = (row["tasks"]["mini"]["acc"]["value"] for row in found["configurations"])
    expected = sum(1 for i in range(40) if i % 3) / 40
    if abs(told - expected) > 1e-9:
        raise WrongError(f"the accuracy is {told:.3f}, and {expected:.3f} by the logits of transformers")
    return "40 items"
