"""What the commands of `analyze` share and print: their texts, the directory of results with its page, and a table a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from workbench.cli._output import out
from workbench.errors import UsageError, WorkbenchError

if TYPE_CHECKING:
    from workbench.neurons.ablation import AblationResult
    from workbench.neurons.brick_metrics import QualityCurve
    from workbench.neurons.damage import Damage
    from workbench.neurons.decompose import DecompositionResult
    from workbench.neurons.functions import FunctionsResult, MergedFunctions
    from workbench.neurons.locate import KnowledgeResult
    from workbench.neurons.masking import SparsityResult
    from workbench.neurons.partition import PartitionResult
    from workbench.neurons.subject import ModelResult, NeuronSubject, Texts

Found = TypeVar("Found", bound="ModelResult")
SHOWN = 40
"""Largest number of characters of a prompt in a table."""


def results_folder(to: Path | None, name: str) -> Path:
    """Return the directory of a model's results: the value of `-o`, or runs/neurons/MODEL."""
    return to or Path("runs", "neurons", name)


def finish(result: Found, place: Path, json: bool, say: Callable[[Found], None]) -> None:
    """Print a result or its table, and write the page of all analyses in the directory."""
    page = write_page(place, result)
    out.result(lambda: result, lambda: say(result), json=json)
    out.say(f"written: {page}")


def write_page(place: Path, result: ModelResult) -> Path:
    """Write the page of all analyses of the same model in a directory; those of an earlier content of the same file are left out."""
    from workbench.files import read_json
    from workbench.report.neurons import SECTIONS, render_neurons

    plain = result.to_dict()
    data = plain.get("data") or {}
    known: dict[str, ModelResult] = {}
    for kind, (cls, _) in SECTIONS.items():
        path = place / f"{kind}.json"
        stored = read_json(path, digest=str)
        texts = (stored or {}).get("data") or {}
        stale = texts.get("file") == data.get("file") and texts.get("digest") != data.get("digest")
        if stored is None or stored["digest"] != result.digest or stale:
            continue
        try:
            known[kind] = cls.of(stored, str(path))
        except WorkbenchError:
            out.warn(
                f"{path}: another version wrote it; the page leaves it out. Run `workbench analyze {_COMMANDS.get(kind, kind)}` again."
            )
    return render_neurons(known, place / "index.html")


_COMMANDS = {"beside": "functions --beside", "ablation": "ablate", "knowledge": "locate", "decomposition": "decompose"}


def numbers(option: str, text: str) -> list[float]:
    """Return the numbers of an option, separated by commas.

    Raises:
        UsageError: If a part is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers separated by commas, such as 0,50,80") from None


def labelled_texts(data: Path) -> Texts:
    """Read the labelled texts and print what they cannot show."""
    from workbench.activations.labelled import read_labelled
    from workbench.neurons.subject import Texts

    read = read_labelled(data, str(data))
    for warning in read.warnings:
        out.warn(warning)
    if read.several:
        out.say(f"{read.several} rows with several functions are left out")
    return Texts(read, str(data))


def open_subject(model: str, device: str) -> NeuronSubject:
    """Load a recipe's result, or a model, with its neurons."""
    from workbench.api.naming import open_named
    from workbench.models.device import pick_device
    from workbench.neurons.subject import open_neurons

    return open_neurons(open_named(model, out.event), pick_device(device), out.event)


def say_functions(result: FunctionsResult) -> None:
    """Print the scores of each function beside chance."""
    from workbench.report.neurons import function_cells

    test = result.test
    out.line(
        f"{result.model}: {sum(result.neurons.values())} {result.unit} in {len(result.neurons)} layers, {result.data.items} texts, "
        f"{result.data.tokens} tokens"
    )
    out.line(
        f"found: {100 * (1 - test.alpha):g} % of such analyses find no neuron for a function that it does not serve (test over "
        f"{test.tasks} tasks). Effects are in standard deviations over tasks."
    )
    columns = ["function", "best/layer", "top 5‰", "mean", "chance", "found", "largest effect", "findable from"]
    columns += ["overlap", "others", "length AUC"]
    rows = [function_cells(row)[: len(columns)] for row in result.functions]
    out.table(columns, rows, right=range(1, len(columns)))
    if result.beside:
        _say_merged(result.beside)


def _say_merged(result: MergedFunctions) -> None:
    """Print how many neurons of each model's sets the merge's sets have, and their held-out scores."""
    names = [model.name for model in result.models[:-1]]
    out.line("")
    out.line(
        f"neurons of each model's set that are in the merge's set too (by chance {result.settings.share:.2f}), and held-out score of "
        "the set in its own model → in the merge"
    )
    rows = [
        [
            row.function,
            *(f"{m.in_merge:.2f}  {m.score:.2f} → {m.score_in_merge:.2f}" for m in row.models[:-1]),
            f"{row.models[-1].score:.2f}",
        ]
        for row in result.functions
    ]
    out.table(["function", *names, "the merge's own"], rows, right=range(1, len(names) + 2))


def say_sparsity(result: SparsityResult) -> None:
    """Print the rise of the loss by share of masked neurons."""
    for d in result.distributions:
        out.line(
            f"{d.indicator}: {100 * d.mean_small:.0f} % of the neurons of a token below 0.2 of its largest ({d.tokens} tokens)"
        )
    percents = [point.percent for point in result.curves[0].points]
    columns = ["rise of the loss, nats", "function", *(f"{percent:g} %" for percent in percents), "free up to"]
    rows = [
        [curve.indicator, curve.function or "all", *(f"{point.rise:.3f}" for point in curve.points), f"{curve.free:g} %"]
        for curve in result.curves
    ]
    out.table(columns, rows, right=range(2, len(columns)))
    if result.cett.mean_sparsity is not None:
        out.line(
            f"truncation error {result.cett.target:g} in every layer: {100 * result.cett.mean_sparsity:.0f} % of the neurons are not needed"
        )


