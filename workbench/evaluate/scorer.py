"""Score one configuration under one plan, task by task."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.evaluate.backends import failures, written_model
from workbench.evaluate.check import alike, can_be_short, checked, in_float32
from workbench.evaluate.greedy import Prompt, Writer, batches, compare, is_greedy, prompt_of
from workbench.evaluate.hflm import SafeHFLM, recalled, without_recall
from workbench.evaluate.measured import AnswerClock, PeakMemory, measured, quiet, seeded, texts_of, token_count
from workbench.evaluate.packed import Answer, Forward, PackedLayout, Pair, answered, bounds_of, lay_out, start_for
from workbench.evaluate.requests import Requests, by_item, prepared, rows_of
from workbench.evaluate.routed import RoutedGroup, acting, labels, refuse_calibrated, routed_groups
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Progress
from workbench.models.prompts import load_tokenizer
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Check, Configuration, Journal, ScoreStore, TaskResult


class Scorer:
    """Scores a configuration task by task.

    The weights and mode of a live model, the caller's tokenizer and the random state are restored.

    Args:
        plan: The plan, with scorer and backend.
        configuration: Configuration that the model holds.
        model: The live model in the plan's dtype; for the backends vllm and server a `backends.WrittenCheckpoint`.
        device: Device to move a live model to.
        tasks: Tasks that will be scored; the others are not checked. Default: all tasks.

    Raises:
        WorkbenchError: If the model has another dtype than the plan, or a router that was fitted on prompts of the plan.
    """

    def __init__(
        self,
        plan: ScorePlan,
        configuration: Configuration,
        model: Any,
        device: str | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self.plan, self.configuration, self.model = plan, configuration, model
        self.tasks = list(tasks if tasks is not None else plan.suite.tasks)
        self.forward: Forward | None = None
        if plan.suite.backend != "hf":
            with quiet():
                self.lm = written_model(plan, model)
                self.requests = prepared(plan, self.lm)
            return
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype != plan.dtype:
            raise WorkbenchError(
                f"configuration '{configuration.name}' has dtype {dtype}, but the plan scores {plan.dtype}",
                "Cast the model to the output dtype before scoring.",
            )
        if device:
            model.to(device)
        training = model.training
        with quiet():
            self.lm = SafeHFLM(model, tokenizer=_tokenizer(plan.tokenizer), batch_size=plan.batch_size)
            self.requests = prepared(plan, self.lm)
        model.train(training)
        for name in self.tasks:
            self._check_calibration(self.requests[name])
        if plan.scorer in ("packed", "prefix"):
            self.forward = Forward(model)

    def sizes(self) -> dict[str, int]:
        """Return the number of answers that each task needs: pairs to score and texts to generate."""
        texts = {name: len(requests.generated) for name, requests in self.requests.items()}
        return {
            n: (len(requests.pairs) or len(requests.instances) - texts[n]) + texts[n] for n, requests in self.requests.items()
        }

    def check(self, store: ScoreStore | None = None) -> Check | None:
        """Compare the scorer with hflm; return None if it is hflm.

        Args:
            store: Store that remembers whole checks. The check of a model that differs from a checked one in its weights alone is short.

        Raises:
            check.RefusedError: If they disagree.
        """
        tasks = [self.requests[name] for name in self.tasks]
        if self.forward is None or not (any(task.pairs for task in tasks) or self._texts_to_check(tasks)):
            return None
        key = alike(self.model, self.plan.tokenizer_digest, self.plan.suite.tasks)
        with self._scoring():
            if not can_be_short(self.model):
                return self._compared(tasks)
            before = store.passed(self.plan, key) if store else None
            with in_float32(self.model):
                found = self._compared(tasks, short=before is not None)
            if before:
                self.forward.forget()
                return found.model_copy(update={"whole": before})
            if self.plan.dtype != "float32":
                found = found.model_copy(update={"spread": self._compared(tasks, short=True).spread})
        if store and len(self.tasks) == len(self.plan.suite.tasks):  # the rest of an interrupted evaluation is no whole check
            store.keep_passed(self.plan, key, self.configuration.name)
        return found

    def _compared(self, tasks: Sequence[Requests], *, short: bool = False) -> Check:
        """Compare the scorer with hflm on some documents, group by group of what the model's router chooses."""
        assert self.forward is not None
        checks = []
        paired = [task for task in tasks if task.pairs]
        for group, pairs in _by_group(self.model, paired) if paired else ():
            with acting(self.model, group):
                self.forward.forget()
                checks.append(checked(self.lm, self.forward, pairs, self.plan.scorer, short=short))
        self.forward.forget()
        texts = self._texts_to_check(tasks) if str(self.model.dtype) == "torch.float32" else []
        written = compare(self.lm, self.forward, texts, short=short) if texts else 0
        equal = Check(scorer=self.plan.scorer, documents=0, max_difference=0.0, tolerance=1e-4)
        worst = max(checks, key=lambda check: check.max_difference / max(check.tolerance, 1e-12), default=equal)
        return worst.model_copy(update={"documents": written + sum(check.documents for check in checks)})

    def _texts_to_check(self, tasks: Sequence[Requests]) -> list[dict[int, Prompt]]:
        """Return the prompts of each task whose texts are written here and not by hflm; a router's bricks act in both alike."""
        if getattr(self.model, "routing", None) is not None:
            return []
        found = [self._greedy(task, members) for task in tasks for members in self._alike(task, task.generated)]
        return [prompts for prompts in found if prompts]

    def _check_calibration(self, requests: Requests) -> None:
        """Raise WorkbenchError if the model's router was fitted on a prompt of a task."""
        calibration = getattr(getattr(self.model, "routing", None), "calibration", {})
        refuse_calibrated(self.plan, requests.name, requests.task, calibration, self.configuration.name)

    def task(self, name: str, journal: Journal | None = None, progress: Progress | None = None) -> TaskResult:
        """Score one task.

        Args:
            name: Name of the task.
            journal: Answers of an interrupted evaluation; new answers are added to it.
            progress: Called with (task, requests done, requests in total).

        Raises:
            WorkbenchError: If log-likelihoods or logits are not finite, or a server fails.
        """
        requests, start = self.requests[name], time.perf_counter()
        memory, clock = PeakMemory(self.lm.device if self.plan.suite.backend == "hf" else None), AnswerClock()
        resumes = journal is not None and bool(journal.done)
        answers: dict[int, Any] = {}
        texts: list[str] = []
        layouts: dict[int, PackedLayout] = {}
        answered_by: dict[int, list[str]] = {}
        try:
            with self._scoring(), seeded():
                if requests.pairs:
                    groups = routed_groups(self.model, requests.routed_contexts())
                    answered_by = labels(groups, requests, requests.owners)
                    layouts = {i: self._layout(requests, g) for i, g in enumerate(groups) if self.forward is not None}
                    resumed = KeptRows(journal, 0, len(requests.pairs))
                    with_facts = recalled(self.model, requests.pairs)
                    done = {**resumed.answers, **with_facts}  # skip batches that consist of such pairs only
                    work = self._pairs(requests, groups, layouts, done)
                    pair_answers = resumed.collect(work, progress, name) | self._recalled(with_facts)
                    answers |= requests.likelihoods(pair_answers)
                elif len(requests.generated) < len(requests.instances):
                    answers |= self._backend_likelihoods(requests)
                if requests.generated:
                    # Sampled texts depend on all samples before them, so such a task is not resumed.
                    resumed = KeptRows(None if requests.drawn else journal, len(requests.pairs), len(requests.instances))
                    groups = self._generating(requests)
                    answered_by |= labels(groups, requests)
                    written = resumed.collect(clock.timed(self._generate(requests, groups, resumed.answers)), progress, name)
                    texts = texts_of(written)
                    answers |= written
            rows, items = rows_of(self.plan, requests, answers)
            for row, number in zip(rows, by_item(requests.instances), strict=True):
                if number in answered_by:
                    row["routed"] = answered_by[number]
        except FloatingPointError:
            raise self._not_finite(name, "NaN logits while generating") from None
        except ArithmeticError as error:
            raise self._not_finite(name, str(error)) from None
        except failures(self.plan.suite.backend) as error:
            raise WorkbenchError(
                f"task '{name}': the server gave no valid answer to a request: {type(error).__name__}: {str(error)[:200]}",
                "Check the server's log. For tasks with choices it must support /v1/completions with echo and logprobs.",
            ) from error
        seconds = round(time.perf_counter() - start, 3)
        of_model = self.plan.suite.backend == "hf"  # else the model is in another process
        tokenizer = (self.lm.tokenizer if of_model else _tokenizer(self.plan.tokenizer)) if texts else None
        return {
            "rows": rows,
            "items": items,
            "seconds": seconds,
            "answers": len(texts) or None,
            "answer_tokens": token_count(tokenizer, texts) if texts else None,
            "measured": measured(tokenizer, clock, memory, resumes).model_dump(),
            "device": getattr(getattr(self.lm, "device", None), "type", self.plan.suite.backend),
            "scorer": self.plan.scorer if requests.pairs or self.plan.suite.backend != "hf" else "generate",
            "tokens": (
                sum(layout.tokens for layout in layouts.values()) or sum(len(c) + len(a) - 1 for c, a in requests.pairs) or None
            ),
        }

    def _layout(self, requests: Requests, group: RoutedGroup | None = None) -> PackedLayout:
        """Return the layout of a group's pairs, numbered within the group; that of all pairs is kept for other configurations."""
        routed = group is not None and group.weights is not None
        bounds = bounds_of(self.lm)
        key = (self.plan.scorer, bounds)
        if not routed and key in requests.layouts:
            return requests.layouts[key]
        pairs = [requests.pairs[i] for i in group.members] if group is not None else requests.pairs
        layout = lay_out(pairs, bounds, start_for(self.plan.scorer, pairs, bounds))
        if not routed:
            requests.layouts[key] = layout
        return layout

    def _pairs(
        self, requests: Requests, groups: Sequence[RoutedGroup], layouts: Mapping[int, PackedLayout], done: Mapping[int, Any]
    ) -> Iterator[dict[int, Answer]]:
        """Yield the answers of all batches, group by group, with the group's bricks acting."""
        for i, group in enumerate(groups):
            work = self._packed(layouts[i], group, done) if i in layouts else self._hflm(requests, group, done)
            with acting(self.model, group):
                yield from work

    def _packed(self, layout: PackedLayout, group: RoutedGroup, done: Mapping[int, Any]) -> Iterator[dict[int, Answer]]:
        assert self.forward is not None
        self.forward.forget()  # keys and values of a prefix are those of the bricks that acted
        for prefix, rows in layout.batches():
            if not all(group.members[pair] in done for row in rows for pair, *_ in row.answers):
                yield {group.members[pair]: answer for pair, answer in self.forward.batch(prefix, rows).items()}

    def _recalled(self, with_facts: Mapping[int, Pair]) -> dict[int, Answer]:
        """Return answers to pairs with facts from a text memory, in separate batches, so that the others do not change."""
        pairs = list(with_facts.values())
        return dict(zip(with_facts, answered(self.lm, self.forward, pairs, "packed") if pairs else (), strict=True))

    def _hflm(self, requests: Requests, group: RoutedGroup, done: Mapping[int, Any]) -> Iterator[dict[int, Answer]]:
        """Yield the answers of lm-eval's batches one by one, in its order."""
        tokens = {i: requests.pairs[i][0] + requests.pairs[i][1] for i in group.members}
        order = sorted(group.members, key=lambda i: (-len(tokens[i]), tokens[i]))
        for chunk in _chunks(order, self.plan.batch_size):
            if not all(pair in done for pair in chunk):
                yield dict(zip(chunk, self.lm.referee([requests.pairs[i] for i in chunk]), strict=True))

    def _generating(self, requests: Requests) -> list[RoutedGroup]:
        """Return the requests that generate text, by the bricks that answer them."""
        if self.plan.suite.backend != "hf" or getattr(self.model, "routing", None) is None:
            return [RoutedGroup(tuple(requests.generated))]
        prompts = {}
        for i in requests.generated:  # tokens as lm-eval passes them to `generate`, without padding
            context, settings = requests.instances[i].args
            room = self.lm.max_length - int(settings.get("max_gen_toks", self.lm.max_gen_toks))
            ids, mask = self.lm.tok_batch_encode([context], left_truncate_len=room, truncation=self.lm.truncation)
            prompts[i] = ids[0][mask[0].bool()].tolist()
        return routed_groups(self.model, prompts)

    def _generate(self, requests: Requests, groups: Sequence[RoutedGroup], done: Mapping[int, Any]) -> Iterator[dict[int, Any]]:
        """Yield the texts of lm-eval's batches one by one, in its order: prompts of equal length are together."""
        if self.plan.suite.backend != "hf":
            yield self._texts(requests, requests.generated)
            return
        lengths = {i: len(self.lm.tok_encode(requests.instances[i].args[0])) for i in requests.generated}
        for group in groups:
            with acting(self.model, group):
                for members in self._alike(requests, group.members):
                    order = sorted(members, key=lambda i: (-lengths[i], requests.instances[i].args[0]))
                    if prompts := self._greedy(requests, order):
                        yield from self._write(prompts, done)
                        continue
                    for chunk in _chunks(order, self.plan.batch_size):
                        if not all(request in done for request in chunk):
                            yield self._texts(requests, chunk)

    def _alike(self, requests: Requests, members: Sequence[int]) -> list[list[int]]:
        """Return requests by their settings."""
        found: dict[str, list[int]] = {}
        for i in members:
            found.setdefault(str(requests.instances[i].args[1]), []).append(i)
        return list(found.values())

    def _greedy(self, requests: Requests, members: Sequence[int]) -> dict[int, Prompt]:
        """Return the prompts of requests of the same settings if their texts need no generation by HFLM, else none."""
        if self.forward is None or any((requests.instances[i].repeats or 1) > 1 for i in members):
            return {}
        if not is_greedy(self.lm, requests.instances[members[0]].args[1]):
            return {}
        prompts = {i: prompt_of(self.lm, *requests.instances[i].args) for i in members}
        fit = all(prompt.tokens and prompt.most < self.lm.max_length for prompt in prompts.values())
        return prompts if fit else {}

    def _write(self, prompts: Mapping[int, Prompt], done: Mapping[int, Any]) -> Iterator[dict[int, str]]:
        assert self.forward is not None
        self.forward.forget()
        writer = Writer(self.lm, self.forward)
        for shared, batch in batches(self.lm, prompts):
            if not all(request in done for request in batch):
                yield dict(zip(batch, writer.write(shared, [prompts[i] for i in batch]), strict=True))

    def _texts(self, requests: Requests, chunk: Sequence[int]) -> dict[int, Any]:
        """Return the texts of some requests; a list each if the task asks for repeats."""
        repeated = [i for i in chunk for _ in range(requests.instances[i].repeats or 1)]
        by_request: dict[int, list[str]] = {}
        for i, text in zip(repeated, self.lm.generate_until([requests.instances[i] for i in repeated]), strict=True):
            by_request.setdefault(i, []).append(text)
        return {i: texts if len(texts) > 1 else texts[0] for i, texts in by_request.items()}

    def _backend_likelihoods(self, requests: Requests) -> dict[int, Any]:
        """Return log-likelihoods from a backend that tokenizes itself."""
        by_request: dict[int, Any] = {}
        for kind in dict.fromkeys(i.request_type for i in requests.instances if i.request_type != "generate_until"):
            members = [i for i, instance in enumerate(requests.instances) if instance.request_type == kind]
            by_request |= dict(zip(members, getattr(self.lm, kind)([requests.instances[i] for i in members]), strict=True))
        return by_request

    def _scoring(self) -> Any:
        return _evaluating(self.model if self.plan.suite.backend == "hf" else None)

    def _not_finite(self, task: str, problem: str) -> WorkbenchError:
        return WorkbenchError(
            f"configuration '{self.configuration.name}', task '{task}': {problem}",
            "The weights contain NaN or overflow. Check for a lambda that is too large or a damaged brick.",
        )


