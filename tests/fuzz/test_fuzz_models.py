"""Files of models and adapters, damaged: `plan` says what is wrong, or plans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worlds.fuzzing import command, damaged, fuzz, fuzz_reader, json_files, keeps, put, spliced
from worlds.project import Project

from workbench.adapters.read import Adapter
from workbench.models.architecture import model_depth
from workbench.models.identity import vocabulary_digest
from workbench.scores.plan import tokenizer_digest
from workbench.vocabulary.files import generation_config, read_template, special_ids
from workbench.vocabulary.tokens import read_tokens
from workbench.weights.checkpoint import checkpoint_files, read_config
from workbench.weights.header import read_header

PLAN = ["plan", "recipes/test.yaml"]


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def test_what_is_not_damaged_plans(fuzzed: Project) -> None:
    assert command(PLAN).exit_code == 0


@fuzz_reader
@given(data=st.data())
def test_headers(fuzzed: Project, data: st.DataObject) -> None:
    """A header alone: the reader, which is fast."""
    file = fuzzed.path / "bricks" / "one" / "adapter_model.safetensors"
    header, tensors = header_of(file)
    few = dict(list(header.items())[:4])
    raw = data.draw(
        st.one_of(
            json_files(few).map(lambda text: with_header(text, tensors)),
            spliced(with_header(json.dumps(few).encode(), tensors[:64])),
        )
    )
    place = fuzzed.path / "x.safetensors"
    size = put(place, raw)
    keeps(lambda: read_header(place), size)


@pytest.mark.parametrize("name", ["base", "bricks/full", "bricks/one"])
@fuzz
@given(data=st.data())
def test_plan_with_a_damaged_header(fuzzed: Project, name: str, data: st.DataObject) -> None:
    file = next((fuzzed.path / name).glob("*.safetensors"))
    valid = file.read_bytes()
    header, tensors = header_of(file)
    try:
        text = data.draw(json_files(header))
        size = put(file, with_header(text, tensors))
        command(PLAN, size)
    finally:
        file.write_bytes(valid)


@pytest.mark.parametrize(
    "name",
    ["base/config.json", "base/generation_config.json", "base/tokenizer.json", "base/tokenizer_config.json", "bricks/full/config.json",
     "bricks/full/tokenizer.json", "bricks/one/adapter_config.json"],
)  # fmt: skip
@fuzz
@given(data=st.data())
def test_plan_with_damaged_json(fuzzed: Project, name: str, data: st.DataObject) -> None:
    file = fuzzed.path / name
    valid = file.read_bytes()
    try:
        size = put(file, data.draw(json_files(json.loads(valid))))
        command(PLAN, size)
    finally:
        file.write_bytes(valid)


@fuzz
@given(data=st.data())
def test_plan_with_a_damaged_index(fuzzed: Project, data: st.DataObject) -> None:
    place = fuzzed.path / "bricks" / "full"
    single, index, shard = (
        place / "model.safetensors",
        place / "model.safetensors.index.json",
        place / "model-00001-of-00001.safetensors",
    )
    if single.is_file():
        single.rename(shard)
    header, _ = header_of(shard)
    valid = {"metadata": {"total_size": 1}, "weight_map": {name: shard.name for name in header if name != "__metadata__"}}
    size = put(index, data.draw(json_files(valid)))
    command(PLAN, size)


@fuzz
@given(patterns=st.dictionaries(
    st.one_of(st.sampled_from(["q_proj", "(a+)+$", "(.*)*x", "((a*)*)*b", "(?!q)", r"(a)\1", "[", "*", "x{1,1000}{1,1000}", "(" * 500, ".*" * 200]),
              st.text(alphabet="abq_.*+?()[]{}|\\^$d1,-", max_size=20)),
    st.one_of(st.integers(-2, 64), st.floats(), st.text(max_size=3)), max_size=4),
    field=st.sampled_from(["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"]))  # fmt: skip
def test_plan_with_patterns(fuzzed: Project, patterns: dict[str, Any], field: str) -> None:
    """Patterns of any form never hang."""
    file = fuzzed.path / "bricks" / "one" / "adapter_config.json"
    valid = file.read_bytes()
    try:
        value = patterns if field.endswith("_pattern") else next(iter(patterns), "")
        put(file, json.dumps({**json.loads(valid), field: value}).encode())
        command(PLAN)
    finally:
        file.write_bytes(valid)


@fuzz
@given(data=st.data())
def test_show_of_a_damaged_brick(fuzzed: Project, data: st.DataObject) -> None:
    """`brick show` reads the adapter and its configuration."""
    file = fuzzed.path / "bricks" / "one" / "adapter_config.json"
    valid = file.read_bytes()
    try:
        put(file, json.dumps(data.draw(damaged(json.loads(valid)))).encode())
        command(["brick", "show", "bricks/one"])
    finally:
        file.write_bytes(valid)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "generation_config.json"]
)
@fuzz_reader
@given(data=st.data())
def test_readers_of_json(fuzzed: Project, name: str, data: st.DataObject) -> None:
    """The readers alone."""
    place = fuzzed.path / "base"
    header, _ = header_of(place / "model.safetensors")
    valid = (
        {"weight_map": dict.fromkeys(list(header)[:5], "model.safetensors")}
        if "index" in name
        else json.loads((place / name).read_bytes())
    )
    folder = fuzzed.path / "only"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    if name == "tokenizer_config.json":
        shutil.copy(place / "tokenizer.json", folder)
    size = put(folder / name, data.draw(json_files(valid)))
    readers: dict[str, Callable[[], Any]] = {
        "config.json": lambda: model_depth(read_config(folder, "x")),
        "tokenizer.json": lambda: (read_tokens(folder, "x"), vocabulary_digest(folder), tokenizer_digest(folder)),
        "tokenizer_config.json": lambda: (
            read_tokens(folder, "x"),
            read_template(folder),
            special_ids(folder, None, read_tokens(folder, "x")),
        ),
        "model.safetensors.index.json": lambda: checkpoint_files(folder, "x"),
        "generation_config.json": lambda: generation_config(folder, place, {}),
    }
    keeps(readers[name], size)


@fuzz_reader
@given(data=st.data())
def test_reader_of_adapters(fuzzed: Project, data: st.DataObject) -> None:
    place = fuzzed.path / "bricks" / "one"
    file = place / "adapter_config.json"
    valid = file.read_bytes()
    try:
        whole = {**json.loads(valid), "alpha_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}, "rank_pattern": {"v_proj": 3}}
        size = put(file, data.draw(json_files(whole)))

        def read() -> Any:
            adapter = Adapter(place, "x")
            return adapter.meaning, [adapter.scale(part.module, 4) for part in adapter.keys.parts], adapter.lycoris_scale("m")

        keeps(read, size)
    finally:
        file.write_bytes(valid)
