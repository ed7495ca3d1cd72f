"""GRACE: a codebook at one decoder layer with an entry for every token of a fact's answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workbench.edit.memories.codebook import Attached, Codebook, radii, reading, writing
from workbench.edit.memories.textmemory import sentence
from workbench.edit.places.parts import fact_pair
from workbench.facts.facts import Fact
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.models.architecture import live_module
from workbench.models.prompts import encode_pair
from workbench.models.texts import side_by_side
from workbench.steps import Kept, Memory, MemoryMethod, MethodContext, Remembered, register
from workbench.steps.fields import Real, Whole
from workbench.weights.header import is_whole, save_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Substitutes for a fact's subject: a text about something else must not lie within the fact's ball.
OTHERS = ("it", "the house", "London", "Maria Santos", "a large company", "the old river", "music", "Apollo 11")
_STORED = ("keys", "values", "reach", "answer")
_SAME = 1e-3  # share of a key's norm: keys that are closer than this belong to the same text
_WORDS = 12  # for a prompt without a subject: number of words that are left out, one at a time


@register
class Grace(MemoryMethod):
    """A codebook at one layer: if the layer's input is close to a stored key, the stored value replaces its output.

    Weights do not change, and neither do outputs outside the balls around the keys. The paper (Hartvigsen et al. 2023) stores one
    entry at the end of the prompt. This method stores one for each token of the answer, so that long answers are complete and end.
    """

    paper = "Hartvigsen et al. 2023, Aging with GRACE, arXiv 2211.11031"
    formula = "y(x) = vᵢ where |x − kᵢ| ≤ rᵢ for the nearest key kᵢ, else layer(x); vᵢ = argmin −log p(answer | prompt)"

    edit: Literal["grace"]
    layer: Whole | None = Field(None, ge=0)
    """Layer whose output is replaced. Default: at two thirds of the depth."""
    radius: Real = Field(0.5, gt=0, le=0.5)
    """Radius of a ball around a key, as a share of the distance to the nearest state that needs another answer."""
    end: bool = True
    """Also learn that the text ends after the answer."""
    steps: Whole = Field(100, ge=1)
    """Largest number of Adam steps for the values."""
    learning_rate: Real = Field(0.5, gt=0, le=100)
    """Adam's step size, relative to the root mean square of the output that a value replaces."""
    stop: Real = Field(0.05, gt=0)
    """A fact is learned when the mean loss of its tokens is below this value and each of them is the most likely token."""
    batch_size: Whole = Field(8, ge=1)
    """Number of facts whose values are optimized together."""

    def learn(self, context: MethodContext, facts: Sequence[Fact]) -> Memory:
        """Compute keys, values and reach of every fact.

        Facts are processed in the order of their IDs, so the order of the file does not matter. Batches that an interrupted call
        has finished are taken from the cache.

        Raises:
            WorkbenchError: If facts are not learned within `steps`, or if the layer's input does not tell subjects apart.
        """
        layer, name, block = self._block(context)
        context.model.requires_grad_(False)
        tensors: dict[str, dict[str, Tensor]] = {}
        losses: dict[str, float] = {}
        ordered = sorted(facts, key=lambda fact: fact.id)
        steps = 0
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            learned = self._learn_batch(context, block, batch)
            tensors |= {fact.id: {key: learned[f"{i}/{key}"] for key in _STORED} for i, fact in enumerate(batch)}
            losses |= {fact.id: loss for fact, loss in zip(batch, learned["loss"].tolist(), strict=True)}
            steps = max(steps, int(learned["steps"]))
            context.progress(len(tensors), len(ordered), f"loss {max(losses.values()):.3f}")
        if failed := [fact.id for fact in ordered if not math.isfinite(losses[fact.id])]:
            raise WorkbenchError(
                f"edit grace: {len(failed)} of {len(facts)} facts are not learned after {self.steps} steps, the first is '{failed[0]}'",
                f"Raise `steps` (now {self.steps}) or set a later `layer`: its output has a more direct effect on the answer.",
            )
        # A state that needs another answer coincides with the key of the answer's first token.
        firsts = {name: (float(of["reach"][0]), float(of["keys"][0].norm())) for name, of in tensors.items()}
        if indistinct := [fact.id for fact in ordered if firsts[fact.id][0] < _SAME * firsts[fact.id][1]]:
            raise WorkbenchError(
                f"edit grace: layer {layer} does not distinguish {len(indistinct)} of {len(facts)} facts from the same prompt with another "
                f"subject, the first is '{indistinct[0]}'",
                f"Set a later layer, for example `layer: {min(layer + 1, context.layout.layout.depth - 1)}`, whose input depends on the subject.",
            )
        entries = sum(len(learned["answer"]) for learned in tensors.values())
        record = {"facts": len(facts), "layer": layer, "entries": entries, "loss": max(losses.values()), "steps": steps}
        return Memory(facts, tensors, {"block": name, "layer": layer}, record)

    def _learn_batch(self, context: MethodContext, block: nn.Module, batch: Sequence[Fact]) -> dict[str, Tensor]:
        """Return the learned tensors of a batch of facts, from the cache if possible.

        Returns:
            The facts' tensors by "NUMBER/NAME", `loss` per fact (infinite if a fact is not learned) and `steps`.
        """
        rows = [_row(fact, context.tokenizer, self.end) for fact in batch]
        foreign_rows = [_foreign_rows(fact, row, context.tokenizer, self.end) for fact, row in zip(batch, rows, strict=True)]
        fields = self.model_dump(mode="json", exclude={"id", "facts", "radius", "alpha", "decay", "floor", *self.unkeyed})
        tokens = [[row.ids, row.answer, foreign] for row, foreign in zip(rows, foreign_rows, strict=True)]
        key = json_digest([context.model_key, self.code_key(), fields, tokens])
        file = context.cache / "grace" / f"{key}.safetensors"
        if is_whole(file):
            from safetensors.torch import load_file

            return load_file(file)
        batch_states = _Batch(context, block, rows)
        values, losses, learned, steps = self._values(context, block, batch_states)
        tensors = {"loss": torch.tensor(losses).masked_fill(~torch.tensor(learned), torch.inf), "steps": torch.tensor(steps)}
        for i, foreign in enumerate(foreign_rows):
            own_entries = batch_states.owner == i
            reach = _foreign_distances(context, block, foreign, batch_states.keys[own_entries])
            stored = (batch_states.keys[own_entries].cpu(), values[own_entries].cpu(), reach, torch.tensor(rows[i].answer))
            tensors |= {f"{i}/{name}": part for name, part in zip(_STORED, stored, strict=True)}
        save_tensors(tensors, file)
        return tensors

    def check_together(self, remembered: Sequence[Remembered]) -> None:
        """Check that no two facts share a key but need different answers there.

        Raises:
            WorkbenchError: If the texts up to there are the same, or the layer does not tell them apart.
        """
        keys = [r.tensors["keys"] for r in remembered]
        answers = [r.tensors["answer"].tolist() for r in remembered]
        if not keys:
            return
        owners = [(r.fact, key) for r, fact_keys in zip(remembered, keys, strict=True) for key in fact_keys]
        unlimited = [torch.full((len(fact_keys),), torch.inf) for fact_keys in keys]
        for nearest, (fact, key) in zip(torch.cat(radii(keys, answers, unlimited, 1.0)).tolist(), owners, strict=True):
            if nearest < _SAME * float(key.norm()):
                raise WorkbenchError(
                    f"fact '{fact.id}': {fact.text!r} and another fact begin with the same text but continue with different words",
                    "A codebook holds one answer per text. Change it with `workbench memory update`, or remove one of the two facts.",
                )

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Kept) -> dict[str, object]:
        """Attach the codebook to the block, without facts that feedback has dropped."""
        del tokenizer
        used = [r for r in kept.facts if r.credibility.kept]
        if not used:
            return {"entries": 0}
        tensors = [r.tensors for r in used]
        entry_radii = radii(
            [t["keys"] for t in tensors], [t["answer"].tolist() for t in tensors], [t["reach"] for t in tensors], self.radius
        )
        book = Codebook(
            torch.cat([t["keys"] for t in tensors]), torch.cat([t["values"] for t in tensors]), torch.cat(entry_radii)
        ).to(model.device)
        block = model.get_submodule(kept.settings["block"])
        book.attach(block)
        model.codebook = Attached(book, block, [sentence(r) for r in used for _ in r.tensors["answer"]])
        return {"entries": len(book.keys), "radii": {"least": float(book.radii.min()), "most": float(book.radii.max())}}

    def _block(self, context: MethodContext) -> tuple[int, str, nn.Module]:
        """Return the layer's number, live name and module."""
        layout = context.layout.layout
        layer = layout.depth * 2 // 3 if self.layer is None else self.layer
        if layer >= layout.depth:
            raise InvalidRecipeError(f"edit grace: layer {layer} does not exist; the model has layers 0 to {layout.depth - 1}")
        modules = dict(context.model.named_modules())
        name = live_module(f"{layout.prefix}{layer}", modules)
        return layer, name, modules[name]

    def _values(self, context: MethodContext, block: nn.Module, batch: _Batch) -> tuple[Tensor, list[float], list[bool], int]:
        """Optimize the values of a batch.

        Returns:
            Values [entries, outputs] with the lowest loss, that loss per fact, whether greedy decoding gives the answer per fact,
            and the number of steps.
        """
        facts = int(batch.owner.max()) + 1
        scale = batch.outputs.square().mean(1, keepdim=True).sqrt()
        change = torch.zeros_like(batch.outputs, requires_grad=True)
        adam = torch.optim.Adam([change], lr=self.learning_rate)
        best, least, answered = batch.outputs.clone(), [math.inf] * facts, [False] * facts
        step = 0
        for step in range(self.steps + 1):
            values = batch.outputs + scale * change
            with writing(block, batch.places, values):
                logits = context.model(input_ids=batch.ids, attention_mask=batch.mask).logits
            logits = logits.flatten(0, 1)[batch.places].float()
            token = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            count = torch.bincount(batch.owner, minlength=facts)
            loss = torch.zeros(facts, device=token.device).index_add(0, batch.owner, token) / count
            wrong = torch.zeros_like(loss).index_add(0, batch.owner, (logits.argmax(1) != batch.targets).float())
            for i, (value, right) in enumerate(zip(loss.tolist(), (wrong == 0).tolist(), strict=True)):
                if (right, -value) > (answered[i], -least[i]):
                    least[i], answered[i] = value, right
                    best[batch.owner == i] = values.detach()[batch.owner == i]
            if step == self.steps or all(done and value < self.stop for done, value in zip(answered, least, strict=True)):
                break
            adam.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            adam.step()
        return best, least, answered, step


