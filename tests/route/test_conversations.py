"""Messages that stay with the brick of their conversation, and those that leave it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worlds.routed_models import factors, save_ranks
from worlds.routing import BUILT_IN, context, outside, prompts, requests
from worlds.tiny import live, save_model

from workbench.models.prompts import load_tokenizer
from workbench.recipe.methods import methods
from workbench.route.deciding import pooling
from workbench.route.deciding.hidden import windows
from workbench.route.deciding.pooling import PooledRouter
from workbench.route.mixing.live import TURNS, Routing, attach

BRICKS = {"one": 0, "two": 1, "three": 2}
TEMPLATE = "{% for m in messages %}{{ '' if loop.first else ' ' }}{{ 'w30' if m['role'] == 'user' else 'w31' }} {{ m['content'] }} w32{% endfor %}"
ANSWER = "w33"
OPEN = outside(12, seed=3)
"""Messages in words that no brick's prompts begin with."""


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> Routing:
    folder = tmp_path_factory.mktemp("conversations")
    base = save_model(folder / "base")
    model, tokenizer = live(base), load_tokenizer(base)
    tokenizer.chat_template = TEMPLATE
    calibration = {name: prompts(number, templates=8, count=32) for name, number in BRICKS.items()}
    step: Any = methods()["route:ridge"].model_validate({"route": "ridge", "calibration": "{brick}.jsonl"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BUILT_IN, requests)
        router = step.fit(context(model, tokenizer, calibration, negatives=outside(8, seed=5)))
    return attach(model, tokenizer, router, factors(save_ranks(base, folder)))


def decided(routing: Routing, *turns: str) -> tuple[str, float]:
    """The brick of the last message of a conversation whose user messages these are, and its confidence."""
    messages = [{"role": "user", "content": turns[0]}]
    for turn in turns[1:]:
        messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": turn}]
    made = routing.decide([routing._tokenizer.apply_chat_template(messages, return_dict=False)])
    return routing.label(made.weights[0]), float(made.confidence[0])


def sure(routing: Routing, name: str) -> str:
    """A prompt that goes to a brick by itself."""
    return next(text for text in prompts(BRICKS[name], templates=8, seed=1) if decided(routing, text)[0] == name)


def behind(routing: Routing, before: str, message: str) -> tuple[str, float]:
    """The brick that a message's states behind an earlier one are most like, and the confidence, from a pass of the model."""
    router, tokenizer = routing.router, routing._tokenizer
    assert isinstance(router, PooledRouter)
    assert router.layer is not None
    ids = tokenizer(f"{before} {message}")["input_ids"]
    with routing.fixed(None), torch.no_grad():
        states = routing._model(torch.tensor([ids]), output_hidden_states=True).hidden_states[router.layer][0].float()
    own = windows(torch.cat([states[:1], states[-len(message.split()) :]]), router.window)
    confidence = router.confidence(own)
    best = int(confidence.argmax())
    scores = router.choice.join(router.state_scores(own[best : best + 1].double()).float(), router.bricks)
    return router.bricks[int(scores.argmax())], float(confidence[best])


def test_a_message_that_no_brick_is_sure_of_stays_if_its_states_behind_the_one_before_are_like_its_prompts(
    routing: Routing,
) -> None:
    threshold, found = routing.router.threshold, set()
    assert threshold is not None
    for name in BRICKS:
        first = sure(routing, name)
        for message in OPEN:
            assert decided(routing, message)[0] == "base"
            best, confidence = behind(routing, first, message)
            stays = best == name and confidence + pooling.FOLLOWING >= threshold
            brick, told = decided(routing, first, message)
            assert brick == (name if stays else "base")
            if stays:
                assert told == pytest.approx(confidence + pooling.FOLLOWING, abs=1e-4)
            found.add(stays)
    assert found == {True, False}


def test_nothing_stays_with_the_base_or_with_a_brick_of_another_kind(routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the message before counts, a prompt that goes to a brick by itself goes there, and the base is no topic."""
    monkeypatch.setattr(pooling, "FOLLOWING", 1e6)
    first, second = sure(routing, "one"), sure(routing, "two")
    assert decided(routing, first, second)[0] == "two"
    assert decided(routing, OPEN[0], OPEN[1])[0] == "base"
    answers = {message: decided(routing, first, message)[0] for message in OPEN}
    assert answers == {message: "one" if behind(routing, first, message)[0] == "one" else "base" for message in OPEN}
    staying = next(message for message, brick in answers.items() if brick == "one")
    assert decided(routing, first, staying, second)[0] == "two"
    assert decided(routing, first, second, staying)[0] in ("two", "base")


def test_the_topic_is_found_some_messages_before(routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message stays with the brick that the one before stayed with; what lies too far back is not read."""
    monkeypatch.setattr(pooling, "FOLLOWING", 1e6)
    first = sure(routing, "one")
    message = next(text for text in OPEN if all(decided(routing, first, *[text] * n)[0] == "one" for n in range(1, TURNS)))
    assert decided(routing, first, *[message] * TURNS)[0] == "base"
