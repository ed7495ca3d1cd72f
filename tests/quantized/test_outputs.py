"""Results in the format of their base: the bytes that the format's library gives, read by transformers, with the error that is stated."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from worlds import packed_models
from worlds.commands import document, refused
from worlds.project import CPU, Project
from worlds.quantized_models import E2M1, quantize, save_gpt_oss
from worlds.tiny import VOCABULARY, edit_json, save_adapter, save_model, save_tokenizer

from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import INDEX, SINGLE
from workbench.quantized.mxfp4 import as_mxfp4
from workbench.quantized.outputs import PackedWeights
from workbench.run.materialize import configuration_digest
from workbench.weights import writer
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import load

SIZE = (8, 8)
FORMS = ["mxfp4", "fp8", "exponents"]
MERGE = "bricks: {tuned: tuned}\nsteps: [{merge: task_arithmetic, lambda: 0.7}]\n"


def save_deepseek(out: Path) -> Path:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=3, num_experts_per_tok=2, n_group=1, topk_group=1,
        n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(out)
    save_tokenizer(out)
    return out


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> Project:
    """A packed base, and a fine-tune of it in bfloat16 whose packed weights differ in the second layer alone, and there in half of their rows."""
    return built(tmp_path, monkeypatch, form)


def built(folder: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> Project:
    monkeypatch.setattr(packed_models, "BLOCK", SIZE)
    (folder / "recipes").mkdir()
    base = (save_gpt_oss if form == "mxfp4" else save_deepseek)(folder / "base")
    worth = quantize(base, "mxfp4") if form == "mxfp4" else packed_models.save_fp8(base, "block" if form == "fp8" else form)
    tuned = shutil.copytree(base, folder / "tuned")
    generator = torch.Generator().manual_seed(1)
    for name, values in worth.items():
        if "layers.1" in name or "layernorm" in name:
            half = values[..., values.shape[-1] // 2 :]
            half += 0.1 * values.std() * torch.randn(half.shape, generator=generator)
    save_file({name: values.bfloat16() for name, values in worth.items()}, tuned / SINGLE, metadata={"format": "pt"})
    edit_json(tuned / "config.json", quantization_config=None)
    monkeypatch.chdir(folder)
    return Project(folder)


def named(form: str) -> str:
    return "mxfp4" if form == "mxfp4" else "fp8"


def recipe(form: str, rest: str = MERGE, output: str = "") -> str:
    return f"base: base\n{rest}output: {{format: {named(form)}{output}}}\n"


def bytes_of(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a checkpoint."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                data = opened.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[name] = part.get_dtype(), part.get_shape(), data
    return found


def library(name: str, values: Tensor, form: str) -> dict[str, Tensor]:
    """What the library of the format makes of a weight."""
    if form == "mxfp4":
        codes, scales = by_hand(values.float().transpose(1, 2).reshape(-1, 32))
        grid = (values.shape[0], values.shape[2], values.shape[1] // 32)
        return {f"{name}_blocks": codes.view(*grid, 16), f"{name}_scales": scales.view(grid)}
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    said = SimpleNamespace(weight_block_size=SIZE, scale_fmt="ue8m0" if form == "exponents" else None)
    made: dict[str, Tensor] = Fp8Quantize(SimpleNamespace(quantization_config=said)).convert({name: values})
    return made


def by_hand(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 number by number: a power of two for which no number is above 6, and the nearest number, or the even one of two."""
    codes, scales = torch.zeros(len(blocks), 16, dtype=torch.uint8), torch.zeros(len(blocks), dtype=torch.uint8)
    for b, block in enumerate(blocks.tolist()):
        power = next((n for n in range(-126, 128) if max(map(abs, block)) <= 6 * 2.0**n), 0)
        scales[b] = power + 127 if any(block) else 0
        for i, value in enumerate(block):
            off = [abs(abs(value) / 2.0**power - number) for number in E2M1]
            code = min((c for c in range(8) if off[c] == min(off)), key=lambda c: c % 2) + 8 * (math.copysign(1, value) < 0)
            codes[b, i // 2] += code << 4 * (i % 2)
    return codes, scales


def test_mxfp4_is_rounded_as_by_triton_kernels() -> None:
    """Drawn numbers of all sizes, all ties, numbers beside them, zeros of both signs and the borders of scales."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200, 32, generator=generator) * torch.exp2(torch.randint(-60, 60, (200, 1), generator=generator))
    grid = torch.arange(32) / 4 * 0.75 * torch.where(torch.arange(32) % 3 == 0, -1, 1)
    ties = torch.stack(
        [torch.cat([torch.tensor([6.0, -5.0, 2.5, 3.5, 0.25, -0.75, 1.25, 1.75]), grid[:24]]) * 2.0**n for n in range(-9, 9)]
    )
    edge = torch.full((3, 32), 3.0)
    edge[1, 0], edge[2] = 6.0 * (1 + 2**-7), torch.tensor([0.0, -0.0] * 16)
    blocks = torch.cat([drawn, ties, ties * (1 + 2**-7), edge]).bfloat16().float()
    codes, scales = as_mxfp4(blocks)
    wanted = by_hand(blocks)
    assert torch.equal(codes, wanted[0])
    assert torch.equal(scales, wanted[1])
    mxfp = pytest.importorskip("triton_kernels.numerics_details.mxfp", exc_type=ImportError)
    theirs = mxfp.downcast_to_mxfp_torch(blocks.bfloat16(), torch.uint8, axis=1)
    assert torch.equal(codes.view(len(blocks), -1), theirs[0])
    assert torch.equal(scales[:, None], theirs[1])


def test_result(project: Project, form: str) -> None:
    """Names, shapes, dtypes and quantization_config are the base's. Changed weights are packed as the library packs the plain result."""
    done, plain = project.run(recipe(form)), project.run(f"base: {{id: base, dequantize: true}}\n{MERGE}", "plain.yaml")
    base, found = bytes_of(project.path / "base"), bytes_of(Path(done["model"]))
    assert {name: row[:2] for name, row in found.items()} == {name: row[:2] for name, row in base.items()}
    configs = [json.loads((folder / "config.json").read_text("utf-8")) for folder in (project.path / "base", Path(done["model"]))]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    merged, read = load_file(Path(plain["model"]) / SINGLE), Checkpoint(Path(done["model"]), "result")
    packed = [name for name, entry in read.entries.items() if entry.packing]
    errors = {}
    for name, values in merged.items():
        if name not in packed:
            assert found[name][2] == values.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), name
            continue
        stored = [one for one in base if one.startswith(name)]
        if "layers.1" not in name:
            assert all(found[one] == base[one] for one in stored), name
        else:
            for one, tensor in library(name, values, form).items():
                theirs, mine = (
                    tensor.contiguous().view(torch.uint8),
                    torch.frombuffer(bytearray(found[one][2]), dtype=torch.uint8),
                )
                before = torch.frombuffer(bytearray(base[one][2]), dtype=torch.uint8)
                same = mine == theirs.flatten()
                assert (same | (mine == before)).all(), one
                assert same.float().mean() > 0.4, one
                assert "scale" in one or not torch.equal(mine, before), one
        after = load(read, name, torch.bfloat16).double()
        errors[name] = ((after - values.double()).norm().item(), values.double().norm().item())
    assert len(packed) == {"mxfp4": 4}.get(form, 21)
    told, relative = done["packing"], {name: off / norm for name, (off, norm) in errors.items()}
    assert told["format"] == named(form)
    assert told["unchanged"] == sum(value == 0 for value in relative.values()) == sum("layers.1" not in name for name in packed)
    assert told["worst"] == max(relative, key=lambda name: relative[name])
    assert told["largest"] == pytest.approx(max(relative.values()))
    assert told["mean"] == pytest.approx(sum(relative.values()) / len(relative))
    whole = [math.hypot(*column) for column in zip(*errors.values(), strict=True)]
    assert told["error"] == pytest.approx(whole[0] / whole[1])
    assert 1e-4 < told["error"] < {"mxfp4": 0.12}.get(form, 0.04)
    record = json.loads((Path(done["run"]) / "run.json").read_text("utf-8"))["output"]
    assert record["packing"] == told
    assert record["bytes"] == sum(len(data) for *_, data in found.values())
    assert f"relative error {told['error']:.2e}" in (Path(done["model"]) / "README.md").read_text("utf-8")


