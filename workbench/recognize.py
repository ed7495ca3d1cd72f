"""Recognize files and folders, those of other tools included: what they are, and the commands that use or convert them.

Only names and first bytes are read. `workbench open` prints what is found, and the error about a thing of another kind than expected takes
its hint from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError, shell
from workbench.project import find_project, relative
from workbench.things import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CARD,
    CONFIG,
    INDEX,
    LEARNED,
    PROMPTS,
    SAVED,
    SINGLE,
    TOKENIZER_TOO,
    Thing,
    benchmark_of,
    brick_name,
    convert_command,
    fields_of,
    mlx_command,
)
from workbench.yamltree import top_scalars

MERGED = "mergekit_config.yml"
_HEAD = 1 << 16
_LFS = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_STATE = re.compile(
    r"training_args\.bin|optimizer.*|scheduler.*|scaler.*|rng_state.*|.*optim_states\.pt|recipe_state\.pt|.*\.neuron\.pth"
)
"""What trainers save beside a model: its pickles are no weights."""
_ONNX = "ONNX graphs have no tensors by the names of the model. Use the model that it was exported from."


@contextmanager
def expecting(path: Path, wanted: str, *kinds: str) -> Iterator[None]:
    """Say what a file is instead, if reading it as something else fails.

    Args:
        path: The file or folder that is read.
        wanted: What the reader expects, for the message, such as "a recipe".
        kinds: Kinds of things whose reader's own message is the better one.

    Raises:
        WorkbenchError: The reader's error, or one that says what the thing is and takes the hint from it.
    """
    try:
        yield
    except WorkbenchError as error:
        thing = look(path)
        if thing is None or thing.kind in kinds:
            raise
        raise error.reworded(f"{relative(path)}: expected {wanted}, found {thing.says}", thing.hint) from None


def look(path: Path) -> Thing | None:
    """Return what a file or folder is; None if that is not known, or it cannot be read."""
    try:
        if path.is_dir():
            return _folder(_Folder(path, frozenset(inner.name for inner in path.iterdir())))
        return _file(path) if path.is_file() else None
    except (OSError, RecursionError, WorkbenchError):
        return None


def suggestion(path: Path) -> str:
    """Return a sentence with the folders that a path may mean: below it, above it, or of a similar name; empty if there are none."""
    if path.is_dir():
        places = [*sorted(inner for inner in path.iterdir() if inner.is_dir()), path.resolve().parent]
        found = [place for place in places if any((place / name).is_file() for name in (ADAPTER, CONFIG, CARD))]
    else:
        top = next(place for place in path.absolute().parents if place.is_dir())
        wrong, *rest = path.absolute().relative_to(top).parts
        near = get_close_matches(wrong, [inner.name for inner in top.iterdir() if inner.is_dir()], n=2, cutoff=0.6)
        found = [place if (place := (top / name).joinpath(*rest)).exists() else top / name for name in near]
    return f"Did you mean {' or '.join(shell(relative(place)) for place in found[:3])}?" if found else ""


@dataclass(frozen=True)
class _Folder:
    """A folder with the names of what is in it."""

    path: Path
    names: frozenset[str]
    typed: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "typed", str(relative(self.path)))

    def like(self, pattern: str) -> list[str]:
        """Return the names that match a regular expression, sorted."""
        return sorted(name for name in self.names if re.fullmatch(pattern, name))

    def is_(self, kind: str, says: str, *commands: str, problem: str | None = None) -> Thing:
        """Return the folder as a thing."""
        return Thing(name=self.typed, kind=kind, says=says, problem=problem, commands=list(commands))

    def new(self, base: str | None = None) -> str:
        """Return the command that makes a recipe with the folder as a brick."""
        name, place = brick_name(self.path), self.path.absolute()
        inside = place.relative_to(find_project()) if place.is_relative_to(find_project()) else place
        return shell("workbench", "recipe", "new", f"use-{name}", "--base", base or "BASE", "--brick", f"{name}={inside}")


def _folder(folder: _Folder) -> Thing | None:
    """Return what a folder is: the first kind that fits, results of this project before those of others."""
    kinds: tuple[Callable[[_Folder], Thing | None], ...] = (_own, _pointers, _adapter, _shards, _model, _scores, _saves, _rest)
    return next((thing for kind in kinds if (thing := kind(folder)) is not None), None)


def _own(folder: _Folder) -> Thing | None:
    """Return what the workbench wrote into a folder."""
    names, typed = folder.names, shell(folder.typed)
    if "run.json" in names and "recipe.yaml" in names:
        return folder.is_("run", "a run of the workbench", f"workbench runs show {typed}", f"workbench chat {typed}")
    if "configuration.json" in names and "routing.json" in names:
        explain = f"workbench route explain {typed} 'A PROMPT'"
        return folder.is_("route", "a configuration with a router", f"workbench chat {typed}", explain)
    if "configuration.json" in names:
        return folder.is_("memory", "a configuration with a memory", f"workbench chat {typed}", f"workbench memory ls {typed}")
    if "neurons.json" in names:
        what = "a set of neurons of the base, which has no weights of its own"
        uses = f"`where: {{neurons: {folder.typed}}}` in a merge step to limit the step to these neurons, or add the step"
        factor = f"`- {{edit: scale_neurons, neurons: {folder.typed}, factor: 0}}` to switch them off:"
        show = f"workbench brick show {typed}"
        return folder.is_("neurons", what, show, problem=f"It is no entry of `bricks`. Write {uses} {factor}")
    if "search.json" in names or "journal.log" in names:
        name = re.sub(r"-[0-9a-f]{8}$", "", folder.path.resolve().name)
        return folder.is_("search", f"a search of the recipe {name}", f"workbench search {shell(name)}")
    if "report.json" in names and {"report.html", "report.md"} & names:
        return folder.is_("report", "a report of the workbench", f"python -m webbrowser {typed}/report.html")
    if "train.yaml" in names and not names & {CARD, ADAPTER}:
        return folder.is_("untrained", "built on demand and is not trained yet", f"workbench brick train {typed}")
    if "recipes" in names and (folder.path / "recipes").is_dir():
        return folder.is_("project", "a project of the workbench", f"cd {typed} && workbench recipe check recipes/*.yaml")
    return None


def _pointers(folder: _Folder) -> Thing | None:
    """Return a folder whose weights are pointers of Git LFS."""
    weights = folder.like(rf".*(\.safetensors|\.gguf|{'|'.join(map(re.escape, _PICKLES))})")
    if any((folder.path / name).stat().st_size < 1024 and _start(folder.path / name).startswith(_LFS) for name in weights):
        pull = f"git -C {shell(folder.typed)} lfs pull"
        return folder.is_("lfs", "a clone with Git LFS pointers in place of its weights", pull, problem="Fetch the weights:")
    return None


def _adapter(folder: _Folder) -> Thing | None:
    """Return an adapter of PEFT or MLX."""
    config, names = fields_of(folder.path / ADAPTER), folder.names
    if ADAPTER not in names or _model(folder, alone=True):
        return None
    if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
        fuse = shell("mlx_lm.fuse", "--model", str(config.get("model") or "BASE"), "--adapter-path", folder.typed, "--save-path")
        problem = "Its factors have MLX's names and layout. Fuse it, and use the result as a checkpoint:"
        return folder.is_("mlx-adapter", "an adapter of MLX", f"{fuse} {shell(f'{folder.typed}-fused')}", problem=problem)
    base = config.get("base_model_name_or_path")
    rank = f" of rank {config['r']}" if isinstance(config.get("r"), int) else ""
    kind = {"LORA": "LoRA"}.get(str(config.get("peft_type")), str(config.get("peft_type", "PEFT")))
    says = f"{'an' if kind[0] in 'AIOE' else 'a'} {kind} adapter{rank}{f' for {base}' if base else ''}{_step(folder)}"
    if config.get("peft_type") in PROMPTS:
        return folder.is_("prompt", f"a learned prompt ({config['peft_type']}) of PEFT", problem=LEARNED)
    if ADAPTER_WEIGHTS in names:
        new = folder.new(base if isinstance(base, str) else None)
        return folder.is_("adapter", says, new, shell("workbench", "brick", "show", folder.typed))
    if "adapter_model.bin" in names:
        stem = folder.path / "adapter_model"
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"t = torch.load({str(relative(stem))!r} + '.bin', map_location='cpu', weights_only=True); "
            f"save_file({{n: x.contiguous() for n, x in t.items()}}, {str(relative(stem))!r} + '.safetensors')"
        )
        problem = "Convert it (this opens the pickle: only for files that you trust):"
        return folder.is_(
            "pickle", f"{says}, as adapter_model.bin (pickles are never opened)", f"python -c {shell(code)}", problem=problem
        )
    return _saves(folder)


def _step(folder: _Folder) -> str:
    """Return which save of a training a folder is."""
    state = fields_of(folder.path / "trainer_state.json")
    if SAVED.fullmatch(folder.path.resolve().name) and isinstance(state.get("global_step"), int):
        return f", saved at step {state['global_step']} of a training (its optimizer files are not needed)"
    return f", merged by mergekit ({MERGED})" if MERGED in folder.names else ""


def _shards(folder: _Folder) -> Thing | None:
    """Return the shards that several processes saved."""
    typed, out = folder.typed, f"{folder.typed}-merged"
    inner = next((name for name in folder.like(r"pytorch_model_fsdp_\d+") if (folder.path / name).is_dir()), "")
    if inner or folder.like(r"__\d+_\d+\.distcp"):
        merge = shell("accelerate", "merge-weights", f"{typed}/{inner}" if inner else typed, out)
        problem = f"Merge them, and copy {CONFIG} and the tokenizer files to the result:"
        return folder.is_("fsdp", "sharded weights of FSDP (torch's distributed checkpoint)", merge, problem=problem)
    if "zero_to_fp32.py" in folder.names or folder.like(r"zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt"):
        if _model(folder, alone=True):
            return None
        top = folder.path if "zero_to_fp32.py" in folder.names else folder.path.parent
        join = shell("python", "-m", "deepspeed.utils.zero_to_fp32", relative(top), out, "--safe_serialization")
        problem = f"Join them, and copy {CONFIG} and the tokenizer files to the result (this opens pickles: only for files that you trust):"
        return folder.is_("zero", "sharded weights of DeepSpeed ZeRO", join, problem=problem)
    return None


def _model(folder: _Folder, *, alone: bool = False) -> Thing | None:
    """Return a model in safetensors or GGUF; `alone` counts a model with weights of its own only, beside an adapter."""
    typed, config = shell(folder.typed), fields_of(folder.path / CONFIG)
    if isinstance(config.get("quantization"), dict) and "bits" in config["quantization"]:
        bits, problem = config["quantization"]["bits"], "Undo it on a Mac, or use the model that it was made from:"
        return folder.is_("mlx", f"a model that MLX quantized to {bits} bits", mlx_command(folder.path), problem=problem)
    weights = (SINGLE in folder.names or INDEX in folder.names) and CONFIG in folder.names
    if weights or (not alone and CARD in folder.names):
        what = f"a {config['model_type']} model" if config.get("model_type") else "a brick with a card"
        new = shell("workbench", "recipe", "new", f"from-{brick_name(folder.path)}", "--base", folder.typed)
        commands = [f"workbench chat {typed}", folder.new(), new] if config else [f"workbench brick show {typed}", folder.new()]
        if MERGED in folder.names:
            commands.insert(1, shell("workbench", "recipe", "import", f"{folder.typed}/{MERGED}"))
        return folder.is_("checkpoint" if config else "brick", f"{what}{_step(folder)}", *commands)
    if not alone and (files := folder.like(r".*\.gguf")) and not folder.like(r".*\.safetensors"):
        return look(folder.path / files[0]) if len(files) == 1 else None
    return None


def _scores(folder: _Folder) -> Thing | None:
    """Return the results of lm-eval."""
    results = r"(results|samples)_.*\.jsonl?"
    inner = folder.like(results) or [p.name for p in folder.path.glob("*/*") if re.fullmatch(results, p.name)]
    if not inner:
        return None
    if any(name.startswith("samples_") for name in inner):
        return folder.is_("lm-eval", "results of lm-eval", shell("workbench", "scores", "import", folder.typed))
    problem = (
        "It has no items (samples_*.jsonl), and means alone cannot be compared item by item. Add --log_samples to the command:"
    )
    again = "lm_eval --model hf --model_args pretrained=MODEL --tasks TASK --output_path DIR --log_samples"
    return folder.is_("lm-eval", "results of lm-eval", again, problem=problem)


def _saves(folder: _Folder) -> Thing | None:
    """Return the output of a training that holds only its saves."""
    saves = sorted((int(match[1]), name) for name in folder.names if (match := SAVED.fullmatch(name)))
    if not saves:
        return None
    last = look(folder.path / saves[-1][1])
    what = f"the output of a training with {len(saves)} saves and no final model; the last is {saves[-1][1]}"
    return folder.is_(
        "saves", what, *(last.commands if last else ()), problem=f"Name the save to use, such as {folder.typed}/{saves[-1][1]}:"
    )


def _rest(folder: _Folder) -> Thing | None:
    """Return a folder without weights that are read."""
    names, typed = folder.names, folder.typed
    if pickles := [name for name in sorted(names) if name.endswith(_PICKLES) and not _STATE.fullmatch(name)]:
        what = f"a folder that has pickle files only ({', '.join(pickles[:3])}), which are never opened"
        problem = "Convert it (this opens the pickle: only for files that you trust)."
        return folder.is_("pickle", what, convert_command(Path(typed)), problem=f"{problem} {TOKENIZER_TOO}")
    if onnx := folder.like(r".*\.onnx") or (["onnx"] if "onnx" in names and not folder.like(r".*\.safetensors") else []):
        return folder.is_("onnx", f"a model for ONNX ({onnx[0]})", problem=_ONNX)
    if "model_index.json" in names:
        return folder.is_("diffusion", "a diffusion pipeline", problem="Only language models are merged, edited and scored.")
    inner = [name for name in sorted(names) if any((folder.path / name / file).is_file() for file in (ADAPTER, CONFIG, CARD))]
    if inner:
        problem = f"Name one of the models in it ({', '.join(inner[:4])}{' …' if len(inner) > 4 else ''}):"
        found = look(folder.path / inner[0])
        return folder.is_("models", f"a folder with {len(inner)} models", *(found.commands if found else ()), problem=problem)
    if names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}:
        problem = "It has no weights. Copy it into the folder of the model that it belongs to."
        return folder.is_("tokenizer", "a tokenizer without a model", problem=problem)
    return None


def _file(path: Path) -> Thing | None:
    """Return what a file is, by its suffix and first bytes."""
    typed, suffix, start = str(relative(path)), path.suffix.lower(), _start(path)

    def is_(kind: str, says: str, *commands: str, problem: str | None = None) -> Thing:
        return Thing(name=typed, kind=kind, says=says, problem=problem, commands=list(commands))

    if start.startswith(_LFS):
        return is_("lfs", "a Git LFS pointer", f"git -C {shell(relative(path.parent))} lfs pull", problem="Fetch the file:")
    if path.name in (CONFIG, ADAPTER, CARD, INDEX, "trainer_state.json", "run.json") or suffix == ".safetensors":
        whole = look(path.resolve().parent)
        return whole and whole.model_copy(
            update={"says": f"a file of {whole.says}", "problem": whole.problem or "Name its folder:"}
        )
    if start.startswith(b"GGUF"):
        new = shell("workbench", "recipe", "new", f"from-{brick_name(path.with_suffix(''))}", "--base", typed)
        return is_("gguf", "a GGUF file", shell("workbench", "chat", typed), new)
    if path.name.endswith(".neuron.pth"):
        return is_("lape", "neurons of LAPE", shell("workbench", "analyze", "import", typed, "--base", "BASE", "-o", "DIR"))
    if suffix in _PICKLES:
        if _STATE.fullmatch(path.name):
            return is_("state", "the state of a trainer", problem="It is not needed, and never opened.")
        problem = "Pickle files are never opened. Convert the folder if you trust it:"
        return is_("pickle", "a pickle file", convert_command(relative(path.parent)), problem=problem)
    if suffix == ".onnx":
        return is_("onnx", "a model for ONNX", problem=_ONNX)
    if suffix in (".csv", ".tsv"):
        comma = ", delimiter='\\t'" if suffix == ".tsv" else ""
        rows = f"csv.DictReader(open({typed!r}, encoding='utf-8-sig', newline=''){comma})"
        return is_("csv", "a table of comma-separated values", _lines_of(rows, path, "csv, "), problem=_ROWS)
    if suffix in (".parquet", ".arrow", ".feather"):
        rows = f"datasets.Dataset.from_{'parquet' if suffix == '.parquet' else 'file'}({typed!r})"
        return is_("table", f"a table ({suffix[1:]})", _lines_of(rows, path, "datasets, "), problem=_ROWS)
    if suffix in (".yaml", ".yml"):
        return _yaml(start.decode("utf-8", "replace"), typed, is_)
    if suffix in (".json", ".jsonl"):
        return _json(path, start.decode("utf-8-sig", "replace"), is_)
    return None


_ROWS = "Rows are read from one JSON object a line. Convert it:"
_Is = Callable[..., Thing]
_ITEMS = {"choices", "question", "answer", "gold"}
_TEXTS = {"messages", "conversations", "instruction", "completion", "text", "response"}


def _start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_HEAD)


def _lines_of(rows: str, path: Path, modules: str = "") -> str:
    """Return the command that writes rows as one JSON object a line."""
    code = f"import {modules}json; [print(json.dumps(row)) for row in {rows}]"
    return f"python -c {shell(code)} > {shell(relative(path.with_suffix('.jsonl')))}"


def _yaml(text: str, typed: str, is_: _Is) -> Thing | None:
    """Return what a YAML file is, by its top-level keys; they are found in files that are not valid YAML, too."""
    keys = set(re.findall(r"^([A-Za-z_]\w*)[ \t]*:", text, re.MULTILINE))
    if keys & {"merge_method", "gate_mode"} or keys >= {"slices", "dtype"} or keys >= {"models", "dtype"}:
        target = f"recipes/{brick_name(Path(typed).with_suffix(''))}{'-imported' * (Path(typed).parent.name == 'recipes')}.yaml"
        return is_("mergekit", "a file for mergekit", shell("workbench", "recipe", "import", typed, "-o", target))
    if {"suite", "tasks"} <= keys:
        return is_(
            "suite",
            "a suite of tasks",
            shell("workbench", "suite", "show", typed),
            f"workbench eval RECIPE --suite {shell(typed)}",
        )
    if keys & {"task", "group"} and keys & {"output_type", "doc_to_text", "dataset_path", "custom_dataset", "include"}:
        problem = "Write a suite that names it in `tasks:` (evals/suites/NAME.yaml), or score it by its name:"
        return is_("task", "a task of lm-eval", "workbench recipe new NAME --task TASK", problem=problem)
    for tool, key in (("LLaMA-Factory", "finetuning_type"), ("axolotl", "base_model"), ("torchtune", "checkpointer")):
        if key in keys:
            out = top_scalars(text).get("output_dir", "DIR")
            problem = f"It trains a model. Use what it writes to `output_dir`: {out}."
            return is_("training", f"a configuration of {tool}", shell("workbench", "open", out), problem=problem)
    if "steps" in keys or keys >= {"base", "bricks"}:
        return is_("recipe", "a recipe", shell("workbench", "plan", typed), shell("workbench", "run", typed))
    if re.search(r"^- \{?\s*(prompt|id|subject):", text, re.MULTILINE):
        return is_("facts", "a file of facts", shell("workbench", "facts", "check", typed))
    return None


def _json(path: Path, text: str, is_: _Is) -> Thing | None:
    """Return what a JSON file is, by the keys of its object or of its first row."""
    typed, body = str(relative(path)), text.lstrip()
    is_list = body.startswith("[")
    first = body.removeprefix("[").lstrip()
    row: Any = dict.fromkeys(re.findall(r'"(\w+)"\s*:', first[:4096]))  # of a row that is longer than what was read
    try:
        row, end = json.JSONDecoder().raw_decode(first)
        is_object = not is_list and not first[end:].strip()
    except (ValueError, RecursionError):
        is_object = not is_list and path.suffix == ".json"
    if not isinstance(row, dict):
        return None
    if path.name.startswith("samples_") or {"doc_id", "filtered_resps"} <= row.keys():
        return is_("lm-eval", "items of an lm-eval run", shell("workbench", "scores", "import", typed))
    if is_object and "results" in row and row.keys() & {"configs", "versions", "n-shot", "config"}:
        return look(path.resolve().parent)
    if {"pre", "post"} <= row.keys():
        return is_("easyedit", "measurements of EasyEdit", problem="Import the facts that were edited, and measure them here:")
    array = _lines_of(f"json.load(open({typed!r}, encoding='utf-8'))", path) if is_list and path.suffix == ".jsonl" else None
    if name := benchmark_of(row):
        facts = shell("workbench", "facts", "import", typed, "-o", relative(path.with_name(f"{path.stem}-facts.jsonl")))
        return is_("benchmark", f"facts in the format of {name}", array or facts, problem=_ROWS if array else None)
    if {"prompt", "target"} <= row.keys():
        return is_(
            "facts", "a file of facts", array or shell("workbench", "facts", "check", typed), problem=_ROWS if array else None
        )
    items, texts = row.keys() & _ITEMS, row.keys() & _TEXTS
    if not items and not texts:
        return None
    if is_list or is_object:
        listed = _lines_of(f"json.load(open({typed!r}, encoding='utf-8'))", path) if is_list else None
        return is_("array", "a JSON list of rows" if is_list else "one JSON object", *filter(None, [listed]), problem=_ROWS)
    if items:
        kind = "choice" if "choices" in row else "exact"
        new = shell("workbench", "suite", "new", brick_name(path.with_suffix("")), "--data", typed, "--kind", kind)
        return is_("items", "a file of items to score", new)
    train = shell("workbench", "brick", "train", brick_name(path.with_suffix("")), "--data", typed, "--base", "BASE")
    return is_("texts", "a file of training rows", train)
