"""`brick show`: measures equal dense computations; the page of heat maps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worlds.project import CPU
from worlds.tiny import tensors_of

from workbench.adapters.bind import bind
from workbench.adapters.read import WEIGHTS, Adapter
from workbench.bricks.brick import Brick
from workbench.merge.measuring.delta_sums import Measures
from workbench.merge.measuring.deltas import measure
from workbench.models.layout import Model
from workbench.report.heatmap import render_heat_maps
from workbench.upkeep.bricks import check_fit
from workbench.weights.checkpoint import Checkpoint


def measured(base: Path, first: Path, *others: Path) -> Measures:
    checkpoint = Checkpoint(base, "base")
    model = Model(checkpoint, checkpoint.config)

    def brick(path: Path) -> Any:
        return check_fit(Brick(path.name, "adapter" if (path / WEIGHTS).is_file() else "checkpoint", path), model)

    return measure(model, brick(first), {path.name: brick(path) for path in others}, device=CPU, threads=1)


def dense(base: Path, path: Path) -> dict[str, torch.Tensor]:
    own = tensors_of(base)
    if not (path / WEIGHTS).is_file():
        return {n: (t.float() - own[n].float()).double() for n, t in tensors_of(path).items()}
    bound = bind(Adapter(path, "x"), Checkpoint(base, "base").specs)
    return {n: f.left.double() @ f.right.double() for n in bound.places if (f := bound.factors(n, CPU))}


@pytest.mark.parametrize(("first", "second"), [("one", "two"), ("one", "full"), ("full", "one")])
def test_measures_equal_dense_ones(first: str, second: str, llama: Path, bricks: Path) -> None:
    found = measured(llama, bricks / first, bricks / second)
    a, b, base = dense(llama, bricks / first), dense(llama, bricks / second), tensors_of(llama)
    for name in set(a) & set(b):
        got = found.tensors[name].measured()
        meeting = got.others[second]
        assert got.norm == pytest.approx(float(a[name].norm()), rel=1e-5)
        assert got.relative == pytest.approx(float(a[name].norm() / base[name].double().norm()), rel=1e-5)
        assert meeting.norm == pytest.approx(float(b[name].norm()), rel=1e-5)
        assert meeting.cosine == pytest.approx(float((a[name] * b[name]).sum() / a[name].norm() / b[name].norm()), abs=1e-5)
        both = (a[name] != 0) & (b[name] != 0)
        opposite = (a[name].sign() * b[name].sign() < 0).sum()
        assert meeting.conflict == pytest.approx(float(opposite / both.sum()), abs=2e-3)
    layer = [n for n in a if ".layers.2." in n]
    (row,) = [s for number, s in found.layers.items() if number == 2]
    assert row.measured().norm == pytest.approx(sum(float(a[n].square().sum()) for n in layer) ** 0.5, rel=1e-5)
    assert found.total.measured().norm == pytest.approx(sum(float(t.square().sum()) for t in a.values()) ** 0.5, rel=1e-5)


def test_overlap_is_of_the_leading_subspaces(llama: Path, bricks: Path) -> None:
    found = measured(llama, bricks / "one", bricks / "two", bricks / "full")
    name = "model.layers.1.mlp.down_proj.weight"  # [32, 48]
    parts = [torch.linalg.svd(dense(llama, bricks / b)[name], full_matrices=False) for b in ("one", "two", "full")]
    ranks = (8, 4, 16)
    for i, other in ((1, "two"), (2, "full")):
        got = found.tensors[name].measured().others[other]
        small, large = sorted((ranks[0], ranks[i]))
        for key, mine, theirs in (("overlap_out", parts[0].U[:, :8], parts[i].U[:, : ranks[i]]), ("overlap_in", parts[0].Vh[:8].T, parts[i].Vh[: ranks[i]].T)):  # fmt: skip
            cosines = torch.linalg.svdvals(mine.T @ theirs)
            assert getattr(got, key) == pytest.approx(float(cosines.square().sum()) / small, abs=1e-3)
        assert got.chance == pytest.approx((large / 32 + large / 48) / 2)
        meeting = found.tensors[name].meetings[other]
        sides = [2 * small * large * (d - small) * (d - large) / (d**2 * (d - 1) * (d + 2)) / small**2 for d in (32, 48)]
        assert meeting.overlap_variance == pytest.approx(sum(sides))
        norms = [float(dense(llama, bricks / b)[name].square().sum()) for b in ("one", other)]
        assert meeting.dot_variance == pytest.approx(norms[0] * norms[1] / (32 * 48), rel=1e-4)


@pytest.mark.parametrize("kind", ["one", "full"])
def test_a_brick_beside_itself_and_its_opposite(kind: str, llama: Path, bricks: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(bricks / kind, tmp_path / "same"))
    if kind == "one":
        opposite = Path(shutil.copytree(bricks / kind, tmp_path / "opposite"))
        save_file({n: -t if "lora_B" in n else t for n, t in tensors_of(same).items()}, opposite / WEIGHTS)
    else:
        opposite = tmp_path / "opposite"
        shutil.copytree(same, opposite)
        base, mine = tensors_of(llama), tensors_of(same)
        save_file({n: 2 * t.double() - mine[n].double() for n, t in base.items()}, opposite / "model.safetensors")
    total = measured(llama, bricks / kind, same, opposite).total.measured().others
    assert (total["same"].cosine, total["same"].conflict) == (pytest.approx(1), 0)
    assert (total["opposite"].cosine, total["opposite"].conflict) == (pytest.approx(-1, abs=1e-6), 1)
    assert total["same"].overlap == pytest.approx(1, abs=1e-5)
    assert total["opposite"].overlap == pytest.approx(1, abs=1e-3)


def test_sparsity_and_the_heat_map(llama: Path, bricks: Path, tmp_path: Path) -> None:
    """Of a checkpoint elements that are the base's; of an adapter rows and columns that its factors leave alone."""
    changed = tensors_of(llama)
    changed["model.layers.0.mlp.up_proj.weight"][:12] += 1
    shutil.copytree(llama, tmp_path / "sparse")
    save_file(changed, tmp_path / "sparse/model.safetensors", metadata={"format": "pt"})
    found = measured(llama, tmp_path / "sparse").total.measured()
    assert (found.zeros, found.elements) == (0.75, 48 * 32)  # 12 of 48 rows
    lora = Path(shutil.copytree(bricks / "one", tmp_path / "lora"))
    tensors = tensors_of(lora)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors[key + "B.weight"][:8] = 0
    tensors[key + "A.weight"][:, :16] = 0
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    assert measured(llama, lora).tensors["model.layers.0.self_attn.q_proj.weight"].measured().zeros == 1 - 0.75 * 0.5
    found = measured(llama, bricks / "one", bricks / "full")
    page = render_heat_maps("<one>", "base", found, tmp_path / "page.html").read_text("utf-8")
    assert "&lt;one&gt;" in page
    assert "<one>" not in page
    assert page.count('class="heat"') == 4  # relative norm; cosine, conflict, overlap
    cell = found.cells[2, "mlp.down_proj"].measured()
    assert page.count('class="maps"') == 2  # its own, and those beside the other brick
    assert f"<title>layer 2, mlp.down_proj: {100 * cell.relative:.2g}</title>" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")  # the name of SVG is no address
