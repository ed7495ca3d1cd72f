"""Cards of bricks: purpose, origin, license and scores from brick.yaml and the header of a README, and the axes along which bricks differ.

The axes are origin and granularity (Xiao et al. 2024, Configurable Foundation Models, arXiv 2409.02877), and the four of Modular Deep
Learning (Pfeiffer et al. 2023, arXiv 2302.11529). A card may state an axis. What it does not state follows from the brick's kind and files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field

from workbench.ground import yamldoc
from workbench.ground.files import write_text
from workbench.ground.foreign_names import CARD
from workbench.ground.results import JsonObject
from workbench.ground.yamltree import top_scalars
from workbench.steps.fields import NAME, Strict

Origin: TypeAlias = Literal["customized", "emergent"]
Granularity: TypeAlias = Literal["neuron", "group", "layer", "model"]
Computation: TypeAlias = Literal["low_rank_update", "structured_update", "weights", "neuron_mask", "memory"]
Routing: TypeAlias = Literal["none", "task", "sequence", "token"]
Aggregation: TypeAlias = Literal["parameter_sum", "representation_sum", "none"]
Training: TypeAlias = Literal["joint", "continual", "post_hoc", "none"]


class Axes(Strict):
    """Place of a brick among all kinds of bricks. Omitted fields follow from its kind and its files."""

    origin: Origin | None = None
    """`customized`: made by training or editing. `emergent`: a part of the pretrained model itself."""
    granularity: Granularity | None = None
    """Smallest part of a model that the brick consists of: single neurons, groups of neurons such as experts, updates of layers, or a
    whole model."""
    computation: Computation | None = None
    """Computation function: a low-rank update (LoRA), another structured update (LoKr, OFT, ...), whole weights, a mask over neurons, or
    a memory beside the model."""
    routing: Routing | None = None
    """Level at which a router selects the brick; `none` if it is always active."""
    aggregation: Aggregation | None = None
    """How the brick is combined with others: sum of parameters, weighted sum of outputs, or not at all."""
    training: Training | None = None
    """When the brick was trained: together with others (`joint`), after others and with regard to them (`continual`), alone on a
    finished base (`post_hoc`), or never (`none`)."""

    def stated(self) -> dict[str, str]:
        """Return axis -> value for the axes that are set."""
        return {name: value for name, value in self if value is not None}


_ROUTING = ("none", "task", "sequence", "token")
_TRAINED = ("post_hoc", "continual", "joint")
_SUMMED = ("parameter_sum", "representation_sum")
# Kind of brick -> axis -> possible values; the first is the default.
_POSSIBLE: dict[str, dict[str, tuple[str, ...]]] = {
    "adapter": {
        "origin": ("customized",),
        "granularity": ("layer",),
        "computation": ("low_rank_update", "structured_update"),
        "routing": _ROUTING,
        "aggregation": _SUMMED,
        "training": _TRAINED,
    },
    "checkpoint": {
        "origin": ("customized",),
        "granularity": ("model",),
        "computation": ("weights",),
        "routing": _ROUTING,
        "aggregation": _SUMMED,
        "training": _TRAINED,
    },
    "neurons": {
        "origin": ("emergent",),
        "granularity": ("neuron", "group"),
        "computation": ("neuron_mask",),
        "routing": _ROUTING,
        "aggregation": ("none", "representation_sum"),
        "training": ("none",),
    },
}
_POSSIBLE["edit"] = _POSSIBLE["adapter"]


def axes_of(
    kind: str, stated: Axes, training: Mapping[str, object] | None = None, *, tuner: str | None = None, experts: bool = False
) -> dict[str, str]:
    """Return axis -> value of a brick: what its card states, and what follows from its kind and files.

    Args:
        kind: Kind of the brick.
        stated: The axes on its card.
        training: Settings of its training.
        tuner: `peft_type` of an adapter; None if unknown.
        experts: True if a set of neurons consists of experts.
    """
    values = {axis: possible[0] for axis, possible in _POSSIBLE[kind].items()}
    if tuner is not None and tuner.upper() not in ("LORA", "ADALORA"):
        values["computation"] = "structured_update"
    if (training or {}).get("orthogonal_to"):
        values["training"] = "continual"
    if experts:
        values |= {"granularity": "group", "routing": "token", "aggregation": "representation_sum"}
    return values | stated.stated()


def contradiction(kind: str, stated: Axes) -> tuple[str, str] | None:
    """Return the first axis on a card that a brick of this kind cannot have, with an explanation; None if there is none."""
    for axis, value in stated.stated().items():
        if value not in (possible := _POSSIBLE[kind][axis]):
            return axis, f"a brick of kind {kind} has {axis} {' or '.join(possible)}, found {value}"
    return None


Measured = Annotated[float, Field(allow_inf_nan=True)]
"""A score or a bound of its interval, which may be infinite or NaN."""


class BaseRecord(Strict):
    """The base that a brick was made on."""

    id: str
    """Directory or hub id of the base."""
    title: str | None = None
    """Readable name of the base."""
    digest: str | None = None
    """Digest of the base's weights and configuration, measured when the brick was made."""
    aliases: tuple[str, ...] = ()
    """Other hub ids, directories or digests of the same base."""


