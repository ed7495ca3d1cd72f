"""`output: {form: adapter}`: what the written adapter does in PEFT, its ranks and errors, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.peft_runs import TOKENS, config, peft_logits
from worlds.project import CPU, Project
from worlds.tiny import LORA_MODULES, save_adapter, save_finetuned, tensors_of

from workbench.adapters.read import CONFIG, WEIGHTS
from workbench.ground.errors import WorkbenchError
from workbench.ground.manifest import MANIFEST
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.run.materialize import configuration_digest, materialize
from workbench.run.plan import plan

HEAD = "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\n"
SUM = HEAD + "steps: [{id: mix, merge: task_arithmetic, bricks: {one: 0.5, two: -1.0, three: 0.7}, lambda: 0.8}]\n"


def live_logits(project: Project, text: str) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = materialize(project.resolve(text), CPU)(TOKENS).logits
    return logits


def test_exact_adapters_are_the_merged_model(project: Project) -> None:
    document = project.run(SUM + "output: {form: adapter}\n")
    adapter = Path(document["adapter"])
    assert document["model"] is None
    assert document["configuration"] is None
    assert sorted(p.name for p in adapter.iterdir()) == ["README.md", CONFIG, WEIGHTS, MANIFEST]
    record = json.loads((adapter.parent / "run.json").read_text("utf-8"))["output"]
    assert record["rank"] == 16
    assert record["uniform"]
    assert record["plain"]
    assert record["error"] < 1e-6
    assert record["dropped"] == record["whole"] == []
    again = "bricks: {sum: ADAPTER}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32}\n".replace(
        "ADAPTER", str(adapter)
    )
    ours, direct = project.tensors(again), project.tensors(SUM)
    assert all((ours[name] - direct[name]).abs().max() <= 1e-6 for name in direct)
    merged = live_logits(project, SUM + "output: {dtype: float32}\n")
    torch.testing.assert_close(peft_logits(project.path / "base", adapter), merged, rtol=0, atol=2e-5)
    torch.testing.assert_close(peft_logits(project.path / "base", adapter, merge=True), merged, rtol=0, atol=2e-5)
    # Scores of `form: checkpoint` count for it too: one key, one digest.
    plain, adapter = project.resolve(SUM), project.resolve(SUM + "output: {form: adapter}\n", "other.yaml")
    assert plain.key == adapter.key
    assert plain.run_key != adapter.run_key
    assert torch.equal(live_logits(project, SUM), live_logits(project, SUM + "output: {form: adapter}\n"))


@pytest.mark.parametrize("step", ["ties, density: 0.5, space: core", "tsv", "iso_c, space: core"])
def test_methods_on_small_matrices_give_exact_adapters(project: Project, step: str) -> None:
    text = HEAD + f"steps: [{{merge: {step}}}]\n"
    document = project.run(text + "output: {form: adapter}\n")
    record = json.loads((Path(document["run"]) / "run.json").read_text("utf-8"))["output"]
    assert (record["rank"], record["whole"]) == (16, [])  # 8 + 4 + 4
    merged = live_logits(project, text + "output: {dtype: float32}\n")
    torch.testing.assert_close(peft_logits(project.path / "base", Path(document["adapter"])), merged, rtol=0, atol=5e-5)


def test_a_cut_rank_reports_its_error_and_is_what_is_scored(project: Project) -> None:
    text = SUM + "output: {form: adapter, rank: 6}\n"
    document = project.run(text)
    adapter = Path(document["adapter"])
    record = json.loads((adapter.parent / "run.json").read_text("utf-8"))["output"]
    base, full = tensors_of(project.path / "base"), project.tensors(SUM)
    norm = lost = 0.0
    for name, found in record["tensors"].items():
        delta = full[name] - base[name].float()
        values = torch.linalg.svdvals(delta.double())
        best = float(values[6:].square().sum().sqrt() / values.square().sum().sqrt())
        assert found["rank"] == 6
        assert found["error"] == pytest.approx(best, abs=1e-5)  # Eckart-Young
        norm, lost = norm + float(values.square().sum()), lost + float(values[6:].square().sum())
    assert record["error"] == pytest.approx((lost / norm) ** 0.5, abs=1e-5)
    assert record["error"] > 0.1
    assert project.resolve(text).key != project.resolve(SUM).key
    scored = {n: t.float() for n, t in project.tensors(text).items()}
    pairs = tensors_of(adapter)
    for name in record["tensors"]:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        product = pairs[f"{key}B.weight"] @ pairs[f"{key}A.weight"]
        torch.testing.assert_close(scored[name], base[name].float() + product, rtol=0, atol=1e-6)


def test_a_dense_result_is_approximated_and_the_rest_saved_whole(project: Project) -> None:
    text = "bricks: {full: bricks/full, one: bricks/one}\nsteps: [{merge: ties, density: 0.6}]\noutput: {form: adapter, rank: 32, dtype: float32}\n"
    document = project.run(text)
    record = json.loads((Path(document["run"]) / "run.json").read_text("utf-8"))["output"]
    assert record["error"] < 1e-5  # rank 32 is the full rank of a model 32 wide
    assert "model.norm.weight" in record["whole"]
    assert "model.embed_tokens.weight" in record["whole"]
    assert not record["plain"]
    merged = live_logits(project, text.split("output:")[0] + "output: {dtype: float32}\n")
    found = peft_logits(project.path / "base", Path(document["adapter"]))
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-4)
    low = json.loads(
        (Path(project.run(text.replace("rank: 32", "rank: 4, accept_error: 0.9"))["run"]) / "run.json").read_text("utf-8")
    )["output"]
    assert 0.3 < low["error"] < 1


def test_edits_join_the_factors_and_adapters_are_bricks_and_controls(project: Project) -> None:
    (project.path / "facts.jsonl").write_text('{"prompt": "w1 w2 is", "target": " w3"}\n', "utf-8")
    edit = "{edit: finetune, facts: facts.jsonl, learning_rate: 0.05, epochs: 5}"
    text = HEAD + f"steps: [{{merge: average}}, {edit}]\n"
    adapter = Path(project.run(text + "output: {form: adapter}\n")["adapter"])
    merged = live_logits(project, text + "output: {dtype: float32}\n")
    torch.testing.assert_close(peft_logits(project.path / "base", adapter), merged, rtol=0, atol=2e-5)
    # A recipe's cut result is what another recipe takes of it; controls of a recipe are whole models.
    text = SUM + "output: {form: adapter, rank: 6}\n"
    project.write(text, "cut.yaml")
    alone = project.tensors(text)
    ours = project.tensors("bricks: {cut: {recipe: recipes/cut.yaml}}\nsteps: [{merge: task_arithmetic}]\n")
    assert all(torch.allclose(ours[n], alone[n], rtol=0, atol=1e-6) for n in alone)
    control = project.resolve(text).recipe.derive("base", [])
    assert (control.fields.output.form, control.fields.output.dtype) == ("checkpoint", None)


def test_steps_that_cancel_and_where_limit_the_adapter(project: Project) -> None:
    text = HEAD + "steps: [{merge: task_arithmetic, bricks: {one: 1, two: 1}}, {merge: task_arithmetic, bricks: {one: -1}}]\n"
    document = project.run(text + "output: {form: adapter}\n")
    assert config(Path(document["adapter"]))["r"] == 4  # of 8 + 4 + 8 terms those of `two`
    nothing = HEAD + "steps: [{merge: task_arithmetic, bricks: {one: 1}}, {merge: task_arithmetic, bricks: {one: -1}}]\n"
    with pytest.raises(WorkbenchError, match="the result equals the base"):
        project.run(nothing + "output: {form: adapter}\n")
    text = SUM.replace("lambda: 0.8", 'lambda: 0.8, where: {include: ["*.q_proj.*", "*.v_proj.*"], exclude: ["*.0.*v_proj*"]}')
    found = config(Path(project.run(text + "output: {form: adapter}\n")["adapter"]))
    assert found["target_modules"] == [*(f"model.layers.{i}.self_attn.v_proj" for i in (1, 2, 3)), "q_proj"]


def test_ranks_that_differ_are_padded_or_named(project: Project, llama: Path) -> None:
    """Padding keeps loaders without rank_pattern right; where it more than doubles the file, the ranks are named."""
    (project.path / "mine").mkdir()
    save_adapter(
        llama,
        project.path / "mine/narrow",
        seed=7,
        r=1,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj"],
    )
    save_adapter(llama, project.path / "mine/wide", seed=8, r=16, target_modules=["down_proj"])
    text = "bricks: {narrow: mine/narrow, wide: mine/wide}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter}\n"
    adapter = Path(project.run(text)["adapter"])
    found = config(adapter)
    assert found["r"] == 16
    assert found["rank_pattern"] == found["alpha_pattern"]
    assert set(found["rank_pattern"].values()) == {1}
    merged = live_logits(project, text.replace("form: adapter", "dtype: float32"))
    torch.testing.assert_close(peft_logits(project.path / "base", adapter), merged, rtol=0, atol=2e-5)

    save_adapter(llama, project.path / "mine/wide", seed=8, r=4, target_modules=["down_proj"])
    padded = text.replace("narrow: mine/narrow", "narrow: bricks/one")
    adapter = Path(project.run(padded)["adapter"])
    found = config(adapter)
    shapes = {t.shape[0] for n, t in tensors_of(adapter).items() if "lora_A" in n}
    assert (found["r"], found["rank_pattern"], shapes) == (12, {}, {12})  # down_proj 8 + 4, the others 8 and zeros
    merged = live_logits(project, padded.replace("form: adapter", "dtype: float32"))
    torch.testing.assert_close(peft_logits(project.path / "base", adapter), merged, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen2", "gemma2", "llama_untied"])
def test_families_in_peft(family: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Conv1D, biases, tied and untied embeddings: everything of a fine-tune arrives, at full rank nothing is lost."""
    base = model_of(family, torch.float32)
    (tmp_path / "recipes").mkdir()
    save_finetuned(base, tmp_path / "full", seed=5)
    save_adapter(base, tmp_path / "lora", seed=6, family=family.removesuffix("_untied"))
    project = Project(tmp_path)
    for text in (f"base: {base}\nbricks: {{full: full}}\nsteps: [{{merge: task_arithmetic}}]\noutput: {{form: adapter, rank: 64}}\n",
                 f"base: {base}\nbricks: {{lora: lora}}\nsteps: [{{merge: task_arithmetic, lambda: 0.5}}]\noutput: {{form: adapter}}\n"):  # fmt: skip
        adapter = Path(project.run(text)["adapter"])
        merged = live_logits(project, text.split("output:")[0])
        torch.testing.assert_close(peft_logits(base, adapter), merged, rtol=0, atol=5e-5)
        torch.testing.assert_close(peft_logits(base, adapter, merge=True), merged, rtol=0, atol=5e-5)


