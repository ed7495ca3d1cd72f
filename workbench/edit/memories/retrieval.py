"""Similarity of a prompt to the facts of a memory, and the threshold from which a fact applies.

Without an encoder, the model's own input embeddings are matched token by token. A fact's prompt has tokens t with centered
embeddings e_t and weights w_t; a query has tokens q:

    s(fact, query) = a * M(subject) + (1 - a) * M(rest),   M(part) = sum_{t in part} w_t max_q max(0, cos(e_t, e_q))^3 / sum_{t in part} w_t

Here a = SUBJECT; if the fact has no subject, M covers the whole prompt. The sum runs over the fact's tokens only, so that words
before and after them, such as an answer, do not lower s. The weight w_t = t / (t + 5000) is small for frequent tokens, which have
low numbers in tokenizers that are built by merging (byte-pair encoding) or sorted by frequency. (Late interaction: Khattab &
Zaharia 2020, ColBERT, arXiv 2004.12832.)

With an encoder (a directory of transformers' AutoModel), s is the cosine of mean-pooled last hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.prompts import encode_inside, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

SUBJECT = 0.8
FREQUENT = 5000
POWER = 3
# Used if no fact has prompts out of scope.
DEFAULT_THRESHOLD = 0.75


class Encoder(Protocol):
    """Encodes facts as tensors and compares queries with them."""

    def fact(self, fact: Fact) -> dict[str, Tensor]:
        """Return the tensors that are stored for a fact."""

    def against(self, facts: Sequence[Mapping[str, Tensor]]) -> Callable[[str], Tensor]:
        """Return a function that maps a query to its similarity with each fact, [facts] in 0..1."""


class TokenMatch:
    """Compare token IDs of facts and queries through the model's input embeddings."""

    def __init__(self, embeddings: Tensor, tokenizer: Any) -> None:
        table = embeddings.detach()
        self.mean = table.float().mean(0)
        self.table, self.tokenizer = table, tokenizer

    def fact(self, fact: Fact) -> dict[str, Tensor]:
        """Return the prompt's token IDs, and a mask of those that belong to the subject."""
        text = fact.text
        pair = encode_inside(self.tokenizer, text)
        if pair.offsets is None:
            raise WorkbenchError(
                f"{type(self.tokenizer).__name__} has no character offsets, which a memory needs to find the subject's tokens",
                "Save the base with its fast tokenizer (tokenizer.json), or set `encoder`.",
            )
        start, stop = fact.span or (0, len(text))
        in_subject = [first < stop and last > start for first, last in pair.offsets[len(pair.prompt) :]]
        return {"tokens": torch.tensor(pair.continuation), "subject": torch.tensor(in_subject)}

    def against(self, facts: Sequence[Mapping[str, Tensor]]) -> Callable[[str], Tensor]:
        """Return a function that maps a query to its similarities [facts]; see the module."""
        all_tokens = torch.cat([f["tokens"] for f in facts])
        tokens, place = torch.unique(all_tokens, return_inverse=True)
        owner = torch.tensor([i for i, f in enumerate(facts) for _ in f["tokens"]])
        subject = torch.cat([f["subject"] for f in facts])
        mixes = torch.tensor([bool(f["subject"].any() and not f["subject"].all()) for f in facts])[owner]
        weight = torch.zeros(len(all_tokens))
        for mask, share in ((subject, SUBJECT), (~subject, 1 - SUBJECT)):
            frequency_weight = mask * (all_tokens / (all_tokens + FREQUENT))
            total = torch.zeros(len(facts)).index_add(0, owner, frequency_weight).clamp_min(1e-12)[owner]
            weight += torch.where(mixes, share, 1.0) * frequency_weight / total
        vectors = self._vectors(tokens)

        def similarity(query: str) -> Tensor:
            ids = torch.tensor(encode_inside(self.tokenizer, query.strip()).continuation, dtype=torch.long)
            if not len(ids):
                return torch.zeros(len(facts))
            similarities = (vectors @ self._vectors(ids).T).clamp(0, 1).amax(1)
            return torch.zeros(len(facts)).index_add(0, owner, weight * similarities[place] ** POWER).clamp(0, 1)

        return similarity

    def _vectors(self, tokens: Tensor) -> Tensor:
        """Return centered embeddings of length 1, [tokens, width], on the CPU."""
        rows = (self.table[tokens.to(self.table.device)].float() - self.mean).cpu()
        return torch.nn.functional.normalize(rows, dim=1)


class SentenceEncoder:
    """Compare facts and queries through mean-pooled hidden states of a sentence encoder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(folder)

    def fact(self, fact: Fact) -> dict[str, Tensor]:
        """Return the prompt's vector."""
        return {"vector": self._vector(fact.text)}

    def against(self, facts: Sequence[Mapping[str, Tensor]]) -> Callable[[str], Tensor]:
        """Return a function that maps a query to its cosines [facts]; negative ones count as 0."""
        vectors = torch.stack([f["vector"] for f in facts])
        return lambda query: (vectors @ self._vector(query)).clamp(0, 1)

    @no_grad
    def _vector(self, text: str) -> Tensor:
        """Return a text's vector [width] of length 1; texts are encoded one at a time, so that others do not affect rounding."""
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True)
        if not inputs["input_ids"].numel():
            return torch.zeros(self.model.config.hidden_size)
        hidden = self.model(**inputs).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def threshold(in_scope: Sequence[float], out_of_scope: Sequence[float]) -> float:
    """Return the similarity that best separates prompts in scope from prompts out of scope.

    It maximizes the mean of the shares of both sets that it classifies correctly. Among equally good values it is the middle of
    the widest gap between neighboring similarities.

    Args:
        in_scope: Similarities of prompts in scope to their own fact.
        out_of_scope: Similarities of prompts out of scope to the most similar fact.
    """
    if not out_of_scope:
        return min([DEFAULT_THRESHOLD, *in_scope])
    inside, outside = torch.tensor(sorted(in_scope)), torch.tensor(sorted(out_of_scope))
    candidates = torch.unique(torch.cat((inside, outside)))
    thresholds = torch.cat(((candidates[1:] + candidates[:-1]) / 2, candidates[-1:]))
    gaps = torch.cat((candidates.diff(), torch.zeros(1)))
    accepted = (len(inside) - torch.searchsorted(inside, thresholds)) / len(inside)
    rejected = torch.searchsorted(outside, thresholds) / len(outside)
    accuracy = accepted + rejected
    is_best = accuracy >= accuracy.max() - 1e-6
    return float(thresholds[torch.where(is_best, gaps, -1.0).argmax()])