@dataclass(frozen=True)
class _Row:
    """Tokens of a prompt with its answer, and the answer's tokens (with the end of text if that is learned)."""

    ids: list[int]
    answer: list[int]

    @property
    def start(self) -> int:
        """Position whose logits predict the answer's first token."""
        return len(self.ids) - len(self.answer)


class _Batch:
    """Rows of some facts, padded on the right, with the block's inputs and outputs where a token of an answer is predicted.

    Attributes:
        ids: [facts, time].
        mask: [facts, time].
        places: [entries], positions in [facts, time] flattened.
        targets: [entries], the token predicted there.
        owner: [entries], the index of the fact.
        keys: [entries, width], the block's inputs.
        outputs: [entries, width], the block's outputs.
    """

    def __init__(self, context: MethodContext, block: nn.Module, rows: Sequence[_Row]) -> None:
        padded = side_by_side([row.ids for row in rows], context.device)
        self.ids, self.mask = padded.tokens, padded.mask
        width = self.ids.shape[1]
        places = [i * width + row.start + j for i, row in enumerate(rows) for j in range(len(row.answer))]
        self.places = torch.tensor(places, device=context.device)
        self.targets = torch.tensor([token for row in rows for token in row.answer], device=context.device)
        self.owner = torch.tensor([i for i, row in enumerate(rows) for _ in row.answer], device=context.device)
        with torch.no_grad(), reading(block) as seen:
            context.model(input_ids=self.ids, attention_mask=self.mask)
        self.keys, self.outputs = seen[0][self.places], seen[1][self.places]


