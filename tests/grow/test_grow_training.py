"""Training in a recipe: what growth has added and nothing else, and new bricks on the frozen current model."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.project import CPU, Project
from worlds.tiny import VOCABULARY, WORDS, tensors_of

from workbench.adapters.read import WEIGHTS
from workbench.bricks.card import read_card
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json
from workbench.run.compose import compose
from workbench.run.plan import plan
from workbench.train.penalties import routing_loss
from workbench.weights.digests import tensor_digest


@pytest.fixture
def rows(project: Project) -> Project:
    """Two prompts a word: a fixed answer."""
    lines = [json.dumps({"prompt": f"{a} {b} is", "completion": "w7 w8"}) for a in WORDS[2:8] for b in WORDS[10:14]]
    (project.path / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return project


TRAIN = "train: {data: rows.jsonl, steps: 8, warmup: 0, learning_rate: 0.01, batch_size: 4, held_out: 0.25, evaluate_every: 4}"
NEW_ONLY = [
    ("llama", "{grow: depth, blocks: 1, TRAIN}"),
    ("gpt2", "{grow: width, neurons: 160, TRAIN}"),
    ("mistral", "{grow: width, key_value_heads: 3, TRAIN}"),
    ("llama", '{grow: vocabulary, tokens: ["<a>"], TRAIN}'),
    ("llama", "{grow: experts, experts: 2, TRAIN}"),
]


@pytest.mark.parametrize(("family", "step"), NEW_ONLY)
def test_old_tensors_stay_the_same_bits(family: str, step: str, rows: Project, dense_of: Callable[[str], Path]) -> None:
    """By digest, in the files; what is new has moved, and predicts the answer better."""
    base = dense_of(family)
    text = f"base: {base}\nsteps: [{step}]\n"
    document = rows.run(text.replace("TRAIN", TRAIN))
    untrained = tensors_of(Path(rows.run(text.replace("TRAIN", "check: off"), "untrained.yaml")["model"]))
    trained, old = tensors_of(Path(document["model"])), tensors_of(base)
    record = document["steps"][0]
    assert record["train"]["held_out_loss"]["after"] < record["train"]["held_out_loss"]["before"]
    assert record["check"]["same_generation"], "the check is of the growth, before it is trained"
    moved = {n for n in trained if tensor_digest(trained[n]) != tensor_digest(untrained[n])}
    kept = record["check"]["kept"]
    assert 0 < len(moved) <= kept["new"] + kept["with_additions"]
    assert kept["identical"] > 0
    assert kept["changed_later"] == kept["rescaled"] == 0
    count = 0
    for name, tensor in trained.items():
        if name in moved and name in old and tensor.shape != old[name].shape:
            rows_, cols = (*old[name].shape, 1)[:2]
            inside = tensor.reshape(tensor.shape[0], -1)[:rows_, :cols]
            assert torch.equal(inside, old[name].reshape(rows_, -1))
        count += int((tensor != untrained[name]).sum())
    assert 0 < count <= record["train"]["trained"]


def test_training_is_done_once_and_follows_its_data(rows: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"steps: [{{grow: depth, blocks: 1, {TRAIN}}}]\n"
    first = rows.run(text)
    import workbench.run.kinds.grow

    def never(*_args: Any, **_given: Any) -> Any:
        raise AssertionError("trained twice")

    monkeypatch.setattr(workbench.run.kinds.grow, "train_parameters", never)
    again = compose(rows.resolve(text + "output: {dtype: float32}\n"), CPU)
    assert again.records()[0]["train"] == first["steps"][0]["train"]
    with (rows.path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "w1", "completion": "w2"}\n')
    with pytest.raises(AssertionError, match="trained twice"):
        compose(rows.resolve(text), CPU)


def test_routing_losses() -> None:
    """0 where all tokens have one distribution, −ln N where each has decided and all experts are used alike."""
    uniform, decided = torch.full((8, 4), 0.25), torch.eye(4).repeat(2, 1)
    one = torch.eye(4)[[0] * 8]
    assert float(routing_loss(uniform, 1, 0)) == pytest.approx(0, abs=1e-6)
    assert float(routing_loss(decided, 1, 0)) == pytest.approx(-math.log(4), abs=1e-6)
    assert float(routing_loss(one, 1, 0)) == pytest.approx(0, abs=1e-6)
    assert float(routing_loss(one, 0, 1)) == pytest.approx(0, abs=1e-6)
    assert float(routing_loss(decided, 0, 1)) == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("into", ["mixtral", "granitemoe"])
def test_losses_on_routers_move_routers_alone(into: str, rows: Project, dense_of: Callable[[str], Path]) -> None:
    """`balance` spreads tokens over experts, `concentration` gathers them; nothing but routers is trained."""
    from transformers import AutoModelForCausalLM

    def routed(losses: str) -> tuple[float, set[str]]:
        train = TRAIN.replace("}", f", parameters: routers, {losses}}}").replace("0.01", "0.1").replace("steps: 8", "steps: 40")
        text = f"base: {dense_of('llama')}\nsteps: [{{grow: experts, experts: 4, top_k: 4, into: {into}, check: off, {train}}}]\n"
        place = Path(rows.run(text, f"{losses[:3]}.yaml")["model"])
        live = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        tokens = torch.arange(2, 62).reshape(4, 15)
        probabilities: list[torch.Tensor] = []
        name = ".router" if into == "granitemoe" else ".gate"
        for module_name, module in live.named_modules():
            if module_name.endswith(name):
                module.register_forward_pre_hook(
                    lambda m, args: probabilities.append((args[0].flatten(0, -2) @ m.weight.T).softmax(-1))
                )
        with torch.no_grad():
            live(tokens)
        mean = torch.stack([p.mean(0) for p in probabilities])
        entropy = float(-(mean * mean.log()).sum(-1).mean())
        plain = tensors_of(Path(rows.run(text.replace(f", {train}", ""), "plain.yaml")["model"]))
        moved = {n for n, t in tensors_of(place).items() if not torch.equal(t, plain[n])}
        return entropy, moved

    spread, moved = routed("balance: 3.0")
    gathered, _ = routed("concentration: 3.0")
    assert spread > 0.85 * math.log(4)
    assert gathered < 0.8 * spread
    assert all(n.endswith(("gate.weight", "router.layer.weight")) for n in moved)
    assert len(moved) == 3


# -- new bricks


BRICK = (
    "{grow: brick, id: seven, data: rows.jsonl, steps: 8, warmup: 0, learning_rate: 0.01, batch_size: 4, rank: 2, held_out: 0.25"
)


def test_a_brick_is_trained_on_what_the_steps_before_have_made(rows: Project) -> None:
    """Kept with its card in the run, loadable by PEFT onto the model below it; another recipe takes it as a brick, where it says that the brick may
    be of another base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    below = "bricks: {one: bricks/one, two: bricks/two}\nsteps:\n- {merge: average}\n"
    dtype = "output: {dtype: float32}\n"
    document = rows.run(f"{below}- {BRICK}, orthogonal_to: [one, two], weight: 0.5}}\n{dtype}")
    place = Path(document["run"]) / "bricks" / "seven"
    card = read_card(place)
    assert (card.kind, card.training["steps"], card.training["rank"]) == ("adapter", 8, 2)
    assert card.training["held_out_loss"]["after"] < card.training["held_out_loss"]["before"]
    assert set(card.training["overlap"]) == {"one", "two"}
    assert card.training["data_digest"]["rows"]
    record = document["steps"][1]
    assert record["training"]["held_out_loss"] == card.training["held_out_loss"]
    merged = Path(rows.run(below + dtype, "below.yaml")["model"])
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), place)
    for module in peft.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 0.5 * scale for name, scale in module.scaling.items()}
    expected = peft.merge_and_unload().state_dict()
    for name, tensor in tensors_of(Path(document["model"])).items():
        assert torch.allclose(tensor, expected[name].float(), atol=1e-5)
    step = "steps: [{merge: task_arithmetic, bricks: {seven: 1}}]\n"
    with pytest.raises(WorkbenchError, match="was made on another base"):
        rows.tensors(f"bricks: {{seven: {place}}}\n{step}")
    again = rows.tensors(f"base: base\nbricks: {{seven: {{adapter: {place}, any_base: true}}}}\n{step}")
    assert not torch.equal(again["model.layers.0.mlp.up_proj.weight"], tensors_of(merged)["model.layers.0.mlp.up_proj.weight"])


