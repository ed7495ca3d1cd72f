"""Scores of routed configurations: every scorer gives the numbers of a loop over single requests, and says which brick answered."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.jsonl import read_jsonl, write_jsonl
from worlds.local_tasks import CHOICE, GENERATE, LOCALDATA
from worlds.project import CPU, Project
from worlds.routed_models import WORD, WordRouter, domain_prompts, factors, ids, peft_of, write_calibration
from worlds.tiny import WORDS

import workbench
from workbench.cli.app import main
from workbench.console.output import out
from workbench.evaluate import build_plan, score
from workbench.evaluate.models import WorkbenchLM
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer
from workbench.route.mixing.live import attach
from workbench.run.materialize import materialize
from workbench.scores.store import Configuration, ScoreStore
from workbench.scores.suite import Suite

START = " ".join(["is of"] * 10)
"""The beginning of all prompts, which `prefix` forwards once for each brick. Prompts of no brick share more than this."""
NAMES = ("one", "two", "three")
ROUTED = (
    "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\noutput: {dtype: float32}\n"
    "steps: [{route: text, calibration: 'calibration/{brick}.jsonl', samples: 12}]\n"
)
RECIPE = ROUTED + "eval: [toy]\n"


@pytest.fixture
def asked(project: Project) -> Project:
    """A project whose suite asks for texts and choices, in prompts of three bricks and of none."""
    write_calibration(project.path)
    tasks = project.path / "evals" / "tasks"
    (tasks / "data").mkdir(parents=True)
    (tasks / "localdata.py").write_text(LOCALDATA)
    (tasks / "copy.yaml").write_text(GENERATE)
    (tasks / "pick.yaml").write_text(CHOICE)
    found = [(f"{name}-{i}", f"w5{i + 1} w50 {WORD[name]} w5{2 * i}") for name in NAMES for i in range(3)]
    found += [("base-0", "w55 w56 w57 w58"), ("base-1", "w58 w59 w55")]
    rows = [
        {
            "id": name,
            "cluster": name,
            "prompt": f"{START} {text}",
            "answer": "w5 w6",
            "choices": ["w5 w6", "w3 w4", "w7"],
            "gold": 0,
        }
        for name, text in found
    ]
    write_jsonl(tasks / "data" / "copy.jsonl", rows[::2] + rows[1::2])
    (project.path / "evals" / "suites").mkdir()
    (project.path / "evals" / "suites" / "toy.yaml").write_text("suite: toy\ntasks: [copy, pick]\n")
    return project


def routed_model(project: Project) -> Any:
    """The float32 base, whose bricks are called by words."""
    model = plain_model(project)
    places = {name: project.path / "bricks" / name for name in NAMES}
    attach(model, load_tokenizer(project.path / "base"), WordRouter(), factors(places))
    return model


def plain_model(project: Project) -> Any:
    return materialize(project.resolve("output: {dtype: float32}\nsteps: []\n"), CPU)


def plan_of(project: Project, scorer: str, batch_size: int = 4, tasks: tuple[str, ...] = ("copy", "pick"), **fields: Any) -> Any:
    suite = Suite.model_validate({"suite": "toy", "tasks": list(tasks), "scorer": scorer, **fields})
    place = project.path / "evals" / "tasks"
    return build_plan(suite, project.path / "base", tasks_dir=place, batch_size=batch_size, dtype="float32")


def scored(project: Project, model: Any, scorer: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Task -> item -> what was answered."""
    scores, found = score(plan_of(project, scorer, **options), Configuration("a" * 32, "routed"), model)
    assert all(task.scorer in (scorer, "generate") for task in scores.tasks.values())
    return {task: {row["id"]: row for row in answers} for task, answers in found.items()}


