"""Checks of grown models: on live models before anything is written, and on the written files before they are published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import GateFailedError, WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.lazy import torch
from workbench.grow.expansion.checks import check_fits, old_elements
from workbench.grow.expansion.preserve import TOLERANCES, answers, check_growth_on, finite_logits, prompts, same_logits
from workbench.grow.expansion.streamed import Streamed
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.skeleton import causal_skeleton, decoder_class, loading_class, parse_config
from workbench.resolve.resolved import Resolved
from workbench.run.kind import GrownStep, StepContext
from workbench.weights.checkpoint import Checkpoint, read_config
from workbench.weights.device import free_models, one_thread

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from workbench.resolve.resolved import Resolved


def compare(context: StepContext, grown: GrownStep, current: Model, model: Model) -> dict[str, object]:
    """Compare a grown model with the model before growth, before anything is written.

    config.json is compared with the tensors. Then `check: full` compares live models in float32, and `check: tensors` compares
    logits of two short prompts with the weights streamed from the files.

    Returns:
        The measurements, as plain data.

    Raises:
        WorkbenchError: If the models differ more than the step promises (exit code 3).
    """
    resolved, device = context.resolved, context.device
    check_fits(current, grown.weights.growth, model.weights.specs, context.id)
    if grown.step.composes:
        return {"fits": True}  # `check_written` compares texts, with the class that transformers has for the result
    if not grown.step.is_checked():
        context.say("check", "logits of two short prompts, layer by layer")
        return _check_logits(resolved, current, model, grown, device)
    context.say("check", "logits, cached generation and gradients, before and after")
    with _runs(context.id, "the grown model or the one before it"):
        before, after = (_live(resolved, m, device) for m in (current, model))
        return check_growth_on(before, after, grown.step, grown.weights, context.id)


def check_written(
    resolved: Resolved, grown: Sequence[GrownStep], model: Model, place: Path, device: torch.device, events: Events = no_events
) -> dict[str, dict[str, object]]:
    """Check the written files of a grown model.

    Every old tensor must have the same bits as before, unless the step trains the whole model. With `check: full`, transformers must also load the files and compute the
    same logits as the composed tensors.

    Returns:
        Step id -> `{"kept": {"identical": N, "with_additions": N, "rescaled": N, "new": N, "changed_later": N}, "reloaded":
        True}`.

    Raises:
        WorkbenchError: If an old tensor has changed, transformers cannot load the files, or logits differ (exit code 3).
    """
    measured: dict[str, dict[str, object]] = {}
    checked = [g for g in grown if g.step.check != "off"]
    if not checked:
        return measured
    saved = Checkpoint(place, "result")
    if grown[-1] is checked[-1]:
        last = checked[-1]
        check_fits(last.before, replace(last.weights.growth, config=saved.config), saved.specs, last.id)
    for step in checked:
        events({"stage": "check", "step": step.id, "text": "comparing old tensors in the files bit for bit"})
        if step.step.train is not None and step.step.train.whole:
            measured[step.id] = {"kept": {"trained": len(step.weights.growth.tensors)}}
            continue
        with one_thread():
            measured[step.id] = {"kept": old_elements(step.weights.growth, step.before.weights, saved, step.kept, step.id)}
    if full := [g for g in checked if g.step.check == "full"]:
        events({"stage": "check", "step": full[-1].id, "text": "loading the files with transformers"})
        if any(g.step.composes for g in grown):
            measured[full[-1].id] |= check_composed(resolved, grown, place, device)
        else:
            _check_reload(resolved, model, place, full, device)
        for step in full:
            measured[step.id]["reloaded"] = True
    return measured


def _check_reload(resolved: Resolved, model: Model, place: Path, steps: Sequence[GrownStep], device: torch.device) -> None:
    """Load the written files with transformers and compare the model with the composed tensors, in the same dtype.

    Tensors that the architecture does not use are accepted if they come from the base, but not if a step has added them.
    """
    step = steps[-1].id
    live = live_model(model.config, compute(model, resolved.dtype, device), resolved.tokenizer_path, device)
    expected, dtype = answers(live), live.dtype
    del live
    free_models(model.weights)
    added = {s.kept.get(name) for s in steps for name, grown in s.weights.growth.tensors.items() if grown.new}
    loaded = _loaded(decoder_class(parse_config(model.config), model.config), place, dtype, step, added, _REPORT)
    reloaded = answers(loaded.to(device))
    if not all(torch.equal(one, other) for one, other in zip(expected, reloaded, strict=True)):
        raise GateFailedError(f"step {step}: the reloaded model gives other outputs than the composed tensors", _REPORT)


def _check_logits(resolved: Resolved, current: Model, model: Model, grown: GrownStep, device: torch.device) -> dict[str, object]:
    """Compare logits of two short prompts before and after growth, or check that they are finite if the method promises nothing.

    Returns:
        `{"max_logit_difference": float}` or `{"finite_logits": True}`, with `loaded_whole` if the model cannot be streamed.
    """
    promise, tokens_added = grown.step.promises(), grown.weights.growth.tokens
    whole = False

    def logits(of: Model, tokens: torch.Tensor, skeleton: PreTrainedModel | None = None) -> torch.Tensor:
        nonlocal whole
        with _runs(grown.id, "the grown model" if of is model else "the model before growth"):
            streamed = Streamed.prepare(of, skeleton or causal_skeleton(of.config, device), device)
            if streamed is not None:
                try:
                    return streamed.logits(tokens.to(device))
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:
                    # NotStreamedError, or an error of torch about weights that are not loaded: load the whole model instead.
                    pass
            whole = True
            with torch.no_grad():
                output: torch.Tensor = _live(resolved, of, device)(tokens.to(device)).logits.float()
            return output

    with _runs(grown.id, "the model before growth"):
        skeleton = causal_skeleton(current.config, device)
        tokens = prompts(skeleton, without=tokens_added)
    after = logits(model, tokens)
    finite_logits(after, grown.id)
    if promise == "no":
        record: dict[str, object] = {"finite_logits": True}
    else:
        record = same_logits(logits(current, tokens, skeleton), after, TOLERANCES[promise], grown.id, tokens_added)
    return {**record, **({"loaded_whole": True} if whole else {})}


@contextmanager
def _runs(step: str, what: str) -> Iterator[None]:
    """Convert errors of transformers to a WorkbenchError of the step. Out-of-memory errors are not converted."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except GateFailedError:
        raise
    except WorkbenchError as error:
        raise GateFailedError(f"step {step}: {error.message}, so the growth cannot be checked", _OFF) from None
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise GateFailedError(f"step {step}: transformers cannot run {what} ({why[:200]})", _OFF) from None


