"""UltraEdit: read changes of feed-forward outputs from a gradient and write them by ridge regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import Field

from workbench.edit.closed_form.solver import KeyMetric, factors_of_steps, solve
from workbench.edit.inputs import DistinctLayers, Mode, read_for
from workbench.edit.places.parts import LONGEST, EditRow, Padded, Parts, check_rows, padded, row_of
from workbench.edit.places.passes import logits_at, run, target_log_probabilities
from workbench.facts.conflicts import require_consistent
from workbench.facts.facts import Fact
from workbench.facts.stream import latest
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.hooks import frozen, hooked
from workbench.models.layout import Model
from workbench.models.texts import longest_row
from workbench.steps import Cost, Edit, EditMethod, MethodContext, register
from workbench.steps.fields import Real, Whole

if TYPE_CHECKING:
    from torch import Tensor

AUTO_DEPTH = (0.6, 0.9)
"""Relative depth of the layers that `layers: auto` edits. The paper edits layers 18 to 26 of 28 (GPT-J), and 29 and 30 of 32
(Mistral)."""
AT_ONCE = 8
"""Number of facts per forward pass."""
PRIOR = 16
"""Number of virtual rows that running mean and deviation start from: mean 0, and one deviation for all coordinates, that of the
data. Without them a single row would be its own mean and vanish, and a few rows would be little more than signs."""


@register
class UltraEdit(EditMethod):
    """Read the wanted changes of feed-forward outputs from one backward pass, and write them by ridge regression.

    The method needs no subjects and no statistics of text. Inputs and gradients are normalized over all facts so far (Gu et al.
    2025). The step is repeated on the edited model until it gives the targets. A step that makes them less likely is undone, and the
    next one is half as long.
    """

    paper = "Gu et al. 2025, UltraEdit, arXiv 2505.14679"
    formula = "ΔWᵀ = (HᵀH + cI)⁻¹ HᵀV,  v = −η s (‖ĥ‖²/d) ĝ"
    version = 2

    edit: Literal["ultraedit"]
    facts: str
    """Facts file or published data set (see docs/facts.md), relative to the project."""
    first: Whole | None = Field(None, ge=1)
    """Use only the first N facts of the file."""
    layers: DistinctLayers = "auto"
    """Layers whose feed-forward output projection is updated; `auto`: those between 0.6 and 0.9 of the depth."""
    mode: Mode = "joint"
    """`joint`: all facts at once, independent of their order. `{sequential: {batch: N}}`: N facts at a time, each batch on the
    model that the earlier batches have produced; later rows of the file update or remove earlier facts."""
    history: bool = True
    """In sequential mode, add a term for the inputs of earlier batches, which preserves what they have written, except values
    that are updated. The paper has no such term."""
    strength: Real = Field(2.0, gt=0)
    """η: length of a step of all layers together, relative to the root mean square s of the outputs."""
    rounds: Whole = Field(20, ge=1)
    """Largest number of steps per batch; the paper takes 1."""
    confidence: Real = Field(0.5, gt=0, lt=1)
    """A fact is done when its target is the most likely answer and its mean probability is at least this value."""

    def inputs(self) -> list[str]:
        """Return the facts file."""
        return [self.facts]

    def check_inputs(self, project: Path) -> None:
        """Read the facts and check that they do not contradict each other."""
        require_consistent(latest(self.read(project)))

    def read(self, project: Path) -> list[Fact]:
        """Return the facts that are written, in order; see `read_for`."""
        return read_for(self.mode, self.first, project, self.facts)

    def cost(self, model: Model, project: Path, cache: Path) -> Cost:
        """Estimate the tokens that are run forward and backward; half of the rounds are usually enough."""
        facts = len(self.read(project))
        return {"layers": self.layers, "work": {"facts": facts}, "tokens": facts * 12 * (self.rounds + 1) // 2}

    def solve(self, context: MethodContext) -> Edit:
        """Write the facts batch after batch; the model is left unchanged.

        Raises:
            WorkbenchError: If the loss is not finite.
        """
        facts = self.read(context.project)
        check_rows(facts, context.tokenizer, longest_row(context.layout.config, LONGEST))
        parts = Parts.find(context)
        if self.layers != "auto":
            parts.check_layers(self.layers, f"edit {self.name}")
        layers = upper_middle(len(parts.layers), parts.editable) if self.layers == "auto" else sorted(self.layers)
        return _UltraSolve(self, context, parts, layers).run(facts)


def upper_middle(depth: int, editable: Sequence[int] | None = None) -> list[int]:
    """Return the editable layers whose middle lies within AUTO_DEPTH; at least one."""
    layers = range(depth) if editable is None else editable
    in_range = [i for i in layers if AUTO_DEPTH[0] <= (i + 0.5) / depth < AUTO_DEPTH[1]]
    return in_range or [min(layers, key=lambda i: (abs(i - depth * 2 // 3), i))]


@dataclass(frozen=True)
class Running:
    """Mean and deviation of every coordinate over all rows so far, in float64 (Welford's sums in Chan's parallel form).

    Attributes:
        count: Number of rows.
        mean: [d].
        squares: [d], sums of squared distances from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def over(cls, rows: Tensor) -> Running:
        """Return the statistics of rows [n, d]."""
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).square().sum(0))

    def joined(self, other: Running) -> Running:
        """Return the statistics of the rows of both."""
        total, difference = self.count + other.count, other.mean - self.mean
        squares = self.squares + other.squares + difference.square() * (self.count * other.count / total)
        return Running(total, self.mean + difference * (other.count / total), squares)

    def scaled(self, rows: Tensor) -> Tensor:
        """Normalize rows [n, d] by mean and deviation; both include PRIOR virtual rows."""
        common = (self.squares / self.count + self.mean.square()).mean()
        with_prior = self.joined(Running(PRIOR, torch.zeros_like(self.mean), (PRIOR * common).expand_as(self.mean)))
        deviation = (with_prior.squares / with_prior.count).sqrt()
        return (rows - with_prior.mean) / deviation.clamp(min=torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Recorded:
    """Inputs of a projection at target positions [n, d_in], its outputs and their gradients [n, d_out], all float64."""

    inputs: Tensor
    outputs: Tensor
    gradients: Tensor


class Outcome(TypedDict):
    """Record of a fact: its loss per token after and before the step, the steps of its batch, and whether the model gives its target."""

    id: str
    loss: float
    before: float
    steps: int
    said: bool


@dataclass
class _UltraSolve:
    """A run of the editor.

    Attributes:
        method: The editor with its fields.
        context: Model, tokenizer and cache.
        parts: Parts of the model.
        layers: Layers to update.
        updates: Layer -> update ΔW [out, in] so far, float64.
        running: Layer -> running statistics of its inputs and of its gradients.
        metrics: Layer -> the identity with a term for inputs that are already written.
        written: Prompt -> layer -> inputs [token, d_in] in that term, float32, and their ridge.
        pairs: Layer -> factors of its steps so far.
    """

    method: UltraEdit
    context: MethodContext
    parts: Parts
    layers: list[int]
    updates: dict[int, Tensor] = field(default_factory=dict)
    running: dict[int, tuple[Running, Running]] = field(default_factory=dict)
    metrics: dict[int, KeyMetric] = field(default_factory=dict)
    written: dict[str, dict[int, tuple[Tensor, float]]] = field(default_factory=dict)
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def run(self, facts: Sequence[Fact]) -> Edit:
        """Write all batches, one after another."""
        method, parts = self.method, self.parts
        size = len(facts) if method.mode == "joint" else method.mode.sequential.batch
        outcome: dict[str, Outcome] = {}
        with frozen(parts.model):
            for start in range(0, len(facts), size):
                records = self._write_batch(latest(facts[start : start + size]), start, len(facts))
                outcome |= {record["id"]: record for record in records}
        factors = {
            f"{parts.modules[layer]}.weight": factors_of_steps(self.updates[layer], self.pairs[layer]) for layer in self.layers
        }
        if parts.transposed:
            factors = {name: update.transposed() for name, update in factors.items()}
        record = {
            "layers": self.layers,
            "order": "free" if method.mode == "joint" else "dependent",
            "rank": {name: update.rank for name, update in factors.items()},
            "facts": [outcome[fact.id] for fact in latest(facts)],
        }
        return Edit(factors, record, parts.transposed, latest(facts))

    def _write_batch(self, facts: Sequence[Fact], done: int, total: int) -> list[Outcome]:
        """Take steps for one batch until all its facts are done; return their records."""
        method = self.method
        rows = [row_of(fact, self.context.tokenizer, "prompt_last") for fact in facts]
        strength, steps = method.strength / len(self.layers), 0
        recorded, means, top = self._forward_backward(rows)
        before = means
        if not bool(torch.isfinite(means).all()):
            raise WorkbenchError(f"edit ultraedit: the model's loss on the facts is {-float(means.mean())}", "Check its weights.")
        for layer in self.layers:
            inputs, gradients = recorded[layer].inputs, recorded[layer].gradients
            batch, running = (Running.over(inputs), Running.over(gradients)), self.running.get(layer)
            self.running[layer] = batch if running is None else (running[0].joined(batch[0]), running[1].joined(batch[1]))
            self.updates.setdefault(layer, inputs.new_zeros(gradients.shape[1], inputs.shape[1]))
            self.pairs.setdefault(layer, [])
        for fact in facts:  # the old values of facts that are updated must not be preserved
            for layer, (inputs, c) in self.written.pop(fact.text, {}).items():
                self.metrics[layer] = self._metric(layer).without_all([inputs.T], c)
        for round_ in range(method.rounds):
            self.context.progress(done, total, f"round {round_ + 1}, loss {-float(means.mean()):.3f}")
            if bool((top & (means.exp() >= method.confidence)).all()):
                break
            previous, pairs = dict(self.updates), {layer: self._step(layer, recorded[layer], strength) for layer in self.layers}
            self.updates = {layer: previous[layer] + left @ right for layer, (left, right) in pairs.items()}
            new_recorded, new_means, new_top = self._forward_backward(rows)
            if float(new_means.mean()) > float(means.mean()):  # false for NaN
                recorded, means, top, steps = new_recorded, new_means, new_top, steps + 1
                for layer, pair in pairs.items():
                    self.pairs[layer].append(pair)
            else:
                self.updates, strength = previous, strength / 2
        if method.mode != "joint" and method.history:
            for layer in self.layers:
                inputs, c = recorded[layer].inputs, ridge(recorded[layer])
                self.metrics[layer] = self._metric(layer).after(inputs.T, c)
                for fact, part in zip(facts, torch.split(inputs.float(), [len(row.target) for row in rows]), strict=True):
                    self.written.setdefault(fact.text, {})[layer] = part, c
        self.context.progress(done + len(facts), total, f"loss {-float(means.mean()):.3f}")
        return [
            {"id": fact.id, "loss": round(-loss, 4), "before": round(-first, 4), "steps": steps, "said": gives_target}
            for fact, loss, first, gives_target in zip(facts, means.tolist(), before.tolist(), top.tolist(), strict=True)
        ]

    def _step(self, layer: int, recorded: Recorded, strength: float) -> tuple[Tensor, Tensor]:
        """Return ΔW of one layer as factors V [out, n] and Aᵀ [n, in]."""
        of_inputs, of_gradients = self.running[layer]
        inputs, gradients = of_inputs.scaled(recorded.inputs), of_gradients.scaled(recorded.gradients)
        scale = strength * recorded.outputs.square().mean().sqrt()
        changes = -scale * inputs.square().mean(1, keepdim=True) * gradients
        return solve(recorded.inputs, self._metric(layer), ridge(recorded)).update(changes)

    def _metric(self, layer: int) -> KeyMetric:
        width, device = self.parts.width(layer), self.context.device
        return self.metrics.get(layer) or KeyMetric(None, torch.ones(width, dtype=torch.float64, device=device))

    def _forward_backward(self, rows: Sequence[EditRow]) -> tuple[dict[int, Recorded], Tensor, Tensor]:
        """Run the model with the updates so far forward and backward.

        Returns:
            Inputs, outputs and gradients of every layer at target positions; each row's mean log-probability of its target
            tokens; and whether all of these are the most likely ones.
        """
        batches = []
        with self.parts.changed({layer: update.float() for layer, update in self.updates.items()}):
            for start in range(0, len(rows), AT_ONCE):
                batches.append(record_pass(self.parts, self.layers, padded(rows[start : start + AT_ONCE], self.context.device)))
        means = torch.cat([means for _, means, _ in batches])
        names = ("inputs", "outputs", "gradients")
        recorded = {
            layer: Recorded(*(torch.cat([getattr(part[layer], name) for part, _, _ in batches]) for name in names))
            for layer in self.layers
        }
        return recorded, means, torch.cat([top for _, _, top in batches])


def ridge(recorded: Recorded) -> float:
    """Return c, the mean square of an input, so that its strength does not depend on the model."""
    return float(recorded.inputs.square().mean())


def record_pass(parts: Parts, layers: Sequence[int], batch: Padded) -> tuple[Mapping[int, Recorded], Tensor, Tensor]:
    """Run a batch forward and backward, and record projections at target positions.

    Args:
        parts: Parts of a model whose parameters need no gradient.
        layers: Layers of the projections.
        batch: The rows.

    Returns:
        Inputs, outputs and gradients of the summed cross-entropy by layer; each row's mean log-probability of its target; and
        whether the target is the most likely answer.
    """
    probes: dict[int, Tensor] = {}
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def record(layer: int, _module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probes[layer] = torch.zeros_like(output, requires_grad=True)
        inputs, outputs = (t.detach().reshape(-1, t.shape[-1])[batch.places].double() for t in (args[0], output))
        states[layer] = inputs, outputs
        return output + probes[layer]

    with torch.enable_grad(), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(parts.out(layer), after=partial(record, layer)))
        stack.enter_context(logits_at(parts, batch.places))
        logits = run(parts, batch).logits
        loss = torch.nn.functional.cross_entropy(logits[0].float(), batch.targets, reduction="sum")
        gradients = torch.autograd.grad(loss, [probes[layer] for layer in layers])
    means, top = target_log_probabilities(logits.detach(), batch, len(batch.lookup))
    recorded = {
        layer: Recorded(*states[layer], gradient.reshape(-1, gradient.shape[-1])[batch.places].double())
        for layer, gradient in zip(layers, gradients, strict=True)
    }
    return recorded, means, top
