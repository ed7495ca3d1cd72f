"""Every growth of every family: it keeps the function, found by transformers' own loading, or it is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worlds.growing import CAUGHT, FAMILIES, GROWN, STEPS, logits_of, save_family
from worlds.project import CPU, Project

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion.streamed import Streamed
from workbench.models.layout import Model
from workbench.models.skeleton import causal_skeleton
from workbench.weights.checkpoint import Checkpoint

QUICK = ("llama", "bitnet", "mpt", "vaultgemma", "diffllama", "ernie4_5_moe")
TOKENS = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(3))


def outcome(project: Project, family: str, method: str, before: torch.Tensor) -> str:
    """What a growth at `check: tensors` ends with: "grown", "refused", or the message of its check."""
    try:
        document = project.run(f"base: {family}\nsteps: [{STEPS[method][:-1]}, check: tensors}}]\n", f"{method}.yaml")
    except WorkbenchError as error:
        return error.message if error.exit_code == 3 else "refused"
    after = logits_of(Path(document["model"]), TOKENS)[..., : before.shape[-1]]
    check = document["steps"][0]["check"]
    assert "loaded_whole" not in check
    if method == "stack":
        assert check["finite_logits"]
        assert torch.isfinite(after).all()
        assert float((after - before).abs().max()) > 1e-4, "two more layers compute something"
    else:
        assert float((after - before).abs().max()) <= 1e-5 * max(1.0, float(before.abs().max()))
    return "grown"


def check_family(family: str, project: Project) -> None:
    """Compare the outcomes of all methods with the table."""
    base = save_family(family, project.path / family)
    before = logits_of(base, TOKENS)
    checkpoint = Checkpoint(base, "base")
    streamed = Streamed.prepare(Model(checkpoint, checkpoint.config), causal_skeleton(checkpoint.config, CPU), CPU)
    assert streamed is not None, "every family here can be streamed"
    assert float((streamed.logits(TOKENS) - before).abs().max()) <= 1e-6 * max(1.0, float(before.abs().max()))
    outcomes = {method: outcome(project, family, method, before) for method in STEPS}
    for method, expected in expected_of(family).items():
        assert expected in outcomes[method], (family, outcomes)


def expected_of(family: str) -> dict[str, str]:
    """Return the outcome of each method by the table: "grown", "refused", or a part of the message that stops it."""
    listed = {method: "grown" if family in row.split() else "refused" for method, row in GROWN.items()}
    return {method: CAUGHT.get((family, method), outcome) for method, outcome in listed.items()}


@pytest.mark.parametrize("family", QUICK)
def test_growths_of_a_family(family: str, project: Project) -> None:
    check_family(family, project)


@pytest.mark.nightly
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in QUICK])
def test_growths_of_more_families(family: str, project: Project) -> None:
    check_family(family, project)


def test_the_table_has_what_it_says() -> None:
    """No family of a row is unknown, none is both grown and caught; the table is not empty."""
    assert all(set(row.split()) <= set(FAMILIES) for row in GROWN.values())
    assert all(family not in GROWN[method].split() for family, method in CAUGHT)
    assert set(GROWN) == set(STEPS)
    assert min(len(GROWN[method].split()) for method in ("depth", "stack", "neurons", "heads", "vocabulary")) > 20
    assert len(set(FAMILIES)) == len(FAMILIES) > 60
