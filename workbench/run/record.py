"""Results of runs: what `run` prints, the content of run.json, and rows of `runs ls`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, PrivateAttr

from workbench.ground.errors import GateFailedError
from workbench.ground.results import JsonObject, Number, OpenJsonObject, Result, absent
from workbench.ground.trust import Plugin

if TYPE_CHECKING:
    from workbench.facts.facts import Fact

SHOWN = 5
"""Number of facts that a line names."""


class FactsSaid(JsonObject):
    """Counts of the facts that a model says after an edit step."""

    facts: int
    """Number of facts that the step teaches."""
    said: int
    """Number of facts whose target the model says, by greedy decoding."""
    min_efficacy: Number
    """Smallest share of facts that the model must say, from 0 to 1."""
    not_said: list[str]
    """Ids of the facts that the model does not say."""

    @classmethod
    def count(cls, facts: Sequence[Fact], says_target: Sequence[bool], min_efficacy: float) -> Self:
        """Count the facts whose target a model says."""
        missing = [fact.id for fact, says in zip(facts, says_target, strict=True) if not says]
        return cls(facts=len(facts), said=sum(says_target), min_efficacy=min_efficacy, not_said=missing)

    @property
    def too_few(self) -> bool:
        """True if the model says fewer facts than the step requires."""
        return self.said < self.min_efficacy * self.facts

    @property
    def in_words(self) -> str:
        """The counts as text: "46 of 48 facts (96 %); not said: a, b"."""
        missing = self.not_said
        names = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        share = f"{self.said} of {self.facts} facts ({100 * self.said / max(1, self.facts):.0f} %)"
        return share + (f"; not said: {names}" if missing else "")


class EfficacyError(GateFailedError):
    """The edited model says too few facts of a step.

    Attributes:
        said: Counts of every step, for the run's record.
    """

    def __init__(self, message: str, hint: str, said: Mapping[str, FactsSaid]) -> None:
        super().__init__(message, hint)
        self.said = dict(said)


class StepVerb(OpenJsonObject):
    """The method of a step: each step has one of the fields `merge`, `edit`, `grow` and `route`."""

    id: str
    """Id of the step: its `id` in the recipe, or its verb and method."""
    merge: str | None = absent()
    """Merge method, in merge steps."""
    edit: str | None = absent()
    """Edit or memory method, in edit steps."""
    grow: str | None = absent()
    """Growth method or kind of training, in grow steps."""
    fuse: str | None = absent()
    """Fuse method, in fuse steps."""
    route: str | None = absent()
    """Route method, in route steps."""


class StepRecord(StepVerb):
    """A step of a finished run, with further measurements that depend on the method."""

    bricks: list[str] | None = absent()
    """Names of the bricks that a merge step combines, or a route step chooses among."""
    tensors: int | None = absent()
    """Number of tensors that the step changes or adds."""
    plugin: Plugin | None = absent()
    """Origin of the method, if it is not built in."""
    key: str | None = absent()
    """Key of the weights after the step."""
    check: dict[str, object] | None = absent()
    """Measurements of the checks of a grow step."""
    blocks: list[dict[str, object]] | None = absent()
    """Source of each range of layers of a `grow: stack` step: a brick with its layers, or a merge."""
    router: dict[str, object] | None = absent()
    """Measurements of a route step: accuracy on calibration prompts, ties, threshold, and others that depend on the method."""


class Packing(JsonObject):
    """What `output: {format:}` changed: relative errors ‖packed − merged‖ / ‖merged‖ against the merge in the dtype that the base is read as."""

    format: str
    """The format."""
    weights: int
    """Number of packed weights."""
    unchanged: int
    """Number of weights that kept all bytes of the base."""
    error: Number
    """Error of all packed weights together."""
    mean: Number
    """Mean of the errors of single weights."""
    largest: Number
    """Largest error of one weight."""
    worst: str
    """The weight with the largest error."""

    def line(self) -> str:
        """Return the errors in one line."""
        kept = f", {self.unchanged} as in the base" if self.unchanged else ""
        return f"{self.weights} weights in {self.format}{kept}: relative error {self.error:.2e}, at most {self.largest:.2e} ({self.worst})"


class RunResult(Result):
    """The result of a run. One of `model`, `adapter` and `directory` is set, as `output: {form:}` of the recipe says."""

    run: str | None
    """Run directory; null for `brick bake`."""
    key: str
    """Key of the configuration, made from the recipe and the digests of its inputs."""
    status: Literal["done"]
    """Always "done": a run that fails prints no document."""
    model: str | None
    """Directory of the checkpoint (`form: checkpoint`)."""
    adapter: str | None
    """Directory of the PEFT adapter (`form: adapter`)."""
    directory: str | None
    """Configuration directory (`form: configuration`)."""
    configuration: str | None
    """Digest of the configuration; null for an adapter."""
    steps: list[StepRecord]
    """The steps, in order."""
    said: dict[str, FactsSaid]
    """Id of an edit step, or BRICK/STEP for a recipe used as a brick -> facts that the model says."""
    packing: Packing | None = absent()
    """What packing changed, if the recipe's `output` has a `format`."""
    warnings: list[str] = []
    """What the command warns about; the run's record and the model card have it, too."""
    seconds: Number
    """Wall time of this command in seconds."""
    peak_bytes: int
    """Peak resident memory of the process in bytes."""

    @property
    def place(self) -> str:
        """Directory of the checkpoint, adapter or configuration."""
        return self.model or self.adapter or self.directory or ""


