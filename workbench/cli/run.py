"""Commands `plan` and `run`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import Variation
from workbench.cli._recipes import load, score_lines
from workbench.console.options import (
    DeviceOpt,
    JsonOpt,
    MaxPointsOpt,
    QuietOpt,
    RecipeArg,
    RehashOpt,
    RunsOpt,
    SetOpt,
    SweepOpt,
    ThreadsOpt,
    VerboseOpt,
)
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import WorkbenchError, duration, shell, size
from workbench.ground.project import relative

if TYPE_CHECKING:
    from workbench.recipe.recipe import Recipe
    from workbench.run.plan import RunPlan
    from workbench.run.record import RunResult


@reads_recipes
def plan(
    recipe: RecipeArg,
    settings: SetOpt = None,
    sweep: SweepOpt = None,
    max_points: MaxPointsOpt = None,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    threads: ThreadsOpt = None,
    json: JsonOpt = False,
) -> None:
    """Show steps, bytes, memory, time and problems of a run in advance; of a sweep, one row for each configuration.

    Reads file headers only. `--device cuda` also works on a machine without a GPU.
    """
    from workbench.bricks.hub import Hub
    from workbench.ground.project import runs_of
    from workbench.resolve.resolve import resolve
    from workbench.run.plan import plan as make_plan

    out.quiet = json
    recipes, swept = Variation.of(settings, sweep, max_points).recipes(recipe, out.say, runs_dir)
    runs = runs_dir or relative(runs_of(recipes[0].project, writing=True))
    hub = Hub(headers_only=True, events=out.event)
    plans = [make_plan(resolve(one, hub), runs, threads, cuda=plans_cuda(device)) for one in recipes]

    def text() -> None:
        if swept:
            _print_plans(plans)
        else:
            _print_plan(plans[0], runs)

    warnings = () if swept and json else (warning for planned in plans for warning in planned.warnings)
    out.result(lambda: plans if swept else plans[0], text, json=json, warnings=warnings)
    for line in () if swept else _advice(recipes[0]):
        out.say(line)
    if problems := list(dict.fromkeys(problem for planned in plans for problem in planned.problems)):
        downloads = " For downloads of the hub, use `hf cache ls` and `hf cache rm`." if any(p.downloads for p in plans) else ""
        raise WorkbenchError(
            "\n".join(problems), f"`workbench runs ls` lists runs; `workbench runs rm NAME` removes one.{downloads}"
        )


def _advice(recipe: Recipe) -> list[str]:
    """Return the command that compares the bricks of a recipe, if one of its merges has several bricks on disk."""
    from workbench.steps.fields import NESTED

    for step in recipe.steps:
        named = [recipe.fields.bricks[name] for name in recipe.used_bricks(step)] if step.kind == "merge" else []
        if len(named) > 1 and all(brick.kind not in NESTED and (recipe.project / brick.target).is_dir() for brick in named):
            assert recipe.path is not None
            return [f"advice: {shell('workbench', 'brick', 'advise', relative(recipe.path))}"]
    return []


def _print_plans(plans: Sequence[RunPlan]) -> None:
    """Print the plans of a sweep's points, one row for each."""
    out.table(
        ["configuration", "steps", "reads", "writes", "peak memory", "time", "cached"],
        [
            [
                planned.recipe,
                ", ".join(f"{step.id}: {_method(step.to_dict())}" for step in planned.steps) or "(none)",
                size(planned.read_bytes),
                size(planned.write_bytes),
                size(planned.peak_bytes),
                duration(planned.seconds),
                ", ".join(planned.cached),
            ]
            for planned in plans
        ],
        right=(2, 3, 4, 5),
    )
    out.say(f"{len(plans)} configurations; each is written by `workbench run` with its name in quotes")


def _print_plan(planned: RunPlan, runs: Path) -> None:
    """Print the steps of a plan as a table, then the sources of stacked layers and sizes of pruned models, then its totals."""
    from workbench.grow.expansion.records import removal_line, stack_parts

    later = "" if planned.run else "  (`run` names it after the content of the inputs, once it has read them)"
    out.line(f"{planned.recipe} -> {runs / (planned.run or f'{planned.recipe}-…')}{later}")
    steps = [step.to_dict() for step in planned.steps]  # with the entries that only some methods have
    out.table(["step", "method", "inputs"], [_row(step) for step in steps] or [["(none)", "", "the base as it is"]])
    for step in steps:
        if rows := list(stack_parts(step)):
            out.table([step["id"], "source"], [list(row) for row in rows])
        if removal := removal_line(step):
            out.line(f"{step['id']}: {removal}")
    for edit in (edit for step in steps for edit in (step, *step.get("edits", ())) if "cost" in edit):
        out.line(f"{edit['id']}: {_cost(edit)}")
    in_format = f" in {planned.format}" if planned.format else ""
    out.line(
        f"reads {size(planned.read_bytes)}, writes {size(planned.write_bytes)}{in_format}, peak memory about {size(planned.peak_bytes)}"
        + (f" and {size(planned.device_bytes)} on the device, " if planned.device_bytes else ", ")
        + f"about {duration(planned.seconds)}"
        + (", and the passes over texts" if any("needs" in step for step in steps) else "")
        + (f"; cached: {', '.join(planned.cached)}" if planned.cached else "")
    )
    if planned.config:
        from workbench.ground.yamldoc import flow

        out.line(f"config.json: {flow(planned.config)}")
    if planned.downloads:
        fetched = ", ".join(f"{d.repository}@{d.commit[:10]} {size(d.bytes)}" for d in planned.downloads)
        out.line(f"downloads {size(planned.download_bytes)} from the hub first: {fetched}")
    if planned.checked_at_run:
        out.line(f"checked at run: {'; '.join(_grouped(planned.checked_at_run))}")


