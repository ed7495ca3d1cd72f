"""From scores to weights: ties, the threshold, and saved states."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from workbench.ground.errors import WorkbenchError
from workbench.route.centroid import Centroid
from workbench.route.deciding.checking import Asked, Checked
from workbench.route.deciding.fitting import confusion_of, curve_of, fitted, quantile, threshold_of, tied
from workbench.route.deciding.router import REFUSED, Choice, Fitted
from workbench.route.deciding.samples import COPIES, NEGATIVES, OUTSIDE, OWN, Samples
from workbench.route.deciding.statistics import Statistics
from workbench.route.fixed import Fixed
from workbench.route.ridge import Ridge, RidgeRouter
from workbench.steps import RouteContext
from workbench.steps.route import Prompts

BRICKS = ("a", "b", "c")


def weights(choice: Choice, scores: list[float], confidence: float = 1.0) -> list[float]:
    joined = choice.join(torch.tensor([scores]), BRICKS)
    return choice.weigh(joined, BRICKS, torch.tensor([confidence]))[0].tolist()


def test_scores_become_weights() -> None:
    assert weights(Choice(), [0.2, 0.5, 0.3]) == [0, 1, 0]
    assert weights(Choice(threshold=0.4), [0.2, 0.5, 0.3], 0.39) == [0, 0, 0]
    assert weights(Choice(threshold=0.4), [0.2, 0.5, 0.3], 0.4) == [0, 1, 0]
    assert weights(Choice(threshold=None), [0.2, 0.5, 0.3], -9.0) == [0, 1, 0]
    choice = Choice(ties=(("a", "c"),))
    assert choice.join(torch.tensor([[0.25, 0.4, 0.3]]), BRICKS).tolist() == [
        [pytest.approx(0.55), pytest.approx(0.4), pytest.approx(0.55)]
    ]
    assert weights(choice, [0.1, 0.4, 0.5]) == [1, 0, 0]  # c alone is best, a acts for both
    assert weights(choice, [0.1, 0.7, 0.2]) == [0, 1, 0]
    largest = Choice(ties=(("a", "c"),), joined="largest")
    assert largest.join(torch.tensor([[0.25, 0.4, 0.3]]), BRICKS)[0].tolist() == pytest.approx([0.3, 0.4, 0.3])
    assert weights(largest, [0.25, 0.4, 0.3]) == [0, 1, 0]


def test_quantiles_and_curves_count_every_brick_and_both_errors() -> None:
    confidence = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.05, 0.9])
    labels = torch.tensor([0] * 8 + [1] * 2)
    assert quantile(confidence, labels, 0.0) == pytest.approx(0.05)
    # Half of brick 1 is a quarter of all weight: 0.05 lies below the threshold of a quarter.
    assert quantile(confidence, labels, 0.25) == pytest.approx(0.1)
    for share in (0.02, 0.1, 0.3, 0.7):
        threshold = quantile(confidence, labels, share)
        each = [(confidence[labels == i] < threshold).double().mean() for i in (0, 1)]
        assert float(sum(each)) / 2 <= share + 1e-9
    inside, outside = torch.tensor([0.1, 0.3, 0.5, 0.7]), torch.linspace(-0.5, 0.49, 100, dtype=torch.float64)
    found = curve_of(inside, outside)
    assert [row["routed"] for row in found] == [0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.0]
    for row in found:
        assert row["to_base"] == float((inside.double() < row["threshold"]).double().mean())
        assert row["routed"] == pytest.approx(float((outside >= row["threshold"]).double().mean()))
    assert [row["to_base"] for row in found][::5] == [0.0, 0.5, 0.5]
    assert curve_of(inside, outside[:0]) == []


def test_the_threshold_lies_between_requests_and_prompts() -> None:
    samples = Samples.of(
        {"a": [f"Add {i} now" for i in range(8)], "b": [f"{word} backwards" for word in ("dog", "tree", "house")]}
    )
    confidence = torch.zeros(len(samples.texts))
    confidence[samples.inside] = torch.linspace(1, 2, int(samples.inside.sum()))
    others = int((samples.labels == OUTSIDE).sum())
    assert others == NEGATIVES
    confidence[samples.labels == OUTSIDE] = torch.linspace(-1, 0, others)
    for share in (0.0, 0.3):
        found = threshold_of(samples, confidence, share)
        lowest = quantile(confidence[samples.inside], samples.labels[samples.inside], share)
        assert found == {
            "threshold": pytest.approx(-0.1 + 0.3 * (lowest + 0.1)),
            "negatives": pytest.approx(-0.1),
            "prompts": lowest,
        }
    samples = Samples.of({"a": ["Add 1", "Add 2"], "b": ["dog backwards", "cat backwards"]})
    confidence = torch.where(samples.inside, 1.0, REFUSED)
    assert threshold_of(samples, confidence, 0.01) == {"threshold": 1.0, "negatives": 1.0, "prompts": 1.0}
    with pytest.raises(WorkbenchError, match="every calibration prompt is more like one of `negatives`"):
        threshold_of(samples, torch.full_like(confidence, REFUSED), 0.01)


def test_prompts_that_are_both_a_bricks_and_negative_are_refused() -> None:
    with pytest.raises(WorkbenchError, match=r"the prompt 'one' is one of brick 'a' and one of `negatives`"):
        Samples.of({"a": ["one"], "b": ["two"]}, ["one"])


def test_ties_are_bricks_that_are_confused() -> None:
    names = ("a", "b", "c", "d", "e")
    confusion = torch.eye(5)
    assert tied(names, confusion) == ()
    confusion[0, 2], confusion[4, 2], confusion[1, 3] = 0.3, 0.9, 0.29
    assert tied(names, confusion) == (("a", "c", "e"),)
    confusion[3, 1] = 0.31
    assert tied(names, confusion) == (("a", "c", "e"), ("b", "d"))
    samples = Samples.of({"a": ["one two", "three four"], "b": ["five six", "seven eight"]})
    scores = torch.zeros(len(samples.texts), 2)
    scores[:, 0] = 1.0
    lower = samples.kind("lower") | samples.kind("greeting")
    scores[lower] = torch.tensor([0.0, 9.0])
    assert confusion_of(samples, scores).tolist() == [[1, 0], [1, 0]]


class Planted(Fitted):
    """A router whose scores and confidence are measured already."""

    method = "planted"

    def score(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        assert prompts.measured is not None
        return prompts.measured[:, :-1], prompts.measured[:, -1]


def test_a_fit_is_judged_by_routers_of_the_other_folds() -> None:
    """Its folds, and every number of its record counted sample by sample: c's prompts go to a so often that the two are tied."""
    words = ("dog", "tree", "house", "river", "stone", "cloud", "table", "window", "garden", "letter", "bridge", "winter")
    calibration = {
        "a": [f"Add {i} now" for i in range(12)],
        "b": [
            f"{word} {'backwards ' * (i % 3 + 1)}{other}" for i, (word, other) in enumerate(zip(words, words[::-1], strict=True))
        ],
        "c": [f"{word} is a {other}" for word, other in pairwise(words)],
    }
    samples = Samples.of(calibration, [f"what {word} is this" for word in words])
    count, draw = len(samples.texts), torch.Generator().manual_seed(0)
    labels, kinds = samples.labels.tolist(), [COPIES[kind] for kind in samples.columns[:, 1].tolist()]
    scores = torch.rand(count, 3, generator=draw)
    scores[torch.arange(count), samples.labels.clamp(min=0)] += 0.6
    scores[samples.labels == 2, 0] += 0.6
    confidence = torch.randn(count, generator=draw) + (samples.labels >= 0)
    samples, made, told = samples.with_features(None, torch.cat([scores, confidence[:, None]], 1)), list[list[int]](), list[str]()

    def make(rows: torch.Tensor) -> Planted:
        made.append(rows.tolist())
        return Planted(BRICKS, layer=3, window=5)

    step = Ridge.model_validate({"route": "ridge", "calibration": "{brick}.jsonl", "abstain": 0.2})
    router = fitted(samples, make, step, "sum", told.append)

    left_out = []
    for fold_of in (samples.by_template.tolist(), samples.at_random.tolist()):
        whole = {label for label in range(3) if len({f for f, own in zip(fold_of, labels, strict=True) if own == label}) == 1}
        left_out += [[i for i in range(count) if fold_of[i] != fold or labels[i] in whole] for fold in range(5)]
    assert made == [*left_out, list(range(count))]
    assert (router.layer, router.window, router.choice.ties, router.choice.joined) == (3, 5, (("a", "c"),), "sum")

    plain = [i for i in range(count) if kinds[i] == "plain" and labels[i] >= 0]
    best = scores.argmax(1).tolist()
    confused = [
        sum(best[i] == to for i in plain if labels[i] == own) / len(calibration[BRICKS[own]]) for own, to in ((0, 2), (2, 0))
    ]
    assert max(confused) >= 0.3
    together = (scores[:, 0] + scores[:, 2]).tolist()
    joined = [(together[i], float(scores[i, 1]), together[i]) for i in range(count)]
    right = [joined[i][labels[i]] >= max(joined[i]) for i in range(count)]

    def share(hits: list[bool]) -> float:
        return round(sum(hits) / len(hits), 4)

    by_kind = {kind: share([right[i] for i in range(count) if kinds[i] == kind and labels[i] >= 0]) for kind in COPIES}
    at = router.choice.threshold
    assert at is not None
    below = [float(value) < at for value in confidence]
    found = threshold_of(samples, confidence, 0.2)
    assert at == found["threshold"]
    outside = samples.labels == OUTSIDE
    assert router.record == {
        "prompts": {"a": 12, "b": 12, "c": 11},
        "templates": samples.templates,
        "accuracy": {
            "seen_templates": by_kind,
            "held_out_templates": by_kind,
            "by_brick": {name: share([right[i] for i in plain if labels[i] == own]) for own, name in enumerate(BRICKS)},
        },
        "ties": [{"bricks": ["a", "c"], "confusion": round(max(confused), 4), "acts": "a"}],
        "abstain": {
            "share": 0.2,
            "threshold": at,
            "rule": found,
            "to_base": {kind: share([below[i] for i in range(count) if kinds[i] == kind and labels[i] >= 0]) for kind in COPIES},
            "routed": share([not below[i] for i in range(count) if labels[i] == OUTSIDE]),
            "routed_negatives": share([not below[i] for i in range(count) if labels[i] == OWN]),
        },
        "curve": curve_of(confidence[samples.inside], confidence[outside]),
        "warnings": told,
    }
    assert [line.split(" in ")[0] for line in told] == [
        f"brick '{n}' has {len(calibration[n])} calibration prompts" for n in BRICKS
    ]


