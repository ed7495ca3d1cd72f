"""Forms of a recipe's result: a checkpoint, a PEFT adapter, or a configuration directory with a memory or a router.

`plan` and `execute` ask the form of a recipe how large the result is, `execute` lets it write the result, and `workbench run`
prints its hints. A new form is a class here and a value of `output: {form:}` in `recipe/schema.py`.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.bricks.brick import Brick
from workbench.ground import jsondoc
from workbench.ground.errors import InvalidRecipeError, shell, size
from workbench.ground.files import write_json
from workbench.ground.foreign_names import MODULES
from workbench.ground.lazy import torch
from workbench.ground.manifest import seal
from workbench.models.sentences import modules_of
from workbench.resolve.output import adapt, packed, planned_bytes
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, adapter_whole
from workbench.run.device import Work
from workbench.run.kind import shapes_before, written_specs
from workbench.run.loading import adapter_hints, load_hint
from workbench.run.record import RunOutput
from workbench.steps.fields import parse_size
from workbench.weights.digests import weights_digest
from workbench.weights.writer import output_specs, write_checkpoint

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter
    from workbench.run.compose import Composition

_NAMED = 3  # tensors that a hint names


@dataclass(frozen=True)
class WriteContext:
    """The composed recipe, and where its result is written.

    Attributes:
        resolved: The recipe.
        composition: The composed recipe.
        out: Directory to write.
        work: Where the tensors are computed, and who hears of the progress.
        sums: SHA-256 of files that were hashed while they were written.
    """

    resolved: Resolved
    composition: Composition
    out: Path
    work: Work
    sums: dict[Path, str] = field(default_factory=dict)

    @property
    def progress(self) -> Callable[[int, int], None]:
        """A callback that sends the numbers (done, total) as an event."""
        return lambda done, total: self.work.events({"stage": "write", "done": done, "total": total})


class OutputForm(ABC):
    """A form of a recipe's result.

    Attributes:
        name: Value of `output: {form:}` in a recipe.
        key: Field of the document of `run --json` that holds the result's directory.
        folder: Name of the result's directory in the run directory.
        acts_beside: True if the form holds a memory or a router; a result with one of them has no other form.
    """

    name: ClassVar[str]
    key: ClassVar[str]
    folder: ClassVar[str]
    acts_beside: ClassVar[bool] = False

    def refuse(self, resolved: Resolved) -> None:
        """Check that the form can hold the result of a recipe.

        `resolve` makes the checks that concern single steps and bricks (`adapter_form.check_form`).

        Raises:
            InvalidRecipeError: If the recipe has a memory or a router and the form holds none, or the other way round, or `config` is wrong.
        """
        if resolved.recipe.fields.output.config:
            from workbench.run.configured import configured

            configured(resolved)
        steps = resolved.recipe.steps
        if any(step.kind == "grow" for step in steps) and modules_of(resolved.base_path)[1]:
            made, size = (m.config.get("hidden_size") for m in (shapes_before(resolved, len(steps)), resolved.base))
            if made != size:
                message = f"its modules of sentence-transformers take hidden_size {size}, the result has {made}"
                hint = "Change `depth` or `neurons`, or use a base that is the transformer alone."
                raise InvalidRecipeError(f"{resolved.recipe.name}: {message}", hint)
        beside = resolved.beside
        if beside and not self.acts_beside:
            raise InvalidRecipeError(
                f"{resolved.recipe.name}: the result has a {beside}, which `form: {self.name}` cannot hold",
                "Use `workbench.load(DIR)` on the configuration directory, or run the recipe that wrote it.",
            )
        if self.acts_beside and not beside:
            raise InvalidRecipeError(
                f"{resolved.recipe.name}: `form: {self.name}` needs a memory or a router, but no step makes one",
                "Add a step such as `edit: memory` or `route: ridge` as the last step, or write `form: checkpoint`.",
            )

    @abstractmethod
    def size(self, resolved: Resolved) -> int:
        """Return the size of the result in bytes, from file headers."""

    def add_needs(self, resolved: Resolved, needs: Needs) -> None:
        """Add the memory that writing this form needs to the needs of a recipe's steps."""
        return

    @abstractmethod
    def write(self, context: WriteContext) -> dict[str, object]:
        """Write the result, and return `output` of the run's record, which `RunOutput` reads."""

    def checkpoint(self, result: Path) -> Path | None:
        """Return the directory of the checkpoint in a result, which later checks load; None if the form has none."""
        return None

    def configuration(self, output: RunOutput) -> str | None:
        """Return the configuration's digest from `output` of the run's record; None if only its files have a digest."""
        return output.digest

    def describe(self, output: RunOutput) -> str:
        """Describe the result in one line."""
        return f"configuration {(output.digest or '')[:12]}"

    def warnings(self, output: RunOutput) -> list[str]:
        """Return what the user should know of the result."""
        return []

    @abstractmethod
    def hints(self, place: str, output: RunOutput, resolved: Resolved) -> list[str]:
        """Return lines with commands that load and serve the result."""


