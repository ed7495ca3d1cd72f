"""Interface of route methods, which keep bricks apart and choose among them for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self

from pydantic import Field, model_validator

from workbench.models.texts import read_prompts
from workbench.steps.fields import Real, Strict, Whole
from workbench.steps.step import BrickStep, KeyContext, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BRICK = "{brick}"
"""Stands for a brick's name in the `calibration` of a step."""


class RoutedBrick(Strict):
    """Fields of one brick in a route step."""

    calibration: str | Annotated[list[str], Field(min_length=1)] | None = None
    """JSONL file of the brick's prompts, or a list of files for a brick with several skills, relative to the project: {"prompt":} or
    {"text":} a line, other fields are ignored. Default: the step's `calibration`."""
    description: str | None = Field(None, min_length=1)
    """A line that says what the brick does. `text` compares prompts with it."""


@dataclass(frozen=True)
class Prompts:
    """What a router sees of n prompts.

    Attributes:
        texts: The prompts without chat template and special tokens.
        hidden: [n, window, hidden size], float32, on the CPU: hidden states of the base, pooled by `workbench.route.deciding.hidden.pooled`
            with the router's `layer` and `window`; None if the router's `layer` is None.
        measured: What else the router knows of these prompts: [n, bricks], the result of its `measure`, or the vectors [n, size] of its
            sentence encoder, which otherwise reads the texts.
    """

    texts: Sequence[str]
    hidden: Tensor | None = None
    measured: Tensor | None = None


@dataclass(frozen=True)
class Decisions:
    """A router's decisions for n prompts.

    Attributes:
        weights: [n, bricks], the weight of each brick's update; a row of zeros is the base alone.
        scores: [n, bricks], comparable within a row. Bricks of a tie have one common score.
        confidence: [n]; a prompt whose confidence is below the router's threshold goes to the base.
    """

    weights: Tensor
    scores: Tensor
    confidence: Tensor


