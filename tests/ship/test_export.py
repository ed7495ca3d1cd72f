"""`export`: adapters as LoRA servers read them, beside PEFT; serve.sh as a shell runs it; expected answers beside a running server."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.commands import call, document, refused
from worlds.completions_server import serving
from worlds.jsonl import write_jsonl
from worlds.local_server import Handler, LocalServer
from worlds.project import Project
from worlds.routing import write_prompts
from worlds.tiny import live, save_adapter

from workbench.adapters.linear import write_served
from workbench.adapters.read import Adapter
from workbench.models.prompts import load_tokenizer

PROMPTS = ["w1 w2 w3 is", "w40 of w41", "w7 w8 w9 w10 w11", "is of w55"]
BRICKS = ("one", "two", "three", "patterns")
VLLM = ("--for", "vllm", "--served-base", "org/small")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[..., Path], bricks: Path) -> Iterator[Project]:
    """A project with bricks of ranks 8 and 4, one of them rsLoRA and one with patterns; it is the working directory."""
    project = Project(tmp_path_factory.mktemp("a shipping project"))
    (project.path / "recipes").mkdir()
    llama = model_of("llama", torch.float32)
    (project.path / "base").symlink_to(llama)
    (project.path / "rounded").symlink_to(model_of("llama"))
    (project.path / "bricks").mkdir()
    for name in ("one", "two", "three", "full"):
        (project.path / "bricks" / name).symlink_to(bricks / name)
    save_adapter(
        llama,
        project.path / "bricks" / "patterns",
        seed=9,
        rank_pattern={"q_proj": 8, "layers.1.self_attn.v_proj": 2},
        alpha_pattern={"v_proj": 3},
    )
    save_adapter(llama, project.path / "bricks" / "dora", seed=10, use_dora=True)
    save_adapter(llama, project.path / "bricks" / "wide", seed=10, r=600, target_modules=["q_proj"])
    for name in ("copied", "whole"):
        place = save_adapter(llama, project.path / "bricks" / name, seed=11, modules_to_save=["norm"])
    tensors = load_file(place / "adapter_model.safetensors")
    save_file(
        {key: tensor + 0.5 if "norm" in key else tensor for key, tensor in tensors.items()}, place / "adapter_model.safetensors"
    )
    write_jsonl(project.path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    listed = ", ".join(f"{name}: bricks/{name}" for name in (*BRICKS, "dora", "wide", "full", "copied", "whole"))
    project.write(f"bricks: {{{listed}}}\nsteps: []\n", "all.yaml")
    project.write("base: rounded\nbricks: {two: bricks/two}\nsteps: []\n", "bf16.yaml")
    with chdir(project.path):
        yield project


@pytest.fixture(scope="module")
def exported(world: Project) -> Path:
    """The four bricks, exported for vLLM."""
    chosen = [part for name in BRICKS for part in ("--brick", name)]
    found = document("export", "all", *VLLM, *chosen, "-o", "out", "--prompts", "prompts.jsonl", "--tokens", "6")
    assert found["alike"] == [], "the prompts tell all models apart"
    return world.path / "out"


def under_peft(base: Path, place: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(live(base), place).eval()


def logits(model: Any, text: str, base: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**load_tokenizer(base)(text, return_tensors="pt")).logits
    return found


@pytest.mark.parametrize("name", BRICKS)
def test_peft_gives_the_logits_of_the_original(name: str, exported: Path, world: Project) -> None:
    base = world.path / "base"
    original = logits(under_peft(base, world.path / "bricks" / name), PROMPTS[0], base)
    plain = logits(under_peft(base, exported / "adapters" / name), PROMPTS[0], base)
    assert (original - logits(live(base), PROMPTS[0], base)).abs().max() > 0.1
    torch.testing.assert_close(plain, original, atol=1e-5, rtol=0)


def test_weights_that_the_base_stores_transposed(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """GPT-2 stores its linear weights as [in, out]; PEFT gives the logits of the original there too."""
    base = model_of("gpt2", torch.float32)
    original = save_adapter(base, tmp_path / "original", seed=3, family="gpt2", fan_in_fan_out=True)
    write_served(Adapter(original, "original"), tmp_path / "plain", "gpt2", 8)
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text("utf-8"))["fan_in_fan_out"] is True
    ids = torch.arange(8)[None]
    with torch.no_grad():
        made, wanted = (under_peft(base, tmp_path / name)(ids).logits for name in ("plain", "original"))
        assert (wanted - live(base)(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)


def test_the_files_are_those_that_vllm_reads(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["adapters", "expected.jsonl", "export.json", "serve.sh"]
    for name in BRICKS:
        place = exported / "adapters" / name
        assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = json.loads((place / "adapter_config.json").read_text("utf-8"))
        vllm_accepts(config, "org/small", 8)
        for key, tensor in load_file(place / "adapter_model.safetensors").items():
            assert tensor.shape[0 if "lora_A" in key else 1] == 8
            assert key.startswith("base_model.model.model.layers.")
            assert tensor.dtype == torch.float32


def vllm_accepts(config: Mapping[str, Any], served: str, most: int) -> None:
    """The rules of vLLM's PEFTHelper and of its file system resolver, and what it would ignore without a word."""
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == served
    assert config["r"] <= most
    assert config["bias"] == "none"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert config["lora_alpha"] / config["r"] == 1, "scaling"
    assert not config.get("use_rslora")
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")


