"""Commands `plan` and `run`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt, RecipeArg, RunsOpt, SetOpt, ThreadsOpt, VerboseOpt
from workbench.cli._output import out
from workbench.cli._recipes import load, score_lines
from workbench.errors import shell, size

if TYPE_CHECKING:
    from workbench.resolve.resolved import Resolved


# Values that vLLM accepts for --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def plan(
    recipe: RecipeArg,
    settings: SetOpt = None,
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    threads: ThreadsOpt = None,
    json: JsonOpt = False,
) -> None:
    """Show steps, bytes, memory, time and problems of a run in advance.

    Reads file headers only. `--device cuda` also works on a machine without a GPU.
    """
    from workbench.run.plan import plan as make_plan

    resolved, runs = load(recipe, settings, runs_dir, headers_only=True)
    planned = make_plan(resolved, runs, threads, cuda=plans_cuda(device))
    if json:
        out.json(planned.document())
    else:
        out.line(f"{planned.recipe} -> {runs / (planned.run or f'{planned.recipe}-…')}")
        out.table(["step", "method", "inputs"], [_row(step) for step in planned.steps] or [["(none)", "", "the base as it is"]])
        for edit in (edit for step in planned.steps for edit in (step, *step.get("edits", ())) if "cost" in edit):
            out.line(f"{edit['id']}: {_cost(edit)}")
        out.line(
            f"reads {size(planned.read_bytes)}, writes {size(planned.write_bytes)}, peak memory about {size(planned.peak_bytes)}"
            + (f" and {size(planned.device_bytes)} on the device, " if planned.device_bytes else ", ")
            + f"about {duration(planned.seconds)}"
            + (", and the passes over texts" if any("needs" in step for step in planned.steps) else "")
            + (f"; cached: {', '.join(planned.cached)}" if planned.cached else "")
        )
        if planned.downloads:
            fetched = ", ".join(f"{d['repository']}@{d['commit'][:10]} {size(d['bytes'])}" for d in planned.downloads)
            out.line(f"downloads {size(planned.download_bytes)} from the hub first: {fetched}")
        if planned.checked_at_run:
            out.line(f"checked at run: {'; '.join(_grouped(planned.checked_at_run))}")
        for warning in planned.warnings:
            out.warn(warning)
    if planned.problems:
        from workbench.errors import WorkbenchError

        downloads = " For downloads of the hub, use `hf cache ls` and `hf cache rm`." if planned.downloads else ""
        raise WorkbenchError(
            "\n".join(planned.problems), f"`workbench runs ls` lists runs; `workbench runs rm NAME` removes one.{downloads}"
        )


def plans_cuda(device: str) -> bool:
    """Return whether a plan is for a CUDA device; a device named as cuda may be missing on this machine."""
    from workbench.models.device import has_cuda, pick_device

    if device == "auto":
        return has_cuda()
    return re.fullmatch(r"cuda(:\d+)?", device) is not None or pick_device(device).type == "cuda"


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
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Run a recipe and write the resulting model.

    The result is a Hugging Face checkpoint, a PEFT adapter or a configuration directory, as the recipe's `output` says.
    An interrupted run resumes.
    """
    from workbench.edit.greedy import told as said_in_words
    from workbench.grow.expansion.kept import told
    from workbench.models.device import pick_device
    from workbench.run.execute import execute

    out.quiet, out.verbose = quiet or json, verbose
    if require_license:  # from headers: nothing is downloaded for a recipe that is refused
        from workbench.resolve.licences import require_licences

        require_licences(load(recipe, settings, runs_dir, headers_only=True)[0])
    resolved, runs = load(recipe, settings, runs_dir)
    for warning in resolved.warnings:
        out.warn(warning)
    result = execute(resolved, runs, device=pick_device(device), threads=threads, out=to, events=out.event, wait=wait)
    if json:
        out.json(result)
        return
    for name, row in result["said"].items():
        out.say(f"{name}: the model says {said_in_words(row)}")
    if result["adapter"]:
        _say_adapter(result, resolved, runs)
        for line in score_lines(resolved, recipe, settings):
            out.say(line)
        return
    if result["directory"]:
        out.line(result["directory"])
        out.say(
            f"{result['seconds']:.1f} s, peak memory {size(result['peak_bytes'])}, configuration {result['configuration'][:12]}"
        )
        out.say(f'load:   workbench.load("{result["directory"]}")')
        out.say(f"facts:  workbench memory ls {shell(result['directory'])}")
        for line in score_lines(resolved, recipe, settings):
            out.say(line)
        return
    out.line(result["model"])
    for step in result["steps"]:
        if "check" in step:
            out.say(f"{step['id']}: {told(step['check'])}")
    out.say(f"{result['seconds']:.1f} s, peak memory {size(result['peak_bytes'])}, configuration {result['configuration'][:12]}")
    out.say(f'load:   {loading_class(result["model"])}.from_pretrained("{result["model"]}")')
    out.say(f"serve:  vllm serve {shell(result['model'])}")
    for line in score_lines(resolved, recipe, settings, Path(result["model"])):
        out.say(line)


