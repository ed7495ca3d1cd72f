"""`export`: the adapters of a run or recipe in the form that LoRA servers read, the command that serves them, and expected answers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.bind import bind
from workbench.adapters.gguf_lora import gguf_places, write_gguf
from workbench.adapters.linear import as_lora, linear_factors, not_linear, ranks_of
from workbench.adapters.read import Adapter
from workbench.adapters.served import served_rank, write_served
from workbench.bricks.hub import FETCH, Hub
from workbench.errors import UsageError, WorkbenchError, nearest, shell
from workbench.events import Events, no_events
from workbench.files import new_directory, write_json, write_text
from workbench.lazy import torch
from workbench.manifest import require_whole
from workbench.models.texts import read_prompts
from workbench.models.tokenizer import load_tokenizer
from workbench.project import find_project
from workbench.recipe.recipe import Recipe, from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.run.directory import RECORD as RUN
from workbench.run.directory import RunDirectory
from workbench.run.materialize import materialize
from workbench.run.routers import RECORD as ROUTER
from workbench.run.routers import TENSORS as STATISTICS
from workbench.run.routers import SavedRouter
from workbench.run.saved import open_configuration
from workbench.ship.expected import Expected, alike, expect, rounding, tolerance_for, write_expected
from workbench.ship.servers import (
    EXAMPLES,
    GGUF,
    PORTS,
    SCRIPT,
    SERVERS,
    Serving,
    adapter_path,
    convert,
    request_fields,
    request_name,
    routed_adapters,
    script,
    write_router_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "export.json"
PROMPTS = ("The capital of France is", "Once upon a time", "12 + 30 =", "def add(a, b):")
"""Prompts of expected.jsonl where no others are named."""
_NAME = re.compile(r"[A-Za-z0-9_][\w./:-]*")


@dataclass(frozen=True)
class Subject:
    """What a server is to serve.

    Attributes:
        name: Name of the recipe or run.
        model: The base, or the whole model, as a recipe without bricks.
        adapters: Adapter -> its files; empty for a whole model.
        place: Directory of a whole model; None if adapters act on a base.
        base: The base as the recipe names it.
        prompts: Calibration prompts of a router, if their files are still there.
        router: Directory with the files of a router; None if there is none.
        described: Adapter -> its description in the route step, for adapters that have one.
        examples: Adapter -> some of its calibration prompts, if their files are still there.
    """

    name: str
    model: Resolved
    adapters: Mapping[str, Adapter]
    place: Path | None
    base: str
    prompts: tuple[str, ...] = ()
    router: Path | None = None
    described: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)


def of_recipe(recipe: Recipe, names: Sequence[str], hub: Hub = FETCH) -> Subject:
    """Return the adapters among a recipe's bricks, or the named ones.

    Raises:
        WorkbenchError: If a name is no brick of the recipe, a brick is no adapter, or there is none.
    """
    known = list(recipe.fields.bricks)
    for name in names:
        if name not in known:
            raise UsageError(f"--brick {name}: {recipe.name} has no such brick. {nearest(name, known)}")
    base = recipe.fields.base
    if not isinstance(base, str):
        raise WorkbenchError(
            f"{recipe.name}: its base is {base}, but a server loads a base from files",
            "Run a recipe with this base and no steps, and use the result's directory as the base.",
        )
    resolved = resolve(recipe, hub)
    chosen = names or list(resolved.parents) or known
    other = [name for name in chosen if name not in resolved.adapters]
    if other or not chosen:
        what = f"brick '{other[0]}' is no adapter" if other else "it has no bricks"
        raise WorkbenchError(
            f"{recipe.name}: {what}, but a LoRA server serves adapters of one base",
            f"Choose bricks with --brick NAME; `workbench brick extract DIR --base {shell(base)} -o DIR` makes an adapter "
            "of a checkpoint. `workbench run` writes the result of a recipe, and `workbench export RUN` exports it.",
        )
    adapters = {name: resolved.adapters[name] for name in chosen}
    return Subject(recipe.name, _bare(base, recipe.project, hub), adapters, None, base)


def of_configuration(path: Path, hub: Hub = FETCH) -> Subject:
    """Return the bricks of a routed configuration directory.

    Raises:
        WorkbenchError: If it has a memory instead of a router, its bricks act by tokens, or its files do not belong together.
    """
    require_whole(path.resolve(), digests=True)
    whole = open_configuration(path.resolve(), None, hub)
    if whole.router is None:
        raise WorkbenchError(
            f"{path}: has a memory, which acts beside the weights in Python; servers have no place for it",
            "Score it with `workbench eval`, or use an edit method that changes weights, such as `edit: memit`.",
        )
    saved = SavedRouter(whole.router.path)
    if hasattr(saved.router, "token_weights"):
        raise WorkbenchError(
            f"{path}: its bricks act on the tokens of their roles, but a server applies one adapter to all tokens of a request",
            "Use it with `workbench.load(DIR)`, `workbench chat` and `workbench eval`, or export a merge of the bricks.",
        )
    adapters = {name: Adapter(place, f"brick '{name}'") for name, place in whole.router.adapters.items()}
    examples: dict[str, list[str]] = {}
    for row in saved.record["calibration"]:
        for name in row.get("files", [row.get("file")]):
            file = find_project(path.resolve() / RUN) / str(name)
            if file.is_file():
                examples.setdefault(row["name"], []).extend(read_prompts(file, str(name), EXAMPLES))
    model = replace(whole, router=None)
    return Subject(
        whole.recipe.name,
        model,
        adapters,
        None,
        model.recipe.fields.base_name,
        tuple(prompts[0] for prompts in examples.values()),
        whole.router.path,
        {row["name"]: str(row["description"]) for row in saved.record["bricks"] if "description" in row},
        examples,
    )


def of_run(run: RunDirectory, hub: Hub = FETCH) -> Subject:
    """Return the result of a finished run: a routed configuration, an adapter on its base, or a whole model.

    Raises:
        WorkbenchError: If the run is not finished, a file is not as the run wrote it, or its base cannot be found.
    """
    run.require_whole(hub.events)
    if run.configuration.is_dir():
        return of_configuration(run.configuration, hub)
    record, project = run.record, find_project(run.path / RUN)
    # Requests and folders name the result, so the brackets of a point's name cannot stay.
    name = re.sub(r"[^\w.-]+", "-", str(record.get("name", run.name))).strip("-")
    base = record["inputs"]["base"]
    if not run.adapter.is_dir():
        return replace(of_model(run.model, project, hub), name=name)
    require_whole(run.adapter, digests=True)
    at = base["id"] if not base.get("revision") or "@" in base["id"] else f"{base['id']}@{base['revision']}"
    return Subject(name, _bare(at, project, hub), {name: Adapter(run.adapter, f"adapter '{name}'")}, None, base["id"])


def of_model(path: Path, project: Path, hub: Hub = FETCH) -> Subject:
    """Return a model directory as a whole model."""
    place = path.resolve()
    require_whole(place, digests=True)
    return Subject(place.name, _bare(str(place), project, hub), {}, place, str(path))


def _bare(base: str, project: Path, hub: Hub) -> Resolved:
    return resolve(from_data({"version": 1, "name": "served", "base": base, "steps": []}, project), hub)


@dataclass(frozen=True)
class Export:
    """How a subject is exported.

    Attributes:
        server: One of `servers.SERVERS`.
        served: Name of the base on the server, or of the whole model.
        prompts: Prompts of expected.jsonl.
        length: Largest number of tokens of an expected answer.
        llama_cpp: Directory of llama.cpp, whose converter writes the base or the whole model as GGUF; None leaves that to the user.
    """

    server: str
    served: str
    prompts: tuple[str, ...]
    length: int
    llama_cpp: Path | None = None


def check_export(subject: Subject, server: str, served: str | None) -> str:
    """Check a subject before any model is loaded, and return the name of the base on the server.

    Args:
        subject: The subject.
        server: The server that it is exported for.
        served: Value of `--served-base`.

    Raises:
        UsageError: If the server is unknown, or `served` is missing or cannot be a name in a request.
        WorkbenchError: If an adapter has parts that servers do not read, or too large a rank.
    """
    check_server(server)
    if subject.adapters and subject.model.checkpoint.packed:
        raise WorkbenchError(
            f"{subject.name}: its base {subject.base} stores weights in fewer bits, or in a GGUF file, so a server would answer otherwise than "
            "the adapters were made for",
            "Run a recipe with this base and no steps, and use the result's directory as the base.",
        )
    if served is None and subject.adapters and server == "llama.cpp":  # its adapters name no base
        served = Path(subject.base).name if Path(subject.base).is_dir() else subject.base
    if served is None and subject.adapters:
        raise UsageError(
            "--served-base is missing: the adapters name the base that the server is started with, and a server that has another name "
            "for it does not find them",
            f"--served-base NAME, such as the hub id of the base ({subject.base}).",
        )
    if served is not None and not subject.adapters:
        raise UsageError(
            f"--served-base {served}: {subject.name} is a whole model, which has no adapters to serve beside a base",
            "Leave --served-base out: the model is served by its own name. `output: {form: adapter}` in the recipe makes an adapter of it.",
        )
    name = subject.name if served is None else served
    if not _NAME.fullmatch(name):
        raise UsageError(f"--served-base {name!r}: expected a hub id, a directory on the server, or a name")
    if server == "sglang" and subject.adapters and ":" in name:
        raise UsageError(f"--served-base {name}: SGLang separates base and adapter by ':' in requests, so the name may have none")
    if name in subject.adapters:
        raise UsageError(f"--served-base {name}: an adapter has the same name", "Name the base differently.")
    if server == "semantic-router":
        routed_adapters(subject.adapters, subject.described, subject.examples)
    for adapter, files in subject.adapters.items():
        _check_adapter(adapter, files, subject, server)
    if subject.adapters and server != "llama.cpp":
        served_rank(rank for files in subject.adapters.values() for rank in ranks_of(files).values())
    return name


def check_server(server: str) -> None:
    """Check the value of `--for`.

    Raises:
        UsageError: If there is no export for this server.
    """
    if server not in SERVERS:
        raise UsageError(f"--for {server}: unknown server. {nearest(server, SERVERS)}", f"Use one of {', '.join(SERVERS)}.")


def _check_adapter(name: str, adapter: Adapter, subject: Subject, server: str) -> None:
    base = subject.model.plain
    bound = bind(adapter, base.weights.specs, base)
    if found := not_linear(adapter, bound):
        raise WorkbenchError(
            f"adapter '{name}' has {found}, which LoRA servers ignore or refuse",
            f"Turn it into plain LoRA, which is as near to it as its rank allows: {as_lora(name, str(adapter.path))} Or merge it into the "
            "base with `workbench run`, and export the run as a whole model.",
        )
    if server == "llama.cpp":
        gguf_places(bound, base, f"adapter '{name}'")


def write_export(
    subject: Subject, export: Export, out: Path, device: torch.device, events: Events = no_events
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Write a directory with plain adapters, serve.sh, expected.jsonl and export.json, and the files of a router.

    Args:
        subject: A subject that `check_export` accepts.
        export: How it is exported.
        out: New directory, written whole or not at all.
        device: Device that computes the expected answers.
        events: Receives progress.

    Returns:
        The content of export.json, and pairs of models that the prompts do not tell apart.
    """
    with new_directory(out) as partial:
        adapters, rank = _write_adapters(subject, export, partial)
        if subject.router is not None:
            for file in (ROUTER, STATISTICS):
                shutil.copyfile(subject.router / file, partial / file)
        rows, dtype, largest = _expected(subject, export, device, events)
        write_expected(rows, partial)
        if export.server == "semantic-router":
            routed = routed_adapters(subject.adapters, subject.described, subject.examples)
            write_router_file(export.served, routed, PORTS[export.server], partial)
        if export.llama_cpp is not None:
            convert(export.llama_cpp, subject.model.base_path, dtype, partial / GGUF, events)
        record: dict[str, Any] = {
            "version": 1,
            "name": subject.name,
            "for": export.server,
            "served_base": export.served,
            "base_digest": subject.model.base_digest,
            "dtype": dtype,
            "rank": rank,
            "adapters": adapters,
            "prompts": len(export.prompts),
            "length": export.length,
            "rounding": round(largest, 6),
            "tolerance": tolerance_for(largest),
        }
        write_json(partial / RECORD, record, indent=2)
        place, base = subject.place, str(subject.model.base_path)
        serving = Serving(export.server, subject.name, export.served, place, base, list(adapters), rank, dtype)
        write_text(partial / SCRIPT, script(serving, out))
        (partial / SCRIPT).chmod(0o755)
    return record, alike(rows, record["tolerance"])


