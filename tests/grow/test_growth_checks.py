"""What the check of a growth finds: config.json against the tensors, logits without the model in memory, gradients behind zeros."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worlds.growing import LAYERS, logits_of, save_family, tiny_config
from worlds.mixtures import save_mixture
from worlds.project import CPU, Project
from worlds.tiny import VOCABULARY, edit_json, save_model, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion.checks import check_fits
from workbench.grow.expansion.norms import Norm, is_norm, rms_norm
from workbench.grow.expansion.parts import DecoderParts, with_text
from workbench.grow.expansion.preserve import TOKENS as LENGTH
from workbench.grow.expansion.resize import StreamNorms
from workbench.grow.expansion.streamed import Streamed, decoder_layers
from workbench.models.layout import Model
from workbench.models.skeleton import causal_skeleton
from workbench.models.skeleton import skeleton as built_of
from workbench.recipe.methods import methods
from workbench.run.compose import compose
from workbench.run.plan import plan
from workbench.steps import Growth
from workbench.weights.checkpoint import Checkpoint

TOKENS = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def family(project: Project) -> Callable[[str], str]:
    """Family -> a recipe's base, made in the project."""

    def made(name: str) -> str:
        save_family(name, project.path / name)
        return name

    return made


# -- logits, streamed


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3_text", "mpt", "phi3", "falcon", "gpt_neox", "qwen3_next", "lfm2", "opt", "mamba"]
)
def test_streamed_logits_are_those_of_the_live_model(name: str, tmp_path: Path) -> None:
    """Tied heads, fused projections, transposed matrices, state-space layers: the same numbers as transformers' own loading gives."""
    assert torch.equal(streamed(save_family(name, tmp_path / name)).logits(TOKENS), logits_of(tmp_path / name, TOKENS))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe", "flex_olmo", "ernie4_5_moe"])
def test_streamed_logits_of_mixtures(name: str, tmp_path: Path) -> None:
    """Experts that transformers stacks and joins are put together from their tensors."""
    found = streamed(save_mixture(name, tmp_path / name)).logits(TOKENS)
    assert torch.equal(found, logits_of(tmp_path / name, TOKENS))


