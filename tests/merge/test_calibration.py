"""Data-driven merges: calibration texts, Grams collected layer by layer, Fisher information, losses; through recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from worlds.project import CPU, Project
from worlds.texts import save_other, saved_names, words_tokenizer, write_rows
from worlds.tiny import save_finetuned, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.recipe.methods import methods
from workbench.run.compose import compose
from workbench.run.plan import plan
from workbench.steps import MergeContext, MergeMethod
from workbench.weights.specs import load

FAMILIES = ["llama", "llama_untied", "qwen2", "gemma2", "gpt2", "gpt_neox", "gpt_neo", "opt", "gemma3", "phi3"]


@pytest.fixture
def family_project(tmp_path: Path, model_of: Callable[..., Path]) -> Callable[[str], Project]:
    """A project on a family's tiny model, with two fine-tunes and two files of texts."""

    def make(family: str) -> Project:
        other = family in ("gemma3", "phi3", "mixtral")
        base = save_other(tmp_path / "other", family) if other else model_of(family, torch.float32)
        (tmp_path / "recipes").mkdir()
        (tmp_path / "base").symlink_to(base)
        for i, name in enumerate(("one", "two")):
            save_finetuned(base, tmp_path / "bricks" / name, seed=i)
            write_rows(tmp_path / f"{name}.jsonl", 7, seed=1000 * i)
        return Project(tmp_path)

    return make


REGMEAN = """
    bricks: {one: bricks/one, two: bricks/two}
    steps: [{merge: regmean, bricks: {one: {calibration: one.jsonl}, two: {calibration: two.jsonl}}}]
"""


def context_of(project: Project, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[MergeContext, Any]:
    """The context that a recipe's first step gets."""
    resolved = project.resolve(text)
    step = resolved.recipe.steps[0]
    seen: list[MergeContext] = []
    measure = type(step).measure
    # AutoTokenizer takes the class of the model's family, which does not read the tests' whole-word vocabulary.
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **_: words_tokenizer(path))
    monkeypatch.setattr(type(step), "measure", lambda self, context: (seen.append(context), measure(self, context))[1])
    compose(resolved, CPU)
    monkeypatch.undo()
    return seen[0], step


