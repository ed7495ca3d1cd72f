"""Files that are not read here: the commands that turn quantised, pickled or GGUF models into safetensors."""

from __future__ import annotations

from pathlib import Path

from workbench import jsondoc

# Beside it, safetensors files are sparse: their headers are real, their tensors are not there (see hub.py).
STAND_IN = "headers-only.json"
_LOAD = (
    'python -c "from transformers import {kind} as M{more}; M.from_pretrained({path!r}{options}){then}.save_pretrained({out!r})"'
)
TOKENIZER_TOO = "A base needs its tokenizer files beside it: copy them too."
# Quantisations that transformers undoes while it loads; of the others only bitsandbytes can be undone afterwards.
_UNDONE_ON_LOAD = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "metal": "MetalConfig",
}


def convert_command(path: Path, more: str = "", options: str = "", then: str = "") -> str:
    """Return the shell command that loads a model with transformers and saves it as safetensors; of a stand-in, that of its repository."""
    kind = _saved_class(path)
    if is_stand_in(path):
        path = Path(str((jsondoc.kept(path / STAND_IN) or {}).get("repository", path)))
    return _LOAD.format(kind=kind, path=str(path), out=f"{path}-safetensors", more=more, options=options, then=then)


def _saved_class(path: Path) -> str:
    """Return the class that config.json names: AutoModelForCausalLM would leave out the towers of a multimodal model."""
    named = (jsondoc.kept(path / "config.json") or {}).get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if isinstance(first, str) and first.isidentifier() and "ForConditionalGeneration" in first:
        return first
    return "AutoModelForCausalLM"


def dequantise(method: str | None, path: Path) -> str:
    """Return the hint of an error about a quantised checkpoint."""
    if method in _UNDONE_ON_LOAD:
        kind = _UNDONE_ON_LOAD[method]
        options = f", dtype='bfloat16', quantization_config={kind}(dequantize=True)"
        return f"Dequantise it: {convert_command(path, f', {kind}', options)}  {TOKENIZER_TOO}"
    if method is not None and method.startswith("bitsandbytes"):
        return f"Dequantise it, where bitsandbytes runs: {convert_command(path, then='.dequantize()')}  {TOKENIZER_TOO}"
    return (
        "Use the model that it was quantised from (`base_model` in its README): transformers cannot undo this format exactly, "
        "and deltas would be taken from rounded weights."
    )


def is_stand_in(path: Path) -> bool:
    """Return whether the safetensors files of a directory have headers only."""
    return (path / STAND_IN).is_file()
