"""Contradictions between bricks: prompts that the texts of two bricks share and answer differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from workbench.bricks.brick import Brick
from workbench.errors import UsageError, nearest
from workbench.library.route_statistics import trained_on
from workbench.models.texts import Text, read_texts
from workbench.run.routers import card_folder

LEAST_SHARED = 8
"""Fewest shared prompts from which a contradiction is concluded."""
CONTRADICTING = 0.5
"""Share of shared prompts with different answers from which two bricks contradict each other."""


@dataclass(frozen=True)
class Shared:
    """Prompts that the texts of two bricks share.

    Attributes:
        prompts: Number of shared prompts.
        different: Number of those for which the bricks have no answer in common.
        example: A shared prompt with different answers, and an answer of each brick; None if there is none.
    """

    prompts: int
    different: int
    example: tuple[str, str, str] | None = None

    @property
    def contradicts(self) -> bool:
        """True if enough prompts are shared and most of them have different answers."""
        return self.prompts >= LEAST_SHARED and self.different > CONTRADICTING * self.prompts


def own_texts(bricks: Mapping[str, Brick], files: Mapping[str, Path]) -> dict[str, list[Text]]:
    """Return each brick's own texts: those of a file that the user names, or its training texts.

    Args:
        bricks: Name -> brick.
        files: Name -> jsonl file of prompts with answers.

    Returns:
        Name -> texts. A brick whose card names no training file that is here is left out.

    Raises:
        WorkbenchError: If a file is invalid or its name is not that of a brick.
    """
    if unknown := [name for name in files if name not in bricks]:
        raise UsageError(f"--texts {unknown[0]}=: no such brick among those named. {nearest(unknown[0], bricks)}")
    texts = {}
    for name, brick in bricks.items():
        if name in files:
            texts[name] = read_texts(files[name], str(files[name]))
        elif brick.card is not None:
            try:
                found = trained_on(card_folder(brick), brick.card)
            except UsageError:
                continue
            texts[name] = read_texts(found.file, found.label)
    return texts


def shared_prompts(texts: Mapping[str, list[Text]]) -> dict[tuple[str, str], Shared]:
    """Compare the answers of each pair of bricks to the prompts that both have.

    Prompts and answers are compared without differences in case and white space. Texts without a prompt do not count.

    Args:
        texts: Brick -> its texts.

    Returns:
        Pair of bricks, in the given order -> what they share.
    """
    answers = {name: _answers(rows) for name, rows in texts.items()}
    return {(one, two): _shared(answers[one], answers[two]) for one, two in combinations(answers, 2)}


def _shared(one: Mapping[str, set[str]], two: Mapping[str, set[str]]) -> Shared:
    common = [prompt for prompt in one if prompt in two]
    different = [prompt for prompt in common if not one[prompt] & two[prompt]]
    example = (different[0], min(one[different[0]]), min(two[different[0]])) if different else None
    return Shared(len(common), len(different), example)


def _answers(rows: list[Text]) -> dict[str, set[str]]:
    """Return prompt -> its answers, both without differences in case and white space."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if prompt := _plain(row.prompt):
            found.setdefault(prompt, set()).add(_plain(row.answer))
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