class Score(Strict):
    """A score of the brick alone on its base, on held-out items."""

    task: str
    """Name of the task."""
    metric: str
    """Name of the metric."""
    n: int
    """Number of items."""
    value: Measured
    """Score in the metric's units."""
    low: Measured
    """Lower end of the 95 % interval."""
    high: Measured
    """Upper end of the interval."""
    base_value: Measured | None = None
    """The base's score on the same items."""


class RoutingStatistics(Strict):
    """Statistics of the brick's calibration prompts beside the card, from which routers are fitted without running the base."""

    file: str = "routing.safetensors"
    """File beside the card: pooled hidden states of the prompts and their copies, digests of the texts."""
    digest: str
    """Digest of the file's tensors."""
    base: str
    """Digest of the weights of the model that was run, in its data type."""
    tokenizer: str
    """Digest of its tokenizer."""
    layer: int = Field(ge=1)
    """Number of decoder blocks whose output was pooled."""
    window: int = Field(ge=1)
    """Number of last tokens that were pooled."""
    pooling: int
    """Version of the pooling."""
    prompts: int = Field(ge=1)
    """Number of prompts, without their copies."""
    source: str
    """File of the prompts."""


class BrickCard(Strict):
    """The content of brick.yaml: purpose of a brick, its base, its training, and its score alone."""

    version: Literal[1]
    name: str = Field(pattern=NAME)
    kind: Literal["adapter", "checkpoint", "edit", "neurons"]
    skill: str = ""
    """One line that describes the skill that the brick adds."""
    functions: tuple[str, ...] = ()
    """Functions that the brick serves, such as "math", as labels that other bricks use too."""
    axes: Axes = Axes()
    """Origin, granularity, computation, routing, aggregation and training, where they do not follow from the kind and the files."""
    base: BaseRecord
    files: str = "."
    """Directory of the weights, relative to the card."""
    digest: str | None = None
    """Digest of the weights."""
    prompt_format: str = ""
    """Format of the brick's prompts."""
    generator: str | None = None
    """Program that generated the brick's training data."""
    licence: str | None = None
    """License of the weights and of the training data."""
    data_licences: dict[str, str] = {}
    """Training data set -> its license, for data sets whose license differs from `licence`."""
    training: dict[str, object] = {}
    """Settings and measurements of the training."""
    extraction: dict[str, object] = {}
    """Record of the extraction from a checkpoint: rank, relative error, weights saved whole or dropped."""
    transplant: dict[str, object] = {}
    """Record of the transplant from another model: the brick and its base, how units were matched, what was carried."""
    scores: tuple[Score, ...] = ()
    routing: RoutingStatistics | None = None
    """Statistics for routers, if they were measured."""


def read_card(path: Path) -> BrickCard:
    """Read and validate the brick.yaml of a directory.

    Raises:
        WorkbenchError: If the file is invalid, or `axes` contradict the kind.
    """
    document = yamldoc.load(path / CARD)
    card = document.validate(BrickCard)
    if wrong := contradiction(card.kind, card.axes):
        raise document.error(("axes", wrong[0]), wrong[1], f"Remove the line: the tool fills in `{wrong[0]}`.")
    return card


class ShownCard(JsonObject):
    """A brick's card. A brick without a card has only `name` and `kind`."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    version: Literal[1] | None = None
    """Version of the card's format."""
    name: str
    """Name of the brick."""
    kind: str
    """adapter, checkpoint, edit or neurons."""
    skill: str | None = None
    """One line that describes the skill that the brick adds."""
    base: BaseRecord | None = None
    """The base that the brick was made on."""
    files: str | None = None
    """Directory of the weights, relative to the card."""
    digest: str | None = None
    """Digest of the weights."""
    prompt_format: str | None = None
    """Format of the brick's prompts."""
    generator: str | None = None
    """Program that generated the training data."""
    licence: str | None = None
    """License of the weights and of the training data."""
    data_licences: dict[str, str] | None = None
    """Training data set -> its license, for data sets whose license differs from `licence`."""
    training: dict[str, object] | None = None
    """Settings and measurements of the training."""
    extraction: dict[str, object] | None = None
    """Record of the extraction from a checkpoint."""
    transplant: dict[str, object] | None = None
    """Record of the transplant from another model."""
    scores: list[Score] | None = None
    """Scores of the brick alone."""
    functions: list[str] | None = None
    """Functions that a set of neurons serves."""
    routing: RoutingStatistics | None = None
    """Statistics for routers; null if none were measured."""
    axes: dict[str, str] | None = None
    """Axis (origin, granularity, computation, routing, aggregation, training) -> the brick's value."""

    def to_dict(self) -> dict[str, object]:
        """Return the card as plain data, without the fields that a brick without a card lacks."""
        return self.model_dump(mode="json", exclude_unset=True, warnings=False)