@pytest.mark.parametrize("form", ["mxfp4", "fp8"], indirect=True)
def test_transformers_loads_it(project: Project, form: str) -> None:
    """Logits differ from those of the plain result by no more than the weights do, and equal those of the weights as they are read here."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    kind = Mxfp4Config(dequantize=True) if form == "mxfp4" else FineGrainedFP8Config(weight_block_size=SIZE, dequantize=True)
    done, plain = project.run(recipe(form)), project.run(f"base: {{id: base, dequantize: true}}\n{MERGE}", "plain.yaml")
    packed = AutoModelForCausalLM.from_pretrained(done["model"], dtype=torch.bfloat16, quantization_config=kind)
    again = project.run(f"base: {{id: {done['model']}, dequantize: true}}\nsteps: []\n", "again.yaml")
    models = [packed, *(AutoModelForCausalLM.from_pretrained(one["model"], dtype=torch.bfloat16) for one in (again, plain))]
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, here, whole = (model.eval().float()(tokens).logits for model in models)
    torch.testing.assert_close(theirs, here)
    off = ((theirs - whole).norm() / whole.norm()).item()
    assert 0 < off < 4 * done["packing"]["error"] + 0.01


def test_without_a_change_the_bytes_are_the_base_s(project: Project, form: str) -> None:
    """Also where rounding again gives other bytes, and with small blocks of rows and several threads."""
    for name, rest in {"none": "steps: []\n", "zero": MERGE.replace("0.7", "0")}.items():
        done = project.run(recipe(form, rest), f"{name}.yaml", threads=1 + (name == "zero"))
        assert bytes_of(Path(done["model"])) == bytes_of(project.path / "base")
        assert done["packing"]["error"] == 0
        assert done["packing"]["unchanged"] == done["packing"]["weights"]


def test_equal_files_with_threads_shards_and_after_an_interruption(
    project: Project, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, runs = project.run(recipe(form)), project.path / "runs"
    files = {file.name: file.read_bytes() for file in Path(first["model"]).glob("*.safetensors")}
    shutil.move(runs, project.path / "before")
    plain_write, left = writer._write_tensor, [7]

    def stops(*args: Any) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return plain_write(*args)

    monkeypatch.setattr(writer, "_write_tensor", stops)
    with pytest.raises(KeyboardInterrupt):
        project.run(recipe(form))
    left[0] = 1000
    again = project.run(recipe(form), threads=3)
    assert left[0] > 1000 - len(bytes_of(Path(first["model"])))  # it was resumed
    assert {file.name: file.read_bytes() for file in Path(again["model"]).glob("*.safetensors")} == files
    assert again["packing"] == first["packing"]
    assert again["configuration"] == first["configuration"]
    many = project.run(recipe(form, output=", shard_size: 20KB"), "shards.yaml")
    assert (Path(many["model"]) / INDEX).is_file()
    assert bytes_of(Path(many["model"])) == bytes_of(Path(first["model"]))


def test_evaluation_takes_the_packed_numbers(project: Project, form: str) -> None:
    """A configuration that was not run has the digest of the one that was: that of the numbers that the files are worth."""
    resolved = project.resolve(recipe(form))
    in_memory, tensors = configuration_digest(resolved, CPU)
    assert tensors is not None
    shutil.rmtree(resolved.cache / "configurations")
    done = project.run(recipe(form))
    assert done["configuration"] == in_memory
    read = Checkpoint(Path(done["model"]), "result")
    assert all(torch.equal(load(read, name, torch.bfloat16), values.bfloat16()) for name, values in tensors.items())
    plain = project.resolve(f"base: {{id: base, dequantize: true}}\n{MERGE}", "plain.yaml")
    assert plain.key != resolved.key


def test_plan(project: Project, form: str) -> None:
    file = project.write(recipe(form))
    planned = document("plan", str(file))
    done = project.run(recipe(form))
    assert planned["format"] == named(form)
    assert planned["write_bytes"] == sum(len(data) for *_, data in bytes_of(Path(done["model"])).values())
    assert planned["problems"] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MERGE + "output: {format: fp8}",
            "not stored in 8-bit floats with a scale for each block (`weight_scale_inv`): its quant_method is mxfp4",
        ),
        (MERGE + "output: {format: mxfp4, dtype: float32}", "it has no `dtype`"),
        (MERGE + "output: {format: mxfp4, form: adapter}", "it has no `form: adapter`"),
        (MERGE + "output: {format: int4}", "mxfp4"),
        (
            "steps: [{grow: prune_experts, keep: [[0, 1], [0, 1]]}]\noutput: {format: mxfp4}",
            "would change what `grow: prune_experts` made and checked",
        ),
    ],
)
@pytest.mark.parametrize("form", ["mxfp4"], indirect=True)
def test_refused_by_plan_and_run(project: Project, text: str, message: str) -> None:
    file = project.write(f"base: {{id: base, dequantize: true}}\n{text}\n")
    for command in ("plan", "run"):
        error = refused(command, str(file))
        assert message in error.message
    assert not list((project.path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("none", "its weights are not quantized"),
        ("group", "its quant_method is compressed-tensors"),
        ("tensor", "it has scales of activations"),
        ("channel", "its quant_method is compressed-tensors"),
        ("plain", "its config.json has no quantization_config"),
        ("adapted", "this base has an adapter on it"),
    ],
)
def test_other_bases_are_refused(layout: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    base = save_model(tmp_path / "base", "llama", layers=2)
    if layout == "group":
        quantize(base, layout)
    elif layout == "adapted":
        save_adapter(base, tmp_path / "lora", seed=1)
        packed_models.save_fp8(base, "block")
    elif layout != "none":
        packed_models.save_fp8(base, layout)
    monkeypatch.chdir(tmp_path)
    named = "{adapter: lora, on: base}" if layout == "adapted" else "base"
    file = Project(tmp_path).write(f"base: {named}\nsteps: []\noutput: {{format: fp8}}\n")
    for command in ("plan", "run"):
        error = refused(command, str(file))
        assert said in error.message
        assert error.hint is not None


def test_the_other_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = built(tmp_path, monkeypatch, "fp8")
    error = refused("plan", str(project.write(recipe("mxfp4"))))
    assert error.hint is not None
    assert "Write `format: fp8`, which the base has" in error.hint


def test_without_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = built(tmp_path, monkeypatch, "fp8")
    monkeypatch.setattr("workbench.ground.parts.parts", dict)
    assert "`format: fp8` needs the part 'quantized'" in refused("run", str(project.write(recipe("fp8")))).message


def test_a_result_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = built(tmp_path, monkeypatch, "fp8")
    tuned = load_file(tmp_path / "tuned" / SINGLE)
    tuned["model.layers.1.self_attn.o_proj.weight"] *= 1e30
    save_file(tuned, tmp_path / "tuned" / SINGLE, metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"the result is not finite in BF16 \(rows \d+-\d+\)"):
        project.run(recipe("fp8", MERGE.replace("0.7", "1e20")))


def test_blocks_that_do_not_fill_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 24 columns and 16 rows, which divide no size: values are those of the library for a matrix filled with zeros."""
    monkeypatch.setattr(packed_models, "BLOCK", (16, 24))
    base = save_deepseek(tmp_path / "base")
    worth = packed_models.save_fp8(base, "block")
    checkpoint = Checkpoint(base, "base")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = SimpleNamespace(specs=checkpoint.specs, origin=str, open=lambda one, device: Moved(checkpoint.open(one, device)))
    packed = PackedWeights(moved, checkpoint, "fp8")  # type: ignore[arg-type]
    values = (2 * worth[name].bfloat16().float()).bfloat16()
    full = torch.nn.functional.pad(values, (0, -values.shape[1] % 24, 0, -values.shape[0] % 16))
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    said = SimpleNamespace(weight_block_size=(16, 24), scale_fmt=None)
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=said)).convert({name: full})
    codes, scales = load(packed.stored, name, torch.uint8), load(packed.stored, f"{name}_scale_inv", torch.float32)
    assert torch.equal(codes, theirs[name][: values.shape[0], : values.shape[1]].view(torch.uint8))
    assert torch.equal(scales, theirs[f"{name}_scale_inv"])


class Moved:
    """A source with twice the numbers in bfloat16."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.source.read(start, stop, out)
        out.copy_(2 * out.bfloat16().float())
