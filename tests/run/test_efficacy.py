"""The gate behind edit steps: facts that are not said after the step are counted and listed, and too many of them are no success."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from worlds.places import PROJECT
from worlds.project import CPU, Project
from worlds.tiny import WORDS

import workbench
from workbench.cli.app import app, main
from workbench.edit.finetune import Finetune
from workbench.edit.places import knowledge
from workbench.edit.places.knowledge import said_by
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.run.materialize import materialize
from workbench.run.opened import NamedModel
from workbench.run.record import EfficacyError

PROMPTS = {"a": "w1 w2 is", "b": "w3 of w4", "c": "w5 is w6", "d": "w7 w8 of"}
NOTHING = "edit: finetune, facts: facts.jsonl, epochs: 1, learning_rate: 1.0e-9"
"""Says what the base says already, and nothing else."""
F32 = "output: {dtype: float32}\n"


def step(fields: str = "", edit: str = NOTHING) -> str:
    return f"steps: [{{id: facts, {edit}{fields}}}]\n"


def live(project: Project) -> Any:
    """The base in float32."""
    return materialize(project.resolve(f"steps: []\n{F32}", "base.yaml"), CPU)


@torch.no_grad()
def answers(model: Any, prompt: str, tokens: int = 2) -> list[str]:
    """Greedy words, the end of text among them."""
    ids = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
    made = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return [WORDS[token] for token in made.tolist()]


@pytest.fixture
def half(project: Project, cwd: Path) -> Project:
    """Four facts, of which the base says `a` and `c`: what it generates is their target."""
    model = live(project)
    rows = []
    for name, prompt in PROMPTS.items():
        said = answers(model, prompt)
        other = " ".join([said[0], next(w for w in WORDS[10:] if w != said[1])])  # right at first
        rows.append({"id": name, "prompt": prompt, "target": " ".join(said) if name in "ac" else other})
    (project.path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return project


def counting(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original = getattr(place, name)

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(args)
        return original(*args, **given)

    monkeypatch.setattr(place, name, counted)
    return calls


COUNTED = {"facts": 4, "said": 2, "not_said": ["b", "d"]}


def test_what_is_said_is_in_record_card_and_last_lines(half: Project) -> None:
    """Half of the facts are enough by default."""
    recipe = half.write(step() + F32)
    done = CliRunner().invoke(app, ["run", str(recipe), "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "facts: the model says 2 of 4 facts (50 %); not said: b, d" in done.output.replace("\n", " ")
    document = json.loads(CliRunner().invoke(app, ["run", str(recipe), "--device", "cpu", "--json"]).stdout)
    expected = {"facts": {**COUNTED, "min_efficacy": 0.5}}
    run = Path(document["run"])
    assert document["said"] == expected == json.loads((run / "run.json").read_text("utf-8"))["said"]
    assert json.loads((run / "edits" / "facts" / "edit.json").read_text("utf-8"))["said"] == expected["facts"]
    card = (Path(document["model"]) / "README.md").read_text("utf-8")
    assert "## Facts\n\n- `facts`: the model says 2 of 4 facts (50 %); not said: b, d\n" in card


def test_too_few_facts_fail_the_run(half: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, the failing facts listed, no model under its name; the same from the cache, and nothing is asked or solved twice."""
    solved, asked = counting(monkeypatch, Finetune, "solve"), counting(monkeypatch, knowledge, "said_by")
    recipe = half.write(step(", min_efficacy: 0.51"))
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["workbench", "run", str(recipe), "--device", "cpu"])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 3
        told = " ".join(capsys.readouterr().err.split())
        assert "step facts: the edited model says 2 of 4 facts (50 %); not said: b, d; `min_efficacy` asks for 51 %." in told
        assert "`min_efficacy: 0` in the step writes the model anyway" in told
        (run,) = (half.path / "runs").iterdir()
        record = json.loads((run / "run.json").read_text("utf-8"))
        assert record["status"] == "failed"
        assert record["said"] == {"facts": {**COUNTED, "min_efficacy": 0.51}}
        assert not list(run.glob("model*"))
    assert (len(solved), len(asked)) == (1, 1)
    document = half.run(step(", min_efficacy: 0"))
    assert Path(document["model"]).is_dir()
    assert document["said"]["facts"] == {**COUNTED, "min_efficacy": 0.0}
    assert (len(solved), len(asked)) == (1, 1), "the gate is no part of what is solved"
    with pytest.raises(EfficacyError) as again:
        half.run(step(", min_efficacy: 0.51"))
    assert again.value.exit_code == 3, "a run that has succeeded with another gate does not count"


