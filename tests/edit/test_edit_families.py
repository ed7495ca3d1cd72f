"""Closed-form edits of every dense family: the projection is found, its output changes by what was asked, nothing else is assumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds import hub_layouts
from worlds.dense import LAYERS, RATIO, SANDWICH, configs, context_of, save_dense, without_cache, write_facts_file, write_text
from worlds.project import CPU, Project
from worlds.tiny import save_tokenizer

from workbench.edit.closed_form import values
from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.lookup import Lookup, grouped
from workbench.edit.inputs import contexts
from workbench.edit.places import passes
from workbench.edit.places.parts import Padded, Parts, padded, row_of
from workbench.edit.places.passes import added, keys_and_values, logits_at, run, score
from workbench.edit.ultraedit import UltraEdit
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.models.hooks import hooked
from workbench.recipe.methods import methods
from workbench.run.compose import compose
from workbench.steps import Edit, MethodContext
from workbench.weights.lowrank import Factors

# Live name of the projection in layer 1.
PROJECTION = {
    "gpt2": "transformer.h.1.mlp.c_proj", "gptj": "transformer.h.1.mlp.fc_out", "gpt_neo": "transformer.h.1.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h", "falcon": "transformer.h.1.mlp.dense_4h_to_h",
    "bloom": "transformer.h.1.mlp.dense_4h_to_h", "opt": "model.decoder.layers.1.fc2", "phi": "model.layers.1.mlp.fc2",
    "starcoder2": "model.layers.1.mlp.c_proj",
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo", "olmo2", "olmo3", "stablelm",
                     "smollm3", "granite", "cohere", "ernie4_5", "glm4"], "model.layers.1.mlp.down_proj"),
}  # fmt: skip
FAMILIES = sorted(PROJECTION)
# One family for each kind of projection, block and mask. A solver sees no difference between the others and one of these.
KINDS = ["bloom", "cohere", "falcon", "gemma2", "gpt2", "gpt_neo", "gpt_neox", "gptj", "granite", "llama", "opt", "phi", "phi3",
         "starcoder2"]  # fmt: skip
# Random models want large changes. One that makes a target certain is not needed here: it has to be on top.
FIELDS = {
    "facts": "facts.jsonl", "layers": [1], "position": "subject_last", "contexts": 0, "statistics": "text.txt", "steps": 200,
    "learning_rate": 0.1, "clamp": 20.0, "confidence": 0.3, "refine": 0,
}  # fmt: skip
STRENGTHS: dict[str, dict[str, float]] = {
    "memit": {"lambda": 0.1}, "emmet": {"mu": 0.01}, "alphaedit": {"energy": 0.3, "l2": 0.002}, "encore": {"lambda": 0.1, "eta": 0.002},
}  # fmt: skip
LAYER = 1


@pytest.fixture(scope="module")
def context_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MethodContext]:
    """Family -> what an edit gets, made when first asked for. No test changes the model."""
    made: dict[str, MethodContext] = {}

    def get(family: str) -> MethodContext:
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            (place / "recipes").mkdir()
            write_facts_file(place / "facts.jsonl", 4)
            write_text(place / "text.txt")
            save_dense(family, place / "base")
            made[family] = context_of(Project(place))
        return made[family]

    return get


def method(name: str, **fields: Any) -> ClosedForm:
    found = methods()[f"edit:{name}"].model_validate({"edit": name, **FIELDS, **fields})
    assert isinstance(found, ClosedForm)
    return found


def batch_of(context: MethodContext, facts: list[Fact]) -> Padded:
    return padded([row_of(f, context.tokenizer, "subject_last") for f in facts], CPU)


def updates(edit: Edit, parts: Parts) -> dict[int, Tensor]:
    """Layer -> ΔW [out, in]."""
    factors = {name: f.transposed() if parts.transposed else f for name, f in edit.factors.items()}
    return {list(parts.modules.values()).index(name.removesuffix(".weight")): f.left @ f.right for name, f in factors.items()}


def test_all_families_are_here() -> None:
    assert sorted(configs()) == FAMILIES
    assert len(FAMILIES) == 26


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(family: str, context_for: Callable[[str], MethodContext]) -> None:
    """The projection of every layer, its weight's name on disk, and how it is stored."""
    context = context_for(family)
    parts = Parts.find(context)
    assert tuple(parts.modules.values()) == tuple(PROJECTION[family].replace(".1.", f".{i}.") for i in range(LAYERS))
    assert tuple(parts.tensors.values()) == tuple(context.layout.layout.mlp_out(i) for i in range(LAYERS))
    assert parts.transposed == (family == "gpt2")
    weight = parts.out(LAYER).weight
    assert isinstance(weight, Tensor)
    assert parts.width(LAYER) == (weight.shape[0] if parts.transposed else weight.shape[1]) > 32


