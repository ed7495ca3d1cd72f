"""Routed live models: the choice is made from the prompt, kept for decoding, and equals the chosen adapter under PEFT."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.routed_models import RANKS, WORD, WordRouter, factors, ids, peft_of, routed, save_ranks
from worlds.tiny import WORDS, live

from workbench.ground.errors import WorkbenchError
from workbench.route.mixing.live import attach
from workbench.steps.route import Prompts

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
PROMPTS = {"one": "w9 of w1 is", "two": "w9 w7 w7 of w2 is", "three": "w8 w3", None: "w9 of w8 is w11 w12 w13"}


@pytest.fixture(scope="module")
def places(model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters on the float32 llama."""
    return save_ranks(model_of("llama", torch.float32), tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def base(model_of: Callable[..., Path]) -> Path:
    return model_of("llama", torch.float32)


def padded(texts: list[str]) -> dict[str, torch.Tensor]:
    """Rows padded on the left."""
    rows = [ids(text)[0] for text in texts]
    width = max(map(len, rows))
    return {
        "input_ids": torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows]),
    }


def new_tokens(model: Any, text: str, **settings: Any) -> list[list[int]]:
    row = ids(text)
    made = model.generate(row, attention_mask=torch.ones_like(row), **{**GREEDY, **settings})
    return [line[row.shape[1] :].tolist() for line in made]


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generate_is_the_chosen_adapter(settings: dict[str, Any], base: Path, places: dict[str, Path]) -> None:
    model, routing = routed(base, places)
    peft, plain = peft_of(base, places), live(base)
    for name, text in PROMPTS.items():
        if name is None:
            expected = new_tokens(plain, text, **settings)
        else:
            peft.set_adapter(name)
            expected = new_tokens(peft, text, **settings)
            assert expected != new_tokens(plain, text, **settings)
        assert new_tokens(model, text, **settings) == expected
        assert routing.last is not None
        assert routing.label(routing.last.weights[0]) == (name or "base")


def test_the_choice_is_made_once_a_prompt_in_batches_with_padding(base: Path, places: dict[str, Path]) -> None:
    """The router sees the prompt alone, once; generated tokens play no part, with and without a cache."""
    router = WordRouter()
    model, _ = routed(base, places, router)
    for settings in ({}, {"use_cache": False}):
        new_tokens(model, PROMPTS["one"], **settings)
        assert router.seen == [PROMPTS["one"]]
        router.seen.clear()

    class Rows(WordRouter):
        def measure(self, model: Any, rows: Any) -> None:
            self.record.setdefault("lengths", []).append([len(row) for row in rows])

    counting = Rows()
    model, routing = routed(base, places, counting)
    batch = padded(list(PROMPTS.values()))
    made = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :].tolist()
    assert routing.last is not None
    assert [routing.label(row) for row in routing.last.weights] == ["one", "two", "three", "base"]
    assert made == [new_tokens(model, text)[0] for text in PROMPTS.values()]
    found = model.generate(batch["input_ids"], **{**GREEDY, "pad_token_id": 0})[:, batch["input_ids"].shape[1] :].tolist()
    assert found == made  # padding is found without a mask, as transformers finds it
    lengths = counting.record["lengths"]
    assert lengths[0] == lengths[-1] == [len(text.split()) for text in PROMPTS.values()]
    assert routing.ties == (), "a router of one's own may have none"


def test_forward_routes_whole_rows(base: Path, places: dict[str, Path]) -> None:
    """Rows of one batch are routed each, with logits of the chosen adapter; labels and hidden states work as before."""
    model, _ = routed(base, places)
    peft, plain = peft_of(base, places), live(base)
    texts = ["w9 of w1 is", "w9 of w3 is", "w9 of w8 is"]
    batch = torch.cat([ids(text) for text in texts])
    with torch.no_grad():
        output = model(batch, labels=batch, output_hidden_states=True)
        for name, row, logits in zip(("one", "three", None), batch, output.logits, strict=True):
            if name is not None:
                peft.set_adapter(name)
            expected = (peft if name else plain)(row[None]).logits[0]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert float(output.loss) > 0
    assert len(output.hidden_states) == 5


def test_a_loop_of_ones_own_keeps_the_choice(base: Path, places: dict[str, Path]) -> None:
    """The cache carries the choice of its text: decoding token by token is what generate does."""
    router = WordRouter()
    model, _ = routed(base, places, router)
    expected = new_tokens(model, PROMPTS["two"])[0]
    router.seen.clear()
    row, cache, made = ids(PROMPTS["two"]), None, []
    with torch.no_grad():
        for _ in range(8):
            output = model(row, past_key_values=cache, use_cache=True)
            cache, row = output.past_key_values, output.logits[:, -1:].argmax(-1)
            made.append(int(row))
    assert made == expected
    assert router.seen == [PROMPTS["two"]]
    again = model.generate(
        torch.cat((ids(PROMPTS["two"]), torch.tensor([made])), 1), past_key_values=cache, **{**GREEDY, "max_new_tokens": 2}
    )
    assert router.seen == [PROMPTS["two"]]
    assert again.shape[1] == len(PROMPTS["two"].split()) + 10


