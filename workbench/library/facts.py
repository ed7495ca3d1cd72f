"""`facts check`: conflicts in a facts file, what a model knows already, what other bricks of a recipe teach."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.bricks.brick import Brick
from workbench.bricks.hub import HEADERS
from workbench.bricks.locate import resolve_brick
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.facts import Fact
from workbench.facts.conflicts import Conflict, Status, conflicts, contradictions, duplicates
from workbench.facts.reading import read_all
from workbench.facts.relations import folded
from workbench.models.prompts import encode_pair, encode_text
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.recipe import Recipe, load_recipe
from workbench.resolve.resolved import Resolved
from workbench.run.kinds.edit import FACTS, RECORD
from workbench.run.materialize import materialize
from workbench.steps import EditMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32
# Tokens beyond the target that are generated: they show whether its last word goes on.
_BEYOND = 2


@dataclass(frozen=True)
class FactFinding:
    """Something that the check has to say of a line.

    Attributes:
        place: file:line.
        kind: A `Conflict`'s kind; skipped, id, known, answer, covered, unread.
        status: failed or warning.
        found: What was found.
        repair: What to do about it.
        fact: The fact's id; None where the line is no fact.
        other: Place of the other fact, where there is one.
    """

    place: str
    kind: str
    status: Status
    found: str
    repair: str
    fact: str | None = None
    other: str | None = None


@dataclass(frozen=True)
class FactsReport:
    """What was checked and found.

    Attributes:
        file: The facts file, as it was named.
        format: The project's own ("facts") or a published one.
        facts: How many it holds.
        model: What was asked for its answers; None: no model was.
        findings: In the order of the kinds.
    """

    file: str
    format: str
    facts: int
    model: str | None
    findings: list[FactFinding]

    @property
    def failed(self) -> list[FactFinding]:
        """What fails the check."""
        return [finding for finding in self.findings if finding.status == "failed"]

    def counts(self) -> dict[str, int]:
        """Kind -> findings."""
        return dict(Counter(finding.kind for finding in self.findings))

    def document(self) -> dict[str, Any]:
        """The `facts check --json` document."""
        return {"file": self.file, "format": self.format, "facts": self.facts, "model": self.model, "passed": not self.failed,
                "counts": self.counts(), "findings": [asdict(finding) for finding in self.findings]}  # fmt: skip


def check_facts(
    path: Path, shown: str, *, recipe: Recipe | None = None, model: tuple[str, Resolved] | None = None,
    device: torch.device | None = None, events: Events = no_events,
) -> FactsReport:  # fmt: skip
    """Check a facts file, published or the project's own.

    Args:
        path: The file.
        shown: How places call it.
        recipe: Whose bricks and edit steps are looked at for the same facts.
        model: Name and configuration of the model that is asked which targets it gives already; None: none is.
        device: Where it runs.
        events: Told what happens.

    Errors: a file that cannot be read; a brick of the recipe that is not there.
    """
    read = read_all(path, shown)
    findings = [
        FactFinding(skip.place, "skipped", "warning", skip.reason, "Correct the row, or delete it.") for skip in read.skipped
    ]
    findings += _same_ids(read.facts) if read.format == "facts" else []
    findings += [_finding(conflict) for conflict in conflicts(read.facts)]
    if recipe is not None:
        findings += _of_recipe(read.facts, path, recipe)
    if model is not None:
        findings += _of_model(read.facts, *model, device or torch.device("cpu"), events)
    return FactsReport(shown, read.format, len(read.facts), model[0] if model else None, findings)


def _finding(conflict: Conflict) -> FactFinding:
    return FactFinding(conflict.place, conflict.kind, conflict.status, conflict.what, conflict.repair, conflict.fact.id, conflict.other.place)  # fmt: skip


def _same_ids(facts: Iterable[Fact]) -> Iterator[FactFinding]:
    """Ids that stand for two facts: `read_facts` refuses them."""
    first: dict[str, Fact] = {}
    for fact in facts:
        other = first.setdefault(fact.id, fact)
        if other.text != fact.text:
            yield FactFinding(fact.place, "id", "failed", f"has the id {fact.id!r} of {other.place}", "Give every fact its own id.", fact.id, other.place)  # fmt: skip


# -- other bricks of the recipe


@dataclass(frozen=True)
class _Source:
    """Facts that something else in the recipe teaches; None where it does not say which."""

    name: str
    facts: list[Fact] | None
    place: str


def _of_recipe(facts: Sequence[Fact], path: Path, recipe: Recipe) -> Iterator[FactFinding]:
    """Facts that an edit brick or another edit step of the recipe holds: the same target is covered, another contradicts."""
    mine = {id(fact) for fact in facts}
    for source in _sources(recipe, path.resolve(), ()):
        if source.facts is None:
            yield FactFinding(source.place, "unread", "warning", f"{source.name} is an edit without {FACTS}: what it teaches is not known here",
                          f"Put the file that it was solved from beside its {RECORD}.")  # fmt: skip
            continue
        together = [*source.facts, *facts]
        for status, kind, pairs in (
            ("failed", "contradiction", contradictions(together)),
            ("warning", "covered", duplicates(together)),
        ):
            for pair in pairs:
                if id(pair.fact) in mine and id(pair.other) not in mine:
                    yield _shared(pair, source, kind, "failed" if status == "failed" else "warning")


def _shared(pair: Conflict, source: _Source, kind: str, status: Status) -> FactFinding:
    fact, other = pair.fact, pair.other
    what = f"answers {fact.text!r} with {fact.target!r}, and {source.name} ({other.place}) "
    what += "teaches that already" if status == "warning" else f"teaches {other.target!r}"
    return FactFinding(fact.place, kind, status, what, f"Delete this line, or take {source.name} out of the recipe.", fact.id, other.place)  # fmt: skip


def _sources(recipe: Recipe, own: Path, above: tuple[Path, ...]) -> Iterator[_Source]:
    """What the recipe's bricks and edit steps teach, those of recipes as bricks too; `own` is the file that is checked."""
    project = recipe.project
    for name, ref in recipe.fields.bricks.items():
        if ref.kind == "recipe":
            inner = (project / ref.target).resolve()
            if inner not in above:
                for source in _sources(load_recipe(inner), own, (*above, inner)):
                    yield _Source(f"brick '{name}', {source.name}", source.facts, source.place)
            continue
        taught = _of_brick(resolve_brick(name, ref, project, HEADERS), ref.target)
        if taught is not None:
            yield taught
    for step, step_id in zip(recipe.steps, recipe.step_ids, strict=True):
        file = getattr(step, "facts", None)
        if isinstance(step, EditMethod) and isinstance(file, str) and (project / file).resolve() != own:
            yield _Source(f"step '{step_id}'", read_all(project / file, file).facts, file)


