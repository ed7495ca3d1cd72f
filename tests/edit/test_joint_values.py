"""Values of all facts trained together: the loss and its gradient written out, what falls, what stays, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from worlds import people
from worlds.commands import call, refused
from worlds.dense import context_of, write_facts_file
from worlds.edit_steps import FIELDS, PROJECTION, solve
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.edit.closed_form import joint
from workbench.edit.closed_form.joint import JointValues, Solution, TrainedValues, Training, gradients, measured, train
from workbench.edit.gradient.balanced import Kept
from workbench.edit.gradient.lessons import Lesson
from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import EditRow, row_of
from workbench.errors import WorkbenchError
from workbench.facts import Fact, read_facts
from workbench.models.hooks import frozen
from workbench.recipe.methods import methods
from workbench.recipe.recipe import dump_step
from workbench.run.plan import plan
from workbench.steps import MethodContext

TRAINED = {"joint_values": {"steps": 6, "generated": 8}}
ROWS = [
    EditRow((3, 4, 5, 6), 0, 2, (7, 8), (0, 1)),
    EditRow((9, 10, 11), 0, 2, (12,), (0, 1)),
    EditRow((13, 14), 0, 1, (15,), (0, 1)),
]
KEPT = [EditRow((20, 21, 22, 23, 24), 0, 1, (22, 23, 24, 25), (0, 1)), EditRow((30, 31), 0, 1, (32,), (0, 1))]


def quiet(*_: Any) -> None:
    """Ignore progress."""


def solution_of(layer: int, inputs: int = 48) -> Solution:
    """Return random values of three facts and a random factor for a tiny model of width 32."""
    generator = torch.Generator().manual_seed(layer)
    changes, right = torch.randn(3, 32, generator=generator), torch.randn(3, inputs, generator=generator) / 8
    return Solution(layer, changes, right.double(), torch.rand(3, generator=generator) + 0.5)


def with_weight(model: Any, name: str, weight: Tensor, tokens: Tensor) -> Tensor:
    """Return logits [position, vocabulary] with another weight, which gradients flow into."""
    found: Tensor = torch.func.functional_call(model, {name: weight}, (tokens[None],)).logits[0]
    return found


def wanted_loss(model: Any, name: str, weight: Tensor, kept: list[EditRow]) -> tuple[Tensor, Tensor]:
    """Return the losses of ROWS and the mean divergence of rows to keep in float64, without the code that is tested."""
    losses, divergences = [], []
    for row in ROWS:
        logits = with_weight(model, name, weight, torch.tensor(row.tokens))[row.start :]
        losses.append(cross_entropy(logits, torch.tensor(row.target)))
    for row in kept:
        tokens = torch.tensor(row.tokens)
        with torch.no_grad():
            aim = model(tokens[None]).logits[0, row.start :].log_softmax(-1)
        now = with_weight(model, name, weight, tokens)[row.start :].log_softmax(-1)
        divergences.append((aim.exp() * (aim - now)).sum(-1))
    return torch.stack(losses), torch.cat(divergences).mean()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_gradient_are_those_of_the_full_weight(
    family: str, project: Project, dense_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd over the whole weight in float64 gives dL/dW; the gradient of R is Aᵀ (dL/dW)ᵀ, in units of the facts' outputs."""
    monkeypatch.setattr(joint, "FACTS_AT_ONCE", 2)
    monkeypatch.setattr(joint, "KEPT_AT_ONCE", 1)
    write_facts_file(project.path / "facts.jsonl", 4)
    context = context_of(project, dense_of(family))
    parts = Parts.of(context)
    solution = solution_of(1, parts.width(1))
    name = f"{parts.modules[1]}.weight"
    model = context_of(project, dense_of(family)).model.double().requires_grad_(False)
    update = solution.changes.double().T @ solution.right.double()
    own = model.get_parameter(name).data
    weight = (own + (update.T if parts.transposed else update)).requires_grad_()
    losses, divergence = wanted_loss(model, name, weight, KEPT)
    enough = float(losses.detach().sort().values[:2].mean())
    assert int((losses > enough).sum()) == 2, "one fact is confident enough"
    (by_weight,) = torch.autograd.grad((losses - enough).clamp(min=0).mean() + 0.7 * divergence, weight)
    loss, divergence = losses.detach().mean(), divergence.detach()
    by_update = by_weight.T if parts.transposed else by_weight
    expected = (solution.right.double() @ by_update.T) * (solution.anchors.double() / 32**0.5)[:, None]

    with frozen(context.model):
        trained = TrainedValues(parts.out(1), solution)
        try:
            terms = gradients(parts, ROWS, [(Kept("neighbours", KEPT, 0.7, 2), KEPT)], [trained], enough)
        finally:
            trained.remove()
    assert terms["facts"] == pytest.approx(float(loss), rel=1e-4)
    assert terms["neighbours"] == pytest.approx(float(divergence), rel=1e-4)
    assert float(divergence) > 0.01
    assert trained.moved.grad is not None
    assert float((trained.moved.grad - expected).norm()) < 1e-4 * float(expected.norm())


