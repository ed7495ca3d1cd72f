"""Patch neurons at subjects: one for each, at its last token, with the value that ROME's optimization finds there.

The neurons of `patching` act before the tokens of a target, in one wording. What a model reads at a subject's last token hardly depends on the words
around it, so that a neuron there acts in other wordings too, and is silent at other subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from workbench.edit.closed_form.preset import Preset
from workbench.edit.closed_form.values import Group, Lookup, Settings, grouped, values
from workbench.edit.gradient.neurons import Neurons
from workbench.edit.gradient.patching import RATE, Descent, Keys, Mistake, RowsOfFact
from workbench.facts import Fact


def subjects_of(
    facts: Sequence[Fact], rows: Sequence[RowsOfFact], mistakes: Sequence[Mistake]
) -> tuple[list[Mistake], list[Group]]:
    """Return the subjects of the facts that the model does not say, each as one mistake, and all facts about each.

    Args:
        facts: The facts, each with a subject.
        rows: The wordings of every fact, looked up at the subject's last token.
        mistakes: The tokens that the model does not say.
    """
    unsaid, number = {m.fact for m in mistakes}, {fact.id: i for i, fact in enumerate(facts)}
    found, groups = [], []
    for group in grouped(facts, "subject_last"):
        members = [number[fact.id] for fact in group]
        if unsaid.isdisjoint(members):
            continue
        queries = tuple(row.tokens[: row.lookup + 1] for i in members for row in rows[i])
        found.append(Mistake(members[0], 0, queries[0][-1], queries))
        groups.append(group)
    return found, groups


def subject_values(at: Lookup, groups: Sequence[Group], keys: Keys, descent: Descent) -> tuple[Neurons, dict[str, Any]]:
    """Optimize the value of every subject by itself, as the closed-form editors do, and return the neurons that write it.

    Args:
        at: The layer, and the texts before prompts.
        groups: The facts about each subject.
        keys: The neurons' keys.
        descent: Settings; clamp and divergence are the closed-form editors' defaults.

    Returns:
        The neurons with their columns, and the record: largest number of steps of a subject.
    """
    settings = Settings(descent.steps, RATE, Preset.model_fields["clamp"].default, descent.confidence)
    found = values(at, groups, settings, at.context.model_key)
    columns = found.rows("change") / keys.activations[:, None]
    return replace(keys.changes, columns=columns), {"steps": max(value.steps for value in found)}
