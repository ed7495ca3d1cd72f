"""`--log`: each run holds what the score store holds and no secret, and a tracker that fails loses no scores."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import pytest

from worlds.commands import call, document, refused
from worlds.processes import workbench
from worlds.project import Project
from worlds.search_world import RECIPE, lay_out
from worlds.wandb_file import read_run

from workbench.trackers import runs as trackers
from workbench.trackers.runs import LoggedRun

EVAL = ("eval", "mine", "--device", "cpu", "--limit", "8")
SECRET = "0123456789abcdef0123456789abcdef01234567"


def installed(name: str) -> Any:
    """Return a tracker's module; skip the test without it, unless WORKBENCH_REQUIRE_TRACKERS=1 asks for it."""
    return importlib.import_module(name) if os.environ.get("WORKBENCH_REQUIRE_TRACKERS") == "1" else pytest.importorskip(name)


class Kept:
    """A tracker that keeps what it is given."""

    place = "a list"

    def __init__(self) -> None:
        self.runs: list[LoggedRun] = []

    def log(self, run: LoggedRun) -> None:
        self.runs.append(run)


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with the recipe mine and a suite of two tasks; trackers keep their files in it."""
    found = lay_out(project)
    found.write(RECIPE, "mine.yaml")
    monkeypatch.chdir(found.path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{found.path}/runs.db")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return found


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """The tracker that `--log` opens."""
    tracker = Kept()
    monkeypatch.setattr(trackers, "open_tracker", lambda tool, project: tracker if tool else None)
    return tracker


def stored(name: str) -> dict[str, float]:
    """Return a configuration's stored scores and their intervals by the names that they have in a tracker."""
    (one,) = (one for one in document(*EVAL)["configurations"] if one["name"] == name)
    found = {}
    for task, metrics in one["tasks"].items():
        found[f"words/{task}/n"] = metrics.pop("n")
        for metric, value in metrics.items():
            known = {"": value["value"], "_low": value["low"], "_high": value["high"]}
            found |= {f"words/{task}/{metric}{end}": number for end, number in known.items() if number is not None}
    assert len(found) > 4
    return found


def test_each_configuration_is_a_run_with_its_stored_scores(world: Project, kept: Kept) -> None:
    called = call(*EVAL, "--log", "mlflow")
    assert called.stderr.endswith("logged 5 runs to a list\n")
    printed = document(*EVAL)
    assert [run.name for run in kept.runs] == [one["name"] for one in printed["configurations"]]
    for run, one in zip(kept.runs, printed["configurations"], strict=True):
        assert {name: value for name, value in run.metrics.items() if name.startswith("words/")} == stored(run.name)
        assert (run.tags["plan.words"], run.tags["digest"], run.group) == (printed["plan"], one["digest"], "words")
        assert 0 < run.metrics["cost/seconds"] < 600
        assert run.metrics["cost/peak_bytes"] > 1e7
    mine = kept.runs[-1]
    assert mine.params.items() >= {"base": "base", "mix.merge": "ties", "mix.density": 0.5, "mix.lambda": 1.0}.items()
    assert (mine.tags["role"], mine.tags["recipe"]) == ("configuration", "recipes/mine.yaml")
    first = [run.key for run in kept.runs]
    assert len(set(first)) == len(first)
    kept.runs.clear()
    call(*EVAL, "--log", "mlflow")
    assert [run.key for run in kept.runs] == first, "logged again, it is the same run"


@pytest.mark.slow
def test_mlflow_holds_the_stored_scores_once(world: Project) -> None:
    mlflow = installed("mlflow")
    for _ in range(2):  # the second call scores nothing, and updates the run
        said = call(*EVAL, "--no-controls", "--log", "mlflow", "--log-project", "tries").stderr
        assert said.endswith(f"logged 1 run to mlflow: experiment tries at sqlite:///{world.path}/runs.db\n")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tries").experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert {name: value for name, value in run.data.metrics.items() if name.startswith("words/")} == stored("mine")
    assert run.data.params.items() >= {"base": "base", "mix.merge": "ties", "mix.density": "0.5"}.items()
    assert run.data.tags["recipe"] == "recipes/mine.yaml"
    assert set(run.data.tags) == {
        *("workbench.key", "mlflow.runName", "role", "digest", "recipe", "plan.words", "workbench", "group")
    }, "no user, command or git remote is logged"


