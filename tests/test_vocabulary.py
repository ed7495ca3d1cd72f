"""Bricks with other vocabularies: rows aligned by token, the tokenizer that is written, agreement with mergekit, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from project import CPU, Project
from tiny import CHAT_TEMPLATE, config, edit_json, save_adapter, tensors_of
from torch import Tensor

import workbench.weights.rows as rows_module
from workbench.errors import WorkbenchError
from workbench.resolve import Resolved
from workbench.vocabulary.tokens import read_tokens
from workbench.weights.specs import load

SPECIAL = ["<unk>", "<eos>", "<pad>"]
BASE = [*SPECIAL, *(f"w{i}" for i in range(297))]
# The base's words in another order, two of them missing, four others instead.
OTHER = ["<unk>", "<new>", *(f"w{i}" for i in reversed(range(295))), "<eos>", "<pad>", "x0", "x1", "x2"]
THIRD = [*BASE, "x1", "y0"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_words(out: Path, words: Sequence[str], eos: str = "<eos>", template: str = CHAT_TEMPLATE) -> None:
    """A tokenizer of whole words; those in angle brackets are special added tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in words if w.startswith("<")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>", pad_token="<pad>")
    fast.chat_template = template
    fast.save_pretrained(out)


def save_llama(
    out: Path, words: Sequence[str], *, tied: bool = False, rows: int | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """A random llama with so many rows, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = config("llama" if tied else "llama_untied", layers=2)
    settings.vocab_size = rows or len(words)
    settings.eos_token_id, settings.pad_token_id = list(words).index("<eos>"), list(words).index("<pad>")
    model = AutoModelForCausalLM.from_config(settings)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.to(dtype).save_pretrained(out)
    save_words(out, words)
    return out


def save_tuned(base: Path, out: Path, old: Sequence[str], words: Sequence[str], *, seed: int, rows: int | None = None,
               noise: float = 0.05, **settings: Any) -> Path:  # fmt: skip
    """A fine-tune of a base with other words: the rows of words that the base has lie near the base's."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in tensors_of(base).items():
        values = tensor.float()
        if name in (EMBED, HEAD):
            moved = torch.randn(rows or len(words), values.shape[1], generator=generator) * 0.2
            for i, word in enumerate(words):
                if word in old:
                    moved[i] = values[list(old).index(word)]
            values = moved
        tensors[name] = (values + noise * torch.randn(values.shape, generator=generator)).to(tensor.dtype).contiguous()
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", out / "config.json")
    edit_json(out / "config.json", vocab_size=rows or len(words), eos_token_id=list(words).index("<eos>"),
              pad_token_id=list(words).index("<pad>"))  # fmt: skip
    save_words(out, words, **settings)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32: base, other, third (untied) and tied/…, the same with tied embeddings."""
    top = tmp_path_factory.mktemp("vocabularies")
    for place, tied in ((top, False), (top / "tied", True)):
        base = save_llama(place / "base", BASE, tied=tied)
        save_tuned(base, place / "other", BASE, OTHER, seed=1)
        save_tuned(base, place / "third", BASE, THIRD, seed=2)
    return top


@pytest.fixture
def project(tmp_path: Path, models: Path) -> Project:
    """A project on them."""
    (tmp_path / "recipes").mkdir()
    for name in ("base", "other", "third", "tied"):
        (tmp_path / name).symlink_to(models / name)
    return Project(tmp_path)


TWO = "bricks: {other: other, third: third}\n"
MIX = "steps: [{merge: task_arithmetic, bricks: {other: 0.6, third: 0.7}, lambda: 0.9}]\n"


def recipe(block: str, steps: str = MIX, bricks: str = TWO) -> str:
    return f"{bricks}tokenizer: {block}\n{steps}"


def by_token(tensor: Tensor, tokens: dict[str, int]) -> dict[str, Tensor]:
    return {token: tensor[i] for token, i in tokens.items()}


def input_rows(models: Path, name: str, tensor: str = EMBED) -> dict[str, Tensor]:
    return by_token(tensors_of(models / name)[tensor].float(), read_tokens(models / name, name).ids)


# -- mergekit


def mergekit_rows(project: Project, place: str, method: str, tokenizer: dict[str, Any], parameters: dict[str, Any],
                  weights: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, int]]:  # fmt: skip
    """mergekit's own merge in float32: tensors, and ids of its tokens."""
    run = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    at = project.path / place

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: named(v) for k, v in value.items()}
        return str(at / value) if value in ("other", "third") or (value == "base" and (at / "base").is_dir()) else value

    source = tokenizer.get("source")
    block = named(tokenizer) | {"source": source if source in ("base", "union") else str(at / str(source))}
    if method == "linear":
        weights = {"base": 0.0, **weights}  # it wants one for the base too
    data = {"merge_method": method, "base_model": str(at / "base"), "dtype": "float32", "parameters": parameters, "tokenizer": block,
            "models": [{"model": str(at / n), "parameters": {"weight": w}} for n, w in weights.items()]}  # fmt: skip
    out = project.path / "mergekit"
    run.run_merge(MergeConfiguration.model_validate(data), str(out), MergeOptions(quiet=True))
    return tensors_of(out), read_tokens(out, "mergekit").ids


