"""What the operating system refuses: one line that names the file and what to do, and the same command goes on afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from worlds.commands import call
from worlds.project import Project
from worlds.tiny import files_of

from workbench.cli.app import _fail, app
from workbench.console.failures import explained, short_of_memory
from workbench.ground.errors import GateFailedError, WorkbenchError, size
from workbench.ground.files import atomic_write, write_text
from workbench.ground.manifest import MANIFEST
from workbench.run.directory import RunDirectory
from workbench.weights.header import save_tensors

RECIPE = "bricks: {one: bricks/one, full: bricks/full}\nsteps: [{merge: ties}]\noutput: {dtype: float32}\n"


def workbench(
    *args: str, cwd: Path, limit: int | None = None, stdout: int = subprocess.PIPE, env: dict[str, str] | None = None, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """The command line in a process of its own, with a limit on the size of files where one is given."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [*before, sys.executable, "-m", "workbench", *args]
    return subprocess.run(
        command, cwd=cwd, text=True, check=False, preexec_fn=limited if limit else None, env=env, stdout=stdout, stderr=subprocess.PIPE
    )  # fmt: skip


def only_an_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit 1, an error with a hint, no traceback."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert "hint:" in result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


def test_a_write_that_ends_in_the_middle_goes_on(project: Project, cwd: Path) -> None:
    """A file that may not grow further stops the run in the middle of a tensor; the same command then ends with the same bytes."""
    project.write(RECIPE)
    whole_size = sum(f.stat().st_size for f in (project.path / "base").glob("*.safetensors"))
    result = workbench("run", "recipes/test.yaml", "--threads", "1", cwd=project.path, limit=whole_size)
    only_an_error(result, "model.safetensors: the file is larger than this process or file system allows", "ulimit -f unlimited")
    assert '"started"' in next((project.path / "runs").glob("*/run.json")).read_text(), "interrupted, not failed"
    call("run", "recipes/test.yaml", "--device", "cpu")
    found = files_of(next((project.path / "runs").glob("*/model")))
    shutil.rmtree(project.path / "runs")
    call("run", "recipes/test.yaml", "--device", "cpu")
    again = files_of(next((project.path / "runs").glob("*/model")))
    unlike = ("README.md", MANIFEST)  # the card names the time
    assert {n: b for n, b in found.items() if n not in unlike} == {n: b for n, b in again.items() if n not in unlike}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(project: Project, small_disk: Path) -> None:
    """Full from the start, full in the middle of a write, read-only; with space again the command ends."""
    project.write(RECIPE)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_100_000))
    command = ("run", "recipes/test.yaml", "--threads", "1", "--runs-dir", str(small_disk / "runs"))
    only_an_error(workbench(*command, cwd=project.path), f"{small_disk}/runs/test-", " kB free")
    filler.unlink()
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(small_disk / "text", "x" * 4_000_000)
    assert caught.value.filename == str(small_disk / "text")
    import torch

    with pytest.raises(OSError, match="No space left") as caught:
        save_tensors({"x": torch.zeros(2_000_000)}, small_disk / "x.safetensors")
    assert caught.value.filename == str(small_disk / "x.safetensors")
    assert [p.name for p in small_disk.iterdir()] == ["runs"], "what could not be written whole leaves nothing"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    only_an_error(workbench(*command, cwd=project.path), f"{small_disk}/runs", "the file system is read-only", "--runs-dir DIR")
    subprocess.run(["mount", "-o", "remount,rw,size=64m", str(small_disk)], check=True)
    assert workbench(*command, cwd=project.path).returncode == 0


