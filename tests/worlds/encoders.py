"""Small sentence encoders in the layout of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from worlds.routing import prompts

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def sentence_encoder(folder: Path, way: str = "mean_tokens") -> Path:
    """Write a random encoder that knows the words of the routed bricks' prompts; its vectors are pooled in one way."""
    words = dict.fromkeys(word for number in range(3) for text in prompts(number, seed=1) for word in text.split())
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    types = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps([{"type": name} for name in types]), "utf-8")
    (folder / "1_Pooling").mkdir()
    ways = {f"pooling_mode_{name}": name == way for name in ("mean_tokens", "cls_token", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **ways}), "utf-8")
    return folder
