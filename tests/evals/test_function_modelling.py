"""The regression tasks: what a number is, what an error is, the fits beside it, and two files with the same numbers."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from worlds.jsonl import read_jsonl
from worlds.places import TASKS

NAMES = ("functions-told", "functions-stripped")


def items(name: str) -> list[dict[str, Any]]:
    return read_jsonl(TASKS / "data" / f"{name}.jsonl")


@pytest.fixture(scope="module")
def functions() -> ModuleType:
    """The tasks' own code, found by its path as lm-eval finds it."""
    spec = importlib.util.spec_from_file_location("function_tasks", TASKS / "functions.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 240", 240), (" 240 km.", 240), (" 1,200.5 m", 1200.5), (" 1,200,300", 1200300), (" -12.25 F.", -12.25), ("\u22123", -3),
        (" 3, 4, 5", 3), (" 12,34", 12), (" 1,2345", 1), (" .5", 0.5), (" 7.", 7), (" about $ 45 or 46", 45), (" 0.9 s", 0.9),
        ("", None), (" unknown", None), (" -", None),
    ],
)  # fmt: skip
def test_first_number_of_an_answer(functions: ModuleType, text: str, number: float | None) -> None:
    assert functions.parse(text) == number


def test_error_is_in_ranges_of_the_shown_y(functions: ModuleType) -> None:
    doc = {"answer": "30", "query": 3.0, "shown": [[1.0, 10.0], [2.0, 20.0], [5.0, 50.0]]}  # range 40
    expected = {
        " 30": (0, 1),
        " 33": (3 / 40, 1),
        " 34": (4 / 40, 0),
        " 27.0": (3 / 40, 1),
        " 26": (4 / 40, 0),
        " -500": (1, 0),
        "no": (1, 0),
    }
    for answer, (error, near) in expected.items():
        assert functions.score(doc, [answer]) == pytest.approx({"error": error, "within_10": near}), answer
    zero = {**doc, "answer": "0"}
    assert functions.score(zero, ["0"])["within_10"] == 1
    assert functions.score(zero, ["0.1"])["within_10"] == 0


def test_a_line_has_error_zero_where_the_law_is_a_line(functions: ModuleType) -> None:
    lines = [
        doc for doc in items("functions-stripped") if doc["cluster"] in ("travel", "rectangle", "fahrenheit", "shipping", "tank")
    ]
    assert len(lines) == 50
    for doc in lines:
        assert functions.score_with_fits(doc, ["0"])["error_linear"] == pytest.approx(0, abs=1e-9)


def test_fits_agree_with_scikit_learn(functions: ModuleType) -> None:
    """The line, the neighbours (problems without two equal distances), the network from the same first weights."""
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LinearRegression
    from sklearn.neighbors import KNeighborsRegressor

    untied = 0
    for doc in items("functions-stripped"):
        shown, query = functions.pairs_of(doc), doc["query"]
        x, y = np.array(shown).T
        assert functions.mean(shown, query) == pytest.approx(sum(y) / 5)
        line = LinearRegression().fit(x[:, None], y).predict([[query]])[0]
        assert functions.linear(shown, query) == pytest.approx(line, rel=1e-9, abs=1e-9)
        if len(set(np.abs(x - query))) == len(x):
            untied += 1
            for count in (1, 3):
                near = KNeighborsRegressor(count).fit(x[:, None], y).predict([[query]])[0]
                assert functions.nearest(count)(shown, query) == pytest.approx(near)
    assert untied > 80
    for doc in items("functions-stripped")[::40]:
        shown, query = functions.pairs_of(doc), doc["query"]
        x, y = np.array(shown).T
        expected = sklearn_network(functions, (x - x.mean()) / x.std(), (y - y.mean()) / y.std(), (query - x.mean()) / x.std())
        assert functions.network(shown, query) == pytest.approx(expected * y.std() + y.mean(), abs=1e-5 * np.ptp(y))