def test_a_check_counts_bricks_that_are_tied_as_one() -> None:
    """Right, to the base and to another brick add up; the surest wrong decisions come first."""
    rows = [
        ("a", "a", "a"),
        ("a", "c", "b"),
        ("b", None, "b"),
        ("c", "b", "b"),
        (None, None, "a"),
        (None, "a", "a"),
        (None, "b", "b"),
    ]
    asked = [Asked(str(i), wanted) for i, (wanted, _, _) in enumerate(rows)]
    confidence = [0.9, 0.8, 0.7, 0.61234, 0.5, 0.4, 0.65]
    checked = Checked("set", asked, [row[1] for row in rows], [row[2] for row in rows], confidence, [("a", "c")])
    assert checked.summary().to_dict() == {
        "set": "set",
        "prompts": 7,
        "with_brick": 4,
        "right": 0.5,
        "right_score": 0.5,
        "to_base": 0.25,
        "wrong_brick": 0.25,
        "without_brick": 3,
        "kept_by_base": 1 / 3,
    }
    assert checked.confusion(BRICKS) == {
        "a": {"a": 1, "c": 1},
        "b": {"base": 1},
        "c": {"b": 1},
        "base": {"a": 1, "b": 1, "base": 1},
    }
    assert [(one.prompt, one.brick, one.chosen, one.confidence) for one in checked.wrong()] == [
        ("2", "b", None, 0.7),
        ("6", None, "b", 0.65),
        ("3", "c", "b", 0.6123),
        ("5", None, "a", 0.4),
    ]
    many = Checked("set", asked[:1] * 12, [None] * 12, ["a"] * 12, [i / 10 for i in range(12)])
    assert [one.confidence for one in many.wrong()] == [i / 10 for i in range(11, 1, -1)]


