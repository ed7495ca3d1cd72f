"""Checkpoints of multimodal models whose text decoder is a class of its own, with a part of the configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from worlds.causal import tiny_json

from workbench.models.live import live_model
from workbench.models.skeleton import causal_skeleton, parse_config


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("llama4", "Llama4ForConditionalGeneration"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    ],
)
def test_the_live_model_is_that_of_transformers(kind: str, whole: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    getattr(transformers, whole)._from_config(parse_config({**tiny_json(kind), "architectures": [whole]})).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    cpu, tokens = torch.device("cpu"), torch.arange(3, 11)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    live = live_model(config, load_file(tmp_path / "model.safetensors"), tmp_path, cpu)
    assert type(live) is type(expected) is type(causal_skeleton(config, cpu))
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, expected(tokens).logits)