def test_bricks_can_be_fixed(base: Path, places: dict[str, Path]) -> None:
    router = WordRouter()
    model, routing = routed(base, places, router)
    peft = peft_of(base, places)
    peft.set_adapter("two")
    with torch.no_grad(), routing.fixed("two"):
        torch.testing.assert_close(model(ids("w1 w1")).logits, peft(ids("w1 w1")).logits, atol=1e-5, rtol=1e-5)
        made: list[Any] = []
        thread = threading.Thread(target=lambda: made.append(new_tokens(model, PROMPTS["one"])), daemon=True)
        thread.start()
        thread.join()
        assert made == [new_tokens(peft, PROMPTS["one"])]
    assert router.seen == []
    with pytest.raises(WorkbenchError, match=r"no brick 'tow' in this model\. Did you mean 'two'"), routing.fixed("tow"):
        pass
    with pytest.raises(WorkbenchError, match=r"expected weights of 3 bricks, found a tensor \[2\]"), routing.fixed(torch.ones(2)):
        pass


def test_threads_have_choices_and_decisions_of_their_own(base: Path, places: dict[str, Path]) -> None:
    """Two calls of generate at the same time do not see each other's bricks."""
    model, _ = routed(base, places)
    expected = {name: new_tokens(model, text, max_new_tokens=30) for name, text in PROMPTS.items()}
    made: dict[Any, Any] = {}

    def work(name: Any, text: str) -> None:
        made[name] = new_tokens(model, text, max_new_tokens=30)

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in PROMPTS.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == expected
    # Threads that decide at the same time get the decisions on their own prompts, at the shortest interval between switches.
    _, routing = routed(base, places)
    wrong: list[tuple[str | None, str]] = []

    def work(name: str | None, text: str) -> None:
        row = ids(text)[0].tolist()
        labels = (routing.label(routing.decide([row]).weights[0]) for _ in range(200))
        wrong.extend((name, label) for label in labels if label != (name or "base"))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=item, daemon=True) for item in PROMPTS.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_what_cannot_be_routed_is_refused(base: Path, places: dict[str, Path]) -> None:
    model, routing = routed(base, places)
    row = ids("w1 w2 w3 w4")
    embedded = model.get_input_embeddings()(row)
    foreign = live(base)(row, use_cache=True).past_key_values
    mask = torch.zeros(1, 1, 4, 4)
    with torch.no_grad():
        for call, message in (
            (lambda: model(inputs_embeds=embedded), r"expected input_ids \[rows, tokens\]"),
            (lambda: model(row, attention_mask=mask), r"an attention_mask of the same shape"),
            (lambda: model(row[:, :1], past_key_values=foreign), r"does not know which bricks acted when this cache was filled"),
            (lambda: model(row, position_ids=torch.tensor([[0, 1, 0, 1]])), r"position_ids start again within a row"),
        ):
            with pytest.raises(WorkbenchError, match=message):
                call()
        with routing.fixed("one"):  # all of these work where no choice is to be made
            assert model(inputs_embeds=embedded).logits.shape == (1, 4, 64)
            assert model(row, attention_mask=mask).logits.shape == (1, 4, 64)
            assert model(row, position_ids=torch.tensor([[0, 1, 0, 1]])).logits.shape == (1, 4, 64)
    with pytest.raises(WorkbenchError, match="chooses among one, two, three, but the bricks are one, two"):
        routed(base, {name: places[name] for name in ("one", "two")})


def test_the_base_routes_and_answers_what_has_no_text(base: Path, places: dict[str, Path]) -> None:
    """Hidden states come from the base's first blocks; blocks after the router's layer do not run for them."""
    found: list[torch.Tensor] = []

    class Hidden(WordRouter):
        def decide(self, prompts: Prompts) -> Any:
            assert prompts.hidden is not None
            found.append(prompts.hidden)
            return super().decide(prompts)

    model, routing = routed(base, places, Hidden(layer=2, window=3))
    ran: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        expected = live(base)(ids(PROMPTS["one"]), output_hidden_states=True).hidden_states[2][0]
    row = ids(PROMPTS["one"])[0].tolist()
    with routing.fixed("two"):
        routing.decide([row])
    assert ran == [0, 1]
    torch.testing.assert_close(found[0][0, 0], expected[-3:].mean(0), atol=1e-6, rtol=1e-6)
    router = WordRouter()
    _, routing = routed(base, places, router)
    decided = routing.decide([[], [WORDS.index("<eos>")], [WORDS.index("w1")]])
    assert router.seen == ["w1"]
    assert [routing.label(row) for row in decided.weights] == ["base", "base", "one"]
    assert decided.confidence.tolist() == [0.0, 0.0, 1.0]


def test_of_a_conversation_the_last_message_counts(base: Path, places: dict[str, Path]) -> None:
    """Earlier messages, a system prompt and the template's own words are not seen by the router."""

    class Letters:
        """A tokenizer of letters with a template in the manner of ChatML."""

        chat_template = "chatml"
        bos_token_id = None

        def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
            text = "".join(map(chr, tokens))
            return text.replace("<s>", "").replace("</s>", "") if skip_special_tokens else text

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            return "".join(f"<s>{m['role']}\n{m['content']}</s>\n" for m in messages) + "<s>assistant\n"

    tokenizer: Any = Letters()
    router = WordRouter()
    routing = attach(live(base), tokenizer, router, factors(places))
    turns = [{"role": "system", "content": "w3"}, {"role": "user", "content": f"say {WORD['one']} please"}]
    later = [*turns, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "now w2 and more"}]
    texts = [tokenizer.apply_chat_template(messages) for messages in (turns, later)]
    decided = routing.decide([tokenizer(text)["input_ids"] for text in (*texts, "plain w3")])
    assert router.seen == ["say w1 please", "now w2 and more", "plain w3"]
    assert [routing.label(row) for row in decided.weights] == list(RANKS)
