"""Rows of a training: read, as tokens, as batches, their loss; prompts that are replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.errors import WorkbenchError, refuse_misspelt
from workbench.facts import joined
from workbench.models.prompts import encode_pair, encode_text
from workbench.models.texts import ANSWERS
from workbench.train.spec import TrainSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_replay(path: Path) -> list[tuple[str, str | None]]:
    """Read `prompt`, and `completion` if there is one, of each line of a jsonl file; other fields are ignored.

    Errors, with file and line: not an object, no prompt, a completion that is no text, a field that looks like a misspelt `completion`
    or is another name for it.
    """
    if not path.is_file():
        raise WorkbenchError(f"{path.name}: no such file of prompts", "Check the file names of the training.", 2)
    found = []
    for number, row in jsondoc.lines(path, path.name, "One object a line, with `prompt`."):
        found.append(_replayed(row, f"{path.name}:{number}"))
    if not found:
        raise WorkbenchError(f"{path.name}: holds no prompts", None, 2)
    return found


def _replayed(row: Any, place: str) -> tuple[str, str | None]:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise WorkbenchError(f"{place}: expected an object with `prompt`", None, 2)
    refuse_misspelt(row, ("prompt", "completion"), place, 2)
    if "completion" not in row:
        if other := next((key for key in ANSWERS if key in row), None):
            raise WorkbenchError(
                f"{place}: '{other}' is not read here: a prompt without `completion` is continued by the model",
                "Name it `completion` if it is to be learned, or take it out.",
                2,
            )
        return row["prompt"], None
    if not isinstance(row["completion"], str) or not row["completion"].strip():
        raise WorkbenchError(
            f"{place}: expected a text in 'completion', found {row['completion']!r}", "Leave it out where there is none.", 2
        )
    return row["prompt"], row["completion"]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int, learn_end: bool = True
) -> tuple[list[int], int]:
    """Tokenize a prompt and its completion, and the end of sequence with learn_end; also return how many tokens are learned.

    Both are tokenized as one text, with a space between them unless one of them brings it. Without a prompt the completion is a whole
    text: all of it is learned but the first token, which nothing predicts. Errors: longer than max_length, a text of one token.
    """
    end, head = tokenizer.eos_token_id, []
    if prompt:
        pair = encode_pair(tokenizer, prompt, joined(prompt, completion))
        head, tail = pair.prompt, pair.continuation
    else:
        tail = encode_text(tokenizer, completion)
    if learn_end and end is not None and (prompt or tail[-1:] != [end]):
        tail = [*tail, end]
    if len(head) + len(tail) > max_length:
        raise WorkbenchError(
            f"a training row has {len(head) + len(tail)} tokens, more than max_length {max_length}: {(prompt or completion)[:60]!r}",
            "Raise `max_length`, or shorten the row.",
        )
    if len(head) + len(tail) < 2:
        raise WorkbenchError(f"a training row has one token, expected 2 or more: {completion[:60]!r}", "Take the row out.", 2)
    return head + tail, min(len(tail), len(head) + len(tail) - 1)


def collate(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Return rows as a batch, with the places of the learned tokens.

    Rows are padded on the right (see `batching`): the loss of a row is that of the row alone, for every architecture.

    Returns:
        input_ids and attention_mask [row, position]; places [learned token], the flat indices into [row · position] of the positions
        that predict them; wanted [learned token], the tokens themselves.
    """
    import torch

    from workbench.models.batching import side_by_side

    batch = side_by_side([ids for ids, _ in rows])
    width = batch.tokens.shape[1]
    ends = [(i * width + len(ids), ids, learned) for i, (ids, learned) in enumerate(rows)]
    places = [place for end, _, learned in ends for place in range(end - learned - 1, end - 1)]
    wanted = [token for _, ids, learned in ends for token in ids[len(ids) - learned :]]
    return {
        "input_ids": batch.tokens,
        "attention_mask": batch.mask,
        "places": torch.tensor(places, dtype=torch.long),
        "wanted": torch.tensor(wanted, dtype=torch.long),
    }


def batch_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a batch's learned tokens, with the loss on routers that the model's configuration asks for.

    The output head runs at the places that predict a learned token alone: it is half of a small model's training time otherwise.
    """
    import torch

    from workbench.models.attention import head_sees

    head, places, wanted = model.get_output_embeddings(), batch["places"], batch["wanted"]
    if head is None:
        raise WorkbenchError(f"{type(model).__name__} has no output head", "Training needs a causal language model.")
    with head_sees(head, places):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    loss = torch.nn.functional.cross_entropy(output.logits[0].float(), wanted)
    routers = getattr(output, "aux_loss", None)  # where the configuration says output_router_logits
    if isinstance(routers, torch.Tensor):
        loss = loss + float(model.config.get_text_config().router_aux_loss_coef) * routers.to(loss.device)
    return loss


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
    heads = {i: encode_text(tokenizer, prompt) for i, (prompt, text) in enumerate(chosen) if text is None}
    found = {i: row for i, row in enumerate(known) if row is not None}
    model.eval()
    # generate() hands the head a slice, for which the projection would copy its matrix once a row.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    for batch in _of_one_length(heads, 64):
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
        found |= {i: (heads[i] + tail, len(tail)) for i, tail in zip(batch, tails, strict=True)}
    hook.remove()
    return [found[i] for i in range(count)]


def _of_one_length(rows: Mapping[int, list[int]], most: int) -> list[list[int]]:
    """Numbers of rows in batches of at most `most` whose rows are equally long, so that none is padded: generation pads in front."""
    by_length: dict[int, list[int]] = {}
    for number, ids in rows.items():
        by_length.setdefault(len(ids), []).append(number)
    return [same[i : i + most] for _, same in sorted(by_length.items()) for i in range(0, len(same), most)]