def ridge_state() -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    parts = tuple(Statistics.of(torch.randn(5, 8)) for _ in BRICKS)
    made = RidgeRouter(
        BRICKS, Choice(0.1, (("a", "c"),)), 3, 9, statistics=parts, negatives=Statistics.of(torch.randn(9, 8)), strength=0.1
    )
    return made.settings(), made.tensors()


def test_tensors_of_another_router_are_refused() -> None:
    settings, tensors = ridge_state()
    with pytest.raises(
        WorkbenchError, match=r"expected 'statistics\.b\.total' of shape 8, found 7; the file belongs to a router of other"
    ):
        Ridge.restore(settings, {**tensors, "statistics.b.total": torch.zeros(7, dtype=torch.float64)})
    with pytest.raises(WorkbenchError, match="expected a router of method 'centroid', found 'ridge'"):
        Centroid.restore(settings, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "centroid"}, "expected a router of method 'ridge', found 'centroid'"),
        ({"bricks": ["a", "b", "d"], "ties": []}, "has no tensor 'statistics.d.total'; the file belongs to another router"),
        ({"bricks": None}, "is missing or invalid"),
        ({"ties": [["a", "z"]]}, r"ties name \['z'\]"),
        ({"lambda": -1}, "expected a number above 0 in the router's entry 'lambda', found -1"),
        ({"lambda": 0}, "expected a number above 0 in the router's entry 'lambda', found 0"),
        ({"mix": 2}, "the router mixes 2 bricks, and one brick acts today"),
        ({"joined": "mean"}, "is missing or invalid"),
    ],
)
def test_settings_of_another_router_are_refused(change: dict[str, object], message: str) -> None:
    settings, tensors = ridge_state()
    with pytest.raises(WorkbenchError, match=message):
        Ridge.restore({**settings, **change}, tensors)


def test_fixed_weights_are_those_of_the_recipe() -> None:
    step = Fixed.model_validate({"route": "fixed", "bricks": {"b": 0.5, "a": 2.0}})
    context = RouteContext(None, None, None, {"b": [], "a": []})  # type: ignore[arg-type]
    router = step.fit(context)
    decisions = router.decide(Prompts(["x", "y"]))
    assert router.bricks == ("b", "a")
    assert decisions.weights.tolist() == [[0.5, 2.0]] * 2
    again = Fixed.restore(router.settings(), router.tensors())
    assert torch.equal(again.decide(Prompts(["x"])).weights, decisions.weights[:1])
