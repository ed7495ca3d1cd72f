"""`workbench recipe import`: example YAMLs in mergekit's syntax, imported, run, and compared with mergekit's own run in float32."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from mergekit_runs import difference, run_mergekit, save_models
from project import CPU
from tiny import tensors_of

from workbench.errors import WorkbenchError
from workbench.importing import import_recipe, write_imported

EXAMPLES = {path.stem: path for path in sorted((Path(__file__).parent / "mergekit_examples").glob("*.yml"))}
REFUSED = {"frankenmerge"}
RANDOM = {"dare_ties", "dare_linear", "della"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the float32 models of `save_models`."""
    path = tmp_path_factory.mktemp("imported")
    (path / "recipes").mkdir()
    save_models(path)
    return path


def run(path: Path) -> dict[str, torch.Tensor]:
    """What `workbench run` computes."""
    from workbench.compose import compose, compute
    from workbench.recipe import load_recipe
    from workbench.resolve import resolve

    return compute(compose(resolve(load_recipe(path)), CPU).model, None, CPU)


def imported(text: str, folder: Path, name: str = "test") -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """The tensors of a YAML's recipe, its text and the notes."""
    (folder / f"{name}.yml").write_text(text, "utf-8")
    to = folder / "recipes" / f"{name}.yaml"
    to.unlink(missing_ok=True)
    for extra in to.parent.glob(f"{name}-*.yaml"):
        extra.unlink()
    found = import_recipe(folder / f"{name}.yml", to)
    write_imported(found, to)
    return run(to), found.text, found.notes


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in REFUSED])
def test_examples_equal_mergekit(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    text = EXAMPLES[name].read_text("utf-8")
    if name in RANDOM:  # what random masks keep is checked below; all else is, where nothing is dropped
        text = re.sub(r"density: [\d.]+", "density: 1.0", text)
    ours, recipe, _ = imported(text, folder, name)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "out")
    assert difference(ours, theirs) <= 1e-6, recipe
    assert all(t.dtype == torch.float32 for t in ours.values())
    sources = [tensors_of(folder / n) for n in ("base", "one", "two", "three")]
    assert all(difference(ours, source) > 1e-3 for source in sources), "a merge, not one of its inputs"


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_examples_drop_as_much_as_mergekit(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    text = EXAMPLES[name].read_text("utf-8")
    ours, _, _ = imported(text, folder, name)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "out", seed=1)
    base = tensors_of(folder / "base")
    for tensor in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"):
        one, two = (m[tensor] - base[tensor] for m in (ours, theirs))
        shares = [float((d.abs() > 1e-7).float().mean()) for d in (one, two)]
        assert shares[0] == pytest.approx(shares[1], abs=0.05)
        assert float(one.abs().sum()) == pytest.approx(float(two.abs().sum()), rel=0.1)


def test_a_frankenmerge_is_refused_by_field(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(WorkbenchError) as caught:
        import_recipe(EXAMPLES["frankenmerge"])
    assert caught.value.message.endswith(
        "frankenmerge.yml:1:1 slices: 2 slices: only one slice over all layers carries over; `grow` cannot stack slices yet"
    )
    assert caught.value.exit_code == 2


def test_the_recipe_is_readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    _, text, _ = imported(EXAMPLES["ties"].read_text("utf-8"), folder, "ties")
    lines = text.splitlines()
    assert lines[0] == f"# workbench run {folder / 'recipes' / 'ties.yaml'}"
    assert lines[1] == "# Imported from ties.yml, mergekit's ties."
    assert (
        "\n".join(lines[lines.index("version: 1") :]) + "\n"
        == """\
version: 1
base: base
bricks:
  one: one
  two: two
  three: three
steps:
  - merge: ties
    bricks:
      one:
        weight: 1.0
        density:
          - {where: {}, value: 1.0}
          - {where: {layers: ':'}, value: {knots: [1.0, 0.7, 0.1]}}
      two:
        weight:
          - {where: {}, value: 0.0}
          - {where: {layers: ':'}, value: {knots: [0.0, 0.3, 0.7, 1.0]}}
        density: 0.5
      three:
        weight:
          - {where: {}, value: 0.25}
          - {where: {include: ['*mlp*']}, value: 0.5}
        density: 0.33
    density: 1.0
    sign: mass
    weigh: before
    divide: weight
    threshold: tensor
output: {dtype: float32}
"""
    )
