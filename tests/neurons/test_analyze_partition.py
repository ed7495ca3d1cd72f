"""`analyze --partition` on a tiny model: its files and page, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.mixtures import save_mixture
from worlds.project import Project

from workbench.activations.partition import LayerPartition, Partition


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.path)
    rows = [
        {
            "prompt": " ".join(f"w{20 * f + (7 * t + 3 * i + k) % 20}" for k in range(6)),
            "response": "w1 w2",
            "function": name,
            "task": f"{name}{t}",
        }
        for f, name in enumerate(("low", "high"))
        for t in range(4)
        for i in range(3)
    ]
    write_jsonl(project.path / "texts.jsonl", rows)
    return project


COMMAND = ("analyze", "base", "--data", "texts.jsonl", "-o", "found")


def test_it_writes_the_partition_and_a_section_of_the_page(world: Project) -> None:
    printed = document(*COMMAND, "--partition", "cmoe", "--experts", "4", "--shared", "1")["partition"]
    found = world.path / "found"
    assert json.loads((found / "partition.json").read_text("utf-8")) == printed
    experts = {
        int(name.split(".")[1]): tensor for name, tensor in load_file(found / "partition" / "partition.safetensors").items()
    }
    layers = {number: LayerPartition(index.long(), 1) for number, index in experts.items()}
    assert Partition("cmoe", layers).digest() == printed["partition"]
    assert set(printed["shared"].values()) == {1}
    assert printed["difference"] <= 1e-5
    assert [curve["selector"] for curve in printed["curves"]] == ["oracle", "centroid", "ridge"]
    for curve in printed["curves"]:
        assert [point["experts"] for point in curve["points"]] == [3, 2, 1]
        assert all(0 < point["captured"] < 1 for point in curve["points"])
        assert all(point["low"] <= point["rise"] <= point["high"] for point in curve["points"])
    page = (found / "index.html").read_text("utf-8")
    assert '<section id="partition">' in page
    assert "as CMoE does" in page
    text = call(*COMMAND, "--partition", "kmeans", "--experts", "4").stdout
    assert "4 experts of" in text
    assert "All experts together differ from the dense layers by" in text


def test_bad_input(world: Project, tmp_path: Path) -> None:
    cases = [
        (("--experts", "7"), "7 experts do not divide into equal parts"),
        (("--experts", "4", "--shared", "3"), "3 shared experts are more than the 1 of 4 experts that serve a token"),
    ]
    for options, message in cases:
        error = refused(*COMMAND, "--partition", "kmeans", *options)
        assert message in error.message
        assert error.exit_code == 2
    assert not (world.path / "found").exists()
    save_mixture("mixtral", tmp_path / "mixtral")
    assert (
        "a mixture of experts already"
        in refused("analyze", str(tmp_path / "mixtral"), *COMMAND[2:], "--partition", "kmeans").message
    )
