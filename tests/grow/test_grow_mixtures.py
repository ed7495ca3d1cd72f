"""Mixtures grown and pruned: experts left out and brought back, counted, and added from copies, the base and bricks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worlds.commands import call, document, refused
from worlds.mixtures import EXPERTS, LAYERS, configs, greedy, hand_count, live, random_tokens, rows_of, save_mixture, write_lines
from worlds.project import CPU, Project
from worlds.tiny import WORDS, edit_json, save_finetuned, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.grow.mixtures.mixture import usage
from workbench.models.texts import TextRow
from workbench.run.compose import compose
from workbench.run.kind import written_specs
from workbench.run.plan import plan


@pytest.fixture(scope="session")
def mixture_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a tiny float32 mixture. Not to be changed by a test."""
    made: dict[str, Path] = {}

    def get(family: str = "mixtral") -> Path:
        if family not in made:
            made[family] = save_mixture(family, tmp_path_factory.mktemp("mixtures") / family)
        return made[family]

    return get


# -- left out, and brought back


@pytest.mark.parametrize("family", configs())
def test_pruned_and_added_back(family: str, project: Project, mixture_of: Callable[[str], Path]) -> None:
    """The same model with its experts in another order; one without the expert is another model, with one expert less."""
    head = f"base: {mixture_of(family)}\n"
    drop = "{grow: prune_experts, drop: [3]}"
    back = live(project.run(f"{head}steps: [{drop}, {{grow: add_expert, base: 3}}]\n")["model"])
    pruned = live(project.run(f"{head}steps: [{drop[:-1]}, check: off}}]\n", "pruned.yaml")["model"])
    before, tokens = live(mixture_of(family)), random_tokens()
    with torch.no_grad():
        expected, scale = before(tokens).logits, float(before(tokens).logits.abs().max())
        assert float((expected - back(tokens).logits).abs().max()) <= 1e-5 * scale
        assert float((expected - pruned(tokens).logits).abs().max()) > 1e-3 * scale
    assert greedy(back, tokens[:1]) == greedy(before, tokens[:1])
    counts = [next(m.num_experts for m in model.modules() if hasattr(m, "num_experts")) for model in (before, pruned, back)]
    assert counts == [EXPERTS, EXPERTS - 1, EXPERTS]


def test_what_moves_with_an_expert(project: Project, mixture_of: Callable[[str], Path]) -> None:
    """Expert matrices, router rows and correction biases keep their values under the new numbers; nothing else changes."""
    old = tensors_of(mixture_of("ernie4_5_moe"))
    new = project.tensors(f"base: {mixture_of('ernie4_5_moe')}\nsteps: [{{grow: prune_experts, keep: [[5, 0, 2], [1, 2, 4]]}}]\n")
    for layer, kept in enumerate(([5, 0, 2], [1, 2, 4])):
        at = f"model.layers.{layer}.mlp."
        assert torch.equal(new[f"{at}gate.weight"], old[f"{at}gate.weight"][kept])
        bias = f"{at}moe_statics.e_score_correction_bias"
        assert torch.equal(new[bias], old[bias][:, kept])
        assert new[bias].shape == (1, 3)
        for number, expert in enumerate(kept):
            assert torch.equal(new[f"{at}experts.{number}.down_proj.weight"], old[f"{at}experts.{expert}.down_proj.weight"])
        assert f"{at}experts.3.down_proj.weight" not in new
    rest = {n for n in old if ".mlp." not in n}
    assert {n for n in new if ".mlp." not in n} == rest
    assert all(torch.equal(new[n], old[n]) for n in rest)


