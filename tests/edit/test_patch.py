"""`edit: patch`: keys, values and gating of new neurons, what the written model says, what stays the same, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.dense import context_of, save_dense, write_facts_file, write_text
from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import files_of, live, tensors_of

from workbench.edit.closed_form.moments import statistics_source, token_rows
from workbench.edit.gradient.patching import _up_row
from workbench.edit.gradient.separator import Separator
from workbench.edit.patch import _split
from workbench.ground.errors import WorkbenchError
from workbench.recipe.methods import methods
from workbench.run.plan import plan
from workbench.steps import Edit, MethodContext

FIELDS = {"facts": "facts.jsonl", "statistics": "text.txt", "tokens_per_input": 2, "preserve_generated": 8, "contexts": 1}
FIELDS |= {"position": "prompt_last"}
F32 = "output: {dtype: float32}\n"
LAST = 2
WIDTHS = {"gpt2": 128}
"""Neurons of a family's tiny model, where it is not 48."""


def grow(family: str = "llama", more: int = 8, check: str = "off") -> str:
    return f"{{grow: width, neurons: {WIDTHS.get(family, 48) + more}, check: {check}}}"


def patch(**fields: Any) -> str:
    return json.dumps({"edit": "patch", **FIELDS, **fields})


def world(folder: Path, family: str, facts: int = 2, words: int = 2) -> Project:
    (folder / "recipes").mkdir(parents=True)
    save_dense(family, folder / "base")
    write_facts_file(folder / "facts.jsonl", facts, words)
    write_text(folder / "text.txt")
    return Project(folder)


def solve(context: MethodContext, **fields: Any) -> Edit:
    return methods()["edit:patch"].model_validate({"edit": "patch", **FIELDS, **fields}).solve(context)  # type: ignore[attr-defined,no-any-return]


