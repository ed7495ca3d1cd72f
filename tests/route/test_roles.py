"""`route: roles`: bricks on the tokens of their roles, and a weighted sum of bricks on text."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document
from worlds.project import Project
from worlds.routed_models import save_ranks
from worlds.tiny import live

import workbench
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer
from workbench.run.materialize import materialize

BRICKS = "bricks: {one: ranks/one, two: ranks/two, three: ranks/three}\n"
STEP = """
  - route: roles
    roles:
      one: {tokens: [w1], ids: [[12, 20], 30]}
      two: {between: [w40, w41]}
    text: {one: 0.5, three: 0.25}
"""
ROLES = f"{BRICKS}steps:{STEP}"
TEXT = "w5 w50 is of w3 w51"
ONE = "w1 w12 w13 w14 w1 w15"
TWO = "w40 w5 w1 w50 w12 w41"  # tokens of the other role inside the span belong to the span


@pytest.fixture
def world(project: Project) -> Project:
    """The project with adapters of three ranks."""
    save_ranks(project.path / "base", project.path / "ranks")
    return project


@pytest.fixture
def model(world: Project) -> Any:
    """The live configuration in float32."""
    return materialize(world.resolve(f"{ROLES}output: {{dtype: float32}}\n"), torch.device("cpu"))


def ids(world: Project, *texts: str) -> torch.Tensor:
    return torch.tensor(load_tokenizer(world.path / "base")(list(texts))["input_ids"])


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def alone(world: Project, brick: str) -> Any:
    """The base with one adapter under PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(live(world.path / "base").float(), world.path / "ranks" / brick).eval()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5)


def test_text_is_answered_by_the_weighted_merge(world: Project, model: Any) -> None:
    merged = materialize(
        world.resolve(
            f"{BRICKS}steps: [{{merge: task_arithmetic, bricks: {{one: 0.5, three: 0.25}}}}]\noutput: {{dtype: float32}}\n",
            "m.yaml",
        ),
        torch.device("cpu"),
    )
    tokens = ids(world, TEXT)
    assert close(logits(model, tokens), logits(merged, tokens))
    assert not close(logits(model, tokens), logits(live(world.path / "base").float(), tokens))


@pytest.mark.parametrize(("brick", "text"), [("one", ONE), ("two", TWO)])
def test_tokens_of_one_role_are_answered_by_its_brick(world: Project, model: Any, brick: str, text: str) -> None:
    tokens = ids(world, text)
    assert close(logits(model, tokens), logits(alone(world, brick), tokens))


def test_a_mixed_text_has_the_update_of_each_token(world: Project, model: Any) -> None:
    """The same weights token by token, given by hand, and a reference that adds each token's own update to each module."""
    tokens = ids(world, f"{TEXT} w40 w5 w1 w41 w12 w55")
    by_hand = torch.tensor([[[0.5, 0, 0.25]] * 6 + [[0, 1, 0]] * 4 + [[1, 0, 0]] + [[0.5, 0, 0.25]]])
    with model.routing.fixed(by_hand):
        expected = logits(model, tokens)
    assert torch.equal(logits(model, tokens), expected)
    base = live(world.path / "base").float()
    modules = dict(base.named_modules())
    for place, stack in model.routing.mixer.stacks.items():
        starts = [0, *torch.tensor(stack.ranks).cumsum(0).tolist()]
        pairs = [(stack._a[a:b], stack._b[a:b]) for a, b in pairwise(starts)]

        def hook(_module: Any, inputs: Any, output: torch.Tensor, pairs: Any = pairs) -> torch.Tensor:
            updates = [(inputs[0].double() @ a.double().T @ b.double()) * by_hand[..., i, None] for i, (a, b) in enumerate(pairs)]
            return (output.double() + sum(updates)).float()

        modules[place].register_forward_hook(hook)
    assert close(logits(base, tokens), expected)


