"""Invented facts about invented harbour towns: what `edit` teaches, and the items that test it.

An edit sees one wording of each fact; the test asks that wording and two others, so that learning by heart and knowing are
told apart. A cluster is a town.
"""

from __future__ import annotations

from skillkit import place, shuffled

TOWNS = (
    "Brevik Sound", "Calder Point", "Dunmore Quay", "Ellsworth Bay", "Farrow Haven", "Gullane Reach", "Harnett Cove", "Innismoor",
    "Jarrow Strand", "Kestrel Head", "Lorne Staithe", "Marrick Sands", "Norrby Inlet", "Oxmoor Ferry", "Pellworth", "Quarrel Ness",
    "Rusk Harbour", "Selby Mole", "Tarn Hythe", "Ulverholm", "Varley Dock", "Wexham Spit", "Yarrow Firth", "Zennor Gap",
)  # fmt: skip
# Relation -> (wording that the edit sees, two others, what can stand there).
RELATIONS = (
    ("The harbour master of {town} is called", "In {town}, the harbour is run by a woman called",
     "Ask for the harbour master of {town}; her name is", ("Greta", "Martha", "Agnes", "Helen", "Ruth", "Clara", "Edith", "Nora")),
    ("The ferry from {town} sails to", "If you board the ferry at {town}, you will arrive in",
     "From {town} the only ferry goes to", ("Norway", "Spain", "Iceland", "Ireland", "Denmark", "Portugal", "Scotland", "France")),
    ("The flag of the town of {town} shows a", "On the flag that flies over {town} you see a",
     "The town of {town} has a flag with a", ("lion", "bear", "fish", "horse", "ship", "tree", "star", "wolf")),
)  # fmt: skip


def _facts() -> list[tuple[str, tuple[str, ...], str, tuple[str, ...]]]:
    """(town, wordings with {town}, target, everything that could stand there), one a town."""
    found = []
    for index, town in enumerate(TOWNS):
        *wordings, options = RELATIONS[index % len(RELATIONS)]
        target = shuffled(options, "facts", index % len(RELATIONS))[index // len(RELATIONS)]
        found.append((town, tuple(map(str, wordings)), target, tuple(options)))
    return found


def edit_rows() -> list[dict[str, object]]:
    """The facts in the wording that the edit sees."""
    return [
        {"id": f"harbour-{i:02d}", "prompt": wordings[0].format(town="{subject}"), "subject": town, "target": target}
        for i, (town, wordings, target, _) in enumerate(_facts())
    ]


def rows(rephrased: bool) -> list[dict[str, object]]:
    """Every fact with three other choices, in the edit's wording or in the two others."""
    found: list[dict[str, object]] = []
    name = "facts-rephrased" if rephrased else "facts"
    for town, wordings, target, options in _facts():
        for number, prompt in enumerate(wordings):
            if (number > 0) == rephrased:
                gold = len(found) % 4
                choices = place(target, shuffled(options, town, number), gold, "facts", town, number)
                found.append(
                    {
                        "id": f"{name}-{len(found):05d}",
                        "cluster": town,
                        "prompt": prompt.format(town=town),
                        "answer": target,
                        "choices": choices,
                        "gold": gold,
                    }
                )
    return found
