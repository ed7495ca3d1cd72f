"""Facts about architectures: what the tables of models/architecture.py know, that every part of the package uses them, and nobody else has one."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from workbench.adapters.lora import Places
from workbench.evaluate.backends import _length
from workbench.grow.expansion.parts import text_config, with_text
from workbench.merge.measuring.calibration import is_conv1d as is_stored_in_out
from workbench.merge.measuring.calibration import is_linear
from workbench.merge.measuring.matrices import is_matrix
from workbench.models import architecture
from workbench.models.architecture import tied_embeddings, untied_config, vocabulary_tensors
from workbench.models.identity import generation_settings
from workbench.models.layout import Layout, Model
from workbench.models.prompts import load_tokenizer
from workbench.models.skeleton import parse_config
from workbench.models.texts import longest_row
from workbench.resolve.checks import _meaning
from workbench.vocabulary.files import configured
from workbench.weights.header import DEPTHS, POSITIONS, TEXT_CONFIGS
from workbench.weights.specs import TensorSpec

PACKAGE = Path(__file__).resolve().parents[2] / "workbench"
EMBEDDINGS = (
    "model.embed_tokens",
    "transformer.wte",
    "gpt_neox.embed_in",
    "transformer.word_embeddings",
    "tok_embeddings",
    "backbone.embeddings",
    "backbone.embedding",
    "shared",
    "model.shared",
)
HEADS = ("lm_head", "language_model.lm_head", "embed_out", "output", "model.output")


class Stored:
    """Weights of which only shapes are read."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.specs = {name.replace("__", "."): TensorSpec.of(shape, torch.float32) for name, shape in shapes.items()}


def specs(*names: str) -> Mapping[str, TensorSpec]:
    return {name: TensorSpec.of((8, 4), torch.float32) for name in names}


# -- names


def test_every_name_is_known_everywhere() -> None:
    assert all(map(architecture.is_embedding_module, EMBEDDINGS))
    assert all(
        architecture.is_embedding(f"{name}.weight") and architecture.is_before_layers(f"{name}.weight") for name in EMBEDDINGS
    )
    assert all(map(architecture.is_head_module, HEADS))
    assert all(architecture.is_head(f"{name}.weight") for name in HEADS)
    assert all(architecture.is_table(f"{name}.weight") for name in (*EMBEDDINGS, *HEADS, "lm_heads.0", "transformer.wpe"))
    assert architecture.is_before_layers("model.embed_positions.weight")
    assert architecture.is_before_layers("wpe.weight")
    assert not architecture.is_head("lm_head.bias")
    assert architecture.is_head_module("lm_head")
    # Vocabulary alignment knew it; ties, singular values and adapters' errors did not.
    assert tied_embeddings(["tok_embeddings.weight", "output.weight"], {}) is None
    assert not is_matrix("output.weight", (64, 64), 2)
    assert is_matrix("layers.0.attention.output.weight", (64, 64), 2)
    # Vocabulary alignment knew them; ties, schedules and singular values did not.
    assert tied_embeddings(["shared.weight", "decoder.block.0.layer.0.q.weight"], {}) == ("shared.weight", "lm_head.weight")
    layout = Layout.from_config(
        ["shared.weight", "decoder.block.0.q.weight", "decoder.block.1.q.weight", "norm.weight"], {"num_layers": 2}
    )
    assert layout.position("shared.weight") == 0
    assert layout.position("norm.weight") == 1
    assert not is_matrix("shared.weight", (64, 64), 2)
    # Ties knew `backbone.embedding`; vocabulary alignment did not.
    names = ("backbone.embedding.weight", "backbone.layers.0.mixer.in_proj.weight", "lm_head.weight")
    assert vocabulary_tensors(specs(*names)) == ["backbone.embedding.weight", "lm_head.weight"]
    found = vocabulary_tensors(specs("lm_head.weight", "transformer.wte.weight", "transformer.h.0.attn.output.weight"))
    assert found == ["transformer.wte.weight", "lm_head.weight"]
    biased = {**specs("transformer.wte.weight", "lm_head.weight"), "lm_head.bias": TensorSpec.of((8,), torch.float32)}
    assert vocabulary_tensors(biased) == ["transformer.wte.weight", "lm_head.weight", "lm_head.bias"]


@pytest.mark.parametrize(
    "module",
    [
        "rwkv.blocks.0.attention.output",
        "model.layers.1.mlp.shared",
        "model.norm",
        "model.embedding_norm",
        "model.layers.0.self_attn.o_proj",
        "encoder.layer.0.output",
    ],
)
def test_modules_of_layers_are_no_ends(module: str) -> None:
    assert not architecture.is_embedding_module(module)
    assert not architecture.is_head_module(module)
    assert not architecture.is_table(f"{module}.weight") or module == "model.embedding_norm"
    assert not architecture.is_before_layers(f"{module}.weight")


# -- Conv1D


