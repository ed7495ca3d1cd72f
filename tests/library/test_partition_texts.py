"""Several partitions of a model share one run of its texts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project

from workbench.emergent.labelled import read_labelled
from workbench.library.neurons_partition import PartitionOptions, analyze_partition, partition_texts
from workbench.library.neurons_subject import open_neurons
from workbench.run.opened import resolve_model


def test_shared_texts_change_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": " ".join(f"w{(7 * f + 5 * t + 3 * i + k) % 60}" for k in range(9)), "function": f"f{f}", "task": f"f{f}-{t}"}
        for f in range(2)
        for t in range(4)
        for i in range(3)
    ]
    write_jsonl(project.path / "texts.jsonl", rows)
    data = read_labelled(project.path / "texts.jsonl", "texts.jsonl")
    subject = open_neurons(resolve_model(str(project.path / "base"), project.path), CPU)
    options = PartitionOptions(method="kmeans", experts=4, used=(50.0,), selectors=("oracle", "ridge"), tokens=60)
    alone = analyze_partition(subject, data, "texts.jsonl", options)
    texts = partition_texts(subject, data, options)
    monkeypatch.setattr("workbench.library.neurons_partition.sample_feed_forward", lambda *_, **__: pytest.fail("sampled again"))
    shared = analyze_partition(subject, data, "texts.jsonl", options, texts)
    assert shared.document() == alone.document()
    other = analyze_partition(subject, data, "texts.jsonl", replace(options, method="random"), texts)
    assert other.document()["partition"] != alone.document()["partition"]
    with pytest.raises(ValueError, match=r"texts of items, tokens and seed \(2, 60, 0\), expected \(2, 60, 1\)"):
        analyze_partition(subject, data, "texts.jsonl", replace(options, seed=1), texts)