def words(project: Project) -> dict[str, int]:
    found: dict[str, int] = json.loads((project.path / "base" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return found


def tokens(project: Project, text: str) -> torch.Tensor:
    known = words(project)
    return torch.tensor([[known[word] for word in text.split()]])


def prompts(project: Project) -> list[tuple[torch.Tensor, list[int]]]:
    rows = [json.loads(line) for line in (project.path / "facts.jsonl").read_text("utf-8").splitlines()]
    pairs = [(row["prompt"].replace("{subject}", row["subject"]), row["target"]) for row in rows]
    return [(tokens(project, prompt), tokens(project, target)[0].tolist()) for prompt, target in pairs]


def test_the_key_of_two_points_is_the_one_computed_by_hand() -> None:
    """One query (1, 1), one other input (1, -1): k = (0, c) with c minimizing 2 (1 - c)² + 2 r c², which is 1 / (1 + r)."""
    key, *products = Separator(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), ridge=0.25).key([0])
    torch.testing.assert_close(key, torch.tensor([0.0, 1 / 1.25], dtype=torch.float64), atol=1e-12, rtol=0)
    assert products == pytest.approx([0.8, -0.8])


@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_neuron_is_as_active_at_all_its_queries(bias: bool) -> None:
    queries = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double() + 2.0
    key = torch.cat((torch.ones(12).double(), torch.tensor([0.5]).double()[: int(bias)]))
    row = _up_row(queries, key, 7.0)
    margins = queries.sum(1) + (3.5 if bias else 0.0)
    active = margins / margins[0] * (queries @ row)
    assert float(active[0]) == pytest.approx(1.0, abs=1e-12)
    assert active.tolist() == pytest.approx([1.0] * 4, abs=0.03)
    beyond = torch.cat((queries, -queries[:1]))
    torch.testing.assert_close(_up_row(beyond, key, 7.0), row)  # the key is not above 0 there
    alone = _up_row(queries[:1], key, 7.0)
    torch.testing.assert_close(alone, queries[0] / queries[0].square().sum())


def test_the_key_is_the_minimum_of_the_losses() -> None:
    """The gradient of the losses, written out here, is zero at the key, and some inputs are above and some below the margin."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(300, 12, generator=generator) + 0.8
    queries = torch.randn(3, 12, generator=generator) + 0.3
    separator = Separator(torch.cat((queries, others)), 1e-2)
    separator.key(range(40, 44))  # another key before it changes nothing
    key = separator.key(range(3))[0].requires_grad_()
    both = torch.cat((queries, others)).double()
    scale = both.square().sum(1).mean()
    above = (1 + others.double() @ key).clamp(min=0)
    below = (1 - queries.double() @ key).clamp(min=0)
    loss = above.square().sum() + 100 * below.square().sum() + 1e-2 * scale * key.square().sum()
    (gradient,) = torch.autograd.grad(loss, key)
    assert gradient.abs().max() < 1e-8 * float(loss)
    assert 0 < int((above > 0).sum()) < 300


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_neuron_is_the_one_computed_by_hand(family: str, tmp_path: Path) -> None:
    """One fact of one token: rows, bias and column of the written neuron, and the logits that follow from them."""
    project = world(tmp_path / "p", family, 1, 1)
    project.run(f"steps: [{grow(family)}]\n" + F32, "grown.yaml", out=tmp_path / "p" / "grown")
    run = project.run(f"steps: [{grow(family)}, {patch(min_efficacy=0, contexts=0)}]\n" + F32)
    record = run["steps"][1]
    (one,) = record["patches"]
    assert one["elsewhere"] < one["at_queries"]
    base, new = live(tmp_path / "p" / "grown"), live(Path(run["model"]))
    name = "transformer.h.2.mlp.c_fc" if family == "gpt2" else "model.layers.2.mlp.gate_proj"
    out = "transformer.h.2.mlp.c_proj" if family == "gpt2" else "model.layers.2.mlp.down_proj"
    n, turned = one["neuron"], family == "gpt2"
    gate = new.get_submodule(name)
    row = gate.weight[:, n] if turned else gate.weight[n]
    column = new.get_submodule(out).weight[n] if turned else new.get_submodule(out).weight[:, n]
    (prompt, target), *_ = prompts(project)
    seen: list[torch.Tensor] = []
    handle = base.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        base(prompt)
        handle.remove()
        before = seen[0] @ row + (gate.bias[n] if turned else 0)
        assert float(before[-1]) >= 100 * one["at_queries"] - 0.1
        assert (before[:-1] <= 100 * one["elsewhere"] + 0.1).all()
        if turned:
            activation = torch.nn.functional.gelu(before, approximate="tanh")
        else:
            up = new.get_submodule("model.layers.2.mlp.up_proj").weight[n]
            torch.testing.assert_close(up, seen[0][-1] / seen[0][-1].square().sum(), atol=1e-7, rtol=1e-4)
            activation = torch.nn.functional.silu(before) * (seen[0] @ up)
            assert float(activation[-1]) == pytest.approx(float(before[-1]), rel=1e-4)
        outputs: list[torch.Tensor] = []
        handle = base.get_submodule(out).register_forward_hook(lambda _m, _a, output: outputs.append(output[0, -1]))
        base(prompt)
        handle.remove()
        longest = record["steps"] * 0.25 * float(outputs[0].norm())  # steps of a quarter of the output's norm
        assert 0.02 * longest < float((activation[-1] * column).norm()) <= 1.001 * longest
        base.get_submodule(out).register_forward_hook(lambda _m, _a, output: output + activation[None, :, None] * column)
        torch.testing.assert_close(base(prompt).logits, new(prompt).logits, atol=1e-3, rtol=1e-4)
        assert new(prompt).logits[0, -1].argmax() == target[0]
    assert (record["neurons"], record["layers"], record["efficacy"]) == (1, [LAST], 1.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma"])
def test_the_written_model_says_the_targets_and_the_rest_stays(family: str, tmp_path: Path) -> None:
    """The grown model is the base; the patched one says the targets and differs in the new neurons of one layer alone."""
    project = world(tmp_path / "p", family)
    plain = project.run(f"steps: [{grow(family, check='tensors')}]\n" + F32, "grown.yaml")
    run = project.run(f"steps: [{grow(family, check='tensors')}, {patch()}]\n" + F32)
    base, grown, new = (live(p) for p in (tmp_path / "p" / "base", Path(plain["model"]), Path(run["model"])))
    record = run["steps"][1]
    for prompt, target in prompts(project):
        torch.testing.assert_close(base(prompt).logits, grown(prompt).logits, atol=1e-4, rtol=1e-4)
        answer = new.generate(prompt, max_new_tokens=len(target), do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        assert answer.tolist() == target
    old, found = (tensors_of(Path(r["model"])) for r in (plain, run))
    chosen = {one["neuron"] for one in record["patches"]}
    width = WIDTHS.get(family, 48)
    assert chosen == set(range(width, width + len(chosen)))
    changed = {name for name in old if not torch.equal(old[name], found[name])}
    assert len(changed) == record["tensors"] - (family in ("gpt2", "opt", "gpt_neox"))  # the output's bias has a change of zero
    for name in changed:
        difference = old[name] != found[name]
        along = next(d for d, size in enumerate(difference.shape) if size == width + 8)
        places = difference.nonzero()[:, along].tolist()
        assert set(places) <= chosen, name
    assert record["text"]["unseen"] > 20
    assert 0 <= record["text"]["active"] <= 0.5


def test_where_the_neurons_are_silent_logits_are_identical(tmp_path: Path) -> None:
    """A tensor of positions at which every neuron is exactly zero: the same logits, and other logits at the queries."""
    project = world(tmp_path / "p", "gpt2")
    plain = project.run(f"steps: [{grow('gpt2')}]\n" + F32, "grown.yaml")
    run = project.run(f"steps: [{grow('gpt2')}, {patch()}]\n" + F32)
    grown, new = live(Path(plain["model"])), live(Path(run["model"]))
    chosen = [one["neuron"] for one in run["steps"][1]["patches"]]
    seen: list[torch.Tensor] = []
    new.get_submodule("transformer.h.2.mlp.c_proj").register_forward_pre_hook(lambda _m, args: seen.append(args[0][..., chosen]))
    rows = torch.randint(2, 60, (8, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        after, before = new(rows).logits, grown(rows).logits
    silent = (seen[0] == 0).all(dim=-1)
    assert silent.float().mean() > 0.5
    assert torch.equal(after[silent], before[silent])
    for prompt, _ in prompts(project):
        with torch.no_grad():
            assert (new(prompt).logits[0, -1] - grown(prompt).logits[0, -1]).abs().max() > 0.1


def test_solving_leaves_the_model_unchanged_and_gives_the_same_twice(tmp_path: Path) -> None:
    project = world(tmp_path / "p", "llama")
    grown = project.run(f"steps: [{grow()}]\n" + F32, "grown.yaml")
    again = project.run(f"steps: [{grow()}]\n" + F32, "again.yaml")
    assert files_of(Path(grown["model"]))["model.safetensors"] == files_of(Path(again["model"]))["model.safetensors"]
    context = context_of(project, grown["model"])
    own = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    first, second = solve(context), solve(context)
    assert all(torch.equal(own[name], tensor) for name, tensor in context.model.state_dict().items())
    assert first.record == second.record
    for name, factors in first.factors.items():
        assert torch.equal(factors.left, second.factors[name].left)
        assert torch.equal(factors.right, second.factors[name].right)
    assert {factors.rank for factors in first.factors.values()} == {first.record["neurons"]}


def test_peft_loads_the_brick_of_a_model_with_biases(tmp_path: Path) -> None:
    from peft import PeftModel

    project = world(tmp_path / "p", "gpt2")
    plain = project.run(f"steps: [{grow('gpt2')}]\n" + F32, "grown.yaml")
    run = project.run(f"steps: [{grow('gpt2')}, {patch()}]\n" + F32)
    place = Path(run["run"]) / "edits" / "edit-patch"
    rows = torch.cat([prompt for prompt, _ in prompts(project)])
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(live(Path(plain["model"])), place)(rows).logits
        torch.testing.assert_close(wrapped, live(Path(run["model"]))(rows).logits, atol=1e-3, rtol=1e-3)
    on_grown = f"base: {plain['model']}\n"
    direct = project.run(on_grown + f"steps: [{patch()}]\n" + F32, "direct.yaml")
    place = Path(direct["run"]) / "edits" / "edit-patch"
    brick = on_grown + f"bricks: {{b: {place}}}\nsteps: [{{merge: task_arithmetic, bricks: {{b: 1}}}}]\n"
    merged = tensors_of(Path(project.run(brick + F32, "merged.yaml")["model"]))
    written = tensors_of(Path(run["model"]))
    assert files_of(Path(direct["model"]))["model.safetensors"] == files_of(Path(run["model"]))["model.safetensors"]
    for name, tensor in written.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


def refused(project: Project, text: str, match: str) -> WorkbenchError:
    with pytest.raises(WorkbenchError, match=match) as caught:
        project.run(text)
    return caught.value


def test_too_few_neurons_name_the_line_to_write(tmp_path: Path) -> None:
    project = world(tmp_path / "p", "llama", facts=8)
    error = refused(
        project, f"steps: [{patch()}]\n", r"need \d+ neurons, .* layer 1 has 0 that write nothing yet, and lends 12 others"
    )
    needed = int(str(error).split("need ")[1].split()[0])
    assert f"`- {{grow: width, neurons: {48 + needed}}}`" in error.hint
    error = refused(project, f"steps: [{grow(more=1)}, {patch()}]\n", "layer 2 has 1 that write nothing yet, and lends 12 others")
    assert f"neurons: {49 + needed - 1}" in error.hint


def importance(model: torch.nn.Module, layer: int, rows: list[list[int]]) -> torch.Tensor:
    """Mean over tokens of |activation| times the length of the column, with hooks of its own."""
    out = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    seen: list[torch.Tensor] = []
    handle = out.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].abs()))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    handle.remove()
    assert isinstance(out.weight, torch.Tensor)
    return torch.cat(seen).mean(0) * out.weight.norm(dim=0)


def test_without_new_neurons_the_least_used_ones_are_lent(tmp_path: Path) -> None:
    """The model keeps its shape, the edit is an adapter for the base, and nothing but the lent neurons changes."""
    project = world(tmp_path / "p", "llama")
    run = project.run(f"steps: [{patch()}]\n" + F32)
    (record,) = run["steps"]
    base, new = live(project.path / "base"), live(Path(run["model"]))
    chosen = sorted(one["neuron"] for one in record["patches"])
    assert record["lent"] == record["neurons"] == len(chosen) > 0
    assert record["layers"] == [1], "two fifths of three layers"
    context = context_of(project)
    text, _ = _split(list(token_rows(context, statistics_source(context, "text.txt")[0])), 2 * base.config.hidden_size)
    assert chosen == sorted(importance(base, 1, text).argsort()[: len(chosen)].tolist())
    own = [tensor.clone() for tensor in context.model.state_dict().values()]
    solve(context)
    assert all(map(torch.equal, own, context.model.state_dict().values())), "columns return"
    for prompt, target in prompts(project):
        answer = new.generate(prompt, max_new_tokens=len(target), do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        assert answer.tolist() == target
    old, found = tensors_of(project.path / "base"), tensors_of(Path(run["model"]))
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in found.items()}
    for name in (name for name in old if not torch.equal(old[name], found[name])):
        assert name.startswith("model.layers.1.mlp."), name
        along = 1 if "down_proj" in name else 0
        assert set((old[name] != found[name]).nonzero()[:, along].tolist()) <= set(chosen), name
    brick = Path(run["run"]) / "edits" / "edit-patch"
    merged = project.run(f"bricks: {{b: {brick}}}\nsteps: [{{merge: task_arithmetic, bricks: {{b: 1}}}}]\n" + F32, "merged.yaml")
    for name, tensor in tensors_of(Path(merged["model"])).items():
        torch.testing.assert_close(tensor, found[name], atol=1e-5, rtol=1e-5)


def test_neurons_of_an_earlier_edit_are_not_lent(tmp_path: Path) -> None:
    """They are silent on text, so that they would be the first."""
    project = world(tmp_path / "p", "llama", facts=4)
    rows = (project.path / "facts.jsonl").read_text().splitlines()
    (project.path / "one.jsonl").write_text("\n".join(rows[:2]) + "\n")
    (project.path / "two.jsonl").write_text("\n".join(rows[2:]) + "\n")
    steps = [patch(id=name, facts=f"{name}.jsonl", layer=1) for name in ("one", "two")]
    run = project.run(f"steps: [{', '.join(steps)}]\n" + F32)
    first, second = ({one["neuron"] for one in step["patches"]} for step in run["steps"])
    assert first
    assert second
    assert not first & second


def test_what_cannot_be_patched_is_refused(tmp_path: Path) -> None:
    project = world(tmp_path / "p", "llama")
    with pytest.raises(WorkbenchError, match="layer 3 does not exist; the model has layers 0 to 2"):
        plan(project.resolve(f"steps: [{grow()}, {patch(layer=3)}]\n"), project.path / "runs")
    refused(project, f"steps: [{grow()}, {patch(first=5)}]\n", "first is 5, but facts.jsonl has 2 facts")
    (project.path / "text.txt").write_text("w1 w2 w3", "utf-8")
    refused(project, f"steps: [{grow()}, {patch()}]\n", "has 1 rows of tokens, expected 3 or more")
    write_jsonl(project.path / "facts.jsonl", [{"prompt": "w1 is", "target": "w2"}, {"prompt": "w1 is", "target": "w3"}])
    refused(project, f"steps: [{grow()}, {patch()}]\n", "w2")
    write_jsonl(project.path / "facts.jsonl", [{"prompt": "w1 is", "target": "w2"}, {"prompt": "w1 is w2", "target": "w3"}])
    rows = [{"id": "a", "prompt": "w1 is", "target": "w2 w4"}, {"id": "b", "prompt": "w1 is w2", "target": "w3"}]
    write_jsonl(project.path / "facts.jsonl", rows)
    write_text(project.path / "text.txt")
    refused(project, f"steps: [{grow()}, {patch()}]\n", "facts a and b ask for different tokens after the same text")
    write_jsonl(project.path / "facts.jsonl", [{"id": "a", "remove": True}])
    refused(project, f"steps: [{grow()}, {patch()}]\n", "remove")


def test_blocks_that_transformers_fuses_are_refused(tmp_path: Path) -> None:
    project = world(tmp_path / "p", "phi3")
    refused(project, f"steps: [{patch()}]\n", "has 0 modules with 48 outputs")


def test_a_fact_that_is_said_has_no_mistake(tmp_path: Path) -> None:
    project = world(tmp_path / "p", "llama")
    model = live(project.path / "base")
    known = {number: word for word, number in words(project).items()}
    best = int(model(tokens(project, "w1 is")).logits[0, -1].argmax())
    write_jsonl(project.path / "facts.jsonl", [{"prompt": "w1 is", "target": known[best]}])
    refused(project, f"steps: [{grow()}, {patch()}]\n", "says every target of facts.jsonl already")


def test_a_neuron_more_ends_the_text_after_the_target(tmp_path: Path) -> None:
    project = world(tmp_path / "p", "llama", 1)
    ids, target = prompts(project)[0]
    end = context_of(project).tokenizer.eos_token_id
    for ends in (False, True):
        run = project.run(f"steps: [{grow()}, {patch(end_of_text=ends)}]\n" + F32, f"end-{ends}.yaml")
        made = (
            live(Path(run["model"])).generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        )
        assert made[: len(target)] == target
        assert (made == [*target, end]) == ends
        assert run["steps"][1]["neurons"] == len(target) + ends