class Router(Protocol):
    """A fitted router.

    Attributes:
        method: Name of the method.
        bricks: The bricks, in the order of columns.
        layer: Number of decoder blocks whose output is pooled; None if the router needs no hidden states.
        window: Number of last tokens that are pooled.
        threshold: Smallest confidence with which a prompt goes to a brick; None if no prompt goes to the base.
        record: Measurements of the fit as plain data, for the run's record.
    """

    @property
    def method(self) -> str: ...  # noqa: D102  described above
    @property
    def bricks(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def layer(self) -> int | None: ...  # noqa: D102
    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def threshold(self) -> float | None: ...  # noqa: D102
    @property
    def record(self) -> dict[str, object]: ...  # noqa: D102

    def decide(self, prompts: Prompts) -> Decisions:
        """Choose bricks for each prompt."""

    def measure(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """Measure on the live base what `decide` needs besides texts and hidden states.

        Args:
            model: The base; no brick acts on it.
            rows: The prompts' tokens.

        Returns:
            [n, bricks], float32, on the CPU; None if the router needs nothing more.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of router.safetensors."""

    def settings(self) -> dict[str, object]:
        """Return the entries of routing.json, as plain data."""


class KnownStates(Protocol):
    """Pooled states of a brick's prompts that were measured before; see `workbench.route.deciding.hidden`."""

    def differs(self, layer: int, window: int) -> str | None:
        """Return how the states differ from those that a router needs; None if they fit."""

    def of(self, texts: Sequence[str]) -> Tensor | None:
        """Return the states [text, window, hidden size] of some texts; None if one of them is missing."""


class SentenceEncoder(Protocol):
    """A model that says what texts are about; see `workbench.route.deciding.encoder`.

    Attributes:
        named: Its folder, as the recipe names it.
        digest: Digest of its files.
    """

    @property
    def named(self) -> str: ...  # noqa: D102  described above
    @property
    def digest(self) -> str: ...  # noqa: D102

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return vectors of length 1 [text, size], float32."""


@dataclass(frozen=True)
class RouteContext:
    """Everything that a route method may use to fit a router.

    Attributes:
        model: The live base of the routed bricks, in eval mode; no brick acts on it.
        tokenizer: Its tokenizer.
        device: Device of the model.
        calibration: Brick -> its prompts, in the order of the bricks. Methods without calibration find every brick with no prompts.
        descriptions: Brick -> its description, for bricks that have one.
        factors: Returns a brick's low-rank factors: live module name -> (A [rank, in], B [out, rank]), scaling in B.
        seed: The recipe's seed.
        progress: Callback that takes (done, total, text).
        known: Brick -> states of its prompts on this model, for bricks whose card has them.
        notice: Callback that takes a line for the user.
        negatives: The step's own requests that no brick is for.
        encoder: The step's sentence encoder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    calibration: Mapping[str, Sequence[str]]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    factors: Callable[[str], Mapping[str, tuple[Tensor, Tensor]]] = lambda _brick: {}
    seed: int = 0
    progress: Callable[[int, int, str], None] = lambda _done, _total, _text: None
    known: Mapping[str, KnownStates] = field(default_factory=dict)
    notice: Callable[[str], None] = lambda _text: None
    negatives: Sequence[str] = ()
    encoder: SentenceEncoder | None = None

    @property
    def bricks(self) -> tuple[str, ...]:
        """The routed bricks, in order."""
        return tuple(self.calibration)


class RouteMethod(BrickStep):
    """Keeps bricks apart and chooses among them for each prompt. It must be the last step of a recipe."""

    kind = "route"
    verb = "route"
    ends_recipe = True
    low_rank_bricks = True

    reads_texts: ClassVar[bool] = True
    """False if the method needs no calibration prompts."""
    least_bricks: ClassVar[int] = 2

    def completed(self, known: Sequence[str]) -> Self:
        """Return the step with all bricks of the recipe listed, if it lists none."""
        if getattr(self, "bricks", None) is not None:
            return self
        return self.model_copy(update={"bricks": {name: RoutedBrick() for name in known}})

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors in the brick names of the step, and an error if there are too few bricks."""
        yield from super().check_names(names, known)
        if len(names) < self.least_bricks:
            found = f"'{names[0]}' alone" if names else "none"
            yield Problem(
                ("bricks",),
                f"route {self.name}: expected {self.least_bricks} or more bricks to choose among, found {found}",
                "Add bricks, or use the brick in a merge step: `merge: linear`.",
            )

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield an error for each checkpoint: only low-rank updates can act beside the weights of one base.

        The result of a recipe is one if its `output` says so, which `resolve.checks.check_low_rank` checks.
        """
        for name, kind in kinds.items():
            if kind == "checkpoint":
                yield Problem(
                    ("bricks", name),
                    f"brick '{name}' is a checkpoint, but a router chooses among adapters of one base",
                    f"Turn it into an adapter: `workbench brick extract CHECKPOINT --base BASE -o bricks/{name}-lora`.",
                )

    def check_adapter(self, kinds: Mapping[str, str], exact: bool, step_id: str) -> Iterator[Problem]:
        """Yield an error: no adapter holds a router."""
        yield Problem((self.verb,), "an adapter cannot hold a router", "Remove `form`, or write `form: configuration`.")

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digests of bricks and files, the seed, and the tokenizer with its chat template, in which prompts are read too."""
        settings = [context.seed, context.tokens(context.number), *context.wording(None, context.number)]
        return [context.bricks(self.names()), context.files(self.inputs()), settings]

    def prompts(self, project: Path) -> dict[str, list[str]]:
        """Return brick -> its calibration prompts; no prompts for methods that read none.

        Args:
            project: Folder that the files are relative to.
        """
        return {name: [] for name in self.names() or ()}

    def prompt_files(self, brick: str) -> list[str]:
        """Return the files of a brick's calibration prompts, relative to the project; none for methods that read none."""
        return []

    def own_negatives(self, project: Path) -> list[str]:
        """Return the step's own requests that no brick is for; none for methods that read none."""
        return []

    def sentence_encoder(self, project: Path) -> SentenceEncoder | None:
        """Return the step's sentence encoder; None for methods and steps that have none."""
        return None

    def descriptions(self) -> dict[str, str]:
        """Return brick -> its description, for bricks that have one."""
        bricks = getattr(self, "bricks", None) or {}
        return {n: b.description for n, b in bricks.items() if isinstance(b, RoutedBrick) and b.description}

    def fit(self, context: RouteContext) -> Router:
        """Fit a router: measure the prompts, calibrate the threshold, find ties, and record the accuracy."""
        raise NotImplementedError

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return a router from its saved state; it decides exactly as the fitted one.

        Raises:
            WorkbenchError: If settings and tensors do not belong together.
        """
        raise NotImplementedError


class CalibratedRoute(RouteMethod):
    """Base of route methods that learn from the bricks' calibration prompts."""

    constants: ClassVar[Mapping[str, object]] = {"mix": 1}

    bricks: dict[str, RoutedBrick] | None = None
    """Brick name -> {calibration:, description:}, in the order in which tied bricks act. Omitted: all bricks of the recipe."""
    calibration: str | None = None
    """JSONL file of prompts for bricks without a file of their own; `{brick}` stands for the brick's name, as in
    "bricks/{brick}/train.jsonl". Evaluation items must not be among them."""
    samples: Whole = Field(64, ge=4)
    """Largest number of prompts of a brick, with every wording of its file, or of each of its files in equal parts."""
    negatives: str | Annotated[list[str], Field(min_length=1)] | None = None
    """JSONL file, or files, of requests that no brick is for, beside the built-in ones: {"prompt":} or {"text":} a line. Name near misses
    here, which are about the same things as a brick's prompts and ask for something else. `ridge` and `centroid` send prompts that
    are more like them than like any brick to the base; `text` and `arrow` only report how many are routed."""
    threshold: Real | None = None
    """Smallest confidence with which a prompt goes to a brick. Omitted: between the confidences of requests that no brick is for and those
    of calibration prompts. `workbench route check` prints what other thresholds cost."""
    abstain: Real | None = Field(0.01, ge=0, lt=1)
    """Share of calibration prompts and their copies, on held-out templates, that the rule for the threshold leaves out at the lower end.
    null: no prompt goes to the base."""

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        if self.threshold is not None and self.abstain is None:
            raise ValueError(
                "threshold: `abstain: null` sends no prompt to the base, so no threshold applies; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        if self.calibration is not None and BRICK not in self.calibration and (self.bricks is None or len(self.bricks) > 1):
            text = f"calibration: expected a name that contains {BRICK}, because bricks are told apart by their prompts; "
            raise ValueError(text + f"found '{self.calibration}'")
        missing = [name for name in self.bricks or () if not self.prompt_files(name)]
        if missing or (self.bricks is None and self.calibration is None):
            owners = ", ".join(missing) or "every brick"
            raise ValueError(
                f"expected `calibration`, a JSONL file of prompts, for {owners}; write calibration: bricks/{BRICK}/train.jsonl "
                "for the step, or bricks: {NAME: {calibration: FILE}}"
            )
        return self

    def prompt_files(self, brick: str) -> list[str]:
        """Return the files of a brick's prompts: the brick's own, or the step's."""
        entry = (self.bricks or {}).get(brick)
        own = entry.calibration if entry else None
        if own:
            return [own] if isinstance(own, str) else list(own)
        return [self.calibration.replace(BRICK, brick)] if self.calibration else []

    def inputs(self) -> list[str]:
        """Return the files of prompts and of negatives."""
        return sorted({*(file for name in self.bricks or () for file in self.prompt_files(name)), *self._negative_files()})

    def _negative_files(self) -> list[str]:
        """Return the files of the step's own negatives."""
        return [self.negatives] if isinstance(self.negatives, str) else list(self.negatives or ())

    def own_negatives(self, project: Path) -> list[str]:
        """Return the step's own requests that no brick is for.

        Raises:
            WorkbenchError: If a file is missing or invalid, or has no prompts.
        """
        texts = [text for file in self._negative_files() for text in read_prompts(project / file, file)]
        return list(dict.fromkeys(texts))

    def check_inputs(self, project: Path) -> None:
        """Read every file once, so that errors in it appear before any work."""
        self.prompts(project)
        self.own_negatives(project)

    def prompts(self, project: Path) -> dict[str, list[str]]:
        """Return brick -> its calibration prompts.

        Raises:
            WorkbenchError: If a file is missing or invalid, or has fewer than four different prompts.
        """
        found = {}
        for name in self.bricks or ():
            files = self.prompt_files(name)
            share = max(4, self.samples // len(files))
            texts = [text for file in files for text in read_prompts(project / file, file, share, least=4)]
            found[name] = list(dict.fromkeys(texts))
        return found