class CheckpointForm(OutputForm):
    """A Hugging Face checkpoint directory."""

    name = "checkpoint"
    key = "model"
    folder = "model"

    def size(self, resolved: Resolved) -> int:
        """Return the bytes of all tensors."""
        specs = _packed(resolved).stored.specs if resolved.recipe.fields.output.format else written_specs(resolved)
        return sum(spec.nbytes for spec in specs.values())

    def add_needs(self, resolved: Resolved, needs: Needs) -> None:
        """Add the memory and the time that packing needs."""
        if resolved.recipe.fields.output.format:
            most, seconds = _packed(resolved).costs()
            needs.whole, needs.seconds = needs.threads * most + needs.whole, seconds + needs.seconds

    def write(self, context: WriteContext) -> dict[str, object]:
        """Write all tensors, the configuration and the tokenizer."""
        resolved, model = context.resolved, context.composition.model
        whole: Any = model.weights if resolved.recipe.fields.output.format else None
        written = write_checkpoint(
            whole.stored if whole else model.weights,
            context.out,
            dtype=resolved.dtype_name,
            shard_size=parse_size(resolved.recipe.fields.output.shard_size),
            device=context.work.device,
            threads=context.work.threads,
            progress=context.progress,
        )
        context.sums.update(written.sha256)
        write_config(model.config | (whole.config if whole else {}), resolved, context.out)
        specs = output_specs(model.weights.specs, resolved.dtype_name)
        worth = whole.measure(context.work.device) if whole else {}  # the digest is that of an evaluation in memory
        return {
            "digest": weights_digest(specs, written.digests | worth, model.config),
            "tensors": written.digests,
            "parameters": sum(s.numel for s in specs.values()),
            "bytes": sum(s.nbytes for s in (whole.stored.specs if whole else specs).values()),
            **({"packing": whole.cost()} if whole else {}),
        }

    def describe(self, output: RunOutput) -> str:
        """Add what packing changed to the line."""
        return super().describe(output) + (f", {output.packing.line()}" if output.packing else "")

    def checkpoint(self, result: Path) -> Path:
        """Return the result itself."""
        return result

    def hints(self, place: str, output: RunOutput, resolved: Resolved) -> list[str]:
        """Return the commands for transformers and vLLM."""
        return [load_hint(place), f"serve:  vllm serve {shell(place)}"]


