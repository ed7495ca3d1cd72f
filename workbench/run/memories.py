"""Memories on disk and on live models: versioned directories of facts, for a model whose weights do not change.

    memory.json             method, step, settings for the model, and digests of base and weights
    log.jsonl               additions, updates, removals and feedback, version by version
    facts.jsonl             the facts of the newest version, for people and other tools
    tensors-VERSION.safetensors    tensors "FACT/NAME" of the facts added or updated in that version

The log is authoritative: facts.jsonl can be regenerated from it, and every version can be loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.facts.facts import FACTS, Fact, facts_text
from workbench.facts.log import ADD, ADDED, FEEDBACK, LOG, RECIPE, REMOVE, UPDATE, Credibility, Log, append, lines_of, read_log
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, read_json, write_text
from workbench.ground.holding import BusyError, held
from workbench.ground.manifest import changing, read_manifest
from workbench.ground.project import find_project
from workbench.ground.results import Result
from workbench.models.prompts import load_tokenizer
from workbench.recipe.methods import method
from workbench.steps import Kept, Memory, MemoryMethod, MethodContext, Remembered
from workbench.weights.digests import tensor_digest
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

RECORD = "memory.json"


class MemoryRecord(Result):
    """Content of memory.json."""

    format: int = 1
    """Version of the format."""
    method: str
    """Method of the memory."""
    method_version: int
    """Version of the method."""
    step: dict[str, object]
    """The step that made it."""
    settings: dict[str, object]
    """Choices of the method for the model."""
    seed: int = 0
    """The recipe's seed."""
    base: str = ""
    """Digest of the recipe's base."""
    solved_on: str
    """Digest of the weights of the model that the facts were learned on."""
    record: dict[str, object] = {}
    """Measurements of the method."""


