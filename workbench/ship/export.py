"""`export`: the adapters of a run or recipe in the form that LoRA servers read, the command that serves them, and expected answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workbench.adapters.bind import bind
from workbench.adapters.linear import (
    as_lora,
    gguf_places,
    linear_factors,
    not_linear,
    ranks_of,
    served_rank,
    write_gguf,
    write_served,
)
from workbench.adapters.read import Adapter
from workbench.ground.errors import UsageError, WorkbenchError, nearest
from workbench.ground.events import Events, no_events
from workbench.ground.files import new_directory, write_bytes, write_json, write_text
from workbench.ground.lazy import torch
from workbench.ground.project import find_project
from workbench.ground.results import JsonObject, Number, Result
from workbench.models.prompts import load_tokenizer
from workbench.run.materialize import materialize
from workbench.run.routers import RECORD as ROUTER
from workbench.run.routers import SavedRouter
from workbench.ship.expected import Expected, alike, expect, rounding, tolerance_for, write_expected
from workbench.ship.outward import Outward, content_of
from workbench.ship.servers import (
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
from workbench.ship.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.route.mixing.kernel import Pair

RECORD = "export.json"
PROMPTS = ("The capital of France is", "Once upon a time", "12 + 30 =", "def add(a, b):")
"""Prompts of expected.jsonl where no others are named."""
_NAME = re.compile(r"[A-Za-z0-9_][\w./:-]*")


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


class ExportedAdapter(JsonObject):
    """An adapter of an export."""

    path: str
    """Directory, or GGUF file, of the adapter in the export."""
    modules: int
    """Number of modules that it updates."""
    ranks: list[int]
    """Ranks of the modules before they were padded."""
    bytes: int
    """Size of its file in bytes."""


class Exported(Result):
    """The content of an export's export.json, and its directory."""

    version: Literal[1] = 1
    """Version of the format."""
    directory: str
    """Directory of the export."""
    name: str
    """Name of the recipe or run."""
    server: str = Field(alias="for")
    """Server: vllm, sglang, llama.cpp or semantic-router."""
    served_base: str
    """Name of the base, or of the whole model, on the server."""
    base_digest: str
    """Digest of the base, or of the whole model."""
    dtype: str
    """Data type that the server computes in."""
    rank: int | None
    """Rank of all adapters, for llama.cpp the largest one; null for a whole model."""
    adapters: dict[str, ExportedAdapter]
    """Adapter -> its files; empty for a whole model."""
    prompts: int
    """Number of prompts; expected.jsonl has one row for each model and prompt."""
    length: int
    """Largest number of tokens of an expected answer."""
    rounding: Number
    """Largest change of an expected log-probability, in nats, in a model that is rounded to `dtype`."""
    tolerance: Number
    """Largest difference of a log-probability that `export check` accepts, in nats."""
    alike: list[list[str]]
    """Pairs of models that the prompts do not tell apart."""


def check_export(subject: Subject, server: str, served: str | None) -> str:
    """Check a subject before any model is loaded, and return the name of the base on the server.

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
    """Check the value of `--for`."""
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


def write_export(subject: Subject, export: Export, out: Path, device: torch.device, events: Events = no_events) -> Exported:
    """Write a directory with plain adapters, serve.sh, expected.jsonl and export.json, and the files of a router."""
    with new_directory(out) as partial:
        adapters, rank = _write_adapters(subject, export, partial)
        if subject.router is not None:
            outward = Outward(find_project(subject.router / ROUTER), {})
            for file in (ROUTER, SavedRouter(subject.router).record.file):
                write_bytes(partial / file, content_of(outward.sent(file, subject.router / file)))
        rows, dtype, largest = _expected(subject, export, device, events)
        write_expected(rows, partial)
        if export.server == "semantic-router":
            routed = routed_adapters(subject.adapters, subject.described, subject.examples)
            write_router_file(export.served, routed, PORTS[export.server], partial)
        if export.llama_cpp is not None:
            convert(export.llama_cpp, subject.model.base_path, dtype, partial / GGUF, events)
        tolerance = tolerance_for(largest)
        written = Exported.model_validate(
            {
                "directory": str(out),
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
                "tolerance": tolerance,
                "alike": alike(rows, tolerance),
            }
        )
        # The directory can be moved, and the pairs follow from expected.jsonl.
        record = {key: value for key, value in written.to_dict().items() if key not in ("directory", "alike")}
        write_json(partial / RECORD, record, indent=2)
        serving = Serving(export.server, subject.name, export.served, subject.place, list(adapters), rank, dtype)
        write_text(partial / SCRIPT, script(serving, out))
        (partial / SCRIPT).chmod(0o755)
    return written


def _write_adapters(subject: Subject, export: Export, out: Path) -> tuple[dict[str, ExportedAdapter], int | None]:
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
        adapters[name] = ExportedAdapter(path=place, ranks=ranks[name], **written)
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
        rows.append(row.model_copy(update={"request": requests.get(row.adapter, {})}))
        events({"stage": "expect", "done": len(rows), "total": total, "text": f"answers of {len(names)} models"})
    return rows, str(dtype).removeprefix("torch."), 0.0 if dtype == torch.float32 else rounding(live.to(dtype), rows)


def _attach(live: PreTrainedModel, tokenizer: Any, factors: Mapping[str, Mapping[str, Pair]]) -> None:
    """Let the adapters act beside the weights, as they do on a server; which one acts is set for each answer."""
    from workbench.route.fixed import FixedRouter
    from workbench.route.mixing.live import attach

    attach(live, tokenizer, FixedRouter(tuple(factors), weights=torch.ones(len(factors))), factors)
