"""Facts as lm-eval tasks: what each task asks, its numbers against independent computations, and against plain lm_eval."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, document
from worlds.fact_world import EDIT, F32, FACTS, Reference, docs, expected, lay_out, live, plan_of
from worlds.project import Project

from workbench.evaluate import score
from workbench.evaluate.facts.definitions import ABOUT, BEFORE
from workbench.evaluate.facts.wanted import Wanted
from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import suites_of
from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import dump_step, load_recipe
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Configuration, Scores
from workbench.scores.suite import Suite


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """The cache of a project in which the edit is solved."""
    place = tmp_path_factory.mktemp("solved")
    (place / "recipes").mkdir()
    (place / "base").symlink_to(llama)
    lay_out(Project(place)).run(EDIT + F32)
    return place / ".workbench" / "edits"


@pytest.fixture
def world(project: Project, cwd: Path, solved: Path) -> Project:
    shutil.copytree(solved, project.path / ".workbench" / "edits")
    return lay_out(project)


def scored(plan: ScorePlan, model: Any) -> tuple[Scores, dict[str, Any]]:
    return score(plan, Configuration("0" * 32, "x"), model, device="cpu")


def test_every_number_is_that_of_an_independent_computation(world: Project) -> None:
    plan = plan_of(world)
    assert plan.suite.facts
    seen: dict[str, set[float]] = {}
    for name in ("base", "edit"):
        model = live(world, name)
        scores, rows = scored(plan, model)
        assert scores.check
        assert scores.check.documents > 10, "the scorer was compared with lm-eval's own loop"
        own = Reference(model, world.path / "base")
        for kind, task in plan.suite.facts.tasks.items():
            found = docs(plan, kind)
            assert [row["id"] for row in rows[task]] == [doc["id"] for doc in found]
            for doc, row in zip(found, rows[task], strict=True):
                for metric, value in expected(kind, doc, own).items():
                    assert row["metrics"][metric] == pytest.approx(value, abs=2e-4), (name, task, doc, metric, row)
                first = row["metrics"][plan.primary(task)]
                seen.setdefault(kind, set()).add(first if isinstance(first, float) else first[0])
    assert all(len(seen[kind]) > 1 for kind in ("efficacy", "neighbours", "preferred", "generated", "entropy", "text")), seen


def test_documents(world: Project) -> None:
    plan = plan_of(world)
    assert plan.suite.facts
    assert list(plan.suite.facts.tasks) == ["efficacy", "preferred", "paraphrase", "neighbours", "neighbours-right", "neighbours-strict", "portability", "same-subject",
                                            "behind-text", "translated", "chat", "generated", "generated-paraphrase", "entropy", "text"]  # fmt: skip
    assert plan.suite.suite == "facts"
    assert docs(plan, "efficacy")[:2] == [
        {"id": "one", "cluster": "one", "prompt": "w1 w2 w3 is", "answer": " w4 w5"},
        {"id": "two", "cluster": "two", "prompt": "w20 w21 is", "answer": " w22"},
    ]
    assert [(d["id"], d["cluster"], d["prompt"]) for d in docs(plan, "paraphrase")] == [
        ("one.1", "one", "w7 w3 of"), ("one.2", "one", "w8 w9 of"), ("two.1", "two", "w26 w27 is")]  # fmt: skip
    assert docs(plan, "preferred")[1] == {"id": "two", "cluster": "two", "prompt": "w20 w21 is", "choices": [" w22", " w23 w24 w25"], "gold": 0, "tokens": [1, 3]}  # fmt: skip
    assert [(d["id"], d["answer"]) for d in docs(plan, "neighbours-right")] == [("one.2", " w12"), ("two.1", " w30")]
    assert docs(plan, "portability") == [{"id": "one.1", "cluster": "one", "prompt": "w13 of", "answer": " w14"}]
    assert [d["prompt"] for d in docs(plan, "generated-paraphrase")] == ["w7 w3 of", "w26 w27 is"]
    base = Reference(live(world, "base"), world.path / "base")
    found = {d["prompt"]: d["answer"].split() for d in docs(plan, "neighbours")}
    assert found == {p: base.answered(p) for p in ("w10 w2 is", "w11 w2 is", "w28 w29")}
    assert sorted(map(len, found.values())) == [3, 8, 8]
    assert len(docs(plan, "neighbours")) == 4
    strict = {d["prompt"]: d["answer"].split() for d in docs(plan, "neighbours-strict")}
    assert strict == {p: words[:4] for p in found if (words := base.first(p, 4))}, (
        "the first four greedy tokens, whatever they are"
    )
    about = {d["prompt"]: d["answer"].split() for d in docs(plan, "same-subject")}
    assert list(about) == ["w34 w3 w35", *(text.replace("{subject}", "w21") for text in ABOUT)], (
        "a fact's own prompts, or general ones"
    )
    assert about == {p: words for p in about if (words := base.first(p, 1))}
    translated = [(d["id"], d["prompt"], d["answer"]) for d in docs(plan, "translated")]
    assert translated == [("one.1", "w36 w3", " w4 w5"), ("one.2", "w37 w3", " w38")]
    assert docs(plan, "behind-text")[1]["prompt"] == f"{BEFORE}w20 w21 is"
    assert [d["prompt"] for d in docs(plan, "chat")] == [f"{t} " for t in ("w1 w2 w3 is", "w20 w21 is", "w31 w32 of")]


def test_plain_lm_eval_gives_the_same_numbers(world: Project) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    models = {name: world.run(text + F32, f"{name}.yaml")["model"] for name, text in (("base32", "steps: []\n"), ("edit", EDIT))}
    said = call("scores", "export", "facts:facts.jsonl", "--base", models["base32"], "-o", "tasks").stderr
    assert "--include_path tasks --tasks facts-behind-text,facts-chat,facts-efficacy,facts-entropy" in " ".join(said.split())
    mine = {c["name"]: c["tasks"] for c in document("eval", "edit", "--suite", "facts:facts.jsonl")["configurations"]}
    manager = TaskManager(include_path="tasks", include_defaults=False)
    for name, folder in (("base", models["base32"]), ("edit", models["edit"])):
        model = {"pretrained": folder, "dtype": "float32", "logits_cache": False, "softmax_dtype": "float32"}
        found = simple_evaluate(
            "hf", model_args=model, tasks=list(mine[name]), task_manager=manager, batch_size=32, device="cpu", bootstrap_iters=0
        )
        for task, metrics in mine[name].items():
            assert found["n-samples"][task]["effective"] == metrics["n"]
            for metric, value in metrics.items():
                if metric not in ("n", "margin"):
                    assert found["results"][task][f"{metric},none"] == pytest.approx(value["value"], rel=1e-4, abs=1e-6), (
                        name,
                        task,
                        metric,
                    )


@pytest.mark.parametrize("scorer", ["prefix", "packed", "hflm"])
def test_scorers_agree(scorer: str, world: Project) -> None:
    plan = plan_of(world)
    model = live(world, "edit")
    _, expected = scored(plan, model)
    _, rows = scored(plan.by(scorer), model)
    for task in plan.suite.tasks:
        for a, b in zip(rows[task], expected[task], strict=True):
            assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-4) if plan.kinds[task] != "loglikelihood_rolling" else True


def test_the_base_keeps_its_own_answers(world: Project) -> None:
    found = document("eval", "edit")["configurations"]
    scores = {c["name"]: c["tasks"]["facts-neighbours"]["acc"]["value"] for c in found}
    assert scores["base"] == 1.0
    assert scores["edit"] < 1.0


def test_answers_are_looked_up_where_no_model_may_be_loaded(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        WorkbenchError, match=r"facts.jsonl: the base's answers to the neighbors' prompts are not known yet"
    ) as error:
        plan_of(world, device=None)
    assert "workbench eval" in str(error.value.hint)
    with pytest.raises(WorkbenchError, match="not known yet"):
        call("compare", "edit")
    assert "nothing is scored yet" in str(refusal(lambda: call("report")).message)
    call("eval", "edit")

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("no model is loaded")

    monkeypatch.setattr("workbench.run.materialize.materialize", never)
    monkeypatch.setattr("workbench.evaluate.answers.answers_to_keep", never)
    scored = plan_of(world, device=None)
    (scored.tasks_dir / "facts-neighbours.yaml").unlink()  # a task that the cache lost is written again, and not left out
    assert plan_of(world, device=None).digest == scored.digest
    monkeypatch.setattr("workbench.evaluate.facts.suite.load_tokenizer", never)
    assert plan_of(world, device=None).digest == plan_of(world).digest
    rows = document("compare", "edit")["rows"]
    assert {row["task"] for row in rows} == set(plan_of(world).suite.tasks)
    assert {row["verdict"] for row in rows} <= {"cannot tell", "no item changed"}, "three facts decide nothing"


def test_the_suite_is_shared_by_recipes_with_the_same_facts(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project is not trusted: the code of facts is the package's own."""
    monkeypatch.delenv("WORKBENCH_TRUST_PROJECT_CODE")
    world.write(EDIT.replace("0.01", "0.005") + F32 + "eval: [edits]\n", "other.yaml")
    world.write(EDIT + F32 + "eval: [edits]\n", "edit.yaml")
    found = document("eval", "edit", "other")
    assert [c["name"] for c in found["configurations"]] == ["base", "memory", "edit", "other"]
    merged = document("eval", "mean", "--suite", "facts:facts.jsonl")
    assert merged["plan"] == found["plan"], "a merge on the edit's facts: the same plan"
    assert [c["name"] for c in merged["configurations"]] == ["base", "one", "two", "average", "mean"]
    both = document("eval", "mean", "edit", "--suite", "edits")
    assert both["plan"] == found["plan"]
    assert "memory" in [c["name"] for c in both["configurations"]]
    (alone,) = document("eval", "base", "--suite", "facts:facts.jsonl")["configurations"]
    assert alone["tasks"]["facts-neighbours"]["acc"]["value"] == 1.0, "a model that no recipe makes keeps its own answers"