def one_by_one(project: Project, routing: Any) -> dict[str, dict[str, Any]]:
    """The same by a plain loop over single requests: the router chooses, and the adapter answers under PEFT or the base does."""
    base = project.path / "base"
    peft = peft_of(base, {name: project.path / "bricks" / name for name in NAMES})
    answers: dict[str, dict[str, Any]] = {}
    for row in read_jsonl(project.path / "evals" / "tasks" / "data" / "copy.jsonl"):
        prompt = ids(row["prompt"])
        brick = routing.label(routing.decide([prompt[0].tolist()]).weights[0])
        context = peft.disable_adapter() if brick == "base" else torch.no_grad()
        if brick != "base":
            peft.set_adapter(brick)
        values = []
        with torch.no_grad(), context:
            for choice in row["choices"]:
                answer = ids(choice)
                chances = peft(torch.cat((prompt, answer), 1)).logits[0].log_softmax(-1)
                values.append(sum(float(chances[prompt.shape[1] + i - 1, token]) for i, token in enumerate(answer[0])))
            made = peft.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=1)[0, prompt.shape[1] :]
        words = [WORDS[int(token)] for token in made]
        kept = words[: words.index("<eos>")] if "<eos>" in words else words
        text = " ".join(word for word in kept if word != "<unk>")
        answers[row["id"]] = {"brick": brick, "loglikelihoods": values, "response": text}
    return answers


@pytest.mark.parametrize("scorer", ["hflm", "packed", "prefix"])
def test_scores_are_those_of_single_requests(scorer: str, asked: Project) -> None:
    """Log-likelihoods, texts and the brick of each item; shared beginnings are not shared between bricks."""
    model = routed_model(asked)
    expected = one_by_one(asked, model.routing)
    assert {row["brick"] for row in expected.values()} == {*NAMES, "base"}
    assert all(name.startswith(row["brick"]) for name, row in expected.items())
    found = scored(asked, model, scorer)
    for name, row in expected.items():
        assert found["pick"][name]["loglikelihoods"] == pytest.approx(row["loglikelihoods"], abs=1e-4), name
        assert found["copy"][name]["response"] == row["response"], name
        assert found["pick"][name]["routed"] == found["copy"][name]["routed"] == [row["brick"]]
    plain = scored(asked, plain_model(asked), scorer)
    assert "routed" not in plain["pick"]["one-0"]
    for name, row in expected.items():
        same = plain["pick"][name]["loglikelihoods"] == pytest.approx(row["loglikelihoods"], abs=1e-4)
        assert same == (row["brick"] == "base"), name


IDS = "one: {tokens: [w1, w50]}\n      two: {tokens: [w2, w6]}"
SPANS = "one: {tokens: [w1]}\n      two: {between: [w50, w5]}"
"""The span opens in every prompt; a choice closes it, or not."""


@pytest.mark.parametrize(
    ("scorer", "roles", "used"), [("packed", IDS, "packed"), ("prefix", IDS, "prefix"), ("packed", SPANS, "hflm")]
)
def test_bricks_with_roles_are_scored_as_in_whole_passes(scorer: str, roles: str, used: str, asked: Project) -> None:
    """A row may hold several choices and share its beginning, unless roles depend on earlier tokens."""
    bricks = ROUTED[: ROUTED.index("steps")]
    model = materialize(
        asked.resolve(f"{bricks}steps:\n  - route: roles\n    roles:\n      {roles}\n    text: {{three: 0.5}}\n"), CPU
    )
    scores, found = score(plan_of(asked, scorer, tasks=("pick",)), Configuration("a" * 32, "roles"), model)
    assert scores.tasks["pick"].scorer == used
    answers = {row["id"]: row for row in found["pick"]}
    for row in read_jsonl(asked.path / "evals" / "tasks" / "data" / "copy.jsonl"):
        for choice, value in zip(row["choices"], answers[row["id"]]["loglikelihoods"], strict=True):
            prompt, answer = ids(row["prompt"]), ids(choice)
            with torch.no_grad():
                chances = model(torch.cat((prompt, answer), 1)).logits[0].log_softmax(-1)
            expected = sum(float(chances[prompt.shape[1] + i - 1, token]) for i, token in enumerate(answer[0]))
            assert value == pytest.approx(expected, abs=1e-4), (row["id"], choice)


