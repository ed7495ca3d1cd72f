"""Facts as lm-eval tasks: documents of every kind of question, task definitions, and the folder that holds both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from workbench.evaluate.gate import LOCALDATA
from workbench.facts.facts import FACT_KINDS, Fact, FactKind, joined
from workbench.files import scratch_beside
from workbench.manifest import publish_sealed

# Kind -> metrics, the headline metric first, and whether lower is better. They are shares unless the name says otherwise.
METRICS: dict[FactKind, tuple[tuple[str, bool], ...]] = {
    "efficacy": (("acc", False),),
    "preferred": (("token_mean_preferred", False), ("token_mean_magnitude", False), ("token_mean_margin", False)),
    "paraphrase": (("acc", False),),
    "preferred-paraphrase": (("token_mean_preferred", False), ("token_mean_magnitude", False), ("token_mean_margin", False)),
    "neighbours": (("acc", False),),
    "neighbours-right": (("acc", False),),
    "neighbours-strict": (("acc", False),),
    "preferred-neighbours": (("token_mean_preferred", False), ("token_mean_magnitude", False), ("token_mean_margin", False)),
    "portability": (("acc", False),),
    "generated": (("exact_match", False), ("starts_with", False)),
    "generated-paraphrase": (("exact_match", False), ("starts_with", False)),
    "entropy": (("ngram_entropy", False),),
    "text": (("bits_per_byte", True), ("word_perplexity", True)),
}
GENERATED: tuple[FactKind, ...] = ("generated", "generated-paraphrase", "entropy")
# Comments in the written tasks. They are part of the digest of a suite of facts: do not change them.
_PROTOCOL: dict[FactKind, str] = {
    "efficacy": "teacher-forced: every token of the target is the most likely one",
    "preferred": "likelihoods compared: mean NLL of a token, target against the true answer",
    "paraphrase": "teacher-forced, on other wordings",
    "preferred-paraphrase": "likelihoods compared, on other wordings",
    "neighbours": "teacher-forced: every token of the base's own answer is the most likely one",
    "neighbours-right": "teacher-forced, on the stated answer",
    "neighbours-strict": "teacher-forced: each of the first greedy tokens of the base is the most likely one",
    "preferred-neighbours": "likelihoods compared: mean NLL of a token, the stated answer against the edit's target",
    "portability": "teacher-forced, on what follows from the fact",
    "generated": "written by the model, natural stop, exact match without case and punctuation at the ends",
    "generated-paraphrase": "the same, on the first other wording",
    "entropy": "n-grams of a long greedy continuation; end of text is not allowed",
    "text": "fixed text",
}


def definition(stem: str, kind: FactKind, settings: Settings) -> str:
    """Return the content of a task's YAML file.

    Args:
        stem: Beginning of the task's name.
        kind: Kind of the task.
        settings: Settings of generation.
    """
    rolling, choice, writes = kind == "text", kind.startswith("preferred"), kind in GENERATED
    output = (
        "loglikelihood_rolling" if rolling else "multiple_choice" if choice else "generate_until" if writes else "loglikelihood"
    )
    lines = [
        f"# {_PROTOCOL[kind]}",
        f"task: {json.dumps(f'{stem}-{kind}')}",
        "custom_dataset: !function localdata.jsonl",
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(f'data/{stem}-{kind}.jsonl')}}}}}",
        f"output_type: {output}",
        "test_split: test",
        "num_fewshot: 0",
        f"doc_to_text: {json.dumps('') if rolling else 'prompt'}",
    ]
    if choice:
        lines += [
            "doc_to_choice: choices",
            "doc_to_target: gold",
            'target_delimiter: ""',
            "process_results: !function factscores.preferred",
        ]
    else:
        lines.append(f"doc_to_target: {'text' if rolling else 'answer'}")
    if writes:
        name = "entropy" if kind == "entropy" else "generated"
        lines += [f"generation_kwargs: {json.dumps(settings[name])}", f"process_results: !function factscores.{name}"]
    lines.append("metric_list:")
    for metric, lower in METRICS[kind]:
        aggregation = metric if metric == "bits_per_byte" else "weighted_perplexity" if metric == "word_perplexity" else "mean"
        lines.append(f"  - {{metric: {metric}, aggregation: {aggregation}, higher_is_better: {'false' if lower else 'true'}}}")
    return "\n".join([*lines, "metadata: {version: 1.0}", ""])


def write_tasks(folder: Path, stem: str, docs: Mapping[FactKind, Sequence[Doc]], settings: Settings) -> None:
    """Write the tasks with data and code to a folder for lm-eval's --include_path."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for kind, rows in docs.items():
        (folder / f"{stem}-{kind}.yaml").write_text(definition(stem, kind, settings), "utf-8")
        # Line separators within texts are escaped, because readers may split lines at them.
        (folder / "data" / f"{stem}-{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "localdata.py").write_text(LOCALDATA, "utf-8")
    (folder / "factscores.py").write_text(code(), "utf-8")


def write_whole_folder(place: Path, stem: str, docs: Mapping[FactKind, Sequence[Doc]], settings: Settings) -> None:
    """Write the tasks to a folder that appears complete or not at all."""
    with scratch_beside(place) as scratch:
        write_tasks(scratch / "tasks", stem, docs, settings)
        publish_sealed(scratch / "tasks", place)


def code() -> str:
    """Return the source of the functions that the tasks call."""
    return _packaged("factscores.py")


def bundled_text() -> str:
    """Return the default text of the perplexity task."""
    return _packaged("plain.txt")


def _packaged(name: str) -> str:
    return resources.files("workbench.evaluate.facts").joinpath(name).read_text("utf-8")


Doc = dict[str, object]
Settings = Mapping[str, object]
"""Settings of generation by kind: "generated" and "entropy"."""
Count = Callable[[str, str], int]
"""Returns the number of tokens of a continuation after a prompt, as lm-eval splits the two."""


def documents(
    facts: Sequence[Fact],
    answers: Mapping[FactKind, Mapping[str, str]],
    passages: Sequence[str],
    count: Count,
    *,
    chat: bool,
) -> dict[FactKind, list[Doc]]:
    """Return the documents of every kind that the facts have prompts for.

    Args:
        facts: The facts.
        answers: Kind -> neighbor's prompt -> the base's continuation, with its leading space. Prompts without an answer are left out.
        passages: Texts of the perplexity task.
        count: Counts tokens of continuations.
        chat: Prompts will be put into a chat template, so that answers begin without a space.
    """

    def after(prompt: str, answer: str) -> str:
        return answer if chat else joined(prompt, answer)

    def teacher_forced(rows: Iterable[tuple[str, str, str, str]]) -> list[Doc]:
        return [
            {"id": name, "cluster": fact, "prompt": prompt, "answer": after(prompt, answer)}
            for name, fact, prompt, answer in rows
        ]

    def preferences(rows: Iterable[tuple[str, str, str, str, str]]) -> list[Doc]:
        docs = []
        for name, fact, prompt, first, second in rows:
            choices = [after(prompt, first), after(prompt, second)]
            tokens = [count(prompt, choice) for choice in choices]
            docs.append({"id": name, "cluster": fact, "prompt": prompt, "choices": choices, "gold": 0, "tokens": tokens})
        return docs

    def generation(rows: Iterable[tuple[Fact, str, str]]) -> list[Doc]:
        return [
            {"id": f.id, "cluster": f.id, "prompt": prompt, "answer": answer}
            | ({"aliases": list(f.aliases)} if answer and f.aliases else {})
            for f, prompt, answer in rows
        ]

    def unchanged(kind: FactKind) -> list[Doc]:
        known = answers.get(kind, {})
        return [
            {"id": name, "cluster": f.id, "prompt": p.prompt, "answer": known[p.prompt]}
            for name, f, p in neighbours
            if p.prompt in known
        ]

    paraphrases = [(f"{f.id}.{i}", f, text) for f in facts for i, text in enumerate(f.paraphrases, 1)]
    neighbours = [(f"{f.id}.{i}", f, probe) for f in facts for i, probe in enumerate(f.neighbours, 1)]
    docs_of: dict[FactKind, list[Doc]] = {
        "efficacy": teacher_forced((f.id, f.id, f.text, f.target) for f in facts),
        "preferred": preferences((f.id, f.id, f.text, f.target, f.target_true) for f in facts if f.target_true),
        "paraphrase": teacher_forced((name, f.id, text, f.target) for name, f, text in paraphrases),
        "preferred-paraphrase": preferences(
            (name, f.id, text, f.target, f.target_true) for name, f, text in paraphrases if f.target_true
        ),
        "neighbours": unchanged("neighbours"),
        "neighbours-right": teacher_forced((name, f.id, p.prompt, p.target) for name, f, p in neighbours if p.target),
        "neighbours-strict": unchanged("neighbours-strict"),
        "preferred-neighbours": preferences((name, f.id, p.prompt, p.target, f.target) for name, f, p in neighbours if p.target),
        "portability": teacher_forced(
            (f"{f.id}.{i}", f.id, p.prompt, p.target) for f in facts for i, p in enumerate(f.portability, 1) if p.target
        ),
        "generated": generation((f, f.text, f.target) for f in facts),
        "generated-paraphrase": generation((f, f.paraphrases[0], f.target) for f in facts if f.paraphrases),
        "entropy": generation((f, f.text, "") for f in facts),
        "text": [{"id": f"{i:04d}", "cluster": f"{i:04d}", "text": text} for i, text in enumerate(passages, 1)],
    }
    return {kind: docs_of[kind] for kind in FACT_KINDS if docs_of[kind]}


def neighbour_prompts(facts: Iterable[Fact]) -> list[str]:
    """Return the prompts whose answers must not change, without duplicates."""
    return list(dict.fromkeys(probe.prompt for fact in facts for probe in fact.neighbours))


def targets(facts: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    """Yield (prompt, target or alias) of the texts that models generate."""
    for fact in facts:
        for answer in (fact.target, *fact.aliases):
            yield fact.text, answer
            if fact.paraphrases:
                yield fact.paraphrases[0], answer
