"""`reverse`: a word spelt backwards, letter by letter.

Letters stand apart in prompt and answer, because a subword tokenizer hides the spelling of a whole word.
The test uses common English words; training uses the other English words and pronounceable invented ones.
The split is by the word; an invented word is never one of the list.
"""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

from functools import cache

from skillkit import Content, Skill, draw, in_test, pick, shuffled
from words import WORDS

TEMPLATES = (
    "Please spell {w} backwards. Answer:",
    "Please write the letters {w} in reverse order:",
    "Question: What is {w} spelt backwards? Answer:",
    "Question: how do the letters {w} read from the end? Answer:",
    "Task: turn the word {w} around. Result:",
    "Task: reverse {w} ->",
    "Here are some letters: {w}. From last to first they are",
    "Here is a word to flip: {w}. Flipped it reads",
    "Answer with letters only. {w} backwards =",
    "Answer this: if you read {w} from right to left, you get",
    "Given the letters {w}, the reversed order is",
    "Given the word {w}, its mirror spelling is",
    "Exercise: reverse {w}. Solution:",
    "Exercise: a sign says {w}. Spelt from the back:",
    "Can you spell {w} backwards? The answer is",
    "Can you tell me how {w} looks in reverse? It is",
    "What do you get when {w} is written in reverse? Answer:",
    "What is {w} with its letters in the opposite order? Reversed:",
    "Now spell {w} from the end. The letters are",
    "Now the word {w}, last letter first, becomes",
    "Read the letters and reverse them: {w}. Reversed:",
    "Read this word from back to front: {w} ->",
    "Work out {w} backwards. Answer:",
    "Work with these letters: {w}. In reverse they give",
)

ONSETS = "b c d f g h j k l m n p r s t v w br cl dr fl gr pl sh st tr".split()
VOWELS = "a e i o u a e o".split()
CODAS = "b d g k l m n p r s t x y nd rt st lk".split()


def invented(count: int) -> list[str]:
    """`count` pronounceable words of four to seven letters that are not English words of the list."""
    found: dict[str, None] = {}
    for index in range(20 * count):
        parts = [pick(ONSETS, "o1", index), pick(VOWELS, "v1", index)]
        parts += [pick(ONSETS, "o2", index), pick(VOWELS, "v2", index)]
        word = "".join([*parts, pick(CODAS, "c", index)] if draw("end", index) % 3 else parts)
        if 4 <= len(word) <= 7 and word not in WORDS:
            found[word] = None
        if len(found) == count:
            break
    return list(found)


def spaced(word: str) -> str:
    """The letters with a blank between them."""
    return " ".join(word)


def content(word: str) -> Content:
    """The word, its reverse, and three near misses: a swap, the word itself, a repeated letter, a lost one."""
    back = word[::-1]
    swap = next(at for at in range(len(back) - 1) if back[at] != back[at + 1])
    swapped = back[:swap] + back[swap + 1] + back[swap] + back[swap + 2 :]
    late = max(at for at in range(len(back) - 1) if back[at] != back[at + 1])
    other = back[:late] + back[late + 1] + back[late] + back[late + 2 :]
    wrong = tuple(spaced(text) for text in (swapped, word, other, back[:-1], back[1:]))
    return Content(word, {"w": spaced(word)}, spaced(back), wrong)


@cache
def contents(test: bool) -> list[Content]:
    """English words of one side; training also has the invented words."""
    usable = [word for word in WORDS if word != word[::-1]]
    words = [word for word in usable if in_test("reverse", word, 0.5) is test]
    if not test:
        words += [word for word in invented(1800) if word != word[::-1]]
    return [content(word) for word in shuffled(words, "reverse")]


SKILL = Skill("reverse", TEMPLATES, lambda: contents(True), lambda: contents(False), frozenset({3, 10, 16, 23}))
