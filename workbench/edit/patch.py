"""Patch: one new neuron for each token that the model does not say, silent at all other inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

from pydantic import Field, model_validator

from workbench.edit.closed_form.lookup import Group, Lookup, spellings
from workbench.edit.closed_form.moments import statistics_source, token_rows
from workbench.edit.gradient.neurons import ROWS_AT_ONCE, Block, find_block, inputs_of, installed, least_used, lending
from workbench.edit.gradient.patching import (
    RATE,
    Descent,
    Keys,
    Mistake,
    Prefix,
    RowsOfFact,
    find_mistakes,
    solve_keys,
    subject_values,
    subjects_of,
    train_values,
)
from workbench.edit.gradient.tuning import chunks
from workbench.edit.inputs import contexts, generated_prompts, read_for
from workbench.edit.places.parts import LONGEST, Parts, Position, check_rows, padded, row_of
from workbench.edit.places.passes import score
from workbench.facts.conflicts import require_consistent
from workbench.facts.facts import Fact
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import no_grad
from workbench.models.hooks import frozen, n_outputs
from workbench.models.layout import Model
from workbench.models.prompts import encode_text
from workbench.models.texts import longest_row
from workbench.steps import Cost, Edit, EditMethod, MethodContext, register
from workbench.steps.fields import Real, Whole
from workbench.weights.device import one_thread

SHARE: Mapping[Position, float] = MappingProxyType({"subject_last": 0.25, "prompt_last": 0.4})
"""Depth of the default layer. At subjects, a quarter says more misspelt facts than the layers below, in half the steps."""
LENT = 4
"""A layer lends at most one in so many of its neurons."""
MISSPELT = 96
"""Largest number of wrong spellings of a subject at which its neuron is active too."""
BEHIND = 10
"""Number of text beginnings after which it is active too: a query costs little, where a wording of a value costs a pass in every step."""
BOUND = 1e-3
"""A neuron counts as active where its activation is above this share of the one at its fact's query."""


