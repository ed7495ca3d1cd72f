"""Documents of `run`, `plan`, `brick bake` and `runs`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.document import Document, FactsSaid, MethodOrigin, OpenDocument, optional
from workbench.results import Number


class StepVerb(OpenDocument):
    """The method of a step: each step has one of the fields `merge`, `edit`, `grow` and `route`."""

    id: str
    """Id of the step: its `id` in the recipe, or its verb and method."""
    merge: str = optional()
    """Merge method, in merge steps."""
    edit: str = optional()
    """Edit or memory method, in edit steps."""
    grow: str = optional()
    """Growth method or kind of training, in grow steps."""
    fuse: str = optional()
    """Fuse method, in fuse steps."""
    route: str = optional()
    """Route method, in route steps."""


class StepRecord(StepVerb):
    """A step of a finished run, with further measurements that depend on the method."""

    bricks: list[str] = optional()
    """Names of the bricks that a merge step combines, or a route step chooses among."""
    tensors: int = optional()
    """Number of tensors that the step changes or adds."""
    plugin: MethodOrigin = optional()
    """Origin of the method, if it is not built in."""
    key: str = optional()
    """Key of the weights after the step."""
    check: dict[str, Any] = optional()
    """Measurements of the checks of a grow step."""
    blocks: list[dict[str, Any]] = optional()
    """Source of each range of layers of a `grow: stack` step: a brick with its layers, or a merge."""
    router: dict[str, Any] = optional()
    """Measurements of a route step: accuracy on calibration prompts, ties, threshold, and others that depend on the method."""


class RunDocument(Document):
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
    seconds: Number
    """Wall time of this command in seconds."""
    peak_bytes: int
    """Peak resident memory of the process in bytes."""


class PlannedStep(StepVerb):
    """A step of a plan, with further entries that depend on the method."""

    bricks: dict[str, str] = optional()
    """Brick name -> adapter, checkpoint or recipe."""
    passes: int = optional()
    """Number of times that a merge step reads every delta."""
    edits: list[dict[str, Any]] = optional()
    """Steps of recipes used as bricks that are not cached, with their cost."""
    needs: str = optional()
    """Inputs that a merge step reads besides tensors: "texts" or "model"."""
    inputs: list[str] = optional()
    """Files that the step reads, relative to the project."""
    trains_on: str = optional()
    """File or data set that the step trains on."""
    check: str = optional()
    """Check of a grow step: "tensors" or "full"."""
    blocks: list[dict[str, Any]] = optional()
    """Source of each range of layers of a `grow: stack` step: a brick with its layers, or a merge."""
    cost: dict[str, Any] = optional()
    """Work of a step whose result is not cached: numbers of facts, tokens and optimizer steps."""
    seconds: Number = optional()
    """Estimated time of this work on one core, in seconds."""


class DownloadDocument(Document):
    """A repository of the hub that a run downloads first."""

    repository: str
    """Id of the repository."""
    commit: str
    """Commit of the repository."""
    files: int
    """Number of files to download."""
    bytes: int
    """Size of the download in bytes."""


class PlanDocument(Document):
    """Prediction of a run, from file headers."""

    recipe: str
    """Name of the recipe."""
    key: str | None
    """Key of the configuration; null until `run` or `eval` has read the inputs once."""
    run: str | None
    """Name of the run directory, which has a part of the key; null as long as the key is."""
    steps: list[PlannedStep]
    """The steps, in order."""
    read_bytes: int
    """Bytes that the run reads."""
    write_bytes: int
    """Size of the result in bytes."""
    peak_bytes: int
    """Peak memory of the process in bytes; on a CUDA device, the host's part."""
    seconds: Number
    """Estimated time in seconds, without downloads."""
    cached: list[str]
    """Ids of steps whose result is cached, and "run" if the run is finished."""
    problems: list[str]
    """Problems that stop the run, such as a full disk. With a problem, the exit code is 1."""
    warnings: list[str]
    """Warnings about the inputs and their licenses."""
    download_bytes: int
    """Size of all downloads in bytes."""
    downloads: list[DownloadDocument]
    """Downloads that the run makes first."""
    checked_at_run: list[str]
    """Checks that need more than file headers, which the run makes before the first step."""
    device_bytes: int
    """Peak memory of the CUDA device in bytes; 0 for a run on the CPU."""


