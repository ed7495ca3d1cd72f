"""Records of growth in words: the result of a check, the origin of the parts of a stack, and what pruning removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workbench.errors import size


def check_line(check: Mapping[str, Any]) -> str:
    """Return the result of a growth check in one line.

    Example: "259 old tensors are bit-identical, 54 new; logits differ by 0, cached generation agrees; transformers loads it".
    """
    counts = check.get("kept", {})
    words = {
        "identical": "old tensors are bit-identical",
        "with_additions": "with additions keep their old elements",
        "shortened": "shorter ones keep their other elements",
        "rescaled": "rescaled",
        "new": "new",
        "changed_later": "changed by later steps",
        "trained": "tensors trained",
    }
    parts = [", ".join(f"{counts[key]} {text}" for key, text in words.items() if counts.get(key))]
    if "max_logit_difference" in check:
        parts.append(
            f"logits differ by {check['max_logit_difference']:.2g}"
            + (", cached generation agrees" if check.get("same_generation") else "")
        )
    elif check.get("finite_logits"):
        parts.append("logits are finite")
    if waiting := check.get("at_first_without"):
        parts.append(
            f"{len(waiting)} of the new tensors ({waiting[0]}) have no gradient until the zeros that follow them are trained"
        )
    if share := check.get("new_token_probability"):
        parts.append(f"new tokens take {100 * share:.2g} % of the probability")
    parts += ["transformers loads it"] if check.get("reloaded") else []
    return "; ".join(filter(None, parts))


def stack_parts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (part of the result, its source) for a step's record or plan row.

    Example: ("layers 0-15", "brick one, layers 0-15"), ("layers 16-23", "ties of one 16-23, two 18-25 on base"), ("head", "brick two").

    Args:
        record: The row of a `grow: stack` step; other steps yield nothing.
    """
    for block in record.get("blocks", ()):
        layers = f"layer{'s' if '-' in block['layers'] else ''} {block['layers']}"
        if "merge" not in block:
            yield layers, f"{_named(block['source'])}, {_layers(block['from'])}"
            continue
        bricks = ", ".join(f"{name} {span}" for name, span in block["bricks"].items())
        yield layers, f"{block['merge']} of {bricks}; deltas from {block['base'] or 'the configuration so far'} {block['from']}"
    for part in ("embeddings", "norm", "head", "tokenizer"):
        source = record.get(part) if record.get("blocks") else None
        if isinstance(source, Mapping):
            yield part, f"{source['merge']} of {', '.join(source['bricks'])}"
        elif source:
            yield part, _named(source)


def removal_line(record: Mapping[str, Any]) -> str | None:
    """Return the sizes of a model before and after pruning, and what was removed, for a step's record or plan row.

    Example: "30 -> 22 layers, removed 12-17, 25-26 (influence 0.0231 to 0.027, the others 0.0271 to 1.01); 134.5 million -> 106.2 million
    parameters, 269 MB -> 212 MB".

    Args:
        record: The row of a `grow: prune` step; None is returned for other steps.
    """
    if record.get("grow") != "prune" or "parameters" not in record:
        return None
    parts = []
    measured = record.get("importance", {})
    if "layers" in record:
        text = "{} -> {} layers".format(*record["layers"])
        if gone := record.get("gone_layers"):
            text += f", removed {_spans(gone)}{_why(gone, measured)}"
        parts.append(text)
    for key, unit, kept in (
        ("neurons", "neurons a layer", "neurons_kept_strength"),
        ("key_value_heads", "key-value heads", "heads_kept_strength"),
    ):
        if key in record:
            shares = measured.get(kept)
            strength = f" with {100 * min(shares):.0f} to {100 * max(shares):.0f} % of their importance" if shares else ""
            parts.append("{} -> {} {}".format(*record[key], unit) + strength)
    if "hidden" in record:
        share = measured.get("channels_kept_strength")
        strength = "" if share is None else f" with {100 * share:.0f} % of their importance"
        parts.append("{} -> {} channels".format(*record["hidden"]) + strength)
    before, after = record["parameters"]
    parts.append(f"{_count(before)} -> {_count(after)} parameters, " + " -> ".join(map(size, record["bytes"])))
    return "; ".join(parts)


def _why(gone: Sequence[int], measured: Mapping[str, Any]) -> str:
    """Return the measured importance of removed layers in brackets, or an empty text for a list of layers."""
    if measured.get("by") == "influence":
        removed = [value for layer, value in enumerate(measured["influence"]) if layer in gone]
        others = [value for layer, value in enumerate(measured["influence"]) if layer not in gone]
        stays = "".join(f"; {layer} stays as the last layer with attention" for layer in measured.get("last_attention", ()))
        return f" (influence {min(removed):.3g} to {max(removed):.3g}, the others {min(others):.3g} to {max(others):.3g}{stays})"
    if measured.get("by") == "perplexity":
        order = ", ".join(map(str, measured["removed"]))
        return f" (in the order {order}; loss {measured['losses'][0]:.4g} -> {measured['losses'][-1]:.4g})"
    return ""


def _spans(numbers: Sequence[int]) -> str:
    """Return numbers in ascending order with ranges: "3, 12-17"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _count(number: int) -> str:
    """Return a number of parameters: "106 million"."""
    return f"{number / 1e6:,.4g} million" if number >= 1e6 else f"{number:,}"


def _layers(span: str) -> str:
    return f"layer{'s' if '-' in span else ''} {span}"


def _named(source: str) -> str:
    return source if " " in source else f"brick {source}"
