"""The engine: texts are those that the model writes alone, whoever is written beside them; stops, streams, probabilities and failures."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import Queue
from typing import Any

import pytest
import torch

from worlds.tiny import live, save_model

from workbench.models.prompts import load_tokenizer
from workbench.serve.engine import Engine, FullError, Piece, Request, writes_together
from workbench.serve.writing import Sampling, Text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    base = save_model(tmp_path_factory.mktemp("base") / "base")
    return live(base).float(), load_tokenizer(base)


@pytest.fixture
def engine(world: tuple[Any, Any]) -> Iterator[Engine]:
    made = Engine(*world)
    yield made
    assert made.close(60)


def ask(engine: Engine, tokens: Sequence[int], **more: Any) -> Queue[Piece]:
    pieces: Queue[Piece] = Queue()
    engine.submit(Request(tokens, Sampling(**more), pieces.put))
    return pieces


def pieces_of(queue: Queue[Piece]) -> list[Piece]:
    found = [queue.get(timeout=60)]
    while found[-1].finish is None:
        found.append(queue.get(timeout=60))
    return found


def text_of(queue: Queue[Piece]) -> str:
    return "".join(piece.text for piece in pieces_of(queue))


def alone(world: tuple[Any, Any], tokens: Sequence[int], most: int) -> str:
    """The greedy text of `generate`."""
    model, tokenizer = world
    with torch.no_grad():
        made = model.generate(torch.tensor([list(tokens)]), max_new_tokens=most, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True))


PROMPTS = [[5 + i, *range(8, 9 + 2 * i), 30 - i] for i in range(9)]


def test_many_texts_at_once_are_those_of_generate(world: tuple[Any, Any], engine: Engine) -> None:
    assert writes_together(world[0])
    expected = [alone(world, prompt, 3 + i) for i, prompt in enumerate(PROMPTS * 3)]
    asked = [ask(engine, prompt, most=3 + i) for i, prompt in enumerate(PROMPTS * 3)]
    assert [text_of(queue) for queue in asked] == expected
    assert engine.counts["requests"] == 27
    assert engine.close(60)
    assert engine.load == (0, 0)


def test_models_that_write_no_batch_write_one_by_one(world: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.serve.engine.writes_together", lambda _model: False)
    expected = [alone(world, prompt, 6) for prompt in PROMPTS[:3]]
    single = Engine(*world)
    asked = [ask(single, prompt, most=6, top=1) for prompt in PROMPTS[:3]]
    for queue, text in zip(asked, expected, strict=True):
        found = pieces_of(queue)
        assert "".join(piece.text for piece in found) == text
        assert sum(len(piece.tokens) for piece in found) == found[-1].written
    assert single.close(60)


def test_probabilities_are_those_of_a_pass(world: tuple[Any, Any], engine: Engine) -> None:
    model, tokenizer = world
    tokens = PROMPTS[3]
    for single in (False, True):
        engine._together = not single
        found = pieces_of(ask(engine, tokens, most=3, top=2, echo=True))
        told = [token for piece in found for token in piece.tokens]
        with torch.no_grad():
            written = model.generate(torch.tensor([tokens]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
            expected = model(written[None]).logits[0].float().log_softmax(-1)
        assert told[0].log_probability is None
        assert [token.text for token in told] == [tokenizer.decode([token]) for token in written.tolist()]
        for place, token in enumerate(told[1:]):
            assert token.log_probability == pytest.approx(float(expected[place, written[place + 1]]), abs=1e-4)
            assert [value for _, value in token.top] == pytest.approx(expected[place].topk(2).values.tolist(), abs=1e-4)


def test_draws_follow_their_seed_whatever_is_written_beside(engine: Engine) -> None:
    one = text_of(ask(engine, PROMPTS[2], most=8, temperature=1.5, seed=3))
    several = [
        ask(engine, prompt, most=8, temperature=1.5, seed=seed) for seed, prompt in enumerate([PROMPTS[1]] * 3 + [PROMPTS[2]])
    ]
    texts = [text_of(queue) for queue in several]
    assert texts[3] == one
    assert len(set(texts[:3])) > 1


def test_top_p_leaves_the_most_likely_token(world: tuple[Any, Any], engine: Engine) -> None:
    assert text_of(ask(engine, PROMPTS[4], most=5, temperature=2.0, top_p=1e-6)) == alone(world, PROMPTS[4], 5)


def test_a_stop_string_ends_the_text_before_it(world: tuple[Any, Any], engine: Engine) -> None:
    whole = alone(world, PROMPTS[5], 10)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    found = pieces_of(ask(engine, PROMPTS[5], most=10, stops=(stop, "never")))
    assert "".join(piece.text for piece in found) == whole[: whole.find(stop)]
    assert found[-1].finish == "stop"


def test_clients_that_leave_end_their_texts(engine: Engine) -> None:
    left = threading.Event()
    pieces: Queue[Piece] = Queue()
    engine.submit(Request(PROMPTS[0], Sampling(10_000), pieces.put, left=left.is_set))
    pieces.get(timeout=60)
    left.set()
    assert text_of(ask(engine, PROMPTS[1], most=2)) is not None
    assert engine.load[0] <= 1


def test_too_many_requests_are_refused_and_a_failure_ends_no_server(
    world: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Engine(*world, waiting=0)
    with pytest.raises(FullError, match="0 requests are waiting already"):
        small.submit(Request([5], Sampling(1), lambda _piece: None))
    small.most = 9
    with monkeypatch.context() as patch:
        patch.setattr(small._batch, "join", lambda *_: 1 / 0)
        (piece,) = pieces_of(ask(small, PROMPTS[0], most=2))
        assert piece.error is not None
        assert "ZeroDivisionError" in piece.error.message
    assert text_of(ask(small, PROMPTS[0], most=2)) == alone(world, PROMPTS[0], 2)
    assert small.close(60)
    with pytest.raises(FullError, match="the server is stopping"):
        small.submit(Request([5], Sampling(1), lambda _piece: None))


class Letters:
    """A tokenizer of bytes, of which some characters need several."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode(errors="replace")


