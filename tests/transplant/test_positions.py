"""Common positions of two tokenizers, and exchanged tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from worlds.tiny import WORDS, save_tokenizer

from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import Text
from workbench.transplant.readings import Reading, exchanged, read_aligned

TEXTS = [Text("", f"w{i} w{i + 1} is w{2 * i} of w1 w2 w3 w4 w5 w6 w7 w8 w9", "texts:1") for i in range(20)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder)
    return load_tokenizer(folder)


def made(model: Any, before: Any, **special: str) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    if before is not None:
        tokenizer.pre_tokenizer = before
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def letters() -> Any:
    """A tokenizer of single letters, digits and spaces."""
    from tokenizers import Regex, models, pre_tokenizers

    alphabet = ["<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 "]
    model = models.WordLevel({letter: i for i, letter in enumerate(alphabet)}, unk_token="<unk>")
    return made(model, pre_tokenizers.Split(Regex("."), "isolated"))


@pytest.fixture(scope="module")
def whole() -> Any:
    """A tokenizer to which a text is one token."""
    from tokenizers import models

    return made(models.WordLevel({"<unk>": 0}, unk_token="<unk>"), None)


def test_equal_tokenizers_give_all_positions_but_the_first(words: Any) -> None:
    for reading in read_aligned(TEXTS, words, words, 64):
        assert reading.source == reading.target
        assert reading.pairs == [(i, i) for i in range(1, len(reading.source))]


def test_a_common_position_has_read_the_same_text(words: Any, letters: Any) -> None:
    """At every pair, the tokens up to it spell the same text; all words but the first end a letter, too."""
    readings = read_aligned(TEXTS, words, letters, 64)
    for text, reading in zip(TEXTS, readings, strict=True):
        spelled = text.answer.split(" ")
        assert [i for i, _ in reading.pairs] == list(range(1, len(spelled)))
        for i, j in reading.pairs:
            assert " ".join(spelled[: i + 1]) == "".join(letters.convert_ids_to_tokens(reading.target[: j + 1]))
    assert sum(len(r.pairs) for r in readings) >= 0.8 * sum(min(len(r.source), len(r.target)) - 1 for r in readings)
    turned = read_aligned(TEXTS, letters, words, 64)
    assert [[(j, i) for i, j in r.pairs] for r in turned] == [r.pairs for r in readings]


def test_prompts_and_answers_are_one_text(words: Any) -> None:
    texts = [Text("w1 is w2 of", "w3 w4 w5 w6 w7 w8", "t") for _ in range(20)]
    assert read_aligned(texts, words, words, 64)[0].source == words("w1 is w2 of w3 w4 w5 w6 w7 w8")["input_ids"]


def test_every_fifth_text_is_held_out(words: Any) -> None:
    assert [i for i, r in enumerate(read_aligned(TEXTS, words, words, 64)) if r.held_out] == [4, 9, 14, 19]


def test_long_texts_are_cut(words: Any, letters: Any) -> None:
    assert all(len(r.source) <= 12 and len(r.target) <= 12 for r in read_aligned(TEXTS * 4, words, letters, 12))


def test_without_common_positions(words: Any, whole: Any, letters: Any) -> None:
    with pytest.raises(WorkbenchError) as error:
        read_aligned(TEXTS, words, whole, 64)
    assert error.value.message.startswith("the two tokenizers have 0 common positions on the texts, expected 64 or more")
    assert "longer texts" in str(error.value.hint)
    with pytest.raises(WorkbenchError) as error:
        read_aligned([Text("", " ".join(["w1"] * 40), "t")] * 4, words, letters, 64)
    assert error.value.message.startswith("the two tokenizers have 0 common positions on the held-out texts (every fifth one)")


def test_a_tokenizer_without_offsets(words: Any, letters: Any) -> None:
    class Slow:
        is_fast = False
        get_vocab: Callable[[], Any] = dict

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text)))}

    with pytest.raises(WorkbenchError, match="Slow has no character offsets"):
        read_aligned(TEXTS, Slow(), words, 64)


def test_exchanged_tokens_keep_the_pattern(words: Any) -> None:
    """An exchange is one to one, leaves no ordinary token in its place, and changes nothing else."""
    readings = read_aligned(TEXTS, words, words, 64)
    keep = {WORDS.index("is")}
    for seed in range(3):
        table: dict[int, int] = {}
        for before, after in zip(readings, exchanged(readings, keep, seed), strict=True):
            assert (after.target, after.pairs, after.held_out) == (before.target, before.pairs, before.held_out)
            for old, new in zip(before.source, after.source, strict=True):
                assert table.setdefault(old, new) == new
        assert len(set(table.values())) == len(table)
        assert {old for old, new in table.items() if old == new} == keep
    assert exchanged(readings, keep, 0) == exchanged(readings, keep, 0) != exchanged(readings, keep, 1)


def test_a_single_token_left_over_is_exchanged_too() -> None:
    reading = Reading([*range(9)], [*range(9)], [], held_out=False)
    found = exchanged([reading], (), 0)[0].source
    assert sorted(found) == list(range(9))
    assert all(old != new for old, new in enumerate(found))
