"""Checkpoints as they lie on the hub, architecture by architecture: merged, loaded by transformers, run; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call
from worlds.hub_layouts import LAYERS, LAYOUTS, Tensors, config, live_model, model_class, save_hub, save_native
from worlds.project import CPU, Project

from workbench.ground.errors import WorkbenchError
from workbench.models.layout import Layout
from workbench.models.live import Aligned, compute, live_names
from workbench.models.skeleton import ties_head
from workbench.recipe.methods import methods
from workbench.run.compose import compose
from workbench.run.materialize import materialize
from workbench.steps import MergeMethod
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import load

WEIGHTS = {"one": 0.7, "two": -0.4}
ARITHMETIC = f"steps: [{{merge: task_arithmetic, bricks: {WEIGHTS}}}]\n".replace("'", "")
BRICKS = "bricks: {one: {checkpoint: one}, two: {checkpoint: two}}\n"
BUFFER = re.compile(r"\d\.attn\.bias|attention\.bias|masked_bias|inv_freq")
TOKENS = torch.tensor([[5, 9, 11, 3, 40, 22, 7, 18, 30, 12, 2, 60]])


@dataclass(frozen=True)
class Family:
    """A base and two fine-tunes: live, and in a project folder as the hub stores them (native/: as transformers does)."""

    layout: str
    project: Project
    base: Any
    tuned: dict[str, Any]

    @property
    def kind(self) -> Any:
        return model_class(LAYOUTS[self.layout].family)

    def states(self) -> tuple[Tensors, dict[str, Tensors]]:
        return self.base.state_dict(), {name: model.state_dict() for name, model in self.tuned.items()}


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Layout -> its models, made when first asked for. Not to be changed by a test."""
    made: dict[str, Family] = {}

    def get(layout: str) -> Family:
        if layout not in made:
            place = tmp_path_factory.mktemp("layout")
            (place / "recipes").mkdir()
            name = LAYOUTS[layout].family
            base = live_model(name, 0)
            tuned = {brick: live_model(name, seed, base) for seed, brick in enumerate(WEIGHTS, 1)}
            for at, model in {"base": base, **tuned}.items():
                save_hub(model, layout, place / at)
                save_native(model, place / "native" / at)
            made[layout] = Family(layout, Project(place), base, tuned)
        return made[layout]

    return get


