"""Configuration of the vLLM semantic router, from the cards of bricks and their calibration prompts.

The router stands before a vLLM server. It compares a request with example prompts of every brick, by embeddings, and sends it to the
adapter whose examples are nearest, or to the base. The file has the canonical form "v0.3" of the router's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import yamldoc
from workbench.bricks.card import read_card
from workbench.bricks.hub import CARD
from workbench.errors import UsageError, WorkbenchError
from workbench.files import write_text

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter

FILE = "router.yaml"
EXAMPLES = 16
"""Largest number of example prompts of a brick."""
THRESHOLD = 0.5
"""Least similarity to an example. It depends on the router's embedding model; a user calibrates it."""
_BASE = "base"
_HEAD = """# Configuration of the vLLM semantic router, canonical form v0.3. Check it: vllm-sr config validate --config router.yaml
# endpoint: the vLLM server of serve.sh, as the router's container sees it.
# threshold: least similarity to an example; calibrate it on your own requests, because it depends on the embedding model.
# A request that is near no brick goes to the base.
"""


@dataclass(frozen=True)
class RoutedAdapter:
    """The router's knowledge of an adapter.

    Attributes:
        name: Its name on the server.
        description: One line about its skill.
        examples: Prompts that it should answer; the description, if no others are known.
    """

    name: str
    description: str
    examples: tuple[str, ...]


def routed_adapters(
    adapters: Mapping[str, Adapter], described: Mapping[str, str], examples: Mapping[str, Sequence[str]]
) -> list[RoutedAdapter]:
    """Return the adapters with descriptions and example prompts.

    Args:
        adapters: Name -> files of an adapter.
        described: Name -> description in the route step, which takes precedence over the card's `skill`.
        examples: Name -> calibration prompts. Without any, the card's `prompt_format` and the description serve as examples.

    Raises:
        UsageError: If there are no adapters.
        WorkbenchError: If an adapter has no description, or two have the same examples.
    """
    if not adapters:
        raise UsageError(
            "--for semantic-router: a whole model has no adapters to choose from",
            "Export a recipe with --brick, or a routed configuration.",
        )
    if _BASE in adapters:
        raise UsageError(
            f"--for semantic-router: an adapter is named '{_BASE}', as is the route to the base",
            "Rename the brick in the recipe.",
        )
    found = []
    for name, adapter in adapters.items():
        place = adapter.path
        card = read_card(place) if (place / CARD).is_file() else None
        text = " ".join((described.get(name) or (card.skill if card else "")).split())
        if not text:
            raise WorkbenchError(
                f"brick '{name}': has no description, by which users of the semantic router know it",
                f"Add `skill: ONE LINE` to {place / CARD}"
                + ("." if card else ", or `description:` to the brick in a route step, and export that configuration."),
            )
        prompts = list(examples.get(name, ())) or [*([card.prompt_format] if card and card.prompt_format else []), text]
        found.append(RoutedAdapter(name, text, tuple(dict.fromkeys(prompts))[:EXAMPLES]))
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            if set(one.examples) == set(other.examples):
                raise WorkbenchError(
                    f"bricks '{one.name}' and '{other.name}' have the same example prompts, so the router cannot tell them apart",
                    "Give them descriptions or calibration prompts of their own.",
                )
    return found


def router_document(served: str, adapters: Sequence[RoutedAdapter], port: int) -> dict[str, Any]:
    """Return the configuration as plain data.

    Args:
        served: Name of the base on the server.
        adapters: Result of `routed_adapters`.
        port: Port of the server.

    Source: vllm-sr 0.4.0, schema router-config-v0.3; tutorials/signal/learned/embedding of its documentation.
    """
    backend = {"name": "primary", "provider": "vllm", "endpoint": f"host.docker.internal:{port}", "protocol": "http", "weight": 1}
    card = {"name": served, "loras": [{"name": one.name, "description": one.description} for one in adapters]}
    signals = [
        {"name": one.name, "threshold": THRESHOLD, "aggregation_method": "max", "candidates": list(one.examples)}
        for one in adapters
    ]
    decisions = [
        {
            "name": one.name,
            "description": one.description,
            "priority": 100,
            "rules": {"operator": "AND", "conditions": [{"type": "embedding", "name": one.name}]},
            "modelRefs": [{"model": served, "lora_name": one.name, "use_reasoning": False}],
        }
        for one in adapters
    ]
    fallback = {
        "name": _BASE,
        "description": "Requests that are near no brick.",
        "priority": 1,
        "rules": {"operator": "AND", "conditions": []},
        "modelRefs": [{"model": served, "use_reasoning": False}],
    }
    return {
        "version": "v0.3",
        "listeners": [{"name": "http-8899", "address": "0.0.0.0", "port": 8899, "timeout": "300s"}],  # noqa: S104  in its container
        "providers": {"defaults": {"model": served}, "models": [{"name": served, "backend_refs": [backend]}]},
        "routing": {"modelCards": [card], "signals": {"embeddings": signals}, "decisions": [*decisions, fallback]},
    }


def write_router_file(served: str, adapters: Sequence[RoutedAdapter], port: int, out: Path) -> None:
    """Write router.yaml, and read it back.

    Raises:
        WorkbenchError: If the file does not hold what was written.
    """
    document = router_document(served, adapters, port)
    write_text(out / FILE, _HEAD + yamldoc.dump(document))
    if yamldoc.load(out / FILE).data != document:
        raise WorkbenchError(
            f"{out / FILE}: a description or prompt cannot be written as YAML", "Remove control characters from it."
        )