def streamed(path: Path) -> Streamed:
    """The model in a directory, without its weights."""
    checkpoint = Checkpoint(path, "base")
    made = Streamed.prepare(Model(checkpoint, checkpoint.config), causal_skeleton(checkpoint.config, CPU), CPU)
    assert made is not None
    return made


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Seen while each layer runs, and behind the last: nothing stays loaded."""
    found = streamed(save_family("llama", tmp_path / "llama"))
    _, layers = decoder_layers(found.model) or ("", [])
    loaded: list[list[int]] = []

    def here() -> list[int]:
        return [i for i, layer in enumerate(layers) if any(p.device.type != "meta" for p in layer.parameters())]

    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: loaded.append(here()))
    found.logits(TOKENS)
    assert loaded == [[i] for i in range(LAYERS)]
    assert sorted(found.pieces) == sorted(n for n, _ in found.model.named_parameters(remove_duplicate=False)), (
        "and none is left out"
    )
    assert all(p.device.type == "meta" for p in found.model.parameters())


def test_a_broken_growth_is_caught_by_two_short_prompts(
    project: Project, family: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """VaultGemma scales its embeddings by the width. Where nobody refuses that, the logits show it at `check: tensors` too."""
    base = family("vaultgemma")
    text = f"base: {base}\nsteps: [{{grow: width, hidden: 48, check: tensors}}]\n"
    with pytest.raises(WorkbenchError, match="scales its embeddings by the width") as refused:
        project.run(text)
    assert refused.value.exit_code == 2

    def accept(parts: DecoderParts, sizes: dict[str, int], _instead: str) -> StreamNorms:
        return StreamNorms("rms_norm_eps", parts.size("rms_norm_eps"), {}, with_text(parts.model.config, sizes))

    monkeypatch.setattr("workbench.grow.width.stream_norms", accept)
    with pytest.raises(
        WorkbenchError, match=r"step grow-width: the grown model computes something else \(logits differ by \d"
    ) as caught:
        project.run(text)
    assert caught.value.exit_code == 3
    assert not list((project.path / "runs").glob("*/model*"))


@pytest.mark.parametrize("check", ["tensors", "full"])
def test_what_a_check_of_tensors_records(check: str, project: Project) -> None:
    """`depth` is exact, `width` is exact up to rounding, `stack` promises nothing: its logits are finite."""
    expected = {"{grow: depth, blocks: 1": 0.0, "{grow: width, hidden: 48": 1e-5}
    for step, bound in expected.items():
        found = project.run(f"steps: [{step}, check: {check}}}]\noutput: {{dtype: float32}}\n", f"{step[7:9]}.yaml")["steps"][0][
            "check"
        ]
        assert found["max_logit_difference"] <= bound
        assert ("same_generation" in found) == (check == "full")
    stack = project.run(f"steps: [{{grow: stack, order: [0, 1, 1, 3], check: {check}}}]\n")["steps"][0]["check"]
    assert stack.get("finite_logits", False) == (check == "tensors")
    assert "max_logit_difference" not in stack


def test_logits_that_are_not_finite_are_no_growth(project: Project, family: Callable[[str], str]) -> None:
    from safetensors.torch import save_file

    base = project.path / family("llama")
    tensors = tensors_of(base)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorkbenchError, match="the grown model gives NaN or infinite logits") as caught:
        project.run("base: llama\nsteps: [{grow: stack, order: [0, 1, 1, 3], check: tensors}]\n")
    assert caught.value.exit_code == 3


def test_a_plan_counts_the_memory_of_streamed_logits(project: Project, tmp_path: Path) -> None:
    """More than without a check, by the largest layer or matrix and not by the model."""
    peaks = {
        check: plan(
            project.resolve(f"steps: [{{grow: depth, blocks: 1, check: {check}}}]\n", f"{check}.yaml"), project.path / "runs"
        ).peak_bytes
        for check in ("off", "tensors")
    }
    tensors = tensors_of(project.path / "base")
    layer = 4 * sum(t.numel() for n, t in tensors.items() if ".layers.0." in n)
    logits = 2 * 4 * 2 * LENGTH * len(tensors["model.embed_tokens.weight"])
    extra = peaks["tensors"] - peaks["off"] - 160_000_000 - logits  # transformers itself, and both models' logits
    assert layer <= extra < 4 * sum(t.numel() for t in tensors.values())


# -- config.json and tensors


@pytest.mark.parametrize("check", ["tensors", "full"])
def test_a_stack_of_mpt_has_the_layers_that_its_config_says(check: str, project: Project, family: Callable[[str], str]) -> None:
    """MPT calls its depth `n_layers`."""
    document = project.run(f"base: {family('mpt')}\nsteps: [{{grow: stack, order: [0, 1, 2, 1, 2, 3], check: {check}}}]\n")
    assert json.loads((Path(document["model"]) / "config.json").read_text("utf-8"))["n_layers"] == 6
    assert len({n.split(".")[2] for n in tensors_of(Path(document["model"])) if ".blocks." in n}) == 6
    assert torch.isfinite(logits_of(document["model"], TOKENS)).all()


def test_a_depth_that_config_does_not_say_is_caught(
    project: Project, family: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import workbench.grow.expansion.layers

    base = family("mpt")
    stages: list[str] = []
    monkeypatch.setattr(workbench.grow.expansion.layers, "DEPTHS", ("num_hidden_layers",))
    with pytest.raises(
        WorkbenchError, match=r"no parameter for transformer.blocks.4.*: config.json states 4 layers, the tensors have 6"
    ) as caught:
        project.run(
            f"base: {base}\nsteps: [{{grow: stack, order: [0, 1, 2, 1, 2, 3], check: tensors}}]\n",
            events=lambda event: stages.append(event["stage"]),
        )
    assert (caught.value.exit_code, "write" in stages) == (3, False), "before anything is written"


WRONG = {
    "num_hidden_layers": (5, "config.json states 5 layers, the tensors have 6"),
    "hidden_size": (48, r"has the shape \[64, 32\]; transformers builds \[64, 48\]"),
    "intermediate_size": (56, r"down_proj.weight has the shape \[32, 48\]; transformers builds \[32, 56\]"),
    "num_key_value_heads": (4, r"has the shape \[16, 32\]; transformers builds \[32, 32\]"),
    "num_attention_heads": (8, r"o_proj.weight has the shape \[32, 32\]; transformers builds \[32, 64\]"),
    "vocab_size": (VOCABULARY + 2, r"has the shape \[64, 32\]; transformers builds \[66, 32\]"),
    "model_type": ("qwen2", "k_proj.bias .*, and no tensor fills it"),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_config_that_differs_from_the_tensors_is_named(field: str, project: Project) -> None:
    """Layers, widths, heads, vocabulary: a grown llama with one field changed."""
    base, growth = grown_model(project, "llama", "depth")
    config = {**growth.config, "head_dim": 8, "architectures": None}
    specs = {n: g.spec(base.weights.specs[g.source]) for n, g in growth.tensors.items()}
    check_fits(base, replace(growth, config=config), specs, "grow")
    value, message = WRONG[field]
    with pytest.raises(WorkbenchError, match=message) as caught:
        check_fits(base, replace(growth, config={**config, field: value}), specs, "grow")
    assert caught.value.exit_code == 3


def test_layer_types_that_stay_behind_are_named(project: Project) -> None:
    """The shapes agree; only the windows differ."""
    base, growth = grown_model(project, "qwen2", "depth")
    specs = {n: g.spec(base.weights.specs[g.source]) for n, g in growth.tensors.items()}
    check_fits(base, growth, specs, "grow")
    types = growth.config["layer_types"]
    assert len(set(types)) == 2
    with pytest.raises(WorkbenchError, match=r"transformers builds layer \d differently from its source, layer \d"):
        check_fits(base, replace(growth, config={**growth.config, "layer_types": types[::-1]}), specs, "grow")


def grown_model(project: Project, name: str, method: str) -> tuple[Model, Growth]:
    """A tiny model and its plan for two new layers."""
    checkpoint = Checkpoint(save_model(project.path / name, name), "base")
    base = Model(checkpoint, checkpoint.config)
    return base, methods()[f"grow:{method}"].model_validate({"grow": method, "blocks": 2}).expand(base)


def test_an_architecture_that_transformers_does_not_have_needs_check_off(project: Project) -> None:
    base = save_model(project.path / "odd", "llama")
    edit_json(base / "config.json", model_type="nobody", architectures=["NobodyForCausalLM"])
    with pytest.raises(WorkbenchError, match="so the growth cannot be checked") as caught:
        project.run("base: odd\nsteps: [{grow: depth, blocks: 1, check: tensors}]\n")
    assert (caught.value.exit_code, "check: off" in (caught.value.hint or "")) == (3, True)
    assert project.run("base: odd\nsteps: [{grow: depth, blocks: 1, check: off}]\n")["status"] == "done"


# -- norms by what they compute


class RMSNorm(nn.Module):
    """Called as it is not: it subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        """Layer norm."""
        return nn.functional.layer_norm(x, (32,), self.weight)


