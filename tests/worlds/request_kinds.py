"""Tasks of every kind of request and metric on items that are hard to lay out, and small models of fourteen architectures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from worlds.jsonl import write_jsonl
from worlds.local_tasks import LOCALDATA, asks_for_texts

HEAD = "custom_dataset: !function localdata.jsonl\ntest_split: test\nmetadata: {version: 1.0}\n"
DATA = HEAD + "dataset_kwargs: {data_files: {test: data/copy.jsonl, shots: data/shots.jsonl}}\n"
# Long contexts and several choices of several tokens; letters after five examples; one continuation; running text.
TASKS = {
    "long": DATA + "task: long\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: gold\n",
    "letters": DATA + "task: letters\noutput_type: multiple_choice\nfewshot_split: shots\nnum_fewshot: 5\n"
    "fewshot_config: {sampler: first_n}\n"
    "doc_to_text: 'Question: {{prompt}} A, B or C?'\ndoc_to_choice: [A, B, C]\ndoc_to_target: gold\n",
    "single": DATA + "task: single\noutput_type: loglikelihood\ndoc_to_text: prompt\ndoc_to_target: answer\n",
    "rolling": DATA + "task: rolling\noutput_type: loglikelihood_rolling\n"
    "doc_to_text: ''\ndoc_to_target: '{{prompt}} {{choices}} {{prompt}} {{choices}}'\n",
}
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier_score", "exact_match")
# All metrics of choices, also those of a whole corpus; two right choices; choices of contexts; texts with other settings and metrics.
MORE_TASKS = {
    "every": TASKS["long"].replace("long", "every") + f"metric_list: [{', '.join(f'{{metric: {m}}}' for m in ACCURACIES)}]\n",
    "pair": DATA + "task: pair\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: '{{choices[:2]}}'\n"
    "doc_to_target: gold\nmetric_list: [{metric: f1}, {metric: mcc}, {metric: acc}]\n",
    "several": TASKS["long"].replace("long", "several").replace("doc_to_target: gold", "doc_to_target: golds"),
    "inputs": DATA + "task: inputs\noutput_type: multiple_choice\ndoc_to_text: gold\ndoc_to_target: answer\n"
    'doc_to_choice: \'{{["One " + answer, "Another " + answer]}}\'\n',
    "copy": asks_for_texts(
        "copy",
        "data/copy.jsonl",
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}\n'
        "filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        prompt="'Q: {{prompt}}'",
    ),
    "write": asks_for_texts(
        "write",
        "data/copy.jsonl",
        'generation_kwargs: {until: ["q", "z"], max_gen_toks: 9, do_sample: false}\n'
        "metric_list: [{metric: exact_match}, {metric: bleu}, {metric: chrf}, {metric: ter}]\n",
        prompt="'Write {{answer}}: {{prompt}}'",
    ),
}
# Equal items, choices that begin alike, bytes of several tokens, a blank before the answer, no context, more than a model holds, line breaks.
PROMPTS = [
    ("Say one ->", "alpha", "al", "alphabet"),
    ("Say one ->", "alpha", "al", "alphabet"),
    ("Grüße, 漢字 ", "ß", "ü", "漢"),
    ("", "b", "a", "cc"),
    ("long before " * 12, "word", "worse", "w"),
    ("long before " * 12 + "and on", "word", "worse", "w"),
    ("Line one\n\nline two ->", "x\ny", "x", "\ny"),
    ("Say one -> more", "more", "mo", "e"),
    ("7 and 8 are", "15", "51", "1"),
]
SMALL = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}
STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon_h1": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16,
                  "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    "recurrent_gemma": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "lru_width": 32,
                        "attention_window_size": 24},
}  # fmt: skip
"""Architectures that pass a state from token to token, which hflm alone scores."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, "num_key_value_heads": 1},
    "qwen2": {**WIDE, "num_key_value_heads": 2},
    "qwen3": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96},
    "gpt_neox": {**WIDE, "rotary_pct": 0.5},
    "gemma2": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {**WIDE, "num_key_value_heads": 1, "sliding_window": 32},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 96,
            "word_embed_proj_dim": 32},
    "granite": {**WIDE, "num_key_value_heads": 1, "logits_scaling": 4.0},
    "mixtral": {**WIDE, "num_key_value_heads": 1, "num_local_experts": 4, "sliding_window": None},
    **STATEFUL,
}  # fmt: skip


def model_of(family: str) -> Any:
    """A model with random weights, away from uniform predictions, so that a wrong mask shows."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if family in STATEFUL else 4.0)
    return model


def items() -> list[dict[str, Any]]:
    """The items of `PROMPTS`; right is each choice by turns, or two of them."""
    return [
        {"id": f"item-{i}", "cluster": f"c{i // 2}", "prompt": prompt, "answer": choices[0], "choices": choices, "gold": i % 2,
         "golds": [i % 3, (i + 1) % 3]}
        for i, (prompt, *choices) in enumerate(PROMPTS)
    ]  # fmt: skip


def write_tasks(folder: Path, rows: Sequence[dict[str, Any]], tasks: dict[str, str]) -> Path:
    """Write tasks on some items in this order; few-shot examples are others, the same for every order."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "localdata.py").write_text(LOCALDATA)
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(text)
    ordered = sorted(rows, key=lambda row: str(row["id"]))[:5]
    write_jsonl(
        folder / "data" / "shots.jsonl", [{**r, "id": f"shot-{i}", "prompt": f"Shot {i} of five"} for i, r in enumerate(ordered)]
    )
    write_jsonl(folder / "data" / "copy.jsonl", rows)
    return folder
