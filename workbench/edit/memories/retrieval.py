"""How alike a prompt is to each fact of a memory, and from which likeness on a fact applies.

Without an encoder the model's own input embeddings are matched token by token. A fact's prompt has tokens t with centred embeddings e_t and
weights w_t; a query has tokens q:

    s(fact, query) = a * M(subject) + (1 - a) * M(rest),   M(part) = sum_{t in part} w_t max_q max(0, cos(e_t, e_q))^3 / sum_{t in part} w_t

with a = SUBJECT, and M over the whole prompt where no subject is named. Only the fact's tokens are summed over, so that words before and
after, an answer among them, do not lower s; w_t = t / (t + 5000) falls for frequent tokens, whose numbers are low in tokenizers that were
made by merging (byte-pair encoding) and in those sorted by frequency. (Late interaction: Khattab & Zaharia 2020, ColBERT, arXiv 2004.12832.)

With an encoder (a directory of transformers' AutoModel) s is the cosine of mean-pooled last hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.models.prompts import encode_inside
from workbench.models.tokenizer import load_tokenizer

SUBJECT = 0.8
FREQUENT = 5000
POWER = 3
# Where no fact has a prompt that must not be in scope, and for what is not told apart.
DEFAULT_THRESHOLD = 0.75


class Encoder(Protocol):
    """Turns facts and queries into tensors, and compares them."""

    def fact(self, fact: Fact) -> dict[str, Tensor]:
        """What is kept of a fact."""

    def against(self, facts: Sequence[Mapping[str, Tensor]]) -> Callable[[str], Tensor]:
        """Query -> how like each fact it is, [facts] in 0..1."""


class TokenMatch:
    """Facts as token numbers, compared through the model's input embeddings."""

    def __init__(self, embeddings: Tensor, tokenizer: Any) -> None:
        table = embeddings.detach()
        self.mean = table.float().mean(0)
        self.table, self.tokenizer = table, tokenizer

    def fact(self, fact: Fact) -> dict[str, Tensor]:
        """Tokens of the prompt, and which of them belong to the subject."""
        text = fact.text
        found = encode_inside(self.tokenizer, text)
        if found.offsets is None:
            raise WorkbenchError(
                f"{type(self.tokenizer).__name__} does not tell which characters a token stands for, by which a memory finds subjects",
                "Save the base with its fast tokenizer (tokenizer.json), or name an `encoder`.",
            )
        start, stop = fact.span or (0, len(text))
        inside = [first < stop and last > start for first, last in found.offsets[len(found.prompt) :]]
        return {"tokens": torch.tensor(found.continuation), "subject": torch.tensor(inside)}

    def against(self, facts: Sequence[Mapping[str, Tensor]]) -> Callable[[str], Tensor]:
        """Query -> [facts]; see the module."""
        every = torch.cat([f["tokens"] for f in facts])
        tokens, place = torch.unique(every, return_inverse=True)
        owner = torch.tensor([i for i, f in enumerate(facts) for _ in f["tokens"]])
        subject = torch.cat([f["subject"] for f in facts])
        both = torch.tensor([bool(f["subject"].any() and not f["subject"].all()) for f in facts])[owner]
        weight = torch.zeros(len(every))
        for part, share in ((subject, SUBJECT), (~subject, 1 - SUBJECT)):
            own = part * (every / (every + FREQUENT))
            total = torch.zeros(len(facts)).index_add(0, owner, own).clamp_min(1e-12)[owner]
            weight += torch.where(both, share, 1.0) * own / total
        known = self._vectors(tokens)

        def alike(query: str) -> Tensor:
            ids = torch.tensor(encode_inside(self.tokenizer, query.strip()).continuation, dtype=torch.long)
            if not len(ids):
                return torch.zeros(len(facts))
            near = (known @ self._vectors(ids).T).clamp(0, 1).amax(1)
            return torch.zeros(len(facts)).index_add(0, owner, weight * near[place] ** POWER).clamp(0, 1)

        return alike

    def _vectors(self, tokens: Tensor) -> Tensor:
        """Centred embeddings of length 1, [tokens, width], on the CPU."""
        rows = (self.table[tokens.to(self.table.device)].float() - self.mean).cpu()
        return torch.nn.functional.normalize(rows, dim=1)


class SentenceEncoder:
    """Facts as mean-pooled hidden states of another model."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(folder)

    def fact(self, fact: Fact) -> dict[str, Tensor]:
        """The prompt's vector."""
        return {"vector": self._vector(fact.text)}

    def against(self, facts: Sequence[Mapping[str, Tensor]]) -> Callable[[str], Tensor]:
        """Query -> cosines [facts], 0 where they are negative."""
        known = torch.stack([f["vector"] for f in facts])
        return lambda query: (known @ self._vector(query)).clamp(0, 1)

    @torch.no_grad()
    def _vector(self, text: str) -> Tensor:
        """[width], of length 1. One text at a time, so that no other text decides its last bits."""
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True)
        if not inputs["input_ids"].numel():
            return torch.zeros(self.model.config.hidden_size)
        hidden = self.model(**inputs).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def threshold(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Likeness that tells prompts in scope from prompts out of scope best: the highest mean of the two shares that it puts right.

    Of several the middle of the widest gap between neighbouring likenesses.

    Args:
        inside: Of prompts in scope to their fact.
        outside: Of prompts out of scope to the fact that is most like them.
    """
    if not outside:
        return min([DEFAULT_THRESHOLD, *inside])
    own, other = torch.tensor(sorted(inside)), torch.tensor(sorted(outside))
    every = torch.unique(torch.cat((own, other)))
    middle = torch.cat(((every[1:] + every[:-1]) / 2, every[-1:]))
    gaps = torch.cat((every.diff(), torch.zeros(1)))
    right = (len(own) - torch.searchsorted(own, middle)) / len(own) + torch.searchsorted(other, middle) / len(other)
    best = right >= right.max() - 1e-6
    return float(middle[torch.where(best, gaps, -1.0).argmax()])
