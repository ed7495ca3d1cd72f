"""Four tasks of four kinds, and an empty project around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.local_tasks import CHOICE, GENERATE, LOCALDATA, documents, write_data

ROLLING = """
task: roll
custom_dataset: !function localdata.jsonl
dataset_kwargs: {data_files: {test: data/copy.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: prompt
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""
LAST = """
task: last
custom_dataset: !function localdata.jsonl
dataset_kwargs: {data_files: {test: data/copy.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: prompt
doc_to_target: "{{' ' + answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks, one of each kind; the generating one has two filters."""
    folder = tmp_path_factory.mktemp("evals") / "tasks"
    (folder / "data").mkdir(parents=True)
    (folder / "localdata.py").write_text(LOCALDATA)
    both = GENERATE.replace("filter_list: [", "filter_list: [{name: plain, filter: [{function: take_first}]}, ")
    for name, text in (("copy", both), ("pick", CHOICE), ("roll", ROLLING), ("last", LAST)):
        (folder / f"{name}.yaml").write_text(text)
    write_data(folder, documents())
    return folder


@pytest.fixture
def project(tmp_path: Path, cwd: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    return tmp_path