def test_places_that_are_something_else(project: Project, cwd: Path) -> None:
    """The first command in a process of its own, the others in this one."""
    project.write(RECIPE)
    (project.path / "taken").write_text("")
    run = ("run", "recipes/test.yaml", "--runs-dir")
    only_an_error(workbench(*run, "taken", cwd=project.path), "expected a folder, but", "taken is a file")
    assert "taken is a file" in explained_error(*run, "taken/below").message
    long = "x" * 300
    message = explained_error(*run, long).message
    assert long in message
    assert "the name is too long (300 bytes" in message
    assert "/proc/none" in explained_error(*run, "/proc/none").message
    (project.path / ".workbench").mkdir(exist_ok=True)
    shutil.rmtree(project.path / ".workbench")
    (project.path / ".workbench").write_text("")
    assert ".workbench is a file" in explained_error("run", "recipes/test.yaml").message


def explained_error(*args: str) -> WorkbenchError:
    """Return the error that the command line shows, with a hint and exit code 1."""
    error = CliRunner().invoke(app, list(args)).exception
    shown = explained(error) if isinstance(error, OSError) else error
    assert isinstance(shown, WorkbenchError), repr(shown)
    assert (bool(shown.hint), shown.exit_code) == (True, 1)
    return shown


NOBODY = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
"""A user namespace, where permissions bind and the user has no entry in the list of users."""


@pytest.fixture
def nobody() -> list[str]:
    if not shutil.which("unshare") or subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a user namespace")
    return NOBODY


def test_permissions_and_no_home(project: Project, nobody: list[str]) -> None:
    """Without HOME and without an entry among the users everything works; a folder that may not be written is named."""
    project.write(RECIPE)
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    assert workbench("run", "recipes/test.yaml", cwd=project.path, env=env, before=nobody).returncode == 0
    locked = project.path / "locked"
    locked.mkdir(mode=0o555)
    run = ("run", "recipes/test.yaml", "--runs-dir")
    only_an_error(workbench(*run, "locked/runs", cwd=project.path, env=env, before=nobody), "locked/runs: permission denied")
    project.write("base: ~/base\n" + RECIPE, "home.yaml")
    only_an_error(
        workbench("run", "recipes/home.yaml", cwd=project.path, env=env, before=nobody),
        "this user has no home folder",
        "Set HOME",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--json"), ("--help",), ("--version",)], ids=" ".join)
def test_a_full_standard_output(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = workbench(*arguments, cwd=tmp_path, stdout=full.fileno())
    only_an_error(result, "standard output: no space is left on the disk")


def test_messages() -> None:
    full, long = "no space is left on the disk (", "the name is too long (300 bytes in its longest part"
    for names, text in {
        "ENOSPC": full, "EDQUOT": "the disk quota is used up", "EROFS": "the file system is read-only", "EACCES EPERM": "permission denied",
        "EISDIR": "expected a file, found a folder", "ENOTDIR EEXIST": "expected a folder, but", "EMFILE ENFILE": "too many open files",
        "EFBIG": "the file is larger than this process", "EIO": "the disk reports an input/output error",
        "ENOENT": "no such file or folder", "EXDEV": "invalid cross-device link", "ENAMETOOLONG": long,
    }.items():  # fmt: skip
        for number in (getattr(errno, name) for name in names.split()):
            file = f"/some/{'x' * (300 if text == long else 4)}"
            error = explained(OSError(number, os.strerror(number), file))
            assert error.message.startswith(f"{file}: {text}")
            assert (bool(error.hint), error.exit_code) == (True, 1)
            assert explained(OSError(number, os.strerror(number))).message.startswith("a file: ")
            assert explained(OSError(number, os.strerror(number), "/from", None, file)).message.startswith(f"{file}: {text}")
    copied = explained(shutil.Error([("/a", "/b", "[Errno 28] No space left on device: '/b'")]))
    assert copied.message.startswith("/b: cannot write the file: [Errno 28]")
    assert explained(OSError("Can't load the tokenizer\nmore")).message == "Can't load the tokenizer"
    assert explained(OSError(errno.ENOTDIR, "x", f"{__file__}/below")).message.endswith(f"{__file__} is a file")


def test_sizes() -> None:
    assert [size(n) for n in (0, 512, 1500, 269_000_000, 4.2e9, 3e12, 4e15)] == [
        "0 B", "512 B", "1.5 kB", "269 MB", "4.2 GB", "3.0 TB", "4000 TB",
    ]  # fmt: skip


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(RuntimeError), atomic_write(file) as temporary:
        temporary.write_text("new, cut sh")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "streams"),
    [
        (("methods",), (">&-", "2>&- >/dev/null </dev/null", "<&- >/dev/null", "<&- >&- 2>&-")),
        (("run", "test"), (">&-", "<&- >/dev/null", "<&- >&- 2>&-")),
        (("chat", "base"), (">&-", "<&- >/dev/null")),
        (("--help",), (">&-",)),
    ],
)
def test_closed_streams(arguments: tuple[str, ...], streams: tuple[str, ...], project: Project) -> None:
    """`>&-`, `2>&-` and `<&-`: an error before any work, or none; never a traceback, and nothing is written into files of the project."""
    project.write(RECIPE)
    command = shlex.join([sys.executable, "-m", "workbench", *arguments])
    for closed in streams:
        result = subprocess.run(
            ["sh", "-c", f"{command} {closed}"], cwd=project.path, capture_output=True, text=True, check=False
        )
        assert (result.returncode, "Traceback" in result.stderr) == (">&-" in closed.replace("2>&-", ""), False), result.stderr
        if closed == ">&-":
            assert result.stderr.startswith("error: standard output is closed"), result.stderr
            assert not (project.path / "runs").exists()


