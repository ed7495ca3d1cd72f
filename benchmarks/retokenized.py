"""A model with a byte-pair tokenizer of its own, for benchmarks of models that do not share tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


def retokenized(base: Path, texts: list[str], size: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a model with a tokenizer that is trained on some texts, and this tokenizer; nothing of the model is trained.

    The row of a token that the base has stays; every other row is the mean of the rows of the token's pieces.

    Args:
        base: Directory of the model.
        texts: The texts.
        size: Number of tokens of the new tokenizer.
    """
    old = AutoTokenizer.from_pretrained(base)
    tokenizer: PreTrainedTokenizerFast = old.train_new_from_iterator(texts, size)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before, ids = model.get_input_embeddings().weight.detach().clone(), old.get_vocab()
    rows = torch.empty(len(tokenizer), before.shape[1])
    for token, row in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token])
        pieces = [ids[token]] if token in ids else old(text, add_special_tokens=False)["input_ids"]
        rows[row] = before[pieces].mean(0) if pieces else before.mean(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
    return model, tokenizer
