"""Small sentence encoders in the layout of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from worlds.routing import prompts
from worlds.tiny import edit_json

SIZE = 16
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def sentence_encoder(folder: Path, way: str = "mean_tokens", family: str = "bert") -> Path:
    """Write a random encoder that knows the words of the routed bricks' prompts; its vectors are pooled in one way.

    A decoder is written as Qwen3-Embedding is published: the class of config.json has a head, the file has none.
    """
    words = dict.fromkeys(word for number in range(3) for text in prompts(number, seed=1) for word in text.split())
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": SIZE, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True} if family == "qwen3" else {"pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, **more)
    AutoModel.from_config(config).save_pretrained(folder)
    if family == "qwen3":
        edit_json(folder / "config.json", architectures=["Qwen3ForCausalLM"])
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    types = [
        {"idx": i, "name": str(i), "path": paths[n], "type": f"sentence_transformers.models.{n}"} for i, n in enumerate(paths)
    ]
    (folder / "modules.json").write_text(json.dumps(types), "utf-8")
    (folder / "1_Pooling").mkdir()
    ways = {f"pooling_mode_{name}": name == way for name in ("mean_tokens", "cls_token", "max_tokens", "lasttoken")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": SIZE, **ways}), "utf-8")
    return folder