def _of_brick(brick: Brick, shown: str) -> _Source | None:
    """What an edit brick teaches; None for other bricks."""
    place = f"{shown}/{FACTS}"
    if (brick.path / FACTS).is_file():
        return _Source(brick.label, read_all(brick.path / FACTS, place).facts, place)
    is_edit = (brick.path / RECORD).is_file() or (brick.card is not None and brick.card.kind == "edit")
    return _Source(brick.label, None, place) if is_edit else None


# -- what a model answers


def _of_model(
    facts: Sequence[Fact], name: str, resolved: Resolved, device: torch.device, events: Events
) -> Iterator[FactFinding]:
    """Targets that the model gives already, and neighbours with another target than its answer."""
    model = materialize(resolved, device, events=events)
    tokenizer = load_tokenizer(resolved.tokenizer_path)
    asked: dict[str, str] = {}
    for prompt, target in _questions(facts):
        asked[prompt] = max(asked.get(prompt, ""), target, key=len)
    answers = greedy_answers(model, tokenizer, asked, events)
    for fact in facts:
        if says(answers[fact.text], fact.target):
            yield FactFinding(fact.place, "known", "warning", f"{name} already answers {fact.text!r} with {fact.target!r}",
                          "Delete this line: an edit has nothing to do, and scores count it as learned.", fact.id)  # fmt: skip
        for probe in fact.neighbours:
            if probe.target is not None and not says(answers[probe.prompt], probe.target):
                yield FactFinding(
                    fact.place, "answer", "warning",
                    f"the neighbour {probe.prompt!r} has the target {probe.target!r}, and {name} answers {_brief(answers[probe.prompt])!r}",
                    "Leave its target out where the model's own answer has to stay, or delete the neighbour.", fact.id)  # fmt: skip


def _questions(facts: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    for fact in facts:
        yield fact.text, fact.continuation
        yield from ((probe.prompt, probe.continuation) for probe in fact.neighbours if probe.target is not None)


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: dict[str, str], events: Events = no_events
) -> dict[str, str]:
    """Prompt -> the model's greedy continuation, as long as an expected one and a little more.

    Args:
        model: Live; the generation settings that it comes with (sampling, penalties) do not count.
        tokenizer: Its tokenizer; prompts are plain text.
        asked: Prompt -> a continuation whose tokens say how many to generate.
        events: Told how many are done.

    Prompts of equal length in tokens share a batch, so that none is padded. Errors: a prompt without tokens.
    """
    from transformers import GenerationConfig

    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0)  # fmt: skip
    by_length: dict[int, list[tuple[str, list[int], int]]] = defaultdict(list)
    for prompt, continuation in asked.items():
        ids = encode_text(tokenizer, prompt)
        if not ids:
            raise WorkbenchError(f"{prompt!r} has no tokens in the model's vocabulary", "Word it in what the tokenizer knows.")
        tokens = len(encode_pair(tokenizer, prompt, continuation).continuation) + _BEYOND
        by_length[len(ids)].append((prompt, ids, tokens))
    answers: dict[str, str] = {}
    for length, rows in sorted(by_length.items()):
        rows.sort(key=lambda row: row[2])
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            inputs = torch.tensor([ids for _, ids, _ in batch], device=model.device)
            made = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=batch[-1][2])
            texts = tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
            answers |= {prompt: text for (prompt, _, _), text in zip(batch, texts, strict=True)}
            events({"stage": "ask", "done": len(answers), "total": len(asked), "text": "prompts"})
    return answers


def says(answer: str, target: str) -> bool:
    """Whether an answer begins with a target and does not go on inside its last word; capitals and white space do not count."""
    text, wanted = " ".join(answer.casefold().split()), folded(target)
    return text.startswith(wanted) and not text[len(wanted) : len(wanted) + 1].isalnum()


def _brief(answer: str) -> str:
    return answer.strip().partition("\n")[0] + " …"
