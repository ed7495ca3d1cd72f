"""A project whose files change between commands: its files with their other contents, what commands say, and what a fresh project says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from worlds.commands import document
from worlds.jsonl import write_jsonl
from worlds.packed_models import save_gguf
from worlds.project import CPU
from worlds.tiny import edit_json, save_adapter, save_finetuned, save_model

from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import plans, suites_of
from workbench.evaluate.scoring import score_all
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.files import bytes_digest, json_digest
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.run.plan import plan
from workbench.scores.store import ScoreStore
from workbench.weights.digests import meaning_of

OURS = (".workbench", "runs")
"""Folders that the package writes; all else is the user's."""
HEAD, BASE = "version: 1\n", "base: base\n"
TASKS = "eval: [toy]\n"
TUNE = "{edit: finetune, facts: facts.jsonl, form: lora, layers: [0], rank: 2, epochs: 2, min_efficacy: 0}"
RECIPES = {
    "mix": "bricks: {t: tuned, l: lora}\nsteps: [{merge: ties, density: 0.5}]\neval: [toy, chat]\n",
    "masked": "bricks: {k: linked, w: wired, s: sharded}\nsteps: [{merge: dare, density: 0.5}]\n",
    "low": "bricks: {l: lora}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\noutput: {form: adapter}\n",
    "taught": f"steps: [{TUNE}]\neval: [toy, {{facts: facts.jsonl, tasks: [efficacy, neighbours, generated], neighbour_tokens: 2, max_tokens: 2, chat_template: true, controls: []}}]\n",
    "spoken": "steps: [{grow: brick, id: spoken, data: chat.jsonl, rank: 2, target_modules: [down_proj], steps: 2, batch_size: 2, save_every: 0}]\n",
    "packed": "base: packed/model.gguf\nbricks: {l: lora}\nsteps: [{merge: average}]\n",
    "union": "bricks: {t: tuned}\ntokenizer: {source: union, chat_template: template.jinja}\nsteps: [{merge: average}]\n",
    "measured": "bricks: {l: lora}\nsteps: [{merge: fisher, calibration: rows.jsonl, samples: 4}, {id: second, merge: regmean, calibration: rows.jsonl}]\n",
    "outer": "bricks: {m: {recipe: recipes/mix.yaml}, s: sharded}\nsteps: [{merge: average}]\n",
}
USES = {
    "mix": "tuned lora", "masked": "tuned other linked wired sharded", "low": "lora", "taught": "facts.jsonl", "spoken": "chat.jsonl", "packed": "packed lora", "measured": "lora rows.jsonl", "union": "tuned template.jinja",
    "outer": "tuned lora sharded recipes/mix.yaml",
}  # fmt: skip
"""Recipe -> what it reads besides the base."""
LINKS = {
    "linked": ("tuned", "other"),
    "wired/model.safetensors": ("../tuned/model.safetensors", "../other/model.safetensors"),
    "evals/tasks/data/note.txt": ("note-1.txt", "note-2.txt"),
    "evals/tasks/reader.py": ("reader-1.py", "reader-2.py"),
}
"""Link -> what it may point to."""
PARTS = {
    "tokenizer.json": "tokenizer", "tokenizer_config.json": "tokenizer", "config.json": "config", "adapter_config.json": "adapter",
    "generation_config.json": "generation", "chat_template.jinja": "template", "template.jinja": "template",
}  # fmt: skip
"""Name of a file -> the part of a model that it is; `part_of` names the others."""
PICK = """\
task: pick
custom_dataset: !function reader.jsonl
dataset_kwargs: {data_files: {test: data/items.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
SAY = """\
task: say
custom_dataset: !function reader.jsonl
dataset_kwargs: {data_files: {test: data/items.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: prompt
doc_to_target: w4
generation_kwargs: {until: [w7], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
READER = """
import json
from pathlib import Path
import datasets

def jsonl(config_source, data_files, **_):
    base = Path(config_source).parent
    rows = [json.loads(line) for line in (base / data_files["test"]).read_text("utf-8").splitlines()]
    for row in rows:
        row["prompt"] = (base / "data" / f"{'note'}.txt").read_text("utf-8").strip() + " " + row["prompt"]
    return {"test": datasets.Dataset.from_list(rows[::1])}
"""
SUITE = "suite: toy\ntasks: [pick, say]\ncluster: id\nchance: {pick: 0.5, say: 0}\n"
LIMIT = 3


@dataclass
class Changing:
    """The project as it was laid out.

    Attributes:
        path: Its folder.
        contents: File -> its contents, the first one as laid out. All contents of a file have the same size.
    """

    path: Path
    contents: dict[str, list[bytes]] = field(default_factory=dict)

    def offer(self, name: str, *others: bytes | tuple[bytes, bytes]) -> None:
        """Add other contents of a file: bytes, or a pair of what is replaced by what."""
        first = (self.path / name).read_bytes()
        contents = [first, *(first.replace(*other) if isinstance(other, tuple) else other for other in others)]
        assert len({*contents}) == len(contents), name
        size = max(map(len, contents))
        self.contents[name] = [content.ljust(size) for content in contents]
        (self.path / name).write_bytes(self.contents[name][0])

    def json(self, name: str, *changes: Mapping[str, object]) -> None:
        """Offer a JSON file with fields changed."""
        data = json.loads((self.path / name).read_text("utf-8"))
        (self.path / name).write_text(json.dumps(data), "utf-8")
        self.offer(name, *(json.dumps({**data, **change}).encode() for change in changes))


def lay_out(path: Path) -> Changing:
    """Make the project in an empty folder."""
    world = Changing(path)
    for folder in ("recipes", "wired", "evals/suites", "evals/tasks/data"):
        (path / folder).mkdir(parents=True)
    save_model(path / "base", layers=1)
    _weights(world)
    _texts(world)
    for name, text in RECIPES.items():
        (path / "recipes" / f"{name}.yaml").write_text(
            HEAD + BASE * ("base:" not in text) + text + TASKS * ("eval:" not in text), "utf-8"
        )
        world.offer(
            f"recipes/{name}.yaml", (b"steps:", b"seed: 1\nsteps:"), *([(b"0.5", b"0.6")] if b"0.5" in text.encode() else [])
        )
    for link, (target, _) in LINKS.items():
        (path / link).symlink_to(target)
    return world


def _weights(world: Changing) -> None:
    """Checkpoints, one in shards, and an adapter, each with the tensors of other seeds beside it."""
    path, base = world.path, world.path / "base"
    seeds = {"base": 10, "tuned": 20, "other": 30, "sharded": 40}
    for name, seed in seeds.items():
        if name != "base":
            save_finetuned(base, path / name, seed=seed)
        others = [(save_finetuned(base, path / "made", seed=seed + i) / "model.safetensors").read_bytes() for i in (1, 2)]
        if name != "sharded":
            world.offer(f"{name}/model.safetensors", *others)
    tensors = load_file(path / "sharded" / "model.safetensors")
    (path / "sharded" / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard, part in {"a": names[::2], "a2": names[::2], "b": names[1::2]}.items():
        for scale in (1.0, 1.5, 2.0):
            factor = scale + 0.25 * (shard == "a2")
            save_file({n: tensors[n] * factor for n in part}, path / "made" / f"{scale}.safetensors", metadata={"format": "pt"})
        contents = [(path / "made" / f"{scale}.safetensors").read_bytes() for scale in (1.0, 1.5, 2.0)]
        (path / "sharded" / f"{shard}.safetensors").write_bytes(contents[0])
        world.offer(f"sharded/{shard}.safetensors", *contents[1:])
    maps = [{n: first if n in names[::2] else "b.safetensors" for n in names} for first in ("a.safetensors", "a2.safetensors")]
    (path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": maps[0]}), "utf-8")
    world.json("sharded/model.safetensors.index.json", {"weight_map": maps[1]})
    shutil.copytree(path / "tuned", path / "wired", dirs_exist_ok=True)
    (path / "wired" / "model.safetensors").unlink()
    factors = load_file(save_adapter(base, path / "lora", seed=50) / "adapter_model.safetensors")
    save_file(
        {name: 1.5 * tensor for name, tensor in factors.items()}, path / "made" / "1.5.safetensors", metadata={"format": "pt"}
    )
    world.offer("lora/adapter_model.safetensors", (path / "made" / "1.5.safetensors").read_bytes())
    world.json(
        "lora/adapter_config.json",
        {"lora_alpha": 9},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj"]},
        {"rank_pattern": {"q_proj": 2}},
        {"r": 8},
        {"revision": "main"},
    )
    (path / "lora" / "README.md").unlink(missing_ok=True)
    (path / "packed").mkdir()
    edit_json(path / "made" / "config.json", rms_norm_eps=0.01)
    packed = [save_gguf(path / name, path / "packed" / "model.gguf", "llama").read_bytes() for name in ("other", "made", "tuned")]
    world.offer("packed/model.gguf", *packed[:2])
    shutil.rmtree(path / "made")


def _texts(world: Changing) -> None:
    """What else a model is made of, facts, a template, and a task."""
    path = world.path
    for name in ("base", "tuned"):
        words = json.loads((path / name / "tokenizer.json").read_text("utf-8"))
        vocab = words["model"]["vocab"]
        swapped = [{**words["model"], "vocab": {**vocab, a: vocab[b], b: vocab[a]}} for a, b in (("w3", "w4"), ("w1", "w20"))]
        same = {"truncation": {"direction": "Right", "max_length": 60, "strategy": "LongestFirst", "stride": 0}}
        world.json(f"{name}/tokenizer.json", *({"model": model} for model in swapped), same)
        world.json(
            f"{name}/config.json",
            {"rms_norm_eps": 0.01},
            {"_name_or_path": "elsewhere"},
            {"architectures": ["Other"]},
            {"auto_map": {"AutoConfig": "other.Config"}},
        )
    world.json("base/generation_config.json", {"temperature": 0.7}, {"repetition_penalty": 1.5})
    fields = (
        {"model_max_length": 60},
        {"name_or_path": "elsewhere"},
        {"add_prefix_space": True},
        {"tokenizer_class": "LlamaTokenizer"},
    )
    world.json("base/tokenizer_config.json", *fields)
    world.offer("base/chat_template.jinja", (b"{{ m", b"w9 {{ m"))
    write_jsonl(
        path / "facts.jsonl",
        [
            {"id": "one", "prompt": "w1 w2 is", "target": "w4", "neighbours": ["w5 is"]},
            {"id": "two", "prompt": "w20 is", "target": "w22"},
        ],
    )
    world.offer("facts.jsonl", (b"w22", b"w23"), (b"w1 w2", b"w2 w1"))
    write_jsonl(path / "rows.jsonl", [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(4)])
    world.offer("rows.jsonl", (b"w5", b"w7"))
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w4 w5"}]
    write_jsonl(path / "chat.jsonl", [{"messages": turns}, {"messages": [turns[0], {**turns[1], "content": "w9"}]}])
    world.offer("chat.jsonl", (b"w9", b"w8"))
    (path / "template.jinja").write_text("{% for m in messages %}w1 {{ m['content'] }}{% endfor %}", "utf-8")
    world.offer("template.jinja", (b"w1", b"w2"))
    tasks = path / "evals" / "tasks"
    (path / "evals" / "suites" / "toy.yaml").write_text(SUITE, "utf-8")
    (path / "evals" / "suites" / "chat.yaml").write_text(f"{SUITE.replace('toy', 'chat')}chat_template: true\n", "utf-8")
    changes = (
        (b"say]", b"say]\nlimit: 2"),
        (b"0.5", b"0.4"),
        (b"say]", b"say]\nchat_template: true"),
        (b"say]", b"say]\nnum_fewshot: 1"),
    )
    world.offer("evals/suites/toy.yaml", *changes)
    (tasks / "pick.yaml").write_text(PICK, "utf-8")
    (tasks / "say.yaml").write_text(SAY, "utf-8")
    world.offer("evals/tasks/say.yaml", (b"toks: 3", b"toks: 4"), (b"target: w4", b"target: w5"))
    world.offer("evals/tasks/pick.yaml", (b"metric: acc,", b"metric: acc_norm,"), (b"1.0", b"2.0"))
    items = [
        {"id": f"i{i}", "prompt": f"w{i} w{i + 1} is", "choices": [f"w{i + 3}", f"w{i + 9} w{i + 5}"], "gold": i % 2}
        for i in range(6)
    ]
    write_jsonl(tasks / "data" / "items.jsonl", items)
    world.offer("evals/tasks/data/items.jsonl", (b'"w5"', b'"w7"'), (b"w2 is", b"w9 is"))
    for number, note in enumerate(("w11", "w12"), 1):
        (tasks / "data" / f"note-{number}.txt").write_text(note, "utf-8")
        (tasks / f"reader-{number}.py").write_text(READER.replace("::1", f"{number - 1}::1"), "utf-8")
        world.offer(f"evals/tasks/data/note-{number}.txt", (b"w1", b"w2"))
        world.offer(f"evals/tasks/reader-{number}.py", (b"::1", b"::2"))


def part_of(name: str) -> str:
    """Return what a file or link is a part of: a model, a recipe, the tasks, or the texts that steps read."""
    top = name.partition("/")[0]
    return PARTS.get(Path(name).name) or (top if top in ("evals", "recipes") else "texts" if top == name else "weights")


# What commands say, as plain data without times and places.


def outcome(project: Path, command: Callable[[Path, str], Any], recipe: str) -> Any:
    """Return what a command gives in a project, or its error."""
    with chdir(project):
        try:
            found = command(project, recipe)
        except WorkbenchError as error:
            found = {"error": error.message}
    return json.loads(json.dumps(found, sort_keys=True).replace(str(project), "PROJECT"))


def keys(project: Path, recipe: str) -> Any:
    """The keys and digests of a recipe."""
    found = resolve(load_recipe(project / "recipes" / f"{recipe}.yaml"))
    parts = [found.base_digest, found.base_key, dict(found.digests), found.keys, found.key, found.run_key, found.fingerprint]
    return [*parts, found.state(len(found.recipe.steps)), dict(found.generation), found.warnings]


def run(project: Path, recipe: str, events: Events = no_events) -> Any:
    """The name and the files of a run, and its record."""
    resolved = resolve(load_recipe(project / "recipes" / f"{recipe}.yaml"))
    done = execute(resolved, project / "runs", Work(CPU, 1, events))
    place = Path(str(done.run))
    files = {str(file.relative_to(place)): file for file in sorted(place.rglob("*")) if file.is_file()}
    record = json.loads(files["run.json"].read_text("utf-8"))
    same = ("status", "inputs", "tokenizer", "generation", "key", "output", "said")
    return {
        "run": place.name,
        "configuration": done.configuration,
        "steps": [{key: step.get(key) for key in ("id", "key", "tensors", "bricks")} for step in record["steps"]],
        "record": {key: record[key] for key in same},
        "files": {name: content_of(file) for name, file in files.items() if file.parent != place and file.name not in _UNLIKE},
    }


_UNLIKE = ("workbench-manifest.json", "edit.json", "README.md", "brick.yaml")  # with times and texts for people


def content_of(file: Path) -> Any:
    """The content of a result's file, without the fields of config.json that name where it comes from."""
    return meaning_of(json.loads(file.read_bytes())) if file.name == "config.json" else bytes_digest(file.read_bytes())


def planned(project: Path, recipe: str) -> Any:
    """What a plan says of sizes, and the key and whether the run is done, where it knows them."""
    found = plan(resolve(load_recipe(project / "recipes" / f"{recipe}.yaml")), project / "runs", 1)
    return [found.read_bytes, found.write_bytes, found.problems, found.warnings], [found.key, found.run, "run" in found.cached]


def scored(project: Path, recipe: str) -> Any:
    """The scores of a recipe and of its base, with all rows."""
    found = load_recipe(project / "recipes" / f"{recipe}.yaml")
    entries = [entry for entry in lineup([found]) if entry.role in ("base", "configuration")]
    store = ScoreStore(project / "runs" / "scores")
    made = plans(entries, suites_of([found], (), project), batch_size=4, limit=LIMIT, device=CPU)
    told = score_all(entries, made, store, device=CPU)
    rows = [
        [s.configuration.name, s.configuration.digest, s.key, s.plan, s.rows, s.items, store.rows(s), store.items(s)]
        for s in told
    ]
    return [rows, [{task: scores.model_dump(mode="json")["metrics"] for task, scores in s.tasks.items()} for s in told]]


def compared(project: Path, recipe: str) -> Any:
    """The rows of a comparison with the base, of scores that are stored."""
    return document("compare", recipe, "--suite", "toy", "--limit", str(LIMIT), "--batch-size", "4")["rows"]


def scored_and_compared(project: Path, recipe: str) -> Any:
    """The same with scores made now."""
    scored(project, recipe)
    return compared(project, recipe)


class Fresh:
    """What commands say in a new project with the same files of the user, remembered by the content of these files."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.known: dict[tuple[str, str, str], Any] = {}

    def says(self, project: Path, command: Callable[[Path, str], Any], recipe: str) -> Any:
        """Return what the command gives there."""
        key = state_of(project), command.__name__, recipe
        if key not in self.known:
            copy = self.place / f"{len(self.known)}"
            shutil.copytree(project, copy, symlinks=True, ignore=lambda folder, _: OURS if folder == str(project) else ())
            self.known[key] = outcome(copy, command, recipe)
            shutil.rmtree(copy)
        return self.known[key]


def state_of(project: Path) -> str:
    """Return the digest of all files and links of the user."""
    found: list[list[str]] = []
    for folder, folders, names in os.walk(project):
        if folder == str(project):
            folders[:] = [name for name in folders if name not in OURS]
        for name in (*names, *folders):
            path = Path(folder, name)
            if path.is_symlink():
                found.append([str(path.relative_to(project)), str(path.readlink())])
            elif path.is_file():
                found.append([str(path.relative_to(project)), bytes_digest(path.read_bytes())])
    return json_digest(sorted(found))


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Name the places where two plain values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [
            (f"{place}/{key}", found.get(key, "nothing"), expected.get(key, "nothing")) for key in sorted({*found, *expected})
        ]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(f"{place}/{number}", *pair) for number, pair in enumerate(zip(found, expected, strict=True))]
    else:
        return [] if found == expected else [f"{place}: found {str(found)[:200]}, in a fresh project {str(expected)[:200]}"]
    return [line for where, one, other in pairs for line in differences(one, other, where)]
