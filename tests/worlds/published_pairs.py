"""Bricks as people make them on a base as published: each merged by a recipe, and compared with a merge by hand under the names of transformers' live model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from worlds.commands import call
from worlds.family import CLOSE, Outcome, WrongError, error_of
from worlds.family_walk import _words
from worlds.published import published
from worlds.published_bases import Base, NotBuiltError, as_published
from worlds.published_more import MORE
from worlds.tiny import edit_json, save_tokenizer, tensors_of

from workbench.ground.errors import WorkbenchError

FULL = "bricks: {one: {checkpoint: one}}\nsteps: [{merge: task_arithmetic, bricks: {one: 0.5}}]\noutput: {dtype: float32}\n"
LORA = "bricks: {one: {adapter: lora}}\nsteps: [{merge: task_arithmetic, bricks: {one: 1.0}}]\noutput: {dtype: float32}\n"
TEXT = "bricks: {one: {checkpoint: text}}\nsteps: [{merge: task_arithmetic, bricks: {one: 0.5}}]\noutput: {dtype: float32}\n"
MADE = "bricks: {one: {adapter: made}}\nsteps: [{merge: task_arithmetic, bricks: {one: 1.0}}]\noutput: {dtype: float32}\n"
TOKENS = torch.tensor([[5, 9, 17, 23, 8, 40, 31, 12]])
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj", "x_proj"]
SAME_CLASS = "the class of the other LoRA"
COMPUTED = re.compile(r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
"""Masks and frequencies that old releases of transformers stored: the model computes them, and a result does not hold them."""
PAIRS = ("full", "native", "lora", "text", "text_lora", "extract")
"""A full fine-tune as save_pretrained writes it, the same under the live names (`save_original_format=False`), PEFT's LoRA, the text model saved
alone, a LoRA on it, and the adapter that `brick extract` makes of the full fine-tune."""


@dataclass
class Walk:
    """A base with what several pairs need.

    Attributes:
        base: The base as published.
        start: The base's live tensors in float32.
        tuned: The live tensors of the full fine-tune.
    """

    base: Base
    start: dict[str, torch.Tensor]
    tuned: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The project folder."""
        return self.base.project.path


def entries() -> dict[str, Any]:
    """Return the families of published.json, which may be missing, and further ones."""
    return {**published(), **MORE}


def cells(key: str, about: dict[str, Any], folder: Path) -> dict[str, Outcome]:
    """Build a family as published and walk its pairs.

    Returns:
        "class", and every name of `PAIRS` -> outcome.
    """
    try:
        base = as_published(key, about, folder)
    except NotBuiltError as error:
        return {"class": Outcome("not built", about["architecture"] or "")} | dict.fromkeys(
            PAIRS, Outcome("not built", str(error))
        )
    return {"class": Outcome("exact", base.kind.__name__)} | walk(base)


def walk(base: Base) -> dict[str, Outcome]:
    """Return pair -> outcome: "exact", "refused", "wrong" or "not built"."""
    with patch("transformers.AutoTokenizer.from_pretrained", _words):
        walked = Walk(base, live(base.kind, base.trained)[0].state_dict())
        pairs: dict[str, Callable[[Walk], str]] = {
            "full": full,
            "native": native,
            "lora": lora,
            "text": text,
            "text_lora": text_lora,
            "extract": extracted,
        }
        return {name: outcome(lambda pair=pair: pair(walked)) for name, pair in pairs.items()}  # type: ignore[misc]


class SkippedError(Exception):
    """A pair cannot be made; the message says why."""


