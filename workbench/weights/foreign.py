"""Commands that convert models to safetensors whose quantization, pickles or GGUF files the workbench does not read."""

from __future__ import annotations

from pathlib import Path

from workbench import jsondoc

# The safetensors files in a directory with this file have real headers, but no tensor data (see hub.py).
STAND_IN = "headers-only.json"
_LOAD = (
    'python -c "from transformers import {kind} as M{more}; M.from_pretrained({path!r}{options}){then}.save_pretrained({out!r})"'
)
TOKENIZER_TOO = "A base also needs its tokenizer files: copy them to the same directory."
# Quantizations that transformers can undo while it loads a model. Of the others, only bitsandbytes can be undone afterwards.
_UNDONE_ON_LOAD = {
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "metal": "MetalConfig",
}


def convert_command(path: Path, more: str = "", options: str = "", then: str = "") -> str:
    """Return the shell command that loads a model with transformers and saves it as safetensors.

    Args:
        path: The model's directory. For a directory with headers only, the command names the hub repository.
        more: Further names to import, with a comma in front.
        options: Further arguments of `from_pretrained`, with a comma in front.
        then: A method call between loading and saving.
    """
    kind = _saved_class(path)
    if is_stand_in(path):
        path = Path(str((jsondoc.read_cached(path / STAND_IN) or {}).get("repository", path)))
    return _LOAD.format(kind=kind, path=str(path), out=f"{path}-safetensors", more=more, options=options, then=then)


def _saved_class(path: Path) -> str:
    """Return the class that loads the whole model: AutoModelForCausalLM would ignore the towers of a multimodal model."""
    architectures = (jsondoc.read_cached(path / "config.json") or {}).get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(first, str) and first.isidentifier() and "ForConditionalGeneration" in first:
        return first
    return "AutoModelForCausalLM"


def dequantise(method: str | None, path: Path) -> str:
    """Return the hint for an error about a quantized checkpoint.

    Args:
        method: `quant_method` of config.json; None if unknown.
        path: The checkpoint's directory.
    """
    if method in _UNDONE_ON_LOAD:
        kind = _UNDONE_ON_LOAD[method]
        options = f", dtype='bfloat16', quantization_config={kind}(dequantize=True)"
        return f"Dequantize it: {convert_command(path, f', {kind}', options)}  {TOKENIZER_TOO}"
    if method is not None and method.startswith("bitsandbytes"):
        return f"Dequantize it on a machine that can run bitsandbytes: {convert_command(path, then='.dequantize()')}  {TOKENIZER_TOO}"
    return (
        "Use the model that it was quantized from (`base_model` in its README). transformers cannot undo this format exactly, "
        "so deltas would be taken from rounded weights."
    )


def is_stand_in(path: Path) -> bool:
    """Return whether the safetensors files of a directory have headers but no tensor data."""
    return (path / STAND_IN).is_file()
