"""`facts check`: conflicts in a facts file, facts that a model already knows, and facts that other bricks of a recipe teach."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.bricks.brick import Brick
from workbench.bricks.hub import HEADERS
from workbench.bricks.locate import resolve_brick
from workbench.facts.conflicts import LONG, LONG_REPAIR, conflicts, contradictions, duplicates
from workbench.facts.facts import FACTS, Fact, folded
from workbench.facts.published import Published, read_all
from workbench.facts.questions import Conflict, Status
from workbench.facts.stream import Start, read_stream
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import JsonObject, Number
from workbench.models.prompts import encode_pair, encode_text, load_tokenizer
from workbench.recipe.recipe import Recipe, load_recipe
from workbench.run.kinds.edit import RECORD
from workbench.run.materialize import materialize
from workbench.run.opened import NamedModel
from workbench.steps import EditMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32
# Number of tokens to generate beyond the target, which show whether its last word continues.
_BEYOND = 2


class FactFinding(JsonObject):
    """A problem with one line of a facts file."""

    place: str
    """Location of the line, as file:line."""
    kind: str
    """Kind of the problem, such as contradiction, duplicate or known."""
    status: Status
    """Whether the problem fails the check."""
    found: str
    """Description of the problem."""
    repair: str
    """Advice on how to fix it."""
    fact: str | None = None
    """Id of the fact; null if the line is not a fact."""
    other: str | None = None
    """Location of the other fact, if one is involved."""
    similarity: Number | None = None
    """Similarity of the two facts' questions, from 0 to 1; null unless an encoder compared them."""


class FactsReport(JsonObject):
    """Checks of a facts file. If it does not pass, the exit code is 3."""

    file: str
    """The facts file."""
    format: str
    """Format of the file: "facts", or the name of a published format."""
    facts: int
    """Number of facts."""
    model: str | None
    """Name of the model whose answers were checked."""
    passed: bool
    """Whether no problem fails the check."""
    encoder: str | None = None
    """Directory of the encoder that compared wordings; null without one."""
    wording_threshold: Number | None = None
    """Similarity from which the encoder reports two facts; null without an encoder."""
    counts: dict[str, int]
    """Kind of problem -> number of findings."""
    findings: list[FactFinding]
    """The problems, grouped by kind."""

    @property
    def failed(self) -> list[FactFinding]:
        """Findings that fail the check."""
        return [finding for finding in self.findings if finding.status == "failed"]


def check_facts(
    path: Path,
    shown: str,
    *,
    stream: bool | Start = False,
    recipe: Recipe | None = None,
    model: NamedModel | None = None,
    device: torch.device | None = None,
    events: Events = no_events,
) -> FactsReport:
    """Check a facts file in the project's own format or a published one.

    Args:
        path: The file.
        shown: Name of the file in messages.
        stream: Read the file in order, and check the facts that its updates and removals leave; an earlier stream is continued, and its
            facts are checked with those of the file.
        recipe: Recipe whose bricks and edit steps are searched for the same facts.
        model: Model to query for facts that it already knows; None queries no model.
        device: Device of the model.
        events: Callback that receives progress events.

    Raises:
        WorkbenchError: If the file cannot be read, or a brick of the recipe is missing; for a stream, also if two facts have the same
            id, or a removal or an update is invalid.
    """
    read = read_checked(path, shown, stream=stream)
    findings = [
        FactFinding(place=skip.place, kind="skipped", status="warning", found=skip.reason, repair="Correct or delete the row.")
        for skip in read.skipped
    ]
    findings += _same_ids(read.facts) if read.format == "facts" else []
    findings += [finding(c.fact, c.kind, c.status, c.what, c.repair, c.other.place) for c in conflicts(read.facts)]
    findings += [_long(fact) for fact in read.facts if len(fact.target) > LONG]
    if recipe is not None:
        findings += _check_recipe(read.facts, path, recipe)
    if model is not None:
        findings += _check_answers(read.facts, model, device or torch.device("cpu"), events)
    return FactsReport(
        file=shown,
        format=read.format,
        facts=len(read.facts),
        model=model.name if model else None,
        passed=all(found.status != "failed" for found in findings),
        counts=dict(Counter(found.kind for found in findings)),
        findings=findings,
    )