@pytest.mark.parametrize("family", FAMILIES)
def test_rome_writes_the_wanted_change(family: str, context_for: Callable[[str], MethodContext]) -> None:
    """One fact, keyed by the plain prompt, float32: the projection's output moves by δ, and the model says the target. The model
    that was handed over is as it was."""
    context = context_for(family)
    parts = Parts.find(context)
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    rome = method("rome", first=1)
    edit = rome.solve(context)
    assert all(torch.equal(p, before[n]) for n, p in context.model.named_parameters())
    assert list(edit.factors) == [f"{PROJECTION[family]}.weight"]

    wanted = edit.tensors[f"{LAYER}.changes"]
    assert wanted.shape == (1, 32)
    assert float(wanted.norm()) > 0.1
    batch = batch_of(context, rome.read(context.project))
    key, old = keys_and_values(parts, LAYER, batch)
    torch.testing.assert_close(edit.tensors[f"{LAYER}.keys"], key, atol=1e-5, rtol=0)
    assert not score(parts, batch)[1].any(), "the base does not say it"
    with parts.changed(updates(edit, parts)):
        _, new = keys_and_values(parts, LAYER, batch)
        _, top = score(parts, batch)
    assert float((new - old - wanted).abs().max()) <= 1e-4
    assert top.all()
    with added(parts, LAYER, batch, wanted, torch.zeros(1, dtype=torch.long)):
        mean, _ = score(parts, batch)
    assert -float(mean) == pytest.approx(edit.record["facts"][0]["loss"], abs=1e-3), "of δ alone, as the optimisation has seen it"

    ratio = edit.record["block_ratio"][LAYER]
    if family in SANDWICH:
        assert abs(ratio - 1) > 0.01
    else:
        assert ratio == pytest.approx(RATIO.get(family, 1.0), abs=1e-3)


@pytest.mark.parametrize("family", KINDS)
def test_memit_equals_its_closed_form(family: str, context_for: Callable[[str], MethodContext]) -> None:
    """Four facts: ΔW and the projection's outputs are those of R Kᵀ (λ d C + KKᵀ)⁻¹, with C summed up here, row by row."""
    context = context_for(family)
    keys, changes, c = solved(context, "memit")
    expected = changes @ keys.T @ torch.linalg.pinv(0.1 * len(c) * c + keys @ keys.T, hermitian=True)
    check(context, "memit", expected, keys)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "falcon"])
