"""The space between a prompt and its answer: by the script of the text, one rule for everything that teaches, scores or recalls a fact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.edit.closed_form.moments import statistics_source
from workbench.edit.grace import _row
from workbench.edit.memories.textmemory import FactStore
from workbench.edit.places.parts import fact_pair
from workbench.evaluate.facts.definitions import documents
from workbench.facts.facts import fact_of, joined
from workbench.models.texts import encode, read_texts
from workbench.train.rows import encode as encode_row

SPACES = {
    "English": ("The capital of Japan is", "Tokyo", " Tokyo"),
    "a space in the prompt": ("The capital is ", "Tokyo", "Tokyo"),
    "a space in the answer": ("日本の首都は", " 東京", " 東京"),
    "Korean": ("대한민국의 수도는", "서울", " 서울"),
    "Cyrillic": ("Столица Японии –", "Токио", " Токио"),
    "Japanese": ("日本の首都は", "東京", "東京"),
    "Katakana after Hiragana": ("首都はパリで、その国は", "フランス", "フランス"),
    "Chinese": ("日本的首都是", "东京", "东京"),
    "full-width colon": ("問：首都は？答：", "Tokyo", "Tokyo"),
    "Latin after Chinese": ("苹果的系统叫", "iOS", "iOS"),
    "Chinese after Latin": ("苹果公司的CEO", "是库克", "是库克"),
    "Chinese in an English text": ("The capital of Japan is", "東京", " 東京"),
    "Thai": ("เมืองหลวงของญี่ปุ่นคือ", "โตเกียว", "โตเกียว"),
    "Lao": ("ນະຄອນຫຼວງແມ່ນ", "ໂຕກຽວ", "ໂຕກຽວ"),
    "Khmer": ("រដ្ឋធានីគឺ", "តូក្យូ", "តូក្យូ"),
    "Burmese": ("မြို့တော်မှာ", "တိုကျို", "တိုကျို"),
    "an opening bracket": ("The chemical sign of gold (", "Au", "Au"),
    "an opening quotation mark": ('It is called "', "Aurora", "Aurora"),
    "a closing quotation mark": ('The author of "Aurora"', "is Ada", " is Ada"),
    "a quotation within brackets": ('A word ("', "Aurora", "Aurora"),
    "inches": ('The screen has 27"', "across", " across"),
    "a name with a sign": ("A language like C#", "has types", " has types"),
    "a sign behind a number": ("Das Ticket kostet 12 €", "pro Tag", " pro Tag"),
    "a sign before a number": ("A ticket costs €", "12", "12"),
    "a path": ("https://example.org/", "docs", "docs"),
    "a colon": ("Q: Which port?\nA:", "8080", " 8080"),
    "rare characters": ("𠮷野家の首都は", "𠮷", "𠮷"),
}


@pytest.mark.parametrize("name", SPACES)
def test_spaces_by_script(name: str) -> None:
    prompt, answer, after = SPACES[name]
    assert joined(prompt, answer) == after


@pytest.fixture(scope="module")
def by_byte() -> Any:
    """A tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.part("suites")
@pytest.mark.parametrize(("prompt", "answer", "space"), [("日本の首都は", "東京", ""), ("Its capital is", "Tokyo", " ")])
def test_everything_that_joins_a_prompt_and_an_answer(
    prompt: str, answer: str, space: str, by_byte: Any, project: Project
) -> None:
    fact = fact_of(
        {
            "prompt": prompt,
            "target": answer,
            "target_true": answer * 2,
            "paraphrases": [prompt],
            "neighbours": [{"prompt": prompt, "target": answer}],
            "portability": [{"prompt": prompt, "target": answer}],
        },
        "facts.jsonl:1",
    )
    whole = prompt + space + answer
    file = write_jsonl(project.path / "rows.jsonl", [{"prompt": prompt, "completion": answer}])
    text = read_texts(file, "rows.jsonl")[0]

    assert fact.continuation == fact.neighbours[0].continuation == fact.portability[0].continuation == space + answer
    assert by_byte.decode(fact_pair(fact, by_byte).continuation) == space + answer
    assert by_byte.decode(_row(fact, by_byte, end=False).answer) == space + answer
    assert by_byte.decode(encode([text], by_byte, 999)[0].tokens) == whole
    assert by_byte.decode(encode_row(by_byte, prompt, answer, 999)[0]) == whole
    assert statistics_source(SimpleNamespace(project=project.path), "rows.jsonl")[0] == [whole]  # type: ignore[arg-type]

    found = documents([fact], {}, (), lambda *_: 1, chat=False, message=str.upper)
    assert {doc["answer"] for kind in ("efficacy", "paraphrase", "portability", "neighbours-right") for doc in found[kind]} == {
        space + answer
    }
    assert found["preferred"][0]["choices"] == [space + answer, space + answer * 2]

    remembered = [SimpleNamespace(fact=fact)] * 2
    store = FactStore(remembered, None, 0.0, 2, "{facts}")  # type: ignore[arg-type]
    object.__setattr__(store, "recall", lambda _: remembered)
    stop = "." if space else "。"
    assert store.context("?") == f"{whole}{stop}{space}{whole}{stop}"

    items = write_jsonl(project.path / "items.jsonl", [{"prompt": prompt, "choices": [answer, answer * 2], "gold": 0}])
    from workbench.suites.new import new_suite

    new_suite("capitals", items, "choice", project.path)
    task = yaml.safe_load((project.path / "evals/tasks/capitals.yaml").read_text("utf-8").replace("!function", ""))
    assert task.get("target_delimiter", " ") == space
