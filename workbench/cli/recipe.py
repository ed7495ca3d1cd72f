"""Commands `recipe new|check|schema` and `methods`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.naming import SUFFIXES, recipes_folder
from workbench.console.options import JsonOpt, MaxPointsOpt, RecipesArg, SetOpt, SweepOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, WorkbenchError, nearest, shell

if TYPE_CHECKING:
    from workbench.recipe.describe import MethodDescription

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Create, check, compare and import recipes.")

TEMPLATE = """\
# workbench run {path}
version: 1
base: {base}
bricks:{bricks}
{steps}{suite}"""
STEPS = """\
steps:
  - id: mix
    merge: ties            # `workbench methods` lists all methods
    density: 0.2
    lambda: 1.0
"""
NO_BRICKS = """ {}
  # math: org/math-lora    # an adapter, a checkpoint or a directory with a brick.yaml; then a step that uses it:
steps: []
  # - merge: ties
"""
IGNORED = "runs/\n.workbench/\nreports/\n"


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(help="NAME for recipes/NAME.yaml in a project, or the file to write.", show_default=False)
    ],
    base: Annotated[str, typer.Option(help="Base model: a directory or hub id.")] = "bricks/starter/base",
    brick: Annotated[
        list[str] | None, typer.Option(metavar="NAME=REF", help="Name and directory or hub id of a brick. Repeatable.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Suite to score; default: starter, if the project has it.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Task to score, of lm-eval or of evals/tasks. Repeatable.")
    ] = None,
    project: Annotated[
        Path | None, typer.Option(help="Project folder to create first, with recipes/, bricks/ and evals/.")
    ] = None,
) -> None:
    """Create a recipe to start from, and optionally a project folder.

    Existing files are not overwritten.
    """
    from workbench.ground import yamldoc
    from workbench.ground.files import write_text
    from workbench.ground.foreign_names import retyped
    from workbench.ground.project import find_project
    from workbench.ground.recognize import look
    from workbench.steps.fields import NAME

    for ref in (base, *(entry.partition("=")[2] for entry in brick or [])):
        if retyped(ref) or ((thing := look(Path(ref))) and thing.problem):
            raise WorkbenchError(f"{ref}: no recipe takes this as it is")  # the command line adds what to type
    path = _file(name, project)
    root = project or find_project(path)
    has_starter = (root / "bricks" / "add").is_dir() and (root / "bricks" / "reverse").is_dir()
    pairs = [entry.partition("=") for entry in brick or (["add=bricks/add", "reverse=bricks/reverse"] if has_starter else [])]
    if bad := [name for name, equals, ref in pairs if not equals or not ref]:
        raise UsageError(f"--brick {bad[0]}: expected NAME=REF", "--brick math=org/math-lora")
    names = [name for name, _, _ in pairs]
    if bad := [name for name in names if not re.fullmatch(NAME, name) or names.count(name) > 1]:
        raise UsageError(f"--brick {bad[0]}=…: expected a name of its own, of a-z, 0-9 and . _ -", "--brick math=org/math-lora")
    if project is not None:  # the recipe is read in the project's folder
        base, pairs = _located(base, project), [(name, equals, _located(ref, project)) for name, equals, ref in pairs]
    lines = "".join(f"\n  {name}: {yamldoc.flow(ref)}" for name, _, ref in pairs) or NO_BRICKS.rstrip("\n")
    if suite is None and not task and (root / "evals" / "suites" / "starter.yaml").is_file():
        suite = "starter"
    scored = [*([suite] if suite else []), *([{"tasks": task}] if task else [])]
    text = TEMPLATE.format(
        path=shell(path),
        base=yamldoc.flow(base),
        bricks=lines,
        steps=STEPS if pairs else "",
        suite=f"eval: {yamldoc.flow(scored)}\n" if scored else "",
    )
    if project is not None:
        for folder in ("recipes", "bricks", "evals/suites", "evals/tasks"):
            (project / folder).mkdir(parents=True, exist_ok=True)
        if not (project / ".gitignore").exists():
            write_text(project / ".gitignore", IGNORED)
    write_text(path, text)
    out.line(str(path))
    if project is None:
        out.say(f"check: workbench recipe check {shell(path)}")
    else:
        out.say(f"next:  {shell('cd', project)}; workbench plan {shell(path.stem)}; workbench run {shell(path.stem)}")
        if not scored:
            out.say(
                f"score your own questions there: workbench suite new NAME --data FILE.jsonl --kind exact --base {shell(base)}"
            )


def _file(name: str, project: Path | None) -> Path:
    """Return the file of a new recipe: for a NAME in a project, recipes/NAME.yaml, which commands then find by this name."""
    path, folder = Path(name), project / "recipes" if project else recipes_folder()
    stem = path.stem if path.suffix in SUFFIXES else path.name
    if project or (path.name == name and stem == name and folder.is_dir()):
        file, others = folder / f"{stem}.yaml", [folder / f"{stem}.yml", *(() if project else (path,))]
    else:
        file, others = path if path.suffix in SUFFIXES else path.with_name(f"{stem}.yaml"), []
    if taken := next((one for one in (file, *others) if one.exists()), None):
        raise WorkbenchError(f"{taken}: already exists", "Choose another name: existing files are not overwritten.")
    return file


def _located(ref: str, project: Path) -> str:
    """Return a reference as it reads from the project's folder: a directory of the working directory becomes an absolute path."""
    return str(Path(ref).resolve()) if Path(ref).is_dir() and not (project / ref).exists() else ref


