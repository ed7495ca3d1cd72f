"""Pruned models: which layers, neurons and heads go, and what the others compute."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worlds.growing import save_family
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.texts import sentence, words_tokenizer, write_rows
from worlds.tiny import VOCABULARY, live, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.models.live import compute
from workbench.models.texts import encode, read_texts
from workbench.run.compose import compose
from workbench.run.plan import plan

TOKENS = torch.randint(2, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with texts.jsonl, whose words are read as such for every family (AutoTokenizer gives qwen2 rules of its own)."""
    write_rows(project.path / "texts.jsonl", 12)
    monkeypatch.setattr("workbench.run.kinds.grow.load_tokenizer", words_tokenizer)
    return project


def changed(base: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Return a copy of a model with changed tensors."""
    shutil.copytree(base, out)
    tensors = {name: change(name, tensor.clone()).contiguous() for name, tensor in tensors_of(base).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def layer_of(name: str) -> int | None:
    """Return the number in a tensor's name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def rows_of(project: Project, base: Path) -> list[list[int]]:
    """Return the tokens of texts.jsonl."""
    texts = read_texts(project.path / "texts.jsonl", "texts.jsonl")
    return [row.tokens for row in encode(texts, words_tokenizer(base), 64)]


def by_hand(project: Project, base: Path) -> list[float]:
    """Return the block influence of every layer from transformers' hidden states, in float64."""
    model = live(base).double()
    # The last hidden state that transformers returns is behind the final norm.
    backbone = model.base_model
    name = next(n for n in ("norm", "ln_f", "final_layer_norm") if hasattr(backbone, n))
    setattr(backbone, name, torch.nn.Identity())
    cosines: list[list[float]] = []
    for tokens in rows_of(project, base):
        with torch.no_grad():
            states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        cosines += torch.stack([torch.cosine_similarity(a[0], b[0], dim=-1) for a, b in pairwise(states)], 1).tolist()
    return (1 - torch.tensor(cosines).mean(0)).tolist()


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_list_is_the_stack_of_the_others(family: str, project: Project, model_of: Callable[..., Path]) -> None:
    """The same bytes of weights and config.json, whether an index counts from the start or from the end."""
    base = model_of(family)
    pruned = project.run(f"base: {base}\nsteps: [{{grow: prune, layers: [1, -1]}}]\n", "pruned.yaml")
    stacked = project.run(f"base: {base}\nsteps: [{{grow: stack, order: [0, 2], check: off}}]\n", "stacked.yaml")
    for name in ("model.safetensors", "config.json"):
        assert (Path(pruned["model"]) / name).read_bytes() == (Path(stacked["model"]) / name).read_bytes()
    record = pruned["steps"][0]
    assert (record["layers"], record["order"], record["gone_layers"]) == ([4, 2], [0, 2], [1, 3])
    assert record["check"]["reloaded"]
    assert record["check"]["finite_logits"]
    assert record["parameters"] == [sum(t.numel() for t in tensors_of(Path(p)).values()) for p in (base, pruned["model"])]
    assert record["bytes"][1] == 2 * record["parameters"][1]
    assert live(pruned["model"]).config.num_hidden_layers == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_influence_is_that_of_the_hidden_states(family: str, texts: Project, model_of: Callable[..., Path]) -> None:
    base = model_of(family)
    text = f"base: {base}\nsteps: [{{grow: prune, layers: 2, calibration: texts.jsonl}}]\n"
    record = compose(texts.resolve(text), CPU).records()[0]
    expected = by_hand(texts, base)
    found = record["importance"]
    assert found["influence"] == pytest.approx(expected, abs=2e-6)
    assert sorted(record["gone_layers"]) == sorted(sorted(range(4), key=expected.__getitem__)[:2])
    assert found["calibration"]["tokens"] == sum(map(len, rows_of(texts, base)))
    explicit = texts.tensors(f"base: {base}\nsteps: [{{grow: prune, layers: {record['gone_layers']}}}]\n")
    measured = texts.tensors(text)
    assert measured.keys() == explicit.keys()
    assert all(torch.equal(measured[name], explicit[name]) for name in measured)


@pytest.mark.parametrize("by", ["influence", "perplexity"])
def test_a_layer_that_does_nothing_goes_first(by: str, texts: Project, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Planted: layer 2 writes nothing. Its influence is 0, and the loss without it is the loss with it."""

    def silent(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.zero_() if layer_of(name) == 2 and ("o_proj" in name or "down_proj" in name) else tensor

    base = changed(model_of("llama", torch.float32), tmp_path / "silent", silent)
    write_own(texts.path / "texts.jsonl", base)
    text = f"base: {base}\nsteps: [{{grow: prune, layers: 0.25, by: {by}, calibration: texts.jsonl}}]\n"
    composed = compose(texts.resolve(text), CPU)
    record = composed.records()[0]
    assert record["gone_layers"] == [2]
    if by == "influence":
        assert record["importance"]["influence"][2] == pytest.approx(0, abs=1e-6)
        assert min(record["importance"]["influence"][i] for i in (0, 1, 3)) > 0.01
    else:
        before, after = record["importance"]["losses"]
        assert after == pytest.approx(before, abs=1e-6)
    done = texts.run(text)
    with torch.no_grad():
        assert float((live(base)(TOKENS).logits - live(done["model"])(TOKENS).logits).abs().max()) <= 1e-6


def write_own(path: Path, base: Path) -> None:
    """Write random prompts with the model's own continuations, which are less likely without any of its layers."""
    model, tokenizer, rows = live(base), words_tokenizer(base), []
    for number in range(12):
        prompt = sentence(number, 4)
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, pad_token_id=0)
        rows.append({"prompt": prompt, "completion": tokenizer.decode(made[0, 4:], skip_special_tokens=True)})
    write_jsonl(path, rows)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_by_perplexity_is_the_best_of_all_pruned_models(family: str, texts: Project, model_of: Callable[..., Path]) -> None:
    """Each step leaves out the layer without which the pruned model, loaded on its own, has the lowest loss."""
    base = model_of(family, torch.float32)
    text = f"base: {base}\nsteps: [{{grow: prune, layers: 2, by: perplexity, calibration: texts.jsonl}}]\n"
    record = compose(texts.resolve(text), CPU).records()[0]
    rows = encode(read_texts(texts.path / "texts.jsonl", "texts.jsonl"), words_tokenizer(base), 64)
    gone: list[int] = []
    losses = [loss_by_hand(live(base), rows)]
    for _ in range(2):
        loss_of = {}
        for layer in [n for n in range(4) if n not in gone]:
            made = texts.run(f"base: {base}\nsteps: [{{grow: prune, check: off, layers: {[*gone, layer]}}}]\n", f"{layer}.yaml")
            loss_of[layer] = loss_by_hand(live(made["model"]), rows)
        gone.append(min(loss_of, key=loss_of.__getitem__))
        losses.append(loss_of[gone[-1]])
    assert record["importance"]["removed"] == gone
    assert record["importance"]["losses"] == pytest.approx(losses, abs=2e-6)
    assert record["gone_layers"] == sorted(gone)


def loss_by_hand(model: Any, rows: Any) -> float:
    """Return the mean loss of the learned tokens, row by row."""
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor([row.tokens])
        with torch.no_grad():
            logits = model(tokens).logits[0].double()
        start = len(row.tokens) - row.learned
        total += float(torch.nn.functional.cross_entropy(logits[start - 1 : -1], tokens[0, start:], reduction="sum"))
        count += row.learned
    return total / count


NEURONS = ["llama", "gpt2", "phi3"]


@pytest.mark.parametrize("family", NEURONS)
def test_neurons_without_output_go_first(family: str, texts: Project, dense_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Every layer has other neurons with an output of zero: exactly these go, and logits stay."""
    layers, units = 3, 128 if family == "gpt2" else 48
    dead = [torch.randperm(units, generator=torch.Generator().manual_seed(n))[: units // 4].sort().values for n in range(layers)]

    def silent(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(("mlp.down_proj.weight", "mlp.c_proj.weight")):
            layer = layer_of(name)
            assert layer is not None
            tensor.index_fill_(0 if family == "gpt2" else 1, dead[layer], 0.0)
        return tensor

    base = changed(dense_of(family), tmp_path / "dead", silent)
    document = texts.run(f"base: {base}\nsteps: [{{grow: prune, neurons: 0.25, calibration: texts.jsonl}}]\n")
    record = document["steps"][0]
    assert record["neurons"] == [units, 3 * units // 4]
    assert record["importance"]["neurons_kept_strength"] == [1.0] * layers
    kept = record["check"]["kept"]
    assert kept["rescaled"] == layers, "outputs are fitted"
    assert kept["shortened"] + kept["rescaled"] == record["narrowed"]
    assert kept["identical"] > 0
    assert kept["with_additions"] == kept["new"] == kept["changed_later"] == 0
    with torch.no_grad():
        old, new = live(base)(TOKENS).logits, live(Path(document["model"]))(TOKENS).logits
    assert float((old - new).abs().max()) <= 1e-6 * max(1.0, float(old.abs().max()))
    before, after = tensors_of(base), tensors_of(Path(document["model"]))
    remaining = [sorted(set(range(units)) - set(dead[layer].tolist())) for layer in range(layers)]
    for name, tensor in after.items():
        if name.endswith(("mlp.up_proj.weight", "mlp.gate_proj.weight")):
            assert torch.equal(tensor, before[name][remaining[layer_of(name) or 0]])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_heads_without_output_go_first(family: str, texts: Project, dense_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Two query heads belong to a key-value head: of every layer another group writes nothing, and goes."""
    groups, size = 2, 8

    def silent(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("o_proj.weight"):
            group = (layer_of(name) or 0) % groups
            tensor[:, group * 2 * size : (group + 1) * 2 * size] = 0
        return tensor

    base = changed(dense_of(family), tmp_path / "dead", silent)
    document = texts.run(f"base: {base}\nsteps: [{{grow: prune, heads: 0.5, calibration: texts.jsonl}}]\n")
    record = document["steps"][0]
    assert record["key_value_heads"] == [2, 1]
    assert record["importance"]["heads_kept_strength"] == [1.0] * 3
    model = live(document["model"])
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 8)
    with torch.no_grad():
        # In float64, because shorter sums round differently.
        old, new = live(base).double()(TOKENS).logits, model.double()(TOKENS).logits
    assert float((old - new).abs().max()) <= 1e-6 * max(1.0, float(old.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neurons_and_outputs_are_those_of_a_direct_computation(
    family: str, texts: Project, dense_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, without the first token of a text; two layers of moments fit a pass. The fit is the one that costs least by its own measure."""
    monkeypatch.setattr("workbench.activations.importance.MOMENTS", 2 * 4 * 128**2)
    base, out = dense_of(family), "mlp.c_proj" if family == "gpt2" else "mlp.down_proj"
    found = texts.tensors(f"base: {base}\nsteps: [{{grow: prune, neurons: 0.5, calibration: texts.jsonl}}]\n")
    model, seen = live(base).double(), defaultdict[str, list[torch.Tensor]](list)
    for name, module in model.named_modules():
        if name.endswith(out):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0][0, 1:]))
    with torch.no_grad():
        for tokens in rows_of(texts, base):
            model(torch.tensor([tokens]))
    assert len(seen) == 3
    for name, parts in seen.items():
        inputs, weight = torch.cat(parts), model.get_submodule(name).weight.detach()
        weight = weight.T if family == "gpt2" else weight
        kept = (inputs.abs().sum(0) * weight.norm(dim=0)).argsort(descending=True)[: len(inputs[0]) // 2].sort().values
        ridge = 1e-2 * inputs.square().mean(0).mean() * len(inputs)
        # Least squares with one more row for each column: √ridge · (V − W_kept).
        rows = torch.cat((inputs[:, kept], ridge.sqrt() * torch.eye(len(kept)).double()))
        fit = torch.linalg.lstsq(rows, torch.cat((inputs @ weight.T, ridge.sqrt() * weight[:, kept].T))).solution.T
        stored = next(tensor for key, tensor in found.items() if key.endswith(f"{name}.weight"))
        torch.testing.assert_close((stored.T if family == "gpt2" else stored).double(), fit, atol=3e-5, rtol=1e-4)
        assert not torch.allclose(fit, weight[:, kept], atol=1e-3)


def test_heads_that_follow_from_others_are_not_missed(
    texts: Project, dense_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the model says the same, because the second half of the heads computes what the first half does."""
    monkeypatch.setattr("workbench.grow.expansion.smaller.RIDGE", 1e-6)

    def twice(name: str, tensor: torch.Tensor) -> torch.Tensor:
        half = tensor.shape[-1 if "o_proj" in name else 0] // 2
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensor[half:] = tensor[:half]
        if name.endswith("o_proj.weight"):
            tensor[:, half:] *= 0.5  # the second half goes
        return tensor

    base = changed(dense_of("llama"), tmp_path / "twice", twice)
    document = texts.run(f"base: {base}\nsteps: [{{grow: prune, heads: 0.5, calibration: texts.jsonl}}]\n")
    with torch.no_grad():
        old, new = live(base)(TOKENS).logits, live(Path(document["model"]))(TOKENS).logits
    assert float((old - new).abs().max()) <= 1e-4 * float(old.abs().max())


def test_all_three_at_once(texts: Project, dense_of: Callable[[str], Path]) -> None:
    """The same tensors as the layers' list on a model that lost neurons and heads."""
    base, measured = dense_of("qwen2"), "calibration: texts.jsonl"
    both = texts.run(f"base: {base}\nsteps: [{{grow: prune, layers: 1, neurons: 0.25, heads: 0.5, {measured}}}]\n", "both.yaml")
    record = both["steps"][0]
    gone = record["gone_layers"]
    apart = texts.run(
        f"base: {base}\nsteps: [{{grow: prune, neurons: 0.25, heads: 0.5, {measured}}}, {{id: second, grow: prune, layers: {gone}}}]\n",
        "apart.yaml",
    )
    for name in ("model.safetensors", "config.json"):
        assert (Path(both["model"]) / name).read_bytes() == (Path(apart["model"]) / name).read_bytes()
    assert record["layers"] == [3, 2]
    assert live(both["model"]).config.layer_types == [t for i, t in enumerate(live(base).config.layer_types) if i not in gone]


def test_a_measurement_is_kept(texts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "steps: [{grow: prune, layers: 1, neurons: 0.25, calibration: texts.jsonl}]\n"
    resolved = texts.resolve(text)
    row = plan(resolved, texts.path / "runs").steps[0].to_dict()
    composition = compose(resolved, CPU)
    first, measured = composition.records(), compute(composition.model, torch.float32, CPU)
    assert {key: row[key] for key in ("layers", "neurons", "parameters", "bytes")} == {
        key: first[0][key] for key in ("layers", "neurons", "parameters", "bytes")
    }
    assert "gone_layers" not in row, "nothing is measured for a plan"
    monkeypatch.setattr("workbench.grow.prune.block_influence", lambda *_: pytest.fail("measured again"))
    assert compose(texts.resolve(text), CPU).records() == first
    again = texts.tensors(text)
    assert all(torch.equal(tensor, again[name]) for name, tensor in measured.items())
    write_rows(texts.path / "texts.jsonl", 12, seed=5)
    assert texts.resolve(text).keys != resolved.keys


def test_bricks_and_removed_layers(project: Project) -> None:
    """A brick changes the layers that remain under their new numbers; if it changes a removed one too, that is an error."""
    head = "bricks: {one: bricks/one}\nsteps: [{grow: prune, layers: [1]}, {merge: task_arithmetic, bricks: {one: 1}"
    with pytest.raises(WorkbenchError, match="brick 'one' changes 4 tensors that step grow-prune has removed"):
        project.tensors(f"{head}}}]\n")
    found = project.tensors(f'{head}, where: {{exclude: ["model.layers.1.*"]}}}}]\n')
    merged = project.tensors("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic, bricks: {one: 1}}]\n")
    plain = project.tensors("steps: []\n")
    name = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(found[name.format(2)], merged[name.format(3)])
    assert not torch.equal(found[name.format(2)], plain[name.format(3)])


TRAIN = "data: texts.jsonl, steps: 30, batch_size: 8, warmup: 0, learning_rate: 0.003, held_out: 0.25, evaluate_every: 10"


@pytest.mark.parametrize("teacher", ["before", "none"])
def test_recovery(teacher: str, texts: Project, model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters move; with a teacher, the model comes nearer to the model before the step on the texts. It is done once."""
    base = model_of("llama", torch.float32)
    head = f"base: {base}\nsteps: [{{grow: prune, layers: [1]"
    text = f"{head}, train: {{{TRAIN}, teacher: {teacher}}}}}]\n"
    untrained, trained = texts.run(f"{head}}}]\n", "untrained.yaml"), texts.run(text)
    record = trained["steps"][0]
    old, new = tensors_of(Path(untrained["model"])), tensors_of(Path(trained["model"]))
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert record["train"]["trained"] == record["parameters"][1]
    assert record["check"]["kept"] == {"trained": len(new)}
    assert record["check"]["reloaded"]
    assert f"{len(new)} tensors trained" in (Path(trained["model"]) / "README.md").read_text("utf-8")
    kl = [divergence(base, Path(run["model"]), rows_of(texts, base)) for run in (untrained, trained)]
    if teacher == "before":
        assert kl[1] < 0.8 * kl[0]
    else:
        losses = record["train"]["held_out_loss"]
        assert losses["before"] > 0
        assert kl[1] > kl[0], "texts of random words teach nothing that the model before knew"
    monkeypatch.setattr("workbench.run.kinds.grow.train_parameters", lambda *_, **__: pytest.fail("trained twice"))
    again = compose(texts.resolve(text), CPU).records()[0]
    assert again["train"] == record["train"]


def divergence(teacher: Path, model: Path, rows: list[list[int]]) -> float:
    """Return the mean KL(teacher ‖ model) over the tokens of texts, in float64."""
    one, other, total, count = live(teacher), live(model), 0.0, 0
    for tokens in rows:
        with torch.no_grad():
            p, q = (m(torch.tensor([tokens])).logits[0].double().log_softmax(-1) for m in (one, other))
        total += float((p.exp() * (p - q)).sum())
        count += len(tokens)
    return total / count


HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "conv", "conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
}


@pytest.mark.parametrize(("family", "by"), [("lfm2", "influence"), ("lfm2", "perplexity"), ("granitemoehybrid", "influence")])
def test_the_last_layer_with_attention_of_a_hybrid_stays(family: str, by: str, texts: Project) -> None:
    """Measured, and named in a list; transformers cannot run such a model without attention."""
    save_family(family, texts.path / family, HYBRIDS[family])
    made = texts.run(f"base: {family}\nsteps: [{{grow: prune, layers: 3, by: {by}, calibration: texts.jsonl}}]\n")
    assert made["steps"][0]["gone_layers"] == [0, 1, 2]
    assert live(made["model"])(TOKENS).logits.isfinite().all()
    with pytest.raises(WorkbenchError, match="no layer with attention would remain"):
        compose(texts.resolve(f"base: {family}\nsteps: [{{grow: prune, layers: [3]}}]\n"), CPU)


def test_a_hybrid_says_which_layer_stays(texts: Project) -> None:
    """The last layer hardly turns the hidden state, and is the only one with attention."""
    save_family("qwen3_next", texts.path / "hybrid")
    file = texts.path / "hybrid" / "model.safetensors"
    quiet = {n: t * 1e-3 if ".3." in n and ("o_proj" in n or "down_proj" in n) else t for n, t in tensors_of(file.parent).items()}
    save_file(quiet, file, metadata={"format": "pt"})
    (step,) = texts.run("base: hybrid\nsteps: [{grow: prune, layers: 1, calibration: texts.jsonl}]\n")["steps"]
    assert step["importance"]["last_attention"] == [3]
    assert 3 not in step["gone_layers"]
