"""A project with two bricks and a suite of two tasks of random prompts, for the tests of searches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worlds.jsonl import write_jsonl
from worlds.local_tasks import LOCALDATA
from worlds.project import Project

from workbench.recipe.recipe import load_recipe

if TYPE_CHECKING:
    from workbench.search.run import Search

TASK = """
task: {name}
custom_dataset: !function localdata.jsonl
dataset_kwargs: {{data_files: {{test: data/{name}.jsonl}}}}
output_type: {kind}
test_split: test
doc_to_text: prompt
{answer}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
PICK = "doc_to_choice: choices\ndoc_to_target: gold"
SAY = ('doc_to_target: answer\ngeneration_kwargs: {until: ["w0"], max_gen_toks: 2, do_sample: false}\n'
       "filter_list: [{name: first, filter: [{function: remove_whitespace}, {function: take_first}]}]")  # fmt: skip
SUITE = "suite: words\ntasks: [pick, say]\nchance: {pick: 0.25}\nroles: {say: retention}\n"
RECIPE = """
bricks: {one: bricks/one, two: bricks/two}
steps: [{id: mix, merge: ties, density: 0.5, lambda: 1.0}]
output: {dtype: float32}
eval: [words]
"""


def lay_out(project: Project, items: int = 40, clusters: int = 20, more: int = 0) -> Project:
    """Add suite, tasks and data, `pick` with `more` items than `say`. Right answers are drawn at random: no configuration is better than another on new items."""
    tasks = project.path / "evals" / "tasks"
    (tasks / "data").mkdir(parents=True)
    (project.path / "evals" / "suites").mkdir()
    (project.path / "evals" / "suites" / "words.yaml").write_text(SUITE)
    (tasks / "localdata.py").write_text(LOCALDATA)
    (tasks / "pick.yaml").write_text(TASK.format(name="pick", kind="multiple_choice", answer=PICK, metric="acc"))
    (tasks / "say.yaml").write_text(TASK.format(name="say", kind="generate_until", answer=SAY, metric="exact_match"))
    draw = random.Random(0)
    for name in ("pick", "say"):
        rows = [_row(draw, f"{name}-{i:03d}", i % clusters) for i in range(items + (more if name == "pick" else 0))]
        write_jsonl(tasks / "data" / f"{name}.jsonl", rows)
    return project


def _row(draw: random.Random, name: str, cluster: int) -> dict[str, object]:
    words = [f"w{draw.randrange(60)}" for _ in range(8)]
    return {
        "id": name,
        "cluster": f"c{cluster}",
        "prompt": " ".join(words[:4]),
        "answer": words[4],
        "choices": words[4:],
        "gold": draw.randrange(4),
    }


def searched(space: str, rest: str = "", recipe: str = RECIPE) -> str:
    """A recipe with a search."""
    return f"{recipe}search: {{space: {space}, fidelity: {{items: [8, 16]}}{rest}}}\n"


def folder_of(project: Project, name: str = "test") -> Path:
    """The one folder of a recipe's searches."""
    (found,) = (project.path / "runs" / "search").glob(f"{name}-*")
    return found


SPACE = "{mix.lambda: [0.2, 1.6], mix.bricks.two: [0, 1]}"


def search_of(
    world: Project, space: str = SPACE, rest: str = ", trials: 6, sampler: random", name: str = "test.yaml", **options: Any
) -> Search:
    from workbench.search.run import Scoring, prepare  # here, because worlds without a search use this module too

    recipe = load_recipe(world.write(searched(space, rest), name))
    return prepare(recipe, world.path / "runs", Scoring("cpu"), **options)
