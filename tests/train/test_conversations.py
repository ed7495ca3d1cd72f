"""Conversations as training rows: tokens and learned tokens beside transformers' own masks, splits, data sets, bad rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import edit_json
from worlds.train_world import lora

from workbench.ground.errors import WorkbenchError
from workbench.models.texts import read_texts
from workbench.train import run
from workbench.train.rows import encode_row
from workbench.train.run import TrainFiles, train
from workbench.train.spec import HubData, TrainSpec
from workbench.train.texts import rows_digest, training_texts

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}say a then "
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}\n{% else %}say {{ m.content }} is\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}say a then {% endif %}"
)
TALK = [
    {"role": "system", "content": "c c"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "b a"},
    {"role": "user", "content": "d c"},
    {"role": "assistant", "content": "c d d"},
]
TOOLS = [{"type": "function", "function": {"name": "c", "parameters": {"properties": {"x": {"type": "string"}}}}}]
CALL = {"type": "function", "function": {"name": "c", "arguments": {"x": "d"}}}
WITH_TOOLS = (
    "{% for t in tools or [] %}say {{ t.function.name }} {% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}then "
    "{% generation %}{{ m.content }}{% for call in m.tool_calls or [] %} back {{ call.function.name }} {{ call.function.arguments.x }}"
    "{% endfor %}<eos>{% endgeneration %}\n{% elif m.role == 'tool' %}back {{ m.content }}\n{% else %}say {{ m.content }} is\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}then {% endif %}"
)


def asking(*calls: Any) -> dict[str, Any]:
    """An answer that is tool calls alone."""
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


ASKED = [TALK[1], asking(CALL, CALL), {"role": "tool", "content": "d d", "tool_call_id": "1"}, TALK[2]]


def tokenizer_of(base: Path, template: str | None = TEMPLATE) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.chat_template = template
    return tokenizer


def rows_of(folder: Path, *rows: Any) -> Path:
    write_jsonl(folder / "talks.jsonl", list(rows))
    return folder / "talks.jsonl"


def test_each_answer_is_learned_as_transformers_masks_it(base: Path, tmp_path: Path) -> None:
    """The reference is the assistant mask of `apply_chat_template` on the conversation up to the answer."""
    tokenizer = tokenizer_of(base)
    texts = read_texts(rows_of(tmp_path, {"messages": TALK, "id": 7}), "talks.jsonl", chat=True)
    assert [text.answer for text in texts] == ["b a", "c d d"]
    for text, length in zip(texts, (3, 5), strict=True):
        whole = tokenizer.apply_chat_template(TALK[:length], return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
        ids, learned = encode_row(tokenizer, text, 64)
        mask = whole["assistant_masks"]
        last = len(mask) - mask[::-1].index(1)  # the template's end of line has no token of this tokenizer
        first = last - (mask[:last][::-1].index(0) if 0 in mask[:last] else last)
        assert ids == whole["input_ids"][:last]
        assert ids[-learned:] == whole["input_ids"][first:last]
        assert ids[: len(ids) - learned] == tokenizer.apply_chat_template(
            TALK[: length - 1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids[-1] == tokenizer.eos_token_id
        assert encode_row(tokenizer, text, 64, learn_end=False) == (ids[:-1], learned - 1)


def test_tool_calls_are_learned_as_transformers_masks_them(base: Path, tmp_path: Path) -> None:
    """Arguments may be objects, or their JSON as OpenAI writes them; tools may be a list or its JSON."""
    tokenizer = tokenizer_of(base, WITH_TOOLS)
    as_text = {"function": {**CALL["function"], "arguments": '{"x": "d"}'}}  # type: ignore[dict-item]
    rows = [
        {"messages": ASKED, "tools": TOOLS},
        {"messages": [TALK[1], asking(as_text, CALL), *ASKED[2:]], "tools": json.dumps(TOOLS)},
    ]
    texts = read_texts(rows_of(tmp_path, *rows), "talks.jsonl", chat=True)
    assert len(texts) == 4
    for text, length in zip(texts, (2, 4, 2, 4), strict=True):
        heard = {"tools": TOOLS, "tokenize": True}
        whole = tokenizer.apply_chat_template(
            [m | {"content": m["content"] or ""} for m in ASKED[:length]],
            return_dict=True,
            return_assistant_tokens_mask=True,
            **heard,
        )
        ids, learned = encode_row(tokenizer, text, 64)
        last = max(i for i, mark in enumerate(whole["assistant_masks"]) if mark)
        answer = tokenizer.convert_ids_to_tokens(ids[-learned:])
        assert ids == whole["input_ids"][: last + 1]
        assert answer == (["back", "c", "d", "back", "c", "d", "<eos>"] if length == 2 else ["b", "a", "<eos>"])
        assert whole["assistant_masks"][last + 1 - learned : last + 1] == [1] * learned
        assert whole["assistant_masks"][last - learned] == 0
        assert encode_row(tokenizer, text, 64, learn_end=False) == (ids[:-1], learned - 1)
    other = read_texts(rows_of(tmp_path, {"messages": ASKED}), "talks.jsonl", chat=True)
    assert len({rows_digest(texts[:2]), rows_digest(other)}) == 2, "tools are a part of the digest"
    open_ended = tokenizer_of(base, WITH_TOOLS.replace("<eos>", ""))
    assert encode_row(open_ended, texts[0], 64)[0][-3:] == open_ended.convert_tokens_to_ids(["c", "d", "<eos>"])


@pytest.mark.parametrize(
    ("heard", "says"),
    [
        ("tools or []", "talks.jsonl:1: the base's chat template leaves out 'tools'"),
        ("m.tool_calls or []", "leaves out 'tool_calls'"),
        ("{{ m.content }}\n{% else", "leaves out messages of the role 'tool'"),
    ],
)
def test_a_template_without_tools_is_refused_before_the_base_is_loaded(base: Path, tmp_path: Path, heard: str, says: str) -> None:
    deaf = tmp_path / "base"
    shutil.copytree(base, deaf)
    assert WITH_TOOLS.count(heard) == 1
    tokenizer_of(
        base, WITH_TOOLS.replace(heard, heard.replace("{{ m.content }}", "") if "else" in heard else "[]")
    ).save_pretrained(deaf)
    (deaf / "model.safetensors").unlink()
    talk = [TALK[1], {**asking(CALL), "content": "b"}, *ASKED[2:]]
    data = rows_of(tmp_path, {"messages": talk, "tools": TOOLS})
    with pytest.raises(WorkbenchError, match=says):
        train(lora(data=data.name), TrainFiles(deaf, data, tmp_path / "brick"))


def test_an_answer_that_the_template_does_not_end_gets_the_end_of_sequence(base: Path, tmp_path: Path) -> None:
    open_ended = "{% for m in messages %}say {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}say {% endif %}"
    tokenizer = tokenizer_of(base, open_ended)
    text = read_texts(rows_of(tmp_path, {"messages": TALK[1:3]}), "talks.jsonl", chat=True)[0]
    ids, learned = encode_row(tokenizer, text, 64)
    assert tokenizer.convert_ids_to_tokens(ids[-learned:]) == ["b", "a", "<eos>"]
    assert encode_row(tokenizer, text, 64, learn_end=False) == (ids[:-1], learned - 1)


def test_turns_of_one_conversation_are_held_out_together(tmp_path: Path) -> None:
    """A share is drawn by what comes before the first answer, so that no part of a held-out conversation is trained on."""
    talks = [[*TALK[:1], {"role": "user", "content": f"{one} {two}"}, *TALK[2:]] for one in "abcd" for two in "abcd"]
    path = rows_of(tmp_path, *({"messages": talk} for talk in talks))
    found = training_texts(TrainSpec(data=path.name, held_out=0.3), path, tmp_path)
    assert len(found.trained) + len(found.held_out) == 2 * len(talks)
    assert found.held_out

    def openings(texts: Any) -> set[Any]:
        return {text.messages[:2] for text in texts}

    assert not openings(found.trained) & openings(found.held_out)


def test_a_brick_is_trained_on_conversations(base: Path, tmp_path: Path) -> None:
    """The loss on the answers falls; rows of prompts may stand beside conversations."""
    chat = tmp_path / "chat-base"
    shutil.copytree(base, chat)
    tokenizer_of(base).save_pretrained(chat)
    talks = [
        {"messages": [{"role": "user", "content": f"{one} {two}"}, {"role": "assistant", "content": f"{two} {one}"}]}
        for one in "abcd"
        for two in "abcd"
    ]
    data = rows_of(tmp_path, *talks, {"prompt": "say a is", "completion": "a"})
    record = train(lora(data=data.name, held_out=0.2), TrainFiles(chat, data, tmp_path / "brick"))
    losses = record["held_out_loss"]
    assert losses["after"] < losses["before"]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The keys of the saves of trainings, in order."""
    found: list[str | None] = []
    real = run.open_saves
    monkeypatch.setattr(run, "open_saves", lambda out, key, notice: (found.append(key), real(out, key, notice))[1])
    return found


