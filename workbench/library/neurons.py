"""Sets of neurons for a brick: the neurons where its delta acts on the texts of its skill.

A neuron's score is the norm of the brick's delta in the neuron's rows and column, times the mean |activation| of the neuron on
texts of the skill. On the starter bricks this ranking keeps more of a skill than a ranking by function or a random one. On request,
gates that are trained on the texts choose the neurons, starting from that ranking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.bricks.brick import Brick, checkpoint_digest
from workbench.bricks.card import BaseRecord, read_licence, read_title
from workbench.bricks.locate import resolve_base, resolve_brick
from workbench.bricks.neuron_sets import document, write_neuron_brick
from workbench.bricks.tied import base_for
from workbench.emergent.activations import Tokens, stream
from workbench.emergent.gates import GateSettings, train_gates
from workbench.emergent.labelled import WHOLE, ItemRow
from workbench.emergent.places import neuron_axes
from workbench.emergent.sets import NeuronSet, top_share
from workbench.emergent.sites import Site, find_sites
from workbench.errors import UsageError, WorkbenchError
from workbench.events import progress
from workbench.lazy import torch
from workbench.library.neurons_gates import gated_base
from workbench.merge.streaming.deltas import Deltas
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.texts import encode, longest_row, read_texts
from workbench.models.tokenizer import load_tokenizer
from workbench.project import cache_of
from workbench.run.compose import deltas
from workbench.run.work import Work
from workbench.steps.fields import BrickRef
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.device import exact
from workbench.weights.specs import block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

LONGEST = 512


@dataclass(frozen=True)
class TransplantSet:
    """The neurons where a brick's delta acts.

    Attributes:
        neurons: The set, with its scores and, as evidence, how it was chosen.
        base: The base, as the user named it.
        brick: The brick, as the user named it.
        written: Directory that the set was written to; None if it was not written.
    """

    neurons: NeuronSet
    base: str
    brick: str
    written: Path | None = None

    def document(self) -> dict[str, Any]:
        """Return the set as plain data, for `--json`."""
        written = str(self.written) if self.written else None
        return {"model": self.base, "brick": self.brick, "set": written, **document(self.neurons)}


@dataclass(frozen=True)
class TransplantOptions:
    """How the neurons of a transplant are chosen.

    Attributes:
        share: Share of the neurons to choose, above 0 and at most 1: of every layer, or with trained gates of the model.
        samples: Largest number of texts to read.
        trained: Settings of the training of one gate per neuron on the texts; None ranks by ‖Δ‖ · mean |activation|.
    """

    share: float = 0.2
    samples: int = 64
    trained: GateSettings | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share {self.share:g}: expected a share above 0 and at most 1", "Example: 0.2.")


def transplant_set(
    base: str,
    brick: str,
    texts: str,
    options: TransplantOptions = TransplantOptions(),
    *,
    project: Path,
    work: Work,
    out: Path | None = None,
) -> TransplantSet:
    """Choose the neurons where a brick's delta acts on texts of its skill, or those whose trained gates need it.

    `where: {neurons: OUT}` then moves the delta on these neurons only.

    Args:
        base: Directory or hub id of the base.
        brick: Directory of an adapter or a fine-tuned checkpoint of the base.
        texts: JSON Lines file of texts of the skill: {"text"} or {"prompt", "completion"}; relative to the project.
        options: How the neurons are chosen.
        project: Directory that relative paths start from.
        work: Device of the base's live model, and who hears of the progress.
        out: New directory for the set as a brick; None does not write it.

    Raises:
        WorkbenchError: If an input is missing or does not fit, the brick changes no neuron, or `out` exists.
    """
    if out is not None and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise WorkbenchError(f"{out}: exists already", "Choose a new directory.")
    checkpoint, _ = resolve_base(base, project)
    tuned = resolve_brick(Path(brick).name, BrickRef(path=brick), project)
    model = base_for([tuned], checkpoint)
    plain = Model(checkpoint, checkpoint.config)
    lines = read_texts(project / texts, texts, options.samples)
    tokenizer = load_tokenizer(checkpoint.path)
    rows = [ItemRow(r.tokens, len(r.tokens) - r.learned) for r in encode(lines, tokenizer, longest_row(plain.config, LONGEST))]
    with exact(work.device):
        norms = delta_norms(deltas(tuned, model), model, work.device)
        live = live_model(plain.config, compute(plain, torch.float32, work.device), checkpoint.path, work.device)
        sites = find_sites(live, plain.layout.depth, work.device)
        told = progress(work.events, "measure", tuned.name)
        means = mean_activations(live, sites, rows, told=lambda done, total: told(done, total, f"{total} texts"))
    del live
    scores, how = (
        delta_activation(norms, means, sites, tuned.label),
        {"method": "delta_activation", "share_per_layer": options.share},
    )
    if options.trained is not None:
        scores, how = _trained(tuned, checkpoint, rows, scores, options, work)
    digest = checkpoint_digest(checkpoint, cache_of(project))
    per: Literal["layer", "model"] = "layer" if options.trained is None else "model"
    neurons = top_share(tuned.name, sites, scores, options.share, per=per, base=digest)
    evidence = {
        **how,
        "brick": brick,
        "brick_digest": tuned.digest(cache_of(project)),
        "texts": texts,
        "samples": len(rows),
        "delta_share": _delta_share(neurons, norms),
    }
    neurons = replace(neurons, evidence=evidence)
    if out is not None:
        record = BaseRecord(id=base, title=read_title(checkpoint.path), digest=digest)
        skill = f"{neurons.size:,} {neurons.kind} where {tuned.name} acts ({100 * neurons.share:.3g} %)"
        made_by = "workbench analyze transplant"
        write_neuron_brick(out, neurons, record, skill, made_by=made_by, licence=read_licence(checkpoint.path))
    return TransplantSet(neurons, base, brick, out)


def _trained(
    tuned: Brick,
    checkpoint: Checkpoint,
    rows: Sequence[ItemRow],
    start: Sequence[Tensor],
    options: TransplantOptions,
    work: Work,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Train one gate per neuron for a brick's delta, and return the ranking by gates and its record.

    Args:
        tuned: The brick.
        checkpoint: The base.
        rows: Texts of the brick's skill.
        start: Ranking of the neurons that training starts from, per site [units].
        options: How the neurons are chosen; `trained` is not None.
        work: Device, and who hears of the progress.
    """
    assert options.trained is not None
    base, told = base_for([tuned], checkpoint), progress(work.events, "measure", tuned.label)
    with exact(work.device):
        gated = gated_base(deltas(tuned, base), base, checkpoint.path, tuned.label, work.device)
        gates = train_gates(
            gated.model,
            gated.modules,
            rows,
            start,
            options.share,
            options.trained,
            told=lambda done, of: told(done, of, f"{of} training steps"),
        )
    losses = {"whole": gates.whole, "kept": gates.kept, "none": gates.none}
    how = {"method": "trained_gates", "share_of_model": options.share, "training": asdict(options.trained), "loss": losses}
    return list(gates.scores), how


