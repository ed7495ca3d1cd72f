"""Hub ids: headers by range request for `plan`, downloads for `run`, the hub's own cache without network, errors that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from worlds.hub_server import TOKEN, CommandLine, HubServer, commit_of, header_bytes
from worlds.packed_models import save_fp8
from worlds.project import Project
from worlds.tiny import edit_json, files_of, save_adapter, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import INDEX

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = "base: org/tiny@main\nbricks: {one: org/lora}\nsteps: [{merge: task_arithmetic}]\n"
JUNK = ("pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "model.fp16.safetensors", "model-q4.gguf",
        "onnx/model.onnx", "checkpoint-5/adapter_model.safetensors", "training_args.bin", "trainer_state.json", ".gitattributes")  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME of the commands."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def workbench(server: HubServer, home: Path) -> Iterator[CommandLine]:
    """`workbench` with the hub in reach."""
    command = CommandLine(server.url, home)
    yield command
    command.close()


@pytest.fixture(scope="module")
def sharded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama in several files, among what else lies in a repository."""
    from transformers import AutoModelForCausalLM

    out = tmp_path_factory.mktemp("sharded") / "repository"
    shutil.copytree(llama, out, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(out, max_shard_size="20KB")
    for name in JUNK:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"junk")
    return out


def weights_sent(server: HubServer) -> dict[str, int]:
    return {file: count for file, count in server.sent.items() if file.endswith(".safetensors")}


def test_plan_reads_headers_and_run_fetches_the_rest(
    project: Project, server: HubServer, workbench: CommandLine, home: Path, sharded: Path, bricks: Path
) -> None:
    server.repositories |= {"org/tiny": sharded, "org/lora": bricks / "one"}
    server.forget()
    recipe = str(project.write(RECIPE, "hub.yaml"))
    code, out, err = workbench(project.path, "plan", recipe, "--json")
    assert code == 0, err
    plan = json.loads(out)
    shards = sorted(sharded.glob("model-0*.safetensors"))
    weights = {f"org/tiny/{f.name}": f for f in shards} | {
        "org/lora/adapter_model.safetensors": bricks / "one" / "adapter_model.safetensors"
    }
    assert len(shards) > 3
    assert weights_sent(server) == {name: header_bytes(file) for name, file in weights.items()}, "headers, to the byte"
    assert not [file for file in server.sent if file.endswith(JUNK)]
    assert plan["download_bytes"] == sum(f.stat().st_size for f in weights.values())
    assert [(d["repository"], d["commit"]) for d in plan["downloads"]] == [(n, commit_of(n)) for n in ("org/tiny", "org/lora")]
    assert (plan["key"], plan["run"], plan["problems"], plan["checked_at_run"]) == (None, None, [], [])
    local = project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n")
    from workbench.run.plan import plan as make_plan

    assert plan["read_bytes"] == make_plan(local, project.path / "runs").read_bytes

    server.forget()
    assert "from the hub first: org/tiny@" + commit_of("org/tiny")[:10] in workbench(project.path, "plan", recipe)[1]
    assert not server.sent
    assert all("/resolve/" not in path for _, path in server.requests)

    code, out, err = workbench(project.path, "run", recipe, "--json", "--device", "cpu")
    assert code == 0, err
    assert not [file for file in server.sent if file.endswith(JUNK)]
    assert weights_sent(server) == {name: file.stat().st_size for name, file in weights.items()}
    assert server.tokens == {f"Bearer {TOKEN}"}, "the token goes to the hub"
    result = json.loads(out)
    same = project.run("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n", "local.yaml")
    assert result["configuration"] == same["configuration"]
    inputs = json.loads((project.path / result["run"] / "run.json").read_text())["inputs"]
    assert inputs["base"]["revision"] == commit_of("org/tiny")
    assert inputs["bricks"]["one"]["revision"] == commit_of("org/lora")

    after = json.loads(workbench(project.path, "plan", recipe, "--json")[1])
    assert (after["download_bytes"], after["downloads"], after["cached"]) == (0, [], ["run"])
    for place in (project.path / "runs", project.path / ".workbench", home):
        assert not [file for file, data in files_of(place).items() if TOKEN.encode() in data]