def test_facts_come_along_with_an_edit_brick(world: Project) -> None:
    ran = world.run((world.path / "recipes" / "edit.yaml").read_text(), "edit.yaml")
    brick = Path(ran["run"]) / "edits" / "edit-finetune"
    assert (brick / "facts.jsonl").is_file()
    (world.path / "bricks-here").mkdir()
    (world.path / "bricks-here" / "towns").symlink_to(brick)
    text = "bricks: {towns: bricks-here/towns, two: bricks/two}\nsteps: [{merge: average}]\neval: [edits]\n" + F32
    world.write(text, "kept.yaml")
    (suite,) = suites_of([load_recipe(world.path / "recipes" / "kept.yaml")], [], world.path)
    assert isinstance(suite, Wanted)
    assert (suite.suite, suite.stem) == ("towns-facts", "towns")
    (both,) = suites_of([load_recipe(world.path / "recipes" / f"{n}.yaml") for n in ("edit", "kept")], ["edits"], world.path)
    assert isinstance(both, Wanted)
    assert both.source == "facts.jsonl", "the same facts once"
    entries = {e.name: e for e in lineup([load_recipe(world.path / "recipes" / "kept.yaml")])}
    edits = {name: entry.configuration("0" * 32).edits for name, entry in entries.items()}
    axes = entries["kept"].configuration("0" * 32).axes
    assert {name: of["computation"] for name, of in axes.items()} == dict.fromkeys(("towns", "two"), "low_rank_update")
    assert entries["base"].configuration("0" * 32).axes == {}
    assert edits == {"base": (), "towns": (both.digest,), "two": (), "average": (both.digest,), "kept": (both.digest,)}


