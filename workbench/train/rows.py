"""Rows of a training: tokenization, batches, their loss and other objectives, and replayed prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.facts.facts import joined
from workbench.ground import jsondoc
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, refuse_misspelt
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import mean_divergence
from workbench.models.prompts import encode_pair, encode_text, encode_turn
from workbench.models.texts import ANSWERS, Text
from workbench.train.spec import TrainSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_replay(path: Path) -> list[tuple[str, str | None]]:
    """Read `prompt` and the optional `completion` of each line of a jsonl file; other fields are ignored.

    Raises:
        WorkbenchError: If a line is not an object, has no prompt, has a completion that is not a text, or has a field that is
            a misspelling of `completion` or another name for it. The message names the file and the line.
    """
    if not path.is_file():
        raise InvalidRecipeError(f"{path.name}: no such file of prompts", "Check the file name in `replay:`.")
    prompts = []
    for number, row in jsondoc.lines(path, path.name, "Expected one object with `prompt` per line."):
        prompts.append(_parse_replay_row(row, f"{path.name}:{number}"))
    if not prompts:
        raise InvalidRecipeError(f"{path.name}: the file has no prompts")
    return prompts


def _parse_replay_row(row: Any, place: str) -> tuple[str, str | None]:
    """Return the prompt and the completion of a row, or None if the base is to sample one."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise InvalidRecipeError(f"{place}: expected an object with `prompt`")
    refuse_misspelt(row, ("prompt", "completion"), place, InvalidRecipeError)
    if "completion" not in row:
        if alias := next((key for key in ANSWERS if key in row), None):
            raise InvalidRecipeError(
                f"{place}: the field '{alias}' is not used, because the base samples a continuation of prompts without `completion`",
                "Rename it to `completion` if the brick should learn it, or remove it.",
            )
        return row["prompt"], None
    if not isinstance(row["completion"], str) or not row["completion"].strip():
        raise InvalidRecipeError(
            f"{place}: expected a text in 'completion', found {row['completion']!r}", "Leave the field out if there is none."
        )
    return row["prompt"], row["completion"]


def encode_row(tokenizer: PreTrainedTokenizerBase, text: Text, max_length: int, learn_end: bool = True) -> tuple[list[int], int]:
    """Tokenize a training row, and return the token ids and the number of learned tokens at their end.

    A turn of a conversation is worded by the chat template, which usually ends it with a token of its own; if it does not, the end of
    sequence is added. Any other row is tokenized by `encode`.

    Raises:
        WorkbenchError: If the row is longer than `max_length` or has one token only, or the template cannot word it.
    """
    if not text.messages:
        return encode(tokenizer, text.prompt, text.answer, max_length, learn_end)
    pair, ended = encode_turn(tokenizer, text.messages, text.place, learn_end, text.tools)
    end, tail = tokenizer.eos_token_id, list(pair.continuation)
    if learn_end and not ended and end is not None:
        tail = [*tail, end]
    return _row(pair.prompt, tail, max_length, f"{text.place}: {text.answer}")


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int, learn_end: bool = True
) -> tuple[list[int], int]:
    """Tokenize a prompt and its completion, and return the token ids and the number of learned tokens at their end.

    Both are tokenized as one text, with a space between them unless one of them has it already. Without a prompt, the
    completion is a whole text, of which all tokens but the first are learned, because nothing predicts the first one.

    Args:
        tokenizer: Tokenizer of the base.
        prompt: The prompt, or an empty string.
        completion: The completion, or a whole text.
        max_length: Maximum number of tokens.
        learn_end: Whether to add the end of sequence and learn it.

    Raises:
        WorkbenchError: If the row is longer than `max_length` or has one token only.
    """
    end, head = tokenizer.eos_token_id, []
    if prompt:
        pair = encode_pair(tokenizer, prompt, joined(prompt, completion))
        head, tail = pair.prompt, pair.continuation
    else:
        tail = encode_text(tokenizer, completion)
    if learn_end and end is not None and (prompt or tail[-1:] != [end]):
        tail = [*tail, end]
    return _row(head, tail, max_length, prompt or completion)


