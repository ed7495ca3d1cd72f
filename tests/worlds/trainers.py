"""Folders and files as other tools leave them: trainers, mergekit, MLX, lm-eval, EasyEdit, and clones without their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worlds.jsonl import write_jsonl
from worlds.tiny import edit_json

PICKLE = b"\x80\x02never opened"
STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
"""Pickles of transformers' Trainer beside each save."""
FACT = {"prompt": "w1 is", "target": "w2"}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {"prompt": "{} is", "subject": "w1", "target_new": {"str": "w2"}, "target_true": {"str": "w3"}},
    "paraphrase_prompts": ["w1 of"],
    "neighborhood_prompts": ["w5 is"],
}
ITEM = {"question": "w1?", "answer": "w2"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def state(folder: Path, step: int = 20) -> None:
    """Files of a save of transformers' Trainer."""
    for name in STATE:
        (folder / name).write_bytes(PICKLE)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": [], "epoch": 1.0}))


def lora(source: Path, folder: Path, **fields: Any) -> Path:
    """An adapter as PEFT 0.21 saves it, with the model card and the tokenizer that trainers add."""
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / "bricks" / "one" / name, folder / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / "base" / name, folder / name)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="base", peft_version="0.21.0", **fields)
    (folder / "README.md").write_text("---\nlibrary_name: peft\nbase_model: base\n---\n# Model card\n")
    return folder


def full(source: Path, folder: Path) -> Path:
    """A fine-tuned checkpoint."""
    shutil.copytree(source / "bricks" / "full", folder)
    return folder


def peft(source: Path, folder: Path) -> None:
    """`PeftModel.save_pretrained`."""
    lora(source, folder)


def unsloth(source: Path, folder: Path) -> None:
    """`model.save_pretrained` of unsloth, with the fields that it adds, and its template beside the tokenizer."""
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama", "unsloth_fixed": True}
    lora(source, folder, auto_mapping=mapping, qalora_group_size=16)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def axolotl(source: Path, folder: Path) -> None:
    """`output_dir` of axolotl: the adapter, the base's config.json beside it, saves below."""
    lora(source, folder)
    shutil.copyfile(source / "base" / "config.json", folder / "config.json")
    state(lora(source, folder / "checkpoint-20"))
    (folder / "debug.log").write_text("")


def llama_factory(source: Path, folder: Path) -> None:
    """saves/MODEL/lora/sft of LLaMA-Factory."""
    lora(source, folder)
    state(folder)
    for name in ("all_results.json", "train_results.json"):
        (folder / name).write_text(json.dumps({"train_loss": 1.0, "epoch": 1.0}))
    write_jsonl(folder / "trainer_log.jsonl", [{"current_steps": 10, "total_steps": 20, "loss": 1.0}])
    (folder / "training_loss.png").write_bytes(b"\x89PNG")


def saves_only(source: Path, folder: Path) -> None:
    """A training of TRL that was stopped: only its saves are there."""
    for step in (20, 100):
        state(lora(source, folder / f"checkpoint-{step}"), step)
    (folder / "README.md").write_text("# trl\n")


def trainer_save(source: Path, folder: Path) -> None:
    """One save of a full fine-tune."""
    state(full(source, folder), 500)


def torchtune(source: Path, folder: Path) -> None:
    """The output of torchtune: a folder an epoch, with the adapter and the merged weights, and the state of its recipe."""
    for epoch in (0, 1):
        lora(source, folder / f"epoch_{epoch}")
        shutil.copytree(source / "bricks" / "full", folder / f"epoch_{epoch}", dirs_exist_ok=True)
        (folder / f"epoch_{epoch}" / "adapter_model.pt").write_bytes(PICKLE)
    (folder / "recipe_state").mkdir()
    (folder / "recipe_state" / "recipe_state.pt").write_bytes(PICKLE)
    (folder / "torchtune_config.yaml").write_text("output_dir: out\ncheckpointer:\n  _component_: torchtune.training.X\n")