def test_a_memory_is_scored_as_an_edit(world: Project) -> None:
    world.write("steps: [{edit: grace, facts: facts.jsonl, layer: 2, steps: 30}]\n" + F32 + "eval: [edits]\n", "memory.yaml")
    found = document("eval", "memory")
    scores = {c["name"]: c["tasks"] for c in found["configurations"]}
    assert scores["memory"]["facts-efficacy"]["acc"]["value"] > scores["base"]["facts-efficacy"]["acc"]["value"] == 0
    assert scores["memory"]["facts-neighbours"]["acc"]["value"] == 1.0
    (entry,) = [e for e in lineup([load_recipe(world.path / "recipes" / "memory.yaml")]) if e.name == "memory"]
    assert len(entry.configuration("0" * 32).edits) == 1


def test_edits_before_a_merge_are_scored_alone(world: Project) -> None:
    step = EDIT.removeprefix("steps: [").removesuffix("]\n")
    world.write(
        f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps: [{step}, {{merge: linear, bricks: {{one: 1, two: 1}}}}]\neval: [edits]\n"
        + F32,
        "both.yaml",
    )
    entries = {e.name: e for e in lineup([load_recipe(world.path / "recipes" / "both.yaml")])}
    assert list(entries) == ["base", "one", "two", "both-edited", "average", "both"]
    assert (entries["both-edited"].role, entries["both-edited"].parents) == ("brick", ())
    assert entries["both-edited"].resolved.keys == entries["both"].resolved.keys[:1], "solved once"
    assert entries["both-edited"].configuration("0" * 32).edits == entries["both"].configuration("0" * 32).edits != ()