class RunRow(Document):
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


class RunBase(OpenDocument):
    """The base of a run."""

    id: str
    """Directory or hub id of the base, as the recipe names it."""
    revision: str | None = optional()
    """Commit of a base from the hub."""
    digest: str | None = optional()
    """Digest of the base's weights and configuration."""


class RunBrick(OpenDocument):
    """A brick of a run."""

    kind: str = optional()
    """adapter, checkpoint or recipe."""
    revision: str | None = optional()
    """Commit of a brick from the hub."""
    digest: str | None = optional()
    """Digest of the brick's content, or the key of a recipe."""


class RunInputs(OpenDocument):
    """The inputs of a run."""

    base: RunBase
    """The base."""
    bricks: dict[str, RunBrick] = optional()
    """Brick name -> the brick."""


class RunOutput(OpenDocument):
    """The result of a run. An adapter has further entries: rank, errors, and tensors saved whole."""

    digest: str = optional()
    """Digest of the configuration; of the files for an adapter."""
    tensors: dict[str, Any] = optional()
    """Tensor name -> digest; for an adapter, rank and errors of the update."""
    parameters: int = optional()
    """Number of parameters."""
    bytes: int = optional()
    """Size of the tensors in bytes."""
    digests: dict[str, str] = optional()
    """Name of a tensor in an adapter's file -> digest."""
    memory: str = optional()
    """Digest of the memory of a configuration."""
    router: str = optional()
    """Digest of the router of a configuration, and of its bricks."""


class RunRecord(OpenDocument):
    """The content of a run's run.json."""

    version: Literal[1] = optional()
    """Version of the format."""
    status: str
    """"started", "failed" or "done"."""
    name: str = optional()
    """Name of the recipe."""
    created: str
    """Time at which the run started (ISO 8601, UTC)."""
    recipe: dict[str, Any] = optional()
    """All fields of the recipe, with their defaults."""
    seed: int = optional()
    """The recipe's seed."""
    manifest: str = optional()
    """Name of the file in the run directory that lists all files with their sizes and SHA-256; runs of earlier versions have none."""
    inputs: RunInputs
    """Base and bricks with their digests."""
    tokenizer: dict[str, Any] | None = optional()
    """The vocabulary of the recipe's `tokenizer` block; null without one."""
    generation: dict[str, Any] = optional()
    """Settings of generation_config.json that change generated text."""
    warnings: list[str] = optional()
    """Warnings about the inputs."""
    licences: dict[str, str] = optional()
    """License of the base and of every brick; "unknown" if none is stated."""
    data_licences: list[list[str]] = optional()
    """Rows of brick, data set and license, for the training data on the bricks' cards."""
    device: str
    """Device of the computation."""
    tf32: bool = optional()
    """Whether TF32 was used; always false."""
    backend: dict[str, Any] = optional()
    """Kernels and compiler that computed the merges."""
    versions: dict[str, str] = optional()
    """Library -> version."""
    error: str = optional()
    """Error of a failed run."""
    key: str = optional()
    """Key of the configuration."""
    steps: list[StepRecord] = optional()
    """The steps of a finished run, in order."""
    said: dict[str, FactsSaid] = optional()
    """Id of an edit step, or BRICK/STEP -> facts that the model says."""
    output: RunOutput = optional()
    """The result of a finished run."""
    seconds: Number = optional()
    """Wall time of the run in seconds."""
    peak_bytes: int = optional()
    """Peak resident memory of the process in bytes."""
