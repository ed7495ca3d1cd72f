"""The bytes that `docs/merging-exactness.md` promises, under other instruction sets, orders of BLAS, numbers of threads and loops.

The libraries read these settings when they are loaded, so that each of them has a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from worlds.flavours import Flavour, save_base, save_flavour
from worlds.project import Project
from worlds.tiny import save_adapter, save_finetuned

LORAS = "bricks: {l: plain, r: rslora, p: patterns}\n"
MIXED = "bricks: {a: a, b: b, l: plain, p: patterns}\n"
PROMISED = {
    "average": "bricks: {a: a, b: b}\nsteps: [{merge: average}]\n",
    "slerp": "bricks: {a: a, l: plain}\nsteps: [{merge: slerp}]\n",
    "linear": LORAS + "steps: [{merge: linear, bricks: {l: 0.3, r: 1.1, p: -0.2}}]\n",
    "task_arithmetic": MIXED + "steps: [{merge: task_arithmetic, lambda: {first: 0.1, last: 1.7}}]\n",
    "ties": MIXED + "steps: [{merge: ties, density: 0.4}, {id: again, merge: ties, bricks: [l, p]}]\n",
    "dare": MIXED + "seed: 7\nsteps: [{merge: dare, density: 0.3, rescale: l1, then: ties}]\n",
    "DoRA": "bricks: {d: dora, l: plain}\nsteps: [{merge: task_arithmetic}]\n",
    "other kinds": "bricks: {h: loha, k: lokr, i: ia3}\nsteps: [{merge: task_arithmetic, bricks: {h: 0.7, k: -0.3, i: 1}}]\n",
    "recipe": "bricks: {m: {recipe: recipes/linear.yaml}, l: plain}\nsteps: [{merge: linear}]\noutput: {dtype: bfloat16}\n",
    "exact": LORAS + "steps: [{merge: task_arithmetic, lambda: 0.5}]\noutput: {form: adapter, rank: exact}\n",
    "Conv1D": "base: gpt2\nbricks: {d: conv-dora, c: conv}\nsteps: [{merge: task_arithmetic}]\n",
}
MODULES = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
# Name -> (base, class in PEFT, settings).
OTHERS = {
    "dora": ("base", "LoraConfig", {"target_modules": [*MODULES, "embed_tokens"], "use_dora": True}),
    "loha": ("base", "LoHaConfig", {"target_modules": ["q_proj", "down_proj"], "alpha": 6}),
    "lokr": ("base", "LoKrConfig", {"target_modules": ["q_proj", "down_proj"], "alpha": 6, "r": 2, "decompose_both": True}),
    "ia3": ("base", "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "conv": ("gpt2", "LoraConfig", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "conv-dora": ("gpt2", "LoraConfig", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
}
SETTINGS = {
    "torch": {"WORKBENCH_KERNELS": "torch"},
    "torch, oldest instructions": {
        "WORKBENCH_KERNELS": "torch",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    },
    "AVX2, 2 threads": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "CC": "cc -mno-avx512f"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "compatible MKL, no AVX": {"MKL_CBWR": "COMPATIBLE", "CC": "cc -mno-avx"},
}
PROGRAM = """
import hashlib, json, sys
from pathlib import Path
import torch
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.device import device_of_run
from workbench.run.execute import execute
from workbench.run.device import Work
found, runs, threads = {}, Path(sys.argv[1]), int(sys.argv[2])
for file in sorted(Path("recipes").glob("*.yaml")):
    resolved = resolve(load_recipe(file))
    for number, device in enumerate({torch.device("cpu"), device_of_run("cpu", resolved)}):
        done = execute(resolved, runs / str(number), Work(device, threads)).to_dict()
        files = sorted(Path(done["model"] or done["adapter"]).glob("*.safetensors"))
        digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
        assert found.setdefault(file.stem, digest) == digest, file.stem
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Environment variables -> recipe's name -> digest of its weights, from a new process."""
    path = tmp_path_factory.mktemp("processors")
    (path / "recipes").mkdir()
    base = save_base(path / "base", "llama")
    save_base(path / "gpt2", "gpt2")
    for seed, name in enumerate("ab", 1):
        save_finetuned(base, path / name, seed=seed, dtype=torch.float32)
    save_adapter(base, path / "plain", seed=3, r=8, target_modules=[*MODULES, "embed_tokens"])
    save_adapter(base, path / "rslora", seed=4, r=1, use_rslora=True)
    save_adapter(base, path / "patterns", seed=5, rank_pattern={"q_proj": 2, "down_proj": 200})
    for name, (on, kind, settings) in OTHERS.items():
        save_flavour(Flavour("", settings, peft=kind), path / on, path / name)
    for name, text in PROMISED.items():
        Project(path).write(text, f"{name}.yaml")

    def run(threads: int, settings: dict[str, str]) -> dict[str, str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads), **settings}
        shutil.rmtree(path / "runs", ignore_errors=True)
        shutil.rmtree(path / ".workbench", ignore_errors=True)
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(path / "runs"), str(threads)]
        done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        assert found.keys() == PROMISED.keys()
        return found

    return run


@pytest.fixture(scope="module")
def usual(digests: Callable[..., dict[str, str]]) -> dict[str, str]:
    """Digests on this machine as it is."""
    return digests(1, {})


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_promised_bytes_are_the_same(name: str, digests: Callable[..., dict[str, str]], usual: dict[str, str]) -> None:
    """A setting that this processor lacks takes the best one that it has."""
    assert digests(2 if "2 threads" in name else 1, SETTINGS[name]) == usual
