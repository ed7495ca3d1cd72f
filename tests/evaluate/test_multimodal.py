"""Texts are scored with the whole of a multimodal model: log-likelihoods equal those of lm-eval with the checkpoint as transformers loads it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.commands import document
from worlds.jsonl import write_jsonl
from worlds.multimodal import load_multimodal, save_multimodal
from worlds.project import Project
from worlds.suites import clustered_suite

TEXTS = [("w1 w2 w3", " w4 w5"), ("w7", " w8"), ("w9 is w3 of w4 w5", " w6 w7 w1"), ("w1 w2 w3", " w9")]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_merge_of_multimodal_models_scores_texts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from workbench.evaluate.models import WorkbenchLM

    (tmp_path / "recipes").mkdir()
    project, base = Project(tmp_path), save_multimodal(kind, tmp_path / "base", seed=1)
    shutil.copytree(base, tmp_path / "one")
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    recipe = project.write("bricks: {one: one}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\neval: [mini]\n")
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(TEXTS)]
    ours = WorkbenchLM(recipe=str(recipe), batch_size=2).loglikelihood(requests)
    whole = Path(document("run", str(recipe))["model"])
    loaded = HFLM(pretrained=load_multimodal(whole), tokenizer=AutoTokenizer.from_pretrained(base), batch_size=2)
    theirs = loaded.loglikelihood(requests)
    torch.testing.assert_close(torch.tensor([a for a, _ in ours]), torch.tensor([a for a, _ in theirs]), rtol=0, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]

    clustered_suite(project)
    rows = [
        {"id": f"m{i}", "cluster": f"c{i}", "prompt": f"w{i} w9", "choices": ["w3", "w4 w5"], "gold": i % 2} for i in range(20)
    ]
    write_jsonl(tmp_path / "evals" / "tasks" / "mini.jsonl", rows)
    scored = document("eval", str(recipe), "--device", "cpu")["configurations"]
    assert {"base", "one"} < {one["name"] for one in scored}
    pairs = [(row["prompt"], f" {choice}") for row in rows for choice in row["choices"]]
    found = loaded.loglikelihood([Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)])
    right = [(found[2 * i][0] < found[2 * i + 1][0]) == bool(i % 2) for i in range(20)]
    (last,) = [one for one in scored if one["name"] not in ("base", "one", "average")]
    assert last["tasks"]["mini"]["acc"]["value"] == pytest.approx(sum(right) / 20)
