"""A run from recipe to directory: what it leaves, what it refuses, and what an interruption does to it (nothing)."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from worlds.commands import call
from worlds.project import CPU, Project
from worlds.stopped import stopped_run
from worlds.tiny import CHAT_TEMPLATE, edit_json, files_of, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.ground.manifest import MANIFEST
from workbench.models.identity import pick_device
from workbench.run.device import Work
from workbench.run.directory import RunDirectory, find_run, list_runs, remove_run
from workbench.run.execute import execute
from workbench.run.materialize import configuration_digest, materialize, swap
from workbench.run.plan import plan
from workbench.run.record import RunRecord
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digests, weights_digest

HEAD = "bricks: {one: bricks/one, two: bricks/two, full: bricks/full}\n"
TIES = HEAD + "steps: [{id: mix, merge: ties}]\n"
MIXED = HEAD + "steps: [{merge: ties}, {grow: depth, blocks: 1}]\noutput: {dtype: float16, shard_size: 20kB}\n"


def test_result_is_a_stock_model(project: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    document = project.run(TIES)
    model = Path(document["model"])
    loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.temperature == 0.5
    assert AutoTokenizer.from_pretrained(model).chat_template == CHAT_TEMPLATE
    base = {p.name for p in (project.path / "base").iterdir()}
    assert {p.name for p in model.iterdir()} == base | {"README.md", MANIFEST}
    live = materialize(project.resolve(TIES), CPU)
    tokens = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, loaded.eval()(tokens).logits)


def test_card(project: Project) -> None:
    document = project.run(TIES)
    text = (Path(document["model"]) / "README.md").read_text("utf-8")
    _, head, body = text.split("---", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "transformers"
    assert metadata["base_model_relation"] == "merge"
    assert "base_model" not in metadata, "no input has a hub id"
    assert "merge" in metadata["tags"]
    assert "merge: ties" in body
    assert document["configuration"] in body
    assert str(project.path) not in text


def test_a_record_has_every_field(project: Project) -> None:
    record = json.loads((Path(project.run("steps: []\n")["run"]) / "run.json").read_text("utf-8"))
    assert set(record) == RunRecord.model_fields.keys() - {"error"}
    fields = ("version", "seed", "tokenizer", "tf32", "said", "steps", "licences")
    assert [record[name] for name in fields] == [1, 0, None, False, {}, [], {"base": "unknown"}]


def test_record(project: Project) -> None:
    document = project.run(MIXED)
    assert set(document) >= {"run", "key", "status", "model", "adapter", "configuration", "steps", "seconds", "peak_bytes"}
    record = json.loads((Path(document["run"]) / "run.json").read_text("utf-8"))
    assert (record["status"], record["key"], record["device"]) == ("done", document["key"], "cpu")
    assert record["inputs"]["bricks"]["one"]["kind"] == "adapter"
    assert record["inputs"]["bricks"]["full"]["kind"] == "checkpoint"
    assert (record["steps"][0]["bricks"], record["steps"][0]["tensors"]) == (
        ["one", "two", "full"],
        len(tensors_of(project.path / "base")),
    )
    checkpoint = Checkpoint(Path(document["model"]), "x")
    digests = tensor_digests(checkpoint.entries)
    assert record["output"]["tensors"] == digests
    assert record["output"]["digest"] == weights_digest(checkpoint.specs, digests, checkpoint.config) == document["configuration"]
    assert record["output"]["bytes"] == sum(s.nbytes for s in checkpoint.specs.values())
    # PyPI's wheels name their build, such as +cu130, in `__version__` and not in their metadata.
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (Path(document["run"]) / "recipe.yaml").read_text("utf-8") == (project.path / "recipes" / "test.yaml").read_text(
        "utf-8"
    )
    events = [json.loads(line) for line in (Path(document["run"]) / "log.jsonl").read_text("utf-8").splitlines()]
    assert events[-1]["text"] == "done"


@pytest.mark.parametrize("text", [TIES, MIXED, HEAD + "steps: [{merge: average}]\noutput: {dtype: float32}\n"])
def test_digest_in_memory_is_that_of_the_run(project: Project, text: str) -> None:
    resolved = project.resolve(text)
    digest, tensors = configuration_digest(resolved, CPU)
    assert tensors is not None
    assert configuration_digest(resolved, CPU) == (digest, None)
    assert project.run(text)["configuration"] == digest
    written = tensors_of(next((project.path / "runs").iterdir()) / "model")
    assert all(torch.equal(written[n], t) for n, t in tensors.items())


def test_second_run_does_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    first = project.run(TIES)
    before = {p: p.stat().st_mtime_ns for p in Path(first["model"]).iterdir()}
    monkeypatch.setattr("workbench.run.forms.write_checkpoint", lambda *_, **__: pytest.fail("written again"))
    events: list[dict[str, Any]] = []
    second = project.run(TIES, events=events.append)
    assert {p: p.stat().st_mtime_ns for p in Path(second["model"]).iterdir()} == before
    assert (second["configuration"], second["key"]) == (first["configuration"], first["key"])
    assert events == [{"stage": "run", "text": "finished before: nothing to do"}]


def test_key_is_what_numbers_depend_on(project: Project) -> None:
    key = project.resolve(TIES).key
    for same in (
        TIES.replace("id: mix, ", ""),
        TIES + "description: x\n",
        TIES + "eval: [smoke]\n",
        TIES + "output: {shard_size: 1MB}\n",
    ):
        assert project.resolve(same).key == key
    for other in (TIES.replace("ties", "average"), TIES.replace("ties}", "ties, density: 0.3}"), TIES + "output: {dtype: float32}\n",
                  TIES.replace("two: bricks/two", "two: bricks/three")):  # fmt: skip
        assert project.resolve(other).key != key


def test_out(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "there"
    document = project.run(TIES, out=out)
    assert document["model"] == str(out)
    run = Path(document["run"]) / "model"
    assert files_of(out) == files_of(run)
    assert not list(tmp_path.glob(".there*"))
    with pytest.raises(WorkbenchError, match=r"-o .*there: exists and is not an empty directory"):
        project.run(TIES, out=out)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(WorkbenchError, match="is not an empty directory"):
        project.run(TIES, out=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert project.run(TIES, out=tmp_path / "empty")["model"] == str(tmp_path / "empty")
    assert files_of(tmp_path / "empty") == files_of(run)


def test_changing_a_copy_does_not_change_the_run(project: Project, tmp_path: Path) -> None:
    """Files in DIR may be edited in place: the finished run must not follow."""
    document = project.run(TIES, out=tmp_path / "mine")
    before = files_of(Path(document["run"]) / "model")
    edit_json(tmp_path / "mine" / "config.json", rope_theta=1.0)
    with (tmp_path / "mine" / "README.md").open("a") as stream:
        stream.write("mine\n")
    assert files_of(Path(document["run"]) / "model") == before


def test_disk_full(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 1000, 1000))
    resolved = project.resolve(TIES)
    assert any("1.0 kB free" in problem for problem in plan(resolved, project.path / "runs").problems)
    with pytest.raises(WorkbenchError, match=r"needs \d+(\.\d)? kB of disk space, 1\.0 kB free"):
        execute(resolved, project.path / "runs", Work(CPU))
    assert not list((project.path / "runs").rglob("*.safetensors"))
    assert not list((project.path / "runs").rglob("run.json"))


def test_a_plan_names_the_run_directory_that_run_will_write(project: Project) -> None:
    """The name is unknown as long as an input is unread: a name from sizes and times of files would be another."""
    resolved = project.resolve(MIXED)
    assert not resolved.known
    before = plan(resolved, project.path / "runs")
    assert (before.key, before.run) == (None, None)
    with chdir(project.path):
        assert "-…  (`run` names it after the content of the inputs" in call("plan", "recipes/test.yaml").stdout
    written = project.run(MIXED)
    after = plan(project.resolve(MIXED), project.path / "runs")
    assert after.run is not None
    assert after.run == f"{resolved.recipe.name}-{resolved.run_key[:10]}"
    assert (project.path / "runs" / after.run / "run.json").is_file()
    assert written["status"] == "done"


def test_plan(project: Project) -> None:
    resolved = project.resolve(MIXED)
    document = plan(resolved, project.path / "runs").to_dict()
    assert [list(s)[:2] for s in document["steps"]] == [["id", "merge"], ["id", "grow"]]
    assert document["steps"][0]["bricks"] == {"one": "adapter", "two": "adapter", "full": "checkpoint"}
    assert document["steps"][1]["new_layers"] == [4]
    assert (document["problems"], document["cached"]) == ([], [])
    assert not (project.path / "runs").exists()
    run = project.run(MIXED)
    record = json.loads((Path(run["run"]) / "run.json").read_text("utf-8"))
    assert document["write_bytes"] == record["output"]["bytes"]
    assert plan(project.resolve(MIXED), project.path / "runs").cached == ["run"]


def test_warnings(project: Project, tmp_path: Path) -> None:
    """Another tokenizer, other weights than the brick's card says, a licence that forbids or is unknown: said, not judged."""
    brick = tmp_path / "carded"
    shutil.copytree(project.path / "bricks" / "one", brick)
    card = {
        "version": 1,
        "name": "carded",
        "kind": "adapter",
        "base": {"id": "base", "digest": "0" * 32},
        "licence": "cc-by-nc-4.0",
    }
    (brick / "brick.yaml").write_text(yaml.safe_dump(card), "utf-8")
    full = tmp_path / "retokenised"
    shutil.copytree(project.path / "bricks" / "full", full)
    tokenizer = json.loads((full / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["vocab"]["other"] = tokenizer["model"]["vocab"].pop("w3")
    (full / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    resolved = project.resolve(
        f"base: base\nbricks: {{carded: {{brick: {brick}, any_base: true}}, full: {full}}}\nsteps: [{{merge: average}}]\n"
    )
    warnings = "\n".join(plan(resolved, project.path / "runs").warnings)
    assert (
        "brick 'carded' was made on another base than base: its brick.yaml records other weights or another config.json (0000000000"
        in warnings
    )
    assert "brick 'full': its vocabulary differs from the base's" in warnings
    assert "license of carded: cc-by-nc-4.0" in warnings
    assert "license of base: unknown (none stated)" in warnings


# -- interruptions


def killed_in_the_middle(project: Project, recipe: Path, meanwhile: Any) -> RunDirectory:
    """Start a run in another process, call `meanwhile(pid)` while it writes, kill it."""
    with stopped_run(project, recipe) as child:
        meanwhile(child.pid)
        assert child.poll() is None
    (journal,) = (project.path / "runs").glob("*/model.partial/journal.jsonl")
    assert len(journal.read_text("utf-8").splitlines()) >= 6
    return RunDirectory(journal.parents[1])


def test_kill_and_resume(project: Project) -> None:
    """kill -9 in the middle of a write: no other process may write meanwhile, nothing takes the half for a whole, the same command
    ends byte-identical to a run that nothing disturbed."""
    undisturbed = files_of(Path(project.run(TIES)["model"]))
    shutil.rmtree(project.path / "runs")
    recipe = project.path / "recipes" / "test.yaml"

    def meanwhile(pid: int) -> None:
        with pytest.raises(WorkbenchError, match=rf"another process \(pid {pid} on \S+ since .*\) writes this run") as caught:
            project.run(TIES)
        assert "resumes" in (caught.value.hint or "")
        with pytest.raises(WorkbenchError, match="another process"):
            remove_run(list_runs(project.path / "runs")[0])

    run = killed_in_the_middle(project, recipe, meanwhile)
    assert not run.done
    assert not run.model.exists()
    assert run.status == "started"
    with pytest.raises(WorkbenchError, match=r"base: no config\.json|is not finished|no such directory"):
        project.resolve(f"base: {run.partial}\n", "half.yaml")
    with pytest.raises(WorkbenchError, match=r"no such directory"):
        project.resolve(f"base: {run.model}\n", "half.yaml")
    kept = (
        len((run.partial / "journal.jsonl").read_text("utf-8").splitlines()) - 2
    )  # the first line is the layout, the last may be cut
    done: list[str] = []
    import workbench.weights.writer as writer

    real = writer._write_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_write_tensor", lambda *a: done.append(a[1]) or real(*a))  # type: ignore[func-returns-value]
        document = project.run(TIES)
    assert Path(document["run"]) == run.path
    assert len(done) <= len(tensors_of(run.model)) - kept
    assert files_of(run.model) == undisturbed
    assert not run.partial.exists()


def test_failure_leaves_no_model(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("workbench.run.forms.write_config", fail)  # after the last tensor, before the rename
        with pytest.raises(KeyboardInterrupt):
            project.run(TIES)
    (run,) = list_runs(project.path / "runs")
    assert not run.done
    assert project.run(TIES)["status"] == "done"
    (run,) = list_runs(project.path / "runs")  # under its final name
    assert run.done


# -- live models


def test_swap_and_back(project: Project) -> None:
    tokens = torch.arange(1, 9)[None]
    base = project.resolve("steps: []\n", "base.yaml")
    merged = project.resolve(TIES)
    model = materialize(base, CPU)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with torch.no_grad():
        first, expected = model(tokens).logits, materialize(merged, CPU)(tokens).logits
        assert not torch.equal(first, expected)
        with pytest.raises(ZeroDivisionError), swap(model, merged):
            assert torch.equal(model(tokens).logits, expected)
            raise ZeroDivisionError
        assert torch.equal(model(tokens).logits, first)
    for name, parameter in model.named_parameters():
        assert before[name][0] == parameter.data_ptr()
        assert torch.equal(before[name][1], parameter)
    model.half()
    with swap(model, merged):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    grown = project.resolve("steps: [{grow: depth, blocks: 1, check: off}]\n", "grown.yaml")
    with pytest.raises(WorkbenchError, match=r"recipe grown: its parameters differ from the live model's"), swap(model, grown):
        pass


# -- run directories


def test_find_and_remove(project: Project) -> None:
    runs = project.path / "runs"
    first = RunDirectory(Path(project.run(TIES, "first.yaml")["run"]))
    second = RunDirectory(Path(project.run(TIES.replace("ties", "average"), "first-average.yaml")["run"]))
    assert {r.name for r in list_runs(runs)} == {first.name, second.name}
    assert find_run(runs, first.name) == first
    assert find_run(runs, second.name[:15]) == second
    assert find_run(runs, str(first.path)).path == first.path.resolve()
    with pytest.raises(WorkbenchError, match="'first' matches 2 runs"):
        find_run(runs, "first")
    with pytest.raises(WorkbenchError, match="no run 'frist-average"):
        find_run(runs, "frist-average")
    size = first.size()
    assert remove_run(first) == size > 0
    assert not first.path.exists()
    assert [r.name for r in list_runs(runs)] == [second.name]


def test_a_damaged_record_is_no_run(project: Project) -> None:
    run = RunDirectory(Path(project.run(TIES)["run"]))
    (run.path / "run.json").write_text('{"status": "do', "utf-8")
    assert not run.done
    assert project.run(TIES)["status"] == "done"


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "meta"):
        with pytest.raises(WorkbenchError, match=f"--device {name}: expected auto, cpu, cuda or cuda:N"):
            pick_device(name)
    with pytest.raises(WorkbenchError, match="--device mps: many steps compute in float64") as metal:
        pick_device("mps")
    with pytest.raises(WorkbenchError, match="--device cuda:0,1: expected one device") as several:
        pick_device("cuda:0,1")
    assert metal.value.hint == "Use --device cpu."
    assert several.value.hint == "Use --device cuda:0, and start other runs on other devices at the same time."
    if not torch.cuda.is_available():
        with pytest.raises(WorkbenchError, match="this machine has 0 CUDA devices"):
            pick_device("cuda")
