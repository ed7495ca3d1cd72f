"""Every causal language model of transformers: what the workbench knows of its layers, parts and sizes, and what it does not know, with the reason.

The truth is transformers' own model, built from a tiny config.json without memory for its weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from worlds.causal import causal_types, tiny_json
from worlds.places import of_the_pinned_transformers

from workbench.ground.errors import WorkbenchError
from workbench.models.architecture import is_embedding, is_head, max_positions, tied_embeddings
from workbench.models.layout import Layout, Model
from workbench.models.skeleton import parse_config, skeleton
from workbench.weights.specs import TensorSpec

AUDIO = "the decoder makes audio codes, with embeddings and heads in lists of their own"
NOT_BUILT = {
    "cohere_compass_text": "transformers' default has no settings for full attention",
    "dbrx": "transformers reads rope_theta from a part of its configuration that has none",
    **({} if find_spec("PIL") else {"gemma3n": "its vision tower needs Pillow"}),
}  # fmt: skip
"""Type of model -> why transformers builds no causal language model from its configuration."""

ATTENTION, FFN, HEAD, EMBEDDINGS = "attention output", "feed-forward output", "output embeddings", "input embeddings"
HEADS, LAYERS, POSITIONS = "attention heads", "layers", "positions"
POST_NORM = "a norm follows each sum: a layer whose outputs are zero would change the function"
CROSS = "layers attend to an encoder too"
NO_LIMIT = "positions have no limit"
NAMES = "no other architecture has these names of modules, and nobody has asked to edit or grow this one"
_BERTS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert rembert roberta roberta-prelayernorm "
    "roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
_WITH_ENCODERS = "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper"
_WITHOUT_LIMIT = "bloom falcon_mamba mamba mamba2 recurrent_gemma xlstm"
UNKNOWN: dict[str, dict[str, str]] = {
    **{kind: {ATTENTION: POST_NORM, FFN: POST_NORM} for kind in _BERTS.split()},
    **{kind: {ATTENTION: CROSS} for kind in _WITH_ENCODERS.split()},
    **{kind: {POSITIONS: NO_LIMIT} for kind in _WITHOUT_LIMIT.split()},
    "blt": {
        LAYERS: "four stacks: patcher, encoder, global transformer, decoder", EMBEDDINGS: "the patcher and the encoder have some",
        HEAD: "the patcher and the decoder have one",
    },
    **{kind: dict.fromkeys((LAYERS, EMBEDDINGS, HEAD, POSITIONS), AUDIO) for kind in ("musicgen", "musicgen_melody")},
    "cpmant": {POSITIONS: NO_LIMIT, ATTENTION: NAMES, FFN: NAMES},
    "ctrl": {EMBEDDINGS: "the module is called `w`", HEAD: "tied to a module that is called `w`", FFN: NAMES},
    "deepseek_v4": {ATTENTION: "two matrices in a row make the output"},
    "dots3_note": {HEADS: "their number differs from layer to layer"},
    "dots3_note_text": {HEADS: "their number differs from layer to layer"},
    "dory": {LAYERS: "config.json counts half layers"},
    "hrm_text": {LAYERS: "two stacks, of a high and a low level"},
    "mllama": {ATTENTION: "some layers attend to the image alone"},
    "modernbert-decoder": {ATTENTION: NAMES, FFN: NAMES},
    "moshi": {ATTENTION: NAMES},
    "prophetnet": {ATTENTION: CROSS, FFN: NAMES},
    "reformer": {ATTENTION: "reversible layers have two streams", FFN: "reversible layers have two streams"},
    "xlm": {LAYERS: "attention, feed-forward parts and norms are in lists of their own"},
    "xlnet": {POSITIONS: NO_LIMIT, ATTENTION: "tensors of three dimensions", FFN: POST_NORM},
}  # fmt: skip
"""Type of model -> facts that the workbench does not know of it, and why. The test fails where one is known by now."""
EXPERTS = re.compile(r"experts|input_linear")
RECURRENT = re.compile(r"A_log|conv|rg_lru|time_decay|mlstm")


class Named:
    """Weights of which only the shapes are read."""

    def __init__(self, model: Any) -> None:
        self.specs = {
            name: TensorSpec(tuple(tensor.shape), torch.float32)
            for name, tensor in model.state_dict().items()
            if name not in model.all_tied_weights_keys
        }


def unknown_facts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the workbench does not know of a model, or knows wrongly, and what it says instead."""
    model: Any = skeleton(json.dumps(data, sort_keys=True))
    weights, tied = Named(model), model.all_tied_weights_keys
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    embeddings = f"{names[id(model.get_input_embeddings())]}.weight"
    embeddings = tied.get(embeddings, embeddings)
    if (said := [n for n in weights.specs if is_embedding(n)]) != [embeddings]:
        yield EMBEDDINGS, f"{said}, not {embeddings}"
    head = f"{names[id(model.get_output_embeddings())]}.weight"
    heads = [n for n in weights.specs if is_head(n)]
    if head in tied and (said := tied_embeddings(weights.specs, data)) != (embeddings, head):
        yield HEAD, f"tied {said}, not {embeddings}, {head}"
    if head not in tied and (heads != [head] or tied_embeddings(weights.specs, data)):
        yield HEAD, f"{heads}, not {head}"
    longest = max_positions(data), max_positions(parse_config(data))
    if longest[0] != longest[1] or not longest[0]:
        yield POSITIONS, f"{longest[0]} in config.json, {longest[1]} in the configuration"
    yield from unknown_parts(model, Model(weights, data))  # type: ignore[arg-type]


