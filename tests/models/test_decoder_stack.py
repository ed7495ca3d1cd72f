"""The list of decoder layers of a model whose image encoder has as many layers."""

from __future__ import annotations

from pathlib import Path

from worlds.family_walk import build

from workbench.grow.expansion.streamed import decoder_layers
from workbench.models.layout import stack_prefix


def test_layers_are_those_of_the_text_decoder(tmp_path: Path) -> None:
    model = build("qwen3_vl", "Qwen3VLForConditionalGeneration", tmp_path / "project").base
    blocks, layers = model.model.visual.blocks, model.model.language_model.layers
    assert len(blocks) == len(layers)
    assert stack_prefix(model, len(layers)) == "model.language_model.layers"
    found = decoder_layers(model)
    assert found is not None
    assert found == ("model.language_model.layers", layers)
