"""`edit trace`: a report of where a model looks facts up, on two models of which it is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds import people
from worlds.commands import call, document
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project

from workbench.cli.app import main
from workbench.edit.places.knowledge import Trace, What
from workbench.ground.errors import WorkbenchError
from workbench.neurons.trace import OUTPUTS, interval, layers_of, run_traces, table_of, trace_table
from workbench.run.opened import NamedModel

Traces = tuple[dict[What, Trace], dict[str, str]]


@pytest.fixture
def traced(project: Project) -> Callable[..., Traces]:
    """(folder of a people model, facts) -> its traces and answers."""

    def run(folder: Path, count: int = 12, layers: str | None = None) -> Traces:
        facts = people.write_rows(project.path / "people.jsonl", 30)
        resolved = project.resolve(f"base: {folder}\n", "traced.yaml")
        return run_traces(NamedModel("people", resolved), facts, "people.jsonl", count=count, layers=layers, device=CPU)

    return run


@pytest.mark.parametrize(("folder", "found_at"), [(people.SUBJECT, "subject"), (people.PROMPT, "last")])
def test_known_places_are_found(folder: Path, found_at: str, traced: Callable[..., Traces]) -> None:
    """One model was built to look facts up at the subject, the other at the prompt's last token: feed-forward outputs restored there,
    at the best layer, bring back the most; all of the last layer's block output at the last token is the answer itself."""
    table = table_of("people", "people.jsonl", *traced(folder))
    assert table.clean > 0.9
    assert table.corrupted < 0.2
    best = {place: max(at[place] for at in table.recovered("feed_forward").values()) for place in ("subject", "last")}
    other = "last" if found_at == "subject" else "subject"
    assert best[found_at] > best[other]
    last = table.recovered("block")[max(table.layers)]
    assert last["last"] == pytest.approx(1.0, abs=1e-4)
    assert last["subject"] == pytest.approx(0.0, abs=1e-4)


def test_shares_are_those_of_a_naive_run(traced: Callable[..., Traces]) -> None:
    """One fact after the other, with plain hooks, without padding: the same probabilities."""
    traces, _ = traced(people.SUBJECT, count=3, layers="1:3")
    model, tokenizer = people.load(people.SUBJECT)
    facts = people.facts(3)
    for number, row in enumerate(traces["block"].rows):
        clean = tokenizer(facts[number].text, return_tensors="pt")["input_ids"]
        offsets = tokenizer(facts[number].text, return_offsets_mapping=True)["offset_mapping"]
        other = facts[(number + 1) % 3]
        span = [i for i, (a, b) in enumerate(offsets) if a < facts[number].span[1] and b > facts[number].span[0]]
        there = tokenizer(other.text, return_offsets_mapping=True)
        subject = [
            t
            for t, (a, b) in zip(there["input_ids"], there["offset_mapping"], strict=True)
            if a < other.span[1] and b > other.span[0]
        ]
        swapped = clean.clone()
        taken = (subject * len(span))[-len(span) :] if len(subject) < len(span) else subject[-len(span) :]
        swapped[0, span] = torch.tensor(taken)
        with torch.no_grad():
            chances = model(clean).logits[0, -1].softmax(-1)
            answer = int(chances.argmax())
            assert row.answer == answer
            assert row.clean == pytest.approx(float(chances[answer]), abs=1e-5)
            assert row.corrupted == pytest.approx(float(model(swapped).logits[0, -1].softmax(-1)[answer]), abs=1e-5)
            for layer in (1, 2):
                for place, at in (("subject", span), ("subject_last", span[-1:]), ("last", [clean.shape[1] - 1])):
                    got = restored(model, clean, swapped, layer, at)[answer]
                    assert row.restored[layer][place] == pytest.approx(float(got), abs=1e-5)


def restored(model: Any, clean: torch.Tensor, swapped: torch.Tensor, layer: int, at: list[int]) -> torch.Tensor:
    """Next-token probabilities of a run with one block's output put back at some positions."""
    block = next(m for n, m in model.named_modules() if n.endswith(f".{layer}") and hasattr(m, "mlp"))
    kept: list[torch.Tensor] = []

    def first(output: Any) -> torch.Tensor:
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    handle = block.register_forward_hook(lambda _m, _a, output: kept.append(first(output).clone()))
    model(clean)
    handle.remove()

    def put_back(_module: Any, _args: Any, output: Any) -> Any:
        hidden = first(output).clone()
        hidden[0, at] = kept[0][0, at]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(put_back)
    found: torch.Tensor = model(swapped).logits[0, -1].softmax(-1)
    handle.remove()
    return found