def test_mlflow_takes_a_run_that_is_larger_than_one_of_its_calls(world: Project) -> None:
    mlflow = installed("mlflow")
    names = [f"step.f{i}" for i in range(230)]
    run = LoggedRun("big", "g", "k", dict.fromkeys(names, "x" * 7000), {f"s/a,b/m{i}": i / 7 for i in range(310)}, {"role": "x"})
    tracker = trackers.open_tracker("mlflow", None)
    assert tracker
    assert trackers.log_runs(tracker, [run]).startswith("logged 1 run to mlflow: experiment workbench at sqlite:")
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("workbench").experiment_id])
    assert found.data.metrics == {f"s/a_b/m{i}": i / 7 for i in range(310)}
    assert found.data.params == dict.fromkeys(names, "x" * 6000)


@pytest.mark.slow
def test_wandb_keeps_the_stored_scores_offline_without_the_key(world: Project) -> None:
    """In a process of its own, because wandb reads its environment once."""
    installed("wandb")
    done, imported = workbench(*EVAL, "--no-controls", "--log", "wandb", cwd=world.path, watched=["wandb", "mlflow"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("logged 1 run to wandb: project workbench (offline)\n")
    assert imported == {"wandb"}
    (file,) = (world.path / "wandb").glob("offline-run-*/run-*.wandb")
    run, config, (row,) = read_run(file)
    assert (run.project, run.display_name, run.run_group, run.job_type) == ("workbench", "mine", "words", "configuration")
    assert {name: value for name, value in row.items() if name.startswith("words/")} == stored("mine")
    assert config.items() >= {"base": "base", "mix.merge": "ties", "mix.density": 0.5}.items()
    assert config["workbench"]["recipe"] == "recipes/mine.yaml"
    for path in (world.path / "wandb").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert "--no-controls" not in file.read_bytes().decode("latin-1"), "the command line is not logged"


@pytest.mark.slow
def test_an_unreachable_tracker_fails_after_the_scores_are_stored(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter22@127.0.0.1:9")
    done, _ = workbench(*EVAL, "--log", "mlflow", "--json", cwd=world.path)
    assert done.returncode == 1
    assert "0 of 5 runs logged to mlflow: experiment workbench at http://…@127.0.0.1:9, then it failed: " in done.stderr
    assert "hint: All scores are stored. Run the same command again" in done.stderr
    assert "hunter22" not in done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads(done.stdout)["configurations"]) == 5
    assert len(list(world.path.glob("runs/scores/*/*.jsonl.gz"))) == 5 + 1  # and the items


@pytest.mark.parametrize(("command", "tool"), [("eval", "wandb"), ("search", "mlflow")])
def test_bad_options_are_refused_before_any_work(
    world: Project, command: str, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tool, None)
    error = refused(command, "mine", "--log", tool)
    assert (error.message, error.exit_code) == (f"--log {tool}: cannot import {tool}: it is not installed", 1)
    assert error.hint == "pip install 'brick-workbench[log]'"
    error = refused(command, "mine", "--log-project", "tries")
    assert (error.message, error.exit_code) == ("--log-project tries: nothing is logged without --log", 2)
    assert refused(command, "mine", "--log", "mlflow", "--log-project", " ").message == "--log-project: the name is empty"
    assert "'tensorboard' is not one of" in call(command, "mine", "--log", "tensorboard", code=2).stderr
    assert not (world.path / "runs").exists()


@pytest.mark.slow
def test_settings_of_a_tracker_are_checked_before_any_work(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("wandb")
    monkeypatch.setenv("HOME", str(world.path))
    monkeypatch.delenv("WANDB_API_KEY")
    for mode, message in {
        "online": "--log wandb: wandb is not logged in",
        "disabled": "--log wandb: WANDB_MODE=disabled switches wandb off",
    }.items():
        monkeypatch.setenv("WANDB_MODE", mode)
        done, _ = workbench(*EVAL, "--log", "wandb", cwd=world.path)
        assert f"error: {message}" in done.stderr
    installed("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://me:hunter22@host/x")
    error = refused(*EVAL, "--log", "mlflow")
    assert error.message.startswith("--log mlflow: ")
    assert "hunter22" not in error.message
    assert not (world.path / "runs").exists()
