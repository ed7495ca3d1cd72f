"""`export --for llama.cpp`: GGUF adapters, the converter's command, serve.sh, and a server that chooses adapters by `lora`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document, refused
from worlds.completions_server import serving_llama_cpp
from worlds.gguf_models import gguf_field, gguf_tensors
from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import live, save_adapter

from workbench.models.prompts import load_tokenizer

LLAMA = ("--for", "llama.cpp", "--prompts", "prompts.jsonl", "--tokens", "4")
BOTH = ("both", *LLAMA, "--served-base", "org/small")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[..., Path]) -> Iterator[Project]:
    """A project with an adapter that has a pattern of ranks, and one of rsLoRA; it is the working directory."""
    project = Project(tmp_path_factory.mktemp("a project"))
    (project.path / "recipes").mkdir()
    base = model_of("llama", torch.float32)
    (project.path / "base").symlink_to(base)
    save_adapter(base, project.path / "bricks" / "one", seed=9, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3})
    save_adapter(base, project.path / "bricks" / "two", seed=10, use_rslora=True, target_modules=["k_proj"])
    save_adapter(base, project.path / "bricks" / "head", seed=11, target_modules=["lm_head"])
    save_adapter(base, project.path / "bricks" / "embedding", seed=11, target_modules=["embed_tokens"])
    neox = model_of("gpt_neox", torch.float32)
    (project.path / "neox").symlink_to(neox)
    save_adapter(neox, project.path / "bricks" / "neox", seed=9, family="gpt_neox")
    write_jsonl(project.path / "prompts.jsonl", [{"prompt": "w1 w2 w3 is"}, {"prompt": "w40 of w41"}])
    project.write("bricks: {one: bricks/one, two: bricks/two}\nsteps: []\n", "both.yaml")
    project.write("bricks: {head: bricks/head, embedding: bricks/embedding}\nsteps: []\n", "other.yaml")
    project.write("base: neox\nbricks: {other: bricks/neox}\nsteps: []\n", "other_family.yaml")
    with chdir(project.path):
        yield project


@pytest.fixture(scope="module")
def exported(world: Project) -> Path:
    found = document("export", *BOTH, "-o", "out")
    assert (found["for"], found["served_base"], found["alike"]) == ("llama.cpp", "org/small", [])
    assert {name: (one["path"], one["ranks"]) for name, one in found["adapters"].items()} == {
        "one": ("adapters/one.gguf", [4, 8]),
        "two": ("adapters/two.gguf", [4]),
    }
    return world.path / "out"


def served(exported: Path, world: Project, names: tuple[str, ...] = ("one", "two")) -> Any:
    from peft import PeftModel

    base = world.path / "base"
    adapted = [PeftModel.from_pretrained(live(base), world.path / "bricks" / name).eval() for name in names]
    return serving_llama_cpp(live(base), adapted, load_tokenizer(base))


def test_each_adapter_has_its_own_rank(exported: Path) -> None:
    for name, rank in (("one", 8), ("two", 4)):
        place = exported / "adapters" / f"{name}.gguf"
        assert (gguf_field(place, "general.name"), gguf_field(place, "adapter.lora.alpha")) == (name, rank)
        tensors = gguf_tensors(place)
        assert {t.shape[0] for key, t in tensors.items() if key.endswith("lora_a")} == {rank}
        assert {t.shape[1] for key, t in tensors.items() if key.endswith("lora_b")} == {rank}
        assert all(t.dtype == "float32" for t in tensors.values())


def test_check_chooses_adapters_by_lora_and_names_those_that_are_exchanged(exported: Path, world: Project) -> None:
    check = ("--expected", str(exported), "--tolerance", "0.001")
    with served(exported, world) as url:
        found = document("export", "check", url, *check)
    assert found["same"] is True
    assert [(m["model"], m["same"]) for m in found["models"]] == [("org/small", 2), ("one", 2), ("two", 2)]
    with served(exported, world, ("two", "one")) as url:
        assert refused("export", "check", url, *check).message.endswith(": one, two")


def run_script(place: Path, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run serve.sh in another folder, with a llama-server that prints its arguments, and how much memory it has for prompts."""
    fake = tmp_path / "bin" / "llama-server"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\necho "kept ${LLAMA_ARG_CACHE_RAM-}"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        ["sh", str(place), "-c", "512"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_serve_sh_names_the_converter_until_the_base_is_there(exported: Path, world: Project, tmp_path: Path) -> None:
    missing = run_script(exported / "serve.sh", tmp_path)
    assert missing.returncode == 1
    target = f"'{world.path.resolve()}/out/model.gguf'"
    assert f"python3 convert_hf_to_gguf.py DIR --outtype f32 --outfile {target}" in missing.stderr
    (tmp_path / "base.gguf").touch()
    done = run_script(exported / "serve.sh", tmp_path, MODEL="base.gguf")
    assert done.stdout.splitlines() == [
        *("-m", f"{tmp_path}/base.gguf", "--alias", "org/small", "--port", "8080"),
        *("--cache-type-k", "f32", "--cache-type-v", "f32"),
        *("--lora-scaled", "adapters/one.gguf:0", "--lora-scaled", "adapters/two.gguf:0", "-c", "512"),
        "kept 0",
    ]


def test_commands_are_printed_or_run_with_whole_models(world: Project, tmp_path: Path) -> None:
    said = call("export", *BOTH, "-o", str(tmp_path / "printed"))
    assert "convert_hf_to_gguf.py" in said.stderr.replace("\n", " ")
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    converter = folder / "convert_hf_to_gguf.py"
    converter.write_text("import sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv[1:]))\n")
    call("export", *BOTH, "--llama-cpp", str(folder), "-o", str(tmp_path / "run"))
    words = (tmp_path / "run" / "model.gguf").read_text("utf-8")
    assert words.startswith(f"{(world.path / 'base').resolve()} --outtype f32 --outfile ")
    converter.write_text("import sys\nsys.exit('this model is not supported')\n")
    error = refused("export", *BOTH, "--llama-cpp", str(folder), "-o", str(tmp_path / "failed"))
    assert "this model is not supported" in error.message
    assert not (tmp_path / "failed").exists()
    error = refused("export", *BOTH, "--llama-cpp", str(tmp_path), "-o", str(tmp_path / "none"))
    assert (error.exit_code, "expected llama.cpp's folder" in error.message) == (2, True)
    found = document("export", "base", *LLAMA, "-o", str(tmp_path / "whole"))
    assert (found["adapters"], found["rank"]) == ({}, None)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["expected.jsonl", "export.json", "serve.sh"]
    rows = [json.loads(line) for line in (tmp_path / "whole" / "expected.jsonl").read_text("utf-8").splitlines()]
    assert not any("request" in row for row in rows)
    (tmp_path / "whole" / "model.gguf").touch()
    words = run_script(tmp_path / "whole" / "serve.sh", tmp_path).stdout.splitlines()
    assert words[:2] == ["-m", f"{tmp_path}/whole/model.gguf"]
    assert "--lora-scaled" not in words
    assert words[-1] == "kept ", "without adapters, prompts are kept"
    assert document("export", "both", *LLAMA, "-o", str(tmp_path / "out"))["served_base"] == "base"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("other", "--brick", "head"), "module lm_head has no weight in the base", "ties its head"),
        (("other", "--brick", "embedding"), "has LoRA on an embedding", "export the run as a whole model"),
        (("other_family",), "bases of the class GPTNeoXForCausalLM", "workbench run"),
    ],
)
def test_what_llama_cpp_cannot_take_is_refused_first(
    options: tuple[str, ...], message: str, hint: str, world: Project, tmp_path: Path
) -> None:
    error = refused("export", *options, *LLAMA, "-o", str(tmp_path / "out"))
    assert message in error.message
    assert hint in str(error.hint)
    assert list(tmp_path.iterdir()) == []