def outcome(pair: Callable[[], str]) -> Outcome:
    """Make a pair and merge it."""
    try:
        return Outcome("exact", pair())
    except SkippedError as error:
        return Outcome("not built", str(error))
    except WorkbenchError as error:
        return Outcome("refused", error.message)
    except WrongError as error:
        return Outcome("wrong", str(error))
    except Exception as error:  # noqa: BLE001  a crash is what the walk is there to find
        return Outcome("wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def full(walked: Walk) -> str:
    """Merge half of a full fine-tune."""
    kind = walked.base.kind
    tuned = noisy(made(lambda: live(kind, walked.base.trained, torch.bfloat16)[0]), 1)
    place = walked.folder / "one"
    saved(tuned, place)
    walked.tuned = made(lambda: whole(kind, place)).state_dict()
    return merged(walked, FULL, half(walked.start, walked.tuned))


def native(walked: Walk) -> str:
    """Merge half of the same fine-tune with the names of the live model on disk."""
    if not walked.tuned:
        raise SkippedError("the full fine-tune is not made")
    tuned = whole(walked.base.kind, walked.folder / "one").to(torch.bfloat16)
    place = walked.folder / "native"
    saved(tuned, place, save_original_format=False)
    if tensors_of(place).keys() == tensors_of(walked.folder / "one").keys():
        raise SkippedError("the same names as save_pretrained's")
    after = made(lambda: whole(walked.base.kind, place)).state_dict()
    return merged(walked, FULL.replace("checkpoint: one", "checkpoint: native"), half(walked.start, after))


def lora(walked: Walk) -> str:
    """Merge a LoRA on all linear layers of the class that people train."""
    return ranked(walked, *trained(walked.base), "lora")


def text_lora(walked: Walk) -> str:
    """Merge a LoRA on all linear layers of the text model of a multimodal one."""
    name, own = text_model(walked.base)
    if "taken" not in name:
        raise SkippedError(SAME_CLASS)
    return ranked(walked, name, own, "text-lora")


def ranked(walked: Walk, name: str, own: Callable[[], Any], folder: str) -> str:
    """Train a LoRA of a class that `own` loads, merge it, and compare with PEFT's own merge."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = made(own)
    before = {key: t.detach().double().clone() for key, t in model.state_dict().items()}
    place = place_of(model, walked.base)
    torch.manual_seed(3)
    options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False}
    task = {"task_type": "CAUSAL_LM"} if hasattr(model, "prepare_inputs_for_generation") else {}
    how = ""
    try:
        tuned = get_peft_model(model, LoraConfig(**options, **task))
    except (
        ValueError
    ):  # PEFT refuses `all-linear` for Mamba layers, and where a linear layer has the name of another kind of module
        tuned = made(lambda: get_peft_model(made(own), LoraConfig(**{**options, "target_modules": PROJECTIONS}, **task)))
        how = " on *_proj"
    tuned.save_pretrained(walked.folder / folder)
    edit_json(walked.folder / folder / "adapter_config.json", base_model_name_or_path=str(walked.folder / "base"))
    again = PeftModel.from_pretrained(made(own).double(), walked.folder / folder)
    after = again.double().merge_and_unload().state_dict()
    expected = {key: t.double() for key, t in walked.start.items()}
    changed = 0
    for key, tensor in after.items():
        if tensor.is_floating_point() and not torch.equal(tensor.double(), before[key]):
            expected[place(key)] = walked.start[place(key)].double() + tensor.double() - before[key]
            changed += 1
    if not changed:
        raise SkippedError("the adapter changes nothing")
    return f"{name}{how}, {changed} layers, {merged(walked, LORA.replace('adapter: lora', f'adapter: {folder}'), expected)}"


def text(walked: Walk) -> str:
    """Merge half of the text model that was fine-tuned and saved alone."""
    name, own = text_model(walked.base)
    model = noisy(made(own), 2)
    place = place_of(model, walked.base)
    saved(model, walked.folder / "text")
    alone = made(lambda: whole(type(model), walked.folder / "text")).state_dict()
    expected = {key: t.double() for key, t in walked.start.items()}
    for key, tensor in alone.items():
        if tensor.is_floating_point():
            expected[place(key)] = (walked.start[place(key)].double() + tensor.double()) / 2
    return f"{name}, {merged(walked, TEXT, expected)}"


def extracted(walked: Walk) -> str:
    """Extract an adapter of full rank from the full fine-tune, and merge it."""
    if not walked.tuned:
        raise SkippedError("the full fine-tune is not made")
    with inside(walked.folder):
        call("brick", "extract", "one", "--base", "base", "-o", "made", "--rank", "4096", "--device", "cpu", "--threads", "1")
    return merged(walked, MADE, {key: t.double() for key, t in walked.tuned.items()})


def merged(walked: Walk, recipe: str, expected: dict[str, torch.Tensor]) -> str:
    """Run a recipe and compare its result with the expected live tensors.

    Returns:
        The largest errors of the tensors and of the logits.

    Raises:
        WrongError: If names on disk, tensors or logits are not the expected ones.
    """
    moved = max(error_of(walked.start[name], tensor) for name, tensor in expected.items() if tensor.is_floating_point())
    assert moved > 100 * CLOSE, "the brick changes nothing"
    config = (walked.folder / "base" / "config.json").read_text("utf-8")
    few = "base: {id: base, dequantize: true}\n" if '"mxfp4"' in config else ""
    place = Path(walked.base.project.run(few + recipe)["model"])
    stored, want = tensors_of(place), tensors_of(walked.base.trained)
    ties = dict(getattr(walked.base.kind, "_tied_weights_keys", None) or {})
    tied = {name for name in want.keys() - stored.keys() if name in ties}
    computed = {name for name in walked.base.only if COMPUTED.search(name)}
    if stored.keys() != want.keys() - tied - computed:
        raise WrongError(f"the names on disk are not the base's: {sorted(stored.keys() ^ want.keys())[:4]}")
    for name, tensor in walked.base.only.items():
        if name not in computed and not torch.equal(stored[name], tensor.to(stored[name].dtype)):
            raise WrongError(f"{name}, which transformers does not load, is not the base's")
    model, info = live(walked.base.kind, place)
    if info != walked.base.info:
        raise WrongError(f"transformers loads it with {str({k: v for k, v in info.items() if v})[:200]}")
    found = model.state_dict()
    errors = {name: error_of(found[name], tensor) for name, tensor in expected.items() if tensor.is_floating_point()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= CLOSE:
        bad = sum(not error <= CLOSE for error in errors.values())
        raise WrongError(f"{worst} differs by {errors[worst]:.1e} from the merge by hand ({bad} of {len(errors)} tensors)")
    logits = answers(model)
    model.load_state_dict({name: t.to(found[name].dtype) for name, t in expected.items()})
    if isinstance(logits, str):
        return f"error {errors[worst]:.0e}, {logits}"
    wanted = answers(model)
    assert not isinstance(wanted, str)
    if not (error := error_of(logits, wanted)) <= 10 * CLOSE:
        raise WrongError(f"the logits differ by {error:.1e}")
    return f"error {errors[worst]:.0e}, logits {error:.0e}"


def answers(model: Any) -> torch.Tensor | str:
    """Return the logits of eight tokens, or why transformers cannot compute them."""
    try:
        with torch.no_grad():
            part = getattr(model, "thinker", model)
            part = part.language_model if type(part).__name__ == "Llama4ForConditionalGeneration" else part  # it needs an image
            found: torch.Tensor = part(input_ids=TOKENS).logits
    except Exception as error:  # noqa: BLE001  whatever it raises, the model cannot be run
        return f"no forward pass: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return found if found.isfinite().all() else "logits not finite"


def live(kind: Any, place: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """Return the model in a directory, and what transformers says of its keys."""
    model, info = kind.from_pretrained(place, dtype=dtype, output_loading_info=True)
    return model.eval(), info


def whole(kind: Any, place: Path) -> Any:
    """Return the float32 model in a directory; nothing is missing or of another shape."""
    model, info = live(kind, place)
    if lost := {key: value for key, value in info.items() if value and key != "unexpected_keys"}:
        raise SkippedError(f"transformers loads its own save of {kind.__name__} with {str(lost)[:160]}")
    return model


def made(build: Callable[[], Any]) -> Any:
    """Return what transformers or PEFT builds.

    Raises:
        SkippedError: If it does not.
    """
    try:
        return build()
    except SkippedError:
        raise
    except Exception as error:  # noqa: BLE001  whatever it raises, people cannot make this brick either
        raise SkippedError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None


def saved(model: Any, place: Path, **options: Any) -> None:
    """Save a fine-tune with its tokenizer."""
    made(lambda: model.save_pretrained(place, **options))
    save_tokenizer(place)


def noisy(model: Any, seed: int) -> Any:
    """Add noise to every parameter."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.float() + 0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def half(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the live tensors half way, in float64; whole numbers stay."""
    return {name: (t.double() + after[name].double()) / 2 if t.is_floating_point() else t for name, t in before.items()}


def trained(base: Base) -> tuple[str, Callable[[], Any]]:
    """Return the class that people train with PEFT: that of AutoModelForCausalLM, or else the whole one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    place = base.trained
    if (thinker := thinker_of(base)) is not None:
        return thinker.__name__, lambda: complete(*live(thinker, place))
    if type(AutoConfig.from_pretrained(place)) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "AutoModelForCausalLM", lambda: complete(*live(AutoModelForCausalLM, place))
    return base.kind.__name__, lambda: live(base.kind, place)[0]


def thinker_of(base: Base) -> Any:
    """Return the part of an Omni model that people train; None for other models."""
    import transformers

    return getattr(
        transformers, base.kind.__name__.replace("ForConditionalGeneration", "Thinker") + "ForConditionalGeneration", None
    )


def complete(model: Any, info: dict[str, Any]) -> Any:
    """Return a model whose weights all come from the checkpoint.

    Raises:
        SkippedError: If some do not.
    """
    if missing := sorted(map(str, info["missing_keys"])):
        raise SkippedError(
            f"{type(model).__name__} of transformers does not find {missing[0]} in the base ({len(missing)} tensors)"
        )
    return model


def text_model(base: Base) -> tuple[str, Callable[[], Any]]:
    """Return the text class and what loads it.

    Raises:
        SkippedError: If the whole class is the text model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    place = base.trained
    config = AutoConfig.from_pretrained(place)
    if (thinker := thinker_of(base)) is not None:
        return thinker.__name__, lambda: complete(*live(thinker, place, torch.bfloat16))
    own = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if own is base.kind and config.get_text_config() is config:
        raise SkippedError("a text model")
    if own not in (None, base.kind):
        return own.__name__, lambda: complete(*live(AutoModelForCausalLM, place, torch.bfloat16))
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.get_text_config()), None)
    if kind is None:
        raise SkippedError(f"transformers has no causal class for {type(config.get_text_config()).__name__}")
    return f"{kind.__name__} taken from the whole model", lambda: taken(kind, base)