def test_expected_answers_are_greedy_texts_with_their_log_probabilities(exported: Path, world: Project) -> None:
    rows = [json.loads(line) for line in (exported / "expected.jsonl").read_text("utf-8").splitlines()]
    assert [(row["model"], row["prompt"]) for row in rows] == [(m, p) for m in ("org/small", *BRICKS) for p in PROMPTS]
    base, tokenizer = world.path / "base", load_tokenizer(world.path / "base")
    for row in (row for row in rows if row["adapter"] in (None, "two", "patterns")):
        model = live(base) if row["adapter"] is None else under_peft(base, world.path / "bricks" / row["adapter"])
        ids, answer = list(row["prompt_tokens"]), []
        assert ids == tokenizer(row["prompt"])["input_ids"]
        for logprob, margin in zip(row["logprobs"], row["margins"], strict=True):
            with torch.no_grad():
                values = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1].log_softmax(-1).topk(2)
            answer.append(int(values.indices[0]))
            assert logprob == pytest.approx(float(values.values[0]), abs=1e-4)
            assert margin == pytest.approx(float(values.values[0] - values.values[1]), abs=1e-4)
        assert answer == row["tokens"]
        assert row["text"].split() == tokenizer.decode(answer, skip_special_tokens=True).split()
        assert row["ends"][-1] == len(row["text"])


def served(exported: Path, world: Project, swapped: bool = False) -> dict[str, Any]:
    base = world.path / "base"
    places = {name: exported / "adapters" / name for name in BRICKS}
    if swapped:
        places["one"], places["two"] = places["two"], places["one"]
    return {"org/small": live(base), **{name: under_peft(base, place) for name, place in places.items()}}


def test_check_passes_and_names_exchanged_adapters(exported: Path, world: Project) -> None:
    with serving(served(exported, world), load_tokenizer(world.path / "base")) as url:
        found = document("export", "check", url, "--expected", str(exported), "--tolerance", "0.001")
        assert (
            "all 20 answers are as expected, within 0.001 nats"
            in call("export", "check", f"{url}/v1", "--expected", str(exported / "expected.jsonl"), "--tolerance", "0.001").stderr
        )
    assert found["same"] is True
    assert [(m["model"], m["answers"], m["same"]) for m in found["models"]] == [(n, 4, 4) for n in ("org/small", *BRICKS)]
    assert all(m["largest"] < 1e-4 for m in found["models"])
    with serving(served(exported, world, swapped=True), load_tokenizer(world.path / "base")) as url:
        error = refused("export", "check", url, "--expected", str(exported))
    assert error.exit_code == 1
    assert error.message.endswith(": one, two")
    assert int(error.message.split()[0]) >= 6, "nearly all of the 8 answers"


def test_check_says_what_is_wrong_with_a_server(exported: Path, world: Project) -> None:
    check = ("--expected", str(exported))
    models = served(exported, world)
    del models["patterns"]
    with serving(models, load_tokenizer(world.path / "base")) as url:
        assert "does not serve 'patterns'" in refused("export", "check", url, *check).message
    assert "cannot be reached" in refused("export", "check", url, *check).message
    assert refused("export", "check", "localhost:8000", *check).exit_code == 2
    assert "no such file" in refused("export", "check", url).message
    for body, expected in (
        (b"<html>", "not JSON"),
        (b"{}", "choices[0].text"),
        (b'{"choices": [{"text": "w1"}]}', "token_logprobs"),
    ):
        with answering(body) as address:
            assert expected in refused("export", "check", address, *check).message