def plans_cuda(device: str) -> bool:
    """Return whether a plan is for a CUDA device; a device named as cuda may be missing on this machine."""
    from workbench.models.identity import has_cuda, pick_device

    if device == "auto":
        return has_cuda()
    return re.fullmatch(r"cuda(:\d+)?", device) is not None or pick_device(device).type == "cuda"


@reads_recipes
def run(
    recipe: RecipeArg,
    settings: SetOpt = None,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    to: Annotated[Path | None, typer.Option("-o", "--out", help="New directory to copy the result to.")] = None,
    require_license: Annotated[
        bool, typer.Option("--require-license", help="Refuse inputs whose license is unknown or non-commercial.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="If another process is writing this run, wait for it and then continue, instead of failing."),
    ] = False,
    threads: ThreadsOpt = None,
    rehash: RehashOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Run a recipe and write the resulting model.

    The result is a Hugging Face checkpoint, a PEFT adapter or a configuration directory, as the recipe's `output` says.
    An interrupted run resumes.
    """
    from workbench.run.device import Work, device_of_run
    from workbench.run.directory import run_for
    from workbench.run.execute import execute
    from workbench.run.forms import CHECKPOINT, form_of

    out.quiet, out.verbose = quiet or json, verbose
    if require_license:  # from headers: nothing is downloaded for a recipe that is refused
        from workbench.resolve.findings import require_licences

        require_licences(load(recipe, settings, runs_dir, headers_only=True)[0])
    resolved, runs = load(recipe, settings, runs_dir)
    for warning in resolved.warnings:
        out.warn(warning)
    result = execute(resolved, runs, Work(device_of_run(device, resolved), threads, out.event), out=to, wait=wait)

    form = form_of(resolved)
    written = run_for(runs, resolved.recipe.name, resolved.run_key).read_record().output
    assert written is not None, "a run that has finished has a result"
    for warning in form.warnings(written):
        out.warn(warning)

    def text() -> None:
        _print_result(result, form.describe(written))
        checkpoint = Path(result.place) if form is CHECKPOINT else None
        for line in (*form.hints(result.place, written, resolved), *score_lines(resolved, recipe, settings, checkpoint)):
            out.say(line)

    out.result(lambda: result, text, json=json)


def _print_result(result: RunResult, described: str) -> None:
    """Print the result's directory, facts that the model says, what was removed, checks of grow steps, time and memory."""
    for name, row in result.said.items():
        out.say(f"{name}: the model says {row.in_words}")
    out.line(result.place)
    grown = [row for row in (step.to_dict() for step in result.steps) if "grow" in row]
    if grown:
        from workbench.grow.expansion.records import GrowthCheck, removal_line
    for step in grown:
        if removal := removal_line(step):
            out.say(f"{step['id']}: {removal}")
        if "check" in step:
            out.say(f"{step['id']}: {GrowthCheck.model_validate(step['check']).line()}")
    out.say(f"{result.seconds:.1f} s, peak memory {size(result.peak_bytes)}, {described}")


def _grouped(lines: list[str]) -> list[str]:
    """Group lines that differ in the brick only: "brick 'a', brick 'b': its base"."""
    owners: dict[str, list[str]] = {}
    for line in lines:
        owner, _, text = line.partition(": ")
        owners.setdefault(text, []).append(owner)
    return [f"{', '.join(names)}: {text}" if text else ", ".join(names) for text, names in owners.items()]


def _cost(step: dict[str, Any]) -> str:
    """Describe the work of a step that is not cached: "sweep of 6 layers x 8 facts, values of 100 facts: about 6 min"."""
    cost = step["cost"]
    work, sweep = cost.get("work", {}), cost.get("sweep")
    continued = cost.get("continues")
    parts = [f"continues the history of {continued['run']}: {continued['facts']} facts"] if continued else []
    parts += [f"sweep of {sweep['layers']} layers x {sweep['facts']} facts"] if sweep else []
    parts += [f"statistics of {work['statistics']:,} tokens"] if work.get("statistics") else []
    parts += [f"values of {work['facts']} facts"] if "facts" in work else []
    parts += [f"a router fitted on {cost['prompts']} prompts"] if "prompts" in cost else []
    parts += [f"{cost['train_steps']:,} steps of training"] if "train_steps" in cost else []
    parts += [f"at most {cost['steps']:,} optimizer steps on {cost['facts']} facts"] if "steps" in cost else []
    return ", ".join(parts) + (f": about {duration(step['seconds'])} on one core" if "seconds" in step else "")


def _method(step: Mapping[str, Any]) -> str:
    """Return verb and method of a step, such as "merge ties"."""
    from workbench.steps import VERBS

    verb = next(v for v in VERBS if v in step)
    return f"{verb} {step[verb]}"


def _row(step: dict[str, Any]) -> list[str]:
    parts = [", ".join(f"{name} ({kind})" for name, kind in step["bricks"].items())] if step.get("bricks") else []
    parts += [f"copies of layers {', '.join(map(str, step['copied_layers']))}"] if "copied_layers" in step else []
    parts += [", ".join(step["inputs"])] if step.get("inputs") and not parts else []
    parts += [f"trains on {step['trains_on']}"] if "trains_on" in step else []
    if isinstance(chosen := step.get("neurons"), Mapping):  # a grow step has numbers of neurons there
        factor = f" times {step['factor']:g}" if "factor" in step else ""
        parts += [f"{100 * chosen['share']:.3g} % of {chosen['kind']} ({chosen['set']}){factor}"]
    text = "; ".join(parts)
    if "check" in step:
        text += f"{'; ' if text else ''}check {step['check']}"
    if "needs" in step:
        text += f"; runs models on {', '.join(step['inputs'])}"
    return [step["id"], _method(step), text]
