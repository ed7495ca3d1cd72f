"""Files of a routed configuration for servers of plain LoRA, such as vLLM and SGLang.

adapters/NAME/        each brick as plain LoRA: one rank for all bricks and modules, padded with zeros, and the scaling in B
routing.json          the router, as `workbench run` wrote it
router.safetensors    the router's tensors, such as the statistics of each brick's prompts
manifest.json         what a front end reads first: the base, the rank, the bricks with their directories, and the router's files
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.keys import PREFIX
from workbench.adapters.read import CONFIG, WEIGHTS, Adapter
from workbench.errors import UsageError
from workbench.files import file_digest, publish, read_json, write_json
from workbench.run.routers import ADAPTERS, RECORD, TENSORS, SavedRouter, factors_of
from workbench.run.saved import MODEL, open_configuration
from workbench.run.saved import RECORD as CONFIGURATION
from workbench.weights.lowrank import Factors
from workbench.weights.saving import save_tensors
from workbench.weights.svd import padded

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.route.mixing.kernel import Pair

MANIFEST = "manifest.json"
FORMAT = 1
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts for --max-lora-rank."""
_SELECTING = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Fields of adapter_config.json that leave out modules which `target_modules` names."""


def write_served(configuration: Path, out: Path, *, served_base: str | None = None, rank: int | None = None) -> dict[str, Any]:
    """Write the files of a routed configuration that servers of plain LoRA load.

    Servers read one rank and one alpha from adapter_config.json: they ignore `rank_pattern` and `alpha_pattern`, and treat rsLoRA
    in different ways. So every update has the same rank here, alpha is the rank, and the scaling of the brick is part of B.

    Args:
        configuration: A configuration directory with a router.
        out: Directory to create.
        served_base: Name under which the server has the base, for `base_model_name_or_path` of each adapter; vLLM's resolver of
            adapters compares the two. Default: the base's name in the recipe.
        rank: Rank of every update. Default: the smallest of `SERVED_RANKS` that holds all bricks.

    Returns:
        The content of manifest.json.

    Raises:
        WorkbenchError: If the directory has no router, its files do not belong together, its base has changed, `out` exists, `rank`
            is smaller than a brick's, or the bricks act on a checkpoint of the configuration and `served_base` does not name it.
    """
    saved = SavedRouter(configuration)
    record, router = saved.record, saved.router
    resolved = open_configuration(configuration)
    if served_base is None and (configuration / MODEL).is_dir():
        raise UsageError(
            f"{configuration}: the bricks act on the checkpoint in {configuration / MODEL}, and not on its base alone",
            "Serve that checkpoint, and pass its name as `served_base`.",
        )
    if out.exists():
        raise UsageError(f"{out} exists already", "Choose a new directory.")
    assert resolved.router is not None
    places = resolved.router.adapters
    factors = factors_of(places)
    served_rank = _rank(factors, rank)
    base = served_base or _named_base(configuration)
    partial = out.with_name(f".{out.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows = []
    for row in record["bricks"]:
        name, folder = row["name"], partial / ADAPTERS / row["name"]
        _write_plain(folder, factors[name], Adapter(places[name], f"brick '{name}'"), served_rank, base)
        plain: dict[str, Any] = {
            "adapter": f"{ADAPTERS}/{name}",
            "file_digest": file_digest(folder / WEIGHTS),
            "modules": len(factors[name]),
        }
        said = {key: row[key] for key in ("digest", "description") if key in row}
        rows.append({"name": name, **plain, **said})
    for file in (RECORD, TENSORS):
        shutil.copyfile(configuration / file, partial / file)
    settings = router.settings()
    told: dict[str, Any] = {
        key: settings[key] for key in ("method", "layer", "window", "threshold", "ties", "mix") if key in settings
    }
    manifest = {
        "format": FORMAT,
        "base": base,
        "rank": served_rank,
        "bricks": rows,
        "router": {**told, "digest": saved.digest, "record": RECORD, "tensors": TENSORS},
    }
    write_json(partial / MANIFEST, manifest, indent=2)
    publish(partial, out)
    return manifest


def _named_base(configuration: Path) -> str:
    """Return the base's name in configuration.json, which `open_configuration` has read."""
    record = read_json(configuration / CONFIGURATION)
    assert record is not None
    return str(record["base"]["id"])


def _rank(factors: Mapping[str, Mapping[str, Pair]], rank: int | None) -> int:
    """Return the rank of every update.

    Args:
        factors: Brick -> module -> factors (A [rank, in], B [out, rank]).
        rank: The rank that the caller asks for.

    Raises:
        UsageError: If a brick has a larger one.
    """
    largest = {name: max((len(a) for a, _ in parts.values()), default=1) for name, parts in factors.items()}
    brick = max(largest, key=lambda name: largest[name])
    fitting = [served for served in SERVED_RANKS if served >= largest[brick]]
    if rank is None and fitting:
        return fitting[0]
    limit = SERVED_RANKS[-1] if rank is None else rank
    if largest[brick] > limit:
        raise UsageError(
            f"brick '{brick}' has rank {largest[brick]}, expected at most {limit}",
            f"Pass `rank={largest[brick]}` if the server takes it, or cut the brick with `output: {{form: adapter, rank: {limit}}}`.",
        )
    return limit


def _write_plain(folder: Path, parts: Mapping[str, Pair], adapter: Adapter, rank: int, base: str) -> None:
    """Write a brick as plain LoRA.

    Args:
        folder: Directory to create.
        parts: Module -> factors (A [rank, in], B [out, rank]), with the scaling in B.
        adapter: The brick.
        rank: Rank of every update.
        base: Value of `base_model_name_or_path`.
    """
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in sorted(parts.items()):
        update = padded(Factors(b, a), rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = update.right.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.left.contiguous()
    folder.mkdir(parents=True)
    save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": _targets(adapter, list(parts)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(adapter.config.get("fan_in_fan_out")),
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config, indent=2)


def _targets(adapter: Adapter, modules: list[str]) -> list[str]:
    """Return `target_modules`: the brick's own list if it alone selects the modules, else the modules' full names."""
    listed = adapter.config.get("target_modules")
    if isinstance(listed, list) and not any(adapter.config.get(field) is not None for field in _SELECTING):
        return sorted(map(str, listed))
    return sorted(modules)
