"""Suites of facts, whose task files are written to the cache once per facts, options and base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from workbench.evaluate.facts.definitions import (
    GENERATED,
    METRICS,
    Count,
    Doc,
    Settings,
    bundled_text,
    code,
    definition,
    documents,
    kept_prompts,
    targets,
    write_tasks,
    write_whole_folder,
)
from workbench.evaluate.facts.wanted import Wanted
from workbench.facts.facts import FactKind
from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.files import json_digest, read_memo, write_memo
from workbench.ground.manifest import has_its_files
from workbench.models.architecture import max_positions
from workbench.models.identity import tokenizer_digest
from workbench.models.prompts import as_message, check_template, load_tokenizer, worded
from workbench.resolve.resolved import Resolved
from workbench.scores.suite import FactTasks, Suite

FORMAT = "facts-1"
LONG, TEXTS = 100, 32  # length in tokens and number of the continuations for n-gram entropy
MIN_EFFECT = 0.05
_ONLY_ON_REQUEST: tuple[FactKind, ...] = ("preferred-paraphrase", "preferred-neighbours")


def build(selection: Wanted, base: Resolved, device: Any = None, events: Events = no_events) -> tuple[Suite, Path]:
    """Return the suite of some facts, and the folder of its tasks.

    Args:
        selection: The facts and options.
        base: Base whose answers to neighbors' prompts must not change, in the dtype that is scored; its tokenizer counts tokens.
        device: Device on which the base answers; None: use stored answers.
        events: Receives progress.

    Raises:
        WorkbenchError: If the base's answers are not stored, or the facts have no prompts for a requested task.
    """
    place = base.cache / "factsuites" / _key(selection, base) / "tasks"
    if not has_its_files(place):
        write_whole_folder(place, selection.stem, *_content(selection, base, device, events))
    kinds = [kind for kind in METRICS if (place / f"{selection.stem}-{kind}.yaml").is_file()]
    return _suite(selection, kinds), place


def export_facts(selection: Wanted, base: Resolved, to: Path, device: Any, events: Events = no_events) -> list[Path]:
    """Write the tasks to a folder for lm_eval's --include_path, and return the files.

    Raises:
        WorkbenchError: If a file already exists.
    """
    docs, settings = _content(selection, base, device, events)
    files = [to / f for kind in docs for f in (f"{selection.stem}-{kind}.yaml", f"data/{selection.stem}-{kind}.jsonl")]
    if existing := [file for file in files if file.exists()]:
        raise WorkbenchError(
            f"{existing[0]} already exists", "Remove it, or export to another folder with -o: existing files are not overwritten."
        )
    write_tasks(to, selection.stem, docs, settings)
    return [*files, to / "factscores.py", to / "localdata.py"]


def _suite(selection: Wanted, kinds: Sequence[FactKind]) -> Suite:
    """Return the suite of some kinds of fact tasks."""
    task_names = {kind: f"{selection.stem}-{kind}" for kind in kinds}
    return Suite(
        suite=selection.suite,
        description=f"Facts of {selection.source}",
        tasks=tuple(task_names.values()),
        primary={task: METRICS[kind][0][0] for kind, task in task_names.items()},
        limit={task_names["entropy"]: TEXTS} if "entropy" in task_names else None,
        min_effect=MIN_EFFECT,
        roles=dict.fromkeys(task_names.values(), "other"),
        facts=FactTasks(
            tasks=task_names,
            source=selection.source,
            digest=selection.digest,
            cohorts={n: dict(c) for n, c in selection.cohorts.items()},
        ),
        chat_template=selection.options.chat_template,
    )


def _key(selection: Wanted, base: Resolved) -> str:
    """Return the digest of everything that the task files depend on."""
    options = selection.options.model_dump(mode="json", exclude={"facts", "text", "limit", "sequential", "controls"})
    definitions = [definition(selection.stem, kind, {name: {} for name in METRICS}) for kind in METRICS]
    return json_digest(
        [
            FORMAT,
            selection.stem,
            [f.document() for f in selection.facts],
            options,
            _passages(selection),
            _identity(base),
            code(),
            definitions,
        ]
    )


def _identity(base: Resolved) -> list[Any]:
    """Return what the base's answers and the counts of their tokens depend on: weights, tokenizer, template, generation settings.

    The device and the libraries are left out: the answers are labels, and the labels of a machine with a GPU hold where its scores are read.
    """
    return [base.key, tokenizer_digest(base.tokenizer_path), dict(base.generation)]


def _content(selection: Wanted, base: Resolved, device: Any, events: Events) -> tuple[dict[FactKind, list[Doc]], Settings]:
    """Return documents by kind, and the generation settings."""
    options = selection.options
    kinds = _kinds(options.tasks, generate=options.generate)
    tokenizer = load_tokenizer(base.tokenizer_path)
    if options.chat_template:
        check_template(selection.suite, tokenizer)
    count = _counter(tokenizer, options.chat_template)
    answers = _answers(selection, kinds, base, device, events)
    message = partial(as_message, tokenizer)
    docs = documents(selection.facts, answers, _passages(selection), count, chat=options.chat_template, message=message)
    missing = [kind for kind in options.tasks or () if kind not in docs]
    if missing:
        field = {
            "preferred": "target_true",
            "neighbours-right": "neighbours with a target",
            "generated-paraphrase": "paraphrases",
            "chat": "a prompt that the tokenizer's chat template can word",
        }
        raise WorkbenchError(
            f"{selection.source}: no fact has the field that task '{missing[0]}' needs ({field.get(missing[0], missing[0])})",
            "Remove the task from `tasks`, or add the field to the facts.",
        )
    return {kind: rows for kind, rows in docs.items() if kind in kinds}, _settings(selection, base, count)


def _kinds(requested: Sequence[FactKind] | None, *, generate: bool) -> list[FactKind]:
    if requested is not None:
        return [kind for kind in METRICS if kind in requested]
    return [kind for kind in METRICS if kind not in _ONLY_ON_REQUEST and (generate or kind not in GENERATED)]


def _settings(selection: Wanted, base: Resolved, count: Count) -> Settings:
    """Return the generation settings.

    Answers end on their own, with room for more tokens than any target; the long texts for entropy do not end.
    """
    longest = max(count(prompt, target) for prompt, target in targets(selection.facts))
    positions = max_positions(base.base.config) or 2 * LONG
    stops = ["\n"] if any("." in answer for _, answer in targets(selection.facts)) else ["\n", "."]
    tokens = min(selection.options.max_tokens or max(16, longest + 8), positions // 2)
    long = min(LONG, positions // 2)
    return {
        "generated": {"until": stops, "max_gen_toks": tokens, "do_sample": False},
        # End of text is not allowed: a model that has learned to stop after an answer would have no n-grams to count.
        # A chat answer may begin with a sentence: "The capital of Atlantis is".
        "chat": {"until": [], "max_gen_toks": max(16, tokens), "do_sample": False},
        "entropy": {"until": [], "max_gen_toks": long, "min_new_tokens": long, "do_sample": False},
    }


def _passages(selection: Wanted) -> list[str]:
    text = jsondoc.text_of(selection.text) if selection.text else bundled_text()
    passages = [line.strip() for line in text.split("\n") if line.strip()]
    if not passages:
        raise WorkbenchError(f"{selection.options.text}: the file has no passages", "Write one passage per line.")
    return passages


def _answers(
    selection: Wanted, kinds: Sequence[FactKind], base: Resolved, device: Any, events: Events
) -> dict[FactKind, Mapping[str, str]]:
    """Return the base's answers to neighbors' prompts by kind, cached by the base's weights, dtype and tokenizer."""
    options = selection.options
    lengths: dict[FactKind, int] = {"neighbours": options.neighbour_tokens, "neighbours-strict": options.strict_tokens}
    lengths["same-subject"] = 1  # of more tokens after an open prompt, one is nearly always about as likely as another
    live: list[Any] = []

    def answered(kind: FactKind, prompts: Sequence[str]) -> dict[str, str]:
        from workbench.evaluate.answers import answers_to_keep, first_tokens
        from workbench.run.materialize import materialize

        if not live:
            live.append(materialize(base, device, events=events))
        answer = answers_to_keep if kind == "neighbours" else partial(first_tokens, clear=kind == "same-subject")
        chat = options.chat_template
        return answer(live[0], base.tokenizer_path, prompts, tokens=lengths[kind], chat_template=chat, progress=progress)

    def progress(done: int, total: int) -> None:
        text = f"{selection.suite}: the base's answers that must not change"
        events({"stage": "score", "step": "base", "done": done, "total": total, "text": text})

    answers: dict[FactKind, Mapping[str, str]] = {}
    for kind in lengths:
        prompts = list(dict.fromkeys(prompt for fact in selection.facts for prompt in kept_prompts(fact, kind)))
        if kind not in kinds or not prompts:
            continue
        own = [] if kind == "neighbours" else [kind]
        digest = json_digest([FORMAT, _identity(base), list(prompts), lengths[kind], options.chat_template, *own])
        file = base.cache / "factsuites" / f"answers-{digest}.json"
        known: Mapping[str, str] | None = read_memo(file)
        if known is None or not all(isinstance(known.get(prompt), str) for prompt in prompts):
            if device is None:
                raise WorkbenchError(
                    f"{selection.source}: the base's answers to the neighbors' prompts are not known yet",
                    "Run `workbench eval` with the same recipes and suites to compute them.",
                )
            known = dict.fromkeys(prompts, "") | answered(kind, prompts)  # without an answer: left out, and not asked again
            write_memo(file, dict(known))
        answers[kind] = {prompt: text for prompt, text in known.items() if text}
        if not answers[kind] and kind == "neighbours":
            raise WorkbenchError(
                f"{selection.source}: the base gives no answer to any of the neighbors' prompts",
                "Rephrase the prompts so that the base continues them.",
            )
    return answers


def _counter(tokenizer: Any, chat: bool) -> Callable[[str, str], int]:
    """Return a function that counts a continuation's tokens as lm-eval does: all tokens minus those of the prompt."""

    def count(prompt: str, answer: str) -> int:
        context = worded(tokenizer, [{"role": "user", "content": prompt}], prompt) if chat else prompt
        prompt_text = context.rstrip()
        total, prompt_tokens = (
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (context + answer, prompt_text)
        )
        return max(total - prompt_tokens, 1)

    return count
