"""`retention`: what the base already knows, as multiple choice - does a merge still know it?

Three families, each a list of paradigms (clusters) of the same size: agreement and other minimal pairs of
English grammar, common facts, and copying of a list or a sentence that the prompt repeats. No item is ever trained on.
The tables stand in retention_data.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retention_data import FACTS, GRAMMAR, NAMES, NOUNS, OBJECTS
from skillkit import draw, pick, place, shuffled

PER_PARADIGM = 24

# prompt, answer, wrong choices (one for a minimal pair, three otherwise)
Triple = tuple[str, str, tuple[str, ...]]


def agreement() -> Iterator[tuple[str, list[Triple]]]:
    """Number agreement of subject and verb; `attractor` nouns of the other number stand in between."""
    verbs = (("is", "are"), ("was", "were"), ("has", "have"))
    for name, frame, attractor in (
        ("agree-simple", "Yesterday I saw that the {s}", False),
        ("agree-prep", "The {s} near the {o}", True),
        ("agree-behind", "We noticed that the {s} behind the {o}", True),
        ("agree-relative", "We knew that the {s} that stood by the {o}", True),
    ):
        found: dict[str, Triple] = {}
        for index in range(8 * PER_PARADIGM):
            # Even and odd places of `found` alternate in number, so that each paradigm holds 12 of each.
            plural = len(found) % 2
            subject = pick(NOUNS, name, "s", index)[plural]
            other = [noun for noun in NOUNS if noun[plural] != subject]
            between = pick(other, name, "o", index)[1 - plural if attractor else plural]
            pair = verbs[len(found) // 2 % len(verbs)]
            prompt = frame.format(s=subject, o=between)
            found.setdefault(prompt, (prompt, pair[plural], (pair[1 - plural],)))
            if len(found) == PER_PARADIGM:
                break
        yield name, list(found.values())


def grammar() -> Iterator[tuple[str, list[Triple]]]:
    """Minimal pairs written by hand: two wordings, right one first."""
    for name, rows in GRAMMAR.items():
        yield name, [(prompt, right, (wrong,)) for prompt, right, wrong in rows]


def facts() -> Iterator[tuple[str, list[Triple]]]:
    """A frame filled from a table; the wrong choices are answers of other rows."""
    for name, (frame, table) in FACTS.items():
        pairs = list(table.items())[:PER_PARADIGM]
        answers = sorted(set(table.values()))
        found: list[Triple] = []
        for key, answer in pairs:
            others = [text for text in shuffled(answers, name, key) if text not in (answer, key)]
            found.append((frame.format(key), answer, tuple(others[:3])))
        yield name, found


def copying() -> Iterator[tuple[str, list[Triple]]]:
    """Lists and sentences that the prompt has given once or twice and begins again."""
    for name in ("copy-list", "copy-long", "copy-names", "copy-sentence", "copy-clauses"):
        yield name, [_copy(name, index) for index in range(PER_PARADIGM)]


def _copy(name: str, index: int) -> Triple:
    things = shuffled(OBJECTS, name, index)[:6]
    people = shuffled(NAMES, name, index)[:4]
    stop = 1 + draw(name, "stop", index) % 3
    if name == "copy-list":
        once = ", ".join(things[:4])
        return f"{once}; {once}; {', '.join(things[:stop])},", things[stop], _rest(things[:4], stop)
    if name == "copy-long":
        once = " ".join(things)
        return f"{once} {once} {' '.join(things[: stop + 2])}", things[stop + 2], _rest(things, stop + 2)
    if name == "copy-names":
        once = " and ".join(people)
        again = " and ".join(people[:stop])
        return f"First came {once}. Then came {once}. Then came {again} and", people[stop], _rest(people, stop)
    if name == "copy-sentence":
        start = f"{people[0]} put the {things[0]} beside the {things[1]} and the"
        return f"{start} {things[2]}. I repeat: {start}", things[2], _rest(things[:4], 2)
    start = f"{people[0]} has a {things[0]} and {people[1]} has a"
    return f"{start} {things[1]}. Yes, {start}", things[1], _rest(things[:4], 1)


def _rest(options: Sequence[str], right: int) -> tuple[str, ...]:
    return tuple(option for at, option in enumerate(options) if at != right)[:3]


def rows() -> list[dict[str, object]]:
    """The items, PER_PARADIGM for each paradigm, gold positions in equal numbers within each paradigm."""
    found: list[dict[str, object]] = []
    for family in (agreement(), grammar(), facts(), copying()):
        for name, triples in family:
            if len(triples) != PER_PARADIGM or len({prompt for prompt, _, _ in triples}) != PER_PARADIGM:
                raise ValueError(f"{name}: {len(triples)} items or doubled prompts, expected {PER_PARADIGM}")
            order = shuffled(range(PER_PARADIGM), name, "gold")
            for index, (prompt, answer, wrong) in enumerate(triples):
                size = 1 + len(wrong)
                choices = _place(answer, wrong, order[index] % size, name, index)
                found.append(
                    {
                        "id": f"retention-{len(found):05d}",
                        "cluster": name,
                        "prompt": prompt,
                        "answer": answer,
                        "choices": choices,
                        "gold": choices.index(answer),
                    }
                )
    return found


def _place(answer: str, wrong: tuple[str, ...], gold: int, *parts: object) -> list[str]:
    """Choices of a minimal pair (two) or of four."""
    if len(wrong) == 1:
        return [answer, *wrong] if gold == 0 else [*wrong, answer]
    return place(answer, wrong, gold, *parts)
