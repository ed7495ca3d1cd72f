"""One walk over every causal language model that transformers builds tiny: what merges, edits, grows and routes, each checked by a number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from worlds.causal import causal_types, tiny_json
from worlds.dense import write_facts_file, write_text
from worlds.growing import FAMILIES, GROWN, STEPS
from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import WORDS, save_tokenizer, tensors_of

import workbench
from workbench.errors import WorkbenchError
from workbench.models.architecture import is_conv1d
from workbench.models.skeleton import parse_config, part_for
from workbench.route.deciding import samples

MULTIMODAL = (
    "qwen3_5:Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe:Qwen3_5MoeForConditionalGeneration",
    "mistral3:Mistral3ForConditionalGeneration",
    "llama4:Llama4ForConditionalGeneration",
    "qwen3_vl:Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
)
"""TYPE:CLASS of multimodal models whose causal language model is another class, or that have none."""
LARGEST = 10_000_000
"""Parameters of a model that counts as tiny."""
WEIGHTS = {"one": 0.7, "two": -0.4}
MERGE = (
    "bricks: {one: {checkpoint: one}, two: {checkpoint: two}}\n"
    "steps: [{merge: task_arithmetic, bricks: {one: 0.7, two: -0.4}}]\noutput: {dtype: float32}\n"
)
EDIT = (
    "steps: [{{edit: rome, facts: facts.jsonl, layers: [{layer}], position: subject_last, contexts: 0, statistics: text.txt, "
    "tokens_per_input: 4, steps: 25, learning_rate: 0.5, clamp: 20.0, confidence: 0.3, refine: 0}}]\noutput: {{dtype: float32}}\n"
)
ROUTE = (
    "bricks: {one: {adapter: adapters/one}, two: {adapter: adapters/two}}\n"
    "steps: [{route: ridge, calibration: 'calibration/{brick}.jsonl', samples: 12}]\n"
)
DOMAIN = {"one": range(4), "two": range(30, 34)}
BY_TABLE = "by tests/grow/test_growth_table.py"
GROWTHS = {**{name: STEPS[name] for name in ("depth", "neurons")}, "experts": "{grow: experts, experts: 2}"}
TOKENS = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(3))
CLOSE = 1e-5
"""Largest difference from the direct computation, relative to the largest number (at least 1), in float32."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """The end of an operation.

    Attributes:
        status: "works": its number is right; "refused": a WorkbenchError; "untested": transformers itself cannot run the model;
            "wrong": anything else.
        said: The number that was checked, the message of the refusal, or what went wrong.
    """

    status: str
    said: str


@dataclass(frozen=True)
class Family:
    """A tiny base of one class in a project folder.

    Attributes:
        kind: The class of transformers.
        causal: The class of its causal language model, which is another one for some multimodal models.
        project: The folder, with base/.
        base: The live base.
    """

    kind: Any
    causal: Any
    project: Project
    base: Any


class NotTinyError(Exception):
    """The class cannot be built tiny from its configuration; the message says why."""


class WrongError(Exception):
    """A number is not that of the direct computation."""


def class_of(kind: str, name: str = "") -> Any:
    """Return the class that transformers takes for a type of model, or a class by its name."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return getattr(transformers, name) if name else MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]