def sklearn_network(functions: ModuleType, x: Any, y: Any, query: float) -> float:
    """scikit-learn's network of the same form and penalty, its solver started from our first weights."""
    import warnings

    from sklearn.neural_network import MLPRegressor

    size = functions.HIDDEN
    model = MLPRegressor(
        hidden_layer_sizes=(size,),
        activation="tanh",
        solver="lbfgs",
        alpha=functions.DECAY,
        max_iter=1,
        tol=1e-5,
        warm_start=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one step is no convergence
        model.fit(x[:, None], y)
        inner, bias, outer = functions.start()[: 3 * size].reshape(3, size)
        model.coefs_, model.intercepts_ = [inner[None].copy(), outer[:, None].copy()], [bias.copy(), np.zeros(1)]
        model.max_iter = functions.STEPS
        model.fit(x[:, None], y)
    return float(model.predict([[query]])[0])


def test_gradient_of_the_network(functions: ModuleType) -> None:
    random = np.random.default_rng(0)
    weights, x, y = random.normal(size=3 * functions.HIDDEN + 1), random.normal(size=5), random.normal(size=5)
    gradient = functions.loss(weights, x, y)[1]
    for at in range(len(weights)):
        step = np.zeros_like(weights)
        step[at] = 1e-6
        slope = (functions.loss(weights + step, x, y)[0] - functions.loss(weights - step, x, y)[0]) / 2e-6
        assert gradient[at] == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_told_and_stripped_hold_the_same_numbers() -> None:
    told, stripped = (items(name) for name in NAMES)
    assert [doc["id"] for doc in told] == [doc["id"] for doc in stripped]
    clusters = Counter(doc["cluster"] for doc in told)
    assert len(clusters) == 24
    assert set(clusters.values()) == {10}
    for one, two in zip(told, stripped, strict=True):
        assert {k: v for k, v in one.items() if k != "prompt"} == {k: v for k, v in two.items() if k != "prompt"}
        asked = [number for pair in two["shown"] for number in pair] + [two["query"]]
        assert [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", two["prompt"])] == asked
        numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", one["prompt"].partition("\n")[2])]
        assert numbers == asked
        assert two["query"] not in [x for x, _ in two["shown"]]
        assert one["prompt"] == one["prompt"].strip()
    for docs in (told, stripped):
        assert len({doc["prompt"] for doc in docs}) == len(docs)


def test_some_laws_by_hand() -> None:
    """Laws worked out again: from their name alone, or from one shown pair."""
    laws = {
        "square": lambda x: x**2,
        "fahrenheit": lambda x: 32 + 1.8 * x,
        "pendulum": lambda x: math.tau * math.sqrt(x / 100 / 9.81),
        "circle": lambda x: math.pi * x**2,
        "cube": lambda x: x * x * x,
        "fall": lambda x: 9.81 * x**2 / 2,
        "decibel": lambda x: 10 * math.log(x, 10),
    }
    printed = {"square": 0, "fahrenheit": 1, "pendulum": 2, "circle": 0, "cube": 0, "fall": 1, "decibel": 1}
    found = items("functions-told")
    for name, law in laws.items():
        pairs = [(doc["query"], float(doc["answer"])) for doc in found if doc["cluster"] == name]
        pairs += [(x, y) for doc in found if doc["cluster"] == name for x, y in doc["shown"]]
        assert len(pairs) == 60
        for x, y in pairs:
            assert y == pytest.approx(law(x), abs=0.5000001 * 10 ** -printed[name]), (name, x)
    for doc in found:  # proportional, and inversely
        (x, y), query, answer = doc["shown"][0], doc["query"], float(doc["answer"])
        if doc["cluster"] in ("travel", "rectangle", "sales-tax"):
            assert answer == pytest.approx(y / x * query)
        if doc["cluster"] == "journey":
            assert answer == pytest.approx(y * x / query, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_gold_answers_have_error_zero(name: str, tmp_path: Path, cwd: Path) -> None:
    """lm-eval's own requests, functions and means; answers without a number have error 1."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Answerer(LM):
        def __init__(self, answer: str) -> None:
            super().__init__()
            self.answer = answer

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return [self.answer.format(r.doc["answer"]) for r in requests]

        # lm-eval's base class wants both, and a task that generates asks for neither: a call is a failure of the test.
        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            raise NotImplementedError

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    fits = {}
    for answer, error in ((" {} km.", 0.0), (" nothing", 1.0)):
        result = lm_eval.simple_evaluate(Answerer(answer), tasks=[name], task_manager=manager, bootstrap_iters=0)["results"][name]
        assert result["error,none"] == error
        assert result["within_10,none"] == 1 - error
        fits[answer] = {key: value for key, value in result.items() if key.startswith("error_") and "stderr" not in key}
    assert fits[" {} km."] == fits[" nothing"]
    wanted = {f"error_{fit},none" for fit in ("mean", "linear", "1nn", "3nn", "mlp")} if name == "functions-stripped" else set()
    assert set(fits[" nothing"]) == wanted


def test_task_files_say_which_way_is_better() -> None:
    from workbench.evaluate.tasks import source_of
    from workbench.scores.suite import Suite
    from workbench.scores.tasks import task_index

    source = source_of("functions-stripped", Suite(suite="x", tasks=("functions-stripped",)), task_index(TASKS), TASKS)
    assert source.metrics == ("error", "within_10", "error_mean", "error_linear", "error_1nn", "error_3nn", "error_mlp")
    assert source.lower == set(source.metrics) - {"within_10"}
    code = TASKS / "functions.py"
    assert code in task_index(TASKS)["functions-told"].files, "a change of the scorer is a change of the task"