def test_padding_and_caches_keep_the_roles(world: Project, model: Any) -> None:
    """Left padding, a decoding loop with a cache, generate and beams give what whole forward passes give."""
    from transformers import DynamicCache

    tokenizer = load_tokenizer(world.path / "base")
    tokenizer.pad_token, tokenizer.padding_side = "<eos>", "left"
    batch = tokenizer(["w40 w5", "w3 w4 w1 w5 w6"], return_tensors="pt", padding=True)
    with torch.no_grad():
        padded = model(**batch).logits[0, -1]
    assert close(padded, logits(model, ids(world, "w40 w5"))[0, -1])

    prompt = ids(world, "w7 w40 w5")  # the span is open
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        cache = next(value for key, value in out.items() if "cache" in key or "past" in key)
        name = "cache" if "cache" in out else "past_key_values"
        empty = model(prompt, **{name: DynamicCache()}).logits
        step = model(ids(world, "w1"), **{name: cache}).logits[0, -1]
    assert torch.equal(empty, out.logits), "a cache that nothing has filled"
    assert close(step, logits(model, ids(world, "w7 w40 w5 w1"))[0, -1])

    for beams in (1, 3):
        settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 1, "temperature": None}
        cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **settings)
        assert torch.equal(cached, whole)


@pytest.mark.part("ship")
def test_a_saved_configuration_is_the_same_and_no_server_takes_it(world: Project) -> None:
    made = world.run(f"{ROLES}output: {{dtype: float32}}\n")
    loaded = workbench.load(made["directory"])
    fresh = materialize(world.resolve(f"{ROLES}output: {{dtype: float32}}\n"), torch.device("cpu"))
    for text in (TEXT, ONE, TWO):
        assert torch.equal(logits(loaded, ids(world, text)), logits(fresh, ids(world, text)))
    settings = json.loads((Path(made["directory"]) / "routing.json").read_text("utf-8"))
    assert settings["record"]["roles"] == {"one": {"tokens": 10}, "two": {"tokens": 0, "between": [42, 43]}}
    from workbench.ship.subject import of_configuration

    with pytest.raises(WorkbenchError, match="a server applies one adapter to all tokens"):
        of_configuration(Path(world.run(ROLES)["directory"]))


def test_explain_shows_the_role_of_each_token(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.path)
    recipe = world.write(ROLES)
    shown = document("route", "explain", str(recipe), "w5 w1 w40 w1 w41 w6", "--json")
    assert [token["role"] for token in shown["tokens"]] == [None, "one", "two", "two", "two", None]
    assert shown["tokens"][0]["weights"] == {"one": 0.5, "three": 0.25}
    text = call("route", "explain", str(recipe), "w5 w1 w40 w1 w41 w6", "--html", "page.html").output
    page = (world.path / "page.html").read_text("utf-8")
    assert "On text acts: 0.5 one + 0.25 three." in page
    assert 'class="b1" title="1 two"> w41</span>' in page
    assert "0.5 one + 0.25 three on text" in text
    assert "w40 w1 w41" in text


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ("one: {tokens: [w1]}\n      two: {ids: [[0, 5]]}", "the roles of 'one' and 'two' overlap: both have 'w1' (3)"),
        ("one: {between: [w1, w2]}\n      two: {between: [w3, w2]}", "overlap: both have 'w2' (4)"),
        ("one: {tokens: ['<image>']}", "names the token '<image>', which the vocabulary does not have"),
        ("one: {ids: [[60, 70]]}", "names the ids 60 to 69, but the model has 64 tokens"),
        ("one: {ids: [-1]}", "names the ids -1 to -1, but the model has 64 tokens"),
        ("one: {ids: [[7, 7]]}", "expected a range [FIRST, END] with FIRST below END"),
        ("one: {}", "expected the tokens of the role"),
        ("nose: {tokens: [w1]}", "no brick 'nose'"),
    ],
)
def test_roles_that_cannot_hold_are_refused_before_any_work(world: Project, roles: str, words: str) -> None:
    with pytest.raises(WorkbenchError) as error:
        world.resolve(f"{BRICKS}steps:\n  - route: roles\n    roles:\n      {roles}\n")
    assert words in error.value.message


def test_what_roles_cannot_see_is_refused(world: Project, model: Any) -> None:
    with pytest.raises(WorkbenchError, match="expected input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(WorkbenchError, match="need whole texts"):
        model(ids(world, TEXT), attention_mask=torch.zeros(1, 1, 6, 6))
    with pytest.raises(WorkbenchError, match="position_ids start again"):
        model(ids(world, TEXT), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
