"""Pruned channels of the residual stream: which go, the scale of the norms, and exactness where the others were zero."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.growing import save_family
from worlds.project import Project
from worlds.texts import words_tokenizer, write_rows
from worlds.tiny import VOCABULARY, live, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.models.texts import encode, read_texts
from workbench.run.plan import plan

TOKENS = torch.randint(2, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
DEAD = [1, 2, 5, 11, 12, 20, 27, 30]
"""Channels that are zero everywhere in the planted models."""
REST = [c for c in range(32) if c not in DEAD]
WRITERS = ("o_proj", "dense", "down_proj", "fc2", "c_proj")
HIDDEN = "steps: [{grow: prune, hidden: 0.25, calibration: texts.jsonl}]\n"


@pytest.fixture
def texts(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Return a project with texts.jsonl."""
    write_rows(project.path / "texts.jsonl", 12)
    monkeypatch.setattr("workbench.run.kinds.grow.load_tokenizer", words_tokenizer)
    return project


def planted(base: Path, out: Path, centered: bool) -> Path:
    """Return a copy whose matrices write nothing to eight channels, in float32.

    Args:
        base: The model.
        out: Where the copy goes.
        centered: Whether what is written has the mean 0, which a LayerNorm needs: it subtracts the mean over all channels.
    """
    from safetensors.torch import save_file

    def write(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        tensor.index_fill_(axis, torch.tensor(DEAD), 0.0)
        if centered:
            rest = tensor.index_select(axis, torch.tensor(REST))
            tensor.index_copy_(axis, torch.tensor(REST), rest - rest.mean(axis, keepdim=True))
        return tensor

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module, _, kind = name.rpartition(".")
        if "embed_tokens" in name:
            return write(tensor, 1)
        if module.rpartition(".")[2] in WRITERS:
            return write(tensor, 0)
        if "norm" in name and kind == "bias":
            tensor[DEAD] = 0
        return tensor

    shutil.copytree(base, out)
    tensors = {name: change(name, tensor.clone()).contiguous() for name, tensor in tensors_of(base).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def difference(one: Path | str, other: Path | str) -> float:
    """Return the largest difference of the logits, relative to the largest logit, in float64."""
    with torch.no_grad():
        old, new = (live(place).double()(TOKENS, use_cache=False).logits for place in (one, other))
    return float((old - new).abs().max() / old.abs().max())


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "olmo2", "phi3", "granite", "starcoder2", "cohere", "phi", "hunyuan_v1_dense", "apertus"]
)
def test_channels_of_zero_go_and_logits_stay(family: str, texts: Project, tmp_path: Path) -> None:
    """Norms by root mean square, on queries and keys, behind the matrices; norms that subtract the mean; a tied head."""
    centered = family in ("starcoder2", "cohere", "phi")
    # The epsilon is large enough that an error in it, or in what is scaled with it, is seen.
    base = planted(
        save_family(family, tmp_path / "whole", {} if centered else {"rms_norm_eps": 0.05}), tmp_path / "planted", centered
    )
    document = texts.run(f"base: {base}\n{HIDDEN}")
    record, config = document["steps"][0], json.loads((Path(document["model"]) / "config.json").read_text("utf-8"))
    assert record["hidden"] == [32, 24]
    assert record["importance"]["channels_kept_strength"] == 1.0
    assert list(record["importance"]["norm_scales"].values()) == pytest.approx(
        [(32 / 24) ** 0.5] * len(record["importance"]["norm_scales"]), abs=1e-6
    )
    assert (config["hidden_size"], config["head_dim"]) == (24, 8)
    assert difference(base, document["model"]) <= 1e-5
    assert record["check"]["reloaded"]
    before, after = tensors_of(base), tensors_of(Path(document["model"]))
    name = next(n for n in before if "embed_tokens" in n)
    assert torch.equal(after[name], before[name][:, REST])