class Balance(nn.Module):
    """An RMS norm that nobody calls one; its weight is stored as the difference from 1."""

    def __init__(self, offset: float = 1.0, eps: float = 3e-5, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32))
        self.offset, self.eps = offset, eps
        if bias:
            self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * (offset + weight) + bias."""
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.offset + self.weight) + getattr(self, "bias", 0)


class Half(Balance):
    """Divides by the fourth root of the mean square: no norm."""

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(rms(x))."""
        return x * x.square().mean(-1, keepdim=True).pow(-0.25)


class Constant(Balance):
    """Gives the same for every input, a multiple included: no norm."""

    def forward(self, x: Tensor) -> Tensor:
        """The weight, row by row."""
        return torch.zeros_like(x) + self.weight


NORMS: list[tuple[nn.Module, bool, tuple[int, float, bool, bool] | None]] = [
    (Balance(), True, (1, 3e-5, True, False)),
    (Balance(0.0, 1e-6), True, (0, 1e-6, True, False)),
    (Balance(0.0, 1e-6, bias=True), True, (0, 1e-6, True, True)),
    (RMSNorm(), True, None),
    (nn.LayerNorm(32), True, None),
    (Half(), False, None),
    (Constant(), False, None),
    (nn.Identity(), False, None),
    (nn.Dropout(), False, None),
    (nn.GELU(), False, None),
    (nn.Linear(32, 32), False, None),
]


@pytest.mark.parametrize(("module", "normalises", "expected"), NORMS, ids=lambda v: type(v).__name__)
def test_norms_by_what_they_compute(module: nn.Module, normalises: bool, expected: Sequence[Any] | None) -> None:
    with torch.device("meta"):
        empty = module.to("meta")
    assert is_norm(empty) == normalises
    found = rms_norm(empty)
    if expected is None:
        assert found is None
    else:
        assert found == Norm(expected[0], pytest.approx(expected[1], rel=0.01), expected[2], expected[3])


