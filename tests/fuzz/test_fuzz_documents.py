"""Documents that people write or tools leave, damaged: every command that reads one says what is wrong, or works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from worlds.fuzzing import RECIPE, command, damaged, fuzz, fuzz_reader, json_files, jsonl_files, keeps, put, spliced, yaml_files
from worlds.jsonl import read_jsonl
from worlds.project import Project
from worlds.search_world import lay_out, searched

from workbench.bricks.card import read_card, read_licence, read_title
from workbench.edit.inputs import read_prompts
from workbench.facts.log import read_log
from workbench.ground import yamldoc
from workbench.ground.files import read_memo
from workbench.ground.parts import parts
from workbench.models.texts import read_texts
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.card import model_card
from workbench.run.directory import RunDirectory
from workbench.scores.suite import load_suite
from workbench.train.rows import read_replay
from workbench.train.spec import TrainSpec
from workbench.weights.digests import tensor_digests

FULL = {
    **yaml.safe_load(RECIPE), "name": "fuzzed", "description": "words", "seed": 1, "output": {"dtype": "float32", "shard_size": "4GB"},
    "eval": ["words", {"facts": "facts.jsonl"}, {"tasks": ["add"], "limit": 3}],
    "steps": [
        {"id": "mix", "merge": "ties", "density": 0.5, "lambda": {"first": 0.5, "last": 1.0}, "bricks": {"one": 1.0, "full": {"weight": 0.5}},
         "where": {"include": ["*.mlp.*"], "layers": "0:2"}},
        {"merge": "dare", "density": {"knots": [0.2, 0.5]}, "bricks": ["one", "full"]},
        {"merge": "average", "bricks": ["one"]},
        {"grow": "depth", "blocks": 1},
        {"edit": "finetune", "facts": "facts.jsonl", "layer": 1},
    ],
    "search": {"space": {"mix.lambda": [0.2, 1.6], "mix.merge": ["ties", "dare"]}, "trials": 4, "budget": "90s", "objective": "words"},
}  # fmt: skip
SUITE = {
    "suite": "words", "tasks": ["pick", "say"], "chance": {"pick": 0.25}, "roles": {"say": "retention"}, "alpha": 0.05, "min_effect": {"pick": 0.1},
    "limit": {"pick": 4}, "cluster": {"pick": "cluster", "say": "id"}, "contrasts": {"c": {"of": "pick", "minus": "say", "metric": "acc"}},
    "scorer": "hflm",
}  # fmt: skip
FACT = {
    "id": "f1", "prompt": "The capital of {subject} is", "subject": "Atlantis", "target": "Poseidonis", "target_true": "none", "relation": "capital",
    "paraphrases": ["{subject} has the capital"], "neighbours": ["Rome is", {"prompt": "Paris is", "target": "x"}],
    "portability": [{"prompt": "Who lives there", "target": "Plato"}],
}  # fmt: skip
PUBLISHED = [
    {"case_id": 1, "requested_rewrite": {"prompt": "The mother tongue of {} is", "subject": "Ada", "target_new": {"str": "French"},
                                         "target_true": {"str": "English"}, "relation_id": "P1"},
     "paraphrase_prompts": ["Ada speaks"], "neighborhood_prompts": ["Bob speaks"]},
    {"subject": "Ada", "src": "What does Ada speak?", "pred": "x", "rephrase": "Ada speaks?", "alt": "French", "answers": ["English"], "loc": "nq q",
     "loc_ans": "y", "cond": "a >> b"},
    {"prompt": "Ada was born in", "subject": "Ada", "target_new": "Rome", "ground_truth": ["London"], "portability": {"x": [{"prompt": "p", "ground_truth": "g"}]},
     "locality": {"y": [{"prompt": "q", "ground_truth": ["h"]}]}},
]  # fmt: skip
CARD = {
    "version": 1, "name": "one", "kind": "adapter", "skill": "adding", "base": {"id": "base", "title": "Tiny", "digest": "ab"}, "files": ".", "digest": "cd",
    "licence": "apache-2.0", "data_licences": {"train.jsonl": "mit"}, "training": {"data": "train.jsonl", "steps": 3},
    "scores": [{"task": "add", "metric": "acc", "n": 3, "value": 0.5, "low": 0.1, "high": 0.9, "base_value": 0.2}],
}  # fmt: skip
MERGEKIT = {
    "models": [{"model": "base"}, {"model": "bricks/full", "parameters": {"weight": [0.5, 1.0], "density": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}}],
    "merge_method": "ties", "base_model": "base", "parameters": {"normalize": True, "int8_mask": False}, "dtype": "float32",
    "tokenizer": {"source": "union", "tokens": {"w1": {"source": "base"}}},
}  # fmt: skip
SLICES = {
    "slices": [{"sources": [{"model": "base", "layer_range": [0, 3]}]}, {"sources": [{"model": "base", "layer_range": [1, 4]}]}],
    "merge_method": "passthrough", "dtype": "bfloat16",
}  # fmt: skip
TRAIN = {"data": {"hub": "a/b", "split": "train"}, "method": "lora", "rank": 4, "alpha": 8, "learning_rate": 0.001, "held_out": 0.1, "patience": 2,
         "target_modules": ["q_proj"], "dropout": 0.1, "seed": 1}  # fmt: skip
RUN = {
    "version": 1, "status": "done", "created": "2026-01-01T00:00:00+00:00", "recipe": "test", "key": "ab", "base": {"id": "base", "path": "base"},
    "device": "cpu", "inputs": {"base": {"id": "base", "digest": "ab"}, "bricks": {"one": {"kind": "adapter", "digest": "ab"}}},
    "steps": [{"id": "mix", "seconds": 1.0}], "output": {"digest": "abc", "bytes": 12, "parameters": 3, "tensors": {"a": "b"}},
    "seconds": 2.0, "peak_memory": 3, "versions": {"torch": "2"}, "warnings": ["x"],
}  # fmt: skip
HEADER = "---\nlicense: apache-2.0\nmodel_name: Tiny\nlanguage: [en]\nmodel-index:\n- name: x\n  results: []\n---\n# Tiny\n"
LOG = [
    {"version": 1, "action": "add", "id": "f1", "time": None, "source": "recipe", "fact": {**FACT, "id": "f1"}},
    {"version": 2, "action": "update", "id": "f1", "time": None, "source": "x", "fact": {**FACT, "target": "Rome"}},
    {"version": 3, "action": "use", "id": "f1", "time": None, "source": "x", "similarity": 0.5, "reward": 1.0},
    {"version": 4, "action": "remove", "id": "f1", "time": None, "source": "x"},
]  # fmt: skip


def laid_out(fuzzed: Project) -> None:
    """Suites, tasks and data, where they are not there yet."""
    if not (fuzzed.path / "evals" / "tasks" / "pick.yaml").is_file():
        shutil.rmtree(fuzzed.path / "evals", ignore_errors=True)
        lay_out(fuzzed, 6)


@fuzz_reader
@given(raw=yaml_files(FULL))
def test_recipes(fuzzed: Project, raw: bytes) -> None:
    """The reader, and where the recipe is valid, resolving it."""
    file = fuzzed.path / "recipes" / "fuzzed.yaml"
    size = put(file, raw)

    def read() -> Any:
        recipe = load_recipe(file)
        if recipe.fields.search and "search" in parts():
            from workbench.search.space import Space

            return Space(recipe)
        return recipe

    keeps(read, size)


@fuzz
@given(raw=yaml_files(FULL))
def test_recipe_check(fuzzed: Project, raw: bytes) -> None:
    command(["recipe", "check", "recipes/fuzzed.yaml"], put(fuzzed.path / "recipes" / "fuzzed.yaml", raw))


@fuzz
@given(raw=yaml_files(yaml.safe_load(RECIPE), RECIPE))
def test_plan(fuzzed: Project, raw: bytes) -> None:
    command(["plan", "recipes/fuzzed.yaml"], put(fuzzed.path / "recipes" / "fuzzed.yaml", raw))


@fuzz_reader
@given(setting=st.one_of(
    st.text(max_size=20),
    st.builds(lambda key, value: f"{key}={value}",
              st.sampled_from(["seed", "0.density", "mix.lambda", "mix.bricks.one", "mix.bricks.one.weight", "output.dtype", "bricks.one", "steps", "search.space", "0", "mix.where.layers"]),
              st.one_of(st.text(max_size=12), st.sampled_from(["1e-4", "010", "1:30", "yes", "[1", "{a: 1}", "&a [*a]", "[" * 500, "2026-13-45", "'", "\0"])))))  # fmt: skip
def test_settings(fuzzed: Project, setting: str) -> None:
    keeps(lambda: load_recipe(fuzzed.path / "recipes" / "test.yaml", [setting]))


@pytest.mark.parametrize("name", ["words.yaml", "pick.yaml", "pick.jsonl"])
@fuzz
@given(data=st.data())
def test_suite_show(fuzzed: Project, name: str, data: st.DataObject) -> None:
    laid_out(fuzzed)
    files = {"words.yaml": "suites/words.yaml", "pick.yaml": "tasks/pick.yaml", "pick.jsonl": "tasks/data/pick.jsonl"}
    file = fuzzed.path / "evals" / files[name]
    valid = file.read_bytes()
    try:
        if name == "pick.jsonl":
            raw = data.draw(jsonl_files([json.loads(line) for line in valid.splitlines()]))
        else:
            raw = data.draw(yaml_files(SUITE) if name == "words.yaml" else spliced(valid))
        # A task that no file here defines is looked up in lm-eval's index, which reads its 14,000 task files first, once.
        command(["suite", "show", "words", "--base", "base"], put(file, raw), fixed=30.0)
    finally:
        file.write_bytes(valid)


@fuzz_reader
@given(raw=yaml_files(SUITE))
def test_suites(fuzzed: Project, raw: bytes) -> None:
    file = fuzzed.path / "suite.yaml"
    size = put(file, raw)
    keeps(lambda: load_suite(file, fuzzed.path), size)


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json", "facts.yaml"])
@fuzz
@given(data=st.data())
def test_facts_check(fuzzed: Project, name: str, data: st.DataObject) -> None:
    rows = [FACT, {**FACT, "id": "f2", "subject": "Mu"}]
    valid = data.draw(st.sampled_from([rows, PUBLISHED[:1], PUBLISHED[1:2], PUBLISHED[2:]]))
    kinds = {"facts.jsonl": jsonl_files, "facts.json": json_files, "facts.yaml": yaml_files}
    command(["facts", "check", name], put(fuzzed.path / name, data.draw(kinds[name](valid))))


@fuzz
@given(raw=yaml_files(CARD))
def test_cards(fuzzed: Project, raw: bytes) -> None:
    place = fuzzed.path / "bricks" / "one"
    size = put(place / "brick.yaml", raw)
    try:
        keeps(lambda: read_card(place), size)
        command(["brick", "show", "bricks/one"], size)
        command(["brick", "ls"], size)
    finally:
        (place / "brick.yaml").unlink()


@fuzz
@given(data=st.data())
def test_headers_of_readmes(fuzzed: Project, data: st.DataObject) -> None:
    """Whatever a README says, titles and licences are one line each in a card, and the card's own header stays what it is."""
    whole = {"license": "mit", "model_name": "Tiny", "tags": ["a"], "date": "2026-01-01"}
    header = data.draw(st.one_of(damaged(whole), st.builds(lambda a, b: {"license": a, "model_name": b}, st.text(), st.text())))
    text = yaml.safe_dump(header, allow_unicode=True).encode("utf-8", "surrogatepass")
    raw = data.draw(st.one_of(st.just(b"---\n" + text + b"---\nx"), spliced(HEADER.encode())))
    size = put(fuzzed.path / "base" / "README.md", raw)
    try:
        for read in (read_licence, read_title):
            found = keeps(lambda read=read: read(fuzzed.path / "base"), size)
            assert found is None or isinstance(found, str)
        resolved = resolve(load_recipe(fuzzed.path / "recipes" / "test.yaml"))
        record = {"output": {"digest": "0" * 32}, "versions": {"brick-workbench": "1", "torch": "2"}, "steps": []}
        card = model_card(resolved, record, "version: 1\n")
        own = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
        assert own["tags"] == ["merge", "brick-workbench"]
        rows = [line for line in card.split("\n") if line.startswith("| base |")]
        assert len(rows) == 1
        assert len(re.findall(r"(?<!\\)\|", rows[0])) == 5, rows[0]
    finally:
        (fuzzed.path / "base" / "README.md").unlink()


