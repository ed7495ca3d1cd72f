"""Fine-tuning as an edit: what is trained, what bounds it, in which order, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import files_of, live, tensors_of

from workbench.edit.gradient.tuning import below, row_losses, rows_of, token_losses
from workbench.edit.places.parts import Parts, padded
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.recipe.methods import methods
from workbench.run.compose import compose
from workbench.steps import EditMethod, MethodContext
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.lowrank import Factors

FACTS = [
    {"id": f"f{i}", "prompt": f"w{i} of w{i + 1} is" if i % 2 else f"w{i} is", "target": f"w{i + 20} w{i + 30}"} for i in range(6)
]


def write(project: Project, rows: Sequence[dict[str, Any]] = FACTS, name: str = "facts.jsonl") -> None:
    write_jsonl(project.path / name, rows)


def solve(project: Project, fields: str = "", base: str = "base") -> Path:
    """The directory of an edit's result."""
    text = f"base: {base}\nsteps: [{{edit: finetune, facts: facts.jsonl{fields}}}]\n"
    return compose(project.resolve(text), CPU).edits["edit-finetune"]


def record(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "edit.json").read_text("utf-8"))
    return found


def change(place: Path) -> torch.Tensor:
    """B·A of the one module that was edited."""
    tensors = tensors_of(place)
    (a,) = (t for n, t in tensors.items() if "lora_A" in n)
    (b,) = (t for n, t in tensors.items() if "lora_B" in n)
    return b @ a


def encoded(base: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt, target and end) of every fact, without the code that is tested: the tokenizer has one token a word."""
    words = json.loads((base / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return [([words[w] for w in row["prompt"].split()], [*(words[w] for w in row["target"].split()), 1]) for row in FACTS]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_is_adam_on_the_weight(family: str, project: Project, model_of: Callable[..., Path]) -> None:
    """Against the weight itself trained by transformers' own loss, all rows in one batch, for six steps."""
    write(project)
    base = model_of(family, torch.float32)
    place = solve(project, ", layers: [2], epochs: 6, learning_rate: 0.01, stop: 0", str(base))

    model = live(base)
    weight = (model.model.layers[2].mlp.down_proj if family == "llama" else model.transformer.h[2].mlp.c_proj).weight
    before = weight.detach().clone()
    model.requires_grad_(False)
    weight.requires_grad_(True)
    rows = encoded(base)
    width = max(len(p) + len(t) for p, t in rows)
    tokens = torch.tensor([p + t + [0] * (width - len(p) - len(t)) for p, t in rows])
    labels = torch.tensor([[-100] * len(p) + t + [-100] * (width - len(p) - len(t)) for p, t in rows])
    adam = torch.optim.Adam([weight], lr=0.01)
    for _ in range(6):
        adam.zero_grad()
        model(input_ids=tokens, attention_mask=(labels != -100).long() + (tokens != 0).long() > 0, labels=labels).loss.backward()
        adam.step()
    wanted = (weight.detach() - before).T if family == "gpt2" else weight.detach() - before
    # Adam divides by the size of the gradient: where that is rounding noise, so is the step.
    off = (change(place) - wanted).abs()
    assert (off > 1e-4).float().mean() < 0.005
    assert off.mean() < 1e-5
    assert wanted.abs().max() > 0.03


def test_facts_are_learned_and_peft_agrees(project: Project) -> None:
    """Every element free, a bound and a low rank: greedy answers are the targets and end; PEFT gives the checkpoint's logits."""
    from peft import PeftModel

    write(project)
    base = project.path / "base"
    for number, fields in enumerate(
        ("learning_rate: 0.02", "learning_rate: 0.02, max_change: 0.3", "form: lora, learning_rate: 0.03")
    ):
        text = f"steps: [{{edit: finetune, facts: facts.jsonl, epochs: 80, {fields}}}]\noutput: {{dtype: float32}}\n"
        document = project.run(text, f"learned{number}.yaml")
        written = live(Path(document["model"]))
        for prompt, target in encoded(base):
            answer = written.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0, len(prompt) :]
            assert answer.tolist() == target, fields
        tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wrapped = PeftModel.from_pretrained(live(base), Path(document["run"]) / "edits" / "edit-finetune")(tokens).logits
            torch.testing.assert_close(wrapped, written(tokens).logits, atol=2e-5, rtol=0)
        assert document["steps"][0]["tensors"] == 1
        assert document["steps"][0]["layers"] == [1], "a fifth of four layers"


