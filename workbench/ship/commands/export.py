"""Commands `export write|check`; `export TARGET` is `export write TARGET`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from workbench.api.naming import find, load_named
from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt, RunsOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, WorkbenchError, shell

if TYPE_CHECKING:
    from workbench.ship.expected import Compared
    from workbench.ship.export import Exported
    from workbench.ship.subject import Subject


class _WithDefault(TyperGroup):
    """A group whose first word may be left out where it is the default command."""

    default = "write"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command if the first word is no command."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_WithDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Write adapters for LoRA servers, and check a running server. `workbench export TARGET` is `workbench export write TARGET`.",
)


@app.command()
@reads_recipes
def write(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Finished run, routed configuration or model directory, or recipe, whose adapter bricks are exported.",
            show_default=False,
        ),
    ],
    server: Annotated[
        str, typer.Option("--for", metavar="SERVER", help="vllm, sglang, llama.cpp or semantic-router.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="New directory.", show_default=False)],
    served_base: Annotated[
        str | None,
        typer.Option(
            "--served-base",
            metavar="NAME",
            help="Name of the base on the server: its hub id, or its directory there. Needed for adapters, except for llama.cpp.",
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp",
            metavar="DIR",
            help="llama.cpp's source folder, whose convert_hf_to_gguf.py writes the base or whole model. Default: print its command.",
        ),
    ] = None,
    brick: Annotated[
        list[str] | None, typer.Option("--brick", help="Adapter brick of a recipe; default: all that its steps use. Repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help='JSONL file of {"prompt":} for expected.jsonl; default: a few of the calibration or fixed ones.'
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Prompts to take from the file, with every frequent wording.")
    ] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Largest length of an expected answer in tokens.")] = 16,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write what a LoRA server needs: plain adapters, the command that serves them, and expected answers.

    All adapters get one rank, with their scaling in the factors: servers ignore rank_pattern and alpha_pattern and refuse DoRA and
    modules_to_save. A whole model gets the command and the expected answers only.
    """
    from workbench.ground.files import check_new
    from workbench.models.identity import pick_device
    from workbench.models.texts import read_prompts
    from workbench.ship.export import PROMPTS, Export, check_export, check_server, write_export
    from workbench.ship.servers import GGUF, check_llama_cpp, converter, model_path

    out.quiet = json or quiet
    check_server(server)
    check_llama_cpp(server, llama_cpp)
    check_new(to)
    texts = tuple(read_prompts(prompts, str(prompts), samples)) if prompts else ()
    subject = _open(target, brick or [], runs_dir)
    served = check_export(subject, server, served_base)
    texts = texts or subject.prompts[:samples] or PROMPTS
    made = write_export(subject, Export(server, served, texts, tokens, llama_cpp), to, pick_device(device), out.event)
    for first, second in made.alike:
        out.warn(
            f"the prompts do not tell '{first}' from '{second}': name prompts that one of them was trained for with --prompts"
        )
    converted = to / GGUF if llama_cpp else None
    words = converter(subject.model.base_path, made.dtype, to.resolve() / GGUF) if server == "llama.cpp" else []
    model = ""
    if subject.place is not None and not words and model_path(subject.place, to) is None:
        out.say("serve.sh does not name the model, which is outside of the project: MODEL does")
        model = f"MODEL={shell(subject.place)} "
    if not brick and find(target, runs_dir).kind == "recipe":
        out.say(f"these are the bricks of {subject.name}; its result is exported by `workbench export RUN`")
    out.result(lambda: made, lambda: _written(made, to, converted, words, model), json=json)


def _written(made: Exported, to: Path, converted: Path | None, words: list[str], model: str) -> None:
    """Print the files of an export and the next commands; `model` sets the variable that serve.sh needs."""
    from workbench.ship.servers import PORTS
    from workbench.ship.servers import ROUTER_FILE as ROUTER

    for adapter in made.adapters.values():
        ranks, rank = adapter.ranks, max(adapter.ranks) if words else made.rank
        padded = f" -> {rank}" if ranks != [rank] else ""
        out.line(f"{to / adapter.path}  {adapter.modules} modules, rank {', '.join(map(str, ranks))}{padded}")
    out.line(f"{to / 'expected.jsonl'}  {made.prompts} prompts, tolerance {made.tolerance:g} nats")
    out.line(str(to / "serve.sh"))
    if made.server == "semantic-router":
        out.line(f"{to / ROUTER}  {len(made.adapters)} bricks and the base")
    if converted:
        out.line(str(converted))
    elif words:
        out.say(f"convert, in llama.cpp's folder:  {shell('python3', *words)}")
    out.say(f"serve:  {model}{shell('sh', to / 'serve.sh')}")
    out.say(f"check:  workbench export check http://localhost:{PORTS[made.server]} --expected {shell(to)}")


