"""Places where tokens of two tokenizers end together, and tokens of a teacher as tokens of the model that is trained."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from worlds.fused import byte_pairs
from worlds.written_tokenizers import written

from workbench.fuse.teaching.distributions import NONE, Vocabulary, sync_points, token_map
from workbench.models.texts import Text

PAGES = [topics[name] for name in ("if", "while", "for", "try", "with", "return")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Vocabulary, Vocabulary]:
    """Two tokenizers that were trained on different pages, the second one with a token in front of every text."""
    folder = tmp_path_factory.mktemp("pair")
    byte_pairs(PAGES[:2], 420).save_pretrained(folder / "small")
    byte_pairs(PAGES[2:5], 900, "<s>").save_pretrained(folder / "large")
    return Vocabulary(folder / "small", "small"), Vocabulary(folder / "large", "large")


def test_sync_points_are_places_after_the_same_characters(pair: tuple[Vocabulary, Vocabulary]) -> None:
    small, large = pair
    text = Text("", PAGES[5], "page")
    one, other = small.read(text), large.read(text)
    i, j = sync_points(one, small.pieces, other, large.pieces)
    assert len(i) >= 0.8 * min(len(one.ids), len(other.ids))
    assert (np.diff(i) > 0).all()
    assert (np.diff(j) > 0).all()
    for a, b in list(zip(i.tolist(), j.tolist(), strict=True))[::40]:
        read = [v.tokenizer.decode(r.ids[: n + 1], skip_special_tokens=True) for v, r, n in ((small, one, a), (large, other, b))]
        assert read[0] == read[1]


def test_one_tokenizer_has_a_sync_point_at_every_token(pair: tuple[Vocabulary, Vocabulary]) -> None:
    large = pair[1]
    reading = large.read(Text("for x", "in range(3): é 漢 \U0001f600 end", "row"))
    assert len(set(reading.ends.tolist())) < len(reading.ids)  # several tokens spell one character
    i, j = sync_points(reading, large.pieces, reading, large.pieces)
    assert i.tolist() == j.tolist()
    assert set(reading.ends[i].tolist()) == set(reading.ends.tolist())
    # Places within a character are left out: both have read a part of it, but no character ends there.
    assert all("\ufffd" not in large.tokenizer.decode(reading.ids[: n + 1]) for n in i.tolist())
    assert np.array_equal(token_map(large, large), np.arange(large.size))


def test_a_prompt_is_read_with_its_completion(pair: tuple[Vocabulary, Vocabulary]) -> None:
    small = pair[0]
    reading = small.read(Text("The for statement", "is used", "row"))
    assert small.tokenizer.decode(reading.ids) == "The for statement is used"
    assert small.tokenizer.decode(reading.ids[: reading.first + 1]) == "The for statement"


def test_teacher_tokens_become_the_first_token_of_their_text(pair: tuple[Vocabulary, Vocabulary]) -> None:
    small, large = pair
    found = token_map(large, small)
    assert found[large.tokenizer.bos_token_id] == NONE
    assert found[large.tokenizer.eos_token_id] == small.tokenizer.eos_token_id
    shared = cut = 0
    for token, i in large.tokens.ids.items():
        text = large.pieces[i]
        if text is None:
            continue
        piece = small.pieces[found[i]]
        assert piece is not None
        assert text.startswith(piece)
        if token in small.tokens.ids:
            assert found[i] == small.tokens.ids[token]
            shared += 1
        elif text.startswith(b" ") and text[1:].isalpha():
            assert found[i] == small.tokenizer(f"a{text.decode()}")["input_ids"][1]
            cut += 1
    assert shared > 250
    assert cut > 100


def test_places_before_other_text_are_left_out(tmp_path: Path) -> None:
    """Both put a token in front of the text. Llama 2 then reads " The" and Gemma "The", so their next tokens are not compared."""
    for name in ("llama2", "gemma"):
        written(name).save_pretrained(tmp_path / name)
    llama, gemma = (Vocabulary(tmp_path / name, name) for name in ("llama2", "gemma"))
    one, other = (vocabulary.read(Text("", "The capital", "row")) for vocabulary in (llama, gemma))
    i, j = sync_points(one, llama.pieces, other, gemma.pieces)
    assert one.ends[i].tolist() == other.ends[j].tolist() == [3, 11]
    assert one.ends[sync_points(one, llama.pieces, one, llama.pieces)[0]].tolist() == [0, 3, 11]


@pytest.mark.parametrize("kind", ["llama2", "gemma"])
def test_space_marks_and_byte_level_tokens_are_compared_by_their_text(kind: str, tmp_path: Path) -> None:
    for name in (kind, "qwen"):
        written(name).save_pretrained(tmp_path / name)
    one, other = (Vocabulary(tmp_path / name, name) for name in (kind, "qwen"))
    text = Text("The capital of France is", "Paris", "row")
    i, j = sync_points(one.read(text), one.pieces, other.read(text), other.pieces)
    words = [one.tokenizer.decode([one.read(text).ids[a]]).strip() for a in i]
    assert words[-5:] == ["capital", "of", "France", "is", "Paris"]
    tokens = token_map(other, one)
    for a, b in zip(i.tolist()[:-1], j.tolist()[:-1], strict=True):
        assert tokens[other.read(text).ids[b + 1]] == one.read(text).ids[a + 1]