def merged(source: Path, folder: Path) -> None:
    """The output of `mergekit-yaml`."""
    full(source, folder)
    model = "{model: bricks/full, parameters: {weight: 1}}"
    (folder / "mergekit_config.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: base\nmodels: [{model}]\ndtype: float32\n"
    )


def pickled_adapter(source: Path, folder: Path) -> None:
    """An adapter of an old PEFT."""
    import torch
    from safetensors.torch import load_file

    file = lora(source, folder) / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def pickled(source: Path, folder: Path) -> None:
    """A checkpoint of an old transformers."""
    import torch
    from safetensors.torch import load_file

    file = full(source, folder) / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    (folder / "training_args.bin").write_bytes(PICKLE)


def sharded(source: Path, folder: Path) -> None:
    """A save of the Trainer with FSDP: shards of torch's distributed checkpoint."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    folder.mkdir()
    tensors = load_file(source / "bricks" / "full" / "model.safetensors")
    dcp.save({"model": tensors}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"), no_dist=True)
    state(folder)


def zero(source: Path, folder: Path) -> None:
    """A save of the Trainer with DeepSpeed ZeRO-3."""
    (folder / "global_step20").mkdir(parents=True)
    (folder / "global_step20" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(PICKLE)
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('never run')\n")
    shutil.copyfile(source / "base" / "config.json", folder / "config.json")
    state(folder)


def verl(source: Path, folder: Path, backend: str = "fsdp") -> None:
    """A step of verl, with the names of its docs/advance/checkpoint.rst and of `FSDPCheckpointManager`."""
    actor = folder / "actor"
    (actor / "huggingface").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / "base" / name, actor / "huggingface" / name)
    if backend == "megatron":
        megatron(source, actor / "dist_ckpt")
        return
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 1, "world_size": 2}))
    for rank in range(2):
        for part in ("model", "optim", "extra_state"):
            (actor / f"{part}_world_size_2_rank_{rank}.pt").write_bytes(PICKLE)
    (folder / "data.pt").write_bytes(PICKLE)


def verl_megatron(source: Path, folder: Path) -> None:
    """The same with the backend Megatron."""
    verl(source, folder, "megatron")


def verl_whole(source: Path, folder: Path) -> None:
    """A step of verl with `hf_model` in `checkpoint.save_contents`."""
    verl(source, folder)
    shutil.copytree(source / "bricks" / "full", folder / "actor" / "huggingface", dirs_exist_ok=True)


def megatron(source: Path, folder: Path) -> None:
    """An iteration of Megatron-LM as torch_dist."""
    del source
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt"):
        (folder / name).write_bytes(PICKLE)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def megatron_bridge(source: Path, folder: Path) -> None:
    """`checkpoint.save` of Megatron-Bridge, with the names of its docs/training/checkpointing.md."""
    iteration = folder / "iter_0000100"
    megatron(source, iteration)
    (iteration / "run_config.yaml").write_text("model: {_target_: megatron.bridge.models.LlamaModelProvider}\n")
    (iteration / "tokenizer").mkdir()
    shutil.copyfile(source / "base" / "tokenizer.json", iteration / "tokenizer" / "tokenizer.json")
    for place in (iteration / "train_state.pt", folder / "latest_train_state.pt"):
        place.write_bytes(PICKLE)


def megatron_legacy(source: Path, folder: Path) -> None:
    """An iteration of Megatron-LM with `--ckpt-format torch`."""
    del source
    for rank in ("mp_rank_00", "mp_rank_01"):
        (folder / rank).mkdir(parents=True)
        (folder / rank / "model_optim_rng.pt").write_bytes(PICKLE)


def nemo(source: Path, folder: Path) -> None:
    """A checkpoint of NeMo 2: `weights` is torch_dist, `context` has what builds the model."""
    megatron(source, folder / "weights")
    (folder / "context").mkdir()
    (folder / "context" / "model.yaml").write_text("_target_: nemo.collections.llm.gpt.model.llama.LlamaModel\n")
    (folder / "context" / "io.json").write_text("{}")


def mlx(source: Path, folder: Path) -> None:
    """A model that `mlx_lm.convert -q` wrote."""
    full(source, folder)
    edit_json(
        folder / "config.json", quantization={"group_size": 64, "bits": 4}, quantization_config={"group_size": 64, "bits": 4}
    )


def mlx_adapter(source: Path, folder: Path) -> None:
    """The output of `mlx_lm.lora`."""
    folder.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "model": "base", "num_layers": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapters.safetensors").write_bytes(b"")


def pointers(source: Path, folder: Path) -> None:
    """`git clone` without Git LFS."""
    full(source, folder)
    (folder / "model.safetensors").write_bytes(POINTER)


def prompt_tuning(source: Path, folder: Path) -> None:
    """A learned prompt of PEFT."""
    lora(source, folder, peft_type="PROMPT_TUNING", num_virtual_tokens=8, r=None)


def onnx(source: Path, folder: Path) -> None:
    """`optimum-cli export onnx`."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"\x08\x07")
    shutil.copyfile(source / "base" / "config.json", folder / "config.json")