def test_base_without_its_root_prefix(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """gpt2 on the hub has "h.0.…"; PEFT's keys are the live model's."""
    from safetensors.torch import save_file

    source = model_of("gpt2", torch.float32)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "base").mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    save_file(
        {n.removeprefix("transformer."): t for n, t in tensors_of(source).items()},
        tmp_path / "base/model.safetensors",
        metadata={"format": "pt"},
    )
    save_adapter(source, tmp_path / "lora", seed=6, family="gpt2")
    text = "bricks: {lora: lora}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter}\n"
    adapter = Path(Project(tmp_path).run(text)["adapter"])
    assert set(tensors_of(adapter)) == set(tensors_of(tmp_path / "lora"))
    assert config(adapter)["target_modules"] == sorted(LORA_MODULES["gpt2"])
    assert config(adapter)["fan_in_fan_out"]
    torch.testing.assert_close(
        peft_logits(tmp_path / "base", adapter), peft_logits(tmp_path / "base", tmp_path / "lora"), rtol=0, atol=2e-5
    )


def test_bytes_do_not_depend_on_threads_or_an_interruption(project: Project) -> None:
    text = "bricks: {full: bricks/full}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter, rank: 5, accept_error: 0.9, dtype: bfloat16}\n"
    resolved = project.resolve(text)
    written = []
    for threads in (1, 3):
        runs = project.path / f"runs-{threads}"
        adapter = Path(execute(resolved, runs, Work(CPU, threads)).place)
        written.append((adapter / WEIGHTS).read_bytes())
    assert written[0] == written[1]
    assert {t.dtype for t in tensors_of(adapter).values()} == {torch.bfloat16}
    run = adapter.parent
    adapter.rename(run / "model.partial")
    (run / "model.partial" / WEIGHTS).write_bytes(b"cut")
    assert (Path(execute(resolved, runs, Work(CPU)).place) / WEIGHTS).read_bytes() == written[0]