def test_an_interrupted_training_does_not_go_on_with_another_template(base: Path, tmp_path: Path, keys: list[str | None]) -> None:
    """The key of saves has the tokens of conversations; it does not depend on the template where rows are prompts."""
    rows = {"talks": {"messages": TALK[1:3]}, "rows": {"prompt": "say a is", "completion": "a"}}
    for name, row in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        for number, template in enumerate((TEMPLATE, TEMPLATE.replace("say a then", "say c then"))):
            chat = tmp_path / f"{name}-{number}"
            shutil.copytree(base, chat)
            tokenizer_of(base, template).save_pretrained(chat)
            spec = lora(data=f"{name}.jsonl", steps=2, warmup=0, save_every=1)
            train(spec, TrainFiles(chat, tmp_path / f"{name}.jsonl", tmp_path / f"brick-{name}-{number}"))
    assert None not in keys
    assert keys[0] != keys[1]
    assert keys[2] == keys[3]


def test_an_interrupted_training_does_not_go_on_with_another_model(base: Path, tmp_path: Path, keys: list[str | None]) -> None:
    """The key of saves covers config.json and the tokenizer, as well as the tensors."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "say a is", "completion": "a"}])
    for name in ("first", "again", "config", "tokens"):
        own = shutil.copytree(base, tmp_path / name)
        if name == "config":
            edit_json(own / "config.json", rms_norm_eps=0.01)
        elif name == "tokens":
            edit_json(own / "tokenizer.json", normalizer={"type": "Lowercase"})
        spec = lora(data="rows.jsonl", steps=2, warmup=0, save_every=1)
        train(spec, TrainFiles(own, tmp_path / "rows.jsonl", tmp_path / f"brick-{name}"))
    assert None not in keys
    assert keys[0] == keys[1]
    assert len({*keys}) == 3


def test_a_column_of_a_data_set_holds_conversations(tmp_path: Path) -> None:
    from datasets import Dataset

    path = rows_of(tmp_path, {"talk": TALK}, {"talk": TALK[:3]})
    source = HubData(hub=path.name, messages="talk")
    found = training_texts(TrainSpec(data=source), path, tmp_path)
    assert [text.answer for text in found.trained] == ["b a", "c d d", "b a"]
    assert found.trained[0].place == "talks.jsonl train row 0"
    assert not {"messages", "tools"} & HubData(hub="x").model_dump().keys(), "keys of earlier trainings stay"
    assert "tools" not in HubData(hub="x", messages="talk").model_dump()
    other = {"function": {"name": "b", "arguments": {"y": "a"}}}
    path = tmp_path / "talks.parquet"  # whose structs have every key of every row
    Dataset.from_list([{"talk": ASKED, "can": TOOLS}, {"talk": [TALK[1], asking(other)], "can": []}]).to_parquet(path)
    with_tools = training_texts(TrainSpec(data=HubData(hub=path.name, messages="talk", tools="can")), path, tmp_path).trained
    assert [text.messages[-1].fields().get("tool_calls") for text in with_tools] == [[CALL, CALL], None, [other]], (
        "no nulls of others"
    )
    assert [json.loads(text.tools or "[]") for text in with_tools] == [TOOLS, TOOLS, []]
    with pytest.raises(ValueError, match="tools: requires messages"):
        HubData(hub=path.name, tools="can")
    with pytest.raises(WorkbenchError, match="no column 'talks'"):
        training_texts(TrainSpec(data=HubData(hub=path.name, messages="talks")), path, tmp_path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": TALK[:2]}, "talks.jsonl:1: the conversation has no answer"),
        ({"messages": TALK[2:]}, "begins with an answer"),
        ({"messages": []}, "expected a list of messages in 'messages', found an empty list"),
        ({"messages": "a b"}, "found str"),
        ({"messages": ["a"]}, "message 1: expected an object with role and content, found str"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "message 1: expected a role of"),
        (
            {"messages": [TALK[1], {"role": "assistant", "content": " "}]},
            "message 2: expected a text in 'content', found an empty text",
        ),
        ({"messages": [{**TALK[1], "tool_calls": [CALL]}, TALK[2]]}, "message 1: the field 'tool_calls' is not read"),
        ({"messages": [TALK[1], {**TALK[2], "name": "a"}]}, "message 2: the field 'name' is not read"),
        (
            {"messages": [TALK[1], {"role": "assistant", "tool_calls": []}]},
            "message 2: expected a text in 'content', found nothing",
        ),
        ({"messages": [TALK[1], {"role": "assistant", "tool_calls": CALL}]}, "expected a list of calls"),
        ({"messages": [TALK[1], asking({"name": "c"})]}, "expected a list of calls in 'tool_calls', found .*name"),
        ({"messages": [TALK[1], asking({"function": {"name": "c", "arguments": [1]}})]}, "'arguments', found list"),
        ({"messages": [TALK[1], asking({"function": {"name": "c", "arguments": "{x"}})]}, "talks.jsonl:1: message 2: arguments"),
        ({"messages": TALK, "tools": ["c"]}, "talks.jsonl:1: expected a list of functions in 'tools', found .*c"),
        ({"messages": TALK, "tools": {"name": "c"}}, "expected a list of functions in 'tools'"),
        ({"messages": TALK, "tools": "[{"}, "talks.jsonl:1: tools"),
        ({"messages": TALK, "completion": "a"}, "both 'messages' and 'completion'"),
    ],
)
def test_bad_conversations(tmp_path: Path, row: Any, says: str) -> None:
    path = rows_of(tmp_path, row)
    with pytest.raises(WorkbenchError, match=says):
        training_texts(TrainSpec(data=path.name), path, tmp_path)


def test_conversations_need_a_template_that_words_them(base: Path, tmp_path: Path) -> None:
    text = read_texts(rows_of(tmp_path, {"messages": TALK}), "talks.jsonl", chat=True)[1]
    for template, says in (
        (None, "no chat template"),
        (
            "{{ raise_exception('no system message, please') }}",
            "talks.jsonl:1: the chat template refuses the messages: no system",
        ),
        ("{{ messages | length }} says", "words the messages in another way"),
    ):
        with pytest.raises(WorkbenchError, match=says):
            encode_row(tokenizer_of(base, template), text, 64)
    with pytest.raises(WorkbenchError, match="more than max_length 8"):
        encode_row(tokenizer_of(base), text, 8)


def test_readers_without_a_template_refuse_conversations(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="read where a model is trained"):
        read_texts(rows_of(tmp_path, {"messages": TALK}), "talks.jsonl")


def test_another_chat_template_is_another_key(project: Project) -> None:
    """The template words the rows, so it is part of the key of a step that trains on conversations, and of no other step's."""
    talk = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    write_jsonl(project.path / "talks.jsonl", [talk])
    write_jsonl(project.path / "rows.jsonl", [{"prompt": "w1", "completion": "w2"}])
    recipes = {
        "chat": "steps: [{grow: brick, data: talks.jsonl}]\n",
        "column": "steps: [{grow: brick, data: {hub: talks.jsonl, messages: messages}}]\n",
        "grown": "steps: [{grow: depth, blocks: 1, train: {data: talks.jsonl}}]\n",
        "rows": "steps: [{grow: brick, data: rows.jsonl}]\n",
    }

    def keys() -> dict[str, str]:
        return {name: project.resolve(text, f"{name}.yaml").key for name, text in recipes.items()}

    base = project.path / "base"
    shared = base.resolve()
    base.unlink()
    shutil.copytree(shared, base)
    before = keys()
    file = next((project.path / "base").glob("*.jinja"))
    file.write_text(file.read_text("utf-8") + " ", "utf-8")
    after = keys()
    assert {name for name in recipes if before[name] != after[name]} == {"chat", "column", "grown"}
