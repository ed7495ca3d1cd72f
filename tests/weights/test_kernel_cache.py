"""The library of compiled kernels: checked before it is loaded, built again where it is damaged, and named in records."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worlds.project import Project

from workbench.weights import kernels

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
SAYS = "from workbench.weights import kernels; print(kernels.compiled())"


@pytest.fixture(scope="module", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compiler that does not optimize, unless a test names another: a library takes 0.1 s instead of 0.6."""
    compiler = tmp_path_factory.mktemp("compiler") / "cc-quick"
    compiler.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    kernels.backend()  # this process keeps the usual compiler
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(compiler))
        yield


def python(code: str, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, with a cache folder of its own."""
    given = {k: v for k, v in os.environ.items() if k != "WORKBENCH_KERNELS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**given, "XDG_CACHE_HOME": str(cache), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def libraries(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (cache / "brick-workbench").iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a library that a process has built. A test changes a copy of it."""
    cache = tmp_path_factory.mktemp("built")
    assert python(SAYS, cache).stdout == "True\n"
    return cache


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "not a library", "another name"])
def test_a_damaged_library_is_built_again(tmp_path: Path, built: Path, damage: str) -> None:
    """Not loaded: the loader dies of SIGBUS where a file is shorter than its header says."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    before = libraries(tmp_path)
    (name,) = before
    data = {"cut": before[name][:4096], "empty": b"", "not a library": b"x" * 100, "another name": before[name],
            "one bit": before[name][:-1] + bytes([before[name][-1] ^ 1])}[damage]  # fmt: skip
    place = tmp_path / "brick-workbench" / name
    place.write_bytes(data)
    if damage == "another name":
        place.rename(place.with_stem(f"{place.stem.rpartition('-')[0]}-{'0' * 32}"))
    again = python(SAYS, tmp_path)
    assert (again.returncode, again.stdout) == (0, "True\n")
    assert libraries(tmp_path) == before, "the damaged file is gone and the same library is there"


def test_the_compiler_may_have_flags(tmp_path: Path) -> None:
    """`CC` is a command line, as make takes it; another command has another library."""
    quick = os.environ["CC"]
    assert python(SAYS, tmp_path, CC=f"{quick} -O1").stdout == "True\n"
    assert python(SAYS, tmp_path, CC=f"env {quick}").stdout == "True\n"
    assert len(libraries(tmp_path)) == 2
    assert python(SAYS, tmp_path, CC="cc --no-such-flag").stdout == "False\n"
    assert python(SAYS, tmp_path, CC='cc "').stdout == "False\n"


def test_another_version_of_the_compiler_builds_again(tmp_path: Path) -> None:
    compiler = tmp_path / "mycc"

    def version(text: str) -> None:
        compiler.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{text}"; else exec cc "$@" -O0; fi\n')
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)

    for text, count in (("mycc 1", 1), ("mycc 1", 1), ("mycc 2", 2)):
        version(text)
        assert python(SAYS, tmp_path, CC=str(compiler)).stdout == "True\n"
        keys = {name.split("-")[1] for name in libraries(tmp_path)}
        assert len(keys) == count


@pytest.mark.parametrize("part", ["_processor", "_FLAGS", "_SOURCE"])
def test_all_that_decides_the_code_is_in_the_key(part: str, tmp_path: Path) -> None:
    """Machines of two kinds may share a cache, and a new version of the workbench has other flags or another source."""
    (tmp_path / "kernels.c").write_bytes(kernels._SOURCE.read_bytes() + b"\n")
    other = {
        "_processor": "lambda: 'another'",
        "_FLAGS": "(*c._FLAGS, '-DX')",
        "_SOURCE": f"c.Path({str(tmp_path / 'kernels.c')!r})",
    }
    code = "import workbench.weights.kernels as c; {}print(c.backend().file.name.split('-')[1])"
    keys = {python(code.format(change), tmp_path).stdout for change in ("", f"c.{part} = {other[part]}; ")}
    assert len(keys) == 2
    assert all(len(key) == 17 for key in keys), "16 hex digits and the end of the line"


def test_a_library_is_synced_before_it_has_its_name(tmp_path: Path) -> None:
    """A machine that stops right after has the whole library or none; its folder is synced behind the renaming."""
    code = (
        "import workbench.weights.kernels as c\n"
        "c.sync = lambda path: print(path.name, len(list(path.parent.parent.glob('kernels-*.so'))), len(list(path.glob('kernels-*.so'))))\n"
        "c.backend()"
    )
    assert python(code, tmp_path).stdout.splitlines() == ["kernels.so 0 0", "brick-workbench 0 1"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """The library then stands below the temporary folder, in a folder that belongs to the user alone."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    code = "from workbench.weights.kernels import backend; print(backend().file)"
    found = Path(python(code, tmp_path / "file", TMPDIR=str(tmp_path / "tmp")).stdout.strip())
    assert found.parents[1] == tmp_path / "tmp"
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    found.parent.chmod(0o777)
    assert python(SAYS, tmp_path / "file", TMPDIR=str(tmp_path / "tmp")).stdout == "False\n", (
        "anyone could have put a library there"
    )
    found.parent.rename(tmp_path / "moved")
    (tmp_path / "moved").chmod(0o700)
    found.parent.symlink_to(tmp_path / "moved")
    assert python(SAYS, tmp_path / "file", TMPDIR=str(tmp_path / "tmp")).stdout == "False\n", "nor is a link followed"