def delta_norms(brick: Deltas, base: Model, device: torch.device) -> dict[int, Tensor]:
    """Return layer -> norm of a brick's delta in the rows and columns of each neuron or expert [units], float64.

    Args:
        brick: The brick's deltas.
        base: The base.
        device: Device to read on.
    """
    squares: dict[int, Tensor] = {}
    specs = base.weights.specs
    for name, axis in neuron_axes(base).items():
        total = squares.setdefault(axis.layer, torch.zeros(axis.units, dtype=torch.float64, device=device))
        if not brick.touches(name):
            continue
        spec, units = specs[name], axis.unit_of(specs[name]).to(device)
        source, delta = base.weights.open(name, device), brick.open_delta(name, device)
        rooms = buffer(spec, device), buffer(spec, device)
        for start, stop in spec.blocks(block_elements(device)):
            weights, block = (matrix(room, start, stop, spec.cols) for room in rooms)
            source.read(start, stop, weights)
            delta.read_delta(start, stop, weights, block)
            along_rows = axis.axis == "rows"
            sums = block.double().square().sum(1 if along_rows else 0)
            total.index_add_(0, units[start:stop] if along_rows else units, sums)
    return {layer: total.sqrt().cpu() for layer, total in squares.items()}


def mean_activations(
    model: PreTrainedModel, sites: Sequence[Site], rows: Sequence[ItemRow], *, told: Any = lambda *_: None
) -> list[Tensor]:
    """Return the mean |activation| of every unit over the tokens of some texts, without the first token, per site [units], float64.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The texts.
        told: Callback that takes (texts done, texts in total).
    """
    sums = [torch.zeros(site.units, dtype=torch.float64) for site in sites]
    tokens = [0] * len(sites)

    def consume(site: int, activations: Tensor, batch: Tokens) -> None:
        sums[site] += activations[batch.counted].abs().sum(0, dtype=torch.float64).cpu()
        tokens[site] += int(batch.counted.sum())

    stream(model, sites, rows, consume, WHOLE, after=lambda done: told(done, len(rows)))
    return [total / max(1, count) for total, count in zip(sums, tokens, strict=True)]


def delta_activation(norms: Mapping[int, Tensor], means: Sequence[Tensor], sites: Sequence[Site], label: str) -> list[Tensor]:
    """Return ‖Δ‖ · mean |activation| of every unit, per site [units], float64.

    Args:
        norms: Layer -> norm of the delta of each unit.
        means: Mean |activation| of each unit, per site.
        sites: The sites.
        label: Name of the brick in messages.

    Raises:
        WorkbenchError: If the brick changes no neuron, or the tensors of a layer's neurons are unknown.
    """
    if missing := [site.layer for site in sites if site.layer not in norms or len(norms[site.layer]) != site.units]:
        raise WorkbenchError(
            f"{label}: the tensors of the neurons of layer {missing[0]} are not known by name",
            "Report this architecture: workbench/emergent/places.py lacks its tensor names.",
        )
    if not any(bool(norm.any()) for norm in norms.values()):
        raise WorkbenchError(
            f"{label} changes no feed-forward tensor, so its delta acts on no neuron",
            "Merge it without `neurons`; `workbench brick show` lists the tensors that it changes.",
        )
    return [norms[site.layer] * mean for site, mean in zip(sites, means, strict=True)]


def _delta_share(neurons: NeuronSet, norms: Mapping[int, Tensor]) -> float:
    """Return the share of the squared norm of the feed-forward delta that lies on a set's neurons."""
    inside = sum(float(norms[layer][index].square().sum()) for layer, index in neurons.indices.items())
    return inside / sum(float(norm.square().sum()) for norm in norms.values())