def test_every_edit_of_a_run_is_asked_on_its_own_state(half: Project) -> None:
    """Where a later step undoes an earlier one, the earlier one is counted before it; recipes among the bricks are counted too."""
    taught = "edit: finetune, facts: facts.jsonl, epochs: 60, learning_rate: 0.01, layers: [1, 2]"
    half.write(step("", taught) + F32, "taught.yaml")
    alone = half.run(step("", taught) + F32)
    assert alone["said"]["facts"]["said"] == 4
    undone = "bricks: {one: bricks/one}\nsteps: [{id: facts, " + taught + "}, {merge: task_arithmetic, bricks: {one: 40.0}}]\n"
    assert half.run(undone + F32)["said"]["facts"]["said"] == 4
    text = "bricks: {inner: {recipe: recipes/taught.yaml}, one: bricks/one}\n"
    text += "steps: [{merge: task_arithmetic, bricks: {inner: 0.0, one: 40.0}}, {id: again, " + NOTHING + ", min_efficacy: 0}]\n"
    document = half.run(text)
    assert document["said"]["inner/facts"]["said"] == 4
    assert document["said"]["again"]["said"] < 2
    half.write(step(", min_efficacy: 0.9") + F32, "taught.yaml")
    with pytest.raises(EfficacyError, match="step inner/facts: the edited model says 2 of 4 facts") as caught:
        half.run(text)
    assert set(caught.value.said) == {"inner/facts", "again"}


def test_weights_are_asked_as_they_are_written(half: Project) -> None:
    """A change that bfloat16 rounds away is not said: what counts is the file."""
    taught = "edit: finetune, facts: facts.jsonl, epochs: 60, learning_rate: 0.01, layers: [1]"
    resolved = half.resolve(step("", taught) + "output: {dtype: bfloat16}\n")
    document = half.run(step("", taught) + "output: {dtype: bfloat16}\n")
    model = workbench.load(document["model"], device="cpu").float()
    rows = [json.loads(line) for line in (half.path / "facts.jsonl").read_text("utf-8").splitlines()]
    right = [answers(model, row["prompt"]) == row["target"].split() for row in rows]
    assert document["said"]["facts"]["said"] == sum(right)
    assert list(document["said"]) == list(resolved.gates)


def test_a_memory_has_the_same_gate(half: Project) -> None:
    """A codebook answers; random weights do not read a text in front of their prompt."""
    document = half.run(step("", "edit: grace, facts: facts.jsonl"))
    assert document["said"] == {"facts": {"facts": 4, "said": 4, "min_efficacy": 0.5, "not_said": []}}
    with pytest.raises(EfficacyError, match="asks for 100 %"):
        half.run(step(", min_efficacy: 1", "edit: memory, facts: facts.jsonl"))
    assert not list((half.path / "runs").glob("*/configuration/memory/log.jsonl")) or Path(document["directory"]).is_dir()


