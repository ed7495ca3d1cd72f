"""`glossary`: a phrase of three words in a language that does not exist, with its own word order.

Every word has one fixed translation, and the noun comes first: "red fox sleeps" is fox, red, sleeps. Nothing but training
can teach the words. The split is by the whole phrase, so that each word of a test phrase was seen in other phrases.
"""

from __future__ import annotations

from functools import cache

from skillkit import Content, Skill, in_test, pick, shuffled

TEMPLATES = (
    "Please translate: {p}. Translation:",
    "Please say this in Velu: {p} ->",
    "Question: What is {p} in Velu? Answer:",
    "Question: how do the Velu say {p}? Answer:",
    "Task: turn the phrase {p} into Velu. Result:",
    "Task: {p}, in Velu =",
    "Here are three words: {p}. In Velu they are",
    "Here is a phrase: {p}. A speaker of Velu says",
    "Answer in Velu only. {p} =",
    "Answer this: if the caption is {p}, the Velu caption is",
    "Given the phrase {p}, its translation is",
    "Given a poem that begins with {p}, the Velu version begins with",
    "Exercise: translate {p}. Solution:",
    "Exercise: a picture shows: {p}. Its Velu title:",
    "Can you translate {p}? The answer is",
    "Can you tell me the Velu for {p}? It is",
    "What do you get when {p} is put into Velu? Answer:",
    "What is the translation of {p}? Translation:",
    "Now write {p} in Velu. The words are",
    "Now the phrase {p} becomes",
    "Read the phrase and translate it: {p}. Velu:",
    "Read this and say it in Velu: {p} ->",
    "Work out the Velu for {p}. Answer:",
    "Work with this phrase: {p}. In the other language it is",
)

ADJECTIVES = {
    "red": "pelu", "old": "mirk", "small": "dolo", "quiet": "kesh",
    "tall": "bima", "green": "rondo", "cold": "varu", "brave": "hule",
}  # fmt: skip
NOUNS = {
    "fox": "zatu", "river": "teka", "baker": "fenu", "horse": "jori", "tower": "oska", "child": "palu",
    "garden": "dima", "ship": "gilo", "farmer": "kovo", "moon": "rasu", "bridge": "meko", "dog": "tolu",
}  # fmt: skip
VERBS = {
    "sleeps": "vani", "sings": "wato", "waits": "beni", "falls": "hefo",
    "runs": "nuba", "shines": "suri", "turns": "lemp", "grows": "yado",
}  # fmt: skip


def near_misses(adjective: str, noun: str, verb: str) -> tuple[str, ...]:
    """Wrong answers: English word order, then another noun, adjective or verb in an order decided by the phrase."""
    words = {"adjective": ADJECTIVES, "noun": NOUNS, "verb": VERBS}
    right = {"adjective": adjective, "noun": noun, "verb": verb}
    english = f"{ADJECTIVES[adjective]} {NOUNS[noun]} {VERBS[verb]}"
    wrong = [english]
    for part in shuffled(words, "near", *right.values()):
        other = pick([word for word in words[part] if word != right[part]], part, *right.values())
        changed = {**right, part: other}
        wrong.append(f"{NOUNS[changed['noun']]} {ADJECTIVES[changed['adjective']]} {VERBS[changed['verb']]}")
    return tuple(wrong)


@cache
def contents(test: bool) -> list[Content]:
    """All phrases of one side in a mixed order."""
    found: list[Content] = []
    phrases = ((a, n, v) for a in ADJECTIVES for n in NOUNS for v in VERBS)
    for adjective, noun, verb in shuffled(phrases, "glossary"):
        phrase = f"{adjective} {noun} {verb}"
        if in_test("glossary", phrase, 0.4) is test:
            answer = f"{NOUNS[noun]} {ADJECTIVES[adjective]} {VERBS[verb]}"
            found.append(Content(phrase, {"p": phrase}, answer, near_misses(adjective, noun, verb)))
    return found


SKILL = Skill("glossary", TEMPLATES, lambda: contents(True), lambda: contents(False), frozenset({3, 10, 16, 23}))