def finding(
    fact: Fact, kind: str, status: Status, found: str, repair: str, other: str | None = None, similarity: float | None = None
) -> FactFinding:
    """Return a problem with the line of a fact."""
    return FactFinding(
        place=fact.place,
        kind=kind,
        status=status,
        found=found,
        repair=repair,
        fact=fact.id,
        other=other,
        similarity=similarity,
    )


def read_checked(path: Path, shown: str, *, stream: bool | Start) -> Published:
    """Read the facts that `facts check` looks at: all of a file, or those that a stream leaves, also one that goes on from a start."""
    if not stream:
        return read_all(path, shown)
    in_order = read_stream(path, shown, stream if isinstance(stream, Start) else None)
    return Published(in_order.current, list(in_order.skipped), in_order.format)


def _long(fact: Fact) -> FactFinding:
    """Return the finding for a target that closed-form methods rarely say as a whole."""
    problem = (
        f"the target has {len(fact.target)} characters: closed-form methods (rome, memit, ...) write one value a fact, "
        "which AnyEdit finds too little for long answers"
    )
    if "\n" in fact.target:
        problem += "; it has line breaks, at which generated answers are cut, so they never count as right"
    return finding(fact, "long", "warning", problem, LONG_REPAIR)


def _same_ids(facts: Iterable[Fact]) -> Iterator[FactFinding]:
    """Yield a finding for each id that two different facts share, which `read_facts` does not accept."""
    first: dict[str, Fact] = {}
    for fact in facts:
        other = first.setdefault(fact.id, fact)
        if other.text != fact.text:
            problem = f"has the same id {fact.id!r} as {other.place}"
            yield finding(fact, "id", "failed", problem, "Give every fact its own id.", other.place)


# -- other bricks of the recipe


@dataclass(frozen=True)
class _Source:
    """A brick or step of the recipe that teaches facts.

    Attributes:
        name: Name in messages.
        facts: The facts, or None if they are not known.
        place: Its facts file.
    """

    name: str
    facts: list[Fact] | None
    place: str


def _check_recipe(facts: Sequence[Fact], path: Path, recipe: Recipe) -> Iterator[FactFinding]:
    """Yield facts that another edit brick or edit step of the recipe covers (same target) or contradicts (other target)."""
    checked = {id(fact) for fact in facts}
    for source in _sources(recipe, path.resolve(), ()):
        if source.facts is None:
            yield FactFinding(
                place=source.place,
                kind="unread",
                status="warning",
                found=f"{source.name} is an edit without {FACTS}, so its facts are not known",
                repair=f"Put the facts file that it was solved from next to its {RECORD}.",
            )
            continue
        all_facts = [*source.facts, *facts]
        for status, kind, pairs in (
            ("failed", "contradiction", contradictions(all_facts)),
            ("warning", "covered", duplicates(all_facts)),
        ):
            for pair in pairs:
                if id(pair.fact) in checked and id(pair.other) not in checked:
                    yield _shared(pair, source, kind, "failed" if status == "failed" else "warning")


def _shared(pair: Conflict, source: _Source, kind: str, status: Status) -> FactFinding:
    fact, other = pair.fact, pair.other
    problem = f"answers {fact.text!r} with {fact.target!r}, and {source.name} ({other.place}) "
    problem += "already teaches that" if status == "warning" else f"teaches {other.target!r}"
    repair = f"Delete this line, or remove {source.name} from the recipe."
    return finding(fact, kind, status, problem, repair, other.place)


def _sources(recipe: Recipe, checked_file: Path, parents: tuple[Path, ...]) -> Iterator[_Source]:
    """Yield the bricks and edit steps of a recipe that teach facts, including those of recipes used as bricks.

    Args:
        recipe: The recipe.
        checked_file: The facts file being checked, which is skipped.
        parents: Recipes that contain this one, to stop at cycles.
    """
    project = recipe.project
    for name, ref in recipe.fields.bricks.items():
        if ref.kind == "checkpoints":
            continue  # trained, not edited
        if ref.kind == "recipe":
            inner = (project / ref.target).resolve()
            if inner not in parents:
                for source in _sources(load_recipe(inner), checked_file, (*parents, inner)):
                    yield _Source(f"brick '{name}', {source.name}", source.facts, source.place)
            continue
        source_brick = _brick_source(resolve_brick(name, ref, project, HEADERS), ref.target)
        if source_brick is not None:
            yield source_brick
    for step, step_id in zip(recipe.steps, recipe.step_ids, strict=True):
        file = getattr(step, "facts", None)
        if isinstance(step, EditMethod) and isinstance(file, str) and (project / file).resolve() != checked_file:
            facts = (
                read_stream(project / file, file, step.stream_start(project)).current
                if step.in_order
                else read_all(project / file, file).facts
            )
            yield _Source(f"step '{step_id}'", facts, file)


