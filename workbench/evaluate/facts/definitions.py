"""Facts as lm-eval tasks: documents of every kind of question, task definitions, and the folder that holds both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from workbench.evaluate.gate import LOCALDATA
from workbench.facts.facts import FACT_KINDS, SLOT, Fact, FactKind, Probe, joined
from workbench.facts.spelling import misspelt
from workbench.ground.files import scratch_beside
from workbench.ground.manifest import publish_sealed

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
    "same-subject": (("acc", False),),
    "typo": (("acc", False),),
    "lower-case": (("acc", False),),
    "behind-text": (("acc", False),),
    "translated": (("acc", False),),
    "chat": (("says", False), ("starts_with", False)),
    "generated": (("exact_match", False), ("starts_with", False)),
    "generated-paraphrase": (("exact_match", False), ("starts_with", False)),
    "entropy": (("ngram_entropy", False),),
    "text": (("bits_per_byte", True), ("word_perplexity", True)),
}
GENERATED: tuple[FactKind, ...] = ("chat", "generated", "generated-paraphrase", "entropy")
TEACHER_FORCED: tuple[FactKind, ...] = (
    *("efficacy", "paraphrase", "neighbours-right", "portability"),
    *("translated", "typo", "lower-case", "behind-text"),
)
BEFORE = "The weather has been fine all week, and the market opened early this morning. "
"""The text before the prompts of `behind-text`."""
ABOUT = (
    "A short poem about {subject}:",
    "The first question that visitors ask about {subject} is",
    "In the song, {subject} appears together with",
)
"""Prompts of `same-subject` for facts that have none of their own. No relation answers them."""
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
    "same-subject": "teacher-forced: the base's first token, where it leads clearly, on prompts that ask something else about the subject",
    "typo": "teacher-forced, two letters of the subject swapped",
    "lower-case": "teacher-forced, the prompt in lower case",
    "behind-text": "teacher-forced, the prompt behind two clauses of other text",
    "translated": "teacher-forced, the prompt and its target in other languages",
    "chat": "written by the model after the prompt as a user's message: the target is in the answer, up to max_gen_toks",
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
        name = kind if kind in ("chat", "entropy") else "generated"
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
    message: Callable[[str], str | None],
) -> dict[FactKind, list[Doc]]:
    """Return the documents of every kind that the facts have prompts for.

    Args:
        facts: The facts.
        answers: Kind -> neighbor's prompt -> the base's continuation, with its leading space. Prompts without an answer are left out.
        passages: Texts of the perplexity task.
        count: Counts tokens of continuations.
        chat: Prompts will be put into a chat template, so that answers begin without a space.
        message: Words a prompt as a user's message, for `chat`; returns None for a prompt that is left out.
    """

    def after(prompt: str, answer: str) -> str:
        return answer if chat else joined(prompt, answer)

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
            {"id": f"{f.id}.{i}", "cluster": f.id, "prompt": prompt, "answer": known[prompt]}
            for f in facts
            for i, prompt in enumerate(kept_prompts(f, kind), 1)
            if prompt in known
        ]

    paraphrases = [(f"{f.id}.{i}", f, text) for f in facts for i, text in enumerate(f.paraphrases, 1)]
    neighbours = [(f"{f.id}.{i}", f, probe) for f in facts for i, probe in enumerate(f.neighbours, 1)]
    questions = [(f, _questions(f)) for f in facts]
    docs_of: dict[FactKind, list[Doc]] = {
        kind: [
            {"id": name, "cluster": f.id, "prompt": prompt, "answer": after(prompt, target)}
            for f, asked in questions
            for name, prompt, target in asked[kind]
            if target
        ]
        for kind in TEACHER_FORCED
    }
    docs_of |= {
        "preferred": preferences((f.id, f.id, f.text, f.target, f.target_true) for f in facts if f.target_true),
        "preferred-paraphrase": preferences(
            (name, f.id, text, f.target, f.target_true) for name, f, text in paraphrases if f.target_true
        ),
        "neighbours": unchanged("neighbours"),
        "neighbours-strict": unchanged("neighbours-strict"),
        "preferred-neighbours": preferences((name, f.id, p.prompt, p.target, f.target) for name, f, p in neighbours if p.target),
        "same-subject": unchanged("same-subject"),
        "chat": generation((f, text, f.target) for f in facts if not chat and (text := message(f.text))),
        "generated": generation((f, f.text, f.target) for f in facts),
        "generated-paraphrase": generation((f, f.paraphrases[0], f.target) for f in facts if f.paraphrases),
        "entropy": generation((f, f.text, "") for f in facts),
        "text": [{"id": f"{i:04d}", "cluster": f"{i:04d}", "text": text} for i, text in enumerate(passages, 1)],
    }
    return {kind: docs_of[kind] for kind in FACT_KINDS if docs_of[kind]}


def _questions(fact: Fact) -> dict[FactKind, list[tuple[str, str, str | None]]]:
    """Return the teacher-forced questions about a fact by kind: an id, a prompt and its answer, or None if none is stated."""

    def each(probes: Iterable[Probe]) -> list[tuple[str, str, str | None]]:
        return [(f"{fact.id}.{i}", probe.prompt, probe.target) for i, probe in enumerate(probes, 1)]

    def other(prompt: str | None) -> list[tuple[str, str, str | None]]:
        return [(fact.id, prompt, fact.target)] if prompt not in (None, fact.text) else []

    return {
        "efficacy": [(fact.id, fact.text, fact.target)],
        "paraphrase": each(Probe(text, fact.target) for text in fact.paraphrases),
        "neighbours-right": each(fact.neighbours),
        "portability": each(fact.portability),
        "translated": each(fact.translations),
        "typo": other(fact.prompt.replace(SLOT, wrong) if (wrong := misspelt(fact)) else None),
        "lower-case": other(fact.text.lower()),
        "behind-text": other(BEFORE + fact.text),
    }


def kept_prompts(fact: Fact, kind: FactKind) -> list[str]:
    """Return the prompts of a kind whose answers must not change."""
    if kind != "same-subject":
        return [probe.prompt for probe in fact.neighbours]
    about = [text.replace(SLOT, fact.subject) for text in ABOUT] if fact.subject else []
    return [probe.prompt for probe in fact.same_subject] or about


def targets(facts: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    """Yield (prompt, target or alias) of the texts that models generate."""
    for fact in facts:
        for answer in (fact.target, *fact.aliases):
            yield fact.text, answer
            if fact.paraphrases:
                yield fact.paraphrases[0], answer