def test_experts_in_one_tensor(project: Project, mixture_of: Callable[[str], Path], tmp_path: Path) -> None:
    """granitemoe's names, and those that mergekit writes: rows of a tensor [experts, rows, cols]."""
    from safetensors.torch import save_file

    old = tensors_of(mixture_of("granitemoe"))
    new = project.tensors(f"base: {mixture_of('granitemoe')}\nsteps: [{{grow: prune_experts, drop: [0, 4]}}]\n")
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    assert torch.equal(new[name], old[name][[1, 2, 3, 5]])
    fused = tmp_path / "fused"
    fused.mkdir()
    for file in mixture_of("mixtral").iterdir():
        (fused / file.name).write_bytes(file.read_bytes())
    save_file(
        {n: t.contiguous() for n, t in live(mixture_of("mixtral")).state_dict().items()},
        fused / "model.safetensors",
        {"format": "pt"},
    )
    text = "steps: [{{grow: prune_experts, drop: [0, 4]}}, {{grow: add_expert, base: [4, 0]}}, {{grow: add_expert, copy: 1}}]\nbase: {}\n"
    one, two = (live(project.run(text.format(path), f"{path.name}.yaml")["model"]) for path in (fused, mixture_of("mixtral")))
    with torch.no_grad():
        assert torch.equal(one(random_tokens()).logits, two(random_tokens()).logits)
    assert torch.equal(one.model.layers[1].mlp.gate.weight[-1], one.model.layers[1].mlp.gate.weight[1])


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "qwen3_moe"])
def test_experts_that_no_token_takes(family: str, project: Project, mixture_of: Callable[[str], Path]) -> None:
    """Two tokens take at most four experts of six: without the other two, logits are the same."""
    model, tokens = live(mixture_of(family)), torch.tensor([[7, 31]])
    shares = hand_count(model, tokens.tolist())
    kept = [sorted(row.argsort(descending=True, stable=True)[:4].tolist()) for row in shares]
    assert all(float(row[kept[i]].sum()) == 1 for i, row in enumerate(shares))
    document = project.run(f"base: {mixture_of(family)}\nsteps: [{{grow: prune_experts, keep: {kept}}}]\n")
    with torch.no_grad():
        difference = (model(tokens).logits - live(document["model"])(tokens).logits).abs().max()
    assert float(difference) <= 1e-6


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "ernie4_5_moe"])
def test_the_most_used_stay(family: str, project: Project, mixture_of: Callable[[str], Path]) -> None:
    """`to: 4` keeps the four of each layer that a count by hand keeps, and is the model of those lists."""
    texts = write_lines(project.path / "texts.jsonl")
    text = f"base: {mixture_of(family)}\nsteps: [{{grow: prune_experts, to: 4, calibration: texts.jsonl}}]\n"
    record = compose(project.resolve(text), CPU).records()[0]
    shares = hand_count(live(mixture_of(family)), rows_of(texts))
    assert record["kept"] == [sorted(row.topk(4).indices.tolist()) for row in shares]
    assert torch.allclose(torch.tensor(record["usage"]), shares, atol=1e-4)
    assert record["tokens"] == 240
    found = project.tensors(text)
    explicit = project.tensors(f"base: {mixture_of(family)}\nsteps: [{{grow: prune_experts, keep: {record['kept']}}}]\n")
    assert found.keys() == explicit.keys()
    assert all(torch.equal(found[n], explicit[n]) for n in found)