def test_the_answer_plays_no_part_in_the_choice(asked: Project) -> None:
    """Choices in the words of another brick do not call it."""
    data = asked.path / "evals" / "tasks" / "data" / "copy.jsonl"
    rows = read_jsonl(data)
    write_jsonl(data, [{**row, "choices": ["w8 w2 w9", "w3 w3 w3 w44"]} for row in rows])
    found = scored(asked, routed_model(asked), "prefix", tasks=("pick",))
    assert all(name.startswith(row["routed"][0]) for name, row in found["pick"].items())


def test_an_interrupted_evaluation_goes_on(asked: Project) -> None:
    """Answers in the journal are kept, and the rest equals an evaluation that ran through."""
    from workbench.evaluate.scorer import Scorer

    model, plan = routed_model(asked), plan_of(asked, "packed", batch_size=1)
    store, configuration = ScoreStore(asked.path / "scores"), Configuration("a" * 32, "routed")
    whole = Scorer(plan, configuration, model).task("pick")
    seen: list[int] = []

    def stop(_task: str, done: int, _count: int) -> None:
        seen.append(done)
        if len(seen) == 4:
            raise KeyboardInterrupt

    store.write_plan(plan)
    with pytest.raises(KeyboardInterrupt):
        Scorer(plan, configuration, model).task("pick", store.journal(plan, "a" * 32, "pick"), stop)
    seen.clear()
    again = Scorer(plan, configuration, model).task(
        "pick", store.journal(plan, "a" * 32, "pick"), lambda *_args: seen.append(_args[1])
    )
    assert again["rows"] == whole["rows"]
    assert seen[0] > 3