@app.command()
@reads_recipes
def check(recipes: RecipesArg, settings: SetOpt = None, sweep: SweepOpt = None, max_points: MaxPointsOpt = None) -> None:
    """Check recipes without reading their inputs, and list the configurations of sweeps.

    Exits with 2 if a recipe is invalid.
    """
    from workbench.api.naming import Variation

    failed = False
    for name in recipes:
        try:
            points, swept = Variation.of(settings, sweep, max_points).recipes(name, out.say)
            steps = len(points[0].steps)
            number = f", {len(points)} configurations:" if swept else ""
            out.line(f"{name}: ok, {steps} step{'s' if steps != 1 else ''}{number}")
            for point in points if swept else ():
                out.line(f"  {point.name}")
        except WorkbenchError as error:
            out.error(error)
            failed = True
    if failed:
        raise typer.Exit(2)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from workbench.recipe.schema import recipe_schema

    out.json(recipe_schema())


@reads_recipes
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Method to explain: its fields, formula and paper.", show_default=False)
    ] = None,
    json: JsonOpt = False,
) -> None:
    """List the methods that steps can use, or explain one.

    Includes methods of installed distributions (entry point group workbench.methods) and, if the project is trusted, of its
    methods/ folder.
    """
    from workbench.ground.project import find_project
    from workbench.recipe.describe import describe, summary
    from workbench.recipe.methods import MethodFinder, untrusted
    from workbench.recipe.methods import methods as built_in

    finder = MethodFinder(find_project())
    known = [*built_in().values(), *finder.plugins.usable]
    for problem in finder.plugins.problems:
        out.warn(problem.message)
    unloaded = untrusted("not listed", finder.project) if finder.files and not finder.trusted else None
    if name is None:
        rows = [[cls.verb, cls.name, cls.plugin.source if cls.plugin else "built in", summary(cls)] for cls in known]
        out.result(
            lambda: [describe(cls) for cls in known],
            lambda: out.table(["verb", "method", "from", "what it does"], rows),
            json=json,
        )
        if unloaded:
            out.say(f"{unloaded.message}. {unloaded.hint}")
        return
    matches = [cls for cls in known if name in (cls.name, cls.tag)]
    if not matches and unloaded:
        raise untrusted(f"unknown method '{name}'", finder.project)
    if not matches:
        raise UsageError(
            f"unknown method '{name}'. {nearest(name, [cls.name for cls in known])}", "`workbench methods` lists all."
        )
    document = describe(matches[0])
    out.result(lambda: document, lambda: _print(document), json=json)


def _print(method: MethodDescription) -> None:
    """Print a method's text, formula, paper and fields."""
    out.line(f"{method.verb}: {method.name}\n{method.text}\n")
    out.line(f"formula  {method.formula}\npaper    {method.paper}")
    if method.plugin:
        out.line(f"from     {method.plugin.source}")
    out.line("")
    out.table(["field", "default", "meaning"], [[f.name, f.default, f.text] for f in method.fields])