@pytest.mark.parametrize("name", ["emmet", "alphaedit", "encore"])
def test_ridge_methods_equal_their_closed_form(name: str, family: str, context_for: Callable[[str], MethodContext]) -> None:
    context = context_for(family)
    keys, changes, c = solved(context, name)
    width, eye = len(c), torch.eye(len(c), dtype=torch.float64)
    trace = c.trace()
    if name == "emmet":
        through = torch.linalg.solve(width * c, keys)
        expected = changes @ torch.linalg.inv(keys.T @ through + 0.01 * torch.eye(keys.shape[1])) @ through.T
    elif name == "encore":
        expected = changes @ keys.T @ torch.linalg.inv(0.1 * width * c + 0.002 * trace * eye + keys @ keys.T)
    else:
        u, found, _ = torch.linalg.svd(c)
        small = u[:, found.flip(0).cumsum(0).flip(0) <= 0.3 * found.sum()]
        p = small @ small.T
        expected = torch.linalg.solve(p @ keys @ keys.T + 0.002 * trace * eye, p @ keys @ changes.T).T
    check(context, name, expected, keys)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_contexts_are_least_squares_over_all_keys(
    family: str, history: bool, context_for: Callable[[str], MethodContext]
) -> None:
    """Behind three beginnings MEMIT is the ridge regression over the keys behind all of them, each with a third of the weight; with
    history the second batch holds all keys of the first, without it none."""
    context = context_for(family)
    fields = {"contexts": 2, **STRENGTHS["memit"], "mode": {"sequential": {"batch": 2}}, "history": history}
    _, _, c = solved(context, "memit")
    parts, facts = Parts.find(context), method("memit", **fields).read(context.project)
    before = ("", *contexts((context.project / "text.txt").read_text("utf-8").split("\n\n"), 2))
    total, earlier = torch.zeros(32, len(c), dtype=torch.float64), torch.zeros(len(c), 0, dtype=torch.float64)
    edit = method("memit", **fields).solve(context)
    for start in (0, 2):
        rows = [row_of(f, context.tokenizer, "subject_last", text) for f in facts[start : start + 2] for text in before]
        with parts.changed({LAYER: total.float()}):
            read = keys_and_values(parts, LAYER, padded(rows, CPU))[0].double().T / 3**0.5
        wanted = edit.tensors[f"{LAYER}.changes"][start : start + 2].double().T.repeat_interleave(3, 1) / 3**0.5
        held = earlier @ earlier.T if history else 0
        total = total + wanted @ read.T @ torch.linalg.pinv(0.1 * len(c) * c + held + read @ read.T, hermitian=True)
        earlier = torch.cat([earlier, read], 1)
    (update,) = updates(edit, parts).values()
    assert float((update - total).abs().max()) <= 1e-4 * float(total.abs().max())