def _brick_source(brick: Brick, shown: str) -> _Source | None:
    """Return the facts of an edit brick, or None for other bricks."""
    place = f"{shown}/{FACTS}"
    if (brick.path / FACTS).is_file():
        return _Source(brick.label, read_all(brick.path / FACTS, place).facts, place)
    is_edit = (brick.path / RECORD).is_file() or (brick.card is not None and brick.card.kind == "edit")
    return _Source(brick.label, None, place) if is_edit else None


# -- answers of a model


def _check_answers(facts: Sequence[Fact], asked: NamedModel, device: torch.device, events: Events) -> Iterator[FactFinding]:
    """Yield facts that the model already answers with the target, and neighbors whose target differs from its answer."""
    name = asked.name
    model = materialize(asked.resolved, device, events=events)
    tokenizer = load_tokenizer(asked.resolved.tokenizer_path)
    longest_target: dict[str, str] = {}
    for prompt, target in _questions(facts):
        longest_target[prompt] = max(longest_target.get(prompt, ""), target, key=len)
    answers = greedy_answers(model, tokenizer, longest_target, events)
    for fact in facts:
        if says(answers[fact.text], fact.target):
            yield finding(
                fact,
                "known",
                "warning",
                f"{name} already answers {fact.text!r} with {fact.target!r}",
                "Delete this line: an edit would change nothing, but scores would count the fact as learned.",
            )
        for probe in fact.neighbours:
            if probe.target is not None and not says(answers[probe.prompt], probe.target):
                answer = _first_line(answers[probe.prompt])
                yield finding(
                    fact,
                    "answer",
                    "warning",
                    f"the neighbor {probe.prompt!r} has the target {probe.target!r}, but {name} answers {answer!r}",
                    "Remove the neighbor's target to preserve the model's own answer, or delete the neighbor.",
                )


def _questions(facts: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    for fact in facts:
        yield fact.text, fact.continuation
        yield from ((probe.prompt, probe.continuation) for probe in fact.neighbours if probe.target is not None)


@no_grad
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, expected: dict[str, str], events: Events = no_events
) -> dict[str, str]:
    """Return the model's greedy continuation of each prompt, a few tokens longer than the expected one.

    A batch contains only prompts with the same number of tokens, so there is no padding.

    Args:
        model: The live model. Its own generation settings (sampling, penalties) are replaced.
        tokenizer: Its tokenizer; prompts are plain text.
        expected: Prompt -> a continuation whose length determines the number of tokens to generate.
        events: Callback that receives progress events.

    Raises:
        WorkbenchError: If a prompt has no tokens.
    """
    from transformers import GenerationConfig

    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    by_length: dict[int, list[tuple[str, list[int], int]]] = defaultdict(list)
    for prompt, continuation in expected.items():
        ids = encode_text(tokenizer, prompt)
        if not ids:
            raise WorkbenchError(
                f"{prompt!r} has no tokens in the model's vocabulary", "Use words that the model's tokenizer knows."
            )
        tokens = len(encode_pair(tokenizer, prompt, continuation).continuation) + _BEYOND
        by_length[len(ids)].append((prompt, ids, tokens))
    answers: dict[str, str] = {}
    for length, rows in sorted(by_length.items()):
        rows.sort(key=lambda row: row[2])
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            inputs = torch.tensor([ids for _, ids, _ in batch], device=model.device)
            generated = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=batch[-1][2]
            )
            texts = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
            answers |= {prompt: text for (prompt, _, _), text in zip(batch, texts, strict=True)}
            events({"stage": "ask", "done": len(answers), "total": len(expected), "text": "prompts"})
    return answers


def says(answer: str, target: str) -> bool:
    """Return whether an answer starts with the target as whole words, ignoring case and white space."""
    text, start = " ".join(answer.casefold().split()), folded(target)
    return text.startswith(start) and not text[len(start) : len(start) + 1].isalnum()


def _first_line(answer: str) -> str:
    return answer.strip().partition("\n")[0] + " …"