def test_what_a_brick_starts_from_is_part_of_its_key(rows: Project) -> None:
    """The same step under another id, or at another place, is another brick: it has a seed of its own."""
    one = rows.resolve(f"steps: [{BRICK}}}]\n")
    other = rows.resolve(f"steps: [{BRICK.replace('seven', 'eight')}}}]\n")
    assert one.keys != other.keys
    seeds = {read_card(compose(r, CPU).trained[i]).training["seed"] for r, i in ((one, "seven"), (other, "eight"))}
    plain = BRICK.replace("id: seven, ", "").replace("steps: 8", "steps: 1") + "}"
    twice = compose(rows.resolve(f"steps: [{plain}, {plain}]\n"), CPU).trained
    seeds |= {read_card(place).training["seed"] for place in twice.values()}
    assert len(seeds) == 4


def test_a_full_brick_and_its_weight(rows: Project) -> None:
    """All weights trained; at half weight the model is half way there; a grown model can be below."""
    whole = BRICK.replace("rank: 2", "method: full").replace("0.01", "0.001")
    grown = "steps: [{grow: depth, blocks: 1}, "
    base = rows.tensors(grown[:-2] + "]\n")
    one = rows.tensors(f"{grown}{whole}}}]\n")
    half = rows.tensors(f"{grown}{whole}, weight: 0.5}}]\n")
    name = "model.layers.4.mlp.up_proj.weight"
    assert float((one[name] - base[name]).abs().max()) > 1e-3
    assert torch.allclose(half[name], (one[name] + base[name]) / 2, atol=1e-6)