@register
class Patch(EditMethod):
    """Write new neurons for what the model does not say: one for each subject, or one for each token (Huang et al. 2023, Transformer-Patcher).

    Each neuron's key is above a margin at its query and below it at ordinary text, neighbors and other queries, where the neuron is
    silent. Its value is trained until the target is said. The neurons are those that write nothing, which `grow: width` before this step
    adds, and then those of the layer that write least to ordinary text, at most a quarter of it: what these wrote is lost.
    """

    paper = "Huang et al. 2023, Transformer-Patcher: one mistake worth one neuron, arXiv 2301.09785"
    formula = (
        "FFN(x) ↦ FFN(x) + Σ a_i(x) v_i,  a = σ(S(k·x + b)) or σ(S(k·x + b)) · u·x,  min over k, b of "
        "Σ_x max(0, 1 + k·x + b)² + w Σ_q max(0, 1 − k·q − b)² + r‖(k, b)‖²,  u: a the same at all q,  min over v of −log p(token)"
    )

    version = 8  # cached values are those of the model without the columns that are lent

    edit: Literal["patch"]
    facts: str
    """Facts file or published data set (see docs/facts.md), relative to the project."""
    first: Whole | None = Field(None, ge=1)
    """Use only the first N facts of the file."""
    position: Position | None = None
    """Token at which the neurons act: `prompt_last`: one for each token of a target, before it, in the fact's own wording;
    `subject_last`: one for each subject, at its last token in any wording and spelling, with a value that is optimized as `memit`'s.
    Default: `subject_last` where every fact has a subject and `end_of_text` is not set."""
    layer: Whole | None = None
    """Layer whose feed-forward block gets the neurons, from 0. Default: with `subject_last`, the one at a quarter of the depth; else the
    last one if it has neurons that write nothing, or the one at two fifths of the depth, where the least used neurons are missed least."""
    statistics: str | None = None
    """Text at whose tokens the neurons must be silent: JSONL or plain text, relative to the project. Default: the text that comes
    with the workbench."""
    tokens_per_input: Whole = Field(10, ge=1)
    """Number of tokens of that text per channel of the hidden state. Half as many tokens after them measure how often a neuron is
    active in text that no key has seen."""
    neighbours: bool = True
    """Neurons must also be silent at the facts' neighbors. Scores on these neighbors then say nothing about other prompts."""
    preserve_generated: Whole = Field(64, ge=0)
    """Number of further prompts at which neurons must be silent: the facts' own wordings with other subjects."""
    contexts: Whole = Field(3, ge=0, le=10)
    """Number of text beginnings put before each prompt, after which the neuron must be active too; 0: the plain prompt only."""
    end_of_text: bool = False
    """Also write a neuron with which each text ends after its target, unless the model ends it already."""
    steps: Whole = Field(60, ge=1)
    """Largest number of optimization steps for the values; it stops when all tokens are said."""
    confidence: Real = Field(0.97, gt=0, lt=1)
    """Probability of a missing token at which the optimization of its value stops."""

    keyed_if_set = frozenset({"position"})
    constants = MappingProxyType({"learning_rate": RATE})

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.end_of_text and self.position == "subject_last":
            raise ValueError(
                "`end_of_text` is for neurons at `prompt_last`, because a text does not end at a subject: add a second `edit: patch` with "
                "`end_of_text: true` after this step"
            )
        return self

    def inputs(self) -> list[str]:
        """Return the files of facts and of text."""
        return [self.facts, *filter(None, [self.statistics])]

    def check_inputs(self, project: Path) -> None:
        """Read the facts and check that they do not contradict each other, and have subjects where neurons act at these."""
        facts = self._read(project)
        require_consistent(facts)
        if self.position == "subject_last" and (bare := [fact for fact in facts if fact.subject is None]):
            raise InvalidRecipeError(
                f"edit patch: {bare[0].place}: the fact has no subject, at which its neuron could act",
                "Write the prompt with {subject} and name the `subject`, or set `position: prompt_last`.",
            )

    def check_model(self, model: Model) -> None:
        """Check from names that the layer exists.

        Raises:
            WorkbenchError: If it does not.
        """
        depth = model.layout.depth
        if self.layer is not None and not 0 <= self.layer < depth:
            raise InvalidRecipeError(f"edit patch: layer {self.layer} does not exist; the model has layers 0 to {depth - 1}")

    def _read(self, project: Path) -> list[Fact]:
        """Return the facts, sorted by ID."""
        return read_for("joint", self.first, project, self.facts)

    def _position(self, facts: Sequence[Fact]) -> Position:
        """Return the token at which the neurons act."""
        apt = not self.end_of_text and all(fact.subject is not None for fact in facts)
        return self.position or ("subject_last" if apt else "prompt_last")

    def cost(self, model: Model, project: Path, cache: Path) -> Cost:
        """Estimate the work: facts, and the tokens of text and prompts."""
        facts, layout = self._read(project), model.layout
        spec = model.weights.specs[next(reversed(layout.edited().values()), None) or layout.mlp_out(0)]
        text = self.tokens_per_input * min(spec.shape)
        prompts = 12 * (len(facts) * (1 + self.contexts) + self.preserve_generated)
        states = text + prompts  # at which keys are solved: of other spellings, the query alone
        work = {"statistics": text + text // 2, "facts": len(facts)}
        if self._position(facts) == "subject_last":
            queries = len(facts) * (BEHIND + MISSPELT)
            states, prompts = states + queries, prompts + 12 * queries
            rows = self.contexts + 8  # two spellings, a message, three wordings, and prompts to spare
            work["values"] = len(facts) * rows * 12 * max(1, self.steps // 4)  # tokens, times the steps that most values need
        # Each state as it is read and in one matrix, in float32, and that matrix in float64.
        return {"work": work, "tokens": sum(work.values()) - len(facts) + prompts, "memory": 16 * states * min(spec.shape)}

    def solve(self, context: MethodContext) -> Edit:
        """Solve keys and values of the neurons on the live model; the model is left unchanged.

        Raises:
            WorkbenchError: If the block is not supported, there are too few neurons that write nothing, the model says every target
                already, or no key separates a query from other inputs.
        """
        facts = self._read(context.project)
        longest = longest_row(context.layout.config, LONGEST)
        check_rows(facts, context.tokenizer, longest, self.end_of_text)
        parts = Parts.of(context)
        position = self._position(facts)
        layer = self._layer(context, parts, position)
        whole = find_block(parts, layer, context)
        texts, _ = statistics_source(context, self.statistics)
        at_subjects = position == "subject_last"
        at = Lookup(context, parts, layer, position, contexts(texts, self.contexts), widely=at_subjects)
        rows = self._wordings(at, facts, longest)
        width = n_outputs(parts.out(layer)) or 0
        seen, unseen = _split(list(token_rows(context, texts)), self.tokens_per_input * width)
        queries = self._queries(at, facts, rows, texts, longest) if at_subjects else []
        with frozen(context.model), one_thread(), self._room(whole, facts, rows, queries, seen) as (block, mistakes, groups):
            keys = solve_keys(block, mistakes, facts, self._prompts(context, facts, rows), seen, context.progress)
            descent = Descent(self.steps, self.confidence)
            if at_subjects:
                neurons, record = subject_values(at, block, groups, keys, descent)
            else:
                neurons, record = train_values(block, keys, mistakes, rows, descent, context.progress)
            with installed(block, neurons):
                record |= _measured(block, keys, mistakes, facts, rows, context)
                record["text"] = {
                    "source": self.statistics or "bundled",
                    "tokens": sum(map(len, seen)),
                    **_gating(block, keys, unseen),
                }
        counts = {"facts": len(facts), "neurons": len(mistakes), "lent": len(block.lent)}
        record = {"layers": [layer], "position": position, "order": "free", **counts, **record}
        return Edit(neurons.factors(block), record, fan_in_fan_out=parts.transposed, facts=facts)

    @contextmanager
    def _room(
        self,
        whole: Block,
        facts: Sequence[Fact],
        rows: Sequence[RowsOfFact],
        queries: Sequence[Sequence[Prefix]],
        texts: Sequence[list[int]],
    ) -> Iterator[tuple[Block, list[Mistake], list[Group]]]:
        """Yield the block with neurons for the mistakes, the mistakes, and for neurons at subjects the facts about each.

        Without the neurons that are lent, the model may make other mistakes, which then need neurons too. `queries` are those of neurons
        at subjects, for each fact.
        """

        def mistakes() -> dict[Prefix, Mistake]:
            return {m.queries[0]: m for m in find_mistakes(whole.parts, facts, rows)}

        found, order = mistakes(), tuple[int, ...]()
        if not found:
            raise WorkbenchError(
                f"edit patch: the model says every target of {self.facts} already, so there is no mistake to patch",
                "Remove the step.",
            )
        while True:
            listed, groups = list(found.values()), list[Group]()
            if queries:
                listed, groups = subjects_of(facts, queries, listed)
            if len(listed) > len(whole.free) and not order:
                order = least_used(whole, texts)[: whole.parts.width(whole.layer) // LENT]
            self._check_count(whole, len(order), len(listed), "subject with a fact" if queries else "token")
            with lending(whole, order, len(listed)) as block:
                others = mistakes() if block.lent else {}
                if others.keys() <= found.keys():
                    yield block, listed, groups
                    return
            found |= others

    def _layer(self, context: MethodContext, parts: Parts, position: Position) -> int:
        """Return the layer that gets the neurons."""
        if self.layer is not None:
            parts.check_layers((self.layer,), "edit patch")
            return self.layer
        last, depth = parts.editable[-1], len(parts.layers)
        if position == "prompt_last" and find_block(parts, last, context).free:
            return last
        return min(parts.editable, key=lambda layer: abs(layer - SHARE[position] * depth))

    def _wordings(self, at: Lookup, facts: Sequence[Fact], longest: int) -> list[RowsOfFact]:
        """Return every fact's prompt with its target, and its other wordings that fit; those before a target have the same tokens of it."""
        wordings: list[RowsOfFact] = []
        for fact in facts:
            plain, *others = at.wordings(fact, self.end_of_text)
            same = (row for row in others if at.widely or row.target == plain.target)
            wordings.append([plain, *(row for row in same if len(row.tokens) <= longest)])
        return wordings

    def _queries(
        self, at: Lookup, facts: Sequence[Fact], rows: Sequence[RowsOfFact], texts: Sequence[str], longest: int
    ) -> list[list[Prefix]]:
        """Return the tokens up to the subject's last one in the wordings of each fact, and in more spellings and behind more texts than values know."""
        tokenizer, befores, found = at.context.tokenizer, contexts(texts, BEHIND), []
        for fact, own in zip(facts, rows, strict=True):
            others = [*((fact, before) for before in befores), *((other, "") for other in spellings(fact, MISSPELT))]
            listed = [*own, *(row_of(other, tokenizer, at.position, before) for other, before in others)]
            found.append([prefix for row in listed if len(prefix := row.tokens[: row.lookup + 1]) <= longest])
        return found

    def _prompts(self, context: MethodContext, facts: Sequence[Fact], rows: Sequence[RowsOfFact]) -> list[list[int]]:
        """Return the rows of tokens at which neurons are silent, except at their own queries: wordings, neighbors, other prompts."""
        texts = [probe.prompt for fact in facts for probe in fact.neighbours] if self.neighbours else []
        texts += [fact.text for fact in generated_prompts(facts, self.preserve_generated)]
        encoded = [list(encode_text(context.tokenizer, text)) for text in dict.fromkeys(texts)]
        return [list(row.tokens) for wordings in rows for row in wordings] + [row for row in encoded if row]

    def _check_count(self, block: Block, lent: int, needed: int, unit: str) -> None:
        """Raise WorkbenchError if there are too few neurons."""
        if needed > len(block.free) + lent:
            total = block.parts.width(block.layer) + needed - len(block.free)
            raise WorkbenchError(
                f"edit patch: the facts need {needed} neurons, one for each {unit} that the model does not say; layer {block.layer} has "
                f"{len(block.free)} that write nothing yet, and lends {lent} others, at most 1 in {LENT}",
                f"Put `- {{grow: width, neurons: {total}}}` before this step, or set that number in the one that is there. New neurons "
                "write nothing, so that the model stays the same.",
            )


def _split(rows: Sequence[list[int]], tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return rows with some number of tokens, and the next ones with half as many; of shorter text, two thirds and one third."""
    if len(rows) < 3:
        raise WorkbenchError(
            f"edit patch: `statistics` has {len(rows)} rows of tokens, expected 3 or more",
            "Name a file with more text: JSONL, or paragraphs between blank lines.",
        )
    tokens = min(tokens, 2 * sum(map(len, rows)) // 3)
    seen = _first(iter(rows), tokens)
    seen = seen[: len(rows) - 1]
    return seen, _first(iter(rows[len(seen) :]), -(-tokens // 2))


def _first(rows: Iterator[list[int]], tokens: int) -> list[list[int]]:
    """Return the first rows that hold some number of tokens; at least one."""
    taken: list[list[int]] = []
    for row in rows:
        taken.append(row)
        tokens -= len(row)
        if tokens <= 0:
            break
    return taken


@no_grad
def _measured(
    block: Block,
    keys: Keys,
    mistakes: Sequence[Mistake],
    facts: Sequence[Fact],
    rows: Sequence[RowsOfFact],
    context: MethodContext,
) -> dict[str, object]:
    """Return the margin of every neuron, and the facts that are said."""
    patches = [
        {"fact": facts[mistake.fact].id, "token": context.tokenizer.decode([mistake.token])}
        | {"neuron": neuron, "at_queries": round(query, 4), "elsewhere": round(other, 4)}
        for mistake, neuron, (query, other) in zip(mistakes, keys.changes.index, keys.margins, strict=True)
    ]
    own = chunks([wordings[0] for wordings in rows], ROWS_AT_ONCE)
    said = [bool(right) for chosen in own for right in score(block.parts, padded(chosen, context.device))[1]]
    return {
        "patches": patches,
        "efficacy": sum(said) / len(said),
        "unsaid": [fact.id for fact, right in zip(facts, said, strict=True) if not right],
    }


@no_grad
def _gating(block: Block, keys: Keys, rows: Sequence[list[int]]) -> dict[str, object]:
    """Return how often a neuron is active in text that no key has seen, and its largest activation relative to its query's."""
    index = keys.changes.index
    active, tokens, largest = 0, 0, 0.0
    for states in inputs_of(block.parts, block.parts.out(block.layer), rows, index):
        shares = (states / keys.activations).abs()
        active += int((shares > BOUND).any(dim=1).sum())
        tokens += len(shares)
        largest = max(largest, float(shares.max()))
    return {"unseen": tokens, "bound": BOUND, "active": active / tokens, "largest": float(f"{largest:.3g}")}
