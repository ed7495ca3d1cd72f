"""Command `brick advise`."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import SUFFIXES, load_named
from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt, ThreadsOpt
from workbench.console.output import out
from workbench.ground.errors import UsageError, WorkbenchError, shell

if TYPE_CHECKING:
    from workbench.advice.evidence import Trial
    from workbench.advice.pools import Pair
    from workbench.advice.result import Advice


TextsOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--texts",
        metavar="BRICK=FILE",
        help="A brick's own prompts and answers (jsonl), to find contradictions; default: its training texts. Repeatable.",
    ),
]
MeasureOpt = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Also run each brick alone and a few merges on up to 24 prompts of each brick, and a route if the best merge loses a skill; "
        "advise the best of them if it is clearly the best.",
    ),
]
WriteOpt = Annotated[
    Path | None,
    typer.Option(
        "--write",
        metavar="FILE",
        help="Recipe to write, with a sweep over lambda where none was measured to be best; an existing file is not overwritten.",
    ),
]


def advise(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="BRICK...",
            help="Bricks: directories, or names in bricks/; or a recipe, for the bricks that it merges.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; default: the recipe's, or the one that the first brick names.")
    ] = None,
    texts: TextsOpt = None,
    measure: MeasureOpt = False,
    write: WriteOpt = None,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "auto",
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Say how some bricks relate, and recommend how to merge them, or to route between them.

    Measures how much the bricks overlap (RV coefficient) and how long their deltas are, leaves out copies and bricks that point against
    another one, finds bricks whose texts contradict each other, and lists stored scores of the same bricks. Bricks of one skill are one
    group; many groups are routed. No model is run without --measure.
    """
    from workbench.advice.advise import advise as look
    from workbench.api.bricks import base_of_brick, brick_directory, find_brick
    from workbench.ground.project import find_project, runs_of
    from workbench.models.identity import pick_device
    from workbench.run.device import Work
    from workbench.scores.store import ScoreStore
    from workbench.weights.device import exact

    out.quiet = quiet or json
    places, of_recipe = _of_recipe(names[0]) if _is_recipe(names) else (_places(names), None)
    files = _files(texts or [])
    _check_free(write)
    on = pick_device(device)
    with exact(on):
        advice = look(
            {name: str(brick_directory(place)) for name, place in places.items()},
            base or of_recipe or base_of_brick(find_brick(next(iter(places.values())))),
            files,
            project=Path.cwd(),
            work=Work(on, threads, out.event),
            measured=measure,
            store=ScoreStore(runs_of(find_project()) / "scores"),
        )
    if write is not None:
        advice = _written(advice, write)
    options = [*(["--base", base] if base and not of_recipe else []), *(["--measure"] if measure else [])]
    out.result(lambda: advice, lambda: _print(advice, [*names, *options]), json=json)


def _is_recipe(names: list[str]) -> bool:
    """Return True if the arguments are one recipe."""
    recipes = [name for name in names if name.endswith((*SUFFIXES, "]"))]
    if recipes and len(names) > 1:
        raise UsageError(
            f"{recipes[0]}: a recipe stands alone", f"Type {shell('workbench', 'brick', 'advise', recipes[0])}, or name bricks."
        )
    return bool(recipes)


def _of_recipe(path: str) -> tuple[dict[str, str], str]:
    """Return brick -> place for the bricks that a recipe's merges read, and the place of its base."""
    recipe = load_named(path)
    named = [name for step in recipe.steps if step.kind == "merge" for name in recipe.used_bricks(step)]
    bricks = {name: recipe.fields.bricks[name] for name in dict.fromkeys(named)}
    if not bricks:
        raise UsageError(f"{path}: no step merges bricks", "Name bricks, or a recipe with a merge step.")
    if hasattr(recipe.fields.base, "adapter"):
        raise UsageError(
            f"{path}: its base is a model with an adapter",
            "Write that model first (`workbench brick bake`), and name the bricks with it as --base.",
        )
    if made := [name for name, brick in bricks.items() if brick.kind == "recipe" or brick.target.endswith(SUFFIXES)]:
        raise UsageError(
            f"{path}: brick '{made[0]}' is a recipe, and a recipe has no weights before it has run",
            f"Run it, and name its result and the other bricks: {shell('workbench', 'run', bricks[made[0]].target)}",
        )

    def place(target: str) -> str:
        below = recipe.project / target
        return str(below) if below.is_dir() else target

    return {name: place(brick.target) for name, brick in bricks.items()}, place(recipe.fields.base_name)


def _places(names: list[str]) -> dict[str, str]:
    """Return brick -> place as named. Raises UsageError if two places have one name."""
    found: dict[str, str] = {}
    for place in names:
        name = Path(place).resolve().name
        if name in found:
            same = "is named twice" if Path(found[name]).resolve() == Path(place).resolve() else "names two directories"
            raise UsageError(f"brick '{name}' {same}", "Name each brick once, and give every directory another name.")
        found[name] = place
    return found


def _files(texts: list[str]) -> dict[str, Path]:
    """Return brick -> file of its texts, from BRICK=FILE."""
    pairs = [entry.partition("=") for entry in texts]
    if bad := [name for name, equals, file in pairs if not equals or not file]:
        raise UsageError(f"--texts {bad[0]}: expected BRICK=FILE", "--texts add=bricks/add/train.jsonl")
    return {name: Path(file) for name, _, file in pairs}