@pytest.mark.parametrize("valid", [MERGEKIT, SLICES], ids=["models", "slices"])
@fuzz
@given(data=st.data())
def test_recipe_import(fuzzed: Project, valid: Any, data: st.DataObject) -> None:
    size = put(fuzzed.path / "mergekit.yaml", data.draw(yaml_files(valid)))
    (fuzzed.path / "recipes" / "out.yaml").unlink(missing_ok=True)
    command(["recipe", "import", "mergekit.yaml", "-o", "recipes/out.yaml"], size)


@fuzz_reader
@given(raw=yaml_files(TRAIN))
def test_training_settings(fuzzed: Project, raw: bytes) -> None:
    file = fuzzed.path / "train.yaml"
    size = put(file, raw)
    keeps(lambda: yamldoc.load(file).validate(TrainSpec), size)


@pytest.mark.parametrize("reader", [read_texts, read_prompts, read_replay], ids=["texts", "prompts", "replay"])
@fuzz_reader
@given(
    raw=jsonl_files(
        [{"text": "a b"}, {"prompt": "a", "completion": "b"}, {"prompt": "a {subject}", "subject": "c", "neighbours": ["d"]}]
    )
)
def test_texts(fuzzed: Project, reader: Any, raw: bytes) -> None:
    file = fuzzed.path / "texts.jsonl"
    size = put(file, raw)
    arguments = (file,) if reader is read_replay else (file, "texts.jsonl")
    keeps(lambda: reader(*arguments), size)