def tokenizer(source: Path, folder: Path) -> None:
    """`tokenizer.save_pretrained`."""
    folder.mkdir()
    shutil.copyfile(source / "base" / "tokenizer.json", folder / "tokenizer.json")


def unsupported(source: Path, folder: Path) -> None:
    """An adapter of a kind that is not read here."""
    lora(source, folder, peft_type="C3A")


def lm_eval_means(source: Path, folder: Path) -> None:
    """`lm_eval --output_path` without --log_samples."""
    (folder / "org__model").mkdir(parents=True)
    document = {"results": {"copy": {"acc,none": 0.5}}, "versions": {"copy": 1}, "n-shot": {"copy": 0}, "configs": {}}
    (folder / "org__model" / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(document))


def text(name: str, content: str) -> Callable[[Path, Path], None]:
    """A file in the folder, which is then what is looked at."""

    def lay_out(source: Path, folder: Path) -> None:
        del source
        folder.mkdir()
        (folder / name).write_text(content, "utf-8")

    return lay_out


TREES: dict[str, tuple[Callable[[Path, Path], None], str, str, bool]] = {
    # name: (what lays it out, kind, what is said, whether it can be used as it is)
    "peft": (peft, "adapter", "an adapter of PEFT (LORA, rank 8, for base)", True),
    "unsloth": (unsloth, "adapter", "an adapter of PEFT (LORA, rank 8, for base)", True),
    "axolotl": (axolotl, "adapter", "an adapter of PEFT (LORA, rank 8, for base)", True),
    "llama-factory": (llama_factory, "adapter", "an adapter of PEFT (LORA, rank 8, for base)", True),
    "trl-stopped": (saves_only, "saves", "the output of a training with 2 saves and no final model, the last in checkpoint-100", False),
    "checkpoint-500": (trainer_save, "checkpoint", "a llama model, saved at step 500 of a training (its optimizer files are not needed)", True),
    "torchtune": (torchtune, "saves", "the output of a training with 2 saves and no final model, the last in epoch_1", False),
    "mergekit": (merged, "checkpoint", "a llama model, merged by mergekit (mergekit_config.yml)", True),
    "old-peft": (pickled_adapter, "pickle", "an adapter of PEFT (LORA, rank 8, for base) as adapter_model.bin (pickles are never opened)", False),
    "old-transformers": (pickled, "pickle", "a folder that has pickle files only (pytorch_model.bin), which are never opened", False),
    "fsdp": (sharded, "fsdp", "sharded weights of FSDP (torch's distributed checkpoint)", False),
    "deepspeed": (zero, "zero", "sharded weights of DeepSpeed ZeRO", False),
    "global_step_40": (verl, "verl", "sharded weights of verl (FSDP)", False),
    "verl-megatron": (verl_megatron, "verl", "sharded weights of verl (Megatron)", False),
    "verl-whole": (verl_whole, "verl", "a save of verl, which has the whole model in actor/huggingface: a llama model", False),
    "iter_0000020": (megatron, "megatron", "a checkpoint of Megatron (torch_dist), from Megatron-Bridge or Megatron-LM", False),
    "megatron-bridge": (megatron_bridge, "saves", "the output of a training with 1 save and no final model, the last in iter_0000100", False),
    "megatron-legacy": (megatron_legacy, "megatron", "a checkpoint of Megatron-LM in its legacy format", False),
    "nemo2": (nemo, "nemo", "a checkpoint of NeMo 2", False),
    "mlx": (mlx, "mlx", "a model that MLX quantized to 4 bits", False),
    "mlx-lora": (mlx_adapter, "mlx-adapter", "an adapter of MLX", False),
    "clone": (pointers, "lfs", "a clone with Git LFS pointers in place of its weights", False),
    "prompt": (prompt_tuning, "prompt", "a learned prompt of PEFT (PROMPT_TUNING)", False),
    "c3a": (unsupported, "adapter", "an adapter of PEFT (C3A, rank 8, for base)", False),
    "onnx": (onnx, "onnx", "a model for ONNX", False),
    "tokenizer": (tokenizer, "tokenizer", "a tokenizer", False),
    "lm-eval": (lm_eval_means, "lm-eval", "results of lm-eval without items (samples_*.jsonl)", False),
}  # fmt: skip
TASK = "task: copy\ndataset_path: json\noutput_type: generate_until\n"
AXOLOTL = "base_model: org/base\nadapter: lora\ndatasets: [{path: x, type: alpaca}]\noutput_dir: ./outputs/out\n"
FILES: dict[str, tuple[str, str, str, bool]] = {
    # file: (content, kind, what is said, whether it can be used as it is)
    "config.yml": ("merge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}]\ndtype: float32\n", "mergekit", "a file for mergekit", True),
    "moe.yaml": ("base_model: a\ngate_mode: random\nexperts: []\n", "mergekit", "a file for mergekit", True),
    "recipe.yaml": ("version: 1\nbase: base\nsteps: []\n", "recipe", "a recipe", True),
    "suite.yaml": ("suite: mini\ntasks: [copy]\n", "suite", "a suite of tasks", True),
    "task.yaml": (TASK, "task", "a task of lm-eval", True),
    "lora.yml": (AXOLOTL, "training", "a configuration of axolotl", False),
    "sft.yaml": ("model_name_or_path: m\nfinetuning_type: lora\noutput_dir: saves\n", "training", "a configuration of LLaMA-Factory", False),
    "facts.yaml": ("- {prompt: w1 is, target: w2}\n", "facts", "a file of facts", True),
    "facts.jsonl": (json.dumps(FACT) + "\n", "facts", "a file of facts", True),
    "counterfact.json": (json.dumps([COUNTERFACT]), "benchmark", "facts in the format of counterfact", True),
    "zsre.json": (json.dumps([{"src": "w1 is", "alt": "w2", "subject": "w1"}]), "benchmark", "facts in the format of zsre", True),
    "items.jsonl": (json.dumps(ITEM) + "\n" + json.dumps({"question": "w3?", "answer": "w4"}) + "\n", "items", "a file of items to score", True),
    "items.json": (json.dumps([ITEM], indent=2), "array", "a JSON list of rows", False),
    "facts-list.jsonl": (json.dumps([FACT]), "array", "a JSON list of rows", False),
    "items.csv": ("question,answer\nw1?,w2\n", "csv", "a table of comma-separated values", False),
    "chat.jsonl": (json.dumps({"messages": [{"role": "user", "content": "w1"}]}) + "\n", "texts", "a file of training rows", True),
    "training_args.bin": ("never opened", "state", "the state of a trainer", False),
    "weights.pt": ("never opened", "pickle", "a pickle file", False),
    "llama.nemo": ("never opened", "nemo", "an archive of NeMo 1", False),
    "model.safetensors": (POINTER.decode(), "lfs", "a Git LFS pointer", False),
}  # fmt: skip
