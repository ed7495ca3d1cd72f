"""Memory: facts that are stored as texts, retrieved by similarity and put before the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from workbench.edit.memories.retrieval import Encoder, SentenceEncoder, TokenMatch, threshold
from workbench.edit.memories.textmemory import FACTS, FactStore, attach
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.steps import Kept, Memory, MemoryMethod, MethodContext, register
from workbench.steps.fields import Real, Whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_COMPARED = 256  # number of facts whose prompts are compared with each other to choose the threshold


@register
class TextMemory(MemoryMethod):
    """Store facts as texts and put those that apply to a prompt before it. Weights do not change, nor do prompts without facts.

    Combines retrieval and in-context editing (Zheng et al. 2023, IKE) with versions and credibility (DynaMind). Use it as the
    baseline for methods that edit weights.
    """

    paper = (
        "Zheng et al. 2023, Can we edit factual knowledge by in-context learning?, arXiv 2305.12740; DynaMind, arXiv 2310.14248"
    )
    formula = (
        "p(· | facts, prompt) with the facts of s(fact, prompt) ≥ threshold that lead in s + credibility, else p(· | prompt)"
    )

    edit: Literal["memory"]
    encoder: str | None = None
    """Directory of a sentence encoder (transformers' AutoModel, mean pooling), relative to the project. Default: the model's own
    token embeddings, matched token by token."""
    threshold: Real | None = Field(None, ge=0, le=1)
    """Similarity from which a fact applies. Default: the value that best separates paraphrases (or the subject, if a fact has
    none) from neighbors and from prompts of other facts."""
    most: Whole = Field(1, ge=1)
    """Largest number of facts that are put before a prompt."""
    template: str = "New fact: {facts}\nPrompt: "
    """Text that is put before a prompt; `{facts}` stands for the facts as sentences, the most relevant one last."""

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if FACTS not in value:
            raise ValueError(f"expected a text that contains {FACTS}, found {value!r}")
        return value

    def inputs(self) -> list[str]:
        """Return the facts file and the encoder's files."""
        return [self.facts, *(f"{self.encoder}/{name}" for name in _ENCODER_FILES if self.encoder)]

    def reopened(self, settings: Mapping[str, object]) -> MemoryMethod:
        """Return the step with the encoder's path from the settings, wherever the memory is stored now."""
        return self.model_copy(update={"encoder": settings["encoder"]})

    def learn(self, context: MethodContext, facts: Sequence[Fact]) -> Memory:
        """Encode each fact, and measure its similarity to its own paraphrases and neighbors.

        If a fact has no paraphrases, its subject alone is used in place of one: the fact then applies to prompts that name the
        subject.
        """
        folder = str((context.project / self.encoder).resolve()) if self.encoder else None
        encoder = _encoder(folder, context.model, context.tokenizer)
        tensors: dict[str, dict[str, Tensor]] = {}
        for done, fact in enumerate(facts, 1):
            encoded = encoder.fact(fact)
            if any(not part.numel() for part in encoded.values()):
                raise WorkbenchError(
                    f"fact '{fact.id}': {fact.text!r} has no tokens in the base's vocabulary",
                    "Rephrase the fact with words that the tokenizer knows.",
                )
            in_scope = fact.paraphrases or ((fact.subject,) if fact.subject else ())
            probes = {"inside": in_scope, "outside": [p.prompt for p in fact.neighbours]}
            similarity = encoder.against([encoded])
            measured = {name: torch.tensor([float(similarity(text)) for text in texts]) for name, texts in probes.items()}
            tensors[fact.id] = {**encoded, **measured}
            context.progress(done, len(facts), "facts")
        remembered = [(fact, tensors[fact.id]) for fact in sorted(facts, key=lambda fact: fact.id)]
        limit, record = self._choose_threshold(encoder, remembered)
        return Memory(facts, tensors, {"encoder": folder}, {"facts": len(facts), "threshold": limit, **record})

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Kept) -> dict[str, object]:
        """Attach the memory to the model, with a threshold that is chosen again from the facts in it."""
        folder = kept.settings["encoder"]
        encoder = _encoder(None if folder is None else str(folder), model, tokenizer)
        limit, record = self._choose_threshold(encoder, [(r.fact, dict(r.tensors)) for r in kept.facts])
        used = [r for r in kept.facts if r.credibility.kept]
        attach(model, tokenizer, FactStore(used, encoder, limit, self.most, self.template))
        return {"facts": len(used), "threshold": limit, **record}

    def _choose_threshold(
        self, encoder: Encoder, facts: Sequence[tuple[Fact, dict[str, Tensor]]]
    ) -> tuple[float, dict[str, object]]:
        """Return the threshold and the measurements that it is based on.

        In scope are the facts' own prompts (similarity 1) with their paraphrases or subjects. Out of scope are their neighbors
        and the prompts of facts about other subjects. `left_out` is the accuracy in a leave-one-out test: each fact is classified
        with the threshold of the others.
        """
        if self.threshold is not None:
            return self.threshold, {}
        in_scope = [[1.0, *tensors["inside"].tolist()] for _, tensors in facts]
        out_of_scope = [tensors["outside"].tolist() for _, tensors in facts]
        compared = facts[:_COMPARED]
        if len(compared) > 1:
            against = encoder.against([tensors for _, tensors in compared])
            for i, (fact, _) in enumerate(compared):
                similarities = against(fact.text).tolist()
                other_similarities = [
                    s
                    for s, (other_fact, _) in zip(similarities, compared, strict=True)
                    if (other_fact.subject or other_fact.text) != (fact.subject or fact.text)
                ]
                out_of_scope[i] += [max(other_similarities)] if other_similarities else []
        limit = threshold([s for row in in_scope for s in row], [s for row in out_of_scope for s in row])
        measured = {"prompts_in_scope": sum(map(len, in_scope)), "prompts_out_of_scope": sum(map(len, out_of_scope))}
        return limit, {**measured, "left_out": _leave_one_out(in_scope, out_of_scope)}


def _leave_one_out(in_scope: Sequence[Sequence[float]], out_of_scope: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Return the leave-one-out accuracies in scope and out of scope; None for fewer than two facts."""
    if len(in_scope) < 2:
        return None
    step = math.ceil(len(in_scope) / 64)  # at most 64 folds
    right = {"in_scope": 0, "out_of_scope": 0}
    for start in range(0, len(in_scope), step):
        fold = range(start, min(len(in_scope), start + step))
        training = [i for i in range(len(in_scope)) if i not in fold]
        cutoff = threshold([s for i in training for s in in_scope[i]], [s for i in training for s in out_of_scope[i]])
        right["in_scope"] += sum(s >= cutoff for i in fold for s in in_scope[i])
        right["out_of_scope"] += sum(s < cutoff for i in fold for s in out_of_scope[i])
    counts = {"in_scope": sum(map(len, in_scope)), "out_of_scope": sum(map(len, out_of_scope))}
    return {name: right[name] / counts[name] for name in right if counts[name]}


def _encoder(folder: str | None, model: Any, tokenizer: Any) -> Encoder:
    """Return the encoder in a directory, or the one that uses the model's embeddings."""
    if folder is None:
        return TokenMatch(model.get_input_embeddings().weight, tokenizer)
    if not (Path(folder) / "config.json").is_file():
        raise WorkbenchError(
            f"encoder {folder}: the folder has no config.json", "Restore the encoder, or run the recipe again with another one."
        )
    return SentenceEncoder(Path(folder))