def _check_free(path: Path | None) -> None:
    """Check before any work that neither the recipe nor one of its groups would overwrite a file."""
    places = [path, *path.parent.glob(f"{escape(path.stem)}-*-group.yaml")] if path is not None else []
    if there := next((place for place in places if place.exists()), None):
        raise WorkbenchError(f"{there}: already exists", "Choose another name: existing files are not overwritten.")


def _written(advice: Advice, path: Path) -> Advice:
    """Write the recommended recipe with those of its groups, and return the advice with the name of its file."""
    from workbench.ground.files import write_text

    if advice.step is None:
        raise WorkbenchError(f"no recipe was written: {advice.says}", advice.reasons[0] if advice.reasons else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    for place, text in advice.recipes(path).items():
        write_text(place, text)
    return advice.model_copy(update={"recipe": str(path)})


def _print(advice: Advice, arguments: list[str]) -> None:
    """Print bricks, pairs, the advice and its limits; `arguments` are those of the command that writes the recipe."""
    out.table(
        ["brick", "relative norm", "auto weight"],
        [[brick.name, f"{100 * brick.relative_norm:.3g} %", f"{brick.weight:.2f}"] for brick in advice.bricks],
        right=(1, 2),
    )
    _print_pairs(advice.pairs)
    out.line("")
    if advice.trial is not None:
        _print_trial(advice.trial)
    out.line(advice.says)
    for brick in advice.left_out:
        out.line(f"left out: {brick.name} {brick.because}")
    for text in advice.warnings:
        out.line(f"warning: {text}")
    for pair in advice.pairs:
        if pair.shared is not None and pair.shared.contradicts and pair.shared.example:
            prompt, one, two = pair.shared.example
            out.line(f"  {prompt!r}: {pair.one} {one!r}, {pair.two} {two!r}")
    if advice.step is not None:
        fields = ", ".join(f"{key}: {_flow(value)}" for key, value in advice.step.items())
        swept = f", lambda swept over {', '.join(f'{value:g}' for value in advice.sweep)}" if advice.sweep else ""
        out.line(f"recommended: {{{fields}}}{swept}{_between(advice)}")
    for reason in advice.reasons:
        out.line(f"  {reason}")
    from workbench.ground.numbers import plural
    from workbench.report.numbers import POINTS

    for row in advice.scored_before:
        out.line(
            f"scored here: {row.name}{f', {row.settings}' if row.settings else ''}: {POINTS.score(row.value)} on suite {row.suite}, mean over "
            f"{plural(row.tasks, 'skill')}, {plural(row.items, 'item')}, of {row.of} stored configurations of these bricks"
        )
    for line in advice.unknown:
        out.line(f"not known: {line}")
    if advice.recipe:
        out.line(advice.recipe)
        out.say(f"score it: {shell('workbench', 'eval', advice.recipe)}")
    elif advice.step is not None:
        out.say(f"write it: {shell('workbench', 'brick', 'advise', *arguments, '--write')} recipes/NAME.yaml")


def _between(advice: Advice) -> str:
    """Return the groups that a recommended route chooses among, as the end of a line; empty for a merge."""
    if advice.step is None or "route" not in advice.step:
        return ""
    merged = [
        f"{group.name} ({' + '.join(group.bricks)}, {_flow(group.step)})" if group.step else group.name for group in advice.groups
    ]
    return f" between {', '.join(merged)}"


_MOST_PAIRS = 15  # six bricks


def _print_pairs(pairs: Sequence[Pair]) -> None:
    """Print the pairs; of very many, those that contradict or oppose each other and those with the largest RV."""
    if not pairs:
        return
    order = sorted(range(len(pairs)), key=lambda i: (not pairs[i].clash, -pairs[i].rv))
    shown = [pairs[i] for i in sorted(order[:_MOST_PAIRS])]
    out.line("")
    out.table(
        ["pair", "RV", "by layer", "cosine", "opposite signs", "shared prompts", "answered differently"],
        [_pair_row(pair) for pair in shown],
        right=(1, *range(3, 7)),
    )
    if rest := [pairs[i] for i in order[_MOST_PAIRS:]]:
        out.line(f"and {len(rest)} other pairs, RV {rest[0].rv:.3f} or less (--json has all)")


def _flow(value: Any) -> str:
    """Return a field's value as it would stand on one line of a recipe."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_flow(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _print_trial(trial: Trial) -> None:
    """Print the share of prompts that each model answers, with intervals, brick by brick and in all."""
    asked = [row.brick for row in trial.alone]
    rows = [["each brick alone", *(str(row.accuracy) for row in trial.alone), ""]]
    for candidate in (trial.base, *trial.candidates):
        right = {row.brick: str(row.accuracy) for row in candidate.bricks}
        rows.append([candidate.name, *(right.get(name, "") for name in asked), str(candidate.accuracy)])
    out.table([f"% of {trial.items} prompts of", *asked, "all"], rows, right=tuple(range(1, len(asked) + 2)))
    out.line("")


def _pair_row(pair: Pair) -> list[str]:
    """Return the cells of a pair."""
    shared = pair.shared
    return [
        f"{pair.one}, {pair.two}",
        f"{pair.rv:.3f}",
        "" if pair.rv_lowest_layer is None else f"{pair.rv_lowest_layer:.2f} to {pair.rv_highest_layer:.2f}",
        "" if pair.cosine is None else f"{pair.cosine:+.3f}",
        "" if pair.sign_conflict is None else f"{100 * pair.sign_conflict:.1f} %",
        "?" if shared is None else str(shared.prompts),
        "" if shared is None or not shared.prompts else str(shared.different),
    ]