def test_importance_and_scale_by_hand(texts: Project) -> None:
    """The channels that stay and the scales of the norms are those of a direct computation in float64, text by text."""
    base = save_family("llama", texts.path / "llama")
    document = texts.run(f"base: {base}\n{HIDDEN}")
    model = live(base).double()
    norms = {n: m for n, m in model.named_modules() if n.endswith("norm")}
    assert len(norms) == 9
    seen: dict[str, list[Any]] = {name: [] for name in norms}
    for name, module in norms.items():
        module.register_forward_hook(lambda _m, args, out, name=name: seen[name].append((args[0][0, 1:], out[0, 1:])))
    for row in encode(read_texts(texts.path / "texts.jsonl", "texts.jsonl"), words_tokenizer(base), 64):
        with torch.no_grad():
            model(torch.tensor([row.tokens]))
    states = {name: [torch.cat(part) for part in zip(*pairs, strict=True)] for name, pairs in seen.items()}
    strength = sum(after.abs().mean(0) for _, after in states.values())
    assert isinstance(strength, torch.Tensor)
    kept = strength.argsort(descending=True)[:24].sort().values
    importance = document["steps"][0]["importance"]
    assert importance["channels_kept_strength"] == pytest.approx(float(strength[kept].sum() / strength.sum()), abs=1e-4)
    old, new = tensors_of(base), tensors_of(Path(document["model"]))
    assert torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"][:, kept])
    for name, (before, _) in states.items():
        ratio = float((before[:, kept].square().mean(1) / before.square().mean(1)).sqrt().mean())
        assert importance["norm_scales"][name] == pytest.approx(ratio, rel=1e-5)
        assert torch.allclose(new[f"{name}.weight"], old[f"{name}.weight"][kept] * ratio, rtol=1e-5)
        assert 0.9 < ratio < (32 / 24) ** 0.5, "channels that go are not zero"


def test_all_units_at_once(texts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, neurons and channels in one step; transformers builds it, and what remains is a multiple of 8. Outputs keep the same channels."""
    monkeypatch.setattr("workbench.grow.expansion.smaller.refitted", lambda matrix, _moments, kept: matrix[:, kept])
    base = save_family("qwen2", texts.path / "qwen2")
    fields = "neurons: 0.25, heads: 0.5, hidden: 0.3, calibration: texts.jsonl"
    document = texts.run(f"base: {base}\nsteps: [{{grow: prune, {fields}}}]\n")
    record, config = document["steps"][0], live(document["model"]).config
    assert (record["neurons"], record["key_value_heads"], record["hidden"]) == ([48, 36], [2, 1], [32, 24])
    assert (config.hidden_size, config.num_attention_heads, config.head_dim, config.intermediate_size) == (24, 2, 8, 36)
    old, new = tensors_of(base), tensors_of(Path(document["model"]))
    assert record["parameters"][1] == sum(t.numel() for t in new.values())
    before, after = (tensors["model.embed_tokens.weight"].T for tensors in (old, new))
    channels = [next(i for i, row in enumerate(before) if torch.equal(row, wanted)) for wanted in after]
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        columns = old[f"model.layers.1.{name}.weight"][channels].T
        assert all((columns == wanted).all(1).any() for wanted in new[f"model.layers.1.{name}.weight"].T), name


def test_a_plan_has_the_sizes(texts: Project) -> None:
    row = plan(texts.resolve(HIDDEN), texts.path / "runs").steps[0].to_dict()
    assert row["hidden"] == [32, 24]


REFUSED = {
    ("gemma2", "0.25"): "model_type gemma2: it scales its embeddings by the width",
    ("glm4", "0.05"): "`hidden: 0.05` leaves 32 of 32 channels, in multiples of 8",
    ("gpt2", "0.25"): "model_type gpt2 as n_embd / n_head",
    ("gpt_neox", "0.25"): "model_type gpt_neox as hidden_size / num_attention_heads",
    ("stablelm", "0.25"): "model_type stablelm as hidden_size / num_attention_heads",
    ("olmo", "0.25"): "model_type olmo: it has a norm without a weight|model_type olmo: it has none of the fields",
}


@pytest.mark.parametrize(("family", "share"), REFUSED)
def test_refused(family: str, share: str, texts: Project, dense_of: Callable[[str], Path]) -> None:
    """An error before a model is loaded, which says what to prune instead."""
    text = f"base: {dense_of(family)}\nsteps: [{{grow: prune, hidden: {share}, calibration: texts.jsonl}}]\n"
    with pytest.raises(WorkbenchError, match=f"grow prune: .*({REFUSED[family, share]})") as caught:
        plan(texts.resolve(text), texts.path / "runs")
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("hidden: 0.25", "importance is measured on texts; expected a JSONL file"),
        ("hidden: 1.5, calibration: texts.jsonl", "less than 1"),
    ],
)
def test_bad_fields(fields: str, message: str, texts: Project) -> None:
    with pytest.raises(WorkbenchError) as caught:
        plan(texts.resolve(f"steps: [{{grow: prune, {fields}}}]\n"), texts.path / "runs")
    assert message in json.dumps([str(caught.value), *map(str, getattr(caught.value, "problems", ()))])


def test_a_key_without_the_field_stays(texts: Project) -> None:
    """A step without `hidden` has the key that it had before there was the field."""
    step = texts.resolve("steps: [{grow: prune, layers: [1]}]\n").recipe.steps[0]
    assert "hidden" in type(step).keyed_if_set