def loaded(kind: Any, path: Path) -> Any:
    """The model in a directory, with nothing missing, unexpected or mismatched."""
    model, info = kind.from_pretrained(path, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def close(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_arithmetic_is_that_of_the_live_models(layout: str, family_of: Callable[[str], Family]) -> None:
    family = family_of(layout)
    base, tuned = family.states()
    document = family.project.run(BRICKS + ARITHMETIC, "arithmetic.yaml")
    merged = loaded(family.kind, Path(document["model"]))
    close(merged.state_dict(), {n: t + sum(w * (tuned[b][n] - t) for b, w in WEIGHTS.items()) for n, t in base.items()})
    assert not torch.equal(logits(merged), logits(family.base))
    live = materialize(family.project.resolve(BRICKS + ARITHMETIC, "arithmetic.yaml"), CPU)
    assert torch.equal(logits(live), logits(merged)), "in memory as on disk"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hub_names_are_those_that_transformers_reads(layout: str, family_of: Callable[[str], Family]) -> None:
    """The fixtures themselves: transformers finds every weight in them, and nothing but buffers beside them."""
    family = family_of(layout)
    model, info = family.kind.from_pretrained(family.project.path / "base", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.endswith("masked_bias") for name in info["unexpected_keys"])
    close(model.state_dict(), family.base.state_dict(), 0)


# -- every method


def ties(base: torch.Tensor, tuned: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES of one tensor, by its definition."""
    deltas = torch.stack([t - base for t in tuned]).flatten(1)
    for delta in deltas:
        order = torch.argsort(-delta.abs(), stable=True)
        delta[order[round(density * delta.numel()) :]] = 0
    sign = deltas.sum(0).sign()
    agree = (deltas.sign() == sign) & (deltas != 0)
    mean = (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return base + mean.view(base.shape)


EXPECTED: dict[str, Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]] = {
    "average": lambda base, tuned: torch.stack(tuned).mean(0),
    "linear": lambda base, tuned: torch.stack(tuned).mean(0),
    "task_arithmetic": lambda base, tuned: sum(tuned) - base,  # type: ignore[operator,return-value]
    "ties": lambda base, tuned: ties(base, tuned, 0.5),
}
# Methods of other packages have tests of their own.
METHODS = [c for c in methods().values() if issubclass(c, MergeMethod) and c.laws.needs == "tensor" and "/" not in c.name]


def step(cls: type[MergeMethod]) -> dict[str, Any]:
    """A step of two bricks. Weights that sum to 1, which slerp asks for, where no expected value is given here."""
    weight = 1.0 if cls.name in EXPECTED else 0.5
    weighted = "dict" in str(cls.model_fields["bricks"].annotation)
    fields = {"density": 0.5} if cls.name == "ties" else {}
    return {"merge": cls.name, "bricks": dict.fromkeys(WEIGHTS, weight) if weighted else list(WEIGHTS), **fields}


def recipe(*steps: dict[str, Any]) -> str:
    """Two checkpoint bricks and steps. JSON is YAML."""
    return BRICKS + f"steps: {json.dumps(steps)}\n"


def stored(place: Path) -> Tensors:
    weights = Checkpoint(place, "x")
    return {name: load(weights, name, torch.float32) for name in weights.specs}


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
@pytest.mark.parametrize("layout", ["gpt2", "gpt_neox", "phi3", "mixtral", "gemma3, multimodal", "granitemoehybrid", "mamba"])
def test_every_method(layout: str, cls: type[MergeMethod], family_of: Callable[[str], Family]) -> None:
    """By tensor as it is stored: what a method measures over a tensor, it measures over one expert."""
    family = family_of(layout)
    document = family.project.run(recipe(step(cls)), f"{cls.name}.yaml")
    merged = loaded(family.kind, Path(document["model"]))
    assert logits(merged).isfinite().all()
    if cls.name in EXPECTED:
        found = stored(Path(document["model"]))
        base, one, two = (stored(family.project.path / at) for at in ("base", "one", "two"))
        close(found, {n: EXPECTED[cls.name](base[n], [one[n], two[n]]) for n in found}, 2e-6)


# -- transformers' own layout


@pytest.mark.parametrize(
    "layout", ["gpt_neox", "mixtral", "qwen3_moe", "qwen3_next", "granitemoehybrid", "jamba", "gpt2", "gemma3, multimodal"]
)
@pytest.mark.parametrize(("base", "one", "two"), [("base", "native/one", "two"), ("native/base", "one", "native/two")])
def test_bricks_in_another_layout(layout: str, base: str, one: str, two: str, family_of: Callable[[str], Family]) -> None:
    family = family_of(layout)
    live, tuned = family.states()
    text = f"base: {base}\nbricks: {{one: {{checkpoint: {one}}}, two: {{checkpoint: {two}}}}}\n" + ARITHMETIC
    document = family.project.run(text, f"{base.replace('/', '-')}.yaml")
    merged = loaded(family.kind, Path(document["model"]))
    close(merged.state_dict(), {n: t + sum(w * (tuned[b][n] - t) for b, w in WEIGHTS.items()) for n, t in live.items()})
    written, base_names = (set(Checkpoint(at, "x").specs) for at in (Path(document["model"]), family.project.path / base))
    assert written == {n for n in base_names if not BUFFER.search(n)}, "the base's layout is written"


def test_rows_across_layouts(family_of: Callable[[str], Family]) -> None:
    """Read in blocks of any size, each tensor is that of the other layout."""
    place = family_of("mixtral").project.path
    hub, native = Checkpoint(place / "base", "hub"), Checkpoint(place / "native" / "base", "native")
    for mine, theirs in ((hub, native), (native, hub)):
        aligned = Aligned(mine, theirs.specs, theirs.config)
        assert (aligned.missing, aligned.unused) == ([], [])
        for name, spec in theirs.specs.items():
            expected = load(theirs, name, torch.float32).reshape(spec.rows, spec.cols)
            source = aligned.open(name, CPU)
            for step_rows in (1, 7, spec.rows):
                rows = torch.empty(spec.rows, spec.cols)
                for start in range(0, spec.rows, step_rows):
                    stop = min(start + step_rows, spec.rows)
                    source.read(start, stop, rows[start:stop])
                assert torch.equal(rows, expected), name


@pytest.mark.parametrize("kind", ["hrm_text", "olmo_hybrid", "nemotron_h", "ernie4_5_moe"])
def test_other_conversions(kind: str, tmp_path: Path) -> None:
    """One tensor on disk for several in memory, several for one, renamed: each is rebuilt from the other, bit for bit."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    made = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, eos_token_id=1,
        bos_token_id=None, pad_token_id=None)  # fmt: skip
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)](made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    for name, hub in (("hub", True), ("native", False)):
        model.save_pretrained(tmp_path / name, save_original_format=hub)
    hub, native = (Checkpoint(tmp_path / name, name) for name in ("hub", "native"))
    assert set(hub.specs) != set(native.specs)
    for mine, theirs in ((hub, native), (native, hub)):
        aligned = Aligned(mine, theirs.specs, theirs.config)
        assert (aligned.missing, aligned.unused) == ([], [])
        for name in theirs.specs:
            assert torch.equal(load(aligned, name, torch.float32), load(theirs, name, torch.float32)), name


def test_computed_conversions_are_refused(family_of: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not those that went in would be read from the wrong place."""
    from transformers.core_model_loading import Concatenate

    place = family_of("mixtral").project.path
    hub, native = Checkpoint(place / "base", "hub"), Checkpoint(place / "native" / "base", "native")
    convert = Concatenate.convert
    monkeypatch.setattr(Concatenate, "convert", lambda self, *a, **k: {n: t * 2 for n, t in convert(self, *a, **k).items()})
    with pytest.raises(WorkbenchError, match=r"transformers computes .*gate_up_proj from it instead of only moving rows"):
        Aligned(hub, native.specs, native.config)


def test_live_names(family_of: Callable[[str], Family]) -> None:
    place = family_of("mixtral").project.path
    base = Checkpoint(place / "base", "base")
    names = live_names(base.config, base.specs)
    assert names["model.layers.1.block_sparse_moe.experts.3.w3.weight"] == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert names["model.layers.1.block_sparse_moe.gate.weight"] == ["model.layers.1.mlp.gate.weight"]
    assert live_names(base.config, {"stray": base.specs["lm_head.weight"]}) == {"stray": []}
    multimodal = Checkpoint(family_of("gemma3, multimodal").project.path / "base", "base")
    found = live_names(multimodal.config, multimodal.specs)
    assert found["language_model.model.norm.weight"] == ["model.language_model.norm.weight"]
    assert ties_head(multimodal.config)
    assert not ties_head(base.config)


# -- layers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers(layout: str, family_of: Callable[[str], Family]) -> None:
    """The text decoder's stack, `where: layers` and a schedule over depth, against the live models."""
    family = family_of(layout)
    weights = family.project.resolve(BRICKS + ARITHMETIC, "arithmetic.yaml").base
    assert (weights.layout.prefix, weights.layout.depth) == (LAYOUTS[layout].prefix, LAYERS)
    assert weights.layout.in_layer(0)
    base, one = (stored(family.project.path / at) for at in ("base", "one"))

    def merged(fields: dict[str, Any]) -> Tensors:
        text = recipe({"merge": "task_arithmetic", **fields})
        return compute(compose(family.project.resolve(text, "layers.yaml"), CPU).model, torch.float32, CPU)

    only = merged({"bricks": {"one": 1.0}, "where": {"layers": "1:"}})
    ramp = merged({"bricks": {"one": {"first": 0.0, "last": 1.0}}})
    for name, tensor in only.items():
        second = name.startswith(f"{LAYOUTS[layout].prefix}1.")
        last = second or (name.endswith(("norm.weight", "norm.bias", "norm_f.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight", "embed_out.weight")) \
            and ".0." not in name and "tower" not in name and "projector" not in name)  # fmt: skip
        torch.testing.assert_close(tensor, one[name] if second else base[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(ramp[name], one[name] if last else base[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("names", "config", "prefix"),
    [
        (["visual.blocks.{}.a", "model.language_model.layers.{}.a"], {"text_config": {"num_hidden_layers": 3}}, "model.language_model.layers."),
        (["vision_tower.encoder.layers.{}.a", "language_model.model.layers.{}.mlp.experts.{}.w1"], {"num_hidden_layers": 3}, "language_model.model.layers."),
        (["multi_modal_projector.layers.{}.a", "audio_tower.layers.{}.a", "decoder.layers.{}.a"], {"text_config": {"n_layer": 3}}, "decoder.layers."),
        (["model.layers.{}.a", "model.layers.3.a", "mtp.layers.0.a"], {"num_hidden_layers": 3}, "model.layers."),
    ],
)  # fmt: skip
def test_stack_among_others(names: list[str], config: dict[str, Any], prefix: str) -> None:
    layout = Layout.from_config([n.format(i, i) for n in names for i in range(3)], config)
    assert (layout.prefix, layout.depth) == (prefix, 3)
    assert len(layout.in_layer(2)) == 1
    assert layout.layer(f"{prefix}3.a") is None, "layers beyond the depth are not loaded by transformers"
    assert [layout.position(n) for n in ("visual.blocks.2.a", "model.embedding_norm.weight", "model.embed_tokens.weight")] == [
        0,
        1,
        0,
    ]


# -- other uses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_growth(layout: str, family_of: Callable[[str], Family]) -> None:
    """A grown model that computes the same and loads, or a word that this architecture cannot be grown."""
    family = family_of(layout)
    text = "bricks: {}\nsteps: [{grow: depth, blocks: 1}]\n"
    if layout == "jamba":
        with pytest.raises(WorkbenchError, match=r"refers to layers by number \(attn_layer_period, expert_layer_period\)"):
            family.project.run(text, "grow.yaml")
        return
    grown = loaded(family.kind, Path(family.project.run(text, "grow.yaml")["model"]))
    assert grown.config.get_text_config().num_hidden_layers == LAYERS + 1
    torch.testing.assert_close(logits(grown), logits(family.base), atol=1e-5, rtol=1e-5)


def test_command_line(family_of: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family = family_of("gemma3, multimodal")
    family.project.write(BRICKS + ARITHMETIC, "cli.yaml")
    monkeypatch.chdir(family.project.path)
    for command in (["plan", "recipes/cli.yaml"], ["run", "recipes/cli.yaml", "-o", str(tmp_path / "out"), "--quiet"]):
        call(*command)
    base, tuned = family.states()
    merged = loaded(family.kind, tmp_path / "out").state_dict()
    close(merged, {n: t + sum(w * (tuned[b][n] - t) for b, w in WEIGHTS.items()) for n, t in base.items()})


def test_multimodal_without_a_language_model_class(tmp_path: Path) -> None:
    """llava: merged by tensor name; a live model of the merge gives the logits of the written one to texts."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    made = LlavaConfig(text_config=config("llama"), vision_config=vision, image_token_index=3)
    states = {}
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(made)
        model.save_pretrained(tmp_path / name, save_original_format=name != "two")
        states[name] = model.state_dict()
    (tmp_path / "recipes").mkdir()
    project = Project(tmp_path)
    document = project.run(BRICKS + ARITHMETIC)
    assert project.resolve(BRICKS + ARITHMETIC).base.layout.prefix == "language_model.model.layers."
    merged = loaded(LlavaForConditionalGeneration, Path(document["model"]))
    base = states["base"]
    close(merged.state_dict(), {n: t + sum(w * (states[b][n] - t) for b, w in WEIGHTS.items()) for n, t in base.items()})
    live, tokens = materialize(project.resolve(BRICKS + ARITHMETIC), CPU), torch.tensor([[5, 9, 12, 7]])
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, merged.eval()(tokens).logits)
