"""Parts of live models: hidden states, the list of decoder layers, text parts of configurations, and the table of docs/families.csv."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from worlds.causal import tiny_json
from worlds.family import NotTinyError, build
from worlds.family_walk import GROWTHS, MERGES, families, walk
from worlds.growing import FAMILIES, GROWN
from worlds.places import PROJECT, of_the_pinned_transformers

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion.streamed import decoder_layers
from workbench.models.hooks import states_of, with_first
from workbench.models.layout import stack_prefix
from workbench.models.live import check_causal, live_model
from workbench.models.skeleton import causal_skeleton, parse_config

TOKENS = torch.zeros(2, 3, dtype=torch.long)


def test_states_of_a_tensor_and_of_a_tuple() -> None:
    states = torch.randn(2, 3, 8)
    assert states_of(states, TOKENS) is states
    assert states_of((states, None), TOKENS) is states
    assert states_of([states], TOKENS) is states


@pytest.mark.parametrize("output", [(1, 2), [1, 2]])
def test_another_state_keeps_the_rest(output: object) -> None:
    assert with_first(output, 7) == type(output)((7, 2))  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (4, 2, 3, 8), (2, 4, 8), (3, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """Several states of a token, as hyper-connections and AltUp carry them, would otherwise be read as another row's or token's."""
    with pytest.raises(WorkbenchError, match="expected one state for each token"):
        states_of(torch.randn(shape), TOKENS)


def test_layers_are_those_of_the_text_decoder(tmp_path: Path) -> None:
    model = build("qwen3_vl", "Qwen3VLForConditionalGeneration", tmp_path / "project").base
    blocks, layers = model.model.visual.blocks, model.model.language_model.layers
    assert len(blocks) == len(layers)
    assert stack_prefix(model, len(layers)) == "model.language_model.layers"
    found = decoder_layers(model)
    assert found is not None
    assert found == ("model.language_model.layers", layers)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "fields", "causal"),
    [("bert", {"is_decoder": False}, False), ("bert", {"is_decoder": True}, True), ("qwen3_moe", {}, True)],
)
def test_models_that_see_later_tokens_are_not_scored(kind: str, fields: dict[str, Any], causal: bool, dtype: torch.dtype) -> None:
    parsed = parse_config({**tiny_json(kind), **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(parsed, dtype=dtype).eval()
    if causal:
        check_causal(model, "base")
    else:
        with pytest.raises(WorkbenchError, match="base: what it predicts depends on later tokens"):
            check_causal(model, "base")


RESULTS: dict[str, Any] = json.loads((PROJECT / "benchmarks/results/families.json").read_text("utf-8"))
OPERATIONS = (*MERGES, "eval", "edit", *(f"grow: {name}" for name in GROWTHS), "route")
FOREIGN = "mergekit"
"""The last column, which is no operation of the workbench: the benchmark fills it, and its defects are not ours."""
DEFECTS: dict[str, set[str]] = {}
"""Family -> operations that are neither right nor refused."""


def row_of_page(kind: str, name: str) -> list[str]:
    """Return the cells of a family's operations in the table, without reasons."""
    rows = csv.reader((PROJECT / "docs/families.csv").read_text("utf-8").splitlines())
    (row,) = [row for row in rows if row[:2] == [kind, name]]
    return [cell.partition(":")[0] for cell in row[2 : 2 + len(OPERATIONS)]]


@pytest.mark.nightly
@pytest.mark.parametrize("family", RESULTS["families"])
def test_the_page_says_what_is_found(family: str, tmp_path: Path) -> None:
    found = walk(family, tmp_path / "project")
    words = {"works": "yes", "refused": "no", "untested": "untested", "wrong": "wrong"}
    page = row_of_page(family.partition(":")[0], found["class"].said)
    assert [words[found[name].status] for name in OPERATIONS] == page, found
    assert {name for name, outcome in found.items() if outcome.status == "wrong"} == DEFECTS.get(family, set()), found


@pytest.mark.slow
@pytest.mark.parametrize("family", RESULTS["not_tiny"])
def test_others_are_not_built_tiny(family: str, tmp_path: Path) -> None:
    kind, _, name = family.partition(":")
    with pytest.raises(NotTinyError):
        build(kind, name, tmp_path / "project")


@pytest.mark.skipif(not of_the_pinned_transformers(), reason="the tables belong to the version in constraints.txt")
def test_every_family_is_named() -> None:
    """No type of this transformers is missing, and growths agree with the table of tests/worlds/growing.py."""
    assert sorted([*RESULTS["families"], *RESULTS["not_tiny"], *RESULTS["not_walked"]]) == sorted(families())
    for family, outcomes in RESULTS["families"].items():
        wrong = {name for name, outcome in outcomes.items() if outcome["status"] == "wrong"}
        assert wrong - {FOREIGN} == DEFECTS.get(family, set())
        for name in ("depth", "neurons"):
            if family in FAMILIES:
                assert (outcomes[f"grow: {name}"]["status"] == "works") == (family in GROWN[name].split()), (family, name)