def say_ablation(result: AblationResult) -> None:
    """Print the damage matrix, its controls and their coupling."""
    names = result.functions
    out.line(f"change of perplexity, %, with {100 * result.share:g} % of the neurons switched off ({result.items} texts)")
    rows = [[name, *(_percent(v) for v in row)] for name, row in zip(names, result.changes, strict=True)]
    for kind, control in result.controls.items():
        changes = control.changes
        is_shared = all(row == changes[0] for row in changes)  # one set is the control of all functions
        labels = [kind] if is_shared else [f"{kind}: {name}" for name in names]
        rows += [[label, *(_percent(v) for v in row)] for label, row in zip(labels, changes, strict=False)]
    out.table(["switched off", *names], rows, right=range(1, len(names) + 1))
    tables: dict[str, Damage] = {"sets": result, **result.controls}
    for kind, table in tables.items():
        coupling = _coupling(table.coupling, table.interval)
        out.line(f"{kind}: own function harmed most in {table.dominant_rows} of {len(names)} rows, coupling {coupling}")


def _percent(change: float | None) -> str:
    text = "inf" if change is None else f"{100 * change:.0f}"
    return "0" if text == "-0" else text


def _coupling(coupling: float | None, interval: list[float | None]) -> str:
    low, high = interval
    if coupling is None:
        return "undefined"
    return f"{coupling:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def say_partition(result: PartitionResult) -> None:
    """Print the partition, and the losses by selector and share of experts."""
    from workbench.report.neurons_more import range_text

    out.line(
        f"{result.model}: {result.experts} experts of {range_text(result.sizes)} neurons in each of {len(result.sizes)} layers, "
        f"{range_text(result.shared)} of them shared"
    )
    out.line(f"all experts together differ from the dense layers by {result.difference:.1g} of their largest output")
    columns = ["selector", *(f"{p.used:g} % used: mass, rise of the loss in nats" for p in result.curves[0].points)]
    rows = [[curve.selector, *(f"{100 * p.captured:.0f} %  {p.rise:.3f}" for p in curve.points)] for curve in result.curves]
    out.table(columns, rows, right=range(1, len(columns)))


def say_knowledge(result: KnowledgeResult) -> None:
    """Print the facts, the changes of probability beside random neurons, and the agreement with a trace."""
    count = len(result.facts)
    out.line(
        f"{result.model}: {result.neurons} {result.unit} carry {count} facts of {result.data.file}; attributions "
        f"add up for {result.complete} of {count}"
    )
    columns = ["prompt", "answer", "P", result.unit, "suppressed", "random", "amplified", "random", "sum error"]
    rows = []
    for fact in result.facts:
        changes = [fact.changes.get(kind) for kind in ("suppressed", "amplified")]
        cells = [cell for c in changes for cell in (["", ""] if c is None else [f"{_signed(v, 0)} %" for v in (c.own, c.random)])]
        prompt = fact.prompt if len(fact.prompt) <= SHOWN else f"…{fact.prompt[1 - SHOWN :]}"
        rows.append([prompt, fact.answer.strip(), f"{fact.probability:.3f}", str(len(fact.neurons)), *cells, f"{fact.error:.2g}"])
    out.table(columns, rows, right=range(2, len(columns)))
    for kind, change in result.changes.items():
        ends = "" if change.low is None or change.high is None else f" [{_signed(change.low)}, {_signed(change.high)}]"
        others = "" if change.others is None else f", answers of other facts {_signed(change.others)} %"
        out.line(
            f"{kind}: answer {_signed(change.own)} %, with random neurons {_signed(change.random)} %, difference "
            f"{_signed(change.difference)}{ends} points{others}"
        )
    agreement = result.agreement["last"]
    if result.note:
        out.line(result.note)
    elif agreement is not None:
        out.line(f"rank correlation over layers with `edit trace` at the last token: {agreement:+.2f}")


def _signed(share: float, decimals: int = 1) -> str:
    """Return a share in percent with its sign; a value that rounds to zero has none."""
    text = f"{100 * share:+.{decimals}f}"
    return text if float(text) else text[1:]


def say_decomposition(result: DecompositionResult) -> None:
    """Print the metrics of each decomposition, and the cosines of the bricks."""
    for part in result.decompositions:
        out.line(f"{part.origin}: {part.parts:,} {part.unit}, coupling {_coupling(part.coupling, part.interval)}")
        rows = [[row.function, *_cells(row.coupling, row.curve)] for row in part.functions]
        rows.append(["all", *_cells(part.coupling, part.curve)])
        out.table(["function", "coupling", f"least share for {100 * result.settings.kept:g} %", "area"], rows, right=(1, 2, 3))
        for note in part.notes:
            out.line(note)
        out.line("")
    if cosines := result.cosines:
        function, names = cosines.function, cosines.names
        spaces = [cosines.weight, *([function.mean] if function else [])]
        rows = [
            [f"{a}, {b}", *(_number(space[i][j]) for space in spaces)]
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i < j
        ]
        out.table(["bricks", "weight cosine", "function cosine"][: 1 + len(spaces)], rows, right=(1, 2))
        if not function:
            out.say("function space needs texts: --data FILE")


def _cells(coupling: float | None, curve: QualityCurve | None) -> list[str]:
    if curve is None:
        return [_number(coupling), "–", "–"]
    return [_number(coupling), f"{100 * curve.least_share:.0f} %", _number(curve.area)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
