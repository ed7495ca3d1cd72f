"""The tokenizer that a recipe writes, and vocabularies that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from worlds.project import CPU, Project
from worlds.tiny import save_adapter, tensors_of
from worlds.token_words import (
    BASE,
    EMBED,
    MIX,
    OTHER,
    SPECIAL,
    THIRD,
    recipe,
    save_llama,
    save_tuned,
    save_words,
    tensors_in_memory,
)

from workbench.ground.errors import WorkbenchError
from workbench.models.identity import loaded_tokens_digest, tokenizer_digest
from workbench.models.prompts import load_tokenizer
from workbench.resolve.resolve import resolve
from workbench.vocabulary.files import configured, generation_config
from workbench.vocabulary.tokens import read_tokens
from workbench.weights.specs import load

# -- what is written


@pytest.mark.parametrize(
    ("place", "source"), [("", "union"), ("", "other"), ("tied/", "base"), ("tied/", "other"), ("tied/", "union")]
)
def test_result_loads_and_generates(words_project: Project, place: str, source: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = recipe(f"{{source: {source}}}", MIX, f"bricks: {{other: {place}other, third: {place}third}}\n")
    out = Path(words_project.run(f"base: {place}base\n{text}")["model"])
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = {"union": 305, "base": 300, "other": len(OTHER)}[source]
    assert model.config.vocab_size == rows == model.get_input_embeddings().weight.shape[0]
    assert len(tokenizer) == rows
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.temperature == 0.5
    words = "w3 w5 <eos> x0 x1" if source != "base" else "w3 w5 <eos>"
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == words.split()
    made = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (1, len(words.split()) + 3)


def test_live_model_and_record(words_project: Project) -> None:
    """In memory and on disk the same model; the run says what each model lacked."""
    from transformers import AutoModelForCausalLM

    from workbench.run.materialize import materialize

    text = recipe("{source: union}")
    run = words_project.run(text)
    live = materialize(words_project.resolve(text), CPU)
    saved = AutoModelForCausalLM.from_pretrained(run["model"])
    ids = torch.tensor([[3, 301, 304]])
    assert torch.equal(live(ids).logits, saved(ids).logits)
    record = json.loads((Path(run["run"]) / "run.json").read_text("utf-8"))["tokenizer"]
    assert record["lacking"] == {"base": 5, "other": 3, "third": 3}
    assert (record["rows"], record["tokens"]) == (305, 305)


@pytest.mark.parametrize("text", [recipe("{source: union}"), 'steps: [{grow: vocabulary, tokens: ["<a>"]}]\n'])
def test_the_tokenizer_in_the_cache_is_that_of_the_written_model(words_project: Project, text: str) -> None:
    """transformers chooses the class by the model's type, so that a recipe and its result are scored with the same tokens."""
    written, cached = Path(words_project.run(text)["model"]), words_project.resolve(text).tokenizer_path
    assert cached.parent.name == "tokenizers"
    assert tokenizer_digest(cached) == tokenizer_digest(written)
    assert loaded_tokens_digest(load_tokenizer(cached)) == loaded_tokens_digest(load_tokenizer(written))


