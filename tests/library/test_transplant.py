"""`transplant_set`: the neurons where a brick's delta acts, against a direct computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worlds import mixtures
from worlds.project import CPU, Project
from worlds.tiny import VOCABULARY, live, save_adapter, save_finetuned, tensors_of

from workbench.bricks.locate import resolve_brick
from workbench.bricks.neuron_sets import neuron_brick
from workbench.emergent.gates import GateSettings, gating
from workbench.emergent.places import neuron_axes
from workbench.errors import WorkbenchError
from workbench.library.neurons import TransplantOptions, transplant_set
from workbench.library.neurons_gates import gated_base
from workbench.models.layout import Model
from workbench.models.tokenizer import load_tokenizer
from workbench.run.compose import deltas
from workbench.run.work import Work
from workbench.steps.fields import BrickRef
from workbench.weights.checkpoint import Checkpoint

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
    made = transplant_set(
        "base", f"bricks/{brick}", texts, TransplantOptions(0.25), project=project.path, work=Work(CPU), out=project.path / "set"
    )
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
        transplant_set("base", str(attention), texts, project=project.path, work=Work(CPU))
    with pytest.raises(WorkbenchError, match="share 0: expected a share above 0"):
        TransplantOptions(0)
    with pytest.raises(WorkbenchError, match=r"none.jsonl: no such file of texts"):
        transplant_set("base", "bricks/one", "none.jsonl", project=project.path, work=Work(CPU))
    Path(project.path / "full").mkdir()
    (project.path / "full" / "file").write_text("x")
    with pytest.raises(WorkbenchError, match="exists already"):
        transplant_set("base", "bricks/one", texts, project=project.path, work=Work(CPU), out=project.path / "full")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_gates_stand_for_changed_weights(
    family: str, project: Project, dense_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Fractional gates on a fine-tune: rows with biases, Conv1D and stacked matrices; the delta outside the neurons is whole."""
    base = dense_of(family)
    tuned = save_finetuned(base, tmp_path_factory.mktemp("tuned") / family, seed=3)
    checkpoint = Checkpoint(base, "base")
    model = Model(checkpoint, checkpoint.config)
    brick = deltas(resolve_brick("tuned", BrickRef(checkpoint=str(tuned)), project.path), model)
    gated = gated_base(brick, model, base, "brick 'tuned'", CPU)
    gates = [torch.rand(site.units, generator=torch.Generator().manual_seed(site.layer)) for site in gated.sites]
    old, new, axes = tensors_of(base), tensors_of(tuned), neuron_axes(model)
    expected = live(tuned)
    changed = {}
    for name, axis in axes.items():
        spec = model.weights.specs[name]
        gate = gates[axis.layer][axis.unit_of(spec)]
        delta = (new[name] - old[name]).reshape(spec.rows, spec.cols) * (gate[:, None] if axis.axis == "rows" else gate)
        changed[name] = old[name] + delta.reshape(old[name].shape)
    names = dict(expected.named_parameters())
    with torch.no_grad():
        for name, tensor in changed.items():
            (place,) = [n for n in names if n.endswith(name)]
            names[place].copy_(tensor)
        tokens = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
        with gating(gated.model, gated.modules, gates):
            found = gated.model(tokens).logits
        torch.testing.assert_close(found, expected(tokens).logits, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(found, live(tuned)(tokens).logits, atol=1e-3)


@pytest.mark.parametrize("brick", ["one", "full"])
def test_trained_sets(project: Project, texts: str, brick: str) -> None:
    """A set of the share of the model; its losses are those of the model that a recipe makes of it."""
    made = transplant_set(
        "base",
        f"bricks/{brick}",
        texts,
        TransplantOptions(0.25, trained=GateSettings(steps=4)),
        project=project.path,
        work=Work(CPU),
        out=project.path / "set",
    )
    assert made.neurons.size == 48
    evidence = made.document()["evidence"]
    assert evidence["method"] == "trained_gates"
    assert evidence["training"]["steps"] == 4
    assert "share_per_layer" not in evidence
    recipe = f"bricks: {{b: bricks/{brick}}}\nsteps: [{{merge: task_arithmetic, where: {{neurons: set}}}}]\noutput: {{dtype: float32}}\n"
    model = live(Path(project.run(recipe)["model"]))
    tokenizer, total, count = load_tokenizer(project.path / "base"), 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            tokens = torch.tensor([tokenizer(text)["input_ids"]])
            total += float(
                torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1].float(), tokens[0, 1:], reduction="sum")
            )
            count += tokens.shape[1] - 1
    assert evidence["loss"]["kept"] == pytest.approx(total / count, rel=1e-4)
    assert len({round(evidence["loss"][key], 6) for key in ("whole", "kept", "none")}) == 3


def test_experts_have_no_trained_gates(project: Project, texts: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = mixtures.save_mixture("mixtral", tmp_path_factory.mktemp("mixture") / "base")
    tuned = save_finetuned(base, base.parent / "tuned", seed=1)
    with pytest.raises(WorkbenchError, match="layer 0 is a mixture of experts, and gates are trained for neurons") as error:
        transplant_set(
            str(base), str(tuned), texts, TransplantOptions(trained=GateSettings(steps=1)), project=project.path, work=Work(CPU)
        )
    assert error.value.exit_code == 2
