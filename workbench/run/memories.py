"""Memories on disk and on live models: directories of facts with versions, beside a model whose weights stay as they are.

    memory.json             method, its step, what it chose for the model, digests of base and weights
    log.jsonl               what was added, changed, taken out and rewarded, version by version
    facts.jsonl             the facts of the newest version, for people and other tools
    tensors-VERSION.safetensors    "FACT/NAME" of the facts that were stated at that version

The log decides: facts.jsonl can be written again from it, and every version can be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.facts import Fact, write_facts
from workbench.facts.credibility import Credibility
from workbench.facts.log import ADD, ADDED, FEEDBACK, RECIPE, REMOVE, UPDATE, Log, append, lines_of, read_log
from workbench.files import json_digest, read_json
from workbench.recipe.methods import method
from workbench.steps import Kept, Memory, MemoryMethod, MethodContext, Remembered
from workbench.weights.digests import tensor_digest
from workbench.weights.saving import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD, FACTS = "memory.json", "facts.jsonl"


@dataclass(frozen=True)
class SavedMemory:
    """A memory directory. Its properties are read once: open it again after a change."""

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """memory.json. Errors: none there."""
        found = read_json(self.path / RECORD)
        if not isinstance(found, dict):
            raise WorkbenchError(
                f"{self.path}: no {RECORD}, so not a memory", "`workbench run` of a recipe that ends in one writes it."
            )
        return found

    @cached_property
    def log(self) -> Log:
        """What happened to its facts."""
        return read_log(self.path)

    @cached_property
    def step(self) -> MemoryMethod:
        """The step that made it. Errors: a method that is not here, or no longer has its fields."""
        return method(MemoryMethod, str(self.record["method"])).model_validate(self.record["step"])

    def kept(self, version: int | None = None) -> Kept:
        """Settings and facts at a version, the newest if omitted."""
        number, step = self.log.version if version is None else version, self.step
        facts = self.log.at(version)
        stored = {stated: _tensors(self.path, stated) for stated in {alive.stated for alive in facts.values()}}
        found = []
        for name, alive in facts.items():
            credibility = Credibility(
                number, alive.stated, alive.source == RECIPE, alive.uses, step.alpha, step.decay, step.floor)  # fmt: skip
            found.append(Remembered(alive.fact, stored[alive.stated][name], credibility))
        return Kept(self.record["settings"], found)

    def digest(self, version: int | None = None) -> str:
        """Digest of what the memory does at a version: its step and settings, facts, their tensors, feedback and age."""
        kept = self.kept(version)
        facts = [
            [r.fact.document(), {n: tensor_digest(t) for n, t in r.tensors.items()},
             [r.credibility.version - r.credibility.stated, r.credibility.recipe,
              [[r.credibility.version - u.version, u.similarity, u.reward] for u in r.credibility.uses]]]
            for r in kept.facts
        ]  # fmt: skip
        step = {key: value for key, value in self.record["step"].items() if key != "facts"}
        return json_digest([step, self.record["method_version"], kept.settings, facts])

    def add(self, facts: Sequence[Fact], context: MethodContext, time: str) -> int:
        """Learn facts and keep them as a new version, whose number is returned. Errors: ids that are there, facts that contradict each other."""
        known = self.log.at()
        if taken := [fact.id for fact in facts if fact.id in known]:
            raise WorkbenchError(
                f"{self.path}: holds a fact '{taken[0]}' ({known[taken[0]].fact.text!r})",
                "Change its answer with `workbench memory update`, or give the new fact another id.",
            )
        return self._state(ADD, facts, context, time)

    def update(self, name: str, target: str, context: MethodContext, time: str) -> int:
        """Give a fact another answer, as a new version. Feedback on the old answer no longer counts."""
        return self._state(UPDATE, [replace(self.log.one(name).fact, target=target)], context, time)

    def remove(self, names: Sequence[str], time: str) -> int:
        """Take facts out, as a new version; older versions still have them."""
        for name in names:
            self.log.one(name)
        return self._change([{"action": REMOVE, "id": name, "time": time} for name in dict.fromkeys(names)])

    def feedback(self, name: str, reward: float, similarity: float, time: str) -> int:
        """Note whether a use of a fact was right, as a new version."""
        self.log.one(name)
        return self._change([{"action": FEEDBACK, "id": name, "time": time, "reward": reward, "similarity": similarity}])

    def _state(self, action: str, facts: Sequence[Fact], context: MethodContext, time: str) -> int:
        """Learn facts, and keep them where they can stand beside the others."""
        step, version = self.step.reopened(self.record["settings"]), self.log.version + 1
        memory = step.learn(context, facts)
        fresh = Credibility(version, version, False, (), step.alpha, step.decay, step.floor)
        others = [r for r in self.kept().facts if r.fact.id not in memory.tensors]
        step.check_together([*others, *(Remembered(fact, memory.tensors[fact.id], fresh) for fact in facts)])
        return self._change(lines_of(action, facts, ADDED, time), memory)

    def _change(self, lines: Sequence[Mapping[str, Any]], memory: Memory | None = None) -> int:
        """Append to the log: tensors first, so that no line names what is not there. Errors: another process changes the memory."""
        try:
            with FileLock(str(self.path / ".lock"), timeout=0):
                version = self.log.version + 1
                if read_log(self.path).version >= version:
                    raise WorkbenchError(f"{self.path}: was changed since it was opened", "Try again.")
                if memory is not None:
                    save_tensors_of(memory, self.path, version)
                append(self.path, version, lines)
                write_facts(self.path / FACTS, [alive.fact for alive in read_log(self.path).at().values()])
        except Timeout:
            raise WorkbenchError(f"{self.path}: another process changes this memory", "Wait for it, then try again.") from None
        return version


def attach_memory(model: PreTrainedModel, path: Path, tokenizer_path: Path, version: int | None = None) -> PreTrainedModel:
    """Make a saved memory act on a live model, the newest version if omitted; returns the model."""
    from transformers import AutoTokenizer

    saved = SavedMemory(path)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)
    saved.step.attach(model, tokenizer, saved.kept(version))
    return model


def _tensors(folder: Path, version: int) -> dict[str, dict[str, Tensor]]:
    """Fact -> its tensors by name, of the facts that were stated at a version."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / f"tensors-{version}.safetensors").items():
        fact, _, name = key.rpartition("/")
        found.setdefault(fact, {})[name] = tensor
    return found


def save_tensors_of(memory: Memory, folder: Path, version: int) -> None:
    """Write the tensors of facts that a version of a memory has learned."""
    tensors = {f"{name}/{key}": t.contiguous() for name, found in memory.tensors.items() for key, t in found.items()}
    save_tensors(dict(sorted(tensors.items())), folder / f"tensors-{version}.safetensors")