@pytest.mark.parametrize("kilobytes", [150_000, 250_000, 400_000])
@pytest.mark.part("upkeep")
def test_an_address_space_that_is_too_small(kilobytes: int, project: Project) -> None:
    command = f"ulimit -v {kilobytes}; exec {shlex.join([sys.executable, '-m', 'workbench', 'doctor'])}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(["sh", "-c", command], cwd=project.path, capture_output=True, text=True, check=False, env=environment)
    assert "ulimit -v unlimited" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 1


def test_memory_and_threads_that_are_refused() -> None:
    for error in (
        MemoryError(),
        OSError(errno.ENOMEM, "no"),
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: no"),
    ):
        wrapped = ValueError("later")
        wrapped.__context__ = error
        found = short_of_memory(wrapped)
        assert found is not None
        assert "ulimit -v unlimited" in str(found.hint)
    assert short_of_memory(RuntimeError("another")) is None
    assert short_of_memory(torch.OutOfMemoryError("of a device, which has a message of its own")) is None


def test_memory_that_a_library_was_refused_is_not_blamed_on_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    error = GateFailedError("transformers cannot load the written model", "Report this architecture.")
    error.__context__ = RuntimeError(f"unable to mmap 86384 bytes from file <x>: {os.strerror(errno.ENOMEM)} (12)")
    with pytest.raises(SystemExit) as ended:
        _fail(error)
    assert ended.value.code == 1
    assert "the system refuses more memory to this process" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_resumes(project: Project) -> None:
    """On a terminal, while `run` works: here it waits for another process."""
    run = RunDirectory(Path(project.run(RECIPE)["run"]))
    run.write({**run.read_record().to_dict(), "status": "started"})
    shutil.rmtree(run.model)
    terminal, end = os.openpty()
    with run.lock():
        command = [sys.executable, "-m", "workbench", "run", "recipes/test.yaml", "--wait"]
        # What runs in a shell's background ignores Ctrl-C, and so do the processes that it starts: this one would wait forever.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=project.path, stdin=end, stdout=end, stderr=end)
        signal.signal(signal.SIGINT, before)
        try:
            os.close(end)
            said = b""
            while b"waiting for it" not in said:
                said += os.read(terminal, 1000)
            process.send_signal(signal.SIGINT)
            process.wait(60)
            with contextlib.suppress(OSError):  # the end of a terminal
                while more := os.read(terminal, 1000):
                    said += more
        finally:
            process.kill()  # it waits for the lock that this process holds
    os.close(terminal)
    assert process.returncode == 130
    assert b"interrupted; run the same command again to resume" in said
    assert b"Traceback" not in said