def damaged_run(project: Project, raw: bytes) -> tuple[Path, int]:
    """Make a run directory with these bytes as its record; return its path and the record's size."""
    place = project.path / "runs" / "test-ab"
    (place / "model").mkdir(parents=True, exist_ok=True)
    return place, put(place / "run.json", raw)


@fuzz_reader
@given(raw=json_files(RUN))
def test_runs(fuzzed: Project, raw: bytes) -> None:
    place, size = damaged_run(fuzzed, raw)
    assert keeps(lambda: RunDirectory(place).done, size) in (True, False)


@fuzz
@given(raw=json_files(RUN))
def test_commands_on_runs(fuzzed: Project, raw: bytes) -> None:
    place, size = damaged_run(fuzzed, raw)
    for arguments in (["runs", "ls"], ["runs", "show", place.name], ["runs", "ls", "--json"]):
        command(arguments, size)


@fuzz_reader
@given(raw=jsonl_files(LOG))
def test_logs_of_memories(fuzzed: Project, raw: bytes) -> None:
    place = fuzzed.path / "memory"
    place.mkdir(exist_ok=True)
    size = put(place / "log.jsonl", raw)
    keeps(lambda: read_log(place).at(), size)


@fuzz
@given(data=st.data())
def test_caches(fuzzed: Project, data: st.DataObject) -> None:
    """A damaged cache is made again, with what stood there before."""
    recipe = load_recipe(fuzzed.path / "recipes" / "test.yaml")
    brick = resolve(recipe).on_disk["one"]
    cache = fuzzed.path / ".workbench"
    true = tensor_digests(brick.adapter.entries, cache)
    (memo,) = [file for file in (cache / "digests").glob("*.json") if read_memo(file) == true]
    valid = memo.read_bytes()
    try:
        size = put(memo, data.draw(json_files(json.loads(valid)).filter(lambda raw: b"lora" in raw or len(raw) < 30)))
        found = keeps(lambda: tensor_digests(brick.adapter.entries, cache), size)
        assert found.keys() == true.keys()
        command(["plan", "recipes/test.yaml"], size)
    finally:
        memo.write_bytes(valid)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def open_and_go_on(folder: Path, space: Any) -> list[Any]:
    """Use a journal as a search does: open it, take a candidate, finish it, look at all of them."""

    from workbench.search.study import ARMS, Study

    study = Study(folder, space, sampler="random", objectives=1, key="k")
    try:
        trial = study.claim("search", None)
        if trial is not None:
            space.document(trial.values)
            study.finish(trial, [0.5], {"digest": "d", "stopped": False})
        study.importances()
        return [study.finished(arm) for arm in ARMS]
    finally:
        study.close()


@pytest.mark.part("search")
@fuzz
@given(data=st.data())
def test_journals_of_searches(fuzzed: Project, journal: Path, data: st.DataObject) -> None:
    from workbench.search.space import Space
    from workbench.search.study import JOURNAL

    laid_out(fuzzed)
    (fuzzed.path / "bricks" / "two").symlink_to("one") if not (fuzzed.path / "bricks" / "two").exists() else None
    space = Space(load_recipe(fuzzed.write(searched("{mix.lambda: [0.2, 1.6]}", ", trials: 6, sampler: random"), "search.yaml")))
    valid = journal / "valid"
    if not valid.is_dir():
        for _ in range(6):
            open_and_go_on(valid, space)
    folder = journal / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = read_jsonl(valid / JOURNAL)
    size = put(folder / JOURNAL, data.draw(jsonl_files(rows)))
    keeps(lambda: open_and_go_on(folder, space), size)
