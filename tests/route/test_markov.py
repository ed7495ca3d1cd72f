"""Four Markov chains over one vocabulary: the states of a small model tell them apart, although no token belongs to one chain alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.route.centroid import CentroidRouter
from workbench.route.deciding.hidden import pooled
from workbench.route.deciding.statistics import Statistics, by_brick
from workbench.route.ridge import RidgeRouter
from workbench.steps.route import Prompts

DOMAINS, TOKENS, LENGTH = 4, 64, 32
NAMES = tuple("abcd")


def chains(generator: torch.Generator) -> Tensor:
    """Transition probabilities [domain, token, token], with four successors a token."""
    found = torch.zeros(DOMAINS, TOKENS, TOKENS)
    for domain in range(DOMAINS):
        for token in range(TOKENS):
            successors = torch.randperm(TOKENS, generator=generator)[:4]
            found[domain, token, successors] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    return found


def sequences(chain: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sequences [count, LENGTH] of a chain."""
    rows = [torch.randint(TOKENS, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        rows.append(torch.multinomial(chain[rows[-1]], 1, generator=generator)[:, 0])
    return torch.stack(rows, 1)


@pytest.fixture(scope="module")
def world() -> tuple[Any, Tensor, torch.Generator]:
    """A small model that was trained on all domains, the domains, and the generator of their texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    domains = chains(generator)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        batch = torch.cat([sequences(chain, 8, generator) for chain in domains])
        loss = model(input_ids=batch, labels=batch).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss.detach()) < 2.8  # a uniform guess has 4.16
    return model.eval(), domains, generator


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [(RidgeRouter, 0.95), (CentroidRouter, 0.9)])
def test_domains_over_one_vocabulary_are_told_apart(world: Any, kind: Any, least: float) -> None:
    model, domains, generator = world
    train, test = (torch.cat([sequences(chain, count, generator) for chain in domains]) for count in (32, 50))
    labels = [torch.arange(DOMAINS).repeat_interleave(count) for count in (32, 50)]
    states = [pooled(model, rows.tolist(), 2, LENGTH) for rows in (train, test)]
    statistics = tuple(by_brick(states[0][:, 0], labels[0], DOMAINS))
    more = {"strength": 0.01} if kind is RidgeRouter else {}
    router = kind(NAMES, layer=2, window=LENGTH, statistics=statistics, negatives=Statistics.of(states[1][:, 0]), **more)
    decisions = router.decide(Prompts([""] * len(test), states[1]))
    assert (decisions.scores.argmax(1) == labels[1]).double().mean() >= least
