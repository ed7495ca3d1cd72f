"""Where an adapter's updates lie on disk: experts, projections that disk and live model join in other ways, tied heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.flavours import BOUND, Flavour, logits, reference, relative, resolved, save_base, save_flavour
from worlds.project import CPU, Project
from worlds.tiny import VOCABULARY, edit_json, save_adapter, save_finetuned, save_tokenizer, tensors_of

from workbench.adapters.bind import bind
from workbench.ground.errors import WorkbenchError
from workbench.models.live import compute, live_model
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.run.plan import plan

COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "initializer_range": 0.2, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 64}  # fmt: skip
# model_type -> (its configuration, what is adapted, the tensors on disk that the adapter reaches in layer 1)
JOINED: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "gpt_oss": (  # experts stored as [in, out], the same on disk
        {"intermediate_size": 16, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"},
    ),
    "granitemoe": (  # stacked on disk under another name
        {"intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2},
        {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"block_sparse_moe.input_linear.weight", "self_attn.v_proj.weight"},
    ),
    "gpt2": (  # a square Conv1D as a parameter, which PEFT updates as it is stored
        {"n_inner": 24}, {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]},
        {"transformer.h.1.attn.c_proj.weight"},
    ),
    "sarvam_moe": (  # one projection on disk, three in the live model
        {"intermediate_size": 24, "moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8,
         "n_group": 1, "topk_group": 1},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "target_parameters": ["experts.down_proj"]},
        {"attention.query_key_value.weight", "attention.dense.weight", "mlp.experts.0.down_proj.weight", "mlp.experts.1.down_proj.weight"},
    ),
}  # fmt: skip


def check_against_peft(base: Path, adapter: Path, project: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    recipe = resolved(base, adapter, project)
    model = compose(recipe, CPU).model
    tensors = compute(model, torch.float32, CPU)
    live, peft = live_model(model.config, tensors, base, CPU), reference(base, adapter)
    error = relative(logits(live), logits(peft))
    assert error <= BOUND
    return recipe, tensors


def changed(base: Path, tensors: dict[str, torch.Tensor]) -> set[str]:
    before = tensors_of(base)
    return {name for name, t in tensors.items() if name not in before or not torch.equal(t, before[name].float())}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", JOINED)
def test_joined_weights(family: str, tmp_path: Path) -> None:
    import transformers

    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    fields, settings, reached = JOINED[family]
    torch.manual_seed(0)
    base = tmp_path / "base"
    settled = transformers.AutoConfig.for_model(family, **COMMON, **fields)
    transformers.AutoModelForCausalLM.from_config(settled).float().save_pretrained(base)
    save_tokenizer(base)
    adapter = save_flavour(Flavour(family, settings), base, tmp_path / "adapter")
    recipe, tensors = check_against_peft(base, adapter, tmp_path)
    assert {n.removeprefix("model.layers.1.") for n in changed(base, tensors) if ".1." in n[:16]} == reached
    bound = bind(recipe.bricks["one"].adapter, recipe.base.weights.specs, recipe.base)
    for name in bound.places:  # products where the tensor is a matrix, and then the same numbers as by rows
        factors, spec = bound.factors(name, CPU), recipe.base.weights.specs[name]
        assert (factors is None) == (len(spec.shape) == 3)
        out = torch.empty(spec.rows, spec.cols)
        bound.open_delta(name, CPU).read_delta(0, spec.rows, out, out)
        if factors is not None:
            torch.testing.assert_close(factors.left @ factors.right, out)


@pytest.mark.filterwarnings("ignore")
def test_an_update_of_a_parameter_in_the_other_orientation_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    settings: dict[str, Any] = {"target_modules": [], "target_parameters": ["mlp.c_proj.weight"]}
    adapter = save_flavour(Flavour("gpt2", settings), base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if "mlp" in name and ".lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = tensors[other].T.contiguous(), tensors[name].T.contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"c_proj\.weight is .* in the base, the adapter's update is"):
        compose(resolved(base, adapter, tmp_path), CPU)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "mixtral", "mixtral")


@pytest.mark.filterwarnings("ignore")
def test_adapter_with_names_of_transformers_4(mixtral: Path, tmp_path: Path) -> None:
    """Per-expert modules stand on disk as the adapter names them; PEFT converts them for the live model."""
    generator = torch.Generator().manual_seed(3)
    shapes = {n: t.shape for n, t in tensors_of(mixtral).items() if ".experts." in n or "q_proj" in n}
    tensors = {}
    for name, (out, width) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.2
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.2
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": 4,
                "lora_alpha": 6,
                "target_modules": ["q_proj", "w1", "w2", "w3"],
            }
        )
    )
    _, merged = check_against_peft(mixtral, adapter, tmp_path)
    assert changed(mixtral, merged) == set(shapes)


@pytest.mark.filterwarnings("ignore")
def test_experts_that_are_stacked_on_disk(mixtral: Path, tmp_path: Path) -> None:
    """A base whose files hold what transformers 5 has in memory; whole experts saved by the adapter."""
    from transformers import AutoModelForCausalLM

    base = Path(shutil.copytree(mixtral, tmp_path / "base"))
    live = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).state_dict()
    save_file({n: t.clone() for n, t in live.items()}, base / "model.safetensors", metadata={"format": "pt"})
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    adapter = save_flavour(Flavour("mixtral", settings), base, tmp_path / "adapter")
    _, stacked = check_against_peft(base, adapter, tmp_path)
    _, apart = check_against_peft(mixtral, adapter, tmp_path)
    w1 = apart["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    torch.testing.assert_close(stacked["model.layers.1.mlp.experts.gate_up_proj"][2, : len(w1)], w1)

    whole = live["model.layers.1.mlp.experts.gate_up_proj"] + 1
    saved = {**tensors_of(adapter), "base_model.model.model.layers.1.mlp.experts.gate_up_proj": whole}
    save_file({k: t for k, t in saved.items() if ".experts.lora" not in k}, adapter / "adapter_model.safetensors")
    recipe = resolved(mixtral, adapter, tmp_path)
    tensors = compute(compose(recipe, CPU).model, torch.float32, CPU)
    for expert in range(3):
        for half, part in enumerate(("w1", "w3")):
            ours = tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"]
            torch.testing.assert_close(ours, whole[expert, half * len(w1) : (half + 1) * len(w1)])


def test_nan_in_one_expert(mixtral: Path, tmp_path: Path) -> None:
    """Named with the adapter's own key and index, when that expert is read and not before."""
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    adapter = save_flavour(Flavour("mixtral", settings), mixtral, tmp_path / "adapter")
    key = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    tensors = tensors_of(adapter)
    tensors[key][5, 7] = float("nan")  # rank 4, 3 experts: column 7 is term 2 of expert 1
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    recipe = resolved(mixtral, adapter, tmp_path)
    bound = bind(recipe.bricks["one"].adapter, recipe.base.weights.specs, recipe.base)
    assert bound.factors("model.layers.1.block_sparse_moe.experts.0.w2.weight", CPU) is not None
    with pytest.raises(WorkbenchError, match=rf"brick 'one': {key} holds nan at \[5, 7\]; expected finite"):
        bound.factors("model.layers.1.block_sparse_moe.experts.1.w2.weight", CPU)


