"""Arrow against PEFT: directions and scores of its router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.routing import context, prompts
from worlds.tiny import live, save_adapter, save_model

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer
from workbench.route.arrow import Arrow, alignments, pooled_alignments, prototypes
from workbench.route.deciding.hidden import token_rows, windows
from workbench.steps.route import Prompts

BRICKS = ("one", "two", "three")
ROWS = [[5, 9, 3, 7, 2, 11, 8], [6, 3], [9, 8, 7, 6, 5, 4, 3, 2, 12, 13]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters of equal shape, each with one direction that stands out: PEFT finds it by 15 power iterations."""
    from safetensors.torch import load_file, save_file

    place = tmp_path_factory.mktemp("arrow")
    base = save_model(place / "base", dtype=torch.float32)
    for seed, name in enumerate(BRICKS, 1):
        file = save_adapter(base, place / name, seed=seed) / "adapter_model.safetensors"
        tensors = load_file(file)
        for key, tensor in tensors.items():
            tensor[0] *= 4.0 if "lora_A" in key else 1.0
        save_file(tensors, file)
    return place


def factors(folder: Path) -> list[dict[str, Any]]:
    return [linear_factors(Adapter(folder / name, name)) for name in BRICKS]


def test_scores_are_those_of_pefts_router_in_every_batch(folder: Path) -> None:
    from peft import ArrowConfig, create_arrow_model
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    routed = create_arrow_model(
        live(folder / "base"), [str(folder / name) for name in BRICKS], ArrowConfig(top_k=3, rng_seed=0)
    ).eval()
    inputs: dict[str, torch.Tensor] = {}
    layers = {n: m for n, m in routed.named_modules() if isinstance(m, ArrowLoraLinearLayer)}
    for name, layer in layers.items():
        parent = routed.get_submodule(name.rpartition(".lora_arrow")[0])
        # The base's own inputs: no adapter acts on the model while they are recorded.
        parent.register_forward_pre_hook(lambda _m, args, name=name: inputs.setdefault(name, args[0].detach().float()))
        layer.build_prototypes(parent.lora_A, parent.lora_B)
    with torch.no_grad(), routed.disable_adapter():
        routed(input_ids=torch.tensor([ROWS[0]]))
    expected = torch.stack([(inputs[n][0] @ layer.prototypes.float().T).abs() for n, layer in layers.items()]).mean(0)
    found = prototypes(factors(folder))
    assert len(found) == len(layers)
    (scores,) = alignments(live(folder / "base"), found, ROWS[:1])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    model, found = live(folder / "base"), prototypes(factors(folder))
    together = pooled_alignments(model, found, ROWS, 4)
    for row, scores in zip(ROWS, together, strict=True):
        (alone,) = alignments(model, found, [row])
        torch.testing.assert_close(scores, windows(alone, 4)[0], rtol=1e-4, atol=1e-5)


def test_directions_are_first_right_singular_vectors(folder: Path) -> None:
    parts = factors(folder)
    found = prototypes(parts)
    for name, vectors in found.items():
        for vector, factor in zip(vectors, parts, strict=True):
            a, b = factor[name]
            _, _, right = torch.linalg.svd(b.double() @ a.double())
            assert abs(float(vector.double() @ right[0])) == pytest.approx(1.0, abs=1e-6)


def test_a_brick_without_a_module_has_no_direction_there(folder: Path) -> None:
    parts = factors(folder)
    name = next(iter(parts[0]))
    parts[1] = {key: pair for key, pair in parts[1].items() if key != name}
    found = prototypes(parts)
    assert not bool(found[name][1].any())
    assert bool(found[name][0].any())


def test_it_is_fitted_and_restored(folder: Path) -> None:
    model, tokenizer = live(folder / "base"), load_tokenizer(folder / "base")
    parts = dict(zip(BRICKS, factors(folder), strict=True))
    calibration = {name: prompts(i, count=8, templates=2) for i, name in enumerate(BRICKS)}
    step = Arrow.model_validate({"route": "arrow", "calibration": "{brick}.jsonl"})
    router = step.fit(context(model, tokenizer, calibration, factors=parts.__getitem__))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = Arrow.restore(router.settings(), router.tensors())
    assert router.layer is None
    texts = prompts(1, seed=1)
    measured = router.measure(model, token_rows(tokenizer, texts))
    assert measured.shape == (len(texts), len(BRICKS))
    one, two = (r.decide(Prompts(texts, None, measured)) for r in (router, again))
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.scores, two.scores)
    router = step.fit(context(live(folder / "base"), load_tokenizer(folder / "base"), calibration, factors=parts.__getitem__))
    plain = {**router.tensors(), "centre": torch.zeros(3), "scale": torch.ones(3)}
    assert Arrow.restore(router.settings(), plain).bricks == BRICKS
    with pytest.raises(WorkbenchError, match="has standardized scores, which arrow no longer makes"):
        Arrow.restore(router.settings(), {**plain, "centre": torch.ones(3)})
