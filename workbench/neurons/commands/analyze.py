"""Command `analyze`: what a model's neurons do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.project import find_project, relative

if TYPE_CHECKING:
    from workbench.activations.labelled import Labelled
    from workbench.neurons.fact_neurons import LocateSettings
    from workbench.neurons.functions import FunctionSettings
    from workbench.neurons.partition import PartitionSettings
    from workbench.neurons.subject import ModelResult, NeuronSubject


ABILITIES = Path("evals", "abilities.jsonl")
"""Texts of a project that analyses read if no others are named."""
SHOWN = 40
"""Largest number of characters of a prompt in a table."""

ModelArg = Annotated[
    str,
    typer.Argument(
        help="Recipe (its result is analyzed), model directory or hub id.", metavar="RECIPE_OR_MODEL", show_default=False
    ),
]
DataOpt = Annotated[
    Path | None,
    typer.Option(
        help='JSONL file of labelled texts: {"prompt":, "function":}, and optionally "response", "task", "split"; default: '
        "evals/abilities.jsonl of the project.",
        show_default=False,
    ),
]
OutOpt = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Directory of the results; default: runs/neurons/MODEL.", show_default=False),
]
ShareOpt = Annotated[float, typer.Option(min=0.0001, max=1, help="Share of every layer in a function's set.")]
PartOpt = Annotated[
    Literal["prompt", "whole"], typer.Option(help="Tokens that count: those of the `prompt`, or of the `whole` text.")
]
NeuronOpt = Annotated[
    list[str] | None,
    typer.Option(metavar="LAYER.NEURON", help="Answer instead: what does this neuron do? Repeatable.", show_default=False),
]
DictionaryOpt = Annotated[
    Path | None,
    typer.Option(
        help="Answer instead: do the features of this sparse autoencoder or transcoder (a folder of SAELens or sparsify) tell functions "
        "apart better than the neurons of its layer?",
        show_default=False,
    ),
]
SparsityOpt = Annotated[
    bool,
    typer.Option("--sparsity", help="Answer instead: how many neurons does a token use, and what does masking the rest cost?"),
]
PartitionOpt = Annotated[
    Literal["random", "kmeans", "coactivation", "cmoe"] | None,
    typer.Option(
        help="Answer instead: what is lost if a token uses some of the neurons, divided into experts at `random`, by their gate's weights "
        "(`kmeans`), by the tokens on which they are active (`coactivation`), or as CMoE does (`cmoe`)?",
        show_default=False,
    ),
]
ExpertsOpt = Annotated[int, typer.Option(min=2, help="Experts of a layer in a partition, shared ones included.")]
SharedOpt = Annotated[
    int | None,
    typer.Option(min=0, help="Experts of a partition that serve every token; default: the method's choice.", show_default=False),
]
FactsOpt = Annotated[
    Path | None,
    typer.Option(
        help="Answer instead: which neurons carry the facts of this JSONL or YAML file? By integrated gradients, beside random "
        "neurons.",
        show_default=False,
    ),
]
AnswerOpt = Annotated[
    Literal["own", "target", "target_true"],
    typer.Option(help="Answer of a fact: the model's `own` next token, the fact's `target`, or its `target_true`."),
]


@reads_recipes
def analyze(
    context: typer.Context,
    model: ModelArg,
    data: DataOpt = None,
    to: OutOpt = None,
    share: ShareOpt = 0.05,
    part: PartOpt = "prompt",
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    neuron: NeuronOpt = None,
    dictionary: DictionaryOpt = None,
    sparsity: SparsityOpt = False,
    partition: PartitionOpt = None,
    experts: ExpertsOpt = 16,
    shared: SharedOpt = None,
    facts: FactsOpt = None,
    answer: AnswerOpt = "own",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of facts, from the start of the file.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a fact's integral.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the test's draws and of the partition.")] = 0,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Say for each function which neurons serve it, with a test of the whole model, and what switching them off does.

    Sets are chosen on some tasks of a function and judged on others. Writes a page, tables, and one set of neurons per function, which is a brick.
    """
    from workbench.neurons.analysis import NeuronsResult
    from workbench.neurons.fact_neurons import LocateSettings
    from workbench.neurons.functions import FunctionSettings
    from workbench.neurons.partition import PartitionSettings

    out.quiet = json or quiet
    asked = _Asked(
        functions=None
        if neuron or dictionary or sparsity or partition or facts
        else FunctionSettings(share=share, seed=seed, part=part, chat=chat),
        partition=PartitionSettings(method=partition, experts=experts, shared=shared, seed=seed) if partition else None,
        names=neuron or [],
        dictionary=dictionary,
        sparsity=sparsity,
        seed=seed,
    )
    _check_options(context, asked, facts)
    if asked.partition:
        asked.partition.counts()  # finds bad numbers before the model is loaded
    texts = None if facts and not asked.of_texts else labelled_texts(data)
    parts: dict[str, ModelResult] = {}
    if facts:
        result, place = _of_facts(model, facts, to, LocateSettings(answer=answer, steps=steps, count=count), device)
        parts[result.kind] = result
        page = write_page(place, result)
    if texts:
        for result, place in _of_texts(model, device, to, texts, asked):
            parts[result.kind] = result
            page = write_page(place, result)

    def text() -> None:
        for part in parts.values():
            say(part)
            out.line("")

    out.result(lambda: NeuronsResult.model_validate(parts), text, json=json)
    out.say(f"written: {page}")


