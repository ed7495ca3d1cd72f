"""brick.yaml and the README header of a brick: what it is, where it comes from, its license."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from workbench import yamldoc
from workbench.bricks.hub import CARD
from workbench.files import write_text
from workbench.steps.fields import NAME, Strict
from workbench.yamltree import top_scalars

Measured = Annotated[float, Field(allow_inf_nan=True)]
"""A score; its interval may have no ends."""


class BaseRecord(Strict):
    """The base that a brick was made on."""

    id: str
    """Directory or hub id."""
    title: str | None = None
    """What it is, for people."""
    digest: str | None = None
    """Measured digest of its weights and configuration."""
    aliases: tuple[str, ...] = ()
    """Other hub ids, directories or digests of the same base."""


class Score(Strict):
    """A held-out score of the brick alone on its base."""

    task: str
    metric: str
    n: int
    value: Measured
    low: Measured
    high: Measured
    base_value: Measured | None = None
    """The base's score on the same items."""


class BrickCard(Strict):
    """brick.yaml: what a brick is, what it was made on and from, how well it does alone."""

    version: Literal[1]
    name: str = Field(pattern=NAME)
    kind: Literal["adapter", "checkpoint", "edit"]
    skill: str = ""
    """What it teaches, in a line."""
    base: BaseRecord
    files: str = "."
    """Directory of the weights, relative to the card."""
    digest: str | None = None
    """Digest of the weights."""
    prompt_format: str = ""
    """How its prompts look."""
    generator: str | None = None
    """What made its items."""
    licence: str | None = None
    """Licence of weights and items."""
    data_licences: dict[str, str] = {}
    """Data set that it was trained on -> its licence, where that is not the licence above."""
    training: dict[str, Any] = {}
    """How it was trained: settings and measured record."""
    extraction: dict[str, Any] = {}
    """How it was taken from a checkpoint: rank, relative error, weights saved whole or dropped."""
    scores: tuple[Score, ...] = ()


def read_card(path: Path) -> BrickCard:
    """brick.yaml of a directory, validated."""
    return yamldoc.load(path / CARD).validate(BrickCard)


def write_card(path: Path, card: BrickCard, *, made_by: str = "workbench brick train", record: str = "train.yaml") -> None:
    """Write brick.yaml; its first line says what made it and where settings or measurements stand."""
    data = card.model_dump(mode="json", exclude_defaults=True)
    text = yamldoc.dump({"version": 1, **data}, width=120)
    what = {"train.yaml": "settings stand", "edit.json": "how it was solved stands"}.get(record, "every tensor's error stands")
    write_text(path / CARD, f"# Written by `{made_by}`; {what} in {record}.\n" + text)


def library(project: Path) -> list[tuple[str, BrickCard]]:
    """The bricks of a project's `bricks/` folder, by name."""
    return [(card.parent.name, read_card(card.parent)) for card in sorted((project / "bricks").glob(f"*/{CARD}"))]


def read_licence(path: Path) -> str | None:
    """`license:` of a README's YAML header."""
    return _readme_header(path).get("license")


def read_title(path: Path) -> str | None:
    """`model_name:` of a README's YAML header: what a model is called in cards."""
    return _readme_header(path).get("model_name")


def _readme_header(path: Path) -> dict[str, str]:
    """The texts and numbers at the header's top level, as they are written; none where it is no header that YAML reads."""
    readme = path / "README.md"
    if not readme.is_file():
        return {}
    with readme.open("rb") as stream:
        text = stream.read(yamldoc.MAX_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    match = re.match(r"---[ \t]*\n(.*?)(\n---|\Z)", text, re.DOTALL)
    return top_scalars(match[1]) if match else {}
