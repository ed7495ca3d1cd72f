"""Recognize files and folders, those of other tools included: what they are, and the commands that use or convert them.

Only names and first bytes are read. `workbench open` prints what is found, and the error about a thing of another kind than expected takes
its hint from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.ground import foreign_names, jsondoc
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.foreign_names import ADAPTER, CARD, CONFIG, INDEX, MODULES, SAVED, SINGLE, brick_name, fields_of
from workbench.ground.project import find_project, relative
from workbench.ground.results import Result
from workbench.ground.yamltree import top_scalars

MERGED = "mergekit_config.yml"
_HEAD = 1 << 16
_LFS = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_STATE = re.compile(
    r"training_args\.bin|optimizer.*|scheduler.*|scaler.*|rng_state.*|.*optim_states\.pt|recipe_state\.pt|.*\.neuron\.pth"
)
"""What trainers save beside a model: its pickles are no weights."""
_TRUSTED = "Convert it (this opens the pickle: only for files that you trust):"
_OPENS = " (this opens pickles: only for files that you trust):"
_EXPORT = f"Export it for transformers; BASE is the model that it was made from{_OPENS}"
_ONNX = "ONNX graphs have no tensors by the names of the model. Use the model that it was exported from."
_JOINED = f"Join its parts, and copy {CONFIG} and the tokenizer files to the result:"
_ROWS = "Rows are read from one JSON object a line. Convert it:"
_OWN: list[tuple[str, str, str, list[str]]] = [
    # files, kind, description, commands
    ("run.json recipe.yaml", "run", "a run of the workbench", ["runs show {}", "chat {}"]),
    ("configuration.json routing.json", "route", "a configuration with a router", ["chat {}", "route explain {} 'A PROMPT'"]),
    ("configuration.json", "memory", "a configuration with a memory", ["chat {}", "memory ls {}"]),
    ("search.json", "search", "a search", ["search {recipe}"]),
    ("journal.log", "search", "an unfinished search", ["search {recipe}"]),
    ("report.html report.json", "report", "a report of the workbench: open report.html in a browser", ["report"]),
    ("recipes", "project", "a project folder: type commands in it", ["recipe check {}/recipes/*.yaml"]),
]


class Thing(Result):
    """What a path or a hub id is, and the commands that use it."""

    name: str
    """Its name, as it is typed."""
    kind: str
    """Kind of thing, such as "adapter", "recipe" or "pickle"."""
    says: str
    """What it is, in words: "a LoRA adapter of rank 16 for org/base"."""
    problem: str | None = None
    """Why no command takes it as it is; null if one does."""
    commands: list[str] = []
    """Commands that use it; if there is a problem, those that solve it."""

    @property
    def hint(self) -> str:
        """The hint of an error about the thing: what is wrong with it, and the command to type."""
        return " ".join(filter(None, [self.problem, *self.commands[:1]]))


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
        return _Folder(path).thing() if path.is_dir() else _File(path).thing() if path.is_file() else None
    except (OSError, ValueError, RecursionError, WorkbenchError):  # a name that is not UTF-8 is a ValueError
        return None


class _Named:
    """A file or folder, and its path as it is typed."""

    def __init__(self, path: Path) -> None:
        self.path, self.typed = path, str(relative(path))

    def is_(self, kind: str, says: str, *commands: str, problem: str | None = None) -> Thing:
        """Return it as a thing."""
        return Thing(name=self.typed, kind=kind, says=says, problem=problem, commands=list(commands))


class _Folder(_Named):
    """A folder, by the names of what is in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names = {inner.name for inner in path.iterdir()}
        self.config, self.adapter = fields_of(path / CONFIG), fields_of(path / ADAPTER)

    def thing(self) -> Thing | None:
        """Return the first kind that fits: results of this project before those of others, weights before the rest."""
        for kind in (self._own, self._pointers, self._adapter, self._shards, self._model, self._scores, self._saves, self._rest):
            if (thing := kind()) is not None:
                return thing
        return None

    def _like(self, pattern: str) -> list[str]:
        return sorted(name for name in self.names if re.fullmatch(pattern, name))

    def _new(self, base: object = None) -> str:
        """Return the command that makes a recipe with the folder as a brick."""
        name, place, project = brick_name(self.path), self.path.absolute(), find_project()
        brick = f"{name}={place.relative_to(project) if place.is_relative_to(project) else place}"
        return shell("workbench", "recipe", "new", f"use-{name}", "--base", base or "BASE", "--brick", brick)

    @property
    def _made(self) -> str:
        """What made a model, for the end of its description."""
        step = fields_of(self.path / "trainer_state.json").get("global_step")
        if SAVED.fullmatch(self.path.resolve().name) and isinstance(step, int):
            return f", saved at step {step} of a training (its optimizer files are not needed)"
        return f", merged by mergekit ({MERGED})" if MERGED in self.names else ""

    def _own(self) -> Thing | None:
        typed = shell(self.typed)
        if "neurons.json" in self.names:
            where = f"`where: {{neurons: {self.typed}}}` in a merge step to limit the step to these neurons, or add the step"
            step = f"`- {{edit: scale_neurons, neurons: {self.typed}, factor: 0}}` to switch them off:"
            what, problem = "a set of neurons of the base, which has no weights of its own", f"Write {where} {step}"
            return self.is_("neurons", what, f"workbench brick show {typed}", problem=problem)
        if "train.yaml" in self.names and not self.names & {ADAPTER, "checkpoint"}:
            return self.is_("untrained", "built on demand and is not trained yet", f"workbench brick train {typed}")
        recipe = shell(re.sub(r"-[0-9a-f]{8}$", "", self.path.resolve().name))
        for files, kind, says, commands in _OWN:
            if {*files.split()} <= self.names:
                return self.is_(kind, says, *(f"workbench {command.format(typed, recipe=recipe)}" for command in commands))
        return None

    def _pointers(self) -> Thing | None:
        weights = [self.path / name for name in self.names if name.endswith((".safetensors", ".gguf", *_PICKLES))]
        if any(file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS) for file in weights):
            pull = f"git -C {shell(self.typed)} lfs pull"
            return self.is_("lfs", "a clone with Git LFS pointers in place of its weights", pull, problem="Fetch the weights:")
        return None

    def _adapter(self) -> Thing | None:
        config, typed = self.adapter, relative(self.path)
        if not config or self._weights:
            return None
        kind, base = str(config.get("peft_type", "")), config.get("base_model_name_or_path")
        if not kind and ("lora_parameters" in config or "fine_tune_type" in config):
            words = ["--model", config.get("model") or "BASE", "--adapter-path", typed, "--save-path", f"{typed}-fused"]
            problem = "Its factors have MLX's names and layout. Fuse it, and use the result as a checkpoint:"
            return self.is_("mlx-adapter", "an adapter of MLX", shell("mlx_lm.fuse", *words), problem=problem)
        if kind in foreign_names.PROMPTS:
            return self.is_("prompt", f"a learned prompt of PEFT ({kind})", problem=foreign_names.LEARNED)
        rank = f", rank {config['r']}" if isinstance(config.get("r"), int) else ""
        says = f"an adapter of PEFT ({kind or 'no peft_type'}{rank}{f', for {base}' if base else ''}){self._made}"
        if foreign_names.ADAPTER_WEIGHTS in self.names:
            return self.is_("adapter", says, self._new(base), shell("workbench", "brick", "show", typed))
        if "adapter_model.bin" in self.names:
            old, new = (json.dumps(f"{typed}/adapter_model.{suffix}") for suffix in ("bin", "safetensors"))
            load = f'torch.load({old}, map_location="cpu", weights_only=True)'
            code = f"import torch, safetensors.torch as s; s.save_file({load}, {new})"
            says = f"{says} as adapter_model.bin (pickles are never opened)"
            return self.is_("pickle", says, f"python -c {shell(code)}", problem=_TRUSTED)
        return self._saves()

    def _shards(self) -> Thing | None:
        if (found := self._trained()) is not None:
            return found
        out = f"{self.typed}-merged"
        inner = next((name for name in self._like(r"pytorch_model_fsdp_\d+") if (self.path / name).is_dir()), None)
        if inner or self._like(r"__\d+_\d+\.distcp"):
            merge = shell("accelerate", "merge-weights", f"{self.typed}/{inner}" if inner else self.typed, out)
            return self.is_("fsdp", "sharded weights of FSDP (torch's distributed checkpoint)", merge, problem=_JOINED)
        top = relative(self.path if "zero_to_fp32.py" in self.names else self.path.parent)
        if not self._weights and ("zero_to_fp32.py" in self.names or self._like(r".*mp_rank_\d+_(model|optim)_states\.pt")):
            join = shell("python", "-m", "deepspeed.utils.zero_to_fp32", top, out, "--safe_serialization")
            return self.is_("zero", "sharded weights of DeepSpeed ZeRO", join, problem=f"{_JOINED[:-1]}{_OPENS}")
        return None

    def _trained(self) -> Thing | None:
        """Return what a save of verl, Megatron or NeMo is, by the names that their documentation lists."""
        path, typed, names, out = self.path, self.typed, self.names, f"{self.typed}-hf"
        owner = {"huggingface": "verl", "dist_ckpt": "verl", "weights": "nemo"}.get(path.absolute().name)
        whole = None if owner is None or self._weights else look(path.absolute().parent)
        inner = look(path / "actor") if "actor" in names else whole
        if inner is not None and inner.kind == (owner or "verl"):
            return inner.model_copy(update={"name": typed})
        ranks = self._like(r"model_world_size_\d+_rank_\d+\.pt")
        if ranks or {"dist_ckpt", "huggingface"} <= names:
            saved = any((path / "huggingface" / name).is_file() for name in (SINGLE, INDEX))
            if saved and (made := look(path / "huggingface")):
                says = f"a save of verl, which has the whole model in {path.name}/huggingface: {made.says}"
                return made.model_copy(update={"name": typed, "kind": "verl", "says": says, "problem": "Name that folder:"})
            tied = fields_of(path / "huggingface" / CONFIG).get("tie_word_embeddings") and not ranks
            words = ["--backend", "fsdp" if ranks else "megatron", *["--tie-word-embedding"] * bool(tied)]
            join = shell("python", "-m", "verl.model_merger", "merge", *words, "--local_dir", typed, "--target_dir", out)
            says = f"sharded weights of verl ({'FSDP' if ranks else 'Megatron'})"
            return self.is_("verl", says, join, problem=f"Join its parts{_OPENS}")
        if names >= {"weights", "context"}:
            given = f"path=Path({typed!r}), target='hf', output_path=Path({out!r})"
            code = f"from pathlib import Path; from nemo.collections import llm; llm.export_ckpt({given})"
            return self.is_("nemo", "a checkpoint of NeMo 2", f"python -c {shell(code)}", problem=_EXPORT)
        if self._like(r"mp_rank_\d+(_\d+)*"):
            hint = "Save it as torch_dist with Megatron-LM (--ckpt-convert-format torch_dist --ckpt-convert-save DIR), and open that."
            return self.is_("megatron", "a checkpoint of Megatron-LM in its legacy format", problem=hint)
        if names & {"common.pt", "run_config.yaml"} and self._like(r"__\d+_\d+\.distcp|metadata\.json"):
            call = f"AutoBridge.from_hf_pretrained('BASE').export_ckpt({typed!r}, {out!r})"
            code = f"from megatron.bridge import AutoBridge; {call}"
            says = "a checkpoint of Megatron (torch_dist), from Megatron-Bridge or Megatron-LM"
            return self.is_("megatron", says, f"python -c {shell(code)}", problem=_EXPORT)
        return None

    @cached_property
    def _weights(self) -> bool:
        """True if the folder has a checkpoint of its own, perhaps beside an adapter."""
        return CONFIG in self.names and bool({SINGLE, INDEX} & self.names)

    def _model(self) -> Thing | None:
        quantized = self.config.get("quantization")
        if isinstance(quantized, dict) and "bits" in quantized:
            says = f"a model that MLX quantized to {quantized['bits']} bits"
            undo = shell("mlx_lm.convert", "--hf-path", self.typed, "--mlx-path", f"{self.typed}-dequantized", "--dequantize")
            return self.is_("mlx", says, undo, problem="Undo it, or use the model that it was made from:")
        modules = [row for row in jsondoc.read_cached(self.path / MODULES, list) or [] if isinstance(row, dict)]
        inner = look(self.path / str(modules[0].get("path"))) if modules and not self.config else None
        if self._weights or (inner and inner.kind == "checkpoint"):
            beside = " with its adapter beside it" if self.adapter else ""
            says = inner.says if inner else f"a {self.config.get('model_type', 'transformers')} model{beside}{self._made}"
            if modules:
                says += f" in a model of sentence-transformers ({', '.join(str(row.get('type')).rpartition('.')[2] for row in modules)})"
            new = shell("workbench", "recipe", "new", f"from-{brick_name(self.path)}", "--base", self.typed)
            made = [shell("workbench", "recipe", "import", f"{self.typed}/{MERGED}")] if MERGED in self.names else []
            brick = [] if self.adapter else [self._new()]
            chat = [] if modules else [shell("workbench", "chat", self.typed)]
            return self.is_("checkpoint", says, *chat, *made, new, *brick)
        if CARD in self.names:
            return self.is_("brick", "a brick with a card", shell("workbench", "brick", "show", self.typed))
        files = self._like(r".*\.gguf")
        return look(self.path / files[0]) if len(files) == 1 and not self._like(r".*\.safetensors") else None

    def _scores(self) -> Thing | None:
        results = re.compile(r"(results|samples)_.*\.jsonl?")
        found = [file.name for file in (*self.path.glob("*"), *self.path.glob("*/*")) if results.fullmatch(file.name)]
        if any(name.startswith("samples_") for name in found):
            return self.is_("lm-eval", "results of lm-eval", shell("workbench", "scores", "import", self.typed))
        again = "lm_eval --model hf --model_args pretrained=MODEL --tasks TASK --output_path DIR --log_samples"
        problem, says = "Let lm_eval write the items, too:", "results of lm-eval without items (samples_*.jsonl)"
        return self.is_("lm-eval", says, again, problem=problem) if found else None

    def _saves(self) -> Thing | None:
        saves = sorted((int(match[1]), name) for name in self.names if (match := SAVED.fullmatch(name)))
        if not saves:
            return None
        place = saves[-1][1]
        commands = last.commands if (last := look(self.path / place)) else ()
        says = f"the output of a training with {len(saves)} save{'s' * (len(saves) > 1)} and no final model, the last in {place}"
        average = f"`{{checkpoints: {self.typed}, last: {min(len(saves), 8)}}}`"
        problem = f"Average the last ones, with the brick {average}, or name a save, such as {self.typed}/{place}:"
        return self.is_("saves", says, *commands, problem=problem)

    def _rest(self) -> Thing | None:
        if pickles := [name for name in sorted(self.names) if name.endswith(_PICKLES) and not _STATE.fullmatch(name)]:
            says = f"a folder that has pickle files only ({', '.join(pickles[:3])}), which are never opened"
            problem = f"{foreign_names.TOKENIZER_TOO} {_TRUSTED}"
            return self.is_("pickle", says, foreign_names.convert_command(Path(self.typed)), problem=problem)
        if self._like(r"(.*\.)?onnx"):
            return self.is_("onnx", "a model for ONNX", problem=_ONNX)
        if self.names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} and not self._like(r".*\.safetensors"):
            return self.is_("tokenizer", "a tokenizer", problem="It has no weights. Copy it into the folder of its model.")
        return None