def test_special_tokens_and_tied_bricks(words_project: Project) -> None:
    """A brick's special token is special in the union, its words are not added tokens, and text splits as before."""
    from transformers import AutoTokenizer

    path = words_project.resolve(recipe("{source: union}")).tokenizer_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert read_tokens(path, "t").added["<new>"]["special"]
    assert set(read_tokens(path, "t").added) == {*SPECIAL, "<new>"}
    assert tokenizer.tokenize("w1<new>x0 x0 xx0") == ["w1", "<new>", "x0", "x0", "<unk>"]
    ids = tokenizer("w1 <new> x0")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "w1 x0"
    # Its embeddings stand for the head that it does not have.
    found = words_project.resolve(recipe("{source: union}", MIX, "bricks: {other: tied/other, third: third}\n"))
    view = found.vocabulary.view("other")
    own = found.vocabulary.plan.own[[m.name for m in found.vocabulary.members].index("other")] >= 0
    head, embeddings = (load(view, name, torch.float32) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert own.any()
    assert torch.equal(head[own], embeddings[own])


def test_union_of_byte_pairs(tmp_path: Path, vocabularies: Path, words_project: Project) -> None:
    """A brick whose byte pairs extend the base's: the union encodes as the brick does."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = ["<unk>", "<eos>", "<pad>", *"abcdeĠ"]
    merges = [("a", "b"), ("c", "d")]

    def byte_pairs(out: Path, merges: list[tuple[str, str]], extra: Sequence[str] = ()) -> list[str]:
        words = [*letters, *extra, *("".join(m) for m in merges)]
        tokenizer = Tokenizer(BPE({w: i for i, w in enumerate(words)}, merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer.add_special_tokens(["<unk>", "<eos>", "<pad>"])
        tokenizer.add_special_tokens(["<chat>"])
        out.mkdir(exist_ok=True)
        tokenizer.save(str(out / "tokenizer.json"))
        (out / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}', "utf-8"
        )
        return [*words, "<chat>"]

    old = byte_pairs(tmp_path / "old", merges)
    base = save_llama(tmp_path / "small", old)
    new = byte_pairs(tmp_path / "new", [("c", "d"), ("a", "b"), ("ab", "cd"), ("Ġ", "abcd")])
    tuned = save_tuned(base, tmp_path / "tuned", old, new, seed=3)
    for source, target in ((tmp_path / "old", base), (tmp_path / "new", tuned)):
        for file in source.iterdir():
            shutil.copy(file, target / file.name)
    text = recipe("{source: union}", "steps: [{merge: average}]\n", "bricks: {tuned: tuned}\n")
    resolved = words_project.resolve(f"base: small\n{text}")
    union, theirs = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (resolved.tokenizer_path, tuned))
    for line in ("abcd abcd", "a<chat>abcde cd", " abab cdcd"):
        assert union.encode(line).tokens == theirs.encode(line).tokens
        assert union.decode(union.encode(line).ids) == theirs.decode(theirs.encode(line).ids)
    assert {t: union.token_to_id(t) for t in old} == {t: i for i, t in enumerate(old)}
    rows = tensors_in_memory(resolved)[EMBED]
    assert torch.equal(rows[union.token_to_id("Ġabcd")], tensors_of(tuned)[EMBED][new.index("Ġabcd")])


def test_chat_template(words_project: Project, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree((tmp_path / "other").resolve(), tmp_path / "chatty")
    save_words(tmp_path / "chatty", OTHER, template="chatty {{ messages[0]['content'] }}")
    (tmp_path / "mine.jinja").write_text("mine {{ messages[0]['content'] }}", "utf-8")
    bricks = "bricks: {other: chatty, third: third}\n"
    for block, expected in {
        "{source: union}": "w1 ",
        "{source: other}": "chatty w1",
        "{source: other, chat_template: base}": "w1 ",
        "{source: base, chat_template: other}": "chatty w1",
        "{source: union, chat_template: mine.jinja}": "mine w1",
        "{source: union, chat_template: \"{{ 'x' }}\"}": "x",
    }.items():
        path = words_project.resolve(recipe(block, MIX, bricks)).tokenizer_path
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == expected


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_only(tmp_path: Path, kind: str) -> None:
    """A directory with a SentencePiece model alone: read by way of transformers; tokens are added to what it becomes."""
    from transformers import AutoTokenizer

    from workbench.vocabulary.files import Addition, write_tokenizer

    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("a word and another word, and many more words in some order\n" * 20, "utf-8")
    path = tmp_path / kind
    path.mkdir()
    file = path / ("tokenizer" if kind == "bpe" else "spiece")
    spm.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(file), vocab_size=50, model_type=kind,
                                   hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    (path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    name = "LlamaTokenizer" if kind == "bpe" else "T5Tokenizer"
    (path / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{name}", "eos_token": "</s>"}}', "utf-8")
    tokens, plain = read_tokens(path, "t"), AutoTokenizer.from_pretrained(path)
    assert tokens.ids == plain.get_vocab()
    first = max(tokens.ids.values()) + 1
    additions = [Addition("<x>", first, {"special": True}), Addition("▁piece", first + 1)]
    write_tokenizer(tmp_path / "out", path, additions, [], None, {}, None)
    (tmp_path / "out" / "tokenizer.json").unlink()  # a file that was lost is written again
    write_tokenizer(tmp_path / "out", path, additions, [], None, {}, None)
    union = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "another order, some words"
    assert union(text)["input_ids"] == plain(text)["input_ids"]
    assert union.convert_tokens_to_ids(["<x>", "▁piece"]) == [first, first + 1]
    assert "<x>" in union.tokenize("a word<x>and")
    assert not list((tmp_path / "out").glob("*.model"))


# -- without the block, and errors


def test_without_the_block(words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """Sizes, the first tokens that differ, and the block to add."""
    save_tuned(vocabularies / "base", tmp_path / "more", BASE, [*BASE[:-1], "x1", "y0"], seed=1)
    with pytest.raises(WorkbenchError) as caught:
        words_project.resolve("bricks: {more: more, third: third}\nsteps: [{merge: average}]\n")
    assert caught.value.message.splitlines()[0] == (
        "brick 'more': its vocabulary differs from the base's: model.embed_tokens.weight has 301 rows for 301 tokens, "
        "the base's 300 for 300 tokens; 2 tokens that the base lacks ('x1' 299, 'y0' 300); 1 token of the base missing ('w296' 299)"
    )
    assert "`tokenizer: {source: union}`" in str(caught.value.hint)
    words = [*BASE[:3], *reversed(BASE[3:])]
    save_tuned(vocabularies / "base", tmp_path / "turned", BASE, words, seed=1)
    with pytest.raises(WorkbenchError, match=r"300 rows each, but 296? tokens at other ids \('w296' is 3, in the base 299"):
        words_project.resolve("bricks: {turned: turned}\nsteps: [{merge: average}]\n")
    save_tuned(vocabularies / "base", tmp_path / "renamed", BASE, [*BASE[:-1], "<im_start>"], seed=1)
    warned = words_project.resolve("bricks: {renamed: renamed}\nsteps: [{merge: average}]\n").warnings
    assert "1 token that the base lacks ('<im_start>' 299); 1 token of the base missing ('w296' 299)" in warned[0]


def test_added_tokens_are_kept_without_the_block(words_project: Project) -> None:
    """As with `tokenizer: {source: union}`, bit for bit; the plan says so, and controls have the same rows."""
    text = "bricks: {third: third}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\n"
    resolved = words_project.resolve(text)
    explicit = words_project.resolve(
        recipe("{source: union}", "steps: [{merge: task_arithmetic, lambda: 0.5}]\n", "bricks: {third: third}\n")
    )
    assert resolved.key == explicit.key
    ours, theirs = tensors_in_memory(resolved), tensors_in_memory(explicit)
    assert ours[EMBED].shape[0] == 302
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert resolved.warnings[0].startswith(
        "brick 'third' has 2 tokens that the base lacks ('x1' 300, 'y0' 301): their rows are kept"
    )
    assert resolve(resolved.recipe.derive("base", [])).base.config["vocab_size"] == 302


def test_adapter_with_another_tokenizer(words_project: Project, vocabularies: Path, tmp_path: Path) -> None:
    """Extra tokens are a warning, a head trained on moved tokens is refused, and `source: adapter` takes its template."""
    save_adapter(vocabularies / "base", tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    save_words(tmp_path / "adapter", [*BASE, "<im_start>"], template="hi")
    steps = "steps: [{merge: task_arithmetic}]\n"
    warned = words_project.resolve(f"bricks: {{adapter: adapter}}\n{steps}").warnings
    assert "1 token that the base lacks ('<im_start>' 300)" in warned[0]
    with pytest.raises(WorkbenchError, match="no model has a row for '<im_start>'"):
        words_project.resolve(recipe("{source: adapter}", steps, "bricks: {adapter: adapter}\n"))
    block = "{source: adapter, tokens: {<im_start>: {source: {model: base, token: <eos>}}}}"
    resolved = words_project.resolve(recipe(block, steps, "bricks: {adapter: adapter}\n"))
    assert torch.equal(tensors_in_memory(resolved)[EMBED][300], tensors_of(vocabularies / "base")[EMBED][1])
    assert resolved.base.config["eos_token_id"] == 1
    save_words(tmp_path / "adapter", OTHER)
    with pytest.raises(WorkbenchError, match="the tokenizer in its directory differs from the base's: 297 tokens at other ids"):
        words_project.resolve(f"bricks: {{adapter: adapter}}\n{steps}")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{source: otter}", "found 'otter'. Did you mean 'other'?"),
        ("{sauce: union}", "sauce"),
        ("{source: union, tokens: {w1: {source: thirt}}}", "found 'thirt'. Did you mean"),
        ("{source: union, tokens: {w1: {source: {model: other, token: w999}}}}", "other has no token 'w999'"),
        ("{source: union, tokens: {w1: {source: {model: other, token_id: 999}}}}", "token_id 999, but other has 302 rows"),
        ("{source: union, tokens: {w1: {source: {model: other}}}}", "exactly one of token, token_id"),
        ("{source: union, tokens: {y0: {source: other}}}", "other has no token 'y0'"),
        ("{source: union, tokens: {fresh: {force: true}}}", "no model has a row for 'fresh'"),
        ("{source: union, tokens: {fresh: {source: mean}}}", "source mean, but no model has the token"),
        ("{source: union, pad_to_multiple_of: 0}", "pad_to_multiple_of"),
        ("{source: union, chat_template: orther}", "Did you mean 'other'?"),
        ("{source: union, chat_template: none.jinja}", "none.jinja does not exist"),
    ],
)
def test_errors(words_project: Project, block: str, message: str) -> None:
    with pytest.raises(WorkbenchError) as caught:
        words_project.resolve(recipe(block))
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_bricks_without_a_tokenizer_and_adapters_of_a_larger_vocabulary(
    words_project: Project, vocabularies: Path, tmp_path: Path
) -> None:
    """With the base's number of rows it is taken to have the base's, with a warning; else refused."""
    for name in ("other", "third"):
        shutil.copytree(vocabularies / name, tmp_path / f"bare-{name}")
        (tmp_path / f"bare-{name}" / "tokenizer.json").unlink()
    save_tuned(vocabularies / "base", tmp_path / "same", BASE, BASE, seed=6)
    (tmp_path / "same" / "tokenizer.json").unlink()
    warned = words_project.resolve(recipe("{source: union}", MIX, "bricks: {other: same, third: third}\n")).warnings
    assert "the base's is assumed" in "".join(warned)
    with pytest.raises(WorkbenchError, match="it has 302 vocabulary rows, the base 300, and there is no tokenizer in"):
        words_project.resolve(recipe("{source: union}", MIX, "bricks: {other: other, third: bare-third}\n"))
    # An adapter on a head that the base does not have is refused, with the way to use it.
    larger = save_llama(tmp_path / "larger", THIRD)
    save_adapter(larger, tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    save_words(tmp_path / "adapter", THIRD)
    with pytest.raises(WorkbenchError, match=r"lm_head.weight is \[300, 32\] in the base, .* \[302, 4\]") as caught:
        words_project.resolve("bricks: {adapter: adapter}\nsteps: [{merge: task_arithmetic}]\n")
    assert "whole (save_embedding_layers=True)" in str(caught.value.hint)


def test_configuration_and_generation_follow_the_choice(tmp_path: Path) -> None:
    """Rows and special ids, also in the text model's part; an id that the chosen tokenizer does not have is null."""
    config = {"vocab_size": 9, "eos_token_id": 1, "pad_token_id": 2, "x": 1, "text_config": {"vocab_size": 9, "eos_token_id": 1}}
    assert configured(config, None, 9) == config
    assert configured(config, {"eos_token_id": [4, 5], "bos_token_id": 0}, 12) == {
        "vocab_size": 12, "eos_token_id": [4, 5], "pad_token_id": None, "x": 1,
        "text_config": {"vocab_size": 12, "eos_token_id": [4, 5], "bos_token_id": 0},
    }  # fmt: skip
    assert configured({"text_config": {"vocab_size": 9}}, None, 12) == {"text_config": {"vocab_size": 12}}
    # Sampling stays the base's, ids become the choice's, other ids of the base's vocabulary go.
    base, chosen = tmp_path / "base", tmp_path / "chosen"
    for path, data in (
        (base, {"temperature": 0.5, "eos_token_id": 1, "suppress_tokens": [3]}),
        (chosen, {"eos_token_id": [7, 8]}),
    ):
        path.mkdir()
        (path / "generation_config.json").write_text(json.dumps(data), "utf-8")
    ids = {"eos_token_id": 7, "pad_token_id": 0}
    assert generation_config(base, chosen, ids) == {"temperature": 0.5, "eos_token_id": [7, 8], "pad_token_id": 0}
    (chosen / "generation_config.json").unlink()
    assert generation_config(base, chosen, ids) == {"temperature": 0.5, **ids}
    assert generation_config(base, base, {})["suppress_tokens"] == [3]


def test_tokens_beside_the_file(tmp_path: Path) -> None:
    """Tokens that tokenizer_config.json adds count, at ids that are free; rows decide which tokens a model has."""
    save_words(tmp_path, ["<unk>", "<eos>", "<pad>", "w0"])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["added_tokens_decoder"] = {"4": {"content": "<late>", "special": True}, "0": {"content": "<clash>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    tokens = read_tokens(tmp_path, "t")
    assert tokens.ids == {"<unk>": 0, "<eos>": 1, "<pad>": 2, "w0": 3, "<late>": 4}
    assert tokens.below(4) == {"<unk>": 0, "<eos>": 1, "<pad>": 2, "w0": 3}
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(WorkbenchError, match="is not a tokenizer"):
        read_tokens(tmp_path, "t")


def test_a_large_tokenizer_that_changes_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = []
    for token in ("one", "two", "one"):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"padding": token, "tokens": [token] * 20_000}))
        seen.append(tokenizer_digest(tmp_path))
    assert (seen[0] == seen[2], seen[0] == seen[1], len(list(tmp_path.glob("cache/*/tokenizers/*")))) == (True, False, 2)