def taken(kind: Any, base: Base) -> Any:
    """Return the text model with the decoder and the head of the whole one, since transformers does not load the base with that class."""
    model = live(base.kind, base.trained, torch.bfloat16)[0]
    alone = kind._from_config(model.config.get_text_config(), dtype=torch.bfloat16).eval()
    place, tensors = place_of(alone, base), model.state_dict()
    alone.load_state_dict({key: tensors[place(key)] for key in alone.state_dict()})
    return alone


def place_of(model: Any, base: Base) -> Callable[[str], str]:
    """Return what maps a live name of a class to that of the base's class: the decoder is found by its class."""
    from transformers import AutoConfig

    if type(model) is base.kind:
        return lambda name: name
    with torch.device("meta"):
        outer = base.kind(AutoConfig.from_pretrained(base.trained))
    inner = model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"
    module = model if re.search("Thinker", type(model).__name__) else getattr(model, inner)
    stem = "" if module is model else f"{inner}."
    (found,) = [name for name, part in outer.named_modules() if type(part) is type(module)]
    heads = {name.rpartition(".")[2]: name for name, _ in outer.named_parameters(remove_duplicate=False)} | {
        "lm_head.weight": next((name for name in outer.state_dict() if name.endswith("lm_head.weight")), "lm_head.weight")
    }
    return lambda name: f"{found}.{name.removeprefix(stem)}" if name.startswith(stem) else heads.get(name, name)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