@dataclass(frozen=True)
class SavedMemory:
    """A memory directory. Properties are cached, so create a new object after a change."""

    path: Path

    @cached_property
    def record(self) -> MemoryRecord:
        """Content of memory.json. Raises WorkbenchError if there is none, or a field is missing."""
        content = read_json(self.path / RECORD)
        if content is None:
            raise WorkbenchError(
                f"{self.path} is not a memory: it has no {RECORD}",
                "`workbench run` writes a memory if the recipe ends in a memory step.",
            )
        return MemoryRecord.of(content, str(self.path / RECORD))

    @cached_property
    def log(self) -> Log:
        """The log of changes to its facts."""
        return read_log(self.path)

    @cached_property
    def step(self) -> MemoryMethod:
        """The step that made it. Raises an error if its method no longer exists or its fields have changed."""
        kind = method(MemoryMethod, self.record.method, find_project(self.path.resolve() / RECORD), self.path / RECORD)
        return kind.model_validate(self.record.step)

    def kept(self, version: int | None = None) -> Kept:
        """Return the settings and facts at a version; the newest if omitted."""
        number, step = self.log.version if version is None else version, self.step
        facts = self.log.at(version)
        stored = {stated: _tensors(self.path, stated) for stated in {alive.stated for alive in facts.values()}}
        remembered = []
        for name, alive in facts.items():
            credibility = Credibility(
                number, alive.stated, alive.source == RECIPE, alive.uses, step.alpha, step.decay, step.floor
            )
            remembered.append(Remembered(alive.fact, stored[alive.stated][name], credibility))
        return Kept(self.record.settings, remembered)

    def digest(self, version: int | None = None) -> str:
        """Return the digest of the memory at a version: step, settings, facts, their tensors, feedback and age."""
        kept = self.kept(version)
        facts = []
        for remembered in kept.facts:
            credibility = remembered.credibility
            uses = [[credibility.version - use.version, use.similarity, use.reward] for use in credibility.uses]
            tensors = {name: tensor_digest(tensor) for name, tensor in remembered.tensors.items()}
            age = credibility.version - credibility.stated
            facts.append([remembered.fact.document(), tensors, [age, credibility.recipe, uses]])
        step = {key: value for key, value in self.record.step.items() if key != "facts"}
        return json_digest([step, self.record.method_version, kept.settings, facts])

    def add(self, facts: Sequence[Fact], context: MethodContext, time: str) -> int:
        """Add facts in a new version.

        Returns:
            The number of the new version.

        Raises:
            WorkbenchError: If the memory already has a fact with the same id, or facts contradict each other.
        """
        self._finish()
        known = self.log.at()
        if taken := [fact.id for fact in facts if fact.id in known]:
            raise WorkbenchError(
                f"{self.path}: already has a fact '{taken[0]}' ({known[taken[0]].fact.text!r})",
                "Change its answer with `workbench memory update`, or give the new fact another id.",
            )
        return self._state(ADD, facts, context, time)

    def update(self, name: str, target: str, context: MethodContext, time: str) -> int:
        """Change the answer of a fact in a new version, and return its number. Feedback on the old answer no longer counts."""
        self._finish()
        return self._state(UPDATE, [replace(self.log.one(name).fact, target=target)], context, time)

    def remove(self, names: Sequence[str], time: str) -> int:
        """Remove facts in a new version, and return its number. Older versions keep them."""
        self._finish()
        for name in names:
            self.log.one(name)
        return self._change([{"action": REMOVE, "id": name, "time": time} for name in dict.fromkeys(names)])

    def feedback(self, name: str, reward: float, similarity: float, time: str) -> int:
        """Record in a new version whether a use of a fact was correct, and return its number."""
        self._finish()
        self.log.one(name)
        return self._change([{"action": FEEDBACK, "id": name, "time": time, "reward": reward, "similarity": similarity}])

    def _state(self, action: str, facts: Sequence[Fact], context: MethodContext, time: str) -> int:
        """Learn facts, check them against the other facts, and write a new version."""
        step, version = self.step.reopened(self.record.settings), self.log.version + 1
        memory = step.learn(context, facts)
        fresh = Credibility(version, version, False, (), step.alpha, step.decay, step.floor)
        others = [r for r in self.kept().facts if r.fact.id not in memory.tensors]
        step.check_together([*others, *(Remembered(fact, memory.tensors[fact.id], fresh) for fact in facts)])
        return self._change(lines_of(action, facts, ADDED, time), memory)

    def _change(self, lines: Sequence[Mapping[str, object]], memory: Memory | None = None) -> int:
        """Write tensors, then append lines to the log, so that no line refers to missing tensors. Then seal the memory again."""
        with self._held():
            version = self.log.version + 1
            if read_log(self.path).version >= version:
                raise WorkbenchError(f"{self.path}: another process has changed this memory", "Run the command again.")
            with changing(self.path, [LOG, FACTS, tensors_file(version)]):
                if memory is not None:
                    save_tensors_of(memory, self.path, version)
                append(self.path, version, lines)
                write_text(self.path / FACTS, self._listed())
        return version

    def _held(self) -> AbstractContextManager[None]:
        """Lock the folder against other changes."""
        return held(self.path / ".lock", self.path, "is changing this memory", "Wait for it, then try again.")

    def _listed(self) -> str:
        """Return the content of facts.jsonl, by the log."""
        return facts_text(alive.fact for alive in read_log(self.path).at().values())

    def _finish(self) -> None:
        """Finish an earlier change that was interrupted after its lines were in the log: the list of facts, and the seal."""
        sealed, facts = read_manifest(self.path), self.path / FACTS
        if (sealed and sealed.open) or not facts.is_file() or facts.read_bytes() != self._listed().encode():
            with contextlib.suppress(BusyError), self._held(), changing(self.path, [FACTS]):
                write_text(facts, self._listed())


def attach_memory(model: PreTrainedModel, path: Path, tokenizer_path: Path, version: int | None = None) -> PreTrainedModel:
    """Attach a saved memory, by default its newest version, to a live model, and return the model."""
    saved = SavedMemory(path)
    tokenizer = load_tokenizer(tokenizer_path)
    saved.step.attach(model, tokenizer, saved.kept(version))
    return model


def _tensors(folder: Path, version: int) -> dict[str, dict[str, Tensor]]:
    """Return fact id -> its tensors by name, for the facts that were added or updated in a version."""
    from safetensors.torch import load_file

    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / tensors_file(version)).items():
        fact, _, name = key.rpartition("/")
        tensors.setdefault(fact, {})[name] = tensor
    return tensors


def save_tensors_of(memory: Memory, folder: Path, version: int) -> None:
    """Write the tensors of the facts that a version of a memory has added or updated."""
    tensors = {f"{fact}/{name}": t.contiguous() for fact, named in memory.tensors.items() for name, t in named.items()}
    save_tensors(dict(sorted(tensors.items())), folder / tensors_file(version))


def tensors_file(version: int) -> str:
    """Return the name of the file with the tensors of a version."""
    return f"tensors-{version}.safetensors"