MERGES = {
    "task_arithmetic": ({"lambda": 0.9}, MIX),
    "linear": ({"normalize": True}, "steps: [{merge: linear, bricks: {other: 0.6, third: 0.7}}]\n"),
    "ties": (
        {"density": 0.5, "lambda": 0.9, "normalize": True},
        "steps: [{merge: ties, bricks: {other: 0.6, third: 0.7}, density: 0.5, lambda: 0.9, weigh: before, divide: weight}]\n",
    ),
}


@pytest.mark.parametrize(
    ("method", "source", "place"),
    [
        ("task_arithmetic", "union", "."),
        ("task_arithmetic", "base", "."),
        ("task_arithmetic", "other", "."),
        ("linear", "union", "."),
        ("linear", "other", "tied"),
        ("ties", "union", "."),
        ("ties", "base", "tied"),
    ],
)
def test_mergekit(project: Project, method: str, source: str, place: str) -> None:
    parameters, steps = MERGES[method]
    theirs, their_ids = mergekit_rows(project, place, method, {"source": source}, parameters, {"other": 0.6, "third": 0.7})
    prefix = "" if place == "." else f"{place}/"
    text = recipe(f"{{source: {source}}}", steps, f"bricks: {{other: {prefix}other, third: {prefix}third}}\n")
    resolved = project.resolve(f"base: {prefix}base\n{text}")
    ours = tensors_in_memory(resolved)
    ids = read_tokens(resolved.tokenizer_path, "ours").ids
    assert set(ids) == set(their_ids)
    assert set(ours) == set(theirs) - ({HEAD} if place == "tied" else set())
    for name in ours:
        mine, other = ours[name], theirs[name]
        if name in (EMBED, HEAD):
            mine, other = (torch.stack([t[table[token]] for token in ids]) for t, table in ((mine, ids), (other, their_ids)))
        assert float((mine - other).abs().max()) <= 1e-6, name


def test_mergekit_rules(project: Project) -> None:
    """Zero, another token's row, force, a token that nobody had, and rows rounded up."""
    theirs, their_ids = mergekit_rows(
        project, ".", "task_arithmetic",
        {"source": "union", "pad_to_multiple_of": 64, "tokens": {
            "x0": {"source": {"kind": "zero"}},
            "x1": {"source": {"kind": "model_token", "model": "third", "token": "w5"}},
            "w7": {"source": "other", "force": True},
            "w8": {"source": {"kind": "zero"}, "force": True},
            "fresh": {"source": {"kind": "model_token", "model": "base", "token_id": 11}},
        }},
        {"lambda": 0.9}, {"other": 0.6, "third": 0.7})  # fmt: skip
    resolved = project.resolve(
        recipe(
            "{source: union, pad_to_multiple_of: 64, tokens: {x0: {source: zero}, x1: {source: {model: third, token: w5}}, "
            "w7: {source: other, force: true}, w8: {source: zero, force: true}, fresh: {source: {model: base, token_id: 11}}}}"
        )
    )
    ours, ids = tensors_in_memory(resolved), read_tokens(resolved.tokenizer_path, "ours").ids
    assert len(ours[EMBED]) == len(theirs[EMBED]) == 320
    assert set(ids) == set(their_ids)
    for token in ids:
        assert float((ours[EMBED][ids[token]] - theirs[EMBED][their_ids[token]]).abs().max()) <= 1e-6, token
    assert float((ours[HEAD][len(ids) :] - theirs[HEAD][len(ids) :]).abs().max()) <= 1e-6  # padding


