"""The question behind a prompt: "The capital of X is", "X's capital is" and "What is the capital of X?" have one name."""

from __future__ import annotations

import re
from functools import cache

from workbench.facts.facts import SLOT, folded

_SLOT = re.escape(SLOT)
_NOUN = r"(?P<noun>[\w-]+(?: [\w-]+){0,5}?)"
_IS = r"(?P<tense>is|was|are|were)"
_ASKING = rf"(?:what|who|which)(?: {_IS}|'s)"
_NAMED = r"(?: called| named)?"
# Forms of questions for a noun, "the official language of X".
_NOUN_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?:name|state|give|tell me) the {_NOUN} of {_SLOT}",
        rf"(?:the )?{_NOUN} of {_SLOT}(?: {_IS}{_NAMED})?",
        rf"{_SLOT}'s {_NOUN}(?: {_IS}{_NAMED})?",
        rf"{_ASKING} (?:the )?{_NOUN} of {_SLOT}{_NAMED}",
        rf"{_ASKING} {_SLOT}'s {_NOUN}{_NAMED}",
        rf"(?:name|state|give|tell me) {_SLOT}'s {_NOUN}",
    )
)
# Forms of questions for who did something: "X was designed by".
_VERB_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"{_SLOT},? {_IS} (?P<participle>[\w-]+) by",
        rf"{_SLOT}, (?P<participle>[\w-]+) by",
        rf"who (?P<past>[\w-]+) {_SLOT}",
        rf"who {_IS} {_SLOT} (?P<participle>[\w-]+) by",
        rf"by whom {_IS} {_SLOT} (?P<participle>[\w-]+)",
    )
)
_PARTICIPLES = {
    "wrote": "written",
    "drew": "drawn",
    "sang": "sung",
    "built": "built",
    "made": "made",
    "led": "led",
    "taught": "taught",
    "won": "won",
    "sold": "sold",
    "bought": "bought",
    "began": "begun",
    "found": "found",
}
# Words of clauses and questions: a text with one of them is no noun.
_CLAUSE = frozenset({"that", "which", "who", "whom", "whose", "where", "when", "what", "how", "is", "was", "are", "were"})


@cache
def question_of(prompt: str) -> tuple[str, str] | None:
    """Return what a prompt asks for, such as ("capital", "is") or ("designed", "was by"); None for a prompt of no known form.

    Two prompts with the same result ask the same question about their subject. "is" and "was" are different questions.

    Args:
        prompt: A prompt with `{subject}`.
    """
    text = _bare(prompt)
    for form in _NOUN_FORMS:
        if match := form.fullmatch(text):
            noun = re.sub(r"^(?:the )?(?:full )?name of (?:the )?", "", match["noun"])
            if not _CLAUSE & set(noun.split()):
                return noun, _tense(match, "is")
    for form in _VERB_FORMS:
        if match := form.fullmatch(text):
            verb = match.groupdict().get("participle") or _participle(match.groupdict().get("past") or "")
            return (verb, f"{_tense(match, 'was')} by") if verb else None
    return None


def _tense(match: re.Match[str], default: str) -> str:
    """Return "is" or "was" for a form's verb; the default if the form has none, as in "who designed X"."""
    verb = match.groupdict().get("tense") or default
    return {"are": "is", "were": "was"}.get(verb, verb)


def _bare(prompt: str) -> str:
    """Return a prompt without a mark of question and answer, and without the start of an answer ("…? It is")."""
    text = re.sub(r"^(?:q|question): ", "", folded(prompt).replace("’", "'"))
    question, mark, rest = text.partition("?")
    return question.strip() if mark and SLOT in question and len(rest.split()) <= 4 and SLOT not in rest else folded(text)


def _participle(past: str) -> str | None:
    """Return the participle of a verb in the past; None if it is no known one, as in "who is X"."""
    return _PARTICIPLES.get(past) or (past if past.endswith("ed") else None)