def _by_group(model: Any, tasks: Sequence[Requests]) -> Iterator[tuple[RoutedGroup, list[list[Pair]]]]:
    """Yield the bricks that the model's router chooses, each with the pairs that they answer, by task."""
    places = [(task, i) for task in tasks for i in range(len(task.pairs))]
    contexts = [context for task in tasks for context in task.routed_contexts().values()]
    for group in routed_groups(model, dict(enumerate(contexts))):
        by_task: dict[str, list[Pair]] = {}
        for number in group.members:
            task, i = places[number]
            by_task.setdefault(task.name, []).append(task.pairs[i])
        yield group, list(by_task.values())


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Silence libraries and put the model in evaluation mode within the block."""
    training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        with quiet(), without_recall(model):
            yield
    finally:
        if model is not None:
            model.train(training)


class KeptRows:
    """Answers to `count` pairs or requests, including those of an interrupted evaluation.

    Args:
        journal: The journal; None: nothing is kept.
        first: Number in the journal of the first pair or request.
        count: Number of pairs or requests.
    """

    def __init__(self, journal: Journal | None, first: int, count: int) -> None:
        self.journal, self.first, self.count = journal, first, count
        done = journal.done if journal else {}
        self.answers = {number - first: answer for number, answer in done.items() if first <= number < first + count}

    def collect(self, work: Iterator[dict[int, Any]], progress: Progress | None, name: str) -> dict[int, Any]:
        """Do the remaining work batch by batch, and return all answers."""
        for answers in work:
            self.answers |= answers
            if self.journal:
                self.journal.add({self.first + number: answer for number, answer in answers.items()})
            if progress:
                progress(name, len(self.answers), self.count)
        return self.answers


def _chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    yield from (order[i : i + size] for i in range(0, len(order), size))


def _tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer of the scorer's own, because lm-eval sets a pad token on it."""
    return load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else copy.deepcopy(tokenizer)