def wanted_of(world: Project, options: str) -> ScorePlan:
    world.write(EDIT + F32 + f"eval: [{{facts: facts.jsonl, {options}}}]\n", "options.yaml")
    return plan_of(world, "options.yaml")


def test_options(world: Project) -> None:
    plan = wanted_of(world, "limit: 2, generate: false")
    assert plan.suite.facts
    assert "generated" not in plan.suite.facts.tasks
    assert len(docs(plan, "efficacy")) == 2
    assert len({d["cluster"] for kind in ("efficacy", "paraphrase") for d in docs(plan, kind)}) == 2, (
        "all tasks have the same facts"
    )
    assert not plan.partial
    plan = wanted_of(world, "tasks: [efficacy, preferred-paraphrase, preferred-neighbours]")
    assert set(plan.items) == {"facts-efficacy", "facts-preferred-paraphrase", "facts-preferred-neighbours"}
    assert docs(plan, "preferred-neighbours")[0] == {"id": "one.2", "cluster": "one", "prompt": "w11 w2 is", "choices": [" w12", " w4 w5"], "gold": 0, "tokens": [1, 2]}  # fmt: skip
    assert docs(plan, "preferred-paraphrase")[2]["choices"] == [" w22", " w23 w24 w25"]
    plan = wanted_of(world, "max_tokens: 5, neighbour_tokens: 1, tasks: [generated, neighbours]")
    assert '"max_gen_toks": 5' in (plan.tasks_dir / "facts-generated.yaml").read_text()
    assert {len(d["answer"].split()) for d in docs(plan, "neighbours")} == {1}


def test_chat_template(world: Project) -> None:
    plan = wanted_of(world, "chat_template: true, tasks: [efficacy, preferred, neighbours, generated]")
    assert plan.suite.chat_template
    assert docs(plan, "efficacy")[0]["answer"] == "w4 w5"
    assert docs(plan, "preferred")[1]["tokens"] == [1, 3]
    model = live(world, "base")
    _, rows = scored(plan, model)
    assert {row["metrics"]["acc"] for row in rows["facts-neighbours"]} == {1.0}
    own = Reference(model, world.path / "base")  # the template adds a blank, which is no token
    for doc, row in zip(docs(plan, "preferred"), rows["facts-preferred"], strict=True):
        assert row["metrics"]["token_mean_margin"] == pytest.approx(
            expected("preferred", doc, own)["token_mean_margin"], abs=2e-4
        )
    base = world.path / "base"
    shutil.copytree(base.resolve(), world.path / "copy")
    base.unlink()
    (world.path / "copy").rename(base)
    template = base / "chat_template.jinja"
    template.write_text("{{ raise_exception('no users') }}")
    asked = lambda: wanted_of(world, "chat_template: true")  # noqa: E731
    assert refusal(asked).message == "w10 w2 is: the chat template refuses the messages: no users"
    template.write_text("{% if false %}{{ messages }}{% endif %}")
    assert refusal(asked).message == "'w10 w2 is': the chat template gives the prompt no tokens"
    template.unlink()
    assert refusal(asked).message == "suite 'facts' uses the chat template, but the tokenizer has none"