@pytest.mark.parametrize(("count", "rank"), [(6, 8), (40, 14), (150, 32)])
def test_rank_grows_with_the_facts(count: int, rank: int, project: Project) -> None:
    """A third of the facts, at least 8, at most what the matrix has."""
    write(project, [{"id": f"f{i}", "prompt": f"w{i % 60} w{i // 60} is", "target": f"w{i % 50}"} for i in range(count)])
    tensors = tensors_of(solve(project, ", form: lora, epochs: 1"))
    (a,) = (t for n, t in tensors.items() if "lora_A" in n)
    assert len(a) == rank


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
def test_dense_as_factors(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    factors = Factors.of_dense(delta)
    assert factors.rank == min(shape)
    assert torch.equal(factors.left @ factors.right, delta)
    assert torch.equal(factors.transposed().left @ factors.transposed().right, delta.T)


@pytest.mark.parametrize("bound", [0.01, 0.003, 1 / 3])
def test_a_bound_is_rounded_down(bound: float) -> None:
    assert below(bound) <= bound
    above = torch.nextafter(torch.tensor(below(bound)), torch.tensor(1.0)).item()
    assert above > bound


def test_max_change(project: Project) -> None:
    """No element of the float32 update is above the bound; `full` reaches it."""
    write(project)
    free = change(solve(project, ", learning_rate: 0.02"))
    assert free.abs().max() > 0.05
    full = change(solve(project, ", learning_rate: 0.02, max_change: 0.01"))
    assert full.abs().max().item() == below(0.01)
    assert record(solve(project, ", learning_rate: 0.02, max_change: 0.01"))["largest_change"] == below(0.01)
    lora = solve(project, ", form: lora, learning_rate: 0.02, max_change: 0.01")
    assert 0.009 < change(lora).abs().max().item() <= 0.01
    assert tensors_of(lora)["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (8, 48)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_losses_of_target_tokens(family: str, project: Project, model_of: Callable[..., Path]) -> None:
    """Of padded rows, at target positions only, against each row alone with all its logits."""
    base = model_of(family)
    context = context_of(project, base)
    facts = [Fact(row["id"], row["prompt"], None, row["target"]) for row in FACTS]
    rows = rows_of(facts, context.tokenizer, 64)
    parts = Parts.find(context)
    means = row_losses(parts, rows, 4)
    with torch.no_grad():
        losses = token_losses(parts, padded(rows, CPU))
        start = 0
        for i, (prompt, target) in enumerate(encoded(base)):
            logits = context.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            alone = -logits.log_softmax(-1)[range(len(target)), target]
            torch.testing.assert_close(losses[start : start + len(target)], alone, atol=1e-5, rtol=1e-5)
            assert means[i] == pytest.approx(alone.mean().item(), abs=1e-5)
            start += len(target)
    assert start == len(losses)


def test_order_of_facts(project: Project) -> None:
    """Joint: the file's order does not count. Sequential: batches follow it, and inside a batch it does not count."""
    write(project)
    fields = ", epochs: 4, batch_size: 2, learning_rate: 0.01"
    stream = fields + ", mode: {sequential: {batch: 3}}"
    joint, sequential = files_of(solve(project, fields)), files_of(solve(project, stream))
    adapter = "adapter_model.safetensors"
    assert record(solve(project, fields))["order"] == "dependent"
    assert joint[adapter] != sequential[adapter]
    write(project, [FACTS[i] for i in (2, 0, 1, 5, 3, 4)])
    assert files_of(solve(project, fields))[adapter] == joint[adapter]
    assert files_of(solve(project, stream))[adapter] == sequential[adapter]
    write(project, [FACTS[i] for i in (3, 0, 1, 2, 4, 5)])
    assert files_of(solve(project, fields))[adapter] == joint[adapter]
    assert files_of(solve(project, stream))[adapter] != sequential[adapter]


def test_one_batch_of_a_stream_is_joint(project: Project) -> None:
    write(project)
    fields = ", epochs: 4, batch_size: 2, learning_rate: 0.01"
    joint = change(solve(project, fields))
    assert torch.equal(change(solve(project, fields + ", mode: {sequential: {batch: 6}}")), joint)


def test_a_stream_begins_with_its_first_batch(project: Project) -> None:
    """After its first batch a stream is the edit of these facts; what the second batch adds is found when it is taken away."""
    write(project)
    fields = ", epochs: 5, learning_rate: 0.01, stop: 0"
    first = record(solve(project, fields + ", first: 3"))
    stream = record(solve(project, fields + ", mode: {sequential: {batch: 3}}"))
    assert (first["facts"], first["steps"], stream["facts"], stream["steps"]) == (3, 5, 6, 10)
    assert list(first["losses"]) == ["f0", "f1", "f2"]
    write(project, FACTS[:3])
    alone = change(solve(project, fields))
    write(project)
    assert torch.equal(change(solve(project, fields + ", first: 3")), alone)


def test_losses_in_the_record(project: Project) -> None:
    """Each fact's loss is what the written model says of it."""
    write(project)
    text = "steps: [{edit: finetune, facts: facts.jsonl, epochs: 10, learning_rate: 0.01, min_efficacy: 0}]\noutput: {dtype: float32}\n"
    document = project.run(text)
    model = live(Path(document["model"]))
    found = document["steps"][0]["losses"]
    for row, (prompt, target) in zip(FACTS, encoded(project.path / "base"), strict=True):
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item()
        assert found[row["id"]] == pytest.approx(wanted, abs=2e-4)


def context_of(
    project: Project, base: Path | None = None, progress: Callable[[int, int, str], None] = lambda *_: None
) -> MethodContext:
    from transformers import AutoTokenizer

    base = base or project.path / "base"
    model = live(base)
    layout = Model(Checkpoint(base, "base"), json.loads((base / "config.json").read_text("utf-8")))
    tokenizer = AutoTokenizer.from_pretrained(base)
    return MethodContext(model, tokenizer, layout, CPU, project.path, 0, progress, project.path / ".workbench", {})


def step(**fields: Any) -> EditMethod:
    made = methods()["edit:finetune"].model_validate({"edit": "finetune", "facts": "facts.jsonl", **fields})
    assert isinstance(made, EditMethod)
    return made


def test_no_trace_on_the_model(project: Project) -> None:
    """Weights and hooks are as before, also after an error in the middle."""
    write(project)
    seen: list[tuple[int, int]] = []
    context = context_of(project, progress=lambda done, total, _: seen.append((done, total)))
    before = {n: t.clone() for n, t in context.model.state_dict().items()}
    step(layers=[0, 3], epochs=2, stop=0, mode={"sequential": {"batch": 2}}).solve(context)
    assert seen == [(i, 6) for i in range(1, 7)]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(epochs=2, stop=0).solve(MethodContext(**{**vars(context), "progress": interrupt}))
    assert all(torch.equal(t, before[n]) for n, t in context.model.state_dict().items())
    assert not any(module._forward_hooks for module in context.model.modules())


def test_cost(project: Project) -> None:
    """Steps of the schedule, and of a stream's batches; a token is four characters, and the end of text one more."""
    write(project)
    context = context_of(project)
    characters = [len(f"{row['prompt']} {row['target']}") for row in FACTS]
    tokens = [n // 4 + 1 for n in characters]
    joint = step(epochs=3, batch_size=4).cost(context.layout, project.path, context.cache)
    assert joint == {"facts": 6, "steps": 6, "tokens": 3 * sum(tokens)}
    stream = step(epochs=3, batch_size=4, first=5, mode={"sequential": {"batch": 2}})
    assert stream.cost(context.layout, project.path, context.cache) == {"facts": 5, "steps": 9, "tokens": 3 * sum(tokens[:5])}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (", rank: 4", "`rank` needs `form: lora`"),
        (", layers: [4]", r"layer 4 does not exist; the model has layers 0 to 3"),
        (", layers: []", "layers"),
        (", layers: middle", "expected 'auto'"),
        (", first: 7", r"first is 7, but facts\.jsonl has 6 facts"),
        (", max_change: 0", "max_change"),
        (", mode: sequential", "expected 'joint'"),
        (", mode: {sequential: {batch: 0}}", r"mode.sequential.batch"),
        (", mode: {sequential: 3}", r"mode.sequential"),
        (", learning_rate: 10, epochs: 200, layers: [3], stop: 0", None),
    ],
)
def test_refused(fields: str, message: str | None, project: Project) -> None:
    write(project)
    if message is None:
        solve(project, fields)
        return
    with pytest.raises(WorkbenchError, match=message):
        solve(project, fields)


def test_a_target_beyond_the_context(project: Project) -> None:
    write(project, [FACTS[0], {"id": "long", "prompt": "w1 is", "target": " ".join(["w2"] * 62)}])
    with pytest.raises(WorkbenchError) as caught:
        solve(project)
    expected = "facts.jsonl:2: prompt and target have 2 and 63 tokens (with end of text); the model accepts 64 in total"
    assert caught.value.message == expected
    write(project, [FACTS[0], {"id": "fits", "prompt": "w1 is", "target": " ".join(["w2"] * 61)}])
    solve(project, ", epochs: 1")


def test_a_loss_that_is_no_number(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project)
    monkeypatch.setattr("workbench.edit.gradient.tuning.token_losses", lambda *_: torch.tensor([float("nan")]))
    with pytest.raises(WorkbenchError, match=r"edit finetune: the loss is nan in epoch 1") as caught:
        solve(project, ", learning_rate: 0.05")
    assert caught.value.hint == "Lower learning_rate (0.05)."
    assert not list((project.path / ".workbench").glob("edits/*")), "nothing half-made stays"
