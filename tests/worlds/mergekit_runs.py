"""mergekit's own merge from disk, as the reference of the tests of its bridge and of imported recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from worlds.places import TESTS
from worlds.project import CPU
from worlds.tiny import save_adapter, save_finetuned, save_model, tensors_of


def run_mergekit(config: dict[str, Any], out: Path, seed: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors that `mergekit-yaml` writes; paths of the configuration are absolute, or relative to the working directory."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, random_seed=seed, device="cpu",
                           lora_merge_cache=str(out.with_name(f"{out.name}-lora")))  # fmt: skip
    LoaderCache().loaders.clear()  # it knows models by the path as written, in whichever working directory that was
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return tensors_of(out)


def run_mergekit_multi(text: str, out: Path) -> dict[str, torch.Tensor]:
    """The tensors that `mergekit-multi` writes for a file with several documents; paths are relative to the working directory."""
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.scripts.multimerge import load_config, make_tasks

    options = MergeOptions(
        quiet=True,
        write_model_card=False,
        copy_tokenizer=False,
        device="cpu",
        lora_merge_cache=str(out.with_name(f"{out.name}-lora")),
    )
    LoaderCache().loaders.clear()
    stages = out.with_name(f"{out.name}-stages")
    configs, dependencies = load_config(text, str(stages))
    tasks = make_tasks(configs, dependencies, options, str(stages), str(out), lazy=False)
    Executor(tasks, math_device="cpu", storage_device="cpu").execute()
    return tensors_of(out)


def run_mergekit_moe(config: dict[str, Any], out: Path) -> None:
    """Write the model that `mergekit-moe` writes; paths of the configuration are relative to the working directory."""
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    build(MoEMergeConfig.model_validate(config), str(out), MergeOptions(quiet=True, device="cpu"), device="cpu")


def save_models(folder: Path) -> None:
    """base and three fine-tunes one, two, three in float32, an adapter lora on base and one on two."""
    save_model(folder / "base", dtype=torch.float32)
    for seed, name in enumerate(("one", "two", "three"), 1):
        save_finetuned(folder / "base", folder / name, seed=seed)
        for file in ("tokenizer_config.json", "generation_config.json"):
            (folder / name / file).write_bytes((folder / "base" / file).read_bytes())
    save_adapter(folder / "base", folder / "lora", seed=5)
    save_adapter(folder / "two", folder / "lora-two", seed=6)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of two models, as a share of max(1, |value|)."""
    assert set(ours) == set(theirs)
    return max(float(((ours[n].float() - theirs[n].float()).abs() / theirs[n].float().abs().clamp_min(1)).max()) for n in theirs)


EXAMPLES = {path.stem: path for path in sorted((TESTS / "mergekit_examples").glob("*.yml"))}


def run_recipe(path: Path) -> dict[str, torch.Tensor]:
    """What `workbench run` computes."""
    from workbench.models.live import compute
    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.compose import compose

    resolved = resolve(load_recipe(path))
    return compute(compose(resolved, CPU).model, resolved.dtype, CPU)


def imported(text: str, folder: Path, name: str = "test") -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """The tensors of a YAML's recipe, its text and the notes."""
    from workbench.exchange.mergekit import import_recipe, write_imported

    (folder / f"{name}.yml").write_text(text, "utf-8")
    to = folder / "recipes" / f"{name}.yaml"
    to.unlink(missing_ok=True)
    for extra in to.parent.glob(f"{name}-*.yaml"):
        extra.unlink()
    found = import_recipe(folder / f"{name}.yml", to)
    write_imported(found, to)
    return run_recipe(to), found.text, found.notes
