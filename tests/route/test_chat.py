"""The user's text within a chat: templates are understood by rendering them, and well-known ones without a template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import Environment

from workbench.route.deciding.hidden import KNOWN, ChatFrame


def turns(before: str, after: str, answer: str, **roles: str) -> str:
    """A template that writes each message alike, with its role (by default its own name) for ROLE in the text before it."""
    role = before.replace(
        "ROLE", "{{ " + repr({"user": "user", "assistant": "assistant", "system": "system", **roles}) + "[m['role']] }}"
    )
    return f"{{% for m in messages %}}{role}{{{{ m['content'] }}}}{after}{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"


FAMILIES = {
    "zephyr": turns("<|ROLE|>\n", "</s>\n", "<|assistant|>\n"),
    "phi 3": turns("<|ROLE|>\n", "<|end|>\n", "<|assistant|>\n"),
    "granite": turns("<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>"),
    "command r": turns(
        "<|START_OF_TURN_TOKEN|><|ROLE_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        user="USER",
        assistant="CHATBOT",
        system="SYSTEM",
    ),
    # Here only the answer closes a message.
    "falcon 3": turns("<|ROLE|>\n", "\n", "<|assistant|>\n"),
    "deepseek": turns("ROLE", "", "<｜Assistant｜>", user="<｜User｜>", assistant="<｜Assistant｜>", system=""),
    "alpaca": turns("ROLE", "\n\n", "### Response:\n", user="### Instruction:\n", assistant="### Response:\n", system=""),
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 3": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "llama 2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}"
        "{% elif m['role'] == 'user' %}<s>[INST] {% if ns.system %}<<SYS>>\n{{ ns.system }}\n<</SYS>>\n\n{% set ns.system = '' %}{% endif %}"
        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    ),
    "own marks": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "@@{{ m['role'] }}: {{ m['content'] }}@end\n{% endfor %}{% if add_generation_prompt %}@@assistant: {% endif %}"
    ),
    "gemma": (
        "<bos>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
PLAIN = ("Add 2 and 3.", "please add 2 and 3 ", "user: what is <b>1</b>?\nassistant:", "A [list] of [INST]ructions", "\n")


def tokenizer(template: str | None) -> Any:
    """An object with a chat template, which is rendered as transformers does it."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    def apply(messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        made = Environment().from_string(template or "")
        return made.render(messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=refuse)

    return SimpleNamespace(chat_template=template, apply_chat_template=apply)


def chat(template: str, contents: Sequence[str], system: str | None = None, answer: bool = True) -> str:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    return str(tokenizer(template).apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own", [True, False], ids=["its template", "no template"])
def test_the_last_message_is_what_is_routed(family: str, own: bool) -> None:
    if family == "own marks" and not own:
        pytest.skip("marks that nobody knows")
    frame = ChatFrame.of(tokenizer(FAMILIES[family] if own else None))
    systems = [None, "Answer in verse."] if "raise" not in FAMILIES[family] else [None]
    for system, before, answer, text in product(
        systems, ([], ["Hi", "Hello!"]), (True, False), ("Add 2\nand 3.", "Add 2 and 3.")
    ):
        rendered = chat(FAMILIES[family], [*before, text], system, answer)
        if family == "llama 2" and not own and system:
            continue  # the well-known marks do not know where a system message ends
        if family in ("falcon 3", "deepseek", "alpaca") and not answer:
            continue
        assert frame.message(rendered) == text, (rendered, frame.marks)
        assert frame.messages(rendered) == [*before[:1], text]


@pytest.mark.parametrize(("opener", "closer"), KNOWN)
def test_marks_of_well_known_templates(opener: str, closer: str) -> None:
    assert ChatFrame().message(f"before{opener}Hi{closer}between{opener} Add 2 {closer}after{closer}") == "Add 2"
    assert ChatFrame().message(f"before{opener}Add 2") == f"before{opener}Add 2", "it is not closed"


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "always the same", *FAMILIES.values()])
def test_plain_texts_stay(template: str | None) -> None:
    frame = ChatFrame.of(tokenizer(template))
    assert [frame.message(text) for text in PLAIN] == list(PLAIN)


def test_white_space_and_answers_are_no_message() -> None:
    frame = ChatFrame.of(tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}"))
    assert frame == ChatFrame()
    assert frame.message("please add 2 and 3 ") == "please add 2 and 3 "
    frame = ChatFrame.of(tokenizer(FAMILIES["chatml"]))
    assert frame.message(chat(FAMILIES["chatml"], ["Add 2 and 3."]) + "The sum is") == "Add 2 and 3."