TRANSFORMERS = {"llama": (0, 1e-6, True), "bitnet": (0, 1e-5, True), "nanochat": (0, 1e-6, False), "vaultgemma": (1, 1e-6, True),
                "qwen3_next": (1, 1e-6, True), "helium": (0, 1e-8, True), "cohere": None, "olmo": None, "nemotron": None, "mpt": None}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_final_norms_of_transformers(name: str) -> None:
    built = built_of(json.dumps(tiny_config(name).to_dict()))
    last = [m for n, m in built.named_modules() if is_norm(m) and "layers." not in n and "blocks." not in n][-1]
    found, expected = rms_norm(last), TRANSFORMERS[name]
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert (found.offset, found.eps, found.has_weight) == (expected[0], pytest.approx(expected[1], rel=0.02), expected[2])


REFUSED = {
    ("bitnet", "hidden: 48"): "has a norm inside its layers that does not read the residual stream",
    ("bitnet", "neurons: 64"): "ffn_sub_norm.weight normalizes over the neurons",
    ("bitnet", "key_value_heads: 4"): "attn_sub_norm.weight normalizes over all heads",
    ("nanochat", "hidden: 48"): "has a norm without a weight",
    ("qwen3_next", "hidden: 48"): r"the gain 1 \+ weight",
    (
        "vaultgemma",
        "hidden: 48",
    ): "scales its embeddings by the width .*embed_scale is 5.65685 with 32 channels and 6.9282 with 48",
    ("cohere", "hidden: 48"): "has no RMS norms",
    ("minicpm3", "hidden: 48"): "an epsilon of its own|inside its layers|scales something by the width",
}


@pytest.mark.parametrize(("name", "step"), REFUSED)
def test_norms_that_do_not_grow_are_refused_before_any_work(
    name: str, step: str, project: Project, family: Callable[[str], str]
) -> None:
    with pytest.raises(WorkbenchError, match=REFUSED[name, step]) as caught:
        compose(project.resolve(f"base: {family(name)}\nsteps: [{{grow: width, {step}, check: off}}]\n"), CPU)
    assert caught.value.exit_code == 2


OWN = {
    "llama": (32, "has a norm with an epsilon of its own"),
    "qwen3": (8, "has norms of queries and keys with an epsilon of their own"),
}


@pytest.mark.parametrize("name", OWN)
def test_an_epsilon_that_config_does_not_say_is_refused(
    name: str, project: Project, family: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of the residual stream, and those of queries and keys alone (of 8 channels), whose class sets another epsilon."""
    from importlib import import_module

    channels, message = OWN[name]
    base = family(name)
    edit_json(project.path / base / "config.json", rms_norm_eps=2e-5)
    text = f"base: {base}\nsteps: [{{grow: width, hidden: 48, check: off}}]\n"
    compose(project.resolve(text), CPU)
    kind = getattr(import_module(f"transformers.models.{name}.modeling_{name}"), f"{name.capitalize()}RMSNorm")
    init = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, size, eps: init(self, size, 1e-3 if size == channels else eps))
    edit_json(project.path / base / "config.json", rms_norm_eps=3e-5)  # models without weights are kept by their config.json
    with pytest.raises(WorkbenchError, match=rf"{message} \(.*0.001, rms_norm_eps: 3e-05\)") as caught:
        compose(project.resolve(text), CPU)
    assert caught.value.exit_code == 2


def test_a_norm_with_a_bias_is_refused(project: Project, family: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`hidden` rescales a gain alone."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    init, forward = LlamaRMSNorm.__init__, LlamaRMSNorm.forward

    def with_bias(self: Any, size: int, eps: float) -> None:
        init(self, size, eps)
        self.bias = nn.Parameter(torch.zeros(size))

    base = family("llama")
    edit_json(project.path / base / "config.json", rms_norm_eps=4e-5)
    monkeypatch.setattr(LlamaRMSNorm, "__init__", with_bias)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: forward(self, x) + self.bias)
    with pytest.raises(WorkbenchError, match=r"has a norm with a bias \(model.layers.0.input_layernorm\)"):
        compose(project.resolve(f"base: {base}\nsteps: [{{grow: width, hidden: 48, check: off}}]\n"), CPU)
