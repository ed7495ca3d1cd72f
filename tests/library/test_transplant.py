"""`transplant_set`: the neurons where a brick's delta acts, against a direct computation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from worlds.project import CPU, Project
from worlds.tiny import live, save_adapter, tensors_of

from workbench.bricks.neuron_sets import neuron_brick
from workbench.errors import WorkbenchError
from workbench.library.neurons import transplant_set
from workbench.models.tokenizer import load_tokenizer

TEXTS = ["w1 w2 w3 w4 w5", "w9 of w8 is w7", "w20 w21 is w22 w23 w24 w25"]


@pytest.fixture
def texts(project: Project) -> str:
    """Three texts of the skill."""
    (project.path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return "texts.jsonl"


def direct_scores(project: Project, brick: str) -> list[torch.Tensor]:
    """‖Δ‖ over rows of gate and up and the column of down, times the mean |activation| without first tokens, per layer."""
    base = {n: t.float() for n, t in tensors_of(project.path / "base").items()}
    tuned = project.tensors(f"bricks: {{b: bricks/{brick}}}\nsteps: [{{merge: average}}]\n")
    model, tokenizer = live(project.path / "base"), load_tokenizer(project.path / "base")
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args, n=number: seen[n].append(args[0][0, 1:].abs()))
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    scores = []
    for number, parts in enumerate(seen):
        delta = {
            n: (tuned[f"model.layers.{number}.mlp.{n}.weight"] - base[f"model.layers.{number}.mlp.{n}.weight"]).double()
            for n in ("gate_proj", "up_proj", "down_proj")
        }
        square = delta["gate_proj"].square().sum(1) + delta["up_proj"].square().sum(1) + delta["down_proj"].square().sum(0)
        scores.append(square.sqrt() * torch.cat(parts).double().mean(0))
    return scores


@pytest.mark.parametrize("brick", ["one", "full"])
def test_scores_and_choice(project: Project, texts: str, brick: str) -> None:
    made = transplant_set("base", f"bricks/{brick}", texts, 0.25, project=project.path, device=CPU, out=project.path / "set")
    for layer, scores in enumerate(direct_scores(project, brick)):
        index = made.neurons.indices[layer]
        assert len(index) == 12
        torch.testing.assert_close(made.neurons.scores[layer].double(), scores[index], rtol=1e-4, atol=1e-6)
        others = torch.ones(48, dtype=torch.bool).index_fill_(0, index, False)
        assert scores[index].min() >= scores[others].max() * (1 - 1e-4)
    written, card = neuron_brick(project.path / "set")
    assert written.digest() == made.neurons.digest()
    assert card is not None
    assert card.base.id == "base"
    document = made.document()
    assert document["evidence"]["method"] == "delta_activation"
    assert 0.25 < document["evidence"]["delta_share"] < 1
    merged = project.tensors(f"bricks: {{b: bricks/{brick}}}\nsteps: [{{merge: average, where: {{neurons: set}}}}]\n")
    assert any(not torch.equal(merged[n], t.float()) for n, t in tensors_of(project.path / "base").items() if ".mlp." in n)


def test_refused(project: Project, texts: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    attention = save_adapter(
        project.path / "base", tmp_path_factory.mktemp("adapters") / "attention", seed=1, target_modules=["q_proj"]
    )
    with pytest.raises(WorkbenchError, match="changes no feed-forward tensor"):
        transplant_set("base", str(attention), texts, project=project.path, device=CPU)
    with pytest.raises(WorkbenchError, match="share 0: expected a share above 0"):
        transplant_set("base", "bricks/one", texts, 0, project=project.path, device=CPU)
    with pytest.raises(WorkbenchError, match=r"none.jsonl: no such file of texts"):
        transplant_set("base", "bricks/one", "none.jsonl", project=project.path, device=CPU)
    Path(project.path / "full").mkdir()
    (project.path / "full" / "file").write_text("x")
    with pytest.raises(WorkbenchError, match="exists already"):
        transplant_set("base", "bricks/one", texts, project=project.path, device=CPU, out=project.path / "full")
