"""Dictionaries of a model's activations, read from the two layouts in which they are published as safetensors.

| layout | files | read like |
| --- | --- | --- |
| SAELens | cfg.json, sae_weights.safetensors | sae-lens 3.22.2, 4.4.5, 5.11.0 and 6.54.12 |
| sparsify | layers.5.mlp/cfg.json, layers.5.mlp/sae.safetensors | eai-sparsify 1.3.3 |

Autoencoders of SAELens are standard, topk or jumprelu; batchtopk and matryoshka ones are saved as jumprelu. Transcoders are plain, with a skip
connection, with JumpReLU, or both; those of sparsify are topk. Neither layout proves on which model's weights a dictionary was trained.
circuit-tracer 0.5.0 has a layout of its own (config.yaml, layer_N.safetensors), which is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.activations.sets import read_pair
from workbench.ground.errors import WorkbenchError, nearest, shell
from workbench.ground.jsondoc import as_object, kind
from workbench.neurons.sparse_coder import PRE_GAIN, Activation, Dictionary, Normalization, Place

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dictionary", "read_dictionary"]

CONFIG, SAELENS, SPARSIFY = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
_HOOKS: dict[str, Place] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "mlp.hook_in": "mlp_in",
    PRE_GAIN: "mlp_in",
    "hook_mlp_out": "mlp_out",
}
_ARCHITECTURES: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_NORMALIZATIONS: tuple[Normalization, ...] = ("none", "layer_norm", "expected_average_only_in")
_LAYOUTS = (
    f"A dictionary is a folder with {CONFIG} and {SAELENS} (SAELens: `sae.save_model(FOLDER)`), or with {CONFIG} and {SPARSIFY} "
    "(sparsify: `sae.save_to_disk('layers.5.mlp')`)."
)


def read_dictionary(folder: Path) -> Dictionary:
    """Read a sparse autoencoder or a transcoder in float32.

    Args:
        folder: Its folder. In sparsify's layout the folder's name says the layer: layers.5.mlp, layers.5 or h.5.mlp.

    Raises:
        WorkbenchError: If a file is missing or damaged, a tensor is missing or has another shape, or the dictionary has an architecture,
            activation, normalization or place that is not supported.
    """
    for file, read in ((SAELENS, _saelens), (SPARSIFY, _sparsify)):
        if (folder / file).is_file() and (folder / CONFIG).is_file():
            config, tensors = read_pair(folder, CONFIG, file, str(folder), "Download or save the dictionary again.")
            return read(folder, config, _Tensors(f"{folder}/{file}", tensors))
    there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    raise WorkbenchError(
        f"{folder}: no dictionary; found {', '.join(there) or 'no files'}, expected {CONFIG} and its tensors", _LAYOUTS
    )


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file, which are taken out one by one."""

    file: str
    left: dict[str, Tensor]

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor in float32; None in `shape` takes any size."""
        expected = " × ".join("n" if n is None else str(n) for n in shape)
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise WorkbenchError(
                f"{self.file}: no tensor {name}, expected one of shape {expected}", f"The file has {', '.join(self.left)}."
            )
        if tensor.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
            raise WorkbenchError(
                f"{self.file}: {name} has shape {' × '.join(map(str, tensor.shape))}, expected {expected}",
                "Save the dictionary again.",
            )
        full = tensor.float().contiguous()
        if not (tensor.is_floating_point() and full.numel() and full.isfinite().all()):
            raise WorkbenchError(f"{self.file}: {name} is empty or not all finite numbers", "Save the dictionary again.")
        return full

    def done(self) -> None:
        """Refuse tensors that are left: the features would be computed without them."""
        if self.left:
            raise WorkbenchError(
                f"{self.file}: the tensors {', '.join(sorted(self.left))} are not read by this kind of dictionary",
                "A dictionary saved for training may have more tensors: save it for inference.",
            )


def _saelens(folder: Path, config: Mapping[str, object], tensors: _Tensors) -> Dictionary:
    """Read SAELens' layout; version 6 nests what says where the dictionary belongs below `metadata`."""
    file = f"{folder}/{CONFIG}"
    place, options = {**config, **_part(config, "metadata", file)}, _part(config, "activation_fn_kwargs", file)
    name = str(config.get("architecture", "standard"))
    function = config.get("activation_fn", config.get("activation_fn_str")) or "relu"
    name = "topk" if (name, function) == ("standard", "topk") else name  # versions 3 to 5
    if name not in _ARCHITECTURES:
        raise WorkbenchError(f"{file}: architecture {name!r} is not supported", nearest(name, _ARCHITECTURES))
    if function != "relu" and (name, function) != ("topk", "topk"):
        raise WorkbenchError(f"{file}: activation_fn {function!r} is not supported; expected 'relu' or 'topk'", None)
    transcodes = name.endswith("transcoder")
    hook = place.get("hook_name", place.get("hook_point"))
    layer, reads = _hook(hook, "hook_name", file)
    layer_out, writes = _hook(place.get("hook_name_out"), "hook_name_out", file) if transcodes else (layer, reads)
    if layer_out != layer:
        found = f"reads layer {layer} and writes layer {layer_out}"
        raise WorkbenchError(f"{file}: {found}; expected one layer", "Take a transcoder of one layer.")
    encoder = tensors.take("W_enc", None, None).T.contiguous()
    count, inputs = encoder.shape
    decoder = tensors.take("W_dec", count, None if transcodes else inputs)
    bias, offset = tensors.take("b_enc", count), tensors.take("b_dec", decoder.shape[1])
    _agrees(config, {"d_in": inputs, "d_sae": count, **({"d_out": decoder.shape[1]} if transcodes else {})}, file)
    for factor in {"scaling_factor", "finetuning_scaling_factor"} & set(tensors.left):  # of the features, before they are decoded
        factors = tensors.take(factor, count)
        if not config.get("finetuning_scaling_factor") and not factors.allclose(factors.new_ones(count)):
            raise WorkbenchError(f"{file}: finetuning_scaling_factor is not true, but the file has factors that are not 1", None)
        decoder = factors[:, None] * decoder
    if name == "topk" and config.get("rescale_acts_by_decoder_norm"):  # features are chosen as if decoders had norm 1
        norms = decoder.norm(dim=1).clamp_min(1e-30)
        encoder, bias, decoder = encoder * norms[:, None], bias * norms, decoder / norms[:, None]
    dictionary = Dictionary(
        *(str(folder), "saelens", layer, str(hook), reads, writes),
        *(encoder, bias, decoder, offset, _ARCHITECTURES[name], _normalization(config, place, file)),
        k=_k(config.get("k", options.get("k")), count, file) if name == "topk" else None,
        threshold=tensors.take("threshold", count) if name.startswith("jumprelu") else None,
        skip=tensors.take("W_skip", decoder.shape[1], inputs) if "skip" in name else None,
        centers=not transcodes and bool(config.get("apply_b_dec_to_input", True)),
    )
    tensors.done()
    return dictionary