def test_an_interrupted_training_goes_on(rows: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is continued, with the bytes of an uninterrupted training."""
    import workbench.run.kinds.train

    text = f"steps: [{BRICK}, save_every: 3}}]\n"
    reports = workbench.run.kinds.train.reports

    def stopping(events: Any, step: str) -> Any:
        told = reports(events, step)

        def stop(done: int, *rest: Any) -> None:
            if done == 5:
                raise KeyboardInterrupt
            told.progress(done, *rest)

        return replace(told, progress=stop)

    monkeypatch.setattr(workbench.run.kinds.train, "reports", stopping)
    with pytest.raises(KeyboardInterrupt):
        rows.tensors(text)
    monkeypatch.undo()
    said: list[str] = []
    first = compose(rows.resolve(text), CPU, lambda event: said.append(str(event.get("text"))))
    interrupted = tensors_of(first.trained["seven"])
    assert any("resuming an interrupted training after step 3" in line for line in said), said
    # Without an interruption, and where the cache has a damaged brick.
    place = first.trained["seven"]
    for damage in (shutil.rmtree, lambda place: (place / WEIGHTS).unlink(), lambda place: os.truncate(place / WEIGHTS, 100)):
        assert plan(rows.resolve(text), rows.path / "runs").cached == ["seven"]
        damage(place)
        assert plan(rows.resolve(text), rows.path / "runs").cached == []
        assert compose(rows.resolve(text), CPU).trained["seven"] == place
        whole = tensors_of(place)
        assert whole.keys() == interrupted.keys()
        assert all(torch.equal(whole[n], interrupted[n]) for n in whole)
    assert [path.name for path in place.parent.iterdir() if path.name not in (place.name, "broken")] == []


def test_plan_says_what_training_costs(rows: Project) -> None:
    text = f"steps: [{BRICK}}}, {{grow: depth, blocks: 1, {TRAIN}}}]\n"
    found = plan(rows.resolve(text), rows.path / "runs")
    assert found.steps[0].to_dict()["cost"]["train_steps"] == 8
    assert found.steps[0].inputs == found.steps[1].inputs == ["rows.jsonl"]
    rows.run(text)
    assert "seven" in plan(rows.resolve(text), rows.path / "runs").cached


BAD = [
    ("{grow: brick, data: none.jsonl}", "none.jsonl does not exist"),
    ("{grow: brick}", "data"),
    ("{grow: brick, data: bad.jsonl}", r"bad.jsonl:1"),
    ("{grow: brick, data: rows.jsonl, orthogonal_to: [nine]}", "nine"),
    ("{grow: brick, data: rows.jsonl, orthogonal_to: [full]}", "'full' is a checkpoint, which has no LoRA A matrices"),
    ("{grow: brick, data: rows.jsonl, method: full, orthogonal_to: [one]}", "expected method lora, found full"),
    ("{grow: brick, data: rows.jsonl, patience: 2}", "requires held_out"),
    ("{grow: depth, blocks: 1, train: {data: none.jsonl}}", "none.jsonl does not exist"),
    ("{grow: depth, blocks: 1, train: {data: bad.jsonl}}", r"bad.jsonl:1"),
    (
        "{grow: depth, blocks: 1, train: {data: rows.jsonl, parameters: routers}}",
        "`parameters: routers` needs routers, but the step adds none",
    ),
    ("{grow: depth, blocks: 1, train: {data: rows.jsonl, balance: 0.1}}", "`balance` needs routers, but the step adds none"),
    ("{grow: stack, order: [0, 1, 2, 3], train: {data: rows.jsonl}}", "the step adds no parameters to train"),
    ("{grow: depth, blocks: 1, train: {data: rows.jsonl, held_out: 2.0}}", "expected a share between 0 and 1"),
]


@pytest.mark.parametrize(("step", "message"), BAD)
def test_refused(step: str, message: str, rows: Project) -> None:
    (rows.path / "bad.jsonl").write_text('{"prompt": 1}\n', "utf-8")
    with pytest.raises(WorkbenchError, match=message) as caught:
        resolved = rows.resolve(f"bricks: {{one: bricks/one, full: bricks/full}}\nsteps: [{step}]\n")
        plan(resolved, rows.path / "runs")
    assert caught.value.exit_code == (1 if "bad.jsonl" in step else 2), "a wrong line of a data file is no wrong recipe"


def test_new_tokens_are_learned(rows: Project) -> None:
    """Texts with the new token train its row; the tokenizer of the place after the step reads them."""
    lines = [json.dumps({"prompt": f"{a} <a>", "completion": "w9"}) for a in WORDS[2:20]]
    (rows.path / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    step = f'{{grow: vocabulary, tokens: ["<a>"], {TRAIN.replace("steps: 8", "steps: 40")}}}'
    document = rows.run(f"steps: [{step}]\n")
    loss = document["steps"][0]["train"]["held_out_loss"]
    assert loss["after"] < loss["before"]
    config = read_json(Path(document["model"]) / "config.json")
    assert config is not None
    assert config["vocab_size"] == VOCABULARY + 1