def test_rolling_texts_have_no_prompt_and_go_to_the_base(asked: Project) -> None:
    tasks = asked.path / "evals" / "tasks"
    (tasks / "read.yaml").write_text(
        "task: read\ncustom_dataset: !function localdata.jsonl\ndataset_kwargs: {data_files: {test: data/read.jsonl}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: text\nmetadata: {version: 1.0}\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    write_jsonl(tasks / "data" / "read.jsonl", [{"id": "a", "text": " ".join(domain_prompts("one", 12)), "cluster": "a"}])
    model, plain = routed_model(asked), plain_model(asked)
    mine, base = (scored(asked, m, "packed", tasks=("read",))["read"]["a"] for m in (model, plain))
    assert mine["routed"] == ["base"]
    assert mine["loglikelihoods"] == pytest.approx(base["loglikelihoods"], abs=1e-4)


def test_calibration_prompts_are_not_scored(asked: Project) -> None:
    """Neither before the model is made nor by a live model; case and white space do not hide a prompt, nor do examples before it."""
    data = asked.path / "evals" / "tasks" / "data" / "copy.jsonl"
    rows = read_jsonl(data)
    prompt = next(row["prompt"] for row in rows if row["id"] == "two-1")
    taught = [{"prompt": text} for text in [*domain_prompts("two", 11), f"  {prompt.upper()}\n"]]
    write_jsonl(asked.path / "calibration" / "two.jsonl", taught)
    asked.write(RECIPE, "routed.yaml")
    message = (
        r"configuration 'routed', task 'copy': the prompt of item 'two-1' is a calibration prompt of the router, in "
        r"calibration/two\.jsonl \(brick 'two'\)"
    )
    from workbench.evaluate.lineup import lineup
    from workbench.evaluate.scoring import score_all
    from workbench.recipe.recipe import load_recipe

    entries = lineup([load_recipe(asked.path / "recipes" / "routed.yaml")])
    computed: list[dict[str, Any]] = []
    with pytest.raises(WorkbenchError, match=message):
        score_all(entries, [plan_of(asked, "prefix")], ScoreStore(asked.path / "scores"), device=CPU, events=computed.append)
    assert computed == []
    with pytest.raises(WorkbenchError, match=message.replace("'copy'", "'(copy|pick)'")):
        scored(asked, materialize(asked.resolve(ROUTED), CPU), "prefix")


def test_tasks_are_loaded_and_compared_once(asked: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison before scoring and the scorer share lm-eval's tasks, and each item's prompt is compared once."""
    from workbench.evaluate import requests, routed
    from workbench.evaluate.lineup import lineup
    from workbench.evaluate.scoring import score_all
    from workbench.recipe.recipe import load_recipe

    loaded, compared = [], []
    load, digest = requests.load_tasks, routed.prompt_digest
    monkeypatch.setattr(requests, "load_tasks", lambda plan: loaded.append(plan.suite.suite) or load(plan))
    monkeypatch.setattr(routed, "prompt_digest", lambda text: compared.append(text) or digest(text))
    asked.write(RECIPE, "routed.yaml")
    entries = lineup([load_recipe(asked.path / "recipes" / "routed.yaml")])
    # A batch size of its own gives the plan another digest than those of other tests of this process.
    plan = plan_of(asked, "prefix", batch_size=3)
    score_all(entries, [plan], ScoreStore(asked.path / "scores"), device=CPU)
    assert loaded == ["toy"]
    prompts = [row["prompt"] for row in read_jsonl(asked.path / "evals" / "tasks" / "data" / "copy.jsonl")]
    assert sorted(compared) == sorted(2 * prompts)  # two tasks ask with the same prompts


def test_lm_evals_own_front_end(asked: Project) -> None:
    """The model `workbench` routes requests too."""
    lm = WorkbenchLM(routed_model(asked), tokenizer=load_tokenizer(asked.path / "base"), batch_size=4)
    expected = one_by_one(asked, lm.model.routing)
    from lm_eval.api.instance import Instance

    rows = read_jsonl(asked.path / "evals" / "tasks" / "data" / "copy.jsonl")
    pairs = [(row, choice) for row in rows for choice in row["choices"]]
    requests = [Instance("loglikelihood", row, (row["prompt"], f" {choice}"), 0) for row, choice in pairs]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for i, (row, _) in enumerate(pairs):
        assert found[i][0] == pytest.approx(expected[row["id"]]["loglikelihoods"][i % 3], abs=1e-4)
    texts = lm.generate_until(
        [
            Instance("generate_until", row, (row["prompt"], {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}), 0)
            for row in rows
        ],
        disable_tqdm=True,
    )
    assert [text.strip() for text in texts] == [expected[row["id"]]["response"] for row in rows]


def test_eval_compare_and_chat_from_the_command_line(
    asked: Project, monkeypatch: pytest.MonkeyPatch, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval scores a routed recipe beside its controls and a routed directory alike; compare and report show it; chat names the brick."""
    asked.write(RECIPE, "routed.yaml")
    run(monkeypatch, "run", "recipes/routed.yaml", "--device", "cpu", "-o", "mine")
    capsys.readouterr()
    run(monkeypatch, "eval", "recipes/routed.yaml", "mine", "--suite", "toy", "--device", "cpu", "--json")
    document = json.loads(capsys.readouterr().out)
    found = {c["name"]: c for c in document["configurations"]}
    assert list(found) == ["base", *NAMES, "average", "routed"] or list(found) == ["base", *NAMES, "average", "routed", "mine"]
    run(monkeypatch, "compare", "recipes/routed.yaml", "--suite", "toy")
    assert "routed" in capsys.readouterr().out
    monkeypatch.setattr(out, "quiet", False)  # --json has set it for this process
    for target in ("recipes/routed.yaml", "mine", str(next(Path("runs").glob("routed-*")))):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{domain_prompts('two', 1, start=31)[0]}\nof is of is\n"))
        run(monkeypatch, "chat", target, "--plain", "--device", "cpu", "--max-new-tokens", "3")
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("[")] == ["[two]", "[base]"]
    assert workbench.load("mine", device="cpu").routing.bricks == NAMES


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["workbench", *arguments])
    try:
        main()
    except SystemExit as end:
        assert not end.code, arguments  # noqa: PT017