def test_unfit_headers_end_a_run_before_any_download(
    project: Project, server: HubServer, workbench: CommandLine, sharded: Path, bricks: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(bricks / "one", tmp_path / "lora")
    factors = load_file(other / "adapter_model.safetensors")
    save_file(
        {n: torch.zeros(t.shape[0], 40) if "q_proj.lora_A" in n else t for n, t in factors.items()},
        other / "adapter_model.safetensors",
    )
    broken = shutil.copytree(sharded, tmp_path / "broken")
    edit_json(broken / INDEX, weight_map=None)
    server.repositories |= {"org/unfit": sharded, "org/wide-lora": other, "org/broken": broken}
    for command in ("plan", "run"):
        server.forget()
        recipe = str(project.write(RECIPE.replace("tiny@main", "unfit").replace("lora", "wide-lora"), "unfit.yaml"))
        code, _, err = workbench(project.path, command, recipe)
        assert code == 1
        assert (
            "brick 'one': model.layers.0.self_attn.q_proj.weight is [32, 32] in the base, the adapter's update is [32, 8] x [8, 40]"
            in err
        )
        for file, count in weights_sent(server).items():
            name = file.removeprefix("org/unfit/").removeprefix("org/wide-lora/")
            assert count == header_bytes((sharded if "unfit" in file else other) / name)
    code, _, err = workbench(project.path, "plan", str(project.write("base: org/broken\nsteps: []\n", "broken.yaml")))
    assert (code, "model.safetensors.index.json of org/broken lists no file that the repository holds" in err) == (1, True)


@pytest.mark.parametrize(
    ("base", "message", "hint"),
    [
        ("org/gated", "base: org/gated is gated", "/org/gated, then run `hf auth login`"),
        ("org/mising", "base: no such directory or hub repository: org/mising", "hf auth login"),
        ("org/pickles@v2", "base: org/pickles has no revision 'v2'", "/org/pickles/commits/main"),
        ("org/pickles@3f2c9d1", "base: org/pickles has no revision '3f2c9d1'", "all 40 digits"),
        ("org/pickles", "org/pickles has pickle files only (pytorch_model.bin), which are never opened", "org/pickles@refs/pr/N"),
        (
            "org/quants",
            "org/quants has GGUF files only (q4.gguf, q8.gguf), which are read",
            "hf download org/quants q4.gguf --local-dir",
        ),
        ("org/has space", "no such directory or hub repository: org/has space", "spelling"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_hub_errors(
    project: Project, server: HubServer, workbench: CommandLine, llama: Path, tmp_path: Path, command: str, base: str, message: str,
    hint: str,
) -> None:  # fmt: skip
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text((llama / "config.json").read_text())
    (pickles / "pytorch_model.bin").write_bytes(b"never opened")
    quants = tmp_path / "quants"
    quants.mkdir()
    for name in ("q4.gguf", "q8.gguf"):
        (quants / name).write_bytes(b"GGUF")
    server.repositories |= {"org/gated": llama, "org/pickles": pickles, "org/quants": quants}
    server.gated.add("org/gated")
    code, out, err = workbench(project.path, command, str(project.write(f"base: {base}\nsteps: []\n", "refused.yaml")))
    assert (code, out) == (1, "")
    assert message in err
    assert hint in err


@pytest.mark.parametrize("same", [True, False])
def test_what_headers_do_not_show_is_checked_at_run(
    project: Project, server: HubServer, workbench: CommandLine, llama: Path, tmp_path: Path, same: bool
) -> None:
    """A stored head that config.json ties is taken for a copy until the data are here."""
    from safetensors.torch import load_file, save_file

    name = f"org/tied-{same}"
    tied = shutil.copytree(llama, tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head if same else head + 1}, tied / "model.safetensors", metadata={"format": "pt"})
    server.repositories[name] = tied
    recipe = str(project.write(f"base: {name}\nsteps: []\n", "tied.yaml"))
    code, out, err = workbench(project.path, "plan", recipe)
    assert code == 0, err
    assert "checked at run: base: lm_head.weight equals model.embed_tokens.weight, as config.json states" in out
    code, _, err = workbench(project.path, "run", recipe, "--device", "cpu")
    assert code == (0 if same else 1)
    assert same or "lm_head.weight differs from model.embed_tokens.weight" in err


def test_integer_tensors_and_cards_wait_for_the_data(
    project: Project, server: HubServer, workbench: CommandLine, llama: Path, bricks: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for name, model, value in (("base", llama, 1), ("full", bricks / "full", 2)):
        made = shutil.copytree(model, tmp_path / f"ints-{name}")
        tensors = {**load_file(made / "model.safetensors"), "model.steps": torch.tensor([value])}
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        server.repositories[f"org/ints-{name}"] = made
    carded = tmp_path / "carded"
    shutil.copytree(bricks / "one", carded / "weights")
    card = {"version": 1, "name": "carded", "kind": "adapter", "base": {"id": "org/x", "digest": "0" * 32}, "files": "weights"}
    (carded / "brick.yaml").write_text(json.dumps(card))
    server.repositories["org/carded"] = carded
    text = "base: org/ints-base\nbricks: {full: org/ints-full, card: org/carded}\nsteps: [{merge: linear, bricks: {card: 1.0}}]\n"
    recipe = str(project.write(text, "ints.yaml"))
    code, out, err = workbench(project.path, "plan", recipe, "--json")
    assert code == 0, err
    assert json.loads(out)["checked_at_run"] == [
        "brick 'full': its integer tensors equal the base's", "brick 'card': the base has the weights that the brick's card records",
    ]  # fmt: skip
    code, _, err = workbench(project.path, "run", recipe, "--device", "cpu")
    assert code == 1
    assert "the integer tensor model.steps differs from the base's" in err
    assert (
        "brick 'card' was made on another base than org/ints-base: its brick.yaml records other weights or another config.json (0000000000"
        in err
    )


def test_vocabularies_growth_edits_and_recipes_plan_from_headers(
    project: Project, server: HubServer, workbench: CommandLine, llama: Path, bricks: Path, vocabularies: Path
) -> None:
    server.repositories |= {"org/words": vocabularies / "base", "org/words-other": vocabularies / "other",
                            "org/grown": llama, "org/grown-lora": bricks / "two"}  # fmt: skip
    union = "base: org/words\nbricks: {other: org/words-other}\ntokenizer: {source: union}\nsteps: [{merge: linear}]\n"
    (project.path / "words").symlink_to(vocabularies)
    (project.path / "facts.jsonl").write_text('{"prompt": "w1 is", "subject": "w1", "target": " w2"}\n')
    grown = (
        "base: org/grown\nbricks: {two: org/grown-lora, inner: {recipe: recipes/inner.yaml}}\nsteps:\n- merge: linear\n"
        "- {edit: finetune, facts: facts.jsonl}\n- {grow: depth, blocks: 1, check: off}\neval: [edits]\n"
    )
    project.write("base: base\nbricks: {one: bricks/one}\nsteps: [{merge: linear}]\n", "inner.yaml")
    plans = {}
    for name, text in (("union", union), ("grown", grown)):
        code, out, err = workbench(project.path, "plan", str(project.write(text, f"{name}.yaml")), "--json")
        assert code == 0, err
        plans[name] = json.loads(out)
    assert plans["grown"]["checked_at_run"] == ["brick 'inner': base and org/grown are the same base"]
    assert plans["grown"]["write_bytes"] > sum(d.stat().st_size for d in llama.glob("*.safetensors"))
    code, out, err = workbench(project.path, "run", str(project.path / "recipes" / "union.yaml"), "--json", "--device", "cpu")
    assert code == 0, err
    local = project.run(union.replace("org/words-other", "words/other").replace("org/words", "words/base"), "local.yaml")
    assert json.loads(out)["configuration"] == local["configuration"]
    for command in ("compare", "report"):
        server.forget()
        code, _, err = workbench(project.path, command, str(project.path / "recipes" / "grown.yaml"))
        assert code == 1
        assert "only the header was downloaded" in err
        assert not weights_sent(server), "stored scores are looked up without a download"


def test_saved_embeddings_and_quantised_repositories(
    project: Project, server: HubServer, workbench: CommandLine, llama: Path, tmp_path: Path
) -> None:
    """What an adapter saves of tied embeddings is compared at run; what to do about a quantised model names the repository."""
    saved = save_adapter(llama, tmp_path / "saved", seed=5, modules_to_save=["embed_tokens"])
    quantised = shutil.copytree(llama, tmp_path / "quantised")
    edit_json(quantised / "config.json", quantization_config={"quant_method": "mxfp4"})
    server.repositories |= {"org/tied": llama, "org/saved": saved, "org/quantised": quantised}
    recipe = str(project.write("base: org/tied\nbricks: {saved: org/saved}\nsteps: [{merge: task_arithmetic}]\n", "saved.yaml"))
    code, out, err = workbench(project.path, "plan", recipe, "--json")
    assert code == 0, err
    checks = json.loads(out)["checked_at_run"]
    assert "brick 'saved': head and embeddings stay tied" in checks
    assert workbench(project.path, "run", recipe, "--device", "cpu")[0] == 0
    code, _, err = workbench(project.path, "plan", str(project.write("base: org/quantised\nsteps: []\n", "quantised.yaml")))
    assert code == 1
    assert "from_pretrained('org/quantised'" in err
    assert ".workbench" not in err.partition("hint:")[2]


def test_fp8_repository(project: Project, server: HubServer, workbench: CommandLine, llama: Path, tmp_path: Path) -> None:
    """`plan` says from headers alone how weights are stored; `run` downloads and dequantizes them."""
    packed = shutil.copytree(llama, tmp_path / "packed")
    worth = save_fp8(packed, "block")
    server.repositories["org/packed"] = packed
    server.forget()
    recipe = str(project.write("base: org/packed\nsteps: []\noutput: {dtype: float32}\n", "packed.yaml"))
    code, out, err = workbench(project.path, "plan", recipe, "--json")
    assert code == 0, err
    assert "weights were stored in 8 bits (F8_E4M3 with a scale for each block of 16 × 24)" in out
    assert set(weights_sent(server).values()) == {header_bytes(packed / "model.safetensors")}
    code, out, err = workbench(project.path, "run", recipe, "--device", "cpu", "--json")
    assert code == 0, err
    found = tensors_of(project.path / json.loads(out)["model"])
    assert set(found) == set(worth)
    assert all(torch.equal(tensor, worth[name]) for name, tensor in found.items())


def test_a_card_cannot_point_outside_its_repository(
    project: Project, server: HubServer, workbench: CommandLine, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    card = {"version": 1, "name": "outside", "kind": "adapter", "base": {"id": "org/x"}, "files": "../../../secret"}
    (tmp_path / "outside" / "brick.yaml").write_text(json.dumps(card))
    server.repositories["org/outside"] = tmp_path / "outside"
    code, _, err = workbench(project.path, "plan", str(project.write("bricks: {one: org/outside}\nsteps: []\n", "outside.yaml")))
    assert code == 1
    assert "brick.yaml of org/outside points outside its repository" in err


def test_offline(
    project: Project, server: HubServer, workbench: CommandLine, home: Path, llama: Path, bricks: Path, tmp_path: Path
) -> None:
    """Without network: header folders and whole snapshots serve, a snapshot without weights does not pass for a model."""
    server.repositories |= {"org/seen": llama, "org/fetched": bricks / "one"}
    fetched = str(project.write("bricks: {one: org/fetched}\nsteps: [{merge: linear}]\n", "fetched.yaml"))
    seen = str(project.write("base: org/seen\nsteps: []\n", "seen.yaml"))
    assert workbench(project.path, "run", fetched, "--device", "cpu")[0] == 0
    shutil.rmtree(project.path / "runs")
    server.ranges = False  # a mirror that sends whole files
    code, online, err = workbench(project.path, "plan", seen, "--json")
    server.ranges = True
    assert code == 0, err
    requests = len(server.requests)
    offline = CommandLine(server.url, home, offline=True)
    assert json.loads(offline(project.path, "plan", seen, "--json")[1]) == json.loads(online)
    code, _, err = offline(project.path, "run", seen)
    assert code == 1
    assert "base: org/seen is neither a local directory nor complete in the hub cache, and the hub cannot be reached" in err
    assert "without HF_HUB_OFFLINE" in err
    code, out, err = offline(project.path, "run", fetched, "--json", "--device", "cpu")
    assert code == 0, err
    inputs = json.loads((project.path / json.loads(out)["run"] / "run.json").read_text())["inputs"]
    assert inputs["bricks"]["one"]["revision"] == commit_of("org/fetched")
    code, _, err = offline(project.path, "plan", str(project.write("base: org/never\nsteps: []\n", "never.yaml")))
    assert (code, "base: org/never is neither" in err) == (1, True)
    offline.close()
    assert len(server.requests) == requests


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def put(cache: Path, name: str, source: Path) -> None:
    """A directory as the hub's cache keeps it: blobs, and a snapshot of links."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(sorted(f for f in source.iterdir() if f.is_file())):
        (repo / "blobs" / f"blob{i}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")


@pytest.mark.parametrize("reach", ["offline", "unreachable"])
def test_recipe_on_cached_hub_ids_gives_the_bytes_of_local_ones(
    project: Project, hub: Path, llama: Path, bricks: Path, monkeypatch: pytest.MonkeyPatch, reach: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", reach == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    put(hub, "org/tiny", llama)
    put(hub, "org/lora", bricks / "one")
    result = project.run(RECIPE)
    local = project.run("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n", "local.yaml")
    assert result["configuration"] == local["configuration"]
    inputs = json.loads((Path(result["run"]) / "run.json").read_text())["inputs"]
    assert inputs["base"]["revision"] == COMMIT
    assert inputs["bricks"]["one"]["revision"] == COMMIT
    card = (Path(result["model"]) / "README.md").read_text("utf-8")
    assert "- org/tiny" in card
    assert "- org/lora" in card
    assert str(hub) not in card, "no path of this machine"


def test_index_of_a_snapshot_may_link_to_blobs(project: Project, hub: Path, sharded: Path, bricks: Path) -> None:
    put(hub, "org/tiny", sharded)
    put(hub, "org/lora", bricks / "one")
    assert project.resolve(RECIPE).base_digest == project.resolve("steps: []\n").base_digest
    next((hub / "models--org--tiny" / "snapshots" / COMMIT).glob("model-00002*")).unlink()
    with pytest.raises(WorkbenchError, match="org/tiny@main is neither a local directory nor complete in the hub cache"):
        project.resolve(RECIPE)