def _normalization(config: Mapping[str, object], place: Mapping[str, object], file: str) -> Normalization:
    """Return the normalization; refuse inputs that the live model does not have."""
    given = config.get("normalize_activations") or "none"
    given = "expected_average_only_in" if given is True else given  # before version 3
    if given not in _NORMALIZATIONS:
        raise WorkbenchError(f"{file}: normalize_activations {given!r} is not supported", nearest(str(given), _NORMALIZATIONS))
    loaded = _part(place, "model_from_pretrained_kwargs", file)
    if changed := [key for key in ("fold_ln", "center_writing_weights") if loaded.get(key)]:
        raise WorkbenchError(
            f"{file}: trained on weights that TransformerLens had changed ({', '.join(changed)}), which this model does not have",
            "Take a dictionary of the model as it is.",
        )
    if place.get("hook_head_index") is not None or config.get("reshape_activations") not in (None, "none"):
        raise WorkbenchError(f"{file}: a dictionary of attention heads is not supported", "Take one of the residual stream.")
    return next(name for name in _NORMALIZATIONS if name == given)


def _part(config: Mapping[str, object], key: str, file: str) -> Mapping[str, object]:
    """Return an object within the configuration; empty if it is missing or null."""
    return as_object(config.get(key) or {}, f"{file}: {key}", "Download the file again.")


def _sparsify(folder: Path, config: Mapping[str, object], tensors: _Tensors) -> Dictionary:
    """Read sparsify's layout, whose folder is named like the module that the dictionary belongs to."""
    file, transcodes = f"{folder}/{CONFIG}", bool(config.get("transcode"))
    named = folder.resolve().parent if re.fullmatch(r"seed\d+", folder.resolve().name) else folder.resolve()
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})(\.mlp)?", named.name)
    if not found or (transcodes and not found[2]):
        raise WorkbenchError(
            f"{folder}: the folder's name says no place; expected layers.5.mlp{'' if transcodes else ', or layers.5 for the residual stream'}",
            f"Rename it after its layer: {shell('mv', folder, folder.parent / 'layers.5.mlp')}",
        )
    if (activation := config.get("activation", "topk")) != "topk" or config.get("signed"):
        what = f"activation {activation!r}" if activation != "topk" else "signed: true"
        raise WorkbenchError(f"{file}: {what} is not supported; expected the activation 'topk' without signs", None)
    encoder = tensors.take("encoder.weight", None, None)
    count, inputs = encoder.shape
    bias, decoder = tensors.take("encoder.bias", count), tensors.take("W_dec", count, inputs)
    offset = tensors.take("b_dec", inputs)
    wanted = {"d_in": inputs} | ({"num_latents": count} if config.get("num_latents") else {"expansion_factor": count // inputs})
    _agrees(config, wanted, file)
    writes: Place = "mlp_out" if found[2] else "resid_post"
    dictionary = Dictionary(
        *(str(folder), "sparsify", int(found[1]), named.name, "mlp_in" if transcodes else writes, writes),
        *(encoder, bias, decoder, offset, "topk"),
        k=_k(config.get("k"), count, file),
        skip=tensors.take("W_skip", inputs, inputs) if "W_skip" in tensors.left else None,
        centers=not transcodes,
    )
    tensors.done()
    return dictionary


def _hook(value: object, field: str, file: str) -> tuple[int, Place]:
    """Return layer and place of a hook of TransformerLens."""
    found = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", value) if isinstance(value, str) else None
    if not found or found[2] not in _HOOKS:
        what = repr(value) if isinstance(value, str) else kind(value)
        raise WorkbenchError(
            f"{file}: {field} is {what}, which is not supported", f"Supported: blocks.5.{', blocks.5.'.join(_HOOKS)}."
        )
    return int(found[1]), _HOOKS[found[2]]


def _agrees(config: Mapping[str, object], sizes: Mapping[str, int], file: str) -> None:
    """Refuse a configuration that states other sizes than the tensors have."""
    for key, size in sizes.items():
        if key in config and config[key] != size:
            raise WorkbenchError(f"{file}: {key} is {config[key]!r}, but the tensors have {size}", "Download both files again.")


def _k(value: object, count: int, file: str) -> int:
    """Return the number of features that are kept."""
    if type(value) is not int or not 1 <= value <= count:
        raise WorkbenchError(f"{file}: k is {value!r}; expected a number from 1 to {count}, the number of features", None)
    return value