def card_document(card: BrickCard) -> dict[str, object]:
    """Return a card as plain data, with all axes filled in."""
    return {**card.model_dump(mode="json"), "axes": axes_of(card.kind, card.axes, card.training)}


def write_card(path: Path, card: BrickCard, *, made_by: str = "workbench brick train", record: str = "train.yaml") -> None:
    """Write brick.yaml. A comment in the first line names the command and the file that records the details."""
    data = card.model_dump(mode="json", exclude_defaults=True)
    text = yamldoc.dump({"version": 1, **data}, width=120)
    contents = {
        "train.yaml": "the settings",
        "edit.json": "how it was solved",
        "neurons.json": "how the neurons were chosen",
        "transplant.json": "what was carried",
    }
    content = contents.get(record, "the error of every tensor")
    write_text(path / CARD, f"# Written by `{made_by}`. See {record} for {content}.\n" + text)


# A path from the root, a home or above the project. A letter before the slash makes it a part of an address or of a name.
_SEGMENT = r"/[\w.@+={}*?%\\-]+"
_OUTSIDE = re.compile(r"(?:/[^/\n]+|~|\.\.)/.*[^/\n].*")  # a whole text that is such a path, perhaps with spaces
_PATH = re.compile(rf"(?<![\w./:~\\-])(?:~[\w.-]*(?:{_SEGMENT})+|\.\.(?:{_SEGMENT})+|(?:{_SEGMENT}){{2,}})")


def without_paths(text: str, project: Path, document: object = None) -> str:
    """Return a text for others: paths inside the project start at the project, and others are the last name alone.

    Args:
        text: The text.
        project: The project.
        document: Data whose texts may be paths, such as the recipe: these paths may have spaces.
    """
    texts = [json.loads(text) for text in re.findall(r'"(?:\\.|[^"\\])*"', json.dumps(document))]
    for path in sorted((one for one in texts if _OUTSIDE.fullmatch(one)), key=len, reverse=True):
        text = text.replace(path, _name(path, project))
    text = text.replace(f"{project}/", "").replace(str(project), project.name)
    if len(home := os.path.expanduser("~")) > 1:  # noqa: PTH111 (pathlib raises without a home)
        text = text.replace(f"{home}/", "~/")
    return _PATH.sub(lambda match: _name(match[0], project), text)


def renamed(document: Any, project: Path) -> Any:
    """Return data with each of its texts for others; see `without_paths`."""
    if isinstance(document, Mapping):
        return {key: renamed(value, project) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [renamed(value, project) for value in document]
    return without_paths(document, project, document) if isinstance(document, str) else document


def _name(path: str, project: Path) -> str:
    place = Path(path)
    return place.relative_to(project).as_posix() if project in place.parents else place.name or path


def library(project: Path) -> list[tuple[str, BrickCard]]:
    """Return (name, card) of every brick in a project's `bricks/` folder, sorted by name."""
    return [(card.parent.name, read_card(card.parent)) for card in sorted((project / "bricks").glob(f"*/{CARD}"))]


def read_licence(path: Path) -> str | None:
    """Return `license` from the YAML header of a directory's README, or None."""
    return readme_header(path).get("license")


def read_title(path: Path) -> str | None:
    """Return `model_name` from the YAML header of a directory's README, which cards show as the title, or None."""
    return readme_header(path).get("model_name")


def readme_header(path: Path) -> dict[str, str]:
    """Return the top-level strings and numbers of a README's YAML header as written, or nothing if there is no valid header."""
    readme = path / "README.md"
    if not readme.is_file():
        return {}
    with readme.open("rb") as stream:
        text = stream.read(yamldoc.MAX_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    match = re.match(r"---[ \t]*\n(.*?)(\n---|\Z)", text, re.DOTALL)
    return top_scalars(match[1]) if match else {}


def level(score: Score, value: float | None, decimals: int = 1) -> str:
    """Return a value in the units of a score: a share in percent, any other metric as it is; empty if there is none."""
    from workbench.scores.tasks import LOWER

    if value is None:
        return ""
    share = score.metric not in LOWER and all(0 <= v <= 1 for v in (score.value, score.base_value or 0.0))
    return f"{100 * value:.{decimals}f}" if share else f"{value:.4g}"
