"""The check of a scorer: in float32, whole once for models that differ in their weights alone, then short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.local_tasks import CHOICE, A, suite, tiny

from workbench.evaluate import build_plan, evaluate, score
from workbench.evaluate.check import RefusedError, _cheapest, _documents
from workbench.evaluate.packed import Forward
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Configuration, ScoreStore

B = Configuration("b" * 32, "b")


@pytest.fixture
def twice(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> tuple[ScorePlan, ScoreStore, Any]:
    """A plan in bfloat16, a store with the scores of one model, and a model with other weights."""
    for name, choices in (("long", "choices"), ("letters", "[A, B, C]")):
        text = CHOICE.replace("task: pick", f"task: {name}").replace("doc_to_choice: choices", f"doc_to_choice: {choices}")
        (tasks_dir / f"{name}.yaml").write_text(text)
    plan = build_plan(suite(tasks=["long", "letters"], chance={}), tokenizer, tasks_dir=tasks_dir, dtype="bfloat16", batch_size=4)
    store = ScoreStore(tmp_path / "scores")
    first = evaluate(plan, store, A, lambda: tiny().to(torch.bfloat16))
    assert first.check is not None
    assert (first.check.whole, first.check.documents) == (None, 4)
    other = tiny().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return plan, store, other


def test_the_whole_check_runs_once_for_models_that_differ_in_weights_alone(twice: tuple[ScorePlan, ScoreStore, Any]) -> None:
    """The second configuration is compared on one document, keeps its weights, and has the scores of a whole check."""
    plan, store, model = twice
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    scores = evaluate(plan, store, B, lambda: model)
    assert scores.check is not None
    assert (scores.check.whole, scores.check.documents, scores.check.spread) == ("a", 1, None)
    assert scores.check.max_difference <= scores.check.tolerance <= 2e-4
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    alone, _ = score(plan, B, model)
    assert alone.check is not None
    assert (alone.check.whole, alone.check.documents) == (None, 4)
    assert {t: s.metrics for t, s in scores.tasks.items()} == {t: s.metrics for t, s in alone.tasks.items()}


@pytest.mark.parametrize("whole", [False, True])
def test_a_check_refuses_what_bfloat16_would_excuse(
    twice: tuple[ScorePlan, ScoreStore, Any], whole: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, store, model = twice
    store = ScoreStore(tmp_path / "others") if whole else store
    real = Forward.batch

    def shifted(self: Forward, prefix: list[int], rows: Any) -> Any:
        return {i: (value + 0.001, greedy) for i, (value, greedy) in real(self, prefix, rows).items()}

    monkeypatch.setattr(Forward, "batch", shifted)
    with pytest.raises(RefusedError, match=r"up to 0\.001 nats, tolerance 0\.0001"):
        evaluate(plan, store, B, lambda: model)
    assert store.settled(plan).scorer == "hflm"
    assert model.dtype == torch.bfloat16
    assert score(plan, B, model)[0].check is None, "all is scored by hflm"
    monkeypatch.setattr("workbench.evaluate.check._COPY", 0)
    check = score(plan, B, model)[0].check
    assert check is not None, "the rounding to bfloat16 is larger"
    assert check.tolerance > 0.001


def test_a_whole_check_sees_what_goes_wrong_in_the_dtype_alone(
    twice: tuple[ScorePlan, ScoreStore, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _, model = twice
    real = Forward.batch

    def narrow(self: Forward, prefix: list[int], rows: Any) -> Any:
        wrong = 9.0 * (self.model.dtype == torch.bfloat16)
        return {i: (value + wrong, greedy) for i, (value, greedy) in real(self, prefix, rows).items()}

    monkeypatch.setattr(Forward, "batch", narrow)
    assert score(plan, B, model)[0].check is None


def test_the_documents_of_a_whole_check() -> None:
    """One in twenty, two at least and four at most; the longest and the shortest are among them, with all their continuations."""

    def lengths(count: int) -> list[int]:
        pairs = [([0] * length, [1]) for length in range(1, count + 1) for _ in "ab"]
        documents = _documents(pairs)
        assert all(len(document) == 2 for document in documents)
        return [len(pairs[document[0]][0]) for document in documents]

    assert [lengths(count) for count in (1, 2, 30, 60, 800)] == [[1], [2, 1], [30, 1], [60, 31, 1], [800, 534, 268, 1]]


def test_a_short_check_has_several_continuations_where_it_can() -> None:
    one, two = [([0] * 3, [1])], [([0] * 9, [1]), ([0] * 9, [2]), ([0] * 8, [1])]
    assert _cheapest([one, two]) == [(two, [[0, 1]])]
    assert _cheapest([one, two[1:]]) == [(one, [[0]])]


@pytest.mark.parametrize("change", ["configuration", "versions", "size", "damaged"])
def test_the_whole_check_runs_again_where_more_than_the_weights_differs(
    twice: tuple[ScorePlan, ScoreStore, Any], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store, model = twice
    if change == "configuration":
        model.config.rms_norm_eps = 2e-5
    elif change == "versions":
        monkeypatch.setattr("workbench.evaluate.check.installed", lambda *names: dict.fromkeys(names, "0"))
    elif change == "size":
        monkeypatch.setattr("workbench.evaluate.check._COPY", 4 * sum(p.numel() for p in model.parameters()) - 1)
    else:
        for path in store.folder("toy", plan.digest).glob("passed/*.json"):
            path.write_text("{", "utf-8")
    check = evaluate(plan, store, B, lambda: model).check
    assert check is not None
    assert (check.whole, check.documents) == (None, 4)