def _row(head: list[int], tail: list[int], max_length: int, shown: str) -> tuple[list[int], int]:
    """Return the token ids of a row and the number of learned tokens, after a check of its length; `shown` names the row in errors."""
    if len(head) + len(tail) > max_length:
        raise WorkbenchError(
            f"a training row has {len(head) + len(tail)} tokens, more than max_length {max_length}: {shown[:60]!r}",
            "Increase `max_length`, or shorten the row.",
        )
    if len(head) + len(tail) < 2:
        raise InvalidRecipeError(f"a training row has one token, expected 2 or more: {shown[:60]!r}", "Remove the row.")
    return head + tail, min(len(tail), len(head) + len(tail) - 1)


def collate(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Collate rows into a batch, with the positions of the learned tokens.

    Rows are padded on the right (see `batching`), so the loss of a row does not depend on the other rows, for every
    architecture.

    Returns:
        `input_ids` and `attention_mask`, [row, position]; `places`, [learned token], the flat indices into [row · position] of
        the positions that predict the learned tokens; `targets`, [learned token], the learned tokens themselves.
    """
    import torch

    from workbench.models.texts import side_by_side

    batch = side_by_side([ids for ids, _ in rows])
    width = batch.tokens.shape[1]
    ends = [(i * width + len(ids), ids, learned) for i, (ids, learned) in enumerate(rows)]
    places = [place for end, _, learned in ends for place in range(end - learned - 1, end - 1)]
    targets = [token for _, ids, learned in ends for token in ids[len(ids) - learned :]]
    return {
        "input_ids": batch.tokens,
        "attention_mask": batch.mask,
        "places": torch.tensor(places, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
    }


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of `collate` as one row without padding, [1, token]. Positions start again with each text."""
    width, kept = batch["input_ids"].shape[1], batch["attention_mask"].flatten().bool()
    rest = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    return rest | {
        "input_ids": batch["input_ids"].flatten()[kept][None],
        "position_ids": torch.arange(len(kept))[kept][None] % width,
        "places": (kept.cumsum(0) - 1)[batch["places"]],
    }


@no_grad
def refuse_mixing(model: Any, row: tuple[list[int], int]) -> None:
    """Raise WorkbenchError if the logits of a packed text depend on the text before it, as with layers that read no positions.

    Args:
        model: The live model, which is left in eval mode.
        row: Token ids and the number of learned tokens.
    """
    size, model = model.get_input_embeddings().weight.shape[0], model.eval()
    batches = [packed(collate([(before, 1), row])) for before in (row[0], [(token + 1) % size for token in row[0]])]
    try:
        one, other = (learned_logits(model, {n: t.to(model.device) for n, t in batch.items()})[0][1:] for batch in batches)
        mixed = bool((one - other).norm() > 0.01 * one.norm())
    except TypeError:  # the model takes no positions
        mixed = True
    if mixed:
        raise WorkbenchError(
            f"packing: the layers of model_type '{model.config.model_type}' would mix the texts of a row",
            "Remove `packing`. Small batches with `gradient_accumulation_steps` need little padding, too.",
        )


def batch_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a batch's learned tokens, plus the router loss if the model's configuration enables it.

    Args:
        model: A live causal language model.
        batch: A batch from `collate`, on the model's device.

    Raises:
        WorkbenchError: If the model has no output head.
    """
    import torch

    logits, routers = learned_logits(model, batch)
    loss = torch.nn.functional.cross_entropy(logits, batch["targets"])
    return loss if routers is None else loss + routers


def learned_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the logits that predict a batch's learned tokens, and the router loss if the model's configuration enables it.

    The output head runs only at positions that predict a learned token. It would take half of a small model's training time
    otherwise.

    Args:
        model: A live causal language model.
        batch: A batch from `collate` or `packed`, on the model's device.

    Returns:
        Logits in float32, [learned token, vocabulary], and the router loss or None.

    Raises:
        WorkbenchError: If the model has no output head.
    """
    import torch

    from workbench.models.hooks import head_sees

    head, places = model.get_output_embeddings(), batch["places"]
    if head is None:
        raise WorkbenchError(f"{type(model).__name__} has no output head", "Training requires a causal language model.")
    with head_sees(head, places):
        read = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        output = model(**read, use_cache=False)
    logits = output.logits[0].float()
    routers = getattr(output, "aux_loss", None)  # set if the configuration has output_router_logits
    if isinstance(routers, torch.Tensor):
        return logits, float(model.config.get_text_config().router_aux_loss_coef) * routers.to(logits.device)
    return logits, None


def replay(
    spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[tuple[str, str | None]], count: int
) -> list[tuple[list[int], int]]:
    """Return tokenized rows of replayed prompts, with their completion or a continuation sampled from the untrained model.

    Continuations are sampled at temperature 1. The expected gradient on a model's own samples is zero, while training on its
    greedy text would make it more confident. The end of the sequence is never sampled, so all continuations have the same length.

    Args:
        spec: Settings of the training.
        model: The live model, not trained yet.
        tokenizer: Its tokenizer.
        prompts: Prompts with their completion, or None if the model samples it.
        count: Number of rows; the prompts are repeated in order.
    """
    import torch

    chosen = [prompts[index % len(prompts)] for index in range(count)]
    complete = [
        encode(tokenizer, prompt, text, spec.max_length, spec.learn_end) if text is not None else None for prompt, text in chosen
    ]
    heads = {i: encode_text(tokenizer, prompt) for i, (prompt, text) in enumerate(chosen) if text is None}
    rows = {i: row for i, row in enumerate(complete) if row is not None}
    model.eval()
    # generate() passes a non-contiguous slice to the head, for which the projection would copy its matrix once per row.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    for batch in _group_by_length(heads, 64):
        inputs = torch.tensor([heads[i] for i in batch], device=model.device)
        with torch.no_grad():
            sampled = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                top_k=0,
                min_new_tokens=spec.replay_tokens,
                max_new_tokens=spec.replay_tokens,
            )
        tails = sampled[:, inputs.shape[1] :].tolist()
        rows |= {i: (heads[i] + tail, len(tail)) for i, tail in zip(batch, tails, strict=True)}
    hook.remove()
    return [rows[i] for i in range(count)]