def build(kind: str, name: str, folder: Path) -> Family:
    """Build a tiny base in a folder: random weights, norms and biases random too.

    Raises:
        NotTinyError: If transformers cannot build it, or only with more parameters.
    """
    try:
        data = {**tiny_json(kind), "architectures": [name or class_of(kind).__name__]}
        made = class_of(kind, name)
        parsed = part_for(made, parse_config(data))
        with torch.device("meta"):
            count = sum(p.numel() for p in made._from_config(parsed).parameters())
        if count > LARGEST:
            raise NotTinyError(f"its smallest configuration here has {count / 1e6:,.0f} M parameters")
        torch.manual_seed(0)
        model = made._from_config(parsed, dtype=torch.float32).eval()
    except NotTinyError:
        raise
    except Exception as error:  # noqa: BLE001  every error of transformers' constructors means the same: this class cannot be built
        raise NotTinyError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.dim() == 1:  # as in `save_dense`: a norm behind a projection lets a change in front of it through
                wide = 3.0 if re.search("post_(feedforward|mlp)_layernorm", label) else 0.0
                parameter.add_(torch.randn_like(parameter) * 0.1 + wide)
        for tensor in model.state_dict().values():  # limits of clamps are infinite until they are trained
            if tensor.is_floating_point() and not tensor.isfinite().all():
                tensor.copy_(tensor.nan_to_num(nan=0.1, posinf=50.0, neginf=-50.0))
    (folder / "recipes").mkdir(parents=True)
    try:
        _save(model, folder / "base")
    except Exception as error:  # noqa: BLE001  as above
        raise NotTinyError(f"transformers cannot save it: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    return Family(made, class_of(kind) if kind in causal_types() else made, Project(folder), model)


def families() -> list[str]:
    """Return every type of model with a causal language model, and `MULTIMODAL`."""
    return [*causal_types(), *MULTIMODAL]


def walk(family: str, folder: Path) -> dict[str, Outcome]:
    """Merge, edit, grow and route one family.

    Args:
        family: A type of model, or TYPE:CLASS.
        folder: A folder that does not exist yet.

    Returns:
        "class", "merge", "edit", "grow: NAME" and "route" -> the outcome.

    Raises:
        NotTinyError: If the class cannot be built tiny.
    """
    kind, _, name = family.partition(":")
    with patch("transformers.AutoTokenizer.from_pretrained", _words):
        return _walked(kind, build(kind, name, folder))


def _walked(kind: str, family: Family) -> dict[str, Outcome]:
    found = {"class": Outcome("works", family.kind.__name__), "merge": outcome(lambda: merge(family))}
    if fails := _forward_fails(family.base):
        return {**found, **dict.fromkeys(("edit", *(f"grow: {label}" for label in GROWTHS), "route"), Outcome("untested", fails))}
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


def outcome(operation: Callable[[], str]) -> Outcome:
    """Run an operation that returns the number that it checked."""
    try:
        return Outcome("works", operation())
    except WorkbenchError as error:
        return Outcome("refused", error.message)
    except WrongError as error:
        return Outcome("wrong", str(error))
    except Exception as error:  # noqa: BLE001  a crash is what the walk is there to find
        return Outcome("wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def merge(family: Family) -> str:
    """Merge two fine-tunes, load the result with transformers and compare every tensor with the sum that is computed here."""
    base = family.base.state_dict()
    expected = {name: tensor.double().clone() for name, tensor in base.items()}
    for seed, (brick, weight) in enumerate(WEIGHTS.items(), 1):
        tuned = _finetuned(family, seed)
        _save(tuned, family.project.path / brick)
        for name, tensor in tuned.state_dict().items():
            expected[name] += weight * (tensor.double() - base[name].double())
    place = Path(family.project.run(MERGE, "merge.yaml")["model"])
    stored, wanted = tensors_of(place), tensors_of(family.project.path / "base")
    if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in wanted.items()}:
        raise WrongError(f"the names or shapes on disk are not the base's: {sorted(set(stored) ^ set(wanted))[:5]}")
    found = loaded(family.kind, place).state_dict()
    if set(found) != set(expected):
        raise WrongError(f"the tensors in memory are not the base's: {sorted(set(found) ^ set(expected))[:5]}")
    errors = {name: _error(found[name], tensor) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= CLOSE:
        raise WrongError(f"{worst} differs by {errors[worst]:.1e} from the sum")
    return f"{len(stored)} tensors, difference {errors[worst]:.0e}"


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
    error = _error(_logits(grown, TOKENS)[..., : before.shape[-1]], before)
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
        if not _error(plain, expected) > 100 * CLOSE:
            raise WrongError(f"the adapter on {module} changes nothing")
        with routed.routing.fixed(brick):
            errors.append(_error(_logits(routed, row), expected))
    if not max(errors) <= 10 * CLOSE:
        raise WrongError(f"the routed model's logits differ by {max(errors):.1e} from those of the merged adapter")
    return f"logits differ by {max(errors):.0e}, {right} of 24 prompts go to their brick"


def loaded(kind: Any, path: Path) -> Any:
    """The float32 model in a directory; nothing is missing, unexpected or of another shape."""
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if left := {key: value for key, value in info.items() if value}:
        raise WrongError(f"transformers loads it with {left}")
    return model.eval()


def _words(place: str, **_options: Any) -> Any:
    """Load the tokenizer of whole words; transformers' Auto class gives some types of model rules of their own."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(place)


def _save(model: Any, place: Path) -> None:
    model.save_pretrained(place)
    save_tokenizer(place)


def _finetuned(family: Family, seed: int) -> Any:
    """The base with noise on every weight."""
    tuned = family.kind._from_config(family.base.config, dtype=torch.float32).eval()
    tuned.load_state_dict(family.base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return tuned


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
    wanted = [name for name in modules if re.search(r"o_proj$|out_proj$|c_proj$|dense$|output", name)] or modules
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


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected number, at least 1."""
    if not found.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max()) / max(1.0, float(expected.double().abs().max()))
