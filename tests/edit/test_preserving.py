"""Prompts that an edit preserves: every token of them, generated ones, and the factor on the update that pays for paraphrases."""

from __future__ import annotations

import pytest
import torch

from worlds.dense import context_of
from worlds.edit_steps import solve
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project

from workbench.edit.closed_form.bundled import known_facts
from workbench.edit.closed_form.preserving import generated_prompts, preserved_keys
from workbench.edit.closed_form.values import Lookup
from workbench.edit.places.parts import Parts
from workbench.edit.places.passes import keys_of_tokens
from workbench.edit.places.rows import padded, row_of
from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.steps import MethodContext

KEPT = [Fact(f"k{i}", f"w{i} of {{subject}}", f"w{i + 30} w{i + 31}", "w1") for i in range(6)]


def tokens_of(context: MethodContext, fact: Fact) -> torch.Tensor:
    """Tokens of a prompt [1, position]."""
    return torch.tensor([context.tokenizer(fact.text, add_special_tokens=True)["input_ids"]])


def inputs_at(context: MethodContext, fact: Fact, update: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of layer 1's projection at every token of a prompt, read from the model by a hook."""
    projection, found = context.model.model.layers[1].mlp.down_proj, list[torch.Tensor]()
    hook = projection.register_forward_hook(lambda _module, args, output: found.extend((args[0][0], output[0])))
    with torch.no_grad():
        context.model(tokens_of(context, fact))
    hook.remove()
    return found[0], found[1] if update is None else found[1] + found[0] @ update.T


def test_keys_of_every_token_are_the_inputs_of_the_projection(facts: Project) -> None:
    context = context_of(facts)
    rows = [row_of(fact, context.tokenizer, "subject_last").prompt for fact in KEPT]
    found = keys_of_tokens(Parts.of(context), 1, padded(rows, CPU))
    expected = torch.cat([inputs_at(context, fact)[0] for fact in KEPT])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    at = Lookup(context, Parts.of(context), 1, "subject_last", ["w7 w8"])
    every = torch.cat([*preserved_keys(at, KEPT, "every")], 1)
    assert torch.equal(every.sort(1).values, found.T.sort(1).values), "the beginnings of facts do not count"
    assert torch.cat([*preserved_keys(at, KEPT, "lookup")], 1).shape == (48, len(KEPT))


def test_every_token_of_preserved_prompts_stays(facts: Project) -> None:
    """ROME keeps the outputs at every token, where it keeps only those of the lookups otherwise."""
    write_jsonl(facts.path / "keep.jsonl", [{"prompt": fact.prompt, "subject": fact.subject} for fact in KEPT])
    context = context_of(facts)
    moved = {}
    for tokens in ("lookup", "every"):
        edit = solve(context, "rome", contexts=0, preserve="keep.jsonl", preserve_tokens=tokens)
        (factors,) = edit.factors.values()
        update = factors.left @ factors.right
        pairs = [(inputs_at(context, fact)[1], inputs_at(context, fact, update)[1]) for fact in KEPT]
        moved[tokens] = max(float((after - before).norm() / before.norm()) for before, after in pairs)
        torch.testing.assert_close(edit.tensors["1.keys"] @ update.T, edit.tensors["1.changes"], atol=1e-3, rtol=1e-3)
    assert moved["every"] < 1e-5 < 0.01 < moved["lookup"]


def test_rome_refuses_prompts_that_leave_no_room(facts: Project) -> None:
    kept = [{"prompt": f"w{i % 50} w{i % 7} of w{i % 11} w{i % 13}"} for i in range(60)]
    write_jsonl(facts.path / "keep.jsonl", kept)
    with pytest.raises(
        WorkbenchError, match=r"the preserved prompts have more independent tokens than the projection of layer 1"
    ):
        solve(context_of(facts), "rome", contexts=0, preserve="keep.jsonl", preserve_tokens="every")
    solve(context_of(facts), "memit", contexts=0, preserve="keep.jsonl", preserve_tokens="every", preserve_weight=0.05)


def test_the_update_is_scaled(facts: Project) -> None:
    context = context_of(facts)
    plain, longer = (solve(context, refine=0, scale=scale) for scale in (1.0, 1.25))
    for name, factors in plain.factors.items():
        other = longer.factors[name]
        torch.testing.assert_close(other.left @ other.right, 1.25 * (factors.left @ factors.right), atol=1e-6, rtol=1e-5)
    assert torch.equal(plain.tensors["1.changes"], longer.tensors["1.changes"])


def test_generated_prompts_ask_about_other_subjects() -> None:
    known = [fact for fact in known_facts() if fact.subject]
    edited = [Fact("a", "{subject} speaks", known[0].subject, "x"), Fact("b", "The capital of {subject} is", "Atlantis", "y")]
    found = generated_prompts([*edited, Fact("c", "no subject", None, "z")], 100)
    assert {fact.prompt for fact in found} == {"{subject} speaks", "The capital of {subject} is"}
    assert not {fact.subject for fact in found} & {known[0].subject, "Atlantis"}
    assert len({fact.text for fact in found}) == 100
    assert [f.text for f in generated_prompts(edited, 30)] == [f.text for f in found[:30]]
    assert len(generated_prompts(edited, 10_000)) == 2 * (len({f.subject for f in known}) - 1)
    assert generated_prompts(edited, 0) == []