class _File(_Named):
    """A file, by its suffix and first bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as stream:
            self.start = stream.read(_HEAD)
        self.stem = brick_name(path.with_suffix(""))

    def thing(self) -> Thing | None:
        """Return what the file is."""
        path, typed, suffix = self.path, self.typed, self.path.suffix.lower()
        if self.start.startswith(_LFS):
            pull = f"git -C {shell(relative(path.parent))} lfs pull"
            return self.is_("lfs", "a Git LFS pointer", pull, problem="Fetch the file:")
        if path.name in (CONFIG, ADAPTER, CARD, INDEX, "trainer_state.json", "run.json") or suffix == ".safetensors":
            whole = look(path.absolute().parent)
            problem = (whole.problem if whole else None) or "Name its folder:"
            return (
                whole.model_copy(update={"name": typed, "says": f"a file of {whole.says}", "problem": problem}) if whole else None
            )
        if self.start.startswith(b"GGUF"):
            new = shell("workbench", "recipe", "new", f"from-{self.stem}", "--base", typed)
            return self.is_("gguf", "a model in GGUF", shell("workbench", "chat", typed), new)
        if suffix in _PICKLES and _STATE.fullmatch(path.name):
            return self.is_("state", "the state of a trainer", problem="It is not needed, and never opened.")
        if suffix in _PICKLES:
            return self.is_("pickle", "a pickle file", foreign_names.convert_command(relative(path.parent)), problem=_TRUSTED)
        if suffix == ".nemo":
            words = f"--input_name_or_path {shell(typed)} --output_path model.bin --hf_input_path BASE --hf_output_path {shell(f'{typed}-hf')}"
            problem = f"Convert it with the script of NeMo 1 for its architecture, such as this for Llama{_OPENS}"
            return self.is_("nemo", "an archive of NeMo 1", f"python convert_llama_nemo_to_hf.py {words}", problem=problem)
        if suffix == ".onnx":
            return self.is_("onnx", "a model for ONNX", problem=_ONNX)
        if suffix in (".csv", ".tsv"):
            tab = ', delimiter="\\t"' if suffix == ".tsv" else ""
            rows = f'csv.DictReader(open({json.dumps(typed)}, encoding="utf-8-sig", newline=""){tab})'
            return self.is_("csv", "a table of comma-separated values", self._lines(rows, "csv, "), problem=_ROWS)
        if suffix in (".yaml", ".yml"):
            return self._yaml(self.start.decode("utf-8", "replace"))
        return self._json(self.start.decode("utf-8-sig", "replace")) if suffix in (".json", ".jsonl") else None

    def _lines(self, rows: str, modules: str = "") -> str:
        """Return the command that writes rows as one JSON object a line."""
        to = self.path.with_name(f"{self.path.stem}{'-rows' * (self.path.suffix == '.jsonl')}.jsonl")
        return f"python -c {shell(f'import {modules}json; [print(json.dumps(row)) for row in {rows}]')} > {shell(relative(to))}"

    def _yaml(self, text: str) -> Thing | None:
        """Return what a YAML file is, by its top-level keys, which are found if it is not valid YAML, too."""
        keys, typed = set(re.findall(r"^([A-Za-z_]\w*)[ \t]*:", text, re.MULTILINE)), shell(self.typed)
        if keys & {"merge_method", "gate_mode", "experts"} or keys >= {"slices", "dtype"} or keys >= {"models", "dtype"}:
            to = f"recipes/{self.stem}{'-imported' * (self.path.absolute().parent.name == 'recipes')}.yaml"
            return self.is_("mergekit", "a file for mergekit", f"workbench recipe import {typed} -o {shell(to)}")
        if {"suite", "tasks"} <= keys:
            return self.is_(
                "suite", "a suite of tasks", f"workbench suite show {typed}", f"workbench eval RECIPE --suite {typed}"
            )
        if keys & {"task", "group"} and keys & {"output_type", "doc_to_text", "dataset_path", "custom_dataset", "include"}:
            task = shell(top_scalars(text).get("task", "TASK"))
            return self.is_("task", "a task of lm-eval", f"workbench recipe new {self.stem} --task {task}")
        for tool, key in (("LLaMA-Factory", "finetuning_type"), ("axolotl", "base_model"), ("torchtune", "checkpointer")):
            if key in keys:
                out = top_scalars(text).get("output_dir", "DIR")
                what, problem = f"a configuration of {tool}", "Train with it, and use its output:"
                return self.is_("training", what, shell("workbench", "open", out), problem=problem)
        if "steps" in keys or keys >= {"base", "bricks"}:
            return self.is_("recipe", "a recipe", f"workbench plan {typed}", f"workbench run {typed}")
        is_fact = re.search(r"^- \{?\s*(prompt|id|subject):", text, re.MULTILINE)
        return self.is_("facts", "a file of facts", f"workbench facts check {typed}") if is_fact else None

    def _json(self, text: str) -> Thing | None:
        """Return what a JSON file is, by the keys of its object or of its first row."""
        is_list, typed = text.lstrip().startswith("["), shell(self.typed)
        first = text.lstrip().removeprefix("[").lstrip()
        row: Any = dict.fromkeys(re.findall(r'"(\w+)"\s*:', first[:4096]))  # of a row that is longer than what was read
        is_object = not is_list and self.path.suffix == ".json"
        try:
            row, end = json.JSONDecoder().raw_decode(first)
            is_object = not is_list and not first[end:].strip()
        except (ValueError, RecursionError):
            pass
        if not isinstance(row, dict):
            return None
        if self.path.name.startswith("samples_") or {"doc_id", "filtered_resps"} <= row.keys():
            return self.is_("lm-eval", "items of an lm-eval run", f"workbench scores import {typed}")
        if is_object and "results" in row and row.keys() & {"configs", "versions", "n-shot"}:
            return look(self.path.absolute().parent)
        name, is_fact = foreign_names.benchmark_of(row), {"prompt", "target"} <= row.keys()
        asked, told = {"choices", "question", "answer", "gold"}, {"messages", "conversations", "completion", "text", "response"}
        others = row.keys() & (asked | told)
        if not (name or is_fact or others):
            return None
        if is_list and (self.path.suffix == ".jsonl" or not (name or is_fact)):
            lines = self._lines(f'json.load(open({json.dumps(self.typed)}, encoding="utf-8"))')
            return self.is_("array", "a JSON list of rows", lines, problem=_ROWS)
        if name:
            to = shell(relative(self.path.with_name(f"{self.path.stem}-facts.jsonl")))
            return self.is_("benchmark", f"facts in the format of {name}", f"workbench facts import {typed} -o {to}")
        if is_fact:
            return self.is_("facts", "a file of facts", f"workbench facts check {typed}")
        if row.keys() & asked:
            kind = "choice" if "choices" in row else "exact"
            return self.is_(
                "items", "a file of items to score", f"workbench suite new {self.stem} --data {typed} --kind {kind} --base BASE"
            )
        return self.is_("texts", "a file of training rows", f"workbench brick train {self.stem} --data {typed} --base BASE")