def tensors_in_memory(resolved: Resolved, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    from workbench.compose import compose, compute

    return compute(compose(resolved, CPU).model, dtype, CPU)


# -- rows by hand


def test_union_rows(project: Project, models: Path) -> None:
    """A token of the base, of one brick, of two bricks: base + Σwτ over the bricks that have it, the owner's row, the mean."""
    resolved = project.resolve(recipe("{source: union}"))
    ids = read_tokens(resolved.tokenizer_path, "t").ids
    assert {t: ids[t] for t in BASE} == {t: i for i, t in enumerate(BASE)}
    assert [t for t in ids if t not in BASE] == ["<new>", "x0", "x1", "x2", "y0"] or sorted(set(ids) - set(BASE)) == [
        "<new>", "x0", "x1", "x2", "y0"]  # fmt: skip
    for tensor in (EMBED, HEAD):
        rows = by_token(tensors_in_memory(resolved)[tensor], ids)
        base, other, third = (input_rows(models, n, tensor) for n in ("base", "other", "third"))
        assert torch.allclose(
            rows["w3"], base["w3"] + 0.9 * (0.6 * (other["w3"] - base["w3"]) + 0.7 * (third["w3"] - base["w3"])), atol=1e-6
        )
        assert torch.allclose(rows["w296"], base["w296"] + 0.63 * (third["w296"] - base["w296"]), atol=1e-6)  # other lacks it
        assert torch.equal(rows["x0"], other["x0"])
        assert torch.equal(rows["y0"], third["y0"])
        mean = (other["x1"] + third["x1"]) / 2
        expected = mean + 0.9 * (0.6 * (other["x1"] - mean) + 0.7 * (third["x1"] - mean))
        assert torch.allclose(rows["x1"], expected, atol=1e-6)


def test_order_of_vocabulary_does_not_matter(project: Project, models: Path, tmp_path: Path) -> None:
    """A brick whose vocabulary is the base's in another order, with its rows moved along, merges to the same bits."""
    from safetensors.torch import save_file

    straight = save_tuned(models / "base", tmp_path / "straight", BASE, BASE, seed=5)
    shuffled = shutil.copytree(straight, tmp_path / "shuffled")
    order = np.random.default_rng(0).permutation(len(BASE))
    tensors = tensors_of(straight)
    save_file(
        {n: t[torch.from_numpy(order)].contiguous() if n in (EMBED, HEAD) else t for n, t in tensors.items()},
        shuffled / "model.safetensors",
    )
    words = [BASE[i] for i in order]
    save_words(shuffled, words)
    edit_json(shuffled / "config.json", eos_token_id=words.index("<eos>"), pad_token_id=words.index("<pad>"))
    for method in ("average", "ties", "task_arithmetic"):
        text = f"steps: [{{merge: {method}}}]\n"
        expected = project.tensors(f"bricks: {{one: straight}}\n{text}")
        found = project.tensors(recipe("{source: base}", text, "bricks: {one: shuffled}\n"))
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_no_need_no_change(project: Project, models: Path, tmp_path: Path) -> None:
    """With equal vocabularies the block changes no byte of the weights and no tokenizer file."""
    save_tuned(models / "base", tmp_path / "same", BASE, BASE, seed=6)
    steps = "steps: [{merge: average}]\n"
    plain = project.run(f"bricks: {{same: same}}\n{steps}", "plain.yaml")
    block = project.run(recipe("{source: union}", steps, "bricks: {same: same}\n"), "block.yaml")
    assert plain["key"] != block["key"]
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (Path(plain["model"]) / name).read_bytes() == (Path(block["model"]) / name).read_bytes()


@pytest.mark.parametrize("source", ["union", "base", "third"])
def test_scattered_rows_are_read_whole(project: Project, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by run or from a tensor in memory: the same bits."""
    resolved = project.resolve(recipe(f"{{source: {source}}}"))
    expected = tensors_in_memory(resolved)
    assert resolved.vocabulary.memory() == 0
    monkeypatch.setattr(rows_module, "_MANY_RUNS", 2)
    found = tensors_in_memory(resolved)
    assert resolved.vocabulary.memory() > 0
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_padding_rows_are_kept(project: Project, models: Path, tmp_path: Path) -> None:
    """A base with more rows than tokens, in bf16: no row is cut off, and an added token takes the first one that is free."""
    base = save_llama(tmp_path / "padded", BASE, rows=320, dtype=torch.bfloat16)
    save_tuned(base, tmp_path / "tuned", BASE, [*BASE, "z"], seed=7, rows=320)
    text = recipe("{source: union}", "steps: [{merge: task_arithmetic}]\n", "bricks: {tuned: tuned}\n")
    resolved = project.resolve(f"base: padded\n{text}")
    made, old, tuned = tensors_in_memory(resolved, None), tensors_of(base), tensors_of(tmp_path / "tuned")
    assert read_tokens(resolved.tokenizer_path, "t").ids["z"] == 300
    assert made[EMBED].shape == (320, 32)
    assert made[EMBED].dtype == torch.bfloat16
    assert torch.equal(made[EMBED][300], tuned[EMBED][300])
    assert torch.equal(made[EMBED][301:], (old[EMBED].float() + (tuned[EMBED].float() - old[EMBED].float())).bfloat16()[301:])
    cut = project.resolve(f"base: padded\n{recipe('{source: third}', MIX, TWO.replace('other: other', 'other: tuned'))}")
    assert len(tensors_in_memory(cut)[EMBED]) == len(THIRD)  # the choice's own number of rows


# -- what is written


@pytest.mark.parametrize(
    ("place", "source"), [("", "union"), ("", "other"), ("tied/", "base"), ("tied/", "other"), ("tied/", "union")]
)
def test_result_loads_and_generates(project: Project, place: str, source: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = recipe(f"{{source: {source}}}", MIX, f"bricks: {{other: {place}other, third: {place}third}}\n")
    out = Path(project.run(f"base: {place}base\n{text}")["model"])
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


def test_live_model_and_record(project: Project) -> None:
    """In memory and on disk the same model; the run says what each model lacked."""
    from transformers import AutoModelForCausalLM

    from workbench.engine import materialize

    text = recipe("{source: union}")
    run = project.run(text)
    live = materialize(project.resolve(text), CPU)
    saved = AutoModelForCausalLM.from_pretrained(run["model"])
    ids = torch.tensor([[3, 301, 304]])
    assert torch.equal(live(ids).logits, saved(ids).logits)
    record = json.loads((Path(run["run"]) / "run.json").read_text("utf-8"))["tokenizer"]
    assert record["lacking"] == {"base": 5, "other": 3, "third": 3}
    assert (record["rows"], record["tokens"]) == (305, 305)


def test_special_tokens_of_a_union(project: Project) -> None:
    """A brick's special token is special in the union, its words are not added tokens, and text splits as before."""
    from transformers import AutoTokenizer

    path = project.resolve(recipe("{source: union}")).tokenizer_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert read_tokens(path, "t").added["<new>"]["special"]
    assert set(read_tokens(path, "t").added) == {*SPECIAL, "<new>"}
    assert tokenizer.tokenize("w1<new>x0 x0 xx0") == ["w1", "<new>", "x0", "x0", "<unk>"]
    ids = tokenizer("w1 <new> x0")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "w1 x0"


def test_union_of_byte_pairs(tmp_path: Path, models: Path, project: Project) -> None:
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
    resolved = project.resolve(f"base: small\n{text}")
    union, theirs = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (resolved.tokenizer_path, tuned))
    for line in ("abcd abcd", "a<chat>abcde cd", " abab cdcd"):
        assert union.encode(line).tokens == theirs.encode(line).tokens
        assert union.decode(union.encode(line).ids) == theirs.decode(theirs.encode(line).ids)
    assert {t: union.token_to_id(t) for t in old} == {t: i for i, t in enumerate(old)}
    rows = tensors_in_memory(resolved)[EMBED]
    assert torch.equal(rows[union.token_to_id("Ġabcd")], tensors_of(tuned)[EMBED][new.index("Ġabcd")])


def test_chat_template(project: Project, tmp_path: Path) -> None:
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
        path = project.resolve(recipe(block, MIX, bricks)).tokenizer_path
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == expected


# -- adapters and recipes as bricks


def test_adapter_on_the_head(project: Project, models: Path, tmp_path: Path) -> None:
    """An adapter of the base's vocabulary that updates the head, in a union: its delta on the base's rows, none on new ones."""
    save_adapter(models / "base", tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    steps = "steps: [{merge: task_arithmetic, bricks: {adapter: 1.0}}]\n"
    alone = project.tensors(f"bricks: {{adapter: adapter}}\n{steps}")
    found = project.tensors(recipe("{source: union}", steps, "bricks: {adapter: adapter, other: other}\n"))
    assert not torch.equal(alone[HEAD], tensors_of(models / "base")[HEAD])
    assert torch.equal(found[HEAD][:300], alone[HEAD])
    assert torch.equal(
        found[HEAD][300:], torch.stack([input_rows(models, "other", HEAD)[t] for t in ("<new>", "x0", "x1", "x2")])
    )
    moved = project.tensors(recipe("{source: other}", steps, "bricks: {adapter: adapter, other: other}\n"))
    assert torch.allclose(moved[HEAD][OTHER.index("w9")], alone[HEAD][BASE.index("w9")], atol=1e-6)


def test_recipe_as_brick(project: Project, models: Path, tmp_path: Path) -> None:
    """A recipe on the same base, without a block, is aligned like the base; one with its own block is refused."""
    save_tuned(models / "base", tmp_path / "same", BASE, BASE, seed=6)
    project.write("bricks: {same: same}\nsteps: [{merge: task_arithmetic, bricks: {same: 0.5}}]\n", "inner.yaml")
    steps = "steps: [{merge: task_arithmetic, bricks: {inner: 1.0}}]\n"
    bricks = "bricks: {inner: {recipe: recipes/inner.yaml}, other: other}\n"
    found = project.tensors(recipe("{source: union}", steps, bricks))
    inner = project.tensors("bricks: {same: same}\nsteps: [{merge: task_arithmetic, bricks: {same: 0.5}}]\n")
    assert torch.allclose(found[EMBED][:300], inner[EMBED], atol=1e-6)
    assert torch.equal(found[EMBED][300], input_rows(models, "other")["<new>"])
    project.write(recipe("{source: union}"), "inner.yaml")
    with pytest.raises(WorkbenchError, match="has a `tokenizer` block of its own"):
        project.resolve(recipe("{source: union}", steps, bricks))
    with pytest.raises(WorkbenchError, match="has a `tokenizer` block of its own"):
        project.resolve(steps + "bricks: {inner: {recipe: recipes/inner.yaml}}\n")


def test_controls_share_the_vocabulary(project: Project) -> None:
    """The base and a brick alone, as they are scored beside a recipe, have its tokenizer."""
    from workbench.controls import lineup

    resolved = project.resolve(recipe("{source: other}"))
    found = lineup([resolved.recipe])
    assert [entry.name for entry in found] == ["base", "other", "third", "average", "test"]
    assert {entry.resolved.vocabulary.digest for entry in found} == {resolved.vocabulary.digest}


# -- without the block, and errors


def test_without_the_block(project: Project, models: Path, tmp_path: Path) -> None:
    """Sizes, the first tokens that differ, and the block to add."""
    with pytest.raises(WorkbenchError) as caught:
        project.resolve("bricks: {third: third}\nsteps: [{merge: average}]\n")
    assert caught.value.message == (
        "brick 'third': its vocabulary differs from the base's: model.embed_tokens.weight has 302 rows for 302 tokens, "
        "the base's 300 for 300 tokens; 2 tokens that the base lacks ('x1' 300, 'y0' 301)"
    )
    assert "`tokenizer: {source: union}`" in str(caught.value.hint)
    assert "{source: third}" in str(caught.value.hint)
    words = [*BASE[:3], *reversed(BASE[3:])]
    save_tuned(models / "base", tmp_path / "turned", BASE, words, seed=1)
    with pytest.raises(WorkbenchError, match=r"300 rows each, but 296? tokens at other ids \('w296' is 3, in the base 299"):
        project.resolve("bricks: {turned: turned}\nsteps: [{merge: average}]\n")
    save_tuned(models / "base", tmp_path / "renamed", BASE, [*BASE[:-1], "<im_start>"], seed=1)
    warned = project.resolve("bricks: {renamed: renamed}\nsteps: [{merge: average}]\n").warnings
    assert "1 token that the base lacks ('<im_start>' 299); 1 token of the base missing ('w296' 299)" in warned[0]


def test_adapter_with_another_tokenizer(project: Project, models: Path, tmp_path: Path) -> None:
    """Extra tokens are a warning, a head trained on moved tokens is refused, and `source: adapter` takes its template."""
    save_adapter(models / "base", tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    save_words(tmp_path / "adapter", [*BASE, "<im_start>"], template="hi")
    steps = "steps: [{merge: task_arithmetic}]\n"
    warned = project.resolve(f"bricks: {{adapter: adapter}}\n{steps}").warnings
    assert "1 token that the base lacks ('<im_start>' 300)" in warned[0]
    with pytest.raises(WorkbenchError, match="no model has a row for '<im_start>'"):
        project.resolve(recipe("{source: adapter}", steps, "bricks: {adapter: adapter}\n"))
    block = "{source: adapter, tokens: {<im_start>: {source: {model: base, token: <eos>}}}}"
    resolved = project.resolve(recipe(block, steps, "bricks: {adapter: adapter}\n"))
    assert torch.equal(tensors_in_memory(resolved)[EMBED][300], tensors_of(models / "base")[EMBED][1])
    assert resolved.base.config["eos_token_id"] == 1
    save_words(tmp_path / "adapter", OTHER)
    with pytest.raises(WorkbenchError, match="the tokenizer in its directory differs from the base's: 297 tokens at other ids"):
        project.resolve(f"bricks: {{adapter: adapter}}\n{steps}")


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
        ("{source: union, tokens: {fresh: {source: mean}}}", "source mean, but no model has it"),
        ("{source: union, pad_to_multiple_of: 0}", "pad_to_multiple_of"),
        ("{source: union, chat_template: orther}", "Did you mean 'other'?"),
        ("{source: union, chat_template: none.jinja}", "none.jinja does not exist"),
    ],
)
def test_errors(project: Project, block: str, message: str) -> None:
    with pytest.raises(WorkbenchError) as caught:
        project.resolve(recipe(block))
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_bricks_without_a_tokenizer(project: Project, models: Path, tmp_path: Path) -> None:
    """With the base's number of rows it is taken to have the base's, with a warning; else refused."""
    for name in ("other", "third"):
        shutil.copytree(models / name, tmp_path / f"bare-{name}")
        (tmp_path / f"bare-{name}" / "tokenizer.json").unlink()
    save_tuned(models / "base", tmp_path / "same", BASE, BASE, seed=6)
    (tmp_path / "same" / "tokenizer.json").unlink()
    warned = project.resolve(recipe("{source: union}", MIX, "bricks: {other: same, third: third}\n")).warnings
    assert "taken to have the base's" in "".join(warned)
    with pytest.raises(WorkbenchError, match="302 rows of vocabulary, the base has 300, and no tokenizer in"):
        project.resolve(recipe("{source: union}", MIX, "bricks: {other: other, third: bare-third}\n"))


def test_every_block_size_gives_the_same_rows(project: Project, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, or all at once."""
    import workbench.weights.specs as specs

    text = recipe("{source: other, pad_to_multiple_of: 16}")
    view = project.resolve(text).vocabulary.view("third")
    expected = load(view, EMBED, torch.float32)
    monkeypatch.setattr(specs, "BLOCK_ELEMENTS", 32)
    assert torch.equal(load(project.resolve(text).vocabulary.view("third"), EMBED, torch.float32), expected)


def test_adapter_of_a_larger_vocabulary(project: Project, models: Path, tmp_path: Path) -> None:
    """An adapter on a head that the base does not have is refused, with the way to use it."""
    larger = save_llama(tmp_path / "larger", THIRD)
    save_adapter(larger, tmp_path / "adapter", seed=1, target_modules=["q_proj", "lm_head"])
    save_words(tmp_path / "adapter", THIRD)
    with pytest.raises(
        WorkbenchError, match=r"lm_head.weight is \[300, 32\] in the base.*2 tokens that the base lacks"
    ) as caught:
        project.resolve("bricks: {adapter: adapter}\nsteps: [{merge: task_arithmetic}]\n")
    assert "`tokenizer: {source: union}`" in str(caught.value.hint)


def test_brick_with_a_head_of_its_own(project: Project) -> None:
    with pytest.raises(
        WorkbenchError, match=r"brick 'other': lm_head.weight has no rows, model.embed_tokens.weight has 302 rows"
    ):
        project.resolve(recipe("{source: union}", MIX, "bricks: {other: tied/other, third: third}\n"))


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
    write_tokenizer(tmp_path / "out", path, additions, [], None, {})
    union = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "another order, some words"
    assert union(text)["input_ids"] == plain(text)["input_ids"]
    assert union.convert_tokens_to_ids(["<x>", "▁piece"]) == [first, first + 1]
    assert "<x>" in union.tokenize("a word<x>and")
    assert not list((tmp_path / "out").glob("*.model"))