def test_a_text_memory_is_asked_as_it_generates(half: Project) -> None:
    """The prompt is what is looked up, not the prompt with its target."""
    from transformers import AutoTokenizer

    document = half.run(step(", min_efficacy: 0", "edit: memory, facts: facts.jsonl"))
    model = workbench.load(document["directory"], device="cpu").float()
    tokenizer = AutoTokenizer.from_pretrained(half.path / "base")
    given = [answers(model, prompt) for prompt in PROMPTS.values()]
    assert given != [answers(live(half), prompt) for prompt in PROMPTS.values()], "the memory acts"
    facts = [Fact(name, prompt, None, " ".join(text)) for (name, prompt), text in zip(PROMPTS.items(), given, strict=True)]
    wrong = [Fact(f.id, f.prompt, None, f"{f.target.split()[0]} w59") for f in facts]
    assert said_by(model, tokenizer, facts, CPU) == [True] * 4
    assert said_by(model, tokenizer, wrong, CPU) == [text[1] == "w59" for text in given]


def test_memory_is_bounded_for_many_facts(half: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 facts of many lengths: in batches, the answers of each alone, in the order of the facts."""
    from transformers import AutoTokenizer

    model, tokenizer = live(half), AutoTokenizer.from_pretrained(half.path / "base")
    facts = []
    for i in range(600):
        prompt = " ".join(f"w{(i + j) % 60}" for j in range(1 + i % 17))
        target = answers(model, prompt, 1 + i % 3)
        facts.append(Fact(str(i), prompt, None, " ".join(target if i % 5 else [*target[:-1], "w59"])))
    alone = [right for fact in facts for right in said_by(model, tokenizer, [fact], CPU)]
    seen: list[tuple[int, int]] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _m, _a, out: seen.append((out.shape[-2], out.shape[-1])))
    monkeypatch.setattr(knowledge, "TOKENS", 300)
    monkeypatch.setattr(knowledge, "PREDICTIONS", 40)
    assert said_by(model, tokenizer, facts, CPU) == alone
    assert 0.5 < sum(alone) / len(alone) < 1
    assert max(places for places, _ in seen) <= 40
    assert sum(places for places, _ in seen) == sum(len(f.target.split()) for f in facts)


@pytest.mark.part("upkeep")
def test_rebase_has_the_same_gate(half: Project) -> None:
    """Exit code 3 and no brick; a field of the step, set by --set; the brick's own value is kept with it."""

    from workbench.upkeep.rebase import rebase

    document = half.run(step(", min_efficacy: 0.25"))
    brick = Path(document["run"]) / "edits" / "facts"
    onto = half.resolve("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic, bricks: {one: 40.0}}]\n", "other.yaml")
    out = half.path / "again"
    with pytest.raises(WorkbenchError, match=r"`min_efficacy` asks for 25 %\. No brick was written") as caught:
        rebase(brick, NamedModel("other", onto), out, device=CPU)
    assert caught.value.exit_code == 3
    assert "`--set min_efficacy=0` writes the brick anyway" in str(caught.value.hint)
    assert not out.exists()
    found = rebase(brick, NamedModel("other", onto), out, device=CPU, settings=["min_efficacy=0"])
    record = json.loads((out / "edit.json").read_text("utf-8"))
    assert record["said"]["not_said"] == found.not_said
    assert record["said"]["said"] == 4 - len(found.not_said) < 1
    assert record["min_efficacy"] == 0


@pytest.mark.starter
@pytest.mark.slow
def test_the_starter_base_at_a_sink_layer(tmp_path: Path) -> None:
    """At layer 11 the first token has 99.9 % of tr(C): `alphaedit` wrote 5 % of the values, and none of the facts was said."""
    project = Project(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "base").symlink_to(PROJECT / "bricks" / "starter" / "base")
    lines = (PROJECT / "recipes" / "facts" / "world.jsonl").read_text("utf-8").splitlines()[:4]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), "utf-8")
    fields = ", layers: [11], position: subject_last, unconverged: skip, min_efficacy: 0.75"
    document = project.run(step(fields, "edit: alphaedit, facts: facts.jsonl"))
    assert document["said"]["facts"]["said"] >= 3
    share = document["steps"][0]["statistics"]["11"]["left_out"]["share"]
    assert share > 0.99
    assert min(f["written"] for f in document["steps"][0]["facts"]) > 0.5