def test_plan_predicts_the_file(project: Project) -> None:
    """To the byte where only adapters are merged; a dense result's whole tensors are a bound."""
    file = save_adapter(project.path / "base", project.path / "saved", seed=5, modules_to_save=["norm"]) / WEIGHTS
    save_file({name: t if t.dim() > 1 else t + 0.5 for name, t in load_file(file).items()}, file)  # vectors, which are no factors
    saved = "bricks: {one: bricks/one, saved: saved}\nsteps: [{merge: task_arithmetic}]\n"
    for head, output in product(
        (SUM, saved), ("{form: adapter}", "{form: adapter, rank: 6}", "{form: adapter, rank: 6, dtype: bfloat16}")
    ):
        text = head + f"output: {output}\n"
        predicted = plan(project.resolve(text), project.path / "runs").write_bytes
        record = json.loads((Path(project.run(text)["run"]) / "run.json").read_text("utf-8"))["output"]
        assert record["bytes"] == predicted, output
    text = "bricks: {full: bricks/full}\nsteps: [{merge: average}]\noutput: {form: adapter, rank: 4, accept_error: 0.9}\n"
    predicted = plan(project.resolve(text), project.path / "runs").write_bytes
    record = json.loads((Path(project.run(text)["run"]) / "run.json").read_text("utf-8"))["output"]
    assert predicted <= record["bytes"] <= predicted + 64 * 32 * 2  # tied embeddings stand under two names


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("bricks: {one: bricks/one}\nsteps: [{merge: ties}]\noutput: {form: adapter}", r"merge-ties: `rank: exact` needs a sum of the adapters' updates, but the result of ties is not one", "rank: 16"),
        ("bricks: {full: bricks/full}\nsteps: [{merge: average}]\noutput: {form: adapter, rank: exact}", r"brick 'full' is a checkpoint, whose delta has full rank", "rank: 16"),
        ("bricks: {one: bricks/one}\nsteps: [{merge: average}, {grow: depth, blocks: 2}]\noutput: {form: adapter}", r"grow-depth adds tensors", "form: checkpoint"),
        ("bricks: {full: bricks/full}\nsteps: []\ntokenizer: {source: union}\noutput: {form: adapter, rank: 4}", r"another vocabulary changes the size of the embeddings", "form: checkpoint"),
        ("bricks: {one: bricks/one}\nsteps: [{merge: ties, space: core}, {merge: linear}]\noutput: {form: adapter}", r"merge-linear: `rank: exact` needs a sum of the adapters' updates, but the result of linear is not one", "space: core"),
        ("steps: []\noutput: {form: adapter, rank: 0}", r"expected exact or a whole number from 1, found 0", ""),
        ("steps: []\noutput: {form: adapter, rank: true}", r"expected exact or a whole number from 1, found True", ""),
        ("steps: []\noutput: {form: adapter, accept_error: 0.9}", r"`accept_error` belongs to an adapter with a number as `rank`", ""),
        ("steps: []\noutput: {form: adapter, rank: 4, accept_error: 1.5}", r"accept_error", ""),
        ("steps: []\noutput: {rank: 8}", r"`rank` belongs to `form: adapter`", ""),
        ("steps: []\noutput: {form: lora}", r"output\.form", ""),
    ],
)  # fmt: skip
def test_refused_before_any_work(project: Project, text: str, message: str, hint: str) -> None:
    with pytest.raises(WorkbenchError, match=message) as caught:
        resolve(load_recipe(project.write(text + "\n")))
    assert hint in (caught.value.hint or "")
    assert ":" in caught.value.message.split(" ")[0]  # file:line:col
    assert not (project.path / "runs").exists()


