"""Models between which adapters are carried."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from worlds.permuted import Planted, save_permuted
from worlds.tiny import save_adapter, save_model


@dataclass(frozen=True)
class PlantedWorld:
    """A base with an adapter on all kinds of modules, a permuted copy of the base, one with noise, an unrelated model, and texts."""

    folder: Path
    planted: Planted


@pytest.fixture(scope="package")
def planted_world(tmp_path_factory: pytest.TempPathFactory) -> PlantedWorld:
    folder = tmp_path_factory.mktemp("planted")
    base = save_model(folder / "base", dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    save_adapter(base, folder / "lora", seed=2, target_modules=modules)
    planted = save_permuted(base, folder / "permuted")
    save_permuted(base, folder / "noisy", noise=0.05)
    save_model(folder / "unrelated", dtype=torch.float32, seed=7)
    words = random.Random(0)
    rows = [{"text": " ".join(f"w{words.randrange(60)}" for _ in range(40))} for _ in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return PlantedWorld(folder, planted)