def _group_by_length(rows: Mapping[int, list[int]], batch_size: int) -> list[list[int]]:
    """Return batches of at most `batch_size` row numbers with rows of equal length, so that generation needs no padding."""
    by_length: dict[int, list[int]] = {}
    for number, ids in rows.items():
        by_length.setdefault(len(ids), []).append(number)
    return [group[i : i + batch_size] for _, group in sorted(by_length.items()) for i in range(0, len(group), batch_size)]


@dataclass(frozen=True)
class Objective:
    """The loss of a training, and the batches that it is computed on.

    Attributes:
        collate: Returns a batch of rows, which are token ids and the number of learned tokens; the batch has at least the entries of
            `rows.collate`.
        loss: Returns the loss of a live model on a batch, as a scalar.
        digest: Digest of everything that determines the loss, if it is not the default one.
        record: Entries for the training record.
    """

    collate: Callable[[Sequence[tuple[list[int], int]]], dict[str, Tensor]] = collate
    loss: Callable[[Any, Mapping[str, Tensor]], Tensor] = batch_loss
    digest: str | None = None
    record: Mapping[str, object] = field(default_factory=dict)


CROSS_ENTROPY = Objective()


def distillation(teacher: PreTrainedModel) -> Objective:
    """Return the objective of a model that learns a teacher's distributions: mean KL(teacher ‖ model) over the learned tokens.

    Args:
        teacher: The live teacher, which has the same tokenizer; it does not change.
    """
    return Objective(loss=partial(_taught_loss, teacher))


def _taught_loss(teacher: PreTrainedModel, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the divergence on a batch, plus the router loss if the model's configuration enables it."""
    with torch.no_grad():
        wanted, _ = learned_logits(teacher, batch)
    logits, routers = learned_logits(model, batch)
    loss = mean_divergence(wanted, logits)
    return loss if routers is None else loss + routers
