"""Copies of calibration prompts, and the chat template around a message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import Environment

from workbench.route.deciding.copies import COPIES, GREETINGS, chat_frame, copies, without_template

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s><s>{% endif %}{% endfor %}"
)


def tokenizer(template: str | None) -> Any:
    """An object with a chat template, which is rendered as transformers does it."""

    def apply(messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert template is not None
        return Environment().from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt)

    return SimpleNamespace(chat_template=template, apply_chat_template=apply)


def chat(template: str, *contents: str, system: str | None = None) -> str:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    return str(tokenizer(template).apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_copies_differ_in_case_and_beginning_alone() -> None:
    found = copies("Add 2 and 3.", 7)
    assert tuple(found) == COPIES
    assert found == {"plain": "Add 2 and 3.", "lower": "add 2 and 3.", "greeting": GREETINGS[1] + "Add 2 and 3."}


@pytest.mark.parametrize("template", [CHATML, INST])
def test_the_last_message_is_what_is_routed(template: str) -> None:
    frame = chat_frame(tokenizer(template))
    assert frame is not None
    assert without_template(chat(template, "Add 2 and 3."), frame) == "Add 2 and 3."
    assert without_template(chat(template, "Hi", "Hello!", "Add 2\nand 3."), frame) == "Add 2\nand 3."
    assert without_template("Add 2 and 3.", frame) == "Add 2 and 3."


def test_a_system_message_of_ones_own_is_no_part_of_the_prompt() -> None:
    frame = chat_frame(tokenizer(CHATML))
    assert without_template(chat(CHATML, "Add 2.", system="Answer in verse."), frame) == "Add 2."


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['content'] }} {% endfor %}", "{{ raise_exception('no') }}", "always the same"]
)
def test_templates_without_marks_leave_texts_alone(template: str | None) -> None:
    assert chat_frame(tokenizer(template)) is None
    assert without_template("please add 2 and 3 ", None) == "please add 2 and 3 "
