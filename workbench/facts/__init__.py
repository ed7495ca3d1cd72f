"""Facts: what edits teach, read from files."""

from workbench.facts.facts import SLOT, Fact, Probe, fact_of, joined, read_facts, write_facts

__all__ = ["SLOT", "Fact", "Probe", "fact_of", "joined", "read_facts", "write_facts"]
