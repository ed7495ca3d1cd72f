"""Scorers against single forward passes and lm-eval's own: windows, cuts, fallbacks, kills, and lm-eval's Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from worlds.local_tasks import A, documents, suite, tiny
from worlds.request_kinds import SMALL, TASKS, write_tasks

from workbench.evaluate import build_plan, evaluate, score
from workbench.evaluate.check import RefusedError
from workbench.evaluate.packed import Bounds, Forward, lay_out, shared_start
from workbench.evaluate.scorer import KeptRows, Scorer
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Journal, ScoreStore


@pytest.fixture
def task_files(tasks_dir: Path) -> Path:
    """Five kinds of task on the same documents; few-shot examples are others."""
    return write_tasks(tasks_dir, documents(), TASKS)


def plan_for(tasks: Path, tokenizer: Any, names: list[str], dtype: str = "float32", **fields: Any) -> ScorePlan:
    return build_plan(suite(tasks=names, chance={}, **fields), tokenizer, tasks_dir=tasks, dtype=dtype, batch_size=4)


@pytest.mark.parametrize("scorer", ["packed", "prefix"])
def test_tokens_are_forwarded_once(scorer: str, task_files: Path, tokenizer: Any) -> None:
    plan = plan_for(task_files, tokenizer, ["long", "letters"], scorer=scorer)
    scores, _ = score(plan, A, tiny())
    referee, _ = score(plan.by("hflm"), A, tiny())
    requests = Scorer(plan, A, tiny()).requests
    contexts = {name: {tuple(c) for c, _ in found.pairs} for name, found in requests.items()}
    letters = 3 * len(contexts["letters"])  # a byte tokenizer: each letter has a blank before it
    unique = sum(map(len, contexts["letters"])) + letters
    if scorer == "prefix":
        shared = len(shared_start(requests["letters"].pairs, 256))
        assert shared > 100
        unique -= shared * (len(contexts["letters"]) - 1)
    assert scores.tasks["letters"].tokens == unique
    branches = sum(len(a) - 1 for _, a in requests["long"].pairs)
    assert scores.tasks["long"].tokens <= sum(map(len, contexts["long"])) + branches
    assert referee.tasks["letters"].tokens == 3 * sum(map(len, contexts["letters"])) + letters
    for task in ("long", "letters"):
        assert scores.tasks[task].metrics["margin"].value == pytest.approx(referee.tasks[task].metrics["margin"].value, abs=1e-5)


tokens = st.lists(st.integers(1, 5), min_size=1, max_size=9)


@given(st.lists(st.tuples(tokens, st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=12), st.lists(st.integers(1, 3), max_size=20), st.integers(10, 40))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_pairs_any_prefix_any_length(pairs: list[Any], start: list[int], longest: int) -> None:
    """Contexts that are prefixes of others, equal pairs, cut pairs: the answers of single forward passes."""
    pairs = [(start + context, answer) for context, answer in pairs]
    model = _CACHED.setdefault("model", tiny().eval())
    layout = lay_out(pairs, Bounds(longest, 3, 257), shared_start(pairs, longest))
    forward, found = Forward(model), {}
    for prefix, rows in layout.batches():
        found.update(forward.batch(prefix, rows))
    assert sorted(found) == list(range(len(pairs)))
    for i, (context, answer) in enumerate(pairs):
        whole = (context + answer)[-(longest + 1) :]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0, -len(answer) :].log_softmax(-1)
        expected = sum(float(logits[j, token]) for j, token in enumerate(answer))
        assert found[i][0] == pytest.approx(expected, abs=2e-5)
        assert found[i][1] == (logits.argmax(-1).tolist() == answer)


_CACHED: dict[str, Any] = {}


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_a_model_that_the_mask_does_not_reach_is_scored_by_hflm(
    family: str, task_files: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Positions from the mask (ALiBi), no attention at all (state space): refused, remembered, and one scorer for all."""
    torch.manual_seed(0)
    own = {
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }
    config = AutoConfig.for_model(family, **SMALL, **own[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    plan, store = plan_for(task_files, tokenizer, ["long"]), ScoreStore(tmp_path / "scores")
    with pytest.raises(RefusedError, match=r"differ from hflm's by up to|pass a state|Error"):
        evaluate(plan, store, A, lambda: model)
    settled = store.settled(plan)
    assert settled.scorer == "hflm"
    assert settled.digest != plan.digest
    assert evaluate(settled, store, A, lambda: model).tasks["long"].scorer == "hflm"
    scores, _ = score(plan, A, model)
    assert scores.plan == settled.digest


def test_half_precision_is_accepted_within_hflms_own_spread(task_files: Path, tokenizer: Any) -> None:
    model = tiny().to(torch.bfloat16)
    plan = build_plan(
        suite(tasks=["long", "letters"], chance={}), tokenizer, tasks_dir=task_files, dtype="bfloat16", batch_size=4
    )
    scores, _ = score(plan, A, model)
    assert scores.check is not None
    assert scores.check.spread is not None
    assert scores.check.max_difference <= scores.check.tolerance
    assert scores.check.documents == 4


def test_a_killed_task_goes_on_with_the_next_batch(
    task_files: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = plan_for(task_files, tokenizer, ["long", "copy"]), ScoreStore(tmp_path / "scores")
    whole, expected = score(plan, A, tiny())
    calls: list[int] = []
    real = Forward.batch

    def killed(self: Forward, prefix: list[int], rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, prefix, rows)

    monkeypatch.setattr(Scorer, "check", lambda self, store: None)
    monkeypatch.setattr(Forward, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, store, A, tiny)
    journal = next(store.folder("toy", plan.digest).glob("*.partial/long.jsonl"))
    journal.write_text(journal.read_text("utf-8") + "[3, [-1.", "utf-8")  # cut in the middle of a line
    calls[:] = [0] * 10
    scores = evaluate(plan, store, A, tiny)
    batches = sum(1 for _ in Scorer(plan, A, tiny())._layout(Scorer(plan, A, tiny()).requests["long"]).batches())
    assert len(calls) - 10 == batches - 3
    assert {t: s.metrics for t, s in scores.tasks.items()} == {t: s.metrics for t, s in whole.tasks.items()}
    assert store.rows(scores) == expected


def test_lm_evals_python_api_scores_a_recipe(project: Any, task_files: Path) -> None:
    """`workbench` is a model of lm-eval: the same numbers as its own `hf` on the written checkpoint."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import workbench.evaluate.models  # noqa: F401  registers the model

    recipe = project.write("bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\noutput: {dtype: float32}\n")
    path = project.run(recipe.read_text("utf-8"))["model"]
    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    shared: dict[str, Any] = {
        "tasks": ["long", "letters", "copy"],
        "task_manager": manager,
        "bootstrap_iters": 0,
        "log_samples": True,
    }
    ours = lm_eval.simple_evaluate("workbench", model_args=f"recipe={recipe},device=cpu", batch_size=4, **shared)
    theirs = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": path, "dtype": "float32", "logits_cache": False}, batch_size=4, device="cpu", **shared
    )
    for task in shared["tasks"]:
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            if task == "copy":
                assert a["resps"] == b["resps"]
            else:
                assert [r[0][0] for r in a["resps"]] == pytest.approx([r[0][0] for r in b["resps"]], abs=1e-4)
    with pytest.raises(Exception, match="expected recipe=FILE or pretrained=MODEL"):
        lm_eval.simple_evaluate("workbench", **shared)


def test_a_batch_keeps_its_bounds() -> None:
    """Many pairs of one length: tokens as HFLM would forward, the mask, the logits, and keys and values behind a prefix."""
    pairs = [([9] * 40 + [i], [1, 2, 3]) for i in range(64)]

    def most(bounds: Bounds, shared: list[int] | None = None) -> int:
        return max(len(rows) for _, rows in lay_out(pairs, bounds, shared or []).batches())

    assert most(Bounds(100, 64, 100)) == 64
    assert most(Bounds(100, 7, 100)) == 7
    assert most(Bounds(100, 64, (1 << 26) // 30)) == 10  # three positions a row
    assert most(Bounds(100, 64, 100, (1 << 29) // (44 * 5)), [9] * 40) == 5  # 43 tokens a row with the prefix
    long = [([9] * 8000 + [i], [1, 2]) for i in range(4)]
    assert max(len(rows) for _, rows in lay_out(long, Bounds(9000, 32, 100)).batches()) == 1


def test_running_text_does_not_become_one_long_row() -> None:
    """Documents share their only context token; many choices share a context: rows stay short, and pairs whole."""

    def answers(pairs: list[Any]) -> list[int]:
        return [len(row.answers) for _, rows in lay_out(pairs, Bounds(1000, 16, 100)).batches() for row in rows]

    assert answers([([0], [7] * 100) for _ in range(10)]) == [1] * 10
    assert sorted(answers([([0] * 20, [7] * 100) for _ in range(12)])) == [2, 5, 5]
    assert answers([([0] * 400, [7] * 100) for _ in range(8)]) == [8]


def test_a_long_document_does_not_excuse_a_short_one(task_files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running text of hundreds of nats has a relative tolerance; a choice of ten nats beside it has not."""
    plan = plan_for(task_files, tokenizer, ["long", "rolling"])
    model, real = tiny(), Forward.batch
    assert min(row["loglikelihoods"][0] for row in score(plan, A, model)[1]["rolling"]) < -500

    def shifted(self: Forward, prefix: list[int], rows: Any) -> Any:
        return {i: (value + 4e-4 * (value > -50), greedy) for i, (value, greedy) in real(self, prefix, rows).items()}

    monkeypatch.setattr(Forward, "batch", shifted)
    with pytest.raises(RefusedError, match=r"up to 0.0004 nats, tolerance 0.0001"):
        Scorer(plan, A, model).check()


def test_rounding_of_logits_is_no_difference_where_all_batches_are_of_one_row(
    task_files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows of a large vocabulary leave the check one row at a time, and HFLM then agrees with itself to the bit."""
    plan = plan_for(task_files, tokenizer, ["long"], dtype="bfloat16")
    model = tiny().to(torch.bfloat16)
    monkeypatch.setattr("workbench.evaluate.check.rows_at_once", lambda *_: 1)
    monkeypatch.setattr("workbench.evaluate.check._COPY", 0)  # as for a large model, which has no copy in float32
    real = Forward.batch

    def shifted_by(nats: float) -> None:
        def shifted(self: Forward, prefix: list[int], rows: Any) -> Any:
            return {i: (v + nats, greedy) for i, (v, greedy) in real(self, prefix, rows).items()}

        monkeypatch.setattr(Forward, "batch", shifted)

    def raised(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits = output.logits + 64  # the same probabilities, but bfloat16 keeps these logits in steps of 0.5
        return output

    shifted_by(0.4)
    with pytest.raises(RefusedError, match=r"up to 0\.4 nats"):
        Scorer(plan, A, model).check()
    hook = model.register_forward_hook(raised)
    check = Scorer(plan, A, model).check()
    hook.remove()
    assert check is not None
    assert check.spread == 0
    assert check.max_difference < check.tolerance < 3
    # Twice ε·64 for each of the answer's tokens at least, since both sides round: the answers have three tokens or more.
    assert check.tolerance >= 2 * 0.0078125 * 64 * 3**0.5
    shifted_by(8.0)
    with pytest.raises(RefusedError, match="differ from hflm's"):
        Scorer(plan, A, model).check()


def test_texts_and_pairs_of_one_task_do_not_mix_in_its_journal(tmp_path: Path) -> None:
    pairs, texts = (KeptRows(Journal(tmp_path / "t.jsonl", "d"), first, count) for first, count in ((0, 3), (3, 2)))
    pairs.collect(iter([{0: [-1.0, True]}, {2: [-2.0, False]}]), None, "t")
    texts.collect(iter([{0: "zero"}]), None, "t")
    again = Journal(tmp_path / "t.jsonl", "d")
    assert KeptRows(again, 0, 3).answers == {0: [-1.0, True], 2: [-2.0, False]}
    assert KeptRows(again, 3, 2).answers == {0: "zero"}
    told: list[tuple[str, int, int]] = []
    assert KeptRows(again, 3, 2).collect(iter([{1: "one"}]), lambda *about: told.append(about), "t") == {0: "zero", 1: "one"}
    assert told == [("t", 2, 2)]


def test_texts_that_are_drawn_are_the_same_after_a_kill(
    task_files: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (task_files / "copy.yaml").read_text("utf-8").replace("do_sample: false", "do_sample: true, temperature: 1.0")
    (task_files / "copy.yaml").write_text(text)
    plan, store = plan_for(task_files, tokenizer, ["copy"]), ScoreStore(tmp_path / "scores")
    _, expected = score(plan, A, tiny())
    assert len({row["response"] for row in expected["copy"]}) > 12
    real, calls = Scorer._texts, list[int]()

    def killed(self: Scorer, requests: Any, chunk: Any) -> Any:
        calls.append(len(chunk))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, requests, chunk)

    monkeypatch.setattr(Scorer, "_texts", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, store, A, tiny)
    told: list[tuple[int, int]] = []
    scores = evaluate(plan, store, A, tiny, progress=lambda _, done, total: told.append((done, total)))
    assert store.rows(scores) == expected
    assert told[-2:] == [(24, 25), (1, 1)]