def solved(context: MethodContext, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [in, n] and changes [out, n] that an edit has kept, and C [in, in] of the text that it read."""
    edit = method(name, **STRENGTHS[name]).solve(context)
    keys, changes = (edit.tensors[f"{LAYER}.{kind}"].double().T for kind in ("keys", "changes"))
    parts = Parts.find(context)
    seen: list[Tensor] = []
    with torch.no_grad(), hooked(parts.out(LAYER), before=lambda _m, args: seen.append(args[0].flatten(0, -2))):
        for text in (context.project / "text.txt").read_text("utf-8").split("\n\n"):
            context.model(torch.tensor([context.tokenizer(text)["input_ids"]]))
            if sum(map(len, seen)) >= 10 * parts.width(LAYER):
                break
    vectors = torch.cat(seen).double()
    assert edit.record["statistics"][str(LAYER)]["tokens"] == len(vectors)
    return keys, changes, vectors.T @ vectors / len(vectors)


def check(context: MethodContext, name: str, expected: Tensor, keys: Tensor) -> None:
    """The edit's ΔW, and what it does to the live projection's outputs."""
    edit, parts = method(name, **STRENGTHS[name]).solve(context), Parts.find(context)
    (update,) = updates(edit, parts).values()
    scale = float(expected.abs().max())
    assert float((update - expected).abs().max()) <= 1e-4 * scale
    facts = method(name).read(context.project)
    _, old = keys_and_values(parts, LAYER, batch_of(context, facts))
    with parts.changed({LAYER: update}):
        _, new = keys_and_values(parts, LAYER, batch_of(context, facts))
    predicted = (expected @ keys).T
    assert float((new - old - predicted).abs().max()) <= 1e-4 * float(predicted.abs().max())


@pytest.mark.parametrize("family", KINDS)
def test_ultraedit_lowers_the_loss(family: str, context_for: Callable[[str], MethodContext]) -> None:
    """One step of the gradient method, in every kind of family; the live model shows what the record says."""
    context = context_for(family)
    parts = Parts.find(context)
    edit = UltraEdit.model_validate({"edit": "ultraedit", "facts": "facts.jsonl", "rounds": 1, "strength": 0.3}).solve(context)
    batch = padded([row_of(f, context.tokenizer, "prompt_last") for f in edit.facts], CPU)
    before = score(parts, batch)[0]
    with parts.changed(updates(edit, parts)):
        after = score(parts, batch)[0]
    assert float(after.mean()) > float(before.mean())
    assert [f["loss"] for f in edit.record["facts"]] == pytest.approx((-after).tolist(), abs=1e-3)


# -- the part of a batch that a change can reach

BEFORE = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10 w11"]  # lookups of different places, further apart than the sliding windows of 8


@pytest.mark.parametrize("family", FAMILIES)
def test_tail_and_upper_layers_give_the_same_values(
    family: str, context_for: Callable[[str], MethodContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens from the lookup on, shared beginnings, and layers from the written one up: as whole rows. In BLOOM, whose masks
    cannot be one's own, and GPT-Neo, whose windows count cached tokens, whole rows are run."""
    parts = Parts.find(context := context_for(family))
    facts = [Fact(f"f{i}", "w3 of {subject} is", f"w{i + 10} w{i + 20}", f"w{i + 30} w{i + 40}") for i in range(3)]
    rows = [row_of(f, context.tokenizer, "subject_last", before) for f in facts for before in ("", *BEFORE)]
    batch, once = padded(rows, CPU), passes.packer(parts, rows)(rows)
    small = passes._from_lookup(parts, batch)
    assert (small is not batch) == (family not in ("bloom", "gpt_neo")) == (once.tokens.numel() < int(batch.mask.sum()))
    assert small is batch or small.tokens.shape == (9, 3), "subject's last token, is, the target's first"
    torch.testing.assert_close(score(parts, once)[0], score(parts, batch)[0], atol=1e-5, rtol=0)
    for text, before in (("{subject} is", 1), ("w3 {subject} is", 2)):  # a cache of one token saves nothing
        one = padded([row_of(Fact("f", text, "w10 w20", "w30"), context.tokenizer, "subject_last", "")], CPU)
        assert int(one.lookup.max()) == before
        assert (passes._from_lookup(parts, one) is not one) == (before == 2 and family != "bloom")
        kept = torch.tensor([1, 5, 6])
        for rows in (batch, small):  # some rows, as among all
            torch.testing.assert_close(score(parts, rows.kept(kept))[0], score(parts, rows)[0][kept], atol=1e-5, rtol=0)
    assert layers_run(parts, batch) == list(range(LAYER, LAYERS))

    fast = optimise(context, parts, facts, tmp_path / "fast")
    with monkeypatch.context() as whole:
        whole.setattr(passes, "_from_lookup", lambda _, rows: rows)
        whole.setattr(values, "upper", lambda parts, _, rows: passes.upper(parts, 0, rows))
        slow = optimise(context, parts, facts, tmp_path / "slow")
    for one, other in zip(fast, slow, strict=True):
        assert float(other.change.norm()) > 0.01
        assert float((one.change - other.change).norm()) <= 1e-4 * float(other.change.norm())
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
        assert (one.top, one.steps) == (other.top, other.steps)
    monkeypatch.setattr(passes, "_with_cache", lambda *_: torch.zeros(2) + torch.zeros(3))
    assert passes._from_lookup(parts, batch) is batch, "a model that does not take a cache or a mask"
    monkeypatch.setattr(passes, "_with_cache", lambda *_: torch.empty(1 << 60))
    with nullcontext() if family == "bloom" else pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        passes._from_lookup(parts, batch)  # refused memory does not look like one


def layers_run(parts: Parts, batch: Padded) -> list[int]:
    """Layers whose feed-forward part a pass of `upper` runs, and that nothing of it stays."""
    ran: list[int] = []
    inner = passes.upper(parts, LAYER, batch)
    handles = [parts.out(i).register_forward_hook(lambda *_, i=i: ran.append(i)) for i in range(LAYERS)]
    with torch.no_grad(), logits_at(parts, inner.batch.places):
        inside = inner.run().logits
    for handle in handles:
        handle.remove()
    with torch.no_grad(), logits_at(parts, batch.places):
        outside = run(parts, batch).logits
    torch.testing.assert_close(inside, outside, atol=2e-4, rtol=0)
    assert not any("forward" in vars(layer) for layer in parts.layers)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in parts.layers)
    return ran


