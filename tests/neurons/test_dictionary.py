"""Dictionaries: each activation, normalization and layout against its formula, and files that are damaged, unknown or of another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.dictionaries import save_dictionary
from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.sites import find_sites
from workbench.ground.errors import WorkbenchError
from workbench.neurons.dictionary import Dictionary, read_dictionary
from workbench.neurons.sparse_coder import check_fit, seeing

WIDTH, FEATURES = 32, 12
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9)) + 0.5


def weights(*extra: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (WIDTH, FEATURES), "b_enc": (FEATURES,), "W_dec": (FEATURES, WIDTH), "b_dec": (WIDTH,)}
    more = {"threshold": (FEATURES,), "W_skip": (WIDTH, WIDTH), "scaling_factor": (FEATURES,)}
    made = {name: torch.randn(shape, generator=draw) for name, shape in (shapes | {name: more[name] for name in extra}).items()}
    return {name: tensor.abs() + 1 if name == "threshold" else tensor for name, tensor in made.items()}


def saelens(architecture: str = "standard", hook: str = "blocks.1.hook_resid_post", **more: Any) -> dict[str, Any]:
    """A configuration as version 6 writes it."""
    inner = {"hook_name": hook, "sae_lens_version": "6.54.12"} | more.pop("metadata", {})
    sizes = {"d_in": WIDTH, "d_sae": FEATURES, "normalize_activations": "none", "reshape_activations": "none"}
    return {"architecture": architecture, **sizes, "apply_b_dec_to_input": True, "metadata": inner, **more}


def transcoding(architecture: str, **more: Any) -> dict[str, Any]:
    names = {"hook_name_out": "blocks.1.hook_mlp_out"}
    return saelens(architecture, "blocks.1.mlp.hook_in", d_out=WIDTH, apply_b_dec_to_input=False, metadata=names, **more)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centers", [True, False])
def test_standard(tmp_path: Path, centers: bool) -> None:
    w = weights()
    read = read_dictionary(save_dictionary(tmp_path, saelens(apply_b_dec_to_input=centers), w))
    features = torch.clamp((X - centers * w["b_dec"]) @ w["W_enc"] + w["b_enc"], min=0)
    assert 0.2 < float((features > 0).float().mean()) < 0.8
    same(read.features(X), features)
    same(read.reconstruct(X), features @ w["W_dec"] + w["b_dec"])
    assert (read.layer, read.reads, read.writes, read.layout) == (1, "resid_post", "resid_post", "saelens")


@pytest.mark.parametrize(
    "config",
    [
        saelens("topk", k=3),
        saelens("topk", k=3, rescale_acts_by_decoder_norm=True),
        {
            **saelens(),
            **{"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "metadata": None},
            **{"hook_name": "blocks.1.hook_resid_pre", "hook_layer": 1, "hook_head_index": None},
        },
    ],
    ids=["6", "rescaled", "3"],
)
def test_topk(tmp_path: Path, config: dict[str, Any]) -> None:
    w = weights()
    w["b_enc"] -= 6  # some tokens have fewer than three positive features
    read = read_dictionary(save_dictionary(tmp_path, config, w))
    norms = w["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(FEATURES)
    before = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    third = before.sort(dim=-1, descending=True).values[..., 2:3]
    features = torch.where(before >= third, before, 0).clamp(min=0)
    assert {int(n) for n in (features > 0).sum(-1).flatten()} > {3}
    same(read.features(X), features)
    same(read.reconstruct(X), (features / norms) @ w["W_dec"] + w["b_dec"])


def test_jumprelu_keeps_what_exceeds_the_threshold_as_it_is(tmp_path: Path) -> None:
    w = weights("threshold")
    read = read_dictionary(save_dictionary(tmp_path, saelens("jumprelu"), w))
    before = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    features = before * (before > w["threshold"])
    assert ((before > 0) & (features == 0)).any()
    same(read.features(X), features)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders_of_saelens(tmp_path: Path, name: str) -> None:
    w = weights(*(["threshold"] if "jumprelu" in name else []), *(["W_skip"] if "skip" in name else []))
    read = read_dictionary(save_dictionary(tmp_path, transcoding(name), w))
    before = X @ w["W_enc"] + w["b_enc"]  # b_dec belongs to the output
    features = torch.where(before > w.get("threshold", torch.zeros(())), before, 0)
    same(read.features(X), features)
    skip = X @ w["W_skip"].T if "skip" in name else 0
    same(read.reconstruct(X), features @ w["W_dec"] + w["b_dec"] + skip)
    assert (read.reads, read.writes) == ("mlp_in", "mlp_out")


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_sparsify(tmp_path: Path, transcode: bool, skip: bool) -> None:
    w = weights("W_skip")
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {"W_skip": w["W_skip"]} if skip else {}
    config = {"d_in": WIDTH, "k": 2, "num_latents": FEATURES, "expansion_factor": 32, "transcode": transcode}
    folder = save_dictionary(tmp_path / "layers.2.mlp" / "seed0", config, tensors, "sae.safetensors")
    read = read_dictionary(folder)
    before = torch.clamp((X if transcode else X - w["b_dec"]) @ w["W_enc"] + w["b_enc"], min=0)
    second = before.sort(dim=-1, descending=True).values[..., 1:2]
    features = torch.where(before >= second, before, 0)
    same(read.features(X), features)
    same(read.reconstruct(X), features @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if skip else 0))
    assert (read.layer, read.reads, read.writes) == (2, "mlp_in" if transcode else "mlp_out", "mlp_out")


def test_layer_norm(tmp_path: Path) -> None:
    w = weights()
    read = read_dictionary(save_dictionary(tmp_path, saelens(normalize_activations="layer_norm"), w))
    mean, deviation = X.mean(-1, keepdim=True), X.var(-1, keepdim=True, unbiased=True).sqrt()
    z = (X - mean) / (deviation + 1e-5)
    features = torch.clamp((z - w["b_dec"]) @ w["W_enc"] + w["b_enc"], min=0)
    same(read.features(X), features)
    same(read.reconstruct(X), (features @ w["W_dec"] + w["b_dec"]) * deviation + mean)


def test_a_transcoder_s_output_is_not_normalized_back(tmp_path: Path) -> None:
    w = weights()
    read = read_dictionary(save_dictionary(tmp_path, transcoding("transcoder", normalize_activations="layer_norm"), w))
    z = (X - X.mean(-1, keepdim=True)) / (X.std(-1, keepdim=True) + 1e-5)
    same(read.reconstruct(X), torch.clamp(z @ w["W_enc"] + w["b_enc"], min=0) @ w["W_dec"] + w["b_dec"])


def test_expected_average_asks_for_its_scale(tmp_path: Path) -> None:
    w = weights()
    read = read_dictionary(save_dictionary(tmp_path, saelens(normalize_activations="expected_average_only_in"), w))
    with pytest.raises(ValueError, match="scaled"):
        read.features(X)
    scale = WIDTH**0.5 / 4.0
    features = torch.clamp((X * scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"], min=0)
    same(read.scaled(4.0).features(X), features)
    same(read.scaled(4.0).reconstruct(X), (features @ w["W_dec"] + w["b_dec"]) / scale)
    assert read.scaled(4.0).scaled(9.0) is not read
    same(read.scaled(4.0).scaled(9.0).features(X), features)


def test_scaling_factors_of_version_3(tmp_path: Path) -> None:
    w = weights("scaling_factor")
    read = read_dictionary(save_dictionary(tmp_path, saelens(finetuning_scaling_factor=True), w))
    plain = read_dictionary(save_dictionary(tmp_path, saelens(), w | {"scaling_factor": torch.ones(FEATURES)}))
    same(plain.reconstruct(X), plain.features(X) @ w["W_dec"] + w["b_dec"])
    same(read.reconstruct(X), (read.features(X) * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"])


def changed(tensors: dict[str, Tensor], **values: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in (tensors | values).items() if tensor is not None}


REFUSED: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [
    ("architecture 'gated' is not supported", saelens("gated"), weights()),
    ("activation_fn 'tanh-relu'", saelens(activation_fn="tanh-relu"), weights()),
    ("normalize_activations 'constant_norm_rescale'", saelens(normalize_activations="constant_norm_rescale"), weights()),
    ("hook_name is 'blocks.1.attn.hook_z'", saelens(hook="blocks.1.attn.hook_z"), weights()),
    ("hook_name is null", {**saelens(), "metadata": None}, weights()),
    ("hook_name_out is null", saelens("transcoder"), weights()),
    (
        "reads layer 0 and writes layer 1",
        saelens("transcoder", "blocks.0.mlp.hook_in", metadata={"hook_name_out": "blocks.1.hook_mlp_out"}),
        weights(),
    ),
    ("metadata: found a list, expected an object", {**saelens(), "metadata": [1]}, weights()),
    ("center_writing_weights", saelens(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}), weights()),
    ("attention heads", saelens(reshape_activations="hook_z"), weights()),
    ("d_in is 64, but the tensors have 32", saelens(d_in=64), weights()),
    ("k is 13; expected a number from 1 to 12", saelens("topk", k=13), weights()),
    ("k is None", saelens("topk"), weights()),
    ("no tensor threshold, expected one of shape 12", saelens("jumprelu"), weights()),
    ("tensors threshold are not read", saelens(), weights("threshold")),
    ("b_enc has shape 11, expected 12", saelens(), changed(weights(), b_enc=torch.zeros(11))),
    ("W_dec has shape 32 × 12, expected 12 × 32", saelens(), changed(weights(), W_dec=weights()["W_dec"].T)),
    ("b_dec is empty or not all finite", saelens(), changed(weights(), b_dec=torch.full((WIDTH,), torch.nan))),
    ("factors that are not 1", saelens(), weights("scaling_factor")),
    ("W_enc is empty or not all finite", saelens(), changed(weights(), W_enc=torch.zeros(WIDTH, FEATURES).int())),
    ("no tensor W_enc", saelens(), changed(weights(), W_enc=None)),
]


@pytest.mark.parametrize(("message", "config", "tensors"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_not_supported_is_refused(
    tmp_path: Path, message: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    save_dictionary(tmp_path, config, tensors)
    with pytest.raises(WorkbenchError) as error:
        read_dictionary(tmp_path)
    assert message in error.value.message
    assert str(tmp_path) in error.value.message


def test_sparsify_needs_the_name_of_a_module(tmp_path: Path) -> None:
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    config = {"d_in": WIDTH, "k": 2, "num_latents": FEATURES, "transcode": True}
    with pytest.raises(WorkbenchError, match=r"says no place; expected layers\.5\.mlp"):
        read_dictionary(save_dictionary(tmp_path / "mine", config, tensors, "sae.safetensors"))
    with pytest.raises(WorkbenchError, match="says no place"):
        read_dictionary(save_dictionary(tmp_path / "layers.2", config, tensors, "sae.safetensors"))
    for more in ({"activation": "groupmax"}, {"signed": True}):
        with pytest.raises(WorkbenchError, match="not supported"):
            read_dictionary(save_dictionary(tmp_path / "layers.2.mlp", config | more, tensors, "sae.safetensors"))


def test_folders_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no dictionary; found no files"):
        read_dictionary(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(WorkbenchError, match=r"found model\.safetensors, expected cfg\.json"):
        read_dictionary(tmp_path)
    save_dictionary(tmp_path, saelens(), weights())
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(WorkbenchError, match="missing or damaged"):
        read_dictionary(tmp_path)
    save_dictionary(tmp_path, saelens(), weights())
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(WorkbenchError, match=r"cfg\.json"):
        read_dictionary(tmp_path)


def at(place: str, layer: int = 1, width: int = WIDTH, hook: str = "", layout: Any = "sparsify") -> Dictionary:
    made: Any = (torch.zeros(4, width), torch.zeros(4), torch.zeros(4, width), torch.zeros(width))
    spot: Any = place
    return Dictionary("mine", layout, layer, hook, spot, spot, *made, "relu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_places_are_those_of_the_live_model(family: str, dense_of: Callable[[str], Path]) -> None:
    """Hidden states that transformers returns, and what the feed-forward module adds."""
    model = live(dense_of(family))
    config = model.config.to_dict()
    site = check_fit(at("mlp_in"), model, config, find_sites(model, len(_layers(model)), CPU))
    seen: dict[str, Tensor] = {}
    with seeing(model, config, site, ("resid_pre", "mlp_in", "mlp_out", "resid_post"), seen.__setitem__), torch.no_grad():
        states = model(input_ids=torch.tensor([[3, 4, 5, 6]]), output_hidden_states=True).hidden_states
        feed_forward = _layers(model)[1].mlp(seen["mlp_in"])
    torch.testing.assert_close(seen["resid_pre"], states[1])
    torch.testing.assert_close(seen["resid_post"], states[2])
    torch.testing.assert_close(seen["mlp_out"], feed_forward)
    assert (seen["mlp_in"] - seen["resid_pre"]).abs().max() > 0.1
    seen.clear()
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5, 6]]))
    assert not seen


def _layers(model: Any) -> Any:
    return next(m for name, m in model.named_modules() if name.endswith(("layers", "h")) and len(m) > 1)


@pytest.mark.parametrize(
    ("family", "dictionary", "message"),
    [
        ("llama", at("resid_post", width=64), "the dictionary reads 64 numbers a token, but the model's hidden state has 32"),
        ("llama", at("resid_post", layer=9), "layer 9, but the model has"),
        ("llama", at("mlp_in", hook="blocks.1.ln2.hook_normalized"), "before the gain of this model's RMSNorm"),
        ("gemma2", at("mlp_out", layout="saelens"), "behind a second norm"),
        ("opt", at("mlp_in"), "is no module whose input could be read"),
    ],
)
def test_dictionaries_of_other_models(family: str, dictionary: Dictionary, message: str, dense_of: Callable[[str], Path]) -> None:
    model = live(dense_of(family))
    config = model.config.to_dict()
    sites = find_sites(model, config["num_hidden_layers"], CPU)
    with pytest.raises(WorkbenchError) as error:
        check_fit(dictionary, model, config, sites)
    assert message in error.value.message
    with pytest.raises(WorkbenchError, match="no dense feed-forward neurons"):
        check_fit(at("resid_post"), model, config, tuple(site for site in sites if site.layer != 1))


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "skip_transcoder"])
@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_saelens_own_class_computes_the_same(tmp_path: Path, architecture: str, normalization: str) -> None:
    library = pytest.importorskip("sae_lens")
    w = weights(*(["threshold"] if architecture == "jumprelu" else []), *(["W_skip"] if "skip" in architecture else []))
    config = transcoding(architecture) if "transcoder" in architecture else saelens(architecture, k=3)
    folder = save_dictionary(tmp_path, {**config, "dtype": "float32", "device": "cpu", "normalize_activations": normalization}, w)
    sae, read = library.SAE.load_from_disk(folder), read_dictionary(folder)
    with torch.no_grad():
        same(read.features(X), sae.encode(X))
        same(read.reconstruct(X), sae(X))


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, True)])
def test_sparsify_s_own_class_computes_the_same(tmp_path: Path, transcode: bool, skip: bool) -> None:
    library = pytest.importorskip("sparsify")
    config = library.SparseCoderConfig(num_latents=FEATURES, k=3, transcode=transcode, skip_connection=skip)
    coder = library.SparseCoder(WIDTH, config)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_()
        coder.save_to_disk(tmp_path / "layers.0.mlp")
        read, flat = read_dictionary(tmp_path / "layers.0.mlp"), X.flatten(0, 1)
        same(read.reconstruct(flat), coder(flat).sae_out)
