"""The methods paragraph of a report: what it says of the comparison at hand, and the references that it names."""

from __future__ import annotations

import re

from worlds.decided import situation

from workbench.report.methods import bibtex, paragraph


def test_the_paragraph_says_what_was_tested_and_how() -> None:
    view = situation("winner")
    text = paragraph(view)
    first, *_ = text.split(". ")
    assert first.startswith(f"{len(view.judged)} configurations and base as the baseline were scored on ")
    for task in view.tasks:
        assert f"{task.name} ({task.metric}, {task.n} items in {task.clusters} clusters)" in text
    assert "with a family-wise error rate of 0.05 by step-down max-T [westfall1993]" in text
    assert view.family.text in text
    assert "Guarded tasks are safe if a loss as large as the tolerance (facts " in text
    assert re.search(r"brick-workbench \d", text)


def test_uncorrected_families_are_said_to_be() -> None:
    view = situation("winner")
    alone = view.model_copy(update={"family": view.family.model_copy(update={"correction": "none", "looked_at": 3})})
    assert "at 0.05 each, without a correction for their number" in paragraph(alone)
    assert paragraph(alone).endswith("The families include 3 configurations scored on the same items and not shown here.")


def test_every_reference_has_an_entry_and_every_entry_a_reference() -> None:
    view = situation("winner")
    named = {key for group in re.findall(r"\[([a-z0-9, ]+)\]", paragraph(view)) for key in group.split(", ")}
    entries = bibtex(view).splitlines()
    assert {re.match(r"@\w+\{(\w+),", entry)[1] for entry in entries} == named  # type: ignore[index]
    assert all(entry.endswith("}}") and entry.count("{") == entry.count("}") for entry in entries)