def _write_adapters(subject: Subject, export: Export, out: Path) -> tuple[dict[str, Any], int | None]:
    """Write all adapters of a subject; return adapter -> its record, and the largest rank, None without adapters."""
    ranks = {name: sorted(set(ranks_of(adapter).values())) for name, adapter in subject.adapters.items()}
    largest = max((max(found) for found in ranks.values()), default=None)
    if largest is None:
        return {}, None
    gguf, base = export.server == "llama.cpp", subject.model.plain
    rank = largest if gguf else served_rank([largest])
    adapters = {}
    for name, adapter in subject.adapters.items():
        place = adapter_path(export.server, name)
        if gguf:
            bound = bind(adapter, base.weights.specs, base)
            written = write_gguf(bound, gguf_places(bound, base, f"adapter '{name}'"), base.config, out / place, name)
        else:
            written = write_served(adapter, out / place, export.served, rank)
        adapters[name] = {"path": place, **written, "ranks": ranks[name]}
    return adapters, rank


def _expected(subject: Subject, export: Export, device: torch.device, events: Events) -> tuple[list[Expected], str, float]:
    """Return the expected answers of a live float32 model, the dtype of its files, and what rounding to that dtype changes."""
    tokenizer = load_tokenizer(subject.model.tokenizer_path)
    live = materialize(subject.model, device, events=events)
    dtype = live.dtype
    live.float()
    factors = {name: linear_factors(adapter) for name, adapter in subject.adapters.items()}
    if factors:
        _attach(live, tokenizer, factors)
    names: dict[str | None, str] = {None: export.served}
    names |= {name: request_name(export.server, export.served, name) for name in factors}
    total, rows = len(names) * len(export.prompts), []
    requests = request_fields(export.server, list(factors))
    for row in expect(live, tokenizer, names, export.prompts, export.length):
        rows.append(replace(row, request=requests.get(row.adapter, {})))
        events({"stage": "expect", "done": len(rows), "total": total, "text": f"answers of {len(names)} models"})
    return rows, str(dtype).removeprefix("torch."), 0.0 if dtype == torch.float32 else rounding(live.to(dtype), rows)


def _attach(live: PreTrainedModel, tokenizer: Any, factors: Mapping[str, Any]) -> None:
    """Let the adapters act beside the weights, as they do on a server; which one acts is set for each answer."""
    from workbench.route.fixed import FixedRouter
    from workbench.route.mixing.live import attach

    attach(live, tokenizer, FixedRouter(tuple(factors), weights=torch.ones(len(factors))), factors)