def test_the_backend_is_recorded_with_its_reason(tmp_path: Path, project: Project) -> None:
    code = "import json; from workbench.weights.kernels import backend; print(json.dumps(backend().record()))"

    def said(**env: str) -> dict[str, str]:
        return dict(json.loads(python(code, tmp_path, **env).stdout))

    assert said(WORKBENCH_KERNELS="torch") == {
        "kernels": "torch",
        "reason": "the environment variable WORKBENCH_KERNELS requests it",
    }
    quote = "the environment variable CC is not a valid command (No closing quotation): cc '"
    assert said(CC="cc '") == {"kernels": "torch", "reason": quote}
    assert said(CC="none -x") == {"kernels": "torch", "reason": "no C compiler: none is not on the PATH"}
    assert "no-such-flag" in said(CC="cc --no-such-flag")["reason"]
    found = said(CC="cc")
    assert (found["kernels"], found["compiler"]) == ("c", "cc")
    assert (
        found["version"] == subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    )
    found = project.run("bricks: {one: bricks/one}\nsteps: [{merge: linear}]\n")
    record = json.loads((Path(found["run"]) / "run.json").read_text())
    assert record["backend"]["kernels"] == "c"
    assert record["backend"]["compiler"]


def doctor(project: Path, cache: Path, *arguments: str, **env: str) -> tuple[int, dict[str, dict[str, object]]]:
    code = f"import sys, os; os.chdir({str(project)!r}); sys.argv = ['workbench', 'doctor', '--json', *{arguments!r}]; from workbench.cli.app import main; main()"
    result = python(code, cache, **env)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, {c["check"]: c for c in json.loads(result.stdout)["checks"]}


def test_doctor_reports_and_repairs(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    project.run("bricks: {full: bricks/full}\nsteps: [{merge: linear}]\n")
    code, found = doctor(project.path, cache)
    assert code == 0
    assert {name: c["status"] for name, c in found.items()} == dict.fromkeys(
        ["compiler", "kernels", "device", "versions", "caches", "results", "project", "runs", "hub cache"], "ok"
    )
    assert found["project"]["data"]["writable"] is True  # type: ignore[index]
    (name,) = libraries(cache)
    (cache / "brick-workbench" / name).write_bytes(b"")
    memos = sorted((project.path / ".workbench" / "digests").iterdir())
    memos[0].write_text("{")
    (project.path / ".workbench" / "grown").mkdir()
    (project.path / ".workbench" / "grown" / "x.safetensors").write_bytes(b"cut")
    code, found = doctor(project.path, cache)
    assert code == 0
    assert found["kernels"]["status"] == found["caches"]["status"] == "repaired"
    assert found["caches"]["data"]["removed"] == [f"digests/{memos[0].name}", "grown/x.safetensors"]  # type: ignore[index]
    assert not memos[0].exists()
    assert all(memo.exists() for memo in memos[1:]), "what is whole stays"
    code, found = doctor(project.path, cache)
    assert (code, found["kernels"]["status"], found["caches"]["status"]) == (0, "ok", "ok")


def test_doctor_says_what_it_cannot_repair(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    code, found = doctor(tmp_path, tmp_path / "cache", "--runs-dir", str(tmp_path / "runs"), CC="no-such-compiler")
    assert code == 3
    assert found["runs"]["status"] == "failed"
    assert "is a file, expected a folder" in str(found["runs"]["text"])
    assert (found["compiler"]["status"], found["kernels"]["status"]) == ("warning", "warning")
    assert "Install a C compiler" in str(found["kernels"]["hint"])