_READ_BY = {
    "--partition": ("experts", "shared"),
    "--facts": ("answer", "count", "steps"),
    "the main question alone": ("share", "part", "chat"),
    "a question about labelled texts": ("data",),
}
"""Question -> the options that it reads and no other does."""


def _check_options(context: typer.Context, asked: _Asked, facts: Path | None) -> None:
    """Refuse options that no question reads."""
    known = dict(zip(_READ_BY, (asked.partition, facts, asked.functions, asked.of_texts), strict=True))
    for question, options in _READ_BY.items():
        typed = [name for name in options if "COMMANDLINE" in str(context.get_parameter_source(name))]
        if typed and not known[question]:
            raise UsageError(f"--{typed[0]} is read by {question}, which was not asked", "Leave it out, or ask that question.")


@dataclass(frozen=True)
class _Asked:
    """The questions about labelled texts.

    Attributes:
        functions: Settings of the main question; None if it is not asked.
        partition: Settings of a partition.
        names: Names of single neurons.
        dictionary: Folder of a dictionary.
        sparsity: Whether the question about sparsity is asked.
        seed: Seed of the draws.
    """

    functions: FunctionSettings | None
    partition: PartitionSettings | None
    names: list[str]
    dictionary: Path | None
    sparsity: bool
    seed: int

    @property
    def of_texts(self) -> bool:
        """Say whether any of them is asked."""
        return bool(self.functions or self.partition or self.names or self.dictionary or self.sparsity)


def _of_texts(model: str, device: str, to: Path | None, texts: Labelled, asked: _Asked) -> Iterator[tuple[ModelResult, Path]]:
    """Answer the questions about labelled texts, and yield each answer with its directory as soon as its files are written."""
    read = None
    if asked.dictionary:
        from workbench.neurons.dictionary import read_dictionary
        from workbench.neurons.features import compare_features

        read = read_dictionary(asked.dictionary)  # finds bad files before the model is loaded
    subject = open_subject(model, device)
    place = results_folder(to, subject.name)
    if asked.names:
        from workbench.neurons.profiles import named_places, profile_neurons

        chosen = profile_neurons(subject, texts, named_places(subject, asked.names)).model_copy(update={"kind": "chosen"})
        place.mkdir(parents=True, exist_ok=True)
        chosen.write(place / "chosen.json")
        yield chosen, place
    if asked.functions:
        from workbench.neurons.functions import analyze_functions

        functions = analyze_functions(subject, texts, asked.functions)
        functions.write(place)
        yield functions.result, place
    if read:
        compared = compare_features(subject, texts, read, asked.seed)
        place.mkdir(parents=True, exist_ok=True)
        compared.write(place / "features.json")
        yield compared, place
    if asked.sparsity:
        from workbench.neurons.masking import analyze_sparsity

        masked = analyze_sparsity(subject, texts)
        masked.save(place)
        yield masked, place
    if asked.partition:
        from workbench.neurons.partition import analyze_partition

        divided = analyze_partition(subject, texts, asked.partition)
        divided.write(place)
        yield divided.result, place


