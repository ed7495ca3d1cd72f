"""Names of files, ours and those of other tools, and commands that convert what is not read here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.ground import jsondoc
from workbench.ground.errors import shell

CONFIG, ADAPTER, CARD = "config.json", "adapter_config.json", "brick.yaml"
MODULES = "modules.json"
ADAPTER_WEIGHTS, SINGLE, INDEX = "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"
GGUF = ".gguf"
MANIFEST = "workbench-manifest.json"
"""The file that seals a folder (see `ground.manifest`)."""
HEADERS_ONLY = "headers-only.json"
"""The safetensors files in a directory with this file have real headers, but no tensor data (see `bricks.hub`)."""
FOLLOWS = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
STAYS = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")  # the second is the spelling of RippleEdits' README
PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT"}
"""Values of `peft_type` of learned prompts."""
LEARNED = "It learns tokens or states that stand before the text, so no change of weights is equivalent to it. Use it with PEFT at inference."
TOKENIZER_TOO = "A base also needs its tokenizer files: copy them to the same directory."
SAVED = re.compile(r"(?:checkpoint-|epoch_|global_step_?|iter_)(\d+)")
"""Name of a folder with one save of a training."""
SENTENCES = re.compile(r"sentence_\w+_config\.json|sentence_xlm-roberta_config\.json|config_sentence_transformers\.json")
"""Name of a file with settings of sentence-transformers."""
_LOAD = (
    'python -c "from transformers import {kind} as M{more}; M.from_pretrained({path!r}{options}){then}.save_pretrained({out!r})"'
)


def retyped(name: str) -> str | None:
    r"""Return what to type instead of a web address, a `file:` address or a Windows path; None for any other name.

    >>> retyped("https://huggingface.co/org/name/tree/v1")
    'org/name@v1'
    >>> retyped("models\\llama")
    'models/llama'
    """
    if match := re.fullmatch(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.+)|hf://(?:models/)?(.+)", name):
        parts = re.split(r"[?#]", match[1] or match[2])[0].strip("/").split("/")
        branch = parts[3] if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve") else "main"
        revision = "" if branch == "main" else f"@{branch}"
        return "/".join(parts[:2]) + revision if parts[0] not in ("datasets", "spaces") and len(parts) > 1 else None
    if name.startswith("file:"):
        return re.sub(r"%([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), re.sub(r"^file:(//(localhost)?)?", "", name))
    if match := re.fullmatch(r"([A-Za-z]):[\\/](.*)", name):  # the place of a Windows disk in WSL
        return f"/mnt/{match[1].lower()}/" + match[2].replace("\\", "/")
    return name.replace("\\", "/") if "\\" in name and not Path(name).exists() else None


def benchmark_of(row: Mapping[Any, Any]) -> str | None:
    """Return the published set of facts whose keys a row has; None for the project's own format, or an unknown one."""
    if isinstance(row.get("edit"), Mapping) and row.keys() & {*FOLLOWS, *STAYS}:
        return "rippleedits"
    if {"prompt", "target", "rephrase", "locality"} <= row.keys():
        return "qaedit"
    if {"question", "answer"} <= row.keys() and row.keys() & {"para_question", "sub_question", "category"}:
        return "unke" if row.keys() & {"para_question", "sub_question"} else "editeverything"
    if "target" in row and "target_new" not in row:
        return None
    if "requested_rewrite" in row:
        return "mquake" if isinstance(row["requested_rewrite"], list) else "counterfact"
    if {"src", "alt"} <= row.keys():
        return "wikibigedit" if {"personas", "mhop"} & row.keys() else "zsre"
    if {"update", "ans"} <= row.keys():
        return "wikibigedit"
    if {"text", "labels", "concept"} <= row.keys():
        return "knowedit"
    if not {"prompt", "target_new"} <= row.keys():
        return None
    if isinstance(row.get("portability"), Mapping) or isinstance(row.get("locality"), Mapping):
        return "knowedit"
    return "counterfact" if "ground_truth" in row or "case_id" in row else "wikibigedit"


def convert_command(path: Path, more: str = "", options: str = "", then: str = "") -> str:
    """Return the shell command that loads a model with transformers and saves it as safetensors.

    Args:
        path: The model's directory. For a directory with headers only, the command names the hub repository.
        more: Further names to import, with a comma in front.
        options: Further arguments of `from_pretrained`, with a comma in front.
        then: A method call between loading and saving.
    """
    if not more and (path / MODULES).is_file():
        code = f"from sentence_transformers import SentenceTransformer as M; M({str(path)!r}).save({f'{path}-safetensors'!r})"
        return shell("python", "-c", code)
    architectures = fields_of(path / CONFIG).get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    # AutoModelForCausalLM would ignore the towers of a multimodal model.
    whole = isinstance(first, str) and first.isidentifier() and "ForConditionalGeneration" in first
    if (path / HEADERS_ONLY).is_file():
        path = Path(str(fields_of(path / HEADERS_ONLY).get("repository", path)))
    kind = first if whole else "AutoModelForCausalLM"
    return _LOAD.format(kind=kind, path=str(path), out=f"{path}-safetensors", more=more, options=options, then=then)


def brick_name(path: Path) -> str:
    """Return a valid brick name made from a directory's name, or from its parent's for a name that many have."""
    path = path.resolve()
    named = path.parent if SAVED.fullmatch(path.name) or path.name in ("adapter", "model", "final", "output") else path
    return as_name(named.name) or "brick"


def as_name(text: str) -> str:
    """Return a text as the name of a recipe or a brick; "" if nothing of it can stand in one."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")


def fields_of(path: Path) -> dict[str, object]:
    """Return the fields of a JSON object; {} if the file is missing or damaged."""
    found: dict[str, object] = jsondoc.read_cached(path) or {}
    return found