def answering(body: bytes) -> LocalServer:
    """A server that gives one answer to everything."""

    class Answers(Handler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    return LocalServer(Answers)


def arguments(script: Path, program: str, tmp_path: Path, **variables: str) -> list[str]:
    """The arguments that a script gives to a program, as a shell runs it."""
    fake = tmp_path / "bin" / program
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{fake.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(script), "--port", "9"], env={**os.environ, "PATH": path, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_serve_sh_gives_vllm_every_adapter(exported: Path, tmp_path: Path) -> None:
    assert " " in str(exported)
    found = arguments(exported / "serve.sh", "vllm", tmp_path)
    assert found == [
        "serve",
        "org/small",
        "--served-model-name",
        "org/small",
        "--dtype",
        "float32",
        "--generation-config",
        "vllm",
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--max-loras",
        "4",
        "--max-cpu-loras",
        "4",
        "--lora-modules",
        *(f"{name}={exported.resolve()}/adapters/{name}" for name in BRICKS),
        "--port",
        "9",
    ]
    assert arguments(exported / "serve.sh", "vllm", tmp_path, MODEL="/models/small")[1] == "/models/small"


def test_sglang_has_its_own_flags_and_names(world: Project, tmp_path: Path) -> None:
    options = ("--for", "sglang", "--served-base", "org/small", "--tokens", "2", "-o", str(tmp_path / "out"))
    found = document("export", "bf16", *options, "--prompts", "prompts.jsonl", "--samples", "1")
    assert (found["rank"], found["adapters"]["two"]["ranks"]) == (8, [4])
    assert 0.001 < found["rounding"] < 1
    assert found["tolerance"] == pytest.approx(2 * found["rounding"], abs=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "out" / "expected.jsonl").read_text("utf-8").splitlines()]
    assert [row["model"] for row in rows] == ["org/small", "org/small:two"]
    words = arguments(tmp_path / "out" / "serve.sh", "python3", tmp_path)
    assert words == [
        "-m",
        "sglang.launch_server",
        "--model-path",
        "org/small",
        "--served-model-name",
        "org/small",
        "--dtype",
        "bfloat16",
        "--sampling-defaults",
        "openai",
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--max-loras-per-batch",
        "2",
        "--lora-paths",
        f"two={tmp_path / 'out'}/adapters/two",
        "--port",
        "9",
    ]


def test_runs_of_adapters_models_and_routers(world: Project, tmp_path: Path) -> None:
    short = ("--tokens", "2", "--samples", "2")
    adapter = Path(
        world.run("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter}\n", "lora.yaml")["run"]
    )
    found = document("export", adapter.name, *VLLM, *short, "-o", str(tmp_path / "lora"))
    assert list(found["adapters"]) == ["lora"]

    model = Path(world.run("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n", "sum.yaml")["run"])
    found = document("export", model.name, "--for", "vllm", *short, "-o", str(tmp_path / "sum"))
    assert (found["adapters"], found["rank"], found["served_base"]) == ({}, None, "sum")
    assert sorted(path.name for path in (tmp_path / "sum").iterdir()) == ["expected.jsonl", "export.json", "serve.sh"]
    words = arguments(tmp_path / "sum" / "serve.sh", "vllm", tmp_path, MODEL="elsewhere")
    assert words[1:4] == ["elsewhere", "--served-model-name", "sum"]
    said = call("export", model.name, "--for", "vllm", *short, "-o", "inside").stderr
    assert "serve:  sh inside/serve.sh" in said
    said = call("export", model.name, "--for", "vllm", *short, "-o", str(tmp_path / "far")).stderr
    assert re.search(r"serve:  MODEL=.+/model.? sh \S+/far/serve.sh", said), "the model is outside of what is exported"
    found_there = arguments(world.path / "inside" / "serve.sh", "vllm", tmp_path)[1]
    assert Path(found_there).resolve() == (model / "model").resolve()
    found = document("export", "rounded", "--for", "vllm", *short, "-o", str(tmp_path / "rounded"))
    assert (found["adapters"], found["served_base"], found["dtype"]) == ({}, "llama", "bfloat16")
    error = refused("export", model.name, *VLLM, "-o", str(tmp_path / "none"))
    assert (error.exit_code, "is a whole model, which has no adapters" in error.message) == (2, True)

    write_prompts(world.path / "calibration", {"one": 0, "two": 1}, count=16, templates=4)
    text = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: ridge, calibration: 'calibration/{brick}.jsonl'}]\n"
    routed = Path(world.run(text, "routed.yaml")["run"])
    found = document("export", str(routed / "configuration"), *VLLM, *short, "-o", str(tmp_path / "routed"))
    assert list(found["adapters"]) == ["one", "two"]
    for file in ("routing.json", "router.safetensors"):
        assert (tmp_path / "routed" / file).read_bytes() == (routed / "configuration" / file).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "routed" / "expected.jsonl").read_text("utf-8").splitlines()]
    first = [
        json.loads((world.path / "calibration" / f"{name}.jsonl").read_text().splitlines()[0])["prompt"]
        for name in ("one", "two")
    ]
    assert [row["prompt"] for row in rows] == first * 3


