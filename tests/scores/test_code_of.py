"""Python files of a task: which ones its imports and literals name, and which names may reach what no record holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from workbench.scores.task_code import code_of


def test_code_is_followed_through_packages(tmp_path: Path) -> None:
    """Relative imports, packages on the way, imports inside functions, files that literals name, and what is not the user's."""
    pack = tmp_path / "outer_package"
    (pack / "inner").mkdir(parents=True)
    (pack / "__init__.py").write_text("from . import one\nfrom .inner.two import word\n")
    (pack / "one.py").write_text("import json\n\n\ndef late():\n    from .inner import three\n    import pandas\n")
    (pack / "inner" / "__init__.py").write_text("")
    (pack / "inner" / "two.py").write_text("from .. import one\nword = 'words.txt'\n")
    (pack / "inner" / "three.py").write_text("")
    (pack / "inner" / "words.txt").write_text("")
    (tmp_path / "code.py").write_text("import outer_package\n")
    found = code_of([tmp_path / "code.py", tmp_path / "code.yaml"], tmp_path)
    assert {str(f.relative_to(tmp_path)) for f in found.files} == {
        "code.py",
        "outer_package/__init__.py",
        "outer_package/one.py",
        "outer_package/inner/__init__.py",
        "outer_package/inner/two.py",
        "outer_package/inner/three.py",
    }
    assert {f.name for f in found.named} == {"words.txt"}
    assert (found.foreign, found.is_traceable) == ({"pandas"}, False)


UNSEEN = """environ getenv exists is_file is_dir stat lstat getmtime getsize now today utcnow cwd home argv stdin load_dataset load_from_disk
    from_parquet from_json from_csv from_text from_generator from_file memmap SystemRandom __import__ eval exec import_module"""
RECORDED = """__future__ abc array ast base64 bisect collections contextlib copy csv dataclasses decimal difflib enum fractions functools gzip
    hashlib heapq html io itertools json math numbers operator pathlib pprint random re statistics string sys textwrap types typing
    unicodedata datasets numpy scipy yaml typing_extensions lm_eval"""


def test_names_that_reach_unrecorded_inputs_and_modules_that_reach_none(tmp_path: Path) -> None:
    """Names count whether they are used by themselves, after a dot or imported. A literal of up to 199 characters may name a file."""
    long, longer = "n" * 199, "n" * 200
    for name in (long, longer):
        (tmp_path / name).touch()
    texts = {
        "used": "\n".join(UNSEEN.split()),
        "dotted": "\n".join(f"x.{name}" for name in UNSEEN.split()),
        "imported": "\n".join(f"from json import {name}" for name in UNSEEN.split()),
        "harmless": "\n".join(f"import {name}" for name in RECORDED.split()) + f"\nnames = '{long}', '{longer}', '', 'a\\0b'\n",
    }
    found = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        found[name] = code_of([tmp_path / f"{name}.py"], tmp_path)
    assert [found[name].foreign for name in texts] == [frozenset(UNSEEN.split())] * 3 + [frozenset()]
    (tmp_path / "other.py").write_text("import os, subprocess, time, pandas.io")
    assert code_of([tmp_path / "other.py"], tmp_path).foreign == {"os", "subprocess", "time", "pandas"}
    assert {path.name for path in found["harmless"].named} == {long}


def test_packages_in_a_folder_of_pythonpath_are_installed(tmp_path: Path) -> None:
    """But not what lies in the working directory or above it: a project may not call its own code installed."""
    for name in ("libraries", "project", "project/inside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").touch()
        (tmp_path / name / "x-1.0.dist-info").mkdir()
    program = "import sys; from pathlib import Path; from workbench.scores.task_code import is_own; print(*(is_own(Path(p)) for p in sys.argv[1:]))"
    files = [tmp_path / name / "x.py" for name in ("libraries", "project", "project/inside")]
    path = os.pathsep.join([*(str(file.parent) for file in files), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        cwd=tmp_path / "project",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True", "True"]
