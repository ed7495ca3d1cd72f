"""Documents of `push` and `export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workbench.cli.documents.document import Document
from workbench.results import Number


class PushedFile(Document):
    """A file that `push` sends."""

    path: str
    """Path in the repository."""
    bytes: int
    """Size in bytes."""


class PushDocument(Document):
    """The files of a run that were sent to the hub, or would be sent."""

    run: str
    """Name of the run directory."""
    repository: str
    """Id of the repository."""
    revision: str | None
    """Branch; null for the default branch."""
    private: bool
    """This is true if a private repository was asked for."""
    license: str
    """License that the card states."""
    base: str | None
    """Hub id of the base in the card; null if the files name a directory."""
    files: list[PushedFile]
    """The files."""
    bytes: int
    """Size of all files in bytes."""
    sent: bool
    """False with `--dry-run`: nothing was sent."""
    url: str | None
    """Address of the repository; null with `--dry-run`."""
    commit: str | None
    """Commit that holds the files; null with `--dry-run`."""
    changed: bool | None
    """This is true if the repository changed, false if it had all files before, and null with `--dry-run`."""
    deleted: list[str]
    """Files that the commit deleted (`--replace`)."""


class ExportedAdapter(Document):
    """An adapter of an export."""

    path: str
    """Directory, or GGUF file, of the adapter in the export."""
    modules: int
    """Number of modules that it updates."""
    ranks: list[int]
    """Ranks of the modules before they were padded."""
    bytes: int
    """Size of its file in bytes."""


class ExportDocument(Document):
    """The content of an export's export.json, and its directory."""

    version: Literal[1]
    """Version of the format."""
    directory: str
    """Directory of the export."""
    name: str
    """Name of the recipe or run."""
    server: str = Field(alias="for")
    """Server: vllm, sglang, llama.cpp or semantic-router."""
    served_base: str
    """Name of the base, or of the whole model, on the server."""
    base_digest: str
    """Digest of the base, or of the whole model."""
    dtype: str
    """Data type that the server computes in."""
    rank: int | None
    """Rank of all adapters, for llama.cpp the largest one; null for a whole model."""
    adapters: dict[str, ExportedAdapter]
    """Adapter -> its files; empty for a whole model."""
    prompts: int
    """Number of prompts; expected.jsonl has one row for each model and prompt."""
    length: int
    """Largest number of tokens of an expected answer."""
    rounding: Number
    """Largest change of an expected log-probability, in nats, in a model that is rounded to `dtype`."""
    tolerance: Number
    """Largest difference of a log-probability that `export check` accepts, in nats."""
    alike: list[list[str]]
    """Pairs of models that the prompts do not tell apart."""


class CheckedModel(Document):
    """A model of a server beside the expected answers."""

    model: str
    """Name of the model in requests."""
    answers: int
    """Number of answers."""
    same: int
    """Number of answers with the same text and log-probabilities."""
    ties: int
    """Number of answers that part from the expected text at a token whose probability nearly equals that of another one."""
    texts: int
    """Number of answers with another text."""
    logprobs: int
    """Number of answers with the expected text and other log-probabilities."""
    largest: Number
    """Largest difference of a log-probability, in nats, before the texts part."""
    example: str | None
    """Prompt of the first answer that differs; null if none does."""


class ExportCheckDocument(Document):
    """A server's answers beside the expected ones."""

    url: str
    """Address of the server."""
    tolerance: Number
    """Largest accepted difference of a log-probability, in nats."""
    same: bool
    """True if no answer differs. If one does, the exit code is 1."""
    models: list[CheckedModel]
    """The models."""
