"""`analyze export` and `analyze import`: LAPE's file form there and back, and files that must not be opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document, refused
from worlds.neuron_sets import random_set, save_random_set
from worlds.project import Project

from workbench.activations.sets import write_set
from workbench.bricks.neuron_sets import neuron_brick
from workbench.neurons import pth_reader


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.path)
    return project


def imported(*options: str) -> tuple[str, ...]:
    return ("analyze", "import", "file.pth", "--base", "base", "-o", "sets", *options)


def layers(world: Project, **changed: Any) -> list[list[Any]]:
    """Two functions on the base's layers; a layer can be replaced."""
    depth = 4
    rows: list[list[Any]] = [
        [torch.tensor([layer, layer + 3]) for layer in range(depth)],
        [torch.tensor([], dtype=torch.int64)] * depth,
    ]
    if "layer" in changed:
        rows[0][1] = changed["layer"]
    return rows


def test_there_and_back(world: Project) -> None:
    """torch reads the exported file as the published form; an import of it has the same neurons."""
    made = {
        name: save_random_set(Path("made", name), Path("base"), 0.1, seed=i, layers=(1, 3)) for i, name in enumerate(("en", "zh"))
    }
    result = call("analyze", "export", "made/zh", "made/en", "-o", "out/file.pth")
    assert "2 functions, 4 layers" in result.stdout
    content = torch.load("out/file.pth", weights_only=True)  # noqa: TID251  written above
    assert [type(content), type(content[0]), content[0][0].dtype] == [list, list, torch.int64]
    for row, name in zip(content, ("zh", "en"), strict=True):
        assert {n: t.tolist() for n, t in enumerate(row) if len(t)} == {n: t.tolist() for n, t in made[name].indices.items()}
    found = document("analyze", "import", "out/file.pth", "--base", "base", "--names", "zh, en", "-o", "sets")
    assert [row["function"] for row in found["sets"]] == ["zh", "en"]
    for name, neurons in made.items():
        read, card = neuron_brick(Path("sets", name))
        assert read.digest() == neurons.digest()
        assert read.base == found["digest"] == neurons.base
        assert card is not None
        assert (card.functions, card.base.id) == ((name,), "base")
    assert "exists already" in refused("analyze", "export", "made/en", "-o", "out/file.pth").message
    assert (
        "exists already"
        in refused("analyze", "import", "out/file.pth", "--base", "base", "--names", "zh,en", "-o", "sets").message
    )


def test_functions_without_neurons_have_no_set(world: Project) -> None:
    torch.save(layers(world), "file.pth")
    result = call(*imported("--names", "en,zh"))
    assert "zh: no neurons, so no set" in result.stdout
    assert "does not name its model" in result.stderr
    assert [p.name for p in Path("sets").iterdir()] == ["en"]


class Harm:
    """An object whose unpickling would make a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_refused_and_not_run(world: Project, legacy: bool) -> None:
    torch.save([[Harm()]], "file.pth", _use_new_zipfile_serialization=not legacy)
    error = refused(*imported("--names", "en"))
    assert "does not load it without running code" in error.message
    assert not Path("harmed").exists()
    assert not Path("sets").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1]], "expected tensors of one dimension, found int"),
        ([[torch.zeros(1, dtype=torch.int64).expand(10**12)]], "expected at most 5,000,000 indices"),
    ],
)
def test_other_content_is_refused_by_the_command(world: Project, content: Any, message: str) -> None:
    torch.save(content, "file.pth")
    assert message in refused(*imported("--names", "en")).message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"en": []}, "expected a list of lists of tensors, found dict"),
        ([[1, 2]], "expected tensors of one dimension, found int"),
        ([[torch.zeros(2, 2, dtype=torch.int64)]], "expected tensors of one dimension"),
        ([[torch.tensor([0.5])]], "expected integer tensors, found torch.float32"),
    ],
)
def test_other_content_is_refused(content: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the function that the command calls in a process of its own."""
    with pytest.raises(SystemExit):
        pth_reader.print_indices(content)
    assert message in capsys.readouterr().err


def test_files_that_do_not_fit_the_names_or_the_base(world: Project) -> None:
    assert "no such file" in refused(*imported("--names", "en")).message
    torch.save(layers(world), "file.pth")
    assert "has 2 functions, found 1 names" in refused(*imported("--names", "en")).message
    assert "expected names separated by commas" in refused(*imported("--names", "en,,zh")).message
    assert "differ only in case or signs" in refused(*imported("--names", "en,EN")).message
    torch.save(layers(world, layer=torch.tensor([3, 10**6])), "file.pth")
    assert "neuron 1000000 of layer 1 does not exist" in refused(*imported("--names", "en,zh")).message
    torch.save(layers(world, layer=torch.tensor([-1])), "file.pth")
    assert "neuron -1 of layer 1 does not exist" in refused(*imported("--names", "en,zh")).message
    torch.save([row[:3] for row in layers(world)], "file.pth")
    assert "3 layers, but the base has 4" in refused(*imported("--names", "en,zh")).message
    Path("file.pth").write_bytes(b"PK\x03\x04 damaged")
    assert "does not load it" in refused(*imported("--names", "en")).message
    assert not Path("sets").exists()


def test_sets_of_different_models_are_not_exported_together(world: Project) -> None:
    save_random_set(Path("made", "en"), Path("base"), 0.1)
    write_set(Path("made", "other"), random_set(Path("base"), 0.1, base="0" * 32))
    assert "sets of different models" in refused("analyze", "export", "made/en", "made/other", "-o", "file.pth").message
    assert not Path("file.pth").exists()


def test_the_reader_s_memory_and_files_are_limited(tmp_path: Path) -> None:
    code = f"import runpy; runpy.run_path({pth_reader.__file__!r})['limit'](); bytearray({pth_reader.MEMORY + (64 << 20)})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert b"MemoryError" in done.stderr
    files = f"import runpy; runpy.run_path({pth_reader.__file__!r})['limit'](); open('written', 'wb', 0).write(b'x')"
    done = subprocess.run([sys.executable, "-P", "-c", files], capture_output=True, check=False, cwd=tmp_path)
    assert b"File too large" in done.stderr
