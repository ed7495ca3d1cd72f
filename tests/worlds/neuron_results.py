"""Results of the analyses of neurons, of plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.neurons.functions import FunctionsResult
    from workbench.neurons.profiles import ProfilesResult

TEXTS: dict[str, Any] = {"file": "x.jsonl", "digest": "d", "items": 10, "warnings": []}


def made(cls: Any, document: dict[str, Any]) -> Any:
    """A result of plain data, without the fields that all results have."""
    return cls.model_validate({"version": 1, "model": "m", "digest": "d", "data": TEXTS, "settings": {}, **document})


def functions(found: dict[str, int | None]) -> FunctionsResult:
    """A result with some neurons found for each function; None if the test has no power for it."""
    from workbench.neurons.functions import FunctionsResult

    row = {
        "best_median": 0.8,
        "best_max": 0.9,
        "top": 0.5,
        "mean": 0.2,
        "prevalence": 0.5,
        "overlap": 0.4,
        "overlap_others": 0.1,
        "chance_overlap": 0.05,
    }
    document = {
        "version": 3,
        "neurons": {"0": 8, "1": 8},
        "unit": "neurons",
        "data": {**TEXTS, "tokens": 50, "tasks": {name: {"train": ["a"], "heldout": ["b"]} for name in found}},
        "test": {"tasks": 12, "draws": 1000, "alpha": 0.05, "planned": {"4": None, "6": 3.75, "12": 2.5}},
        "ablation": damage(),
        "functions": [
            {
                **row,
                "function": name,
                "verdict": "no power" if count is None else "found" if count else "not found",
                "tasks": 2 if count is None else 4,
                "found": count or 0,
                "found_layers": {"3": 1, "7": count - 1} if count else {},
                "change": 0.5,
                "low": 0.25,
                "high": 1.0,
                "matched": {"math": [0.2, -0.1, 0.4], "code": [0.5, 0.6, None]}.get(name, [0.4, 0.6, 0.1]),
                "largest_effect": 6.25,
                "smallest_effect": None if count is None else 4.5,
                "confounders": {"length": 0.5, "language": 0.5, "template": 0.5},
            }
            for name, count in found.items()
        ],
        "layers": {
            "train": [
                {"function": name, "layer": layer, "best": 0.8, "top": 0.5, "mean": 0.2} for name in found for layer in (0, 1)
            ]
        },
        "overlap": {a: dict.fromkeys(found, 0.1) for a in found},
    }
    result: FunctionsResult = made(FunctionsResult, document)
    return result


def damage(**changed: Any) -> dict[str, Any]:
    """Damage of two functions, of which one loses most without its own set."""

    def table(dominant: list[bool], changes: list[list[float]], **more: Any) -> dict[str, Any]:
        known = {"low": [[None] * 2] * 2, "high": [[None] * 2] * 2, "dominance": [1, 1], "couplings": [0.5, 0.5], "coupling": 0.5}
        known |= {"functions": ["math", "code"], "dominant": dominant, "dominant_rows": sum(dominant), "interval": [0.4, None]}
        return {**known, "changes": changes, **more}

    controls = {
        "matched": table([False, False], [[0.1, 0.2], [0.3, 0.2]], kind="matched", exceeds=[0.99, 0.5]),
        "random": table([True, False], [[0.4, 0.3], [0.4, 0.3]], kind="random", exceeds=[1.0, 1.0]),
    }
    rest = {
        "share": 0.05,
        "items": 12,
        "overlap": {"mean": 0.01, "chance": 0.05},
        "controls": controls,
        "base_perplexity": [9, 9],
    }
    return {**table([True, False], [[2.0, 0.1], [3.0, 1.0]]), **rest, "clusters": [2, 2], "warnings": [], **changed}


def profiles(*names: str) -> ProfilesResult:
    """One neuron that was found for each function, with a text that excites it."""
    from workbench.neurons.profiles import ProfilesResult

    neurons = [
        {
            "layer": 0,
            "neuron": number,
            "functions": {name: 6.25},
            "found": True,
            "low": -0.5,
            "high": 2.0,
            "histogram": [4, 2, 1],
            "examples": [{"function": name, "task": "a", "tokens": ["one", "two"], "values": [0.5, 2.0], "top": 1}],
            "favors": {"more": 1.5},
            "disfavors": {"less": -1.5},
            "predictions": 9,
            "changed": 1,
            "changes": [{"after": "one two", "with_it": "three", "without": "four"}],
            "neighbors": [{"layer": 1, "neuron": 3, "correlation": 0.5}],
        }
        for number, name in enumerate(names)
    ]
    flipped = {name: [{"prompt": "1+1=", "response": "2", "with_set": "2", "without": "3", "rise": 0.5}] for name in names}
    result: ProfilesResult = made(ProfilesResult, {"unit": "neurons", "neurons": neurons, "flipped": flipped})
    return result
