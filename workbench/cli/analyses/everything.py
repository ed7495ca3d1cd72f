"""Command `analyze all`: functions, sparsity and ablations with their defaults, on one page."""

from __future__ import annotations

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt
from workbench.cli._output import out
from workbench.cli.analyses.ablate import say_ablation
from workbench.cli.analyses.functions import say_functions
from workbench.cli.analyses.shared import DataOpt, ModelArg, OutOpt, labelled_texts, open_subject, results_folder, write_page
from workbench.cli.analyses.sparsity import say_sparsity


def everything(
    model: ModelArg,
    data: DataOpt,
    to: OutOpt = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Run `functions`, `sparsity` and `ablate` with their defaults, and write one page."""
    from workbench.cli.documents.analyze import EverythingDocument
    from workbench.library.neurons_ablate import analyze_ablation, read_sets
    from workbench.library.neurons_functions import analyze_functions
    from workbench.library.neurons_sparsity import analyze_sparsity

    out.quiet = json or quiet
    texts = labelled_texts(data)
    subject = open_subject(model, device)
    place = results_folder(to, subject.name)
    functions = analyze_functions(subject, texts, str(data))
    functions.write(place)
    sparsity = analyze_sparsity(subject, texts, str(data))
    sparsity.write(place)
    ablation = analyze_ablation(subject, texts, str(data), read_sets(place, subject))
    ablation.write(place)
    documents = {"functions": functions.document(), "sparsity": sparsity.document(), "ablation": ablation.document()}
    page = write_page(place, documents["functions"])

    def text() -> None:
        for say, document in zip((say_functions, say_sparsity, say_ablation), documents.values(), strict=True):
            say(document)
            out.line("")

    out.result(lambda: EverythingDocument.model_validate(documents), text, json=json)
    out.say(f"written: {page}")
