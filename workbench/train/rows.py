"""Rows of a training: read, as tokens, as batches; prompts that are replayed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.train.spec import TrainSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


def read_replay(path: Path) -> list[tuple[str, str | None]]:
    """(`prompt`, `completion` if there is one) of each line of a jsonl file. Errors name the line."""
    if not path.is_file():
        raise WorkbenchError(f"{path.name}: no such file of prompts", "Check the file names of the training.", 2)
    found = []
    for number, row in jsondoc.lines(path, path.name, "One object a line, with `prompt`."):
        texts = [row.get(key) for key in ("prompt", "completion") if key in row] if isinstance(row, dict) else []
        if not isinstance(row, dict) or "prompt" not in row or not all(isinstance(text, (str, int, float)) for text in texts):
            raise WorkbenchError(f"{path.name}:{number}: expected an object with `prompt`", None, 2)
        found.append((str(row["prompt"]), str(row["completion"]) if "completion" in row else None))
    if not found:
        raise WorkbenchError(f"{path.name}: holds no prompts", None, 2)
    return found


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int, learn_end: bool = True
) -> tuple[list[int], int]:
    """Token ids of prompt, one blank, completion and (with learn_end) end of sequence; how many are learned.

    The prompt is tokenised by itself, as it will be when the model is asked. Without a prompt the completion is a whole text:
    all of it is learned but the first token, which nothing predicts. Errors: longer than max_length, a text of one token.
    """
    head: list[int] = tokenizer(prompt)["input_ids"] if prompt else []
    tail: list[int] = tokenizer(" " + completion if prompt else completion, add_special_tokens=not prompt)["input_ids"]
    if learn_end and (prompt or tail[-1:] != [tokenizer.eos_token_id]):
        tail = [*tail, tokenizer.eos_token_id]
    if len(head) + len(tail) > max_length:
        raise WorkbenchError(
            f"a training row has {len(head) + len(tail)} tokens, more than max_length {max_length}: {(prompt or completion)[:60]!r}",
            "Raise `max_length`, or shorten the row.",
        )
    if len(head) + len(tail) < 2:
        raise WorkbenchError(f"a training row has one token, expected 2 or more: {completion[:60]!r}", "Take the row out.", 2)
    return head + tail, min(len(tail), len(head) + len(tail) - 1)


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Any]:
    """A batch padded on the left, with labels for the last `logits_to_keep` positions only.

    Shapes: input_ids and attention_mask (rows, longest); labels (rows, longest completion + 1), IGNORED
    outside the completion. The extra position is the one that predicts the first token of the completion.
    """
    import torch

    width = max(len(ids) for ids, _ in rows)
    keep = max(learned for _, learned in rows) + 1
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    # As indices, not as a count: a slice is not contiguous, and the projection would copy its matrix for each row.
    positions = torch.arange(width - keep, width)
    labels = torch.full((len(rows), keep), IGNORED)
    for row, (tokens, learned) in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
        labels[row, keep - learned :] = torch.tensor(tokens[len(tokens) - learned :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": positions}


def replay(
    spec: TrainSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: list[tuple[str, str | None]],
    count: int,
) -> list[tuple[list[int], int]]:
    """`count` rows in the file's order, over and over: prompts with their completion, else with what the model, untrained so far,
    samples after them.

    Sampled at temperature 1, not greedily: the expected gradient on a model's own samples is zero, while its
    greedy text would teach it to be surer than it was. The end of the sequence is not sampled: all these rows go on.
    """
    import torch

    chosen = [given[index % len(given)] for index in range(count)]
    known = [
        encode(tokenizer, prompt, text, spec.max_length, spec.learn_end) if text is not None else None for prompt, text in chosen
    ]
    heads: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt, text in chosen if text is None]
    rows: list[tuple[list[int], int]] = []
    model.eval()
    # generate() hands the head a slice; see collate.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    for start in range(0, len(heads), 64):
        batch = heads[start : start + 64]
        inputs = collate([(ids, 0) for ids in batch], tokenizer.eos_token_id)
        with torch.no_grad():
            sampled = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                do_sample=True,
                top_k=0,
                min_new_tokens=spec.replay_tokens,
                max_new_tokens=spec.replay_tokens,
            )
        tails = sampled[:, inputs["input_ids"].shape[1] :].tolist()
        rows += [(ids + tail, len(tail)) for ids, tail in zip(batch, tails, strict=True)]
    hook.remove()
    sampled_rows = iter(rows)
    return [row if row is not None else next(sampled_rows) for row in known]