def _of_facts(model: str, facts: Path, to: Path | None, settings: LocateSettings, device: str) -> tuple[ModelResult, Path]:
    """Find the neurons of facts, and return the result and the directory of its files."""
    from workbench.api.naming import open_named
    from workbench.models.identity import pick_device
    from workbench.neurons.locate import analyze_facts

    opened = open_named(model, out.event)
    report = analyze_facts(opened, facts, str(facts), settings, device=pick_device(device), events=out.event)
    for warning in report.result.data.warnings:
        out.warn(warning)
    place = results_folder(to, report.result.model)
    report.write(place)
    return report.result, place


def results_folder(to: Path | None, name: str) -> Path:
    """Return the directory of a model's results: the value of `-o`, or runs/neurons/MODEL."""
    return to or Path("runs", "neurons", name)


def write_page(place: Path, result: ModelResult) -> Path:
    """Write the page of all analyses of the same model in a directory; those of an earlier content of the same file are left out."""
    from workbench.ground.files import read_json
    from workbench.neurons.pages.page import SECTIONS, render_neurons

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
            out.warn(f"{path}: another version wrote it, so the page leaves it out; analyze the model again")
    return render_neurons(known, place / "index.html")


def labelled_texts(data: Path | None) -> Labelled:
    """Read labelled texts, those of the project if no file is named, and print what they cannot show.

    Raises:
        WorkbenchError: If there is no such file, or it has other rows.
    """
    from workbench.activations.labelled import EXPECTED, read_labelled

    if data is None:
        data = relative(find_project() / ABILITIES)
        if not data.is_file():
            raise UsageError(
                f"{data}: this project has no labelled texts, which analyses need", f"Name a file with --data. {EXPECTED}"
            )
    read = read_labelled(data, str(data))
    for warning in read.warnings:
        out.warn(warning)
    if read.several:
        out.say(f"{read.several} rows with several functions are left out")
    return read


def open_subject(model: str, device: str) -> NeuronSubject:
    """Load a recipe's result, or a model, with its neurons."""
    from workbench.api.naming import open_named
    from workbench.models.identity import pick_device
    from workbench.neurons.subject import open_neurons

    return open_neurons(open_named(model, out.event), pick_device(device), out.event)


def say(result: ModelResult) -> None:
    """Print the first section that a result has on the page: its sentences, tables and details."""
    from workbench.neurons.pages.page import SECTIONS

    section = SECTIONS[result.kind][1](result)[0]
    for line in section.lead:
        out.line(line)
    rows = [[row[0] if len(row[0]) <= SHOWN else f"…{row[0][1 - SHOWN :]}", *row[1:]] for row in section.rows]
    out.table(list(section.columns), rows, right=range(1, len(section.columns)))
    for table in section.tables:
        out.line(f"\n{table.title}" + (f" ({table.caption.rstrip('.')})" if table.caption else ""))
        cells = [[name, *(cell.text for cell in row)] for name, row in table.rows]
        out.table([table.corner, *table.columns], cells, right=range(1, 1 + len(table.columns)))
    for line in section.details:
        out.line(line)