@pytest.mark.parametrize(
    ("options", "code", "message", "hint"),
    [
        (
            ("all", "--for", "tgi", "--served-base", "b"),
            2,
            "--for tgi: unknown server",
            "vllm, sglang, llama.cpp, semantic-router",
        ),
        (("all", *VLLM, "--llama-cpp", "."), 2, "only --for llama.cpp converts models", "Leave --llama-cpp out"),
        (("all", "--for", "vllm", "--brick", "one"), 2, "--served-base is missing", "--served-base NAME"),
        (("all", *VLLM, "--brick", "dora"), 1, "adapter 'dora' has DoRA", "workbench brick bake"),
        (("all", *VLLM, "--brick", "whole"), 1, "a whole tensor for model.", "brick extract"),
        (("all", *VLLM, "--brick", "wide"), 1, "rank 600: servers accept ranks up to 512", "rank: 512"),
        (("all", *VLLM, "--brick", "full"), 1, "brick 'full' is no adapter", "brick extract"),
        (("all", *VLLM, "--brick", "tow"), 2, "has no such brick. Did you mean 'two'?", ""),
        (("all", "--for", "vllm", "--served-base", "one", "--brick", "one"), 2, "an adapter has the same name", ""),
        (("all", "--for", "vllm", "--served-base", "a b", "--brick", "one"), 2, "expected a hub id", ""),
        (("nothing", *VLLM), 2, "'nothing': expected a recipe", ""),
        (("bricks/one", *VLLM), 1, "is an adapter without a run or recipe", "recipe new"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    options: tuple[str, ...], code: int, message: str, hint: str, world: Project, tmp_path: Path
) -> None:
    error = refused("export", *options, "-o", str(tmp_path / "out"))
    assert error.exit_code == code
    assert message in error.message
    assert hint in str(error.hint)
    assert list(tmp_path.iterdir()) == []


def test_copies_of_the_base_are_left_out(world: Project, tmp_path: Path) -> None:
    assert "model.norm" in json.dumps(list(load_file(world.path / "bricks" / "copied" / "adapter_model.safetensors")))
    options = ("--tokens", "1", "--prompts", "prompts.jsonl", "--samples", "1", "-o", str(tmp_path / "out"))
    document("export", "all", *VLLM, "--brick", "copied", *options)
    place, base = tmp_path / "out" / "adapters" / "copied", world.path / "base"
    vllm_accepts(json.loads((place / "adapter_config.json").read_text("utf-8")), "org/small", 8)
    assert all(".lora_" in key for key in load_file(place / "adapter_model.safetensors"))
    original, plain = (
        logits(under_peft(base, adapter), PROMPTS[1], base) for adapter in (world.path / "bricks" / "copied", place)
    )
    torch.testing.assert_close(plain, original, atol=1e-5, rtol=0)


def test_models_that_the_prompts_do_not_tell_apart_are_named(world: Project, tmp_path: Path) -> None:
    world.write("bricks: {one: bricks/one, again: bricks/one}\nsteps: []\n", "twice.yaml")
    options = ("--tokens", "2", "--prompts", "prompts.jsonl", "--samples", "1")
    said = call("export", "twice", *VLLM, *options, "-o", str(tmp_path / "out")).stderr
    assert "the prompts do not tell 'one' from 'again'" in said.replace("\n", " ")
    assert "these are the bricks of twice; its result is exported by `workbench export RUN`" in said


def test_a_directory_with_files_is_never_overwritten(exported: Path) -> None:
    assert "not an empty directory" in refused("export", "all", *VLLM, "--brick", "one", "-o", str(exported)).message