class AdapterForm(OutputForm):
    """A PEFT adapter of the base."""

    name = "adapter"
    key = "adapter"
    folder = "adapter"

    def size(self, resolved: Resolved) -> int:
        """Return the bytes of the factors, and of tensors that are saved whole."""
        adapters, others = _parents(resolved)
        return planned_bytes(resolved.base, resolved.recipe.fields.output, adapters, self._is_dense(resolved), others)

    def add_needs(self, resolved: Resolved, needs: Needs) -> None:
        """Replace the memory of the merges by that of the factors, and add that of a model without weights."""
        needs.whole = adapter_whole(resolved, needs, self._is_dense(resolved))
        needs.hold(needs.whole)

    def _is_dense(self, resolved: Resolved) -> bool:
        """Return True if the update of a tensor has full rank before it is truncated."""
        return _parents(resolved)[1] or not all(step.keeps_rank() for step in resolved.recipe.steps)

    def write(self, context: WriteContext) -> dict[str, object]:
        """Write the factors and adapter_config.json. A previous, interrupted write starts again."""
        from workbench.adapters.export import write_result

        shutil.rmtree(context.out, ignore_errors=True)
        resolved, output = context.resolved, context.resolved.recipe.fields.output
        return write_result(
            adapt(context.composition.model, resolved.base, output),
            context.out,
            resolved.recipe.fields.base_name,
            device=context.work.device,
            threads=context.work.threads,
            dtype=getattr(torch, output.dtype) if output.dtype else None,
            progress=context.progress,
        )

    def warnings(self, output: RunOutput) -> list[str]:
        """Return a warning if the rank cuts off a large part of the result."""
        from workbench.adapters.approximate import LARGE

        error = output.error or 0.0
        if error <= LARGE:
            return []
        return [
            f"the adapter of rank {output.rank} lacks a part of the result: relative error {error:.2f}; a larger rank keeps more"
        ]

    def configuration(self, output: RunOutput) -> None:
        """Return None: the record has the digest of the adapter's files."""
        return

    def describe(self, output: RunOutput) -> str:
        """Return rank, number of tensors, size and error."""
        return (
            f"rank {output.rank}, {len(output.tensors or ())} tensors, {size(output.bytes or 0)}, "
            f"relative error {output.error or 0.0:.1e}"
        )

    def hints(self, place: str, output: RunOutput, resolved: Resolved) -> list[str]:
        """Return the commands for PEFT and vLLM, and a note on tensors that plain LoRA loaders do not read."""
        from workbench.adapters.linear import RANKS, served_rank

        base, whole, rank = resolved.recipe.fields.base_name, output.whole, output.rank or 0
        lines = []
        if whole:
            more = " …" if len(whole) > _NAMED else ""
            lines.append(
                f"{len(whole)} tensors are saved whole (modules_to_save, biases); PEFT loads them, plain LoRA loaders do not: "
                f"{', '.join(whole[:_NAMED])}{more}"
            )
        lines += adapter_hints(base, place, str(resolved.base_path))
        if output.plain and rank <= RANKS[-1] and not resolved.checkpoint.packed:
            most = served_rank([rank])
            module = shell(f"{resolved.recipe.name}={place}")
            lines.append(f"serve:  vllm serve {shell(base)} --enable-lora --max-lora-rank {most} --lora-modules {module}")
        return lines