def _open(target: str, bricks: list[str], runs_dir: Path | None) -> Subject:
    """Return the subject that an argument names."""
    from workbench.bricks.hub import Hub
    from workbench.ground.project import find_project
    from workbench.run.opened import is_configuration
    from workbench.ship.subject import of_configuration, of_model, of_recipe, of_run

    hub, found = Hub(events=out.event), find(target, runs_dir)
    if found.kind == "recipe":
        return of_recipe(load_named(target, runs=runs_dir), bricks, hub)
    if bricks:
        raise UsageError(
            "--brick chooses bricks of a recipe, but a run or directory is named", "Leave --brick out, or name the recipe."
        )
    if found.run is not None:
        return of_run(found.run, hub)
    if found.path is None:
        raise UsageError(
            f"{target}: expected files on disk, found a hub id", f"hf download {shell(target)} --local-dir DIR, then export DIR."
        )
    if is_configuration(found.path):
        return of_configuration(found.path, hub)
    if (found.path / "adapter_config.json").is_file():
        raise WorkbenchError(
            f"{target}: is an adapter without a run or recipe",
            f"workbench recipe new NAME --base BASE --brick {shell(f'NAME={target}')}, then export the recipe.",
        )
    if not (found.path / "config.json").is_file():
        raise UsageError(f"{target}: expected a recipe, a run, or a model directory with a config.json")
    return of_model(found.path, find_project(), hub)


@app.command()
def check(
    url: Annotated[str, typer.Argument(metavar="URL", help="Running server, such as http://localhost:8000.", show_default=False)],
    expected: Annotated[Path, typer.Option("--expected", metavar="DIR", help="Directory of the export.")] = Path(),
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Largest difference of a log-probability in nats. Default: that of the export."),
    ] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Compare a server with the OpenAI completions API with the expected answers of an export.

    Exits with 1 if a text or log-probability differs. A key of the server is read from OPENAI_API_KEY.
    """
    from workbench.ground.files import read_json
    from workbench.ship.expected import LEAST_TOLERANCE, check_server, read_expected, summary
    from workbench.ship.export import RECORD

    out.quiet = json or quiet
    rows = read_expected(expected)
    record = read_json((expected if expected.is_dir() else expected.parent) / RECORD, tolerance=(int, float), length=int) or {}
    limit = record.get("tolerance", LEAST_TOLERANCE) if tolerance is None else tolerance
    length = record.get("length", max(len(row.tokens) for row in rows))
    compared = check_server(url, rows, limit, length, out.event)
    checked = summary(url, limit, compared)
    wrong = [one for one in compared if one.differs]

    def text() -> None:
        columns = ["model", "answers", "same", "ties", "other text", "other log-probs", "largest difference"]
        cells = [
            [m.model, *map(str, (m.answers, m.same, m.ties, m.texts, m.logprobs)), f"{m.largest:.2g}"] for m in checked.models
        ]
        out.table(columns, cells, right=range(1, 7))
        for one in {one.expected.model: one for one in reversed(wrong)}.values():
            out.line(_difference(one))

    out.result(lambda: checked, text, json=json)
    if wrong:
        names = ", ".join(dict.fromkeys(one.expected.model for one in wrong))
        raise WorkbenchError(
            f"{len(wrong)} of {len(compared)} answers differ from the export by more than {limit:g} nats: {names}",
            "Compare the server's command with serve.sh: base, adapters, --dtype, and settings of generation_config.json.",
        )
    out.say(f"all {len(compared)} answers are as expected, within {limit:g} nats")


def _difference(one: Compared) -> str:
    """Describe the first answer of a model that differs."""
    if one.verdict == "text":
        return (
            f"{one.expected.model}: {one.expected.prompt!r}: expected {one.expected.text!r}, the server wrote {one.answer.text!r}"
        )
    found, tokens = len(one.answer.logprobs), len(one.expected.tokens)
    few = f", and {found} were returned for {tokens} tokens" if found != tokens else ""
    return f"{one.expected.model}: {one.expected.prompt!r}: log-probabilities differ by up to {one.largest:.3g} nats{few}"
