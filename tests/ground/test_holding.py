"""Who holds a lock: noted with process, host and time, and only looked for where the number of the process means that process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.ground import holding
from workbench.ground.holding import BusyError, Holder, held

HOLD = """
import sys
from pathlib import Path
from workbench.ground.holding import held
with held(Path(sys.argv[1]), "the place", "works here", "Wait."):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holding_process(lock: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    process = holding_process(lock)
    found = Holder.of(lock)
    assert found is not None
    assert (found.pid, found.gone) == (process.pid, False)
    with pytest.raises(BusyError) as busy, held(lock, "the place", "works here", "Wait."):
        pass
    assert busy.value.message == f"the place: another process ({found}) works here"
    assert str(found).startswith(f"pid {process.pid} on {os.uname().nodename} since 2")
    process.kill()
    process.communicate()
    assert found.gone, "its note stays"
    assert Holder.of(lock) == found
    with held(lock, "the place", "works here", "Wait."):
        assert (mine := Holder.of(lock)) is not None
        assert (mine.pid, mine.gone) == (os.getpid(), False)
    assert [file.name for file in tmp_path.iterdir()] == ["x.lock"]


def test_a_process_of_another_machine_is_never_looked_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a process that has ended here, as another host, another boot, or another container of this host notes it."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host, machine = holding._here()
    ended = Holder(process.pid, 1e9, host, machine, "1")
    assert ended.gone
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("looked for"))
    for elsewhere in (replace(ended, host="other"), replace(ended, machine=f"{machine}1"), Holder(process.pid, 1e9)):
        assert not elsewhere.gone
    assert str(replace(ended, host="other")) == f"pid {process.pid} on other since 2001-09-09 01:46:40 UTC"
    assert str(Holder(3, 1e9)) == "pid 3 on an unknown host since 2001-09-09 01:46:40 UTC", "of an earlier version"


def test_a_number_that_another_process_got_since_is_no_holder() -> None:
    host, machine = holding._here()
    now = Holder(os.getpid(), 1e9, host, machine, holding._started(os.getpid()) or "")
    assert not now.gone
    assert replace(now, started="1").gone
    assert not replace(now, started="").gone, "a system that does not tell when processes start"


def test_a_lock_for_one_piece_of_work_goes_with_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held(tmp_path / "x.lock", "the place", "works here", "Wait.", once=True):
        raise KeyError
    assert [file.name for file in tmp_path.iterdir()] == ["x.lock"]
    with held(tmp_path / "x.lock", "the place", "works here", "Wait.", once=True):
        pass
    assert not list(tmp_path.iterdir())