def _row(fact: Fact, tokenizer: Any, end: bool) -> _Row:
    """Tokenize a fact; the answer ends with the end-of-text token if `end` is set and the tokenizer has one."""
    pair = fact_pair(fact, tokenizer)
    answer = [*pair.continuation, *([tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else [])]
    return _Row([*pair.prompt, *answer[:-1]], answer)


def _foreign_rows(fact: Fact, row: _Row, tokenizer: Any, end: bool) -> list[list[int]]:
    """Return rows of tokens that contain no state of the fact's own.

    These are the prompt with other subjects in place of its own, answer included (without a subject: the prompt with one word
    left out), and the fact's text before the end of the prompt.
    """
    if fact.span is not None:
        texts = [fact.prompt.replace("{subject}", subject) for subject in OTHERS]
    else:
        words = fact.text.split(" ")
        texts = [" ".join(words[:i] + words[i + 1 :]) for i in range(min(len(words), _WORDS))] if len(words) > 1 else []
    rows = [row.ids[: row.start]]
    pairs = [
        encode_pair(tokenizer, text, fact.continuation, "continuation") for text in texts if text.strip() and text != fact.text
    ]
    predicts_end = end and tokenizer.eos_token_id is not None  # the last token of an answer is predicted, not an input
    rows += [pair.tokens if predicts_end else pair.tokens[:-1] for pair in pairs]
    return [ids for ids in rows if ids and ids[: row.start + 1] != row.ids[: row.start + 1]]


def _foreign_distances(context: MethodContext, block: nn.Module, foreign: Sequence[list[int]], keys: Tensor) -> Tensor:
    """Return the distances [entries] of a fact's keys to the nearest foreign state; without foreign rows, the keys' norms."""
    if not foreign:
        nearest: Tensor = keys.norm(dim=1).cpu()
        return nearest
    batch = side_by_side(foreign, context.device)
    with torch.no_grad(), reading(block) as seen:
        context.model(input_ids=batch.tokens, attention_mask=batch.mask)
    states = seen[0][batch.mask.flatten().bool()]
    return torch.stack([(states - key).norm(dim=1).min() for key in keys]).cpu()
