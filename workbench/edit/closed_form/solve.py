"""The run of a closed-form editor, from facts to low-rank updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.edit.closed_form.continuing import earlier_facts, history_of
from workbench.edit.closed_form.history import History, key_differences
from workbench.edit.closed_form.lookup import Group, Lookup, grouped
from workbench.edit.closed_form.moments import Moments, moments, statistics_source
from workbench.edit.closed_form.preset import Preset
from workbench.edit.closed_form.solver import CHUNK, Solved, factors_of_steps, solve
from workbench.edit.closed_form.values import AT_ONCE, Values, keys_of, values
from workbench.edit.inputs import contexts
from workbench.edit.places.parts import Parts, Position, padded, row_of
from workbench.edit.places.passes import score, self_test
from workbench.facts.facts import Fact
from workbench.facts.stream import latest
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.steps import Edit, MethodContext
from workbench.weights.digests import tensor_digest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Layers and tokens to edit.

    Attributes:
        layers: The layers.
        positions: Layer -> token at which facts are looked up.
        record: Measurements behind the choice, for the brick's record.
    """

    layers: tuple[int, ...]
    positions: dict[int, Position]
    record: dict[str, object]


@dataclass
class ClosedFormSolve:
    """A run of a closed-form editor.

    Attributes:
        method: The editor with its fields.
        context: Model, tokenizer and cache.
        parts: Parts of the model.
        facts: Facts to write; in sequential mode, every value of a fact that later rows update.
        choice: Layers and positions.
        updates: Layer -> update ΔW [out, in] so far, float64.
        factors: Layer -> pairs of factors whose products add up to the update; None once they are wider than the update.
        tensors: "LAYER.keys" and "LAYER.changes" -> rows per batch, stored in the brick.
        outcome: Fact ID -> its entry in the record.
        stored: Files of the values of the lowest layer, from which a later run continues the stream.
    """

    method: Preset
    context: MethodContext
    parts: Parts
    facts: Sequence[Fact]
    choice: Choice
    updates: dict[int, Tensor] = field(default_factory=dict)
    factors: dict[int, list[tuple[Tensor, Tensor]] | None] = field(default_factory=dict)
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    outcome: dict[str, dict[str, object]] = field(default_factory=dict)
    stored: list[Path] = field(default_factory=list)

    def run(self) -> Edit:
        """Write all facts, layer by layer and batch by batch."""
        method, context, parts = self.method, self.context, self.parts
        beginnings = contexts(statistics_source(context, method.statistics)[0], method.contexts)
        layers = sorted(self.choice.layers)
        second_moments = moments(context, parts, layers, method.statistics, method.tokens_per_input)
        ratios = {}
        for layer in layers:
            at = Lookup(context, parts, layer, self.choice.positions[layer], beginnings)
            rows = [row_of(f, context.tokenizer, at.position) for f in self.facts[:4]]
            ratios[layer] = round(self_test(parts, layer, padded(rows, context.device)), 4)
            # Higher layers meet the lower ones with the whole stream written, so earlier values of a fact do not return there.
            self._edit_layer(at, second_moments[layer], self.facts if layer == layers[0] else self.current)
        if not self.factors:
            raise WorkbenchError(
                f"edit {method.name}: no value makes the model give the target of any of the {len(self.current)} facts",
                "Set other `layers` or another `position`, or raise `steps` or `clamp`.",
            )
        factors = {
            f"{self.parts.modules[layer]}.weight": factors_of_steps(self.updates[layer], pairs)
            for layer, pairs in self.factors.items()
        }
        if parts.transposed:
            factors = {name: update.transposed() for name, update in factors.items()}
        record = {
            **self.choice.record,
            "order": "free" if method.mode == "joint" and len(layers) == 1 else "dependent",
            "block_ratio": ratios,
            "statistics": {str(layer): m.record for layer, m in second_moments.items()},
            "rank": {name: update.rank for name, update in factors.items()},
            "facts": [{"id": fact.id, **self.outcome.get(fact.id, {})} for fact in self.current],
        }
        if method.preserve_steps:
            record["preserved_steps"] = len(earlier_facts(context.earlier))
        tensors = {name: torch.cat(rows).contiguous() for name, rows in self.tensors.items()}
        if method.mode == "joint":
            return Edit(factors, record, parts.transposed, self.current, tensors)
        history = {"layer": layers[0], "statements": len(self.facts), "values": len(self.stored)}
        record = {**record, "history": history}
        return Edit(factors, record, parts.transposed, self.current, tensors, self.facts, history_of(self.stored))

    @property
    def current(self) -> list[Fact]:
        """The facts with the values that the edit leaves."""
        return latest(self.facts)

    def _edit_layer(self, at: Lookup, second_moments: Moments, facts: Sequence[Fact]) -> None:
        """Write facts at one layer on the model with the updates of lower layers."""
        method, width = self.method, self.parts.width(at.layer)
        metric = method.metric(second_moments)
        if prompts := method.preserved(self.context.project):
            metric = metric.after_all([keys_of(at, [(prompt,) for prompt in prompts])[0].T], method.ridge)
            if metric.size == 0:
                raise WorkbenchError(
                    f"edit {method.name}: there are more independent prompts to preserve than the projection of layer {at.layer} has "
                    f"inputs ({width}), and no change leaves all of them exactly as they are. No weight was changed",
                    "Preserve fewer prompts, or use `edit: memit`, which weighs them against the facts.",
                )
        preserves = method.mode != "joint" and method.history
        history = History(metric, at.position, method.ridge, method.spread_ridge, preserves)
        size = len(facts) if method.mode == "joint" else method.mode.sequential.batch
        at_once = min(size, len(grouped(facts, at.position)))
        if method.ridge == 0 and at_once > width:
            raise WorkbenchError(
                f"edit {method.name}: {at_once} facts at once cannot be written exactly, because the projection of layer "
                f"{at.layer} has only {width} inputs. No weight was changed",
                "Use `edit: memit`, which does not need exact values, or fewer facts.",
            )
        with self.parts.changed({i: u.float() for i, u in self.updates.items()}):
            if method.preserve_steps and (earlier := earlier_facts(self.context.earlier)):
                groups = history.groups(earlier)
                keys_only = replace(method.settings(), steps=0, kl=0.0)
                history.preserve(groups, values(at, groups, keys_only, self._values_key(groups), "facts of earlier steps"))
            for start in range(0, len(facts), size):
                self._edit_batch(at, history.groups(facts[start : start + size]), history)

    def _edit_batch(self, at: Lookup, groups: Sequence[Group], history: History) -> None:
        """Write one batch on the model as it is now."""
        method, layer = self.method, at.layer
        mu = method.ridge
        now = self._values_key(groups)
        with self.parts.changed(
            {layer: self.updates[layer].float()} if layer in self.updates else {}
        ):  # lower layers have theirs
            solutions = values(at, groups, method.settings(), now)
        if layer == min(self.choice.layers):
            self.stored += solutions.files
        groups, solutions = self._keep_converged(at, groups, solutions, history)
        if not groups:
            return
        keys, changes = solutions.rows("key"), solutions.rows("change")
        # Least squares over the keys after all contexts: their mean is the key, and their differences from it go into the metric.
        with_spread = history.release(groups).after_all(key_differences(solutions), method.spread_ridge)
        solved = solve(keys, with_spread, mu)
        if method.mode == "joint":
            changes = self._refine_changes(at, groups, changes, solved, now)
        left, right = solved.update(changes)
        update = left @ right
        self.updates[layer] = self.updates[layer] + update if layer in self.updates else update
        pairs = self.factors.get(layer, [])
        too_wide = pairs is None or sum(columns.shape[1] for columns, _ in pairs) + left.shape[1] >= min(update.shape)
        self.factors[layer] = None if too_wide or pairs is None else [*pairs, (left, right)]
        self.tensors.setdefault(f"{layer}.keys", []).append(keys)
        self.tensors.setdefault(f"{layer}.changes", []).append(changes.float())
        for group, value, share in zip(groups, solutions, _written_shares(update, keys, changes), strict=True):
            for fact in group:
                self.outcome[fact.id] = {
                    "layer": layer,
                    "loss": round(value.loss, 4),
                    "before": round(value.before, 4),
                    "steps": value.steps,
                    "written": round(share, 4),
                }
        history.add(groups, solutions)

    def _values_key(self, groups: Sequence[Group]) -> str:
        """Return the key of cached values on the model as it is now.

        Values of facts that are optimized together differ from those of single facts by rounding. In a stream, the key covers the
        batch, so that the same rows give the same bytes whatever the cache holds.
        """
        updates = {str(i): tensor_digest(u.float()) for i, u in sorted(self.updates.items())}
        batch = [] if self.method.mode == "joint" else [[[f.text, f.target] for group in groups for f in group]]
        return json_digest([self.context.model_key, updates, *batch])

    def _keep_converged(
        self, at: Lookup, groups: Sequence[Group], solutions: Values, history: History
    ) -> tuple[list[Group], Values]:
        """Return the groups whose value makes the model give the targets."""
        converged = [i for i, value in enumerate(solutions) if value.top]
        failed = [(groups[i], solutions[i]) for i in sorted({*range(len(solutions))} - {*converged})]
        if failed and self.method.unconverged == "refuse":
            examples = "; ".join(
                f"{group[0].id} ({value.before:.2f} -> {value.loss:.2f} nats per token)" for group, value in failed[:4]
            )
            raise WorkbenchError(
                f"edit {self.method.name}: at layer {at.layer}, {at.position}, no value makes the model give the target of {len(failed)} of "
                f"{len(groups)} facts: {examples}{' …' if len(failed) > 4 else ''}. No weight was changed",
                "Skip them with `unconverged: skip`, set other `layers` or another `position`, or raise `steps` or `clamp`.",
            )
        for group, value in failed:
            for fact in history.new(group):
                self.outcome[fact.id] = {
                    "layer": at.layer,
                    "loss": round(value.loss, 4),
                    "before": round(value.before, 4),
                    "skipped": True,
                }
        return [groups[i] for i in converged], solutions.subset(converged)

    def _refine_changes(self, at: Lookup, groups: Sequence[Group], changes: Tensor, solved: Solved, now: str) -> Tensor:
        """Increase the changes for facts whose target the updated model does not give yet; keys, and therefore A, stay the same.

        Returns:
            Changes [n, d_out].
        """
        method = self.method
        for round_ in range(method.refine):
            left, right = solved.update(changes)
            update = (left @ right).float()
            with self.parts.changed({at.layer: update}):
                missing = [i for i, gives_all in enumerate(self._gives_targets(groups)) if not gives_all]
                if not missing:
                    break
                key = json_digest([now, "refined", round_, tensor_digest(update)])
                remaining = [groups[i] for i in missing]
                further = values(at, remaining, method.settings(), key, f"refining {round_ + 1}")
            changes = changes.double()
            changes[missing] += further.rows("change").double()
        return changes

    def _gives_targets(self, groups: Sequence[Group]) -> list[bool]:
        """Return for each group whether the model gives all its targets after the plain prompts."""
        end = self.method.end_of_text
        rows = [row_of(fact, self.context.tokenizer, "prompt_last", end=end) for group in groups for fact in group]
        top = torch.cat(
            [score(self.parts, padded(rows[i : i + AT_ONCE], self.context.device))[1] for i in range(0, len(rows), AT_ONCE)]
        )
        results, start = [], 0
        for group in groups:
            results.append(bool(top[start : start + len(group)].all()))
            start += len(group)
        return results


def _written_shares(update: Tensor, keys: Tensor, changes: Tensor) -> list[float]:
    """Return ‖ΔW k‖ relative to the norm of the requested change, for keys [n, d_in] and changes [n, d_out]."""
    shares: list[float] = []
    for key_chunk, change_chunk in zip(torch.split(keys, CHUNK), torch.split(changes, CHUNK), strict=True):
        shares += ((update @ key_chunk.to(update).T).norm(dim=0) / change_chunk.to(update).norm(dim=1).clamp(min=1e-12)).tolist()
    return shares