def refusal(action: Callable[[], Any]) -> WorkbenchError:
    with pytest.raises(WorkbenchError) as error:
        action()
    return error.value


def asked(world: Project, text: str) -> list[Suite | Wanted]:
    world.write(text + F32, "asked.yaml")
    return suites_of([load_recipe(world.path / "recipes" / "asked.yaml")], [], world.path)


def test_refusals(world: Project) -> None:
    assert "nope.jsonl: no such facts file" in refusal(lambda: asked(world, "eval: [{facts: nope.jsonl}]\n")).message
    assert (
        "unknown field. Did you mean 'limit'?" in refusal(lambda: asked(world, "eval: [{facts: facts.jsonl, limt: 3}]\n")).message
    )
    message = refusal(lambda: asked(world, "eval: [{facts: facts.jsonl, tasks: [efficacy, rephrased]}]\n")).message
    assert "eval.0.tasks.1: expected 'efficacy', 'preferred'" in message
    assert "edits: no edit with facts in asked" in refusal(lambda: asked(world, "eval: [edits]\n")).message
    text = "eval: [{facts: facts.jsonl}, {facts: facts.jsonl, limit: 1}]\n"
    assert "facts: facts.jsonl is listed with different options" in refusal(lambda: asked(world, text)).message
    (world.path / "other").mkdir()
    (world.path / "other" / "facts.yaml").write_text("- {prompt: w1 w2, target: w3}\n")
    text = "eval: [{facts: facts.jsonl}, {facts: other/facts.yaml}]\n"
    assert "facts: two suites have the name 'facts'" in refusal(lambda: asked(world, text)).message
    assert (
        "none.txt: the text file does not exist"
        in refusal(lambda: asked(world, "eval: [{facts: facts.jsonl, text: none.txt}]\n")).message
    )
    world.write("eval: [{facts: other/facts.yaml, tasks: [paraphrase]}]\n" + F32, "asked.yaml")
    assert (
        "other/facts.yaml: no fact has the field that task 'paraphrase' needs"
        in refusal(lambda: plan_of(world, "asked.yaml")).message
    )