_OFF = "Report this architecture. `check: off` in the step writes the model without this check."
_REPORT = "Report this architecture. `check: tensors` or `check: off` in the step writes the model without this check."


def _live(resolved: Resolved, model: Model, device: torch.device) -> PreTrainedModel:
    """Load weights as a live float32 model."""
    return live_model(model.config, compute(model, torch.float32, device), resolved.tokenizer_path, device)


_OFF_COMPOSED = "If the models were made for different settings, set `base` to the text model of this architecture. `check: off` skips this check."


def check_composed(resolved: Resolved, grown: Sequence[GrownStep], place: Path, device: torch.device) -> dict[str, object]:
    """Load the written model and compare its answers to texts with those of the text model that was put into it.

    A difference means that config.json of the brick gives the text decoder other settings than the base has, such as another base of
    the rotary positions.

    Returns:
        `{"max_logit_difference": float}`, in float32.

    Raises:
        WorkbenchError: If transformers cannot load the files, reports missing or unexpected tensors, or logits differ (exit code 3).
    """
    import transformers

    composed = next(g for g in grown if g.step.composes)
    before = composed.before
    written = compute(before, resolved.dtype, device)  # rounded as in the files, then compared in float32
    text = live_model(
        before.config, {n: t.float() if t.is_floating_point() else t for n, t in written.items()}, resolved.base_path, device
    )
    tokens = prompts(text, without=_placeholders(composed.weights.growth.config))
    expected = _logits_of(text, tokens, composed.id)
    del text, written
    free_models(before.weights)
    kind = getattr(transformers, loading_class(read_config(place, "result")))
    reloaded = _loaded(kind, place, torch.float32, composed.id, None, _OFF_COMPOSED)
    found = _logits_of(reloaded.to(device), tokens, composed.id)
    try:
        return same_logits(expected, found, TOLERANCES["exact"], composed.id, ())
    except GateFailedError as error:
        raise GateFailedError(
            f"{error.message} (the text decoder inside the multimodal model, compared with it alone)", _OFF_COMPOSED
        ) from None


def _placeholders(config: Mapping[str, object]) -> list[int]:
    """Return the tokens that stand for images, video or audio, by config.json."""
    names = [key for key in config if key.endswith(("_token_id", "_token_index")) and not key.startswith(("bos", "eos", "pad"))]
    return [token for key in names if isinstance(token := config[key], int)]


def _loaded(kind: Any, place: Path, dtype: torch.dtype, step: str, added: Set[str | None] | None, hint: str) -> Any:
    """Return the written model, loaded with a class of transformers.

    `added` are the tensors that the architecture must use; it may leave out others, which come from the base. None: it must use all.
    """
    try:
        model, info = kind.from_pretrained(place, dtype=dtype, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise GateFailedError(
            f"step {step}: transformers cannot load the written model ({str(error).strip()[:200]})", hint
        ) from None
    if added is not None:
        info["unexpected_keys"] = added & set(info["unexpected_keys"])
    # A mismatch is a tuple: name, shape in the file, expected shape.
    wrong = [name if isinstance(name, str) else name[0] for names in info.values() for name in names if name]
    if wrong:
        raise GateFailedError(
            f"step {step}: the written model has {len(wrong)} missing, unexpected or mismatched tensors, such as {min(wrong)}",
            hint,
        )
    return model.eval()


def _logits_of(model: Any, tokens: Tensor, step: str) -> Tensor:
    """Return the logits of texts."""
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens.to(model.device)).logits.float()
        return logits
    except torch.OutOfMemoryError:
        raise
    except (WorkbenchError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise GateFailedError(
            f"step {step}: transformers cannot run the model on a text ({str(error).strip()[:200]})", _OFF_COMPOSED
        ) from None