def test_intervals_hold_the_share_and_shrink_with_facts(traced: Callable[..., Traces]) -> None:
    few, many = (traced(people.PROMPT, count=count, layers="1,2")[0]["block"] for count in (4, 24))
    widths = []
    for trace in (few, many):
        low, high = interval(trace, 2, "last") or (0.0, 0.0)
        share = trace.recovered[2]["last"]
        assert low < share < high
        assert (low + high) / 2 == pytest.approx(share)
        widths.append(high - low)
    assert widths[1] < widths[0]
    rows = few.rows  # the formula, written out
    b = [row.clean - row.corrupted for row in rows]
    a = [row.restored[2]["last"] - row.corrupted for row in rows]
    residual = [x - sum(a) / sum(b) * y for x, y in zip(a, b, strict=True)]
    error = math.sqrt(sum(x * x for x in residual) / 3 / 4) / (sum(b) / 4)
    high = (interval(few, 2, "last") or (0.0, 0.0))[1]
    assert high == pytest.approx(sum(a) / sum(b) + 3.1824463 * error)
    assert interval(traced(people.SUBJECT, count=1, layers="0")[0]["block"], 0, "last") is None


def test_command(project: Project, cwd: Path) -> None:
    """A table on stdout, the same numbers as JSON, a page that asks no one for anything."""
    people.write_rows(project.path / "people.jsonl", 30)
    args = ["edit", "trace", str(people.SUBJECT), "people.jsonl", "-n", "6"]
    shown = call(*args, "--html", "trace.html")
    assert shown.stdout.startswith("subject: 6 facts of people.jsonl; probability of the model's own answer ")
    assert "recovered by restoring feed-forward outputs, %" in shown.stdout
    found = document(*args, "--layers", "1")
    assert (found["facts"], len(found["traced"]), list(found["layers"])) == (6, 6, ["1"])
    share = found["layers"]["1"]["block"]["subject"]["recovered"]
    row = next(line for line in shown.stdout.splitlines() if line.startswith("1 "))
    assert f"{100 * share:.1f}" in row
    page = (project.path / "trace.html").read_text("utf-8")
    assert "Causal trace of subject" in page
    assert page.count("<svg") == len(OUTPUTS)
    assert "layer 1, last token of subject: " in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")  # the name of SVG is no address
    helped = call("edit", "trace", "--help").stdout
    assert "It is for reading only" in " ".join(helped.split())


def test_a_recipe_is_traced_after_its_steps(project: Project, cwd: Path) -> None:
    rows = [{"prompt": "{subject} is", "subject": f"w{i} of w{i + 9}", "target": "w3"} for i in range(5)]
    write_jsonl(project.path / "facts.jsonl", rows)
    project.write("name: plain\n", "plain.yaml")
    project.write("bricks: {full: bricks/full}\nsteps: [{merge: average}]\n", "merged.yaml")
    clean = []
    for name in ("plain", "merged"):
        clean.append(document("edit", "trace", name, "facts.jsonl")["clean"])
    assert clean[0] != clean[1]


def test_errors(project: Project, traced: Callable[..., Traces], monkeypatch: pytest.MonkeyPatch, cwd: Path, capsys: Any) -> None:
    with pytest.raises(WorkbenchError, match=r"--layers 9: layer 9 does not exist; the model has layers 0 to 3"):
        traced(people.SUBJECT, layers="9")
    with pytest.raises(WorkbenchError, match="expected indices 0,4,8 or a slice 4:20"):
        layers_of("a", 4)
    with pytest.raises(WorkbenchError, match="--layers 4:: selects no layer"):
        layers_of("4:", 4)
    assert (layers_of(None, 3), layers_of("2,0", 3), layers_of("-2:", 3)) == ([0, 1, 2], [0, 2], [1, 2])
    (project.path / "bare.jsonl").write_text('{"prompt": "w1 is", "target": "w2"}\n', "utf-8")
    monkeypatch.setattr("sys.argv", ["workbench", "edit", "trace", "base", "bare.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "bare.jsonl:1: a fact without 'subject' (1 of 1)" in said
    assert "Add it: " in said
    one = [{"prompt": f"{{subject}} is of w{i}", "subject": "w1", "target": "w3"} for i in range(3)]
    write_jsonl(project.path / "one.jsonl", one)
    with pytest.raises(WorkbenchError, match=r"one\.jsonl: all facts have one subject"):
        trace_table(NamedModel("plain", project.resolve("name: plain\n")), project.path / "one.jsonl", "one.jsonl", device=CPU)
