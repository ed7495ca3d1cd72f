"""Facts, which edits and memories teach a model, and the files that they are read from."""

from workbench.facts.conflicts import contradictions
from workbench.facts.facts import SLOT, Fact, Probe, fact_of, joined, write_facts
from workbench.facts.published import Published, Skip, read_facts
from workbench.facts.questions import Conflict
from workbench.facts.stream import Start, Stream, latest, read_stream

__all__ = [
    "SLOT",
    "Conflict",
    "Fact",
    "Probe",
    "Published",
    "Skip",
    "Start",
    "Stream",
    "contradictions",
    "fact_of",
    "joined",
    "latest",
    "read_facts",
    "read_stream",
    "write_facts",
]