def test_characters_of_several_tokens_and_beginnings_of_stops_wait() -> None:
    text = Text(Letters(), ("END", "€€"))
    parts = [text.add(token) for token in "aé€ENx".encode()]
    assert parts == ["a", "", "é", "", "", "", "", "€ENx"] or "".join(parts) == "aé€ENx"
    assert "�" not in "".join(parts)
    assert [text.add(token) for token in b"EN"] == ["", ""]
    assert text.rest() == "EN"
    again = Text(Letters(), ("END",))
    assert "".join(again.add(token) for token in b"abEND") == "ab"
    assert again.stopped


@pytest.mark.parametrize("place", ["prompt", "text"])
def test_an_error_ends_the_text_that_has_it_alone(world: tuple[Any, Any], place: str) -> None:
    """A model that fails at one token, in a prompt or after some steps: the texts beside it are those of `generate`."""
    model, tokenizer = world
    with torch.no_grad():
        written = [
            model.generate(torch.tensor([one]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(one) :]
            for one in PROMPTS
        ]
    alone_in = {
        int(token): i for i, row in enumerate(written) for token in row[2:6] if sum(int(token) in other for other in written) == 1
    }
    token, bad = next((token, i) for token, i in alone_in.items() if not any(token in prompt for prompt in PROMPTS))
    asked = [*PROMPTS, [7, token, 9]] if place == "prompt" else PROMPTS

    def fails(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if (inputs["input_ids"] == token).any():
            raise ArithmeticError(f"no token {token}")

    expected = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in written]
    many = Engine(*world)
    hook = model.register_forward_pre_hook(fails, with_kwargs=True)
    try:
        found = [pieces_of(queue) for queue in [ask(many, prompt, most=8) for prompt in asked]]
        ended = {i for i, pieces in enumerate(found) if pieces[-1].error}
        assert ended == ({bad, len(PROMPTS)} if place == "prompt" else {bad})
        assert all("ArithmeticError: no token" in str(found[i][-1].error) for i in ended)
        assert ["".join(piece.text for piece in found[i]) for i in range(9) if i != bad] == expected[:bad] + expected[bad + 1 :]
    finally:
        hook.remove()
        assert many.close(60)


def test_draws_at_the_edges_of_temperature_and_top_p(world: tuple[Any, Any], engine: Engine) -> None:
    expected = alone(world, PROMPTS[3], 5)
    for more in ({"temperature": 1e-320}, {"temperature": 1e-30}, {"temperature": 2.0, "top_p": 1e-320}):
        assert text_of(ask(engine, PROMPTS[3], most=5, seed=-(2**63), **more)) == expected


def test_those_who_left_make_room_for_others(world: tuple[Any, Any]) -> None:
    small = Engine(*world, waiting=2)
    with small._changed:  # the engine cannot take them from the queue meanwhile
        for _ in range(2):
            small.submit(Request(PROMPTS[0], Sampling(2), lambda _piece: None, left=lambda: True))
        queue = ask(small, PROMPTS[1], most=2)
        with pytest.raises(FullError):
            [ask(small, PROMPTS[1], most=2) for _ in range(2)]
    assert text_of(queue) == alone(world, PROMPTS[1], 2)
    assert small.close(60)