class RunRow(JsonObject):
    """A run directory."""

    name: str
    """Name of the directory."""
    status: str | None
    """"started", "failed" or "done"; "broken" if files of a finished run are not as written; "damaged" if its run.json cannot be
    read."""
    created: str | None
    """Time at which the run started (ISO 8601, UTC); empty for a damaged run."""
    bytes: int
    """Size of the directory in bytes."""
    configuration: str | None
    """Digest of the result; null for a run that is not finished."""


class _Stored(OpenJsonObject):
    """A part of run.json. An earlier version, or a run that has not finished, may lack any field."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)


class RunBase(_Stored):
    """The base of a run."""

    id: str
    """Directory or hub id of the base, as the recipe names it."""
    revision: str | None = absent()
    """Commit of a base from the hub."""
    digest: str | None = absent()
    """Digest of the base's weights and configuration."""

    @property
    def reference(self) -> str:
        """The base as a recipe names it, at its commit."""
        return self.id if not self.revision or "@" in self.id else f"{self.id}@{self.revision}"


class RunBrick(_Stored):
    """A brick of a run."""

    kind: str | None = absent()
    """adapter, checkpoint or recipe."""
    revision: str | None = absent()
    """Commit of a brick from the hub."""
    digest: str | None = absent()
    """Digest of the brick's content, or the key of a recipe."""
    bricks: dict[str, RunBrick] | None = absent()
    """Bricks of a recipe that is a brick; of a training run, its checkpoints by step."""


class RunInputs(_Stored):
    """The inputs of a run."""

    base: RunBase
    """The base."""
    bricks: dict[str, RunBrick] | None = absent()
    """Brick name -> the brick."""


class RunOutput(_Stored):
    """The result of a run. An adapter has further entries, such as its norm and what was left out."""

    digest: str | None = absent()
    """Digest of the configuration; of the files for an adapter."""
    tensors: dict[str, object] | None = absent()
    """Tensor name -> digest; for an adapter, rank and errors of the update."""
    parameters: int | None = absent()
    """Number of parameters."""
    bytes: int | None = absent()
    """Size of the tensors in bytes."""
    digests: dict[str, str] | None = absent()
    """Name of a tensor in an adapter's file -> digest."""
    packing: Packing | None = absent()
    """What packing changed, if the recipe's `output` has a `format`."""
    rank: int | None = absent()
    """Rank of an adapter."""
    error: Number | None = absent()
    """Relative error of an adapter, of all updates together."""
    whole: list[str] | None = absent()
    """Tensors that an adapter saves whole."""
    plain: bool | None = absent()
    """True if plain LoRA loaders read all of an adapter."""
    memory: str | None = absent()
    """Digest of the memory of a configuration."""
    router: str | None = absent()
    """Digest of the router of a configuration, and of its bricks."""


class RunRecord(_Stored, Result):
    """The content of a run's run.json."""

    version: Literal[1] | None = absent()
    """Version of the format."""
    status: str
    """"started", "failed" or "done"."""
    name: str | None = absent()
    """Name of the recipe."""
    created: str
    """Time at which the run started (ISO 8601, UTC)."""
    recipe: dict[str, object] | None = absent()
    """All fields of the recipe, with their defaults."""
    seed: int | None = absent()
    """The recipe's seed."""
    manifest: str | None = absent()
    """Name of the file in the run directory that lists all files with their sizes and SHA-256; runs of earlier versions have none."""
    inputs: RunInputs
    """Base and bricks with their digests."""
    tokenizer: dict[str, object] | None = absent()
    """The vocabulary of the recipe's `tokenizer` block; null without one."""
    generation: dict[str, object] | None = absent()
    """Settings of generation_config.json that change generated text."""
    warnings: list[str] | None = absent()
    """Warnings about the inputs."""
    licences: dict[str, str] | None = absent()
    """License of the base and of every brick; "unknown" if none is stated."""
    data_licences: list[list[str]] | None = absent()
    """Rows of brick, data set and license, for the training data on the bricks' cards."""
    device: str
    """Device of the computation."""
    tf32: bool | None = absent()
    """Whether TF32 was used; always false."""
    backend: dict[str, object] | None = absent()
    """Kernels and compiler that computed the merges."""
    versions: dict[str, str] | None = absent()
    """Library -> version."""
    error: str | None = absent()
    """Error of a failed run."""
    key: str | None = absent()
    """Key of the configuration."""
    steps: list[StepRecord] | None = absent()
    """The steps of a finished run, in order."""
    said: dict[str, FactsSaid] | None = absent()
    """Id of an edit step, or BRICK/STEP -> facts that the model says."""
    output: RunOutput | None = absent()
    """The result of a finished run."""
    seconds: Number | None = absent()
    """Wall time of the run in seconds."""
    peak_bytes: int | None = absent()
    """Peak resident memory of the process in bytes."""

    _written: dict[str, object] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, data: Any, label: str, hint: str | None = None) -> Self:
        """Build the record from parsed JSON; see `Result.of`."""
        record = super().of(data, label, hint)
        record._written.update(data)
        return record

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file as it was written, the fields of the class first."""
        written = self._written
        return {**{name: written[name] for name in type(self).model_fields if name in written}, **written}
