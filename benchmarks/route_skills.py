"""Synthetic skills for retrieval among many bricks: eight operations on eight kinds of text, each in templates for fitting and others for
testing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

# operation -> templates that routers are fitted on, templates that test them, a description
OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "count": (
        (
            "Count the {k} in this list: {c}. Answer:",
            "How many {k} are named here? {c}. Answer:",
            "Give the number of {k}: {c} =",
        ),
        ("I want to know how many {k} I have written down: {c}.", "{c} - that makes how many {k}?"),
        "counts the {k} in a list",
    ),
    "sort": (
        (
            "Sort these {k} by the alphabet: {c}. Sorted:",
            "Put the {k} into order: {c}. Order:",
            "Order the {k} from A to Z: {c} ->",
        ),
        ("Which order would a dictionary have these {k} in? {c}", "Arrange {c} alphabetically; they are {k}."),
        "sorts {k} alphabetically",
    ),
    "rhyme": (
        ("Find rhymes for these {k}: {c}. Rhymes:", "What rhymes with the {k} {c}? Answer:", "Make a rhyme on the {k} {c}:"),
        (
            "I am writing a song about the {k} {c} and need words that sound alike.",
            "Something that ends in the same sound as {c}, all {k}:",
        ),
        "finds rhymes for {k}",
    ),
    "plural": (
        (
            "Write the plural of these {k}: {c}. Plural:",
            "Turn the {k} {c} into the plural:",
            "More than one of each of the {k} {c} ->",
        ),
        ("If there were two of each, what would I call these {k}? {c}", "Pluralize {c}, please; they are {k}."),
        "writes the plural of {k}",
    ),
    "odd": (
        (
            "Which of the {k} does not belong? {c}. Answer:",
            "Find the odd one out of these {k}: {c}. Odd:",
            "One of the {k} is wrong here: {c}. It is",
        ),
        ("All but one of the {k} {c} have something in common. Name the exception.", "Spot the stranger among {c} ({k})."),
        "finds the one of the {k} that does not belong",
    ),
    "shout": (
        ("Write the {k} in capitals: {c}. Result:", "Make the {k} upper case: {c} ->", "Spell the {k} {c} in big letters:"),
        ("Please shout these {k}: {c}", "{c} - the same {k}, but with every letter large."),
        "writes {k} in capital letters",
    ),
    "first": (
        (
            "What is the first of the {k}? {c}. First:",
            "Name the {k} that the list begins with: {c}. Answer:",
            "Take the first of the {k} {c}:",
        ),
        ("{c}. I only need the one of the {k} at the front.", "Which of the {k} leads here: {c}?"),
        "names the first of the {k} in a list",
    ),
    "story": (
        ("Write one line about the {k} {c}. Story:", "Tell a tale of the {k} {c}:", "Begin a story with these {k}: {c}. Once"),
        ("My children love to hear about {k}. Make something up with {c}.", "Invent an adventure in which {c} appear, all {k}."),
        "tells a story about {k}",
    ),
}
KINDS: dict[str, tuple[str, ...]] = {
    "animals": ("dog", "horse", "goose", "tiger", "whale", "rabbit", "eagle", "frog", "camel", "otter", "beetle", "salmon"),
    "tools": ("hammer", "saw", "drill", "wrench", "chisel", "pliers", "ladder", "shovel", "rake", "axe", "clamp", "file"),
    "fruits": ("apple", "plum", "cherry", "mango", "grape", "lemon", "melon", "pear", "peach", "fig", "banana", "kiwi"),
    "countries": ("Norway", "Peru", "Kenya", "Japan", "Canada", "Egypt", "Chile", "India", "Greece", "Nepal", "Cuba", "Malta"),
    "colors": ("red", "green", "violet", "orange", "white", "brown", "silver", "pink", "navy", "gold", "grey", "teal"),
    "jobs": ("baker", "pilot", "nurse", "tailor", "judge", "farmer", "teacher", "sailor", "lawyer", "miner", "barber", "clerk"),
    "instruments": ("violin", "flute", "drum", "harp", "piano", "trumpet", "guitar", "cello", "oboe", "organ", "banjo", "tuba"),
    "vehicles": ("car", "tram", "bicycle", "truck", "ferry", "train", "bus", "canoe", "scooter", "tractor", "plane", "sled"),
}
PROMPTS, TESTS = 12, 6


def skills() -> list[str]:
    """All 64 skills in a mixed order: "count animals"."""
    names = [f"{operation} {kind}" for operation in OPERATIONS for kind in KINDS]
    return sorted(names, key=lambda name: _draw("order", name))


def prompts(skill: str, unseen: bool, count: int) -> list[str]:
    """Prompts of a skill, in the templates for fitting or in others."""
    operation, kind = skill.split()
    templates = OPERATIONS[operation][int(unseen)]
    found = []
    for i in range(count):
        words = sorted(KINDS[kind], key=lambda word: _draw(skill, str(unseen), str(i), word))[: 3 + _draw(skill, str(i)) % 3]
        found.append(templates[i % len(templates)].format(k=kind, c=", ".join(words)))
    return found


def seen_tests(skill: str) -> list[str]:
    """New prompts in the templates for fitting."""
    return prompts(skill, False, PROMPTS + TESTS)[PROMPTS:]


def description(skill: str) -> str:
    """Return the description of a brick of the skill."""
    operation, kind = skill.split()
    return OPERATIONS[operation][2].format(k=kind)


def _draw(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:8], "big")


def calibration(names: Sequence[str]) -> dict[str, list[str]]:
    """Skill -> prompts for fitting."""
    return {name: prompts(name, False, PROMPTS) for name in names}