def test_steps_are_those_of_adam(facts: Project) -> None:
    """Three steps on all rows; the values of a fact move by the step size times the norm of its output."""
    context = context_of(facts)
    parts, solution = Parts.of(context), solution_of(1)
    settings = JointValues(steps=3, learning_rate=0.02, kl=0.7)
    training = Training(settings, [Lesson(row, (), False) for row in ROWS], [KEPT[1]], end=1)
    (answer,) = training.kept(parts)[0].rows
    with frozen(context.model):
        found, record = train(parts, [solution], training, torch.Generator().manual_seed(0), quiet)
    assert len(answer.target) in (1, 2, 3, 4)

    model = context_of(facts).model.double().requires_grad_(False)
    own, unit = model.get_parameter(PROJECTION).data, (solution.anchors.double() / 32**0.5)[:, None]
    moved = torch.zeros(3, 32, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([moved], lr=0.02)
    for step in range(3):
        adam.zero_grad()
        weight = own + (solution.changes.double() + unit * moved).T @ solution.right
        losses, divergence = wanted_loss(model, PROJECTION, weight, [answer])
        (losses.mean() + 0.7 * divergence).backward()
        adam.param_groups[0]["lr"] = 0.02 * (3 - step) / 3
        adam.step()
    expected = solution.changes.double() + unit * moved.detach()
    off = (found[1].double() - expected).abs() / unit
    assert float(off.mean()) < 1e-4
    assert float((expected - solution.changes).abs().div(unit).max()) == pytest.approx(0.04, rel=0.05)
    assert (record["steps"], record["prompts"]) == (3, 1)


def test_without_steps_nothing_changes(facts: Project) -> None:
    """The same bytes, and the recipe of today keeps its key."""
    context = context_of(facts)
    plain, zero = solve(context), solve(context, joint_values={"steps": 0})
    for name, factors in plain.factors.items():
        assert torch.equal(factors.left, zero.factors[name].left)
        assert torch.equal(factors.right, zero.factors[name].right)
    assert all(torch.equal(tensor, zero.tensors[name]) for name, tensor in plain.tensors.items())
    assert plain.record == zero.record
    assert "joint_values" not in plain.record
    step = methods()["edit:memit"].model_validate({"edit": "memit", **FIELDS})
    assert "joint_values" not in dump_step(step)
    assert dump_step(step.model_copy(update={"joint_values": JointValues()}))["joint_values"]["steps"] == 25


@pytest.mark.parametrize("name", ["memit", "rome", "alphaedit"])
def test_the_losses_fall(name: str, facts: Project) -> None:
    context = context_of(facts)
    more = {"refine": 0, "confidence": 0.9, "unconverged": "skip", **({"energy": 0.9} if name == "alphaedit" else {})}
    plain = solve(context, name, **more)
    edit = solve(context, name, joint_values={"steps": 15, "learning_rate": 0.3, "generated": 8, "kl": 0.5}, **more)
    before, after = edit.record["joint_values"]["before"], edit.record["joint_values"]["after"]
    assert set(before) == set(after) == {"facts", "neighbours"}
    assert after["facts"] + 0.5 * after["neighbours"] < 0.9 * (before["facts"] + 0.5 * before["neighbours"])
    (wanted,), (found,) = plain.factors.values(), edit.factors.values()
    rows = torch.linalg.svd(wanted.right.double(), full_matrices=False).Vh
    assert float((found.right.double() - found.right.double() @ rows.T @ rows).norm()) < 1e-5, "the right factor is fixed"
    assert torch.equal(plain.tensors["1.keys"], edit.tensors["1.keys"])
    shares = [fact["written"] for fact in edit.record["facts"]]
    update = (found.left @ found.right).double()
    keys, changes = edit.tensors["1.keys"].double(), edit.tensors["1.changes"].double()
    assert shares == pytest.approx((keys @ update.T).norm(dim=1).div(changes.norm(dim=1)).tolist(), abs=2e-4)


def test_the_values_of_several_layers_are_trained_together_and_then_scaled(facts: Project) -> None:
    context = context_of(facts)
    edits = [
        solve(
            context,
            layers=[0, 2],
            confidence=0.9,
            unconverged="skip",
            scale=scale,
            joint_values={"steps": steps, "learning_rate": 0.3, "generated": 8, "text_kl": 0.1},
        )
        for steps, scale in ((1, 1.0), (6, 1.0), (6, 1.5))
    ]
    records = [edit.record["joint_values"] for edit in edits]
    before, after = (records[1][when]["facts"] + 4 * records[1][when]["neighbours"] for when in ("before", "after"))
    assert after < 0.9 * before
    assert set(records[1]["before"]) == {"facts", "neighbours", "text"}
    assert records[1] == records[2]
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        first, more, scaled = (edit.factors[name].left @ edit.factors[name].right for edit in edits)
        assert float((first - more).norm()) > 1e-3 * float(first.norm())
        torch.testing.assert_close(scaled, 1.5 * more, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_the_cache_serves(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(facts)
    caches = [replace(context, cache=facts.path / f"cache{i}", seed=seed) for i, seed in enumerate((1, 1, 2))]
    first, second, other = (solve(one, **TRAINED).tensors["1.changes"] for one in caches)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)

    def refuse(*_: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(joint, "train", refuse)
    again = solve(caches[0], **TRAINED)
    assert torch.equal(again.tensors["1.changes"], first)
    assert again.record["joint_values"]["steps"] == 6
    for changed in ({"lambda": 0.06}, {"contexts": 0}, {"joint_values": {"steps": 6, "generated": 9}}, {"end_of_text": True}):
        with pytest.raises(AssertionError, match="trained again"):
            solve(caches[0], **{**TRAINED, "unconverged": "skip", **changed})
    with pytest.raises(AssertionError, match="trained again"):
        solve(replace(caches[0], seed=3), **TRAINED)


def test_generated_prompts_that_test_facts_are_left_out(facts: Project) -> None:
    method: Any = methods()["edit:memit"].model_validate({"edit": "memit", **FIELDS, "joint_values": {"generated": 12}})
    rows = read_facts(facts.path / "facts.jsonl", "facts.jsonl")
    found = method.kept(facts.path, rows)
    assert len(found) == 12
    tested = [replace(rows[0], paraphrases=(found[3].text,)), *rows[1:]]
    assert [fact.text for fact in method.kept(facts.path, tested)] == [f.text for f in found if f.text != found[3].text]
    larger = method.model_copy(update={"preserve_generated": 20})
    assert len(larger.kept(facts.path, rows)) == 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("mode: {sequential: {batch: 2}}, joint_values: {}", "`joint_values` is for `mode: joint`"),
        ("joint_values: {generated: 0}", "no prompts that must not change: set its `generated`, or `preserve`, or `kl: 0`"),
        ("joint_values: {stpes: 3}", "stpes"),
        ("joint_values: {steps: -1}", "greater than or equal to 0"),
        ("joint_values: {learning_rate: 0}", "greater than 0"),
        ("joint_values: true", "joint_values"),
        ("facts: bare.jsonl, joint_values: {}", "no fact has a subject"),
    ],
)
def test_bad_input_is_refused(fields: str, message: str, facts: Project, cwd: Path) -> None:
    write_jsonl(facts.path / "bare.jsonl", [{"prompt": "w1 w2 is", "target": "w3"}])
    own = "" if "facts:" in fields else "facts: facts.jsonl, "
    facts.write(f"steps: [{{edit: memit, {own}{fields}}}]\n", "bad.yaml")
    assert message in refused("plan", "bad").message


def test_prompts_that_are_too_long_are_refused(facts: Project) -> None:
    write_jsonl(facts.path / "keep.jsonl", [{"prompt": "w1 " * 62}])
    with pytest.raises(WorkbenchError, match=r"keep.jsonl:1: the prompt has 62 tokens; at most 60 are allowed"):
        solve(context_of(facts), preserve="keep.jsonl", preserve_tokens="every", joint_values={})


def test_a_loss_that_is_not_finite_is_refused(facts: Project) -> None:
    context = context_of(facts)
    broken = replace(solution_of(1), changes=torch.full((3, 32), torch.nan))
    training = Training(JointValues(steps=1, kl=0), [Lesson(ROWS[0], (), False)])
    with frozen(context.model), pytest.raises(WorkbenchError, match=r"not finite in step 1.*") as raised:
        train(Parts.of(context), [broken], training, torch.Generator(), quiet)
    assert "learning_rate (0.05)" in str(raised.value.hint)
    assert not context.model.model.layers[1].mlp.down_proj._forward_hooks


def test_plan_counts_the_training(facts: Project, cwd: Path) -> None:
    text = "steps: [{{edit: memit, facts: facts.jsonl, layers: [1]{}}}]\n"
    found = [
        plan(facts.resolve(text.format(more)), facts.path / "runs").steps[0]["cost"]
        for more in ("", ", joint_values: {text_kl: 1}")
    ]
    work = 128 * 4 * 12 + 25 * (4 * 12 + 2 * 8 * (12 + 4) + 2 * 2 * 64)
    assert found[1]["work"] == {**found[0]["work"], "joint_values": work}
    assert found[1]["tokens"] == found[0]["tokens"] + work
    facts.write(text.format(", joint_values: {}"), "joint.yaml")
    assert "values of 4 facts, joint values: about" in call("plan", "joint").stdout


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> MethodContext:
    """A model that knows 400 people, 24 facts of as many people, and prompts for what else is known of them, none of which is scored."""
    folder = tmp_path_factory.mktemp("people")
    (folder / "recipes").mkdir()
    (folder / "base").symlink_to(people.SUBJECT)
    (folder / "people.txt").write_text("\n\n".join(people.lines(1200)), "utf-8")
    people.write_rows(folder / "facts.jsonl", 24)
    rows, by_name = people.rows(24), {person.name: person for person in people.world().people}
    edited, kept = {(row["subject"], row["relation"]) for row in rows}, []
    for name, attribute in ((row["subject"], attribute) for row in rows for attribute in people.ATTRIBUTES):
        if (name, attribute) not in edited:  # in the second and third wording; the first one is scored
            kept += [{"prompt": text, "subject": name} for text in people.world().prompts(by_name[name], attribute)[1:3]]
    scored = {probe["prompt"] for row in rows for probe in row["neighbours"]}
    assert not scored & {row["prompt"] for row in kept}
    write_jsonl(folder / "keep.jsonl", kept)
    return context_of(Project(folder))


def scores(context: MethodContext, edit: Any) -> tuple[float, float]:
    """Return the share of facts that are said, and the mean divergence after the facts' neighbors, of a model with an edit."""
    rows, tokenizer = people.rows(24), context.tokenizer
    neighbours = [tokenizer(probe["prompt"])["input_ids"] for row in rows for probe in row["neighbours"]]

    def after() -> Tensor:
        with torch.no_grad():
            return torch.cat([context.model(torch.tensor([tokens])).logits[:, -1].log_softmax(-1) for tokens in neighbours])

    plain = after()
    with Parts.of(context).changed({1: next(f.left @ f.right for f in edit.factors.values())}):
        moved = after()
        said = people.answered(
            context.model, tokenizer, [(row["prompt"].replace("{subject}", row["subject"]), row["target"]) for row in rows]
        )
    return sum(said) / len(said), float(kl_div(moved, plain, reduction="batchmean", log_target=True))


def test_neighbors_move_less_than_with_separate_values(known: MethodContext) -> None:
    """On held-out neighbors, at the same efficacy; the training without the divergence gains nothing there."""
    fields = {"statistics": "people.txt", "layers": [1], "contexts": 3, "clamp": 8.0, "preserve": "keep.jsonl"}
    fields |= {"confidence": 0.9, "preserve_weight": 1e-9}  # the prompts weigh nothing in the metric
    separate = scores(known, solve(known, **fields))
    trained = scores(known, solve(known, **fields, joint_values={"generated": 0}))
    alone = scores(known, solve(known, **fields, joint_values={"kl": 0}))
    assert trained[0] >= separate[0] == 1
    assert trained[1] < 0.5 * separate[1], (trained, separate)
    assert trained[1] < 0.5 * alone[1], (trained, alone)


def test_measured_losses_are_means(facts: Project) -> None:
    context = context_of(facts)
    parts, trained = Parts.of(context), TrainedValues(Parts.of(context).out(1), solution_of(1))
    try:
        found = measured(
            parts, [Lesson(ROWS[0], (ROWS[1],), False), Lesson(ROWS[2], (), False)], [Kept("text", KEPT, 0.1, 2)], [trained]
        )
    finally:
        trained.remove()
    model = context_of(facts).model.double()
    weight = model.get_parameter(PROJECTION).data + solution_of(1).changes.double().T @ solution_of(1).right
    losses, divergence = (one.detach() for one in wanted_loss(model, PROJECTION, weight, KEPT))
    assert found == {"facts": pytest.approx(float(losses.mean()), abs=2e-5), "text": pytest.approx(float(divergence), abs=2e-5)}


def test_an_end_of_text_is_a_token_of_the_target(facts: Project) -> None:
    context = context_of(facts)
    fact = Fact("a", "w1 of {subject}", "w2", "w3")
    for end, target in ((False, 1), (True, 2)):
        how = joint.LessonSettings(["w7 w8"], end, [], 64, confidence=0.9)
        training = joint.training_of(context, JointValues(), [fact], [], how)
        (lesson,) = training.lessons
        assert [len(row.target) for row in (lesson.plain, *lesson.others)] == [target, target]
        assert lesson.plain.tokens == row_of(fact, context.tokenizer, "prompt_last", end=end).tokens
        assert training.enough == pytest.approx(-math.log(0.9)), "a fact is not pushed beyond the confidence"