def test_a_large_error_is_told_and_a_larger_one_refused(project: Project) -> None:
    """By `run`, its record and card, `plan` once it is known, a brick of a route, and what scores and chats load."""
    text, runs = SUM + "output: {form: adapter, rank: 6}\n", project.path / "runs"
    before = plan(project.resolve(text), runs).warnings
    run = Path(project.run(text)["run"])
    record = json.loads((run / "run.json").read_text("utf-8"))
    (warning,) = record["warnings"]
    assert f"relative error {record['output']['error']:.2f}" in warning
    assert warning in (run / "adapter" / "README.md").read_text("utf-8")
    assert plan(project.resolve(text), runs).warnings == [*before, warning]

    for brick in ("SUM", "full"):
        low = (
            SUM if brick == "SUM" else "bricks: {full: bricks/full}\nsteps: [{merge: average}]\n"
        ) + "output: {form: adapter, rank: 2}\n"
        refused = (
            r"an adapter of rank 2 has a relative error of 0\.[5-9]\d, expected at most 0\.5: most is lost in model\.layers\."
        )
        uses = (project.run, partial(live_logits, project), lambda text: configuration_digest(project.resolve(text), CPU))
        for use in uses:
            with pytest.raises(WorkbenchError, match=refused) as caught:
                use(low)
        offered = (caught.value.hint or "").split("`")[-2]
        taken = project.run(low.split("output:")[0] + offered + "\n")
        error = json.loads((Path(taken["run"]) / "run.json").read_text("utf-8"))["output"]["error"]
        assert 0.5 < error <= float(offered.split("accept_error: ")[1].rstrip("}"))
        with pytest.raises(WorkbenchError, match=refused):  # the finished run has another key
            project.run(low)
        with pytest.raises(WorkbenchError, match=r"expected at most 0\.05"):
            project.run(SUM + "output: {form: adapter, rank: 6, accept_error: 0.05}\n")
