"""Models, adapters and facts small enough to be made in a test: two to four layers, 32 wide, 64 words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from worlds.made import once

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(60)), "is", "of"]
VOCABULARY = len(WORDS)
LAYERS = 4
LORA_MODULES = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"], "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"], "gpt_neox": ["query_key_value", "dense"],
    "opt": ["q_proj", "fc2"],
}  # fmt: skip
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def config(family: str, layers: int = LAYERS) -> Any:
    """A transformers configuration of a family, with what can go wrong in it: grouped heads, biases, ties, layer types."""
    import transformers as t

    common = {"vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4, **common}
    grouped = {"num_key_value_heads": 2, **wide}
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(tie_word_embeddings=True, max_position_embeddings=64, **grouped),
        "llama_untied": lambda: t.LlamaConfig(tie_word_embeddings=False, max_position_embeddings=64, **grouped),
        "qwen2": lambda: t.Qwen2Config(tie_word_embeddings=True, use_sliding_window=True, sliding_window=8, max_window_layers=2, **grouped),
        "gemma2": lambda: t.Gemma2Config(head_dim=8, sliding_window=8, query_pre_attn_scalar=8, **grouped),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=64, **common),
        "gpt_neox": lambda: t.GPTNeoXConfig(max_position_embeddings=64, **wide),
        "gpt_neo": lambda: t.GPTNeoConfig(hidden_size=32, num_layers=layers, num_heads=4, intermediate_size=48, window_size=8,
                                          attention_types=[[["global", "local"], layers // 2]], max_position_embeddings=64, **common),
        "opt": lambda: t.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=layers, num_attention_heads=4, word_embed_proj_dim=32,
                                   max_position_embeddings=64, **{**common, "pad_token_id": 0, "initializer_range": 0}, init_std=0.2),
    }  # fmt: skip
    return made[family]()


def save_tokenizer(out: Path) -> None:
    """A tokenizer of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)


def randomize_vectors(model: Any) -> None:
    """Move norms and biases away from the ones and zeros that they begin with."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@once
def save_model(
    out: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS
) -> Path:
    """A random model of a family with tokenizer and generation config. Norms and biases are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, layers))
    randomize_vectors(model)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.to(dtype).save_pretrained(out)
    save_tokenizer(out)
    return out


@once
def save_finetuned(base: Path, out: Path, *, seed: int, scale: float = 0.05, dtype: torch.dtype | None = None) -> Path:
    """A checkpoint brick: the base plus noise on every float tensor."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    changed = {
        n: (t.float() + scale * torch.randn(t.shape, generator=generator)).to(dtype or t.dtype) for n, t in tensors.items()
    }
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        if (base / name).is_file():
            (out / name).write_bytes((base / name).read_bytes())
    return out


@once
def save_adapter(base: Path, out: Path, *, seed: int, family: str = "llama", **settings: Any) -> Path:
    """A LoRA adapter with random factors, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LORA_MODULES[family], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def baked(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The float32 tensors of a tied base with an adapter, as PEFT merges it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, adapter)
    return {name: tensor for name, tensor in merged.merge_and_unload().state_dict().items() if name != "lm_head.weight"}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def unseal(folder: Path) -> None:
    """Make a result look like one of an earlier version, which wrote no manifests."""
    for manifest in folder.rglob("workbench-manifest.json"):
        manifest.unlink()
    if (folder / "run.json").is_file():
        edit_json(folder / "run.json", manifest=None)


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    data = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), "utf-8")


def live(path: Path) -> Any:
    """The float32 model in a directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
