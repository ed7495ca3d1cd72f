"""The Python calls that load a result, as they are printed after a run."""

from __future__ import annotations

import json
from pathlib import Path

from workbench.models.sentences import sentence_class
from workbench.weights.checkpoint import Checkpoint, read_config

_TEXT = "AutoModelForCausalLM"


def load_hint(model: str) -> str:
    """Return the line with the Python call that loads a checkpoint directory."""
    if kind := sentence_class(Path(model)):
        return f'load:   {kind}("{model}")'
    return f'load:   {_loading_class(Path(model))}.from_pretrained("{model}")'


def adapter_hints(base: str, adapter: str, base_path: str) -> list[str]:
    """Return the lines on loading an adapter: the Python call, and a note if the base has more parts than the text decoder.

    Args:
        base: The base as the user names it.
        adapter: Directory of the adapter.
        base_path: Directory or hub id of the base.
    """
    from workbench.bricks.locate import locate

    place = locate(base_path, Path.cwd(), "base")[0]
    if Checkpoint(place, "base").packed:
        return [
            f"The adapter changes {base} as it is read here, without quantization. To load it with PEFT, first run a recipe with this base and "
            "no steps: its result is the base in safetensors."
        ]
    whole = _loading_class(place)
    loaded = whole if whole != _TEXT and _names_the_whole(Path(adapter), place) else _TEXT
    lines = [f'load:   PeftModel.from_pretrained({loaded}.from_pretrained("{base}"), "{adapter}")']
    if whole != loaded:
        lines.append(f"        (the adapter names modules of the text decoder; {whole} loads the whole base)")
    return lines


def _names_the_whole(adapter: Path, base: Path) -> bool:
    """Return True if all modules of an adapter have the names that they have in the base's own class."""
    from workbench.adapters.read import Adapter
    from workbench.models.skeleton import skeleton

    named = {part.module for part in Adapter(adapter, "the adapter").keys.parts}
    whole = skeleton(json.dumps(read_config(base, str(base))))
    return named <= {name for name, _ in (*whole.named_modules(), *whole.named_parameters())}


def _loading_class(model: Path) -> str:
    """Return the transformers class that loads all parts of a model directory."""
    from workbench.models.skeleton import loading_class

    return loading_class(read_config(model, str(model)))
