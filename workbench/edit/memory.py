"""Memory: facts kept as texts, recalled by likeness and put in front of the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator

from workbench.edit.memories.retrieval import Encoder, SentenceEncoder, TokenMatch, threshold
from workbench.edit.memories.textmemory import FACTS, FactStore, attach
from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.steps import Kept, Memory, MemoryMethod, MethodContext, register
from workbench.steps.fields import Real, Whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_COMPARED = 256  # facts whose prompts are held against each other for the threshold


@register
class TextMemory(MemoryMethod):
    """Facts kept as texts; those that apply to a prompt are put in front of it. Weights are untouched, and so is every prompt that
    no fact applies to. Retrieval and in-context editing (Zheng et al. 2023, IKE) with versions and credibility (DynaMind): what an
    editor of weights has to be measured against."""

    paper = (
        "Zheng et al. 2023, Can we edit factual knowledge by in-context learning?, arXiv 2305.12740; DynaMind, arXiv 2310.14248"
    )
    formula = (
        "p(· | facts, prompt) with the facts of s(fact, prompt) ≥ threshold that lead in s + credibility, else p(· | prompt)"
    )

    edit: Literal["memory"]
    encoder: str | None = None
    """Directory of a sentence encoder (transformers' AutoModel, mean pooling), relative to the project; omitted: the model's own
    token embeddings, matched token by token."""
    threshold: Real | None = Field(None, ge=0, le=1)
    """Likeness from which a fact applies; omitted: what tells paraphrases (without any, the bare subject) best from neighbours
    and from other facts' prompts."""
    most: Whole = Field(1, ge=1)
    """Facts that are put in front of a prompt, at most."""
    template: str = "New fact: {facts}\nPrompt: "
    """What stands there; `{facts}` are the facts as sentences, the one that applies best last."""

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if FACTS not in value:
            raise ValueError(f"expected a text with {FACTS} in it, found {value!r}")
        return value

    def inputs(self) -> list[str]:
        """The facts, and the encoder's files."""
        return [self.facts, *(f"{self.encoder}/{name}" for name in _ENCODER_FILES if self.encoder)]

    def reopened(self, settings: Mapping[str, Any]) -> MemoryMethod:
        """With the encoder where it was found, wherever the memory lies now."""
        return self.model_copy(update={"encoder": settings["encoder"]})

    def learn(self, context: MethodContext, facts: Sequence[Fact]) -> Memory:
        """What the encoder keeps of each fact, and how like the fact its own paraphrases and neighbours are.

        A fact without paraphrases is in scope where its subject is named: the subject alone then stands for one.
        """
        folder = str((context.project / self.encoder).resolve()) if self.encoder else None
        encoder = _encoder(folder, context.model, context.tokenizer)
        tensors: dict[str, dict[str, Tensor]] = {}
        for done, fact in enumerate(facts, 1):
            kept = encoder.fact(fact)
            if any(not part.numel() for part in kept.values()):
                raise WorkbenchError(
                    f"fact '{fact.id}': {fact.text!r} has no tokens in the base's vocabulary",
                    "Word the fact in what the tokenizer knows.",
                )
            inside = fact.paraphrases or ((fact.subject,) if fact.subject else ())
            probes = {"inside": inside, "outside": [p.prompt for p in fact.neighbours]}
            alike = encoder.against([kept])
            measured = {name: torch.tensor([float(alike(text)) for text in texts]) for name, texts in probes.items()}
            tensors[fact.id] = {**kept, **measured}
            context.progress(done, len(facts), "facts")
        remembered = [(fact, tensors[fact.id]) for fact in sorted(facts, key=lambda fact: fact.id)]
        limit, record = self._limit(encoder, remembered)
        return Memory(facts, tensors, {"encoder": folder}, {"facts": len(facts), "threshold": limit, **record})

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Kept) -> dict[str, Any]:
        """Let the model recall; the threshold is chosen again, on the facts that are there."""
        encoder = _encoder(kept.settings["encoder"], model, tokenizer)
        limit, record = self._limit(encoder, [(r.fact, dict(r.tensors)) for r in kept.facts])
        used = [r for r in kept.facts if r.credibility.kept]
        attach(model, tokenizer, FactStore(used, encoder, limit, self.most, self.template))
        return {"facts": len(used), "threshold": limit, **record}

    def _limit(self, encoder: Encoder, facts: Sequence[tuple[Fact, dict[str, Tensor]]]) -> tuple[float, dict[str, Any]]:
        """The threshold, and what it was chosen on.

        In scope are the facts' own prompts (likeness 1) and paraphrases or subjects, out of scope their neighbours and the prompts of other facts with
        other subjects. `left_out` are the shares put right for facts that the threshold was not chosen on: each fact in turn.
        """
        if self.threshold is not None:
            return self.threshold, {}
        inside = [[1.0, *found["inside"].tolist()] for _, found in facts]
        outside = [found["outside"].tolist() for _, found in facts]
        compared = facts[:_COMPARED]
        if len(compared) > 1:
            against = encoder.against([found for _, found in compared])
            for i, (one, _) in enumerate(compared):
                alike = against(one.text).tolist()
                others = [s for s, (other, _) in zip(alike, compared, strict=True) if _about(other) != _about(one)]
                outside[i] += [max(others)] if others else []
        limit = threshold([s for found in inside for s in found], [s for found in outside for s in found])
        measured = {"prompts_in_scope": sum(map(len, inside)), "prompts_out_of_scope": sum(map(len, outside))}
        return limit, {**measured, "left_out": _left_out(inside, outside)}


def _about(fact: Fact) -> str:
    """What a fact is about: its subject, else its prompt."""
    return fact.subject or fact.text


def _left_out(inside: Sequence[Sequence[float]], outside: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Shares of prompts put right by the threshold of all facts but their own; None with fewer than two facts."""
    if len(inside) < 2:
        return None
    step = math.ceil(len(inside) / 64)  # folds of neighbouring facts where there are many
    right = {"in_scope": 0, "out_of_scope": 0}
    for start in range(0, len(inside), step):
        fold = range(start, min(len(inside), start + step))
        rest = [i for i in range(len(inside)) if i not in fold]
        limit = threshold([s for i in rest for s in inside[i]], [s for i in rest for s in outside[i]])
        right["in_scope"] += sum(s >= limit for i in fold for s in inside[i])
        right["out_of_scope"] += sum(s < limit for i in fold for s in outside[i])
    counts = {"in_scope": sum(map(len, inside)), "out_of_scope": sum(map(len, outside))}
    return {name: right[name] / counts[name] for name in right if counts[name]}


def _encoder(folder: str | None, model: Any, tokenizer: Any) -> Encoder:
    """Errors: an encoder's directory that is gone."""
    if folder is None:
        return TokenMatch(model.get_input_embeddings().weight, tokenizer)
    if not (Path(folder) / "config.json").is_file():
        raise WorkbenchError(
            f"encoder {folder}: no config.json there", "Put the encoder back, or run the recipe again with another."
        )
    return SentenceEncoder(Path(folder))
