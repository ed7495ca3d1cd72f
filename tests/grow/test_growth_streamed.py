"""Parts of the streamed check of a growth on models made for them: turned tensors, layers that look at others, the memory that it takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from worlds.project import CPU, Project
from worlds.tiny import tensors_of

from workbench.grow.expansion.preserve import TOKENS
from workbench.grow.expansion.streamed import NotStreamedError, Streamed, streamed_bytes
from workbench.models.layout import Model, Piece
from workbench.run.costs import TRANSFORMERS
from workbench.run.plan import plan
from workbench.weights.checkpoint import Checkpoint


class Peeks(nn.Module):
    """A model that looks at the weights of its last layer before it runs the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def get_output_embeddings(self) -> None:
        """There is no head."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """One row of ones a token, times the mean of weights that are not loaded."""
        weight = self.layers[1].weight
        x = torch.ones(*input_ids.shape, 4, device=weight.device) * weight.mean()
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=x)


def saved(path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """These tensors as a checkpoint."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    return Checkpoint(path, "base")


def test_a_model_that_looks_at_other_layers_is_not_streamed(tmp_path: Path) -> None:
    """Numbers that are not there would end in logits that are not there; the check then loads the model whole."""
    weights = saved(tmp_path / "model", {n: t.detach() for n, t in Peeks().state_dict().items()})
    pieces = {
        n: (Piece(n, (0,) * len(s.shape), s.shape, tuple(range(len(s.shape))), (0,) * len(s.shape)),)
        for n, s in weights.specs.items()
    }
    with torch.device("meta"):
        model = Peeks()
    streamed = Streamed(model, weights, pieces, CPU)  # type: ignore[arg-type]
    with pytest.raises(NotStreamedError, match=r"an argument of \S*layers\.0 is on the meta device"):
        streamed.logits(torch.zeros(1, 3, dtype=torch.long))
    assert all(p.device.type == "meta" for p in model.parameters()), "nothing stays loaded"


def test_a_model_that_mixes_in_other_layers_is_checked_whole(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code fails on weights that are not loaded. That says nothing about the growth, so the model is loaded whole."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def mixing(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = found.logits * self.model.layers[0].mlp.down_proj.weight.norm()
        return found

    step = "steps: [{{grow: depth, after: [{}], check: tensors}}]\n"
    assert "loaded_whole" not in project.run(step.format(3))["steps"][0]["check"]
    monkeypatch.setattr(LlamaForCausalLM, "forward", mixing)
    found = project.run(step.format(2), "mixing.yaml")["steps"][0]["check"]
    assert (found["loaded_whole"], found["max_logit_difference"]) == (True, 0.0)


def test_turned_and_joined_tensors_are_filled_from_their_pieces(tmp_path: Path) -> None:
    """Two experts, [in, out] each in a file, as one live tensor [2, out, in]; and a box of one alone."""
    one, two = torch.arange(6.0).view(2, 3), torch.arange(10.0, 16.0).view(2, 3)
    streamed = Streamed(nn.Module(), saved(tmp_path / "model", {"one": one, "two": two}), {}, CPU)  # type: ignore[arg-type]
    pieces = tuple(Piece(name, (i, 0, 0), (1, 3, 2), (None, 1, 0), (0, 0)) for i, name in enumerate(("one", "two")))
    assert torch.equal(streamed._tensor(pieces, (2, 3, 2)), torch.stack([one.T, two.T]))
    assert torch.equal(streamed._tensor((Piece("two", (0, 0), (2, 1), (1, 0), (1, 1)),), (2, 1)), two[1:2, 1:3].T)


def test_the_memory_of_a_full_check_and_of_training(project: Project) -> None:
    """Four bytes a parameter of the model before, twelve of the one after, gradients included, and the loss; training takes twenty."""
    (project.path / "rows.jsonl").write_text('{"prompt": "word1", "completion": " word2"}\n' * 8, "utf-8")
    step = "steps: [{{grow: depth, after: [1]{}}}]\n"

    def peak(fields: str) -> int:
        return plan(project.resolve(step.format(fields)), project.path / "runs", threads=1).peak_bytes

    stored = tensors_of(project.path / "base")
    tensors = {n: t.numel() for n, t in stored.items()}
    loss = 5 * 4 * 2 * TOKENS * len(stored["model.embed_tokens.weight"])
    before = sum(tensors.values())
    after = before + sum(size for n, size in tensors.items() if ".layers.1." in n)
    none = peak(", check: off")
    assert peak("") - none == TRANSFORMERS + 4 * before + 12 * after + loss
    assert peak(", check: off, train: {data: rows.jsonl}") - none == TRANSFORMERS + 20 * after


def test_the_memory_of_streamed_logits(project: Project) -> None:
    """In float32: what lies around the layers, the largest layer, and one tensor while it is read. The head is tied here."""
    checkpoint = Checkpoint(project.path / "base", "base")
    tensors = {n: t.numel() for n, t in tensors_of(project.path / "base").items()}
    layer = sum(size for n, size in tensors.items() if ".layers.1." in n)
    around = sum(size for n, size in tensors.items() if ".layers." not in n)
    assert streamed_bytes(Model(checkpoint, checkpoint.config)) == 4 * (around + layer + max(tensors.values()))
