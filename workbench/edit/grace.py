"""GRACE: a codebook at one decoder layer, one entry for every token of a fact's answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file

from workbench.edit.memories.codebook import Codebook, radii, reading, writing
from workbench.edit.places.rows import fact_pair
from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.files import json_digest
from workbench.models.batching import side_by_side
from workbench.models.names import live_module
from workbench.models.prompts import encode_pair
from workbench.steps import Kept, Memory, MemoryMethod, MethodContext, Remembered, register
from workbench.steps.fields import Real, Whole
from workbench.weights.saving import save_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Stand in for a fact's subject: a text about something else must not lie in the fact's ball.
OTHERS = ("it", "the house", "London", "Maria Santos", "a large company", "the old river", "music", "Apollo 11")
_KEPT = ("keys", "values", "reach", "answer")
_SAME = 1e-3  # of a key's length: keys that are nearer to each other are those of one text
_WORDS = 12  # of a prompt without a subject, left out in turn


@register
class Grace(MemoryMethod):
    """A codebook at one layer: where the layer's input lies near a stored key, its output is the stored value (Hartvigsen et al.
    2023). Weights are untouched, and so is every position outside the keys' balls. One entry
    for each token of an answer, in place of one at the prompt's end, so that long answers come out whole and end."""

    paper = "Hartvigsen et al. 2023, Aging with GRACE, arXiv 2211.11031"
    formula = "y(x) = vᵢ where |x − kᵢ| ≤ rᵢ for the nearest key kᵢ, else layer(x); vᵢ = argmin −log p(answer | prompt)"

    edit: Literal["grace"]
    layer: Whole | None = Field(None, ge=0)
    """Layer whose output is replaced; omitted: at two thirds of the depth."""
    radius: Real = Field(0.5, gt=0, le=0.5)
    """Radius of a ball, as a share of the distance to the nearest state that must answer something else."""
    end: bool = True
    """Also learn that the text ends after the answer."""
    steps: Whole = Field(100, ge=1)
    """Steps of Adam on the values, at most."""
    learning_rate: Real = Field(0.5, gt=0, le=100)
    """Adam's step size, in units of the root mean square of the output that a value replaces."""
    stop: Real = Field(0.05, gt=0)
    """A fact is learned when the mean loss of its tokens is below this and each of them is the likeliest."""
    batch_size: Whole = Field(8, ge=1)
    """Facts whose values are found together."""

    def learn(self, context: MethodContext, facts: Sequence[Fact]) -> Memory:
        """Keys, values and reach of every fact. Facts are taken by id, so that their order in the file does not matter; batches that an
        interrupted call has finished are in the cache. Errors: facts that are not learned in `steps`."""
        layer, name, block = self._block(context)
        context.model.requires_grad_(False)
        tensors: dict[str, dict[str, Tensor]] = {}
        losses: dict[str, float] = {}
        ordered = sorted(facts, key=lambda fact: fact.id)
        steps = 0
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            found = self._remembered(context, block, batch)
            tensors |= {fact.id: {key: found[f"{i}/{key}"] for key in _KEPT} for i, fact in enumerate(batch)}
            losses |= {fact.id: loss for fact, loss in zip(batch, found["loss"].tolist(), strict=True)}
            steps = max(steps, int(found["steps"]))
            context.progress(len(tensors), len(ordered), f"loss {max(losses.values()):.3f}")
        if failed := [fact.id for fact in ordered if not math.isfinite(losses[fact.id])]:
            raise WorkbenchError(
                f"edit grace: {len(failed)} of {len(facts)} facts are not answered after {self.steps} steps, first '{failed[0]}'",
                f"Raise steps ({self.steps}), or name another layer: the fewer layers follow it, the more directly its output decides.",
            )
        if blind := [fact.id for fact in ordered if _blind(tensors[fact.id])]:
            raise WorkbenchError(
                f"edit grace: at layer {layer} the input where an answer begins is the same for other subjects, for {len(blind)} of "
                f"{len(facts)} facts, first '{blind[0]}': no ball holds the fact and leaves the others out",
                f"Name a later layer (layer: {min(layer + 1, context.layout.layout.depth - 1)}), where the position has seen the subject.",
            )
        entries = sum(len(found["answer"]) for found in tensors.values())
        record = {"facts": len(facts), "layer": layer, "entries": entries, "loss": max(losses.values()), "steps": steps}
        return Memory(facts, tensors, {"block": name, "layer": layer}, record)

    def _remembered(self, context: MethodContext, block: nn.Module, batch: Sequence[Fact]) -> dict[str, Tensor]:
        """What is learned of a batch, "NUMBER/NAME" and its losses (infinite: not learned) and steps; from the cache where it is there."""
        rows = [_row(fact, context.tokenizer, self.end) for fact in batch]
        others = [_foreign(fact, row, context.tokenizer, self.end) for fact, row in zip(batch, rows, strict=True)]
        fields = self.model_dump(mode="json", exclude={"id", "facts", "radius", "alpha", "decay", "floor", *self.unkeyed})
        tokens = [[row.ids, row.answer, foreign] for row, foreign in zip(rows, others, strict=True)]
        key = json_digest([sorted(context.digests.items()), context.layout.config, self.code_key(), fields, tokens])
        place = context.cache / "grace" / f"{key}.safetensors"
        if place.is_file():
            return load_file(place)
        states = _Batch(context, block, rows)
        values, losses, learned, steps = self._values(context, block, states)
        found = {"loss": torch.tensor(losses).masked_fill(~torch.tensor(learned), torch.inf), "steps": torch.tensor(steps)}
        for i, foreign in enumerate(others):
            mine = states.owner == i
            reach = _reach(context, block, foreign, states.keys[mine])
            parts = (states.keys[mine].cpu(), values[mine].cpu(), reach, torch.tensor(rows[i].answer))
            found |= {f"{i}/{name}": part for name, part in zip(_KEPT, parts, strict=True)}
        save_tensors(found, place)
        return found

    def check_together(self, remembered: Sequence[Remembered]) -> None:
        """Errors: two facts with one key whose answers differ there: the text up to there is the same, or is not told apart."""
        keys = [r.tensors["keys"] for r in remembered]
        answers = [r.tensors["answer"].tolist() for r in remembered]
        if not keys:
            return
        owners = [(r.fact, key) for r, found in zip(remembered, keys, strict=True) for key in found]
        far = [torch.full((len(found),), torch.inf) for found in keys]
        for nearest, (fact, key) in zip(torch.cat(radii(keys, answers, far, 1.0)).tolist(), owners, strict=True):
            if nearest < _SAME * float(key.norm()):
                raise WorkbenchError(
                    f"fact '{fact.id}': {fact.text!r} and another fact have one beginning, and go on with different words",
                    "One codebook holds one answer a text: change it with `workbench memory update`, or leave one of the two out.",
                )

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Kept) -> dict[str, Any]:
        """Hook the codebook to the block; what feedback has dropped is left out."""
        del tokenizer
        used = [r for r in kept.facts if r.credibility.kept]
        if not used:
            return {"entries": 0}
        parts = [r.tensors for r in used]
        found = radii([t["keys"] for t in parts], [t["answer"].tolist() for t in parts], [t["reach"] for t in parts], self.radius)
        book = Codebook(torch.cat([t["keys"] for t in parts]), torch.cat([t["values"] for t in parts]), torch.cat(found))
        book.to(model.device).attach(model.get_submodule(kept.settings["block"]))
        return {"entries": len(book.keys), "radii": {"least": float(book.radii.min()), "most": float(book.radii.max())}}

    def _block(self, context: MethodContext) -> tuple[int, str, nn.Module]:
        """The layer's number, live name and module. Errors: a layer that does not exist."""
        layout = context.layout.layout
        layer = layout.depth * 2 // 3 if self.layer is None else self.layer
        if layer >= layout.depth:
            raise WorkbenchError(f"edit grace: layer {layer} does not exist; the model has 0..{layout.depth - 1}", None, 2)
        modules = dict(context.model.named_modules())
        name = live_module(f"{layout.prefix}{layer}", modules)
        return layer, name, modules[name]

    def _values(self, context: MethodContext, block: nn.Module, batch: _Batch) -> tuple[Tensor, list[float], list[bool], int]:
        """Values [entries, outputs] of the lowest loss met, that loss a fact, whether greedy decoding gives the answer, steps."""
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
            wrong = torch.bincount(batch.owner, (logits.argmax(1) != batch.targets).float(), minlength=facts)
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
    """Tokens of prompt and answer; the answer's tokens, the end of text among them where it is learned."""

    ids: list[int]
    answer: list[int]

    @property
    def start(self) -> int:
        """Position whose logits predict the answer's first token."""
        return len(self.ids) - len(self.answer)