def optimise(context: MethodContext, parts: Parts, facts: list[Fact], place: Path, *, widely: bool = False) -> list[values.Value]:
    settings = values.Settings(steps=6, rate=0.3, clamp=10.0, confidence=0.9)
    groups = grouped(facts, "subject_last")
    at = Lookup(without_cache(context, place), parts, LAYER, "subject_last", BEFORE, widely)
    return values.values(at, groups, settings, "weights")


@pytest.mark.parametrize("widely", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_facts_are_optimized_together_as_alone(
    family: str, widely: bool, context_for: Callable[[str], MethodContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts of one batch, of different lengths, do not see each other."""
    parts = Parts.find(context := context_for(family))
    facts = [
        Fact("a", "{subject} is", "w10", "w30"),
        Fact("b", "w3 of w4 of w5 of {subject} is", "w11 w12", "w31 w32 w33"),
        Fact("c", "w6 of {subject} w7 w8 is", "w13", "w34"),
    ]
    together = optimise(context, parts, facts, tmp_path / "together", widely=widely)
    monkeypatch.setattr(values, "AT_ONCE", 1)
    monkeypatch.setattr(values, "_by_width", lambda rows: (list(range(len(rows))), len(rows)))  # in one batch, in their own order
    alone = optimise(context, parts, facts, tmp_path / "alone", widely=widely)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.key, other.key, atol=1e-5, rtol=1e-5)
        assert float((one.change - other.change).norm()) <= 1e-4 * float(other.change.norm())


# -- what is refused


EXPERTS = "routes tokens to experts, and no linear output of a shared expert"
RECURRENT = "is a state-space or recurrent layer"
REFUSED = {
    "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "mamba": RECURRENT, "lfm2": RECURRENT,
    "jamba": f"{EXPERTS}|{RECURRENT}", "qwen3_next": f"{EXPERTS}|{RECURRENT}", "granitemoehybrid": f"{EXPERTS}|{RECURRENT}",
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_architectures_without_one_place_are_refused(family: str, project: Project) -> None:
    from transformers import AutoModelForCausalLM

    base = project.path / family
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hub_layouts.config(family)).save_pretrained(base)
    save_tokenizer(base)
    write_facts_file(project.path / "facts.jsonl", 2)
    with pytest.raises(WorkbenchError, match=REFUSED[family]) as caught:
        compose(project.resolve(f"base: {family}\nsteps: [{{edit: rome, facts: facts.jsonl, layers: [1]}}]\n"), CPU)
    assert "Use `edit: memory`, which stores facts outside the weights" in str(caught.value.hint)
    assert not list((project.path / ".workbench").glob("edits/*"))


def test_a_quantised_base_is_refused_before_any_work(project: Project, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By config.json, when the recipe is read."""
    base = project.path / "packed"
    base.mkdir()
    for file in llama.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}), "utf-8"
    )
    write_facts_file(project.path / "facts.jsonl", 2)
    monkeypatch.setattr(ClosedForm, "solve", lambda *_: pytest.fail("solved"))
    with pytest.raises(WorkbenchError, match=r"quantized weights \(bitsandbytes\); expected floating point") as caught:
        project.run("base: packed\nsteps: [{edit: memit, facts: facts.jsonl, layers: [1]}]\n")
    assert caught.value.hint is not None
    assert "Dequantize it" in caught.value.hint


def test_layers_and_facts_that_are_not_there(context_for: Callable[[str], MethodContext]) -> None:
    context = context_for("llama")
    with pytest.raises(WorkbenchError, match=r"edit rome: layer 3 does not exist; the model has layers 0 to 2"):
        method("rome", layers=[0, 3]).solve(context)
    slow = replace(context, tokenizer=type("Slow", (), {"is_fast": False})())
    with pytest.raises(WorkbenchError, match="Slow has no character offsets"):
        method("rome").solve(slow)


def test_factors_are_the_update(context_for: Callable[[str], MethodContext]) -> None:
    """A Conv1D's factors are for the weight as it is stored, [in, out]."""
    edit = method("memit").solve(context_for("gpt2"))
    (factors,) = edit.factors.values()
    assert isinstance(factors, Factors)
    assert edit.fan_in_fan_out
    assert (factors.left.shape, factors.right.shape) == ((128, 4), (4, 32))