def test_a_count_is_kept(project: Project, mixture_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_lines(project.path / "texts.jsonl")
    text = f"base: {mixture_of('mixtral')}\nsteps: [{{grow: prune_experts, to: 4, calibration: texts.jsonl}}]\n"
    resolved = project.resolve(text)
    assert plan(resolved, project.path / "runs").steps[0].to_dict()["experts"] == 4
    first = compose(resolved, CPU).records()
    monkeypatch.setattr("workbench.grow.prune_experts.usage", lambda *_: pytest.fail("counted again"))
    assert compose(project.resolve(text), CPU).records() == first
    write_lines(texts, seed=3)
    assert project.resolve(text).keys != resolved.keys


def test_top_k(project: Project, mixture_of: Callable[[str], Path]) -> None:
    for family, field in (("mixtral", "num_experts_per_tok"), ("ernie4_5_moe", "moe_k")):
        model = compose(
            project.resolve(f"base: {mixture_of(family)}\nsteps: [{{grow: prune_experts, drop: [0], top_k: 1}}]\n"), CPU
        ).model
        assert model.config[field] == 1


# -- counted


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "granitemoe", "ernie4_5_moe", "olmoe", "gpt_oss"]
)
def test_usage(family: str, mixture_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Texts of other lengths in one batch are counted as one at a time; a row adds up to 1."""
    model = live(mixture_of(family))
    rows = [row[: 3 + i % 9] for i, row in enumerate(rows_of(write_lines(tmp_path / "texts.jsonl")))]
    found = usage(model, [TextRow(row, 1) for row in rows], CPU)
    assert torch.allclose(found.shares.float(), hand_count(model, rows), atol=1e-6)
    assert torch.allclose(found.shares.sum(1), torch.ones(LAYERS, dtype=torch.float64))
    assert (found.layers, found.tokens, found.top_k) == ((0, 1), sum(map(len, rows)), 2)
    assert all(0 < bits < torch.tensor(float(EXPERTS)).log2() for bits in found.entropy)


def test_entropy(mixture_of: Callable[[str], Path]) -> None:
    """A router of zeros weighs those that it takes alike: one bit. The dense first layer of deepseek_v3 is not counted."""
    model = live(mixture_of("mixtral"))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    assert float(usage(model, [TextRow([3, 4, 5], 1)], CPU).entropy[1]) == pytest.approx(1)
    assert usage(live(mixture_of("deepseek_v3")), [TextRow([3, 4, 5], 1)], CPU).layers == (1, 2)


def test_routing_that_cannot_be_read(mixture_of: Callable[[str], Path]) -> None:
    """jetmoe sorts tokens by expert before its experts see them."""
    with pytest.raises(WorkbenchError, match="the experts of model_type jetmoe do not receive") as error:
        usage(live(mixture_of("jetmoe")), [TextRow([3, 4, 5], 1)], CPU)
    assert error.value.exit_code == 2


def test_command(project: Project, mixture_of: Callable[[str], Path], llama: Path) -> None:
    texts = write_lines(project.path / "texts.jsonl")
    words = ["experts", str(mixture_of("mixtral")), "--texts", str(texts), "--device", "cpu"]
    usage = document(*words)
    shares = hand_count(live(mixture_of("mixtral")), rows_of(texts))
    assert torch.allclose(torch.tensor(usage["usage"]), shares, atol=1e-4)
    assert torch.allclose(torch.tensor(usage["mean"]), shares.mean(0), atol=1e-4)
    lines = call(*words, "--samples", "20").stdout.splitlines()
    assert lines[0].startswith("240 tokens, 2 of 6 experts per token")
    assert lines[1].split() == ["layer", "0", "1", "2", "3", "4", "5", "entropy,", "bits"]
    assert lines[3].split()[:3] == ["1", f"{100 * shares[1, 0]:.1f}", f"{100 * shares[1, 1]:.1f}"]
    assert lines[4].split()[0] == "mean"
    recipe = project.write(f"base: {mixture_of('mixtral')}\nsteps: [{{grow: prune_experts, drop: [1]}}]\n")
    pruned = document("experts", str(recipe), *words[2:])
    assert [len(row) for row in pruned["usage"]] == [5, 5]
    error = refused("experts", str(llama), *words[2:])
    assert error.exit_code == 2
    assert error.message == "model_type llama has no experts: no layer is a mixture"


# -- added


BRICKS = "bricks: {one: bricks/one, two: bricks/two}\n"


def grown(add: str, into: str = "mixtral", step: str = "bricks: {one: 1}, top_k: 1") -> str:
    return f"{BRICKS}steps: [{{grow: experts, {step}, into: {into}}}, {{grow: add_expert, {add}}}]\noutput: {{dtype: float32}}\n"


@pytest.mark.parametrize("into", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("step", ["bricks: {one: 1}, top_k: 1", "bricks: {one: 1, two: 1}, anchor: off, top_k: 1"])
def test_a_brick_behind_a_mixture(into: str, step: str, project: Project) -> None:
    """The new expert is what the brick's weighted delta makes of the base, with an anchor and without one."""
    added = project.tensors(grown("bricks: {two: 0.5}, gate: random", into, step))
    three = project.tensors(
        f"{BRICKS}steps: [{{grow: experts, bricks: {{one: 1, two: 0.5}}, top_k: 1, into: {into}}}]\noutput: {{dtype: float32}}\n"
    )
    moe = "model.layers.2.block_sparse_moe."
    if into == "mixtral":
        for part in ("w1", "w2", "w3"):
            assert torch.equal(added[f"{moe}experts.2.{part}.weight"], three[f"{moe}experts.2.{part}.weight"])
        router = added[f"{moe}gate.weight"]
    else:
        for name in ("input_linear", "output_linear"):
            assert torch.equal(added[f"{moe}{name}.weight"][2], three[f"{moe}{name}.weight"][2])
        router = added[f"{moe}router.layer.weight"]
    before = project.tensors(f"{BRICKS}steps: [{{grow: experts, {step}, into: {into}}}]\noutput: {{dtype: float32}}\n")
    assert torch.equal(router[:2], before[f"{moe}gate.weight" if into == "mixtral" else f"{moe}router.layer.weight"])
    assert 0.1 < float(router[2].std()) / 0.2 < 3


@pytest.mark.parametrize("family", ["llama", "ernie4_5"])
def test_never(family: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    """No token of the texts takes the new experts, and on them the mixture computes what it did."""
    texts = write_lines(project.path / "texts.jsonl", WORDS[2:5])
    grow, add = (
        "{grow: experts, experts: 3, redraw: 0.5, top_k: 2}",
        "{grow: add_expert, bricks: {full: 1, other: 1}, calibration: texts.jsonl}",
    )
    base = dense_of(family)
    for seed, name in enumerate(("full", "other")):
        save_finetuned(base, project.path / name, seed=seed)
    head = f"base: {base}\nbricks: {{full: full, other: other}}\n"
    document = project.run(f"{head}steps: [{grow}, {add}]\n")
    gate = document["steps"][1]["gate"]
    assert (gate["tokens"], gate["selected"]) == (240, 0)
    after, before = live(document["model"]), live(project.run(f"{head}steps: [{grow}]\n", "before.yaml")["model"])
    rows = rows_of(texts)
    shares = usage(after, [TextRow(row, 1) for row in rows], CPU).shares
    assert shares.shape == (3, 5)
    assert float(shares[:, 3:].sum()) == 0
    with torch.no_grad():
        tokens = torch.tensor(rows)
        assert torch.allclose(after(tokens).logits, before(tokens).logits, atol=1e-5)


def test_never_that_some_token_takes(project: Project) -> None:
    """Where every expert but one is taken, a row opposite to the mean's is not enough for all tokens: their number is said."""
    write_lines(project.path / "texts.jsonl")
    text = grown("bricks: {two: 1}, calibration: texts.jsonl", step="bricks: {one: 1}, top_k: 2")
    with pytest.raises(
        WorkbenchError,
        match=r"gate: never: \d+ of 240 tokens still select the new expert \(model.layers.\d.block_sparse_moe.gate.weight\)",
    ):
        compose(project.resolve(text), CPU)


def test_prompts_of_a_new_expert(project: Project) -> None:
    """Its row is the unit mean of what the router reads on its prompts, over the temperature and the mean norm."""
    text = grown("bricks: {two: {prompts: [w1 w2 w3, w4 w5]}}, gate: prompts")
    document = project.run(text)
    assert document["steps"][1]["gate"]["tokens"] == {"two": 5}
    model = live(
        project.run(
            f"{BRICKS}steps: [{{grow: experts, bricks: {{one: 1}}, top_k: 1, into: mixtral}}]\noutput: {{dtype: float32}}\n",
            "b.yaml",
        )["model"]
    )
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for row in ("w1 w2 w3", "w4 w5"):
            model(torch.tensor([[WORDS.index(word) for word in row.split()]]))
    x = torch.cat(seen)
    row = torch.nn.functional.normalize(x.mean(0), dim=0) / x.norm(dim=1).mean() / 0.1
    after = live(document["model"])
    assert torch.allclose(after.model.layers[1].mlp.gate.weight[2], row, atol=1e-5)
    # the first layer reads the same after growth: there the share is that of the grown model's own choices
    first = after.model.layers[0].mlp.gate
    chosen: list[torch.Tensor] = []
    first.register_forward_hook(lambda _m, _args, output: chosen.append(output[2].flatten()))
    with torch.no_grad():
        for line in ("w1 w2 w3", "w4 w5"):
            after(torch.tensor([[WORDS.index(word) for word in line.split()]]))
    share = float((torch.cat(chosen) == 2).float().mean())
    assert document["steps"][1]["gate"]["found_on_prompts_by_layer"][0] == pytest.approx(share, abs=1e-4)


def test_planned_from_headers(project: Project, mixture_of: Callable[[str], Path]) -> None:
    """Shapes and bytes are known before anything is read, of experts from the base too."""
    base = mixture_of("ernie4_5_moe")
    text = f"base: {base}\nsteps: [{{grow: prune_experts, drop: [3, 5]}}, {{grow: add_expert, base: [5]}}, {{grow: add_expert, copy: 0}}]\n"
    resolved = project.resolve(text)
    planned = plan(resolved, project.path / "runs")
    assert [step.to_dict()["experts"] for step in planned.steps] == [4, 5, 6]
    assert planned.steps[1].to_dict()["added"] == ["base 5"]
    made = project.tensors(text)
    assert {n: tuple(t.shape) for n, t in made.items()} == {n: s.shape for n, s in written_specs(resolved).items()}
    assert planned.write_bytes == sum(t.nbytes for t in made.values()) == sum(t.nbytes for t in tensors_of(base).values())
    bias, router = (f"model.layers.1.mlp.{n}" for n in ("moe_statics.e_score_correction_bias", "gate.weight"))
    order = [0, 1, 2, 4, 5, 0]
    assert torch.equal(made[bias], tensors_of(base)[bias][:, order])
    assert torch.equal(made[router], tensors_of(base)[router][order])


# -- refused


REFUSED = {
    "{grow: prune_experts, drop: [6]}": "no expert 6: the model has experts 0..5 in each layer",
    "{grow: prune_experts, drop: [-1]}": "expected numbers of experts, 0 or more and each once; found [-1]",
    "{grow: prune_experts, drop: [1, 1]}": "expected numbers of experts, 0 or more and each once; found [1, 1]",
    "{grow: prune_experts, drop: [0, 1, 2, 3, 4, 5]}": "`drop` names all 6 experts; at least one must remain",
    "{grow: prune_experts, drop: [0, 1, 2, 3, 4]}": "the model selects 2 experts per token (num_experts_per_tok), but only 1 of 6 experts remain",
    "{grow: prune_experts, drop: [0], top_k: 6}": "`top_k` is 6, but only 5 of 6 experts remain",
    "{grow: prune_experts, keep: [[0, 1]]}": "`keep` has 1 lists, expected 2, one for each layer with experts",
    "{grow: prune_experts, keep: [[0, 1], [0, 1, 2]]}": "one number of experts for all layers",
    "{grow: prune_experts, drop: [0], to: 3}": "found drop and to",
    "{grow: prune_experts, to: 3}": "`to` needs `calibration`, a JSONL file of texts to count on, and only `to` reads it",
    "{grow: prune_experts, to: 7, calibration: texts.jsonl}": "`to: 7`: the model has only 6 experts in each layer",
    "{grow: prune_experts, to: 3, calibration: nowhere.jsonl}": "nowhere.jsonl does not exist",
    "{grow: add_expert}": "expected one of `copy: 0`, `base: [3]` and `bricks: {math: 1.0}`; found none",
    "{grow: add_expert, copy: 6}": "`copy: 6`: the model has experts 0..5 in each layer",
    "{grow: add_expert, base: 6}": "no expert 6: the base has experts 0..5 in each layer",
    "{grow: add_expert, base: 1, gate: random}": "`gate` applies to `bricks` only; an expert from `base` has its own row of the router",
    "{grow: add_expert, bricks: {one: 1}}": "`gate: never` needs `calibration`",
    "{grow: add_expert, bricks: {one: 1}, gate: prompts}": "`gate: prompts` needs `prompts`, a list of texts, for one",
    "{grow: add_expert, bricks: {one: 1}, gate: random}": "the base has no model.layers.0.mlp.gate_proj.weight: `bricks` need a dense feed-forward layer",
}  # fmt: skip


@pytest.mark.parametrize("step", REFUSED)
def test_refused(step: str, project: Project, mixture_of: Callable[[str], Path], tmp_path: Path) -> None:
    write_lines(project.path / "texts.jsonl")
    save_finetuned(mixture_of("mixtral"), project.path / "near", seed=0)
    text = f"base: {mixture_of('mixtral')}\nbricks: {{one: near}}\nsteps: [{step}]\n"
    with pytest.raises(WorkbenchError, match=re.escape(REFUSED[step])):
        compose(project.resolve(text), CPU)


@pytest.mark.parametrize("step", ["{grow: prune_experts, drop: [0]}", "{grow: add_expert, copy: 0}"])
def test_a_dense_model_is_refused(step: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    with pytest.raises(WorkbenchError, match="model_type llama has no experts") as error:
        compose(project.resolve(f"base: {dense_of('llama')}\nsteps: [{step}]\n"), CPU)
    assert error.value.exit_code == 2
    assert error.value.hint == "`grow: experts` turns a dense model into a mixture."


def test_no_base_to_add_from(project: Project, dense_of: Callable[[str], Path]) -> None:
    """The mixture has experts, and its base has none."""
    steps = "steps: [{grow: experts, experts: 3}, {grow: add_expert, base: 0}]\n"
    with pytest.raises(WorkbenchError, match="add_expert: the base: model_type llama has no experts"):
        compose(project.resolve(f"base: {dense_of('llama')}\n{steps}"), CPU)


def test_groups_are_refused(project: Project, mixture_of: Callable[[str], Path], tmp_path: Path) -> None:
    grouped = tmp_path / "grouped"
    grouped.mkdir()
    for file in mixture_of("deepseek_v3").iterdir():
        (grouped / file.name).write_bytes(file.read_bytes())
    edit_json(grouped / "config.json", n_group=2)
    with pytest.raises(WorkbenchError, match="n_group is 2: the router first selects groups of experts"):
        compose(project.resolve(f"base: {grouped}\nsteps: [{{grow: prune_experts, drop: [0]}}]\n"), CPU)