def unknown_parts(model: Any, stored: Model) -> Iterator[tuple[str, str]]:
    """Yield what the workbench does not know of a model's layers."""
    try:
        layout = stored.layout
    except WorkbenchError as error:
        yield LAYERS, error.message
        return
    stack = model.get_submodule(layout.prefix.removesuffix("."))
    inside = [n for n in stored.weights.specs if n.startswith(layout.prefix)]
    if (
        not isinstance(stack, nn.ModuleList)
        or len(stack) != layout.depth
        or {layout.layer(n) for n in inside} != set(range(layout.depth))
    ):
        yield LAYERS, f"{layout.prefix} has {layout.depth} layers"
    parsed = model.config.get_text_config(decoder=True)
    width, heads = parsed.hidden_size, None
    with suppress(RuntimeError):  # transformers raises it where layers differ
        heads = getattr(parsed, "num_attention_heads", None)
    if not heads and not any(RECURRENT.search(name) for name in inside):
        yield HEADS, "no number of attention heads"
    for fact, find in ((FFN, layout.mlp_out), (ATTENTION, layout.attention_out)):
        try:
            shapes = {i: stored.weights.specs[find(i)].shape for i in range(layout.depth)}
        except WorkbenchError as error:
            structure = (EXPERTS, RECURRENT) if fact == FFN else (RECURRENT, re.compile(r"self_attention\.experts|self_attn\.\d"))
            if not any(pattern.search(name) for pattern in structure for name in inside):
                yield fact, error.message
            continue
        if any(width not in shape for shape in shapes.values()):
            yield fact, f"shapes {shapes}"


@pytest.mark.parametrize("kind", causal_types())
def test_what_is_known(kind: str) -> None:
    if kind in NOT_BUILT:
        with pytest.raises((AttributeError, KeyError, ImportError, TypeError)):
            skeleton(json.dumps(tiny_json(kind), sort_keys=True))
        return
    found = dict(unknown_facts(tiny_json(kind)))
    assert found.keys() == UNKNOWN.get(kind, {}).keys(), found


@pytest.mark.skipif(not of_the_pinned_transformers(), reason="the tables belong to the version in constraints.txt")
def test_the_tables_name_models_that_exist() -> None:
    assert not {*NOT_BUILT, *UNKNOWN} - set(causal_types())
    assert all(reason for facts in UNKNOWN.values() for reason in facts.values())


@pytest.mark.parametrize(
    "names",
    [
        ["encoder.layers.{}.fc1.weight", "decoder.layers.{}.fc1.weight"],
        ["transformer.attentions.{}.q_lin.weight", "transformer.ffns.{}.lin1.weight"],
    ],
)
def test_two_stacks_are_refused(names: list[str]) -> None:
    """Neither is taken for the decoder's layers by chance: where: layers would change one of them alone."""
    with pytest.raises(WorkbenchError, match="expected one stack of 3 layers, found 2"):
        Layout.from_config([name.format(i) for name in names for i in range(3)], {"num_hidden_layers": 3})