class _Batch:
    """Rows of some facts, padded on the right, and the block's inputs and outputs where an answer's token is predicted.

    Attributes:
        ids, mask: [facts, time].
        places: [entries], positions of [facts, time] flattened.
        targets, owner: [entries], the token predicted there and its fact.
        keys, outputs: [entries, width].
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
    pair = fact_pair(fact, tokenizer)
    answer = [*pair.continuation, *([tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else [])]
    return _Row([*pair.prompt, *answer[:-1]], answer)


def _foreign(fact: Fact, row: _Row, tokenizer: Any, end: bool) -> list[list[int]]:
    """Rows of tokens none of whose states is the fact's own: the prompt with other subjects in place of its own, answer included (without a
    subject: with one word left out), and the fact's own text before the prompt's end."""
    if fact.span is not None:
        texts = [fact.prompt.replace("{subject}", other) for other in OTHERS]
    else:
        words = fact.text.split(" ")
        texts = [" ".join(words[:i] + words[i + 1 :]) for i in range(min(len(words), _WORDS))] if len(words) > 1 else []
    rows = [row.ids[: row.start]]
    pairs = [
        encode_pair(tokenizer, text, fact.continuation, "continuation") for text in texts if text.strip() and text != fact.text
    ]
    ended = end and tokenizer.eos_token_id is not None  # the last token of an answer is predicted, not read
    rows += [pair.tokens if ended else pair.tokens[:-1] for pair in pairs]
    return [ids for ids in rows if ids and ids[: row.start + 1] != row.ids[: row.start + 1]]


def _blind(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state that must answer something else lies on the key of the answer's first token."""
    return float(tensors["reach"][0]) < _SAME * float(tensors["keys"][0].norm())


def _reach(context: MethodContext, block: nn.Module, foreign: Sequence[list[int]], keys: Tensor) -> Tensor:
    """[entries]: distance of a fact's keys to the nearest state of its foreign rows; without such rows the keys' lengths."""
    if not foreign:
        nearest: Tensor = keys.norm(dim=1).cpu()
        return nearest
    batch = side_by_side(foreign, context.device)
    with torch.no_grad(), reading(block) as seen:
        context.model(input_ids=batch.tokens, attention_mask=batch.mask)
    states = seen[0][batch.mask.flatten().bool()]
    return torch.stack([(states - key).norm(dim=1).min() for key in keys]).cpu()