class ConfigurationForm(OutputForm):
    """A directory with a memory or a router, and the checkpoint that it acts on unless this is the unchanged base."""

    name = "configuration"
    key = "directory"
    folder = "configuration"
    acts_beside = True

    def size(self, resolved: Resolved) -> int:
        """Return the bytes of the checkpoint and of the bricks that a router chooses among; the facts of a memory are small."""
        from workbench.run.opened import refers_to_base

        router = resolved.recipe.router
        bricks = resolved.recipe.used_bricks(router) if router else ()
        adapters = sum(brick_bytes(resolved, name) for name in bricks)
        return adapters + (0 if refers_to_base(resolved) else CHECKPOINT.size(resolved))

    def write(self, context: WriteContext) -> dict[str, object]:
        """Write the memory or router, the record of the configuration, and the checkpoint unless it equals the base."""
        from workbench.run.materialize import whole_digest
        from workbench.run.opened import MEMORY, MODEL, refers_to_base, write_record
        from workbench.run.routers import write_router

        resolved, composition, out = context.resolved, context.composition, context.out
        if refers_to_base(resolved):
            specs = output_specs(composition.model.weights.specs, resolved.dtype)
            parameters = sum(s.numel for s in specs.values())
            weights = RunOutput(digest=resolved.base_digest, tensors={}, parameters=parameters, bytes=0)
        else:
            weights = RunOutput.model_validate(CHECKPOINT.write(replace(context, out=out / MODEL)))
        digest = whole_digest(weights.digest or "", composition)
        out.mkdir(parents=True, exist_ok=True)
        if composition.memory is not None:
            shutil.rmtree(out / MEMORY, ignore_errors=True)
            shutil.copytree(composition.memory.path, out / MEMORY)
            seal(out / MEMORY)  # by itself, because its facts may change
            beside: dict[str, object] = {"memory": composition.memory.digest}
        elif composition.router is not None:
            beside = {"router": composition.router.digest, "bytes": (weights.bytes or 0) + write_router(composition.router, out)}
        else:
            raise AssertionError("`refuse` rejects a recipe without a memory or a router")
        write_record(out, resolved, digest)
        return {**weights.to_dict(), "digest": digest, **beside}

    def checkpoint(self, result: Path) -> Path:
        """Return the directory of the checkpoint, which does not exist if the memory or router acts on the unchanged base."""
        from workbench.run.opened import MODEL

        return result / MODEL

    def hints(self, place: str, output: RunOutput, resolved: Resolved) -> list[str]:
        """Return the Python call that loads the model, and the command that lists the facts or explains a choice."""
        load = f'load:   workbench.load("{place}")'
        if output.router is not None:
            return [load, f"ask:    workbench route explain {shell(place)} TEXT", f"chat:   {shell('workbench', 'chat', place)}"]
        return [load, f"facts:  workbench memory ls {shell(place)}"]


CHECKPOINT = CheckpointForm()
FORMS: Mapping[str, OutputForm] = {form.name: form for form in (CHECKPOINT, AdapterForm(), ConfigurationForm())}
"""Value of `output: {form:}` -> the form."""


def form_of(resolved: Resolved) -> OutputForm:
    """Return the form of a recipe's result."""
    return FORMS[resolved.recipe.fields.output.form]


def _packed(resolved: Resolved) -> Any:
    """Return a result in its `output: {format:}`, of which only names and shapes are asked for."""
    return packed(shapes_before(resolved, len(resolved.recipe.steps)).weights, resolved.checkpoint, resolved.recipe.fields.output)


def brick_bytes(resolved: Resolved, name: str) -> int:
    """Return the size on disk of a brick that acts beside the weights: an adapter, or a recipe whose result is one."""
    nested = resolved.nested.get(name)
    return resolved.bricks[name].stored_bytes if nested is None else form_of(nested).size(nested)


def _parents(resolved: Resolved) -> tuple[list[Adapter], bool]:
    """Return the adapters among the bricks that steps use, and whether there are other bricks (checkpoints, recipes)."""
    used = [resolved.bricks[name] for name in resolved.parents]
    adapters = [brick.adapter for brick in used if isinstance(brick, Brick) and brick.kind == "adapter"]
    return adapters, len(adapters) < len(used)


def write_config(config: dict[str, object], resolved: Resolved, out: Path) -> None:
    """Write config.json, generation_config.json, tokenizer, chat template and processor, so that transformers loads the directory."""
    written = {k: v for k, v in config.items() if k not in ("_name_or_path", "torch_dtype")}
    if resolved.dtype_name:
        written["dtype"] = resolved.dtype_name
    elif "torch_dtype" in config:
        written["dtype"] = config["torch_dtype"]
    write_json(out / "config.json", written, indent=2)
    for name, file in resolved.shipped.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
    if (folder := modules_of(resolved.base_path)[1][:1]) and folder[0][1]:  # the result's transformer is at the root
        first, *rest = jsondoc.read(out / MODULES)
        write_json(out / MODULES, [{**first, "path": ""}, *rest], indent=2)