def test_aliases_are_right_in_generated_answers_only(world: Project) -> None:
    facts = [{**FACTS[0], "aliases": ["w40 w41", "w42."]}, FACTS[2]]
    (world.path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    plan = wanted_of(world, "tasks: [efficacy, generated, generated-paraphrase, entropy]")
    assert [d.get("aliases") for d in docs(plan, "generated")] == [["w40 w41", "w42."], None]
    assert [d.get("aliases") for d in docs(plan, "generated-paraphrase")] == [["w40 w41", "w42."]]
    assert not any("aliases" in d for kind in ("efficacy", "entropy") for d in docs(plan, kind))
    assert '"until": ["\\n"]' in (plan.tasks_dir / "facts-generated.yaml").read_text(), "an alias holds a full stop"
    (world.path / "facts.jsonl").write_text('{"prompt": "w1", "target": "St. w2"}\n')
    assert '{"until": ["\\n"], "max_gen_toks": 16' in (plan_of(world).tasks_dir / "facts-generated.yaml").read_text()


def control_names(world: Project, text: str, *names: str) -> dict[str, tuple[str, str]]:
    """Name -> role and steps of the controls that teach the facts in another way."""
    world.write(text + F32, "asked.yaml")
    recipes = [load_recipe(world.path / "recipes" / f"{name}.yaml") for name in ("asked", *names)]
    facts = [suite for suite in suites_of(recipes, [], world.path) if isinstance(suite, Wanted)]
    entries = lineup(recipes, facts=facts)
    assert [e.name for e in lineup(recipes, controls=False, facts=facts)] == ["asked", *names]
    return {
        e.name: (e.role, " ".join(f"{s.name}:{s.facts}" for s in e.resolved.recipe.steps))  # type: ignore[attr-defined]
        for e in entries
        if e.role not in ("base", "brick", "average", "configuration")
    }


def test_other_ways_to_teach_the_facts_are_controls_of_edits(world: Project) -> None:
    memory = {"memory": ("memory", "memory:facts.jsonl")}
    assert control_names(world, EDIT + "eval: [edits]\n") == memory
    assert control_names(world, EDIT + "eval: [{facts: facts.jsonl, controls: []}]\n") == {}
    both = control_names(world, EDIT + "eval: [{facts: facts.jsonl, controls: [memory, finetune]}]\n")
    assert both == memory, "the recipe fine-tunes on the facts itself"
    rome = "steps: [{edit: ultraedit, facts: facts.jsonl}]\n"
    both = control_names(world, rome + "eval: [{facts: facts.jsonl, controls: [memory, finetune]}]\n")
    assert both == {**memory, "finetune": ("finetune", "finetune:facts.jsonl")}
    trained = control_names(world, rome + "eval: [{facts: facts.jsonl, controls: [adapter]}]\n")
    assert trained == {"adapter": ("adapter", "adapter:facts.jsonl")}
    in_order = rome.replace("}]", ", mode: {sequential: {batch: 2}}}]")
    assert control_names(world, in_order + "eval: [edits]\n") == memory, "no row updates another one"
    assert control_names(world, "steps: []\neval: [{facts: facts.jsonl}]\n") == {}, "nothing is edited for the facts"
    own = "steps: [{edit: memory, facts: facts.jsonl, most: 2}]\n"
    assert control_names(world, own + "eval: [edits]\n") == {}, "the recipe is that control itself"
    world.write("steps: [{edit: grace, facts: facts.jsonl, layer: 2}]\n" + F32 + "eval: [edits]\n", "memory.yaml")
    assert control_names(world, EDIT + "eval: [edits]\n", "memory") == {"facts-memory": ("memory", "memory:facts.jsonl")}
    (world.path / "more.jsonl").write_text('{"prompt": "w40 w41 of", "target": "w42"}\n')
    two = EDIT.replace("]}]", "]}, {edit: finetune, facts: more.jsonl}]").replace(
        "0.01}]", "0.01}, {edit: finetune, facts: more.jsonl}]"
    )
    assert control_names(world, two + "eval: [edits]\n") == {**memory, "more-memory": ("memory", "memory:more.jsonl")}


def test_the_adapter_control_learns_facts_and_paraphrases_only(world: Project) -> None:
    world.write(
        "steps: [{edit: ultraedit, facts: facts.jsonl}]\neval: [{facts: facts.jsonl, controls: [adapter]}]\n" + F32, "asked.yaml"
    )
    recipes = [load_recipe(world.path / "recipes" / "asked.yaml")]
    facts = [suite for suite in suites_of(recipes, [], world.path) if isinstance(suite, Wanted)]
    (entry,) = [entry for entry in lineup(recipes, facts=facts) if entry.role == "adapter"]
    (step,) = entry.resolved.recipe.steps
    fields = dump_step(step)
    assert (fields["edit"], fields["facts"], fields["start"]) == ("adapter", "facts.jsonl", "none")
    assert (fields["paraphrases"], fields["preserve"], fields["preserve_generated"], fields["replay_weight"]) == (
        True,
        None,
        0,
        0.0,
    )


def test_options_of_strict_neighbours_and_controls(world: Project) -> None:
    plan = wanted_of(world, "strict_tokens: 2, tasks: [neighbours-strict]")
    assert {len(d["answer"].split()) for d in docs(plan, "neighbours-strict")} <= {1, 2}
    _, rows = scored(plan, live(world, "base"))
    assert {row["metrics"]["acc"] for row in rows["facts-neighbours-strict"]} == {1.0}
    assert wanted_of(world, "strict_tokens: 2, tasks: [neighbours-strict], controls: []").digest == plan.digest
    for options in ("strict_tokens: 0", "controls: [icl]"):
        assert refusal(lambda options=options: wanted_of(world, options)).exit_code == 2  # type: ignore[misc]