def test_conv1d_and_fields_of_config_json() -> None:
    assert architecture.is_conv1d(Conv1D(3, 4))
    assert not architecture.is_conv1d(nn.Linear(3, 4))
    assert architecture.model_depth({"vocab_size": 5}) == 0
    assert architecture.max_positions({"vocab_size": 5}) is None
    assert architecture.max_positions(GPT2Config(n_positions=16)) == 16
    assert architecture.max_positions(LlamaConfig(max_position_embeddings=32)) == 32
    assert architecture.max_positions({"n_positions": 16, "n_ctx": 8}) == 16  # the order of lm-eval


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"])
def test_conv1d_by_name(kind: str) -> None:
    """Adapters knew `clvp_decoder`; merges that solve least squares did not. Its attention is made of plain linear layers."""
    config = {"model_type": kind, "n_layer": 1}
    weights = Stored(h__0__mlp__c_fc__weight=(4, 16), h__0__attn__q_proj__weight=(4, 4), wte__weight=(9, 4))
    model = Model(weights, config)  # type: ignore[arg-type]
    assert is_stored_in_out(model, "h.0.mlp.c_fc.weight")
    assert Places(weights.specs, config).is_conv1d("h.0.mlp.c_fc", False)
    assert not is_stored_in_out(model, "h.0.attn.q_proj.weight")
    assert not is_stored_in_out(model, "wte.weight")
    assert is_linear(model, "h.0.mlp.c_fc.weight")
    assert not is_linear(model, "wte.weight")
    assert not is_stored_in_out(Model(weights, {**config, "model_type": "llama"}), "h.0.mlp.c_fc.weight")  # type: ignore[arg-type]


# -- config.json


@pytest.mark.parametrize(
    "config",
    [
        *({key: 3} for key in DEPTHS),
        *({part: {key: 3}} for part in TEXT_CONFIGS for key in DEPTHS),
        {"layers_block_type": ["mamba"] * 3},
        {"llm_config": {"layers_block_type": ["mamba"] * 3}},
    ],
)
def test_depth(config: dict[str, Any]) -> None:
    assert architecture.model_depth(config) == 3


@pytest.mark.parametrize("key", POSITIONS)
def test_longest_positions_are_read_alike_everywhere(key: str, tmp_path: Path) -> None:
    """`n_ctx` was known to scoring alone, the text decoder's part to the suite check alone."""
    for config in ({key: 16}, *({part: {key: 16}} for part in TEXT_CONFIGS)):
        assert architecture.max_positions(config) == 16
        assert longest_row(config, 99) == 16
        assert longest_row(config, 9) == 9
        (tmp_path / "config.json").write_text(str(config).replace("'", '"'), "utf-8")
        assert _length(tmp_path) == 16


@pytest.mark.parametrize("part", TEXT_CONFIGS)
def test_text_decoders_part(part: str, tmp_path: Path) -> None:
    """`llm_config` was known to depth alone; ties, growth, vocabularies, generation settings and comparisons read `text_config` alone."""
    config = {part: {"tie_word_embeddings": False, "hidden_size": 8, "vocab_size": 9, "head_dim": 4, "temperature": 0.5}}
    assert tied_embeddings(["model.embed_tokens.weight"], config) is None
    assert untied_config({part: {"tie_word_embeddings": True}}) == {
        part: {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }
    assert text_config(config) == config[part]
    assert with_text(config, {"hidden_size": 16})[part]["hidden_size"] == 16
    assert configured(config, None, 12)[part]["vocab_size"] == 12
    assert "vocab_size" not in configured(config, None, 12)
    assert all(_meaning(config, images=images)["head_dim"] == 4 for images in (False, True))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}', "utf-8")
    assert generation_settings(tmp_path, config) == {}


# -- one home


def test_tokenizers_run_no_code_and_ask_no_network(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    assert load_tokenizer(llama).get_vocab() == load_tokenizer(str(llama)).get_vocab()
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **settings: calls.append(settings))
    load_tokenizer("a")
    load_tokenizer("a", gguf_file="b.gguf")
    assert calls[0] == {"local_files_only": True, "trust_remote_code": False}
    assert calls[1] == {**calls[0], "gguf_file": "b.gguf"}


# A name of transformers or of a field -> the only files that may have it.
ONLY_IN = {
    "AutoTokenizer": {"models/prompts.py"},
    "Conv1D": {"models/architecture.py"},
    **{key: {"models/architecture.py"} for key in ("embed_in", "embed_out", "wte", "word_embeddings", "tok_embeddings")},
    "lm_head": {"models/architecture.py"},
    **{key: {"weights/header.py", "upkeep/fetch.py", "grow/mixtures/targets.py"} for key in DEPTHS},
    **{key: {"weights/header.py", "upkeep/fetch.py"} for key in POSITIONS},
    **{key: {"weights/header.py"} for key in TEXT_CONFIGS},
    "layers_block_type": {"models/architecture.py"},
}


def test_every_fact_has_one_home() -> None:
    offenders = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            imported = isinstance(node, ast.alias) and node.name == "AutoTokenizer"
            fact = "AutoTokenizer" if imported else node.value if isinstance(node, ast.Constant) else None
            if isinstance(fact, str) and name not in ONLY_IN.get(fact, {name}):
                line = getattr(node, "lineno", 0)
                offenders.append(f"{name}:{line}: '{fact}' belongs into {' or '.join(sorted(ONLY_IN[fact]))}")
    assert not offenders, "\n".join(offenders)


def test_a_parsed_config_is_the_callers_own() -> None:
    """The text of config.json is parsed once; what a caller changes is not seen by the next."""
    given = {"model_type": "llama", "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    first = parse_config(given)
    first.num_hidden_layers, first.rope_parameters["rope_theta"] = 7, 9.0
    again = parse_config(given)
    assert (again.num_hidden_layers, again.rope_parameters["rope_theta"]) == (3, 5.0)