def test_dense_updates_need_a_whole_tensor(mixtral: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{module}.ia3_l": torch.ones(48, 1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["gate_up_proj"]}))
    with pytest.raises(WorkbenchError, match=r"module model\.layers\.0\.mlp\.experts\.gate_up_proj has no weight in the base"):
        resolved(mixtral, adapter, tmp_path)


# -- prefixes, and heads of tied embeddings under them


@pytest.mark.filterwarnings("ignore")
def test_files_without_the_root(tmp_path: Path) -> None:
    """gpt2 as the hub has it: no `transformer.`, no word on ties in config.json, which transformers ties by default."""
    base = save_base(tmp_path / "base", "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in tensors_of(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_json(base / "config.json", tie_word_embeddings=None)
    adapter = save_flavour(
        Flavour("gpt2", {"target_modules": ["c_attn", "lm_head"], "bias": "lora_only"}), base, tmp_path / "adapter"
    )
    _, merged = check_against_peft(base, adapter, tmp_path)
    assert set(merged) - set(tensors) == {"lm_head.weight"}
    assert changed(base, merged) == {"lm_head.weight", *(f"h.{i}.attn.c_attn.{x}" for i in range(4) for x in ("weight", "bias"))}


@pytest.mark.filterwarnings("ignore")
def test_language_model_inside_a_larger_model(tmp_path: Path) -> None:
    """gemma3 with a vision tower: `language_model.model.` on disk, `model.language_model.` live, the head beside both."""
    import transformers

    text = {**COMMON, "intermediate_size": 24, "head_dim": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    settled = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.Gemma3ForConditionalGeneration(settled).float().save_pretrained(base)
    save_tokenizer(base)
    settings = {"target_modules": r".*(lm_head|language_model.*q_proj)"}
    adapter = save_flavour(Flavour("gemma3", settings), base, tmp_path / "adapter")
    recipe, merged = check_against_peft(base, adapter, tmp_path)
    layers = {f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert changed(base, merged) == {"language_model.lm_head.weight", *layers}
    assert recipe.base.config["text_config"]["tie_word_embeddings"] is False


def untied_copy(tied: Path, out: Path, head: torch.Tensor) -> Path:
    """A checkpoint of a tied family with a head of its own."""
    shutil.copytree(tied, out)
    tensors = load_file(out / "model.safetensors")
    save_file({**tensors, "lm_head.weight": head}, out / "model.safetensors", metadata={"format": "pt"})
    edit_json(out / "config.json", tie_word_embeddings=False)
    return out


def test_checkpoint_with_a_head_of_its_own(project: Project, llama: Path, tmp_path: Path) -> None:
    """Over a tied base and beside a tied brick: the output has a head, and it is the sum of both bricks' changes."""
    base = tensors_of(llama)
    embeddings = base["model.embed_tokens.weight"]
    untied_copy(llama, tmp_path / "untied", (embeddings.float() + 0.25).to(embeddings.dtype))
    text = "bricks: {own: {checkpoint: untied}, full: bricks/full}\nsteps: [{merge: task_arithmetic}]\n"
    recipe = project.resolve(text)
    assert recipe.warnings[0] == (
        "brick 'own' has a head of its own: the output is untied, with its head stored as a separate tensor"
    )
    merged = project.tensors(text)
    full = tensors_of(project.path / "bricks" / "full")["model.embed_tokens.weight"].float()
    own = tensors_of(tmp_path / "untied")["lm_head.weight"].float()
    torch.testing.assert_close(merged["model.embed_tokens.weight"], full)
    torch.testing.assert_close(merged["lm_head.weight"], full + own - embeddings.float())
    assert compose(recipe, CPU).model.config["tie_word_embeddings"] is False
    tied = project.resolve("bricks: {full: bricks/full}\nsteps: [{merge: task_arithmetic}]\n")
    assert not tied.warnings
    assert "lm_head.weight" not in tied.base.weights.specs


def test_untied_heads_reach_trained_tokens(project: Project, llama: Path, tmp_path: Path) -> None:
    untied_copy(llama, tmp_path / "untied", tensors_of(llama)["model.embed_tokens.weight"] + 1)
    recipe = project.resolve(
        "bricks: {own: {checkpoint: untied}, full: bricks/full}\nsteps: [{merge: average, bricks: [full]}]\n"
    )
    assert "lm_head.weight" not in recipe.base.weights.specs
    assert recipe.key == project.resolve("bricks: {full: bricks/full}\nsteps: [{merge: average, bricks: [full]}]\n").key
    save_adapter(llama, tmp_path / "head", seed=5, target_modules=["lm_head"])
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [7]}
    save_flavour(Flavour("llama", settings), llama, tmp_path / "tokens")
    step = "steps: [{merge: task_arithmetic, bricks: {tokens: 1}}]\n"
    alone = project.tensors(f"bricks: {{tokens: {{adapter: tokens}}}}\n{step}")
    both = project.tensors(
        "bricks: {tokens: {adapter: tokens}, head: {adapter: head}}\nsteps: [{merge: task_arithmetic, bricks: {tokens: 1, head: 0}}]\n"
    )
    row = tensors_of(tmp_path / "tokens")["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"][0]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(both[name][7], row)
        torch.testing.assert_close(both[name], alone["model.embed_tokens.weight"])
    assert "lm_head.weight" not in alone


@pytest.mark.filterwarnings("ignore")
def test_run_writes_an_untied_model(project: Project, llama: Path, tmp_path: Path) -> None:
    """plan says it, run writes it, transformers loads it with nothing missing and does not tie it again; also as a brick."""
    from transformers import AutoModelForCausalLM

    adapter = save_adapter(llama, tmp_path / "head", seed=5, target_modules=["lm_head", "q_proj"])
    text = "name: inner\nbricks: {head: {adapter: head}}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32}\n"
    recipe = project.resolve(text)
    assert any("brick 'head' updates only the head: the output is untied" in w for w in plan(recipe, tmp_path / "runs").warnings)
    out = Path(project.run(text)["model"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    peft = reference(llama, adapter)
    error = relative(logits(model), logits(peft))
    assert error <= BOUND
    outer = "bricks: {inner: {recipe: recipes/inner.yaml}, full: bricks/full}\nsteps: [{merge: linear, bricks: {inner: 1, full: 0}}]\n"
    project.write(text, "inner.yaml")
    again = project.resolve(outer)
    assert again.warnings[0].startswith("brick 'inner' has a head of its own")
    for name, tensor in project.tensors(outer).items():
        torch.testing.assert_close(tensor, tensors_of(out)[name].float())


def test_every_method_takes_dense_adapters(project: Project, llama: Path, tmp_path: Path) -> None:
    """DoRA beside LoRA and a checkpoint in methods that read deltas more than once; the same bytes for any block size."""
    import workbench.weights.specs as specs_module

    save_flavour(Flavour("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}), llama, tmp_path / "dora")
    text = "bricks: {dora: {adapter: dora}, one: bricks/one, full: bricks/full}\nsteps: [{merge: ties, density: 0.3}]\n"
    merged = project.tensors(text)
    before = specs_module.BLOCK_ELEMENTS
    try:
        specs_module.BLOCK_ELEMENTS = 100
        blocks = project.tensors(text)
    finally:
        specs_module.BLOCK_ELEMENTS = before
    for name, tensor in merged.items():
        assert torch.equal(blocks[name], tensor), name
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], tensors_of(llama)["model.layers.0.self_attn.q_proj.weight"].float()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["ln_f"]}, {"lora_bias": True}])
def test_plan_and_run(settings: dict[str, Any], model_of: Callable[..., Path], tmp_path: Path) -> None:
    """From the file of a recipe to a model on disk, one flavour of each kind; threads change no byte."""
    base = model_of("gpt2", torch.float32)
    save_flavour(Flavour("gpt2", {"target_modules": ["c_attn", "c_fc"], **settings}), base, tmp_path / "adapter")
    data = {
        "version": 1,
        "name": "x",
        "base": str(base),
        "bricks": {"one": {"adapter": "adapter"}},
        "steps": [{"merge": "task_arithmetic"}],
    }
    recipe = resolve(from_data(data, tmp_path))
    assert len(recipe.warnings) == 1
    assert plan(recipe, tmp_path / "runs").warnings[0] == recipe.warnings[0]
    documents = [execute(recipe, tmp_path / f"runs{n}", Work(CPU, n)).to_dict() for n in (1, 2)]
    assert documents[0]["configuration"] == documents[1]["configuration"]
    ours = tensors_of(Path(documents[0]["model"]))
    theirs = reference(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_tied_and_untied_checkpoint_bricks(project: Project, llama: Path, tmp_path: Path) -> None:
    """A stored copy of the embeddings is no head of its own."""
    save_finetuned(llama, tmp_path / "copy", seed=8)
    tensors = tensors_of(tmp_path / "copy")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "copy" / "model.safetensors"
    )
    recipe = project.resolve("bricks: {copy: {checkpoint: copy}}\nsteps: [{merge: average}]\n")
    assert "lm_head.weight" not in recipe.base.weights.specs
    assert not recipe.warnings
    # Rows are aligned by token in the embeddings and in the head that only one brick has; DoRA beside it.
    untied_copy(llama, tmp_path / "untied", tensors_of(llama)["model.embed_tokens.weight"] + 1)
    save_flavour(Flavour("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}), llama, tmp_path / "dora")
    bricks = "bricks: {own: {checkpoint: untied}, dora: {adapter: dora}, full: bricks/full}\n"
    steps = "steps: [{merge: task_arithmetic, bricks: {own: 0.5, dora: 1, full: 0.25}}]\n"
    plain, aligned = project.tensors(bricks + steps), project.tensors(f"{bricks}tokenizer: {{source: base}}\n{steps}")
    assert "lm_head.weight" in aligned
    for name, tensor in plain.items():
        torch.testing.assert_close(aligned[name], tensor, rtol=0, atol=1e-6)