def _say_adapter(result: dict[str, Any], resolved: Resolved, runs: Path) -> None:
    """Print the adapter's directory, its size and error, and commands that use it."""
    from workbench.run.directory import run_for

    record = run_for(runs, resolved.recipe.name, resolved.run_key).record["output"]
    base = resolved.recipe.fields.base
    out.line(result["adapter"])
    out.say(
        f"{result['seconds']:.1f} s, peak memory {size(result['peak_bytes'])}, rank {record['rank']}, {len(record['tensors'])} tensors, "
        f"{size(record['bytes'])}, relative error {record['error']:.1e}"
    )
    if record["whole"]:
        out.say(
            f"{len(record['whole'])} tensors are saved whole (modules_to_save, biases); PEFT loads them, plain LoRA loaders do not: "
            f"{', '.join(record['whole'][:3])}" + (" …" if len(record["whole"]) > 3 else "")
        )
    out.say(f'load:   PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{result["adapter"]}")')
    say_text_only(str(resolved.base_path))
    if record["plain"] and record["rank"] <= VLLM_RANKS[-1]:
        most = next(rank for rank in VLLM_RANKS if rank >= record["rank"])
        out.say(
            f"serve:  vllm serve {shell(base)} --enable-lora --max-lora-rank {most} "
            f"--lora-modules " + shell(f"{resolved.recipe.name}={result['adapter']}")
        )


def loading_class(model: str | Path) -> str:
    """Return the transformers class that loads all parts of a model directory."""
    from workbench.models.skeleton import loading_class as of_config
    from workbench.weights.checkpoint import read_config

    return of_config(read_config(Path(model), str(model)))


def say_text_only(base: str) -> None:
    """Print that an adapter's modules are those of the text decoder, if the base has more parts."""
    from workbench.bricks.locate import locate

    if (whole := loading_class(locate(base, Path.cwd(), "base")[0])) != "AutoModelForCausalLM":
        out.say(f"        (the adapter names modules of the text decoder; {whole} loads the whole base)")


def _grouped(lines: list[str]) -> list[str]:
    """Group lines that differ in the brick only: "brick 'a', brick 'b': its base"."""
    owners: dict[str, list[str]] = {}
    for line in lines:
        owner, _, text = line.partition(": ")
        owners.setdefault(text, []).append(owner)
    return [f"{', '.join(names)}: {text}" if text else ", ".join(names) for text, names in owners.items()]


def _cost(step: dict[str, Any]) -> str:
    """Describe the work of an edit that is not cached: "sweep of 6 layers x 8 facts, values of 100 facts: about 6 min"."""
    cost = step["cost"]
    work, sweep = cost.get("work", {}), cost.get("sweep")
    parts = [f"sweep of {sweep['layers']} layers x {sweep['facts']} facts"] if sweep else []
    parts += [f"statistics of {work['statistics']:,} tokens"] if work.get("statistics") else []
    parts += [f"values of {work['facts']} facts"] if "facts" in work else []
    parts += [f"{cost['train_steps']:,} steps of training"] if "train_steps" in cost else []
    parts += [f"at most {cost['steps']:,} optimizer steps on {cost['facts']} facts"] if "steps" in cost else []
    return ", ".join(parts) + (f": about {duration(step['seconds'])} on one core" if "seconds" in step else "")


def duration(seconds: float) -> str:
    """Format a time: "40 s", "6 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _row(step: dict[str, Any]) -> list[str]:
    verb = next(v for v in ("merge", "edit", "grow") if v in step)
    parts = [", ".join(f"{name} ({kind})" for name, kind in step["bricks"].items())] if step.get("bricks") else []
    parts += [f"copies of layers {', '.join(map(str, step['copied_layers']))}"] if "copied_layers" in step else []
    parts += [", ".join(step["inputs"])] if step.get("inputs") and not parts else []
    parts += [f"trains on {step['trains_on']}"] if "trains_on" in step else []
    if chosen := step.get("neurons"):
        factor = f" times {step['factor']:g}" if "factor" in step else ""
        parts += [f"{100 * chosen['share']:.3g} % of {chosen['kind']} ({chosen['set']}){factor}"]
    text = "; ".join(parts)
    if "check" in step:
        text += f"{'; ' if text else ''}check {step['check']}"
    if "needs" in step:
        text += f"; runs each brick's model on {', '.join(step['inputs'])}"
    return [step["id"], f"{verb} {step[verb]}", text]
