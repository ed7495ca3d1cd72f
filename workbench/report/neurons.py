"""The page of a model's neurons: functions, sparsity, ablations, each beside its tests and controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.files import write_bytes
from workbench.report.files import with_tables
from workbench.report.neurons_ablation import ablation_section
from workbench.report.neurons_beside import beside_section
from workbench.report.neurons_decompose import decomposition_section
from workbench.report.neurons_facts import facts_section
from workbench.report.neurons_functions import functions_section
from workbench.report.neurons_partition import partition_section
from workbench.report.neurons_sparsity import sparsity_section
from workbench.report.page import filled
from workbench.report.sections import Section


def render_neurons(documents: Mapping[str, Mapping[str, Any]], out: Path) -> Path:
    """Write a self-contained page of all analyses of a model, and return its path.

    Args:
        documents: Kind of analysis -> its document.
        out: The HTML file.
    """
    sections = [SECTIONS[kind](document) for kind, document in documents.items() if kind in SECTIONS]
    first = next(iter(documents.values()))
    context = {
        "title": f"Neurons of {first['model']}",
        "digest": first["digest"],
        "sections": sections,
        "warnings": list(dict.fromkeys(w for d in documents.values() for w in (d.get("data") or {}).get("warnings", ()))),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    styles = ("report.css", "curves.css", "heat.css", "neurons.css")
    page = filled("neurons.html.j2", context, ("report.js", "downloads.js"), styles)
    write_bytes(out, with_tables(page, [table for section in sections for table in section.saved()]).encode())
    return out


SECTIONS: dict[str, Callable[[Mapping[str, Any]], Section]] = {
    "functions": functions_section,
    "beside": beside_section,
    "sparsity": sparsity_section,
    "ablation": ablation_section,
    "partition": partition_section,
    "knowledge": facts_section,
    "decomposition": decomposition_section,
}