def full_grams(context: MergeContext, step: Any, brick: str) -> dict[str, Tensor]:
    """Second moments of every linear layer's inputs, by hooks on the whole live model, one unpadded row at a time."""
    model, (rows, _) = context.live(brick), step.rows(context, brick)
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return see

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.tokens]))
    tokens = sum(len(row.tokens) for row in rows)
    return {f"{name}.weight": total / tokens for name, total in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_grams_are_those_of_the_whole_model(
    family: str, family_project: Callable[[str], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, sliding windows, tuples as outputs, Conv1D, an untied head: the same inputs as a plain forward pass reads."""
    context, step = context_of(family_project(family), REGMEAN, monkeypatch)
    found = step.measure(context).value["one"]
    renamed = {"lm_head.weight": "embed_out.weight"} if family == "gpt_neox" else {}
    expected = {renamed.get(name, name): gram for name, gram in full_grams(context, step, "one").items()}
    assert found.record.streamed
    tied = context.base.config.get("tie_word_embeddings", True)
    heads = {n for n in expected if n.split(".")[-2] in ("lm_head", "embed_out")}
    assert set(found.files) == {n for n in expected if n not in heads or not tied}
    for name in found.files:
        gram, right = found.gram(name, CPU).double(), expected[name]
        assert float((gram - right).norm() / right.norm()) < 1e-5, name


def test_experts_are_averaged_and_the_rest_is_solved_on_one_live_model(
    family_project: Callable[[str], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers fuses mixtral's experts: no parameter stands under its name on disk, so the model is not streamed."""
    project = family_project("mixtral")
    context, step = context_of(project, REGMEAN, monkeypatch)
    found = step.measure(context).value["two"]
    assert found.record.to_dict() == {"tokens": found.record.tokens, "streamed": False}
    expected = {n: g for n, g in full_grams(context, step, "two").items() if n in context.base.weights.specs}
    assert set(found.files) == set(expected)
    for name, right in expected.items():
        assert float((found.gram(name, CPU).double() - right).norm() / right.norm()) < 1e-5, name
    record = project.run(REGMEAN)["steps"][0]
    assert [n for n in record["averaged"] if ".experts." in n]
    assert record["solved"] == 2 * 4 + 1


# -- RegMean


def test_regmean_through_a_recipe(project: Project) -> None:
    """Adapters and a checkpoint, weights, one file for all: equal to the formula on Grams of full forward passes, in float64."""
    write_rows(project.path / "all.jsonl", 12)
    text = """
        bricks: {one: bricks/one, full: bricks/full}
        steps: [{merge: regmean, id: mix, bricks: {one: 2.0, full: 0.5}, calibration: all.jsonl, off_diagonal: 0.7, ridge: 1.0e-4}]
        output: {dtype: float32}
    """
    result = project.run(text)
    merged = tensors_of(Path(result["model"]))
    with pytest.MonkeyPatch.context() as patch:
        context, step = context_of(project, text, patch)
    base = {n: load(context.base.weights, n, torch.float32).double() for n in context.base.weights.specs}
    grams = {brick: full_grams(context, step, brick) for brick in ("one", "full")}
    ratios = {}
    for name, origin in base.items():
        taus = [load(context.weights(brick), name, torch.float32).double() - origin for brick in ("one", "full")]
        if name in grams["one"] and "lm_head" not in name:
            shrunk = [0.7 * g + 0.3 * torch.diag(g.diagonal()) for g in (grams["one"][name], grams["full"][name])]
            left = 2 * shrunk[0] + 0.5 * shrunk[1]
            ridge = 1e-4 * left.diagonal().mean() / 2.5 * torch.eye(left.shape[0])
            delta = (2 * taus[0] @ (shrunk[0] + ridge) + 0.5 * taus[1] @ (shrunk[1] + ridge)) @ torch.linalg.inv(
                left + 2.5 * ridge
            )
            ratios[name] = float(delta.norm() / (taus[0].norm() + taus[1].norm()) * 2)
        else:
            delta = (2 * taus[0] + 0.5 * taus[1]) / 2.5
        assert torch.allclose(merged[name].double(), origin + delta, atol=5e-6), name
    record = result["steps"][0]
    assert record["solved"] == len(ratios) == 4 * 7
    assert record["calibration"]["one"]["file"] == "all.jsonl"
    assert record["norm_ratio"]["largest"] == pytest.approx(max(ratios.values()), abs=1e-3)
    assert record["norm_ratio"]["at"] == max(ratios, key=lambda n: ratios[n])
    assert "model.norm.weight" in record["averaged"]
    assert "model.embed_tokens.weight" in record["averaged"]


def test_regmean_fits_the_outputs_of_every_layer_better_than_the_average(
    family_project: Callable[[str], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On gpt2, which stores [in, out]: Σᵢ ‖(W − Wᵢ) Xᵢ‖² of each layer is at most the average's, and clearly less in sum."""
    project = family_project("gpt2")
    context, step = context_of(project, REGMEAN, monkeypatch)
    grams = {brick: full_grams(context, step, brick) for brick in ("one", "two")}
    whole = REGMEAN.replace("{merge: regmean,", "{merge: regmean, off_diagonal: 1.0,")
    results = [project.tensors(whole), project.tensors("bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]")]
    tuned = {brick: tensors_of(project.path / "bricks" / brick) for brick in grams}

    def errors(tensors: dict[str, Tensor]) -> dict[str, float]:
        found = {}
        for name in set(grams["one"]) & set(tensors):
            differences = {brick: (tensors[name] - tuned[brick][name]).double() for brick in grams}
            found[name] = sum(float(torch.einsum("io,ij,jo->", d, grams[b][name], d)) for b, d in differences.items())
        return found

    solved, averaged = map(errors, results)
    assert len(solved) == 4 * 4
    assert all(solved[n] <= averaged[n] * (1 + 1e-6) for n in solved)
    assert sum(solved.values()) < 0.9 * sum(averaged.values())


def test_measurements_are_kept_and_a_brick_with_itself_is_that_brick(project: Project) -> None:
    file = write_rows(project.path / "all.jsonl", 6)
    text = """
        bricks: {one: bricks/one, two: bricks/two}
        steps: [{merge: regmean, calibration: all.jsonl}]
    """
    first, stamps = project.tensors(text), {p: p.stat().st_mtime_ns for p in (project.path / ".workbench").rglob("*.safetensors")}
    key = project.resolve(text).key
    again = project.tensors(text)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert stamps
    assert stamps == {p: p.stat().st_mtime_ns for p in (project.path / ".workbench").rglob("*.safetensors")}
    write_rows(file, 6, seed=5)
    assert project.resolve(text).key != key
    changed = project.tensors(text)
    assert any(not torch.equal(first[n], changed[n]) for n in first)
    write_rows(project.path / "all.jsonl", 3)
    text = "bricks: {one: bricks/one, same: bricks/one}\nsteps: [{merge: fisher, calibration: all.jsonl}]"
    alone = project.tensors("bricks: {one: bricks/one}\nsteps: [{merge: average}]")
    merged = project.tensors(text)
    assert all(torch.allclose(merged[n], alone[n], rtol=2e-7, atol=1e-9) for n in alone)


# -- Fisher


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_fisher_is_the_mean_squared_gradient(
    family: str, family_project: Callable[[str], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text's own backward pass; then the formula, element by element, with the floor."""
    project = family_project(family)
    text = REGMEAN.replace("regmean,", "fisher, floor: 0.01,")
    context, step = context_of(project, text, monkeypatch)
    expected = {}
    for brick in ("one", "two"):
        model, (rows, _) = context.live(brick), step.rows(context, brick)
        squares: dict[str, Any] = {}
        for row in rows:
            model.zero_grad()
            log_p = torch.log_softmax(model(torch.tensor([row.tokens])).logits[0], -1)
            start = len(row.tokens) - row.learned
            sum(log_p[i - 1, row.tokens[i]] for i in range(start, len(row.tokens))).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    squares[name] = squares.get(name, 0) + parameter.grad.double() ** 2
        mean = sum(v.sum() for v in squares.values()) / sum(v.numel() for v in squares.values())
        expected[brick] = saved_names({name: value / mean for name, value in squares.items()})
        expected[brick] |= {"embed_out.weight": expected[brick].get("lm_head.weight")}
    merged = project.tensors(text)
    base = tensors_of(project.path / "base")
    tuned = {brick: tensors_of(project.path / "bricks" / brick) for brick in expected}
    assert set(merged) == set(base)
    assert len(base) > 20
    for name, origin in base.items():
        shares = {b: f[name].clamp_min(0.01) for b, f in expected.items()}
        right = sum(s * (tuned[b][name] - origin) for b, s in shares.items()) / sum(shares.values())
        assert torch.allclose((merged[name] - origin).double(), right, atol=2e-5), name


# -- laws and errors


STEPS = {
    "regmean": "{merge: regmean, calibration: all.jsonl}",
    "featcal": "{merge: featcal, calibration: all.jsonl}",
    "aim": "{merge: aim, calibration: all.jsonl}",
    "null_space": "{merge: null_space, calibration: all.jsonl, tokens: [w]}",
    "fisher": "{merge: fisher, calibration: all.jsonl, samples: 4}",
    "cocktail": "{merge: cocktail, examples: all.jsonl}",
}


def test_every_method_that_reads_texts_is_tested_here() -> None:
    found = {cls.name for cls in methods().values() if issubclass(cls, MergeMethod) and cls.laws.needs != "tensor"}
    assert found == set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_laws(name: str, project: Project) -> None:
    """As `test_merge.test_laws`, on models that run."""
    write_rows(project.path / "all.jsonl", 6)
    laws = methods()[f"merge:{name}"].laws  # type: ignore[attr-defined]

    def merged(*bricks: str, fields: str = "") -> dict[str, Tensor]:
        step = STEPS[name].replace("}", f"{fields}}}")
        return project.tensors(f"bricks: {{{', '.join(f'{b}: bricks/{b}' for b in bricks)}}}\nsteps: [{step}]")

    orders = [merged(*order) for order in (("one", "two", "full"), ("full", "one", "two"))]
    same = all(torch.equal(orders[0][n], orders[1][n]) for n in orders[0])
    assert laws.permutation_invariant == same
    single, alone = merged("full"), tensors_of(project.path / "bricks" / "full")
    assert laws.single_is_identity == all(torch.allclose(single[n], alone[n].float(), rtol=2e-7, atol=1e-7) for n in alone)
    if "calibration" in STEPS[name] and name not in ("aim", "null_space"):
        with pytest.raises(WorkbenchError, match="weights at"):
            merged("one", "two", fields=", bricks: {one: 0, two: 0}")
        assert not laws.zero_is_base
        twice = [merged("one", "two", fields=f", bricks: {{one: {w}, two: {w / 2}}}") for w in (2, 4)]
        assert (name == "featcal") != all(torch.allclose(twice[0][n], twice[1][n], rtol=1e-6, atol=1e-7) for n in twice[0])


def close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert all(torch.allclose(one[n], two[n], rtol=1e-6, atol=1e-7) for n in one)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "all.jsonl: no texts"),
        ('{"text": "w1 w2"}\n{"text": 3}\n', "all.jsonl:2: expected a text in 'text', found int"),
        ('{"prompt": "w1"}\n', "all.jsonl:1: expected 'text', or 'prompt' and an answer; found prompt"),
        ('\n{"prompt": "w1", "completion": " "}\n', "all.jsonl:2: expected a text in 'completion', found an empty text"),
        ('{"text": "w1 w2"}\n["w3"]\n', "all.jsonl:2: expected an object, found list"),
        ("w1 w2\n", "all.jsonl:1: not JSON"),
    ],
)
@pytest.mark.parametrize("name", STEPS)
def test_bad_texts_are_found_before_any_work(name: str, content: str, message: str, project: Project) -> None:
    (project.path / "all.jsonl").write_text(content, "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        project.resolve(f"bricks: {{one: bricks/one}}\nsteps: [{STEPS[name]}]")
    assert message in caught.value.message
    assert caught.value.hint


def test_texts_that_are_missing_and_plans(project: Project) -> None:
    with pytest.raises(WorkbenchError, match=r"test.yaml:4:.*all.jsonl does not exist"):
        project.resolve(f"bricks: {{one: bricks/one}}\nsteps: [{STEPS['regmean']}]")
    for fields in ("", ", bricks: {one: 1.0}", ", bricks: {one: {weight: 1.0}}"):
        with pytest.raises(WorkbenchError, match="expected `calibration`"):
            project.resolve(f"bricks: {{one: bricks/one}}\nsteps: [{{merge: regmean{fields}}}]")
    (project.path / "all.jsonl").write_text('{"text": "w1 w2"}\n', "utf-8")
    with pytest.raises(WorkbenchError, match="weight of 'one' is -1"):
        project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: fisher, calibration: all.jsonl, bricks: {one: -1.0}}]")

    def planned(step: str, seed: int = 0) -> Any:
        write_rows(project.path / "all.jsonl", 6, seed)
        resolved = project.resolve(f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps: [{step}]")
        assert resolved.key  # reads the bricks, so that the run has a name
        return plan(resolved, project.path / "runs")

    average = planned("{merge: average}")
    for name, needs in (
        ("regmean", "texts"),
        ("featcal", "texts"),
        ("fisher", "model"),
        ("cocktail", "model"),
    ):
        found = planned(STEPS[name])
        assert (found.steps[0].needs, found.steps[0].inputs) == (needs, ["all.jsonl"])
        assert found.peak_bytes > average.peak_bytes
        assert found.run != planned(STEPS[name], seed=1).run, "other texts, another run"


UNREACHED = {
    "model.embed_tokens.weight": 1,
    "model.norm.weight": 1,
    "model.layers.*.input_layernorm.weight": 4,
    "model.layers.*.post_attention_layernorm.weight": 4,
}


@pytest.mark.parametrize(
    ("step", "noted"),
    [
        ("merge: fisher, bricks: {one: {calibration: one.jsonl}, two: {calibration: two.jsonl}}", {"averaged": {}}),
        ("merge: aim, calibration: one.jsonl", {"damped": 28, "summed": UNREACHED}),
        ("merge: null_space, calibration: one.jsonl, tokens: [w]", {"projected": 28, "kept_alone": UNREACHED}),
    ],
)
def test_the_record_counts_tensors_that_the_texts_do_not_reach(
    step: str, noted: dict[str, Any], family_project: Callable[[str], Project]
) -> None:
    text = f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps: [{{{step}}}]\n"
    (record,) = family_project("llama").run(text)["steps"]
    assert {key: record[key] for key in noted} == noted
