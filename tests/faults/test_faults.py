"""Every command that writes, while each of its calls to the operating system fails in turn, is the last of the process, or writes half.

A case ends with the right files, or with a named error after which the same command gives the right files. Nothing of the user's is lost.
A sample of the cases runs here; `make faults` runs all of them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worlds.fault_cases import World, save_models, shares
from worlds.fault_commands import COMMANDS, READING, named
from worlds.faults import Faults

SAMPLE = shares(500)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("the shim takes Linux and a C compiler")
    server = Faults(tmp_path_factory.mktemp("faults"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, count in SAMPLE.items() if count])
def test_a_fault_costs_nothing_but_the_command(name: str, faults: Faults, models: Path, tmp_path: Path) -> None:
    with World(faults, tmp_path, models, COMMANDS[name]) as world:
        chosen = world.sample(SAMPLE[name])
        found = [text for fault in chosen for text in world.problems(fault)]
        assert world.fired >= len(chosen) / 2
        assert not found, f"{len(found)} of {len(world.cases())} cases\n" + "\n".join(found)


def test_a_fault_of_each_kind_in_run(faults: Faults, models: Path, tmp_path: Path) -> None:
    with World(faults, tmp_path, models, COMMANDS["run"]) as world:
        chosen = {fault.kind: fault for fault in world.sample(None)}
        assert chosen.keys() >= {"write", "sync", "rename", "create", "truncate", "remove", "execute"}
        assert not [text for fault in chosen.values() for text in world.problems(fault)]


def test_every_command_runs_under_faults_or_only_reads() -> None:
    lines = [command.line for command in COMMANDS.values()]
    covered = {name for name in named() if any(f"{line} ".startswith(f"{name} ") for line in lines)}
    assert covered.isdisjoint(READING)
    assert covered | READING == {*named()}
    assert sum(SAMPLE.values()) == 500
