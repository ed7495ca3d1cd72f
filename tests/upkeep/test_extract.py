"""`brick extract`, `bake`, `verify`: a LoRA comes back from its checkpoint, nothing is dropped in silence, bad input is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from worlds.peft_runs import config, peft_logits
from worlds.project import CPU, Project
from worlds.tiny import edit_json, save_adapter, save_finetuned, tensors_of

from workbench.adapters.approximate import Policy, rounding
from workbench.adapters.bind import bind
from workbench.adapters.read import WEIGHTS, Adapter
from workbench.bricks.brick import Brick
from workbench.bricks.card import read_card
from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError
from workbench.run.device import Work
from workbench.upkeep.extract import Extraction, bake, extract
from workbench.weights import lowrank
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.lowrank import Factors


def taken(project: Project, checkpoint: str, base: str = "base", out: str = "out", **policy: Any) -> tuple[Path, Extraction]:
    settings: dict[str, Any] = {"rank": 8, "dense": "approximate", **policy}
    record = extract(checkpoint, base, project.path / out, Policy(**settings), Work(CPU, 1), project=project.path)
    return project.path / out, record


# -- the decomposition


def spectrum(rows: int, cols: int, decay: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with the singular values exp(−decay·i), float32, and these values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, cols, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64)).Q
    values = torch.exp(-decay * torch.arange(cols, dtype=torch.float64))
    return (left * values @ right.T).float(), values


@pytest.mark.parametrize("decay", [0.02, 0.3])
def test_randomised_svd_is_near_the_optimum(decay: float) -> None:
    matrix, values = spectrum(300, 200, decay)
    factors = lowrank.approximate(matrix, 12, 0.0, seed=3)
    best = float(values[12:].square().sum().sqrt())
    assert factors.rank == 12
    assert best * (1 - 1e-4) <= float((matrix - factors.left @ factors.right).norm()) <= best * 1.01
    assert lowrank.residual(matrix, factors) ** 0.5 == pytest.approx(
        float((matrix - factors.left @ factors.right).norm()), rel=1e-4
    )
    again = lowrank.approximate(matrix, 12, 0.0, seed=3)
    assert torch.equal(factors.left, again.left)
    assert torch.equal(factors.right, again.right)


@pytest.mark.parametrize("error", [0.3, 0.05, 0.0005])
def test_the_smallest_rank_that_is_good_enough(error: float) -> None:
    matrix, values = spectrum(300, 200, 0.08)
    tails = values.square().flip(0).cumsum(0).flip(0) / values.square().sum()
    wanted = int((tails.sqrt() > error).sum())  # tails[r] is lost at rank r
    found = lowrank.approximate(matrix, None, error, seed=0)
    assert abs(found.rank - wanted) <= 1
    assert (lowrank.residual(matrix, found) / lowrank.squared(matrix)) ** 0.5 <= error * 1.001
    assert lowrank.approximate(matrix, 5, error, seed=0).rank == 5


def test_factors_lose_only_their_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 6, generator=generator), torch.randn(6, 30, generator=generator)
    twice = Factors(torch.cat([left, left], 1), torch.cat([right, 0.5 * right]))
    small = lowrank.reduced(twice)
    assert small.rank == 6
    torch.testing.assert_close(small.left @ small.right, 1.5 * left @ right, rtol=0, atol=1e-5)
    wide = Factors(torch.randn(4, 9, generator=generator), torch.randn(9, 30, generator=generator))
    assert lowrank.reduced(wide).rank == 4
    assert lowrank.reduced(Factors(left, right)).left is left  # nothing to gain: the factors stay as they are
    assert lowrank.reduced(Factors(torch.cat([left, left], 1), torch.cat([right, -right]))).rank == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expected_rounding(dtype: torch.dtype) -> None:
    values = torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    stored = values.to(dtype).float()
    stored[0] = 0
    values[0] = 0
    assert rounding(stored, dtype) == pytest.approx(float((stored - values).double().square().sum()), rel=0.03)
    assert rounding(values, torch.float32) == 0


# -- extract


@pytest.mark.parametrize(("dtype", "worst"), [("float32", 2e-6), ("bfloat16", 6e-3)])
def test_a_baked_lora_comes_back_at_its_rank(dtype: str, worst: float, model_of: Callable[..., Path], tmp_path: Path) -> None:
    base = model_of("llama", getattr(torch, dtype))
    (tmp_path / "recipes").mkdir()
    project = Project(tmp_path)
    lora = save_adapter(base, tmp_path / "lora", seed=1, r=8, lora_alpha=32, target_modules="all-linear")
    bake(str(lora), str(base), tmp_path / "baked", Work(CPU), project=tmp_path)
    out, record = taken(project, "baked", str(base), rank=8)
    assert record.error < worst
    if dtype == "float32":
        assert record.rounding == 0
    else:  # what is left is rounding; of its energy the eight terms take a share themselves
        assert 0.6 * record.rounding < record.error < 1.05 * record.rounding
    assert set(record.tensors) == {n for n in tensors_of(base) if "proj" in n}
    assert record.whole == record.dropped == []
    mine = bind(Adapter(out, "x"), Checkpoint(base, "base").specs)
    true = bind(Adapter(lora, "x"), Checkpoint(base, "base").specs)
    for name in record.tensors:
        ours, theirs = mine.factors(name, CPU), true.factors(name, CPU)
        assert ours is not None and theirs is not None and ours.rank == 8  # noqa: PT018
        want = theirs.left @ theirs.right
        assert float((ours.left @ ours.right - want).norm() / want.norm()) < worst
    # a smaller tolerance than the noise allows needs more; one above it finds the rank
    assert {t.rank for t in taken(project, "baked", str(base), "loose", rank=None, error=2 * worst)[1].tensors.values()} == {8}


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_nothing_is_dropped_in_silence(family: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    base = model_of(family, torch.float32)
    (tmp_path / "recipes").mkdir()
    project = Project(tmp_path)
    full = save_finetuned(base, tmp_path / "full", seed=5)
    out, record = taken(project, "full", str(base), rank=128)
    assert set(record.tensors) | set(record.whole) == set(tensors_of(base))
    torch.testing.assert_close(peft_logits(base, out), peft_logits_of(full), rtol=0, atol=5e-5)

    out, dropped = taken(project, "full", str(base), "less", rank=128, rest="drop")
    assert dropped.dropped == record.whole
    assert dropped.whole == []
    assert dropped.error > 0.1  # what is dropped counts as lost
    assert read_card(out).extraction["dropped"] == dropped.dropped
    assert config(out)["modules_to_save"] is None
    assert config(out)["bias"] == "none"
    with pytest.raises(WorkbenchError, match=r"differs from the base and is not the weight of a linear layer") as caught:
        taken(project, "full", str(base), "none", rest="refuse")
    assert "--rest save" in (caught.value.hint or "")
    assert not list(tmp_path.glob("*none*"))


def peft_logits_of(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from worlds.peft_runs import TOKENS

    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits
    return logits


def test_a_dense_result_of_low_rank_is_found(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """What `rank: exact` does with a dense update: its factors where it has a low rank, else the whole weight."""
    base = model_of("llama", torch.float32)
    (tmp_path / "recipes").mkdir()
    save_adapter(base, tmp_path / "lora", seed=1, r=5)
    bake("lora", str(base), tmp_path / "baked", Work(CPU), project=tmp_path)
    _, record = taken(Project(tmp_path), "baked", str(base), rank=None, dense="whole")
    assert {t.rank for t in record.tensors.values()} == {5}
    assert max(t.error for t in record.tensors.values()) <= 2e-6
    save_finetuned(base, tmp_path / "full", seed=5)
    out, record = taken(Project(tmp_path), "full", str(base), "whole", rank=None, dense="whole")
    assert set(record.whole) == set(tensors_of(base))
    torch.testing.assert_close(peft_logits_of(tmp_path / "full"), merged_saved(base, out), rtol=0, atol=1e-5)


def merged_saved(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of an adapter that brings whole modules alone: its tensors put over the base's, without PEFT, which loads none such."""
    from transformers import AutoModelForCausalLM

    from worlds.peft_runs import TOKENS

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    held = {n.removeprefix("base_model.model."): t for n, t in tensors_of(adapter).items() if "lora_" not in n}
    model.load_state_dict(held, strict=False)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def test_embeddings_on_request(model_of: Callable[..., Path], tmp_path: Path) -> None:
    base = model_of("llama_untied", torch.float32)
    (tmp_path / "recipes").mkdir()
    full = save_finetuned(base, tmp_path / "full", seed=5)
    out, record = taken(Project(tmp_path), "full", str(base), rank=64, embeddings=True)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(record.tensors)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in tensors_of(out)
    torch.testing.assert_close(peft_logits(base, out), peft_logits_of(full), rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_and_biases_alone(family: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT loads no adapter without an update, so one of zeros stands beside what is saved whole."""
    base = model_of(family, torch.float32)
    (tmp_path / "recipes").mkdir()
    own, tuned = tensors_of(base), tensors_of(save_finetuned(base, tmp_path / "tuned", seed=5))
    mixed = {n: tuned[n] if t.dim() == 1 else t for n, t in own.items()}
    save_file(mixed, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    out, record = taken(Project(tmp_path), "tuned", str(base))
    assert record.tensors == {}
    assert set(record.whole) == {n for n, t in own.items() if t.dim() == 1}
    torch.testing.assert_close(peft_logits(base, out), peft_logits_of(tmp_path / "tuned"), rtol=0, atol=5e-5)


def test_a_weight_without_a_module_is_named(project: Project) -> None:
    for name, value in (("old", 0.0), ("new", 1.0)):
        shutil.copytree(project.path / "base", project.path / name)
        tensors = tensors_of(project.path / "base") | {"model.layers.0.mlp.experts.0.w1.weight": torch.full((4, 4), value)}
        save_file(tensors, project.path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"experts\.0\.w1\.weight differs from the base, but an adapter cannot hold it"):
        taken(project, "new", "old")
    with pytest.raises(WorkbenchError, match="equals the base"):
        taken(project, "new", "old", rest="drop")


def test_card_use_and_bake(project: Project) -> None:
    bake("bricks/one", "base", project.path / "baked", Work(CPU), project=project.path, dtype="float32")
    out, record = taken(project, "baked")
    card = read_card(out)
    assert (card.kind, card.base.id, card.name) == ("adapter", "base", "out")
    assert card.digest == Brick("out", "adapter", out).digest(None)
    assert card.extraction["rank"] == 8
    assert json.loads((out / "extract.json").read_text("utf-8"))["tensors"] == record.to_dict()["tensors"]
    text = "bricks: {it: PLACE}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32}\n"
    ours, direct = project.tensors(text.replace("PLACE", "out")), project.tensors(text.replace("PLACE", "bricks/one"))
    assert all(torch.allclose(ours[n], direct[n], rtol=0, atol=2e-6) for n in direct)
    run = project.run("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n")
    document = bake("bricks/one", None, project.path / "again", Work(CPU), project=project.path)
    assert document.configuration == run["configuration"]
    for file in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (project.path / "again" / file).read_bytes() == (Path(run["model"]) / file).read_bytes()
    assert not list(project.path.glob(".again*"))


def test_an_adapter_is_the_same_again_and_nothing_stays_of_a_failure(project: Project) -> None:
    files = []
    for out, threads in (("a", 1), ("b", 3)):
        extract(
            "bricks/full", "base", project.path / out, Policy(4, dense="approximate"), Work(CPU, threads), project=project.path
        )
        files.append((project.path / out / WEIGHTS).read_bytes())
    assert files[0] == files[1]
    save_finetuned(project.path / "base", project.path / "bad", seed=1)
    tensors = tensors_of(project.path / "bad")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, project.path / "bad/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* holds nan at \[3, 5\]"):
        taken(project, "bad")
    assert not list(project.path.glob("*out*"))


# -- bake


def test_an_interrupted_bake_goes_on(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import workbench.run.execute as engine

    finish = engine._finish

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_finish", cut)
    with pytest.raises(KeyboardInterrupt):
        bake("bricks/one", "base", project.path / "baked", Work(CPU), project=project.path)
    assert not (project.path / "baked").exists()
    assert list(project.path.glob(".baked.baking/*/model.partial/model.safetensors"))
    monkeypatch.setattr(engine, "_finish", finish)
    bake("bricks/one", "base", project.path / "baked", Work(CPU), project=project.path)
    assert (project.path / "baked/model.safetensors").is_file()
    assert not list(project.path.glob(".again*"))


# -- the command line


@pytest.fixture
def here(project: Project, cwd: Path) -> Project:
    return project


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr with the message and hint of an error."""
    result = CliRunner().invoke(app, ["brick", *args])
    if isinstance(result.exception, WorkbenchError):
        return result.exception.exit_code, result.stdout, f"{result.exception.message}\n{result.exception.hint}"
    return result.exit_code, result.stdout, result.stderr


def test_commands_one_after_the_other(here: Project) -> None:
    assert run("bake", "one", "-o", "baked", "--base", "base", "--dtype", "float32")[0] == 0
    code, table, _ = run("extract", "baked", "--base", "base", "--rank", "8", "-o", "again")
    assert code == 0
    assert table.splitlines()[0].split() == ["tensor", "rank", "norm", "error", "rounding"]
    assert table.splitlines()[-1].startswith("all updates")
    assert "16 tensors fit base" in run("verify", "again")[1]
    assert "as on its card" in run("verify", "again")[1]
    assert "16 tensors fit base, digest" in run("verify", "one", "--base", "base")[1]
    assert "38 tensors fit base" in run("verify", "full", "--base", "base")[1]
    code, text, _ = run("show", "again", "one", "-o", "heat.html")
    assert code == 0
    assert "cosine, one" in text
    assert Path("heat.html").is_file()
    document = json.loads(run("show", "again", "one", "--json")[1])
    assert document["name"] == "again"
    assert document["delta"]["total"]["others"]["one"]["cosine"] == pytest.approx(1, abs=1e-5)
    edit_json(Path("again/adapter_config.json"), lora_alpha=4)
    assert run("verify", "again")[0] == 3


@pytest.mark.parametrize(
    ("command", "code", "message", "hint"),
    [
        ("extract bricks/one --base base -o x", 1, "bricks/one is already a PEFT adapter", "brick show bricks/one"),
        ("extract recipes --base base -o x", 1, "recipes is not a checkpoint (it has no config.json)", ""),
        ("extract bricks/full --base bricks/one -o x", 1, "base: bricks/one is a LoRA adapter", ""),
        (
            "extract bricks/full --base other -o x",
            1,
            "brick 'full': lacks transformer.h.0",
            "the model that the brick was fine-tuned from",
        ),
        ("extract bricks/full --base base -o bricks", 1, "-o bricks: exists and is not an empty directory", "never overwritten"),
        ("extract bricks/full --base base --rank 0 -o x", 2, "--rank", ""),
        (
            "extract bricks/full --base base --energy 1.2 -o x",
            2,
            "--energy 1.2: expected a number between 0 and 1",
            "--energy 0.99",
        ),
        ("extract bricks/full --base base --energy 0.9 --tolerance 0.1 -o x", 2, "exclude each other", "one of them"),
        ("extract base --base base -o x", 1, "the result equals the base", "--base"),
        ("extract nowhere --base base -o x", 1, "checkpoint: no such directory: nowhere", ""),
        ("bake bricks/full --base base -o x", 1, "bricks/full is already a checkpoint", "brick show"),
        ("bake bricks/one --base base -o bricks", 1, "-o bricks: exists and is not an empty directory", ""),
        (
            "bake bricks/one --base other -o x",
            1,
            "module model.layers.0.mlp.down_proj has no weight in the base",
            "another architecture",
        ),
        ("bake lost -o x", 1, "the brick's base org/none cannot be found", "--base DIR"),
        ("show full --metric norm", 1, "names its base", "--base DIR"),
        ("show one --base base --metric cosine", 2, "--metric cosine compares bricks", "brick show one OTHER"),
        ("show one bricks/one --base base", 1, "two bricks have the same name", ""),
        ("verify full", 1, "neither brick.yaml nor adapter_config.json names its base", "--base DIR"),
        ("verify lost", 1, "the brick's base org/none cannot be found", "--base DIR"),
    ],
)
def test_bad_input(here: Project, model_of: Callable[..., Path], command: str, code: int, message: str, hint: str) -> None:
    (here.path / "other").symlink_to(model_of("gpt2"))
    shutil.copytree(here.path / "bricks/one", here.path / "lost")
    edit_json(here.path / "lost/adapter_config.json", base_model_name_or_path="org/none")
    before = sorted(here.path.iterdir())
    found, _, text = run(*command.split())
    assert found == code, text
    assert message in text
    assert hint in text
    assert [p for p in sorted(here.path.iterdir()) if p.name != ".workbench"] == before
