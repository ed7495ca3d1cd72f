"""The table of docs/evaluation-errors.md: how often verdicts err in simulations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cells import block, table

RATES = "benchmarks/results/error-rates.json"
LEADERS = "benchmarks/results/leaders.json"
HARD = "benchmarks/results/hard-data.json"
KINDS = {
    "two-way": "answers, wins and losses",
    "sparse": "answers, few change",
    "one-way": "answers, losses alone",
    "continuous": "scores without a range",
    "one score": "one score, no difference",
    "near one": "one score of 90 to 99 %, items of a cluster alike",
}
SHAPES = {
    "equal": "equal",
    "lognormal": "log-normal",
    "zipf": "Zipf",
    "half": "one holds half",
}
SKEWED = {
    "f1 items": "F1: 3 % of the items gain much",
    "f1 zipf": "F1: 3 % gain much, Zipf clusters",
    "few gain": "6 % of the clusters gain much",
    "fewer gain": "3 % of the clusters gain much",
    "zipf gain": "6 % of Zipf clusters gain much",
    "bits": "bits per byte",
    "exponential": "no range, exponential",
    "log normal": "no range, log-normal",
}
HARM = {1: "one configuration, ", 10: "any of ten, "}
CLAIMS = ("better or worse", "equivalent", "safe")
FAMILY = ("any better or worse", "any false better or worse", "any equivalent", "any safe")


@block("error_rates", RATES)
def rates_block(found: dict[str, Any]) -> str:
    """Single rows by kind of items and shape of clusters, then families, then power."""
    rows = [row for row in found["rows"] if row["kind"] in KINDS]
    single = [r for r in rows if "configurations" not in r and not r["claim"].startswith("power")]
    groups = {
        (kind, shape): [r for r in single if (r["kind"], r["shape"]) == (kind, shape)] for kind in KINDS for shape in SHAPES
    }
    first = table(
        ["items", "clusters", "better, worse (5)", "equivalent (2.5)", "safe (2.5)", "coverage (95)"],
        (
            [KINDS[kind], SHAPES[shape], *(_most(group, claim) for claim in CLAIMS), _range(group)]
            for (kind, shape), group in groups.items()
            if group
        ),
    )
    families = [r for r in rows if "configurations" in r and r["claim"] in FAMILY]
    second = table(
        ["family", "claim", "level", "found"],
        ([_family(r), r["claim"], _percent(r["level"]), _percent(r["rate"])] for r in families),
    )
    third = table(["power", "", "sign flips", "t test", "Holm on p of one row"], _powers(rows))
    note = (
        f"In percent; {found['trials']:,} trials a case, {max(2000, found['trials']):,} of a family, seeded. The largest rate, and the range of coverage, over 12, 24 and 50 clusters of 240 to 500 items, for "
        "equal ones also 240 items of their own. In brackets: the level. At the margin every configuration truly loses it. Coverage above 96 stands where clusters "
        f"are few or unequal, or few items change: intervals are wider than needed there."
    )
    return "\n\n".join([first, second, third, note])


def _most(rows: Sequence[Mapping[str, Any]], claim: str) -> str:
    found = [r["rate"] for r in rows if r["claim"] == claim]
    return _percent(max(found)) if found else ""


def _range(rows: Iterable[Mapping[str, Any]]) -> str:
    found = [r["rate"] for r in rows if r["claim"] == "coverage"]
    low, high = _percent(min(found)), _percent(max(found))
    return low if low == high else f"{low}–{high}"


def _family(row: Mapping[str, Any]) -> str:
    tasks = f" × {row['tasks']} tasks" if row.get("tasks", 1) > 1 else ""
    return f"{row['configurations']} configurations{tasks}, {KINDS[row['kind']]}; {row['clusters']} {SHAPES[row['shape']]} clusters of {row['items']} items"


def _powers(rows: Iterable[Mapping[str, Any]]) -> Iterable[list[str]]:
    """Cases for which a peer was measured beside our power."""
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["claim"].startswith("power"):
            case = (
                _family(row) if "configurations" in row else f"one row; {row['clusters']} equal clusters of {row['items']} items"
            )
            by_case.setdefault(case, {})[row["claim"]] = row["rate"]
    for case, found in by_case.items():
        if len(found) > 1:
            yield [
                "a difference is found",
                case,
                *(_percent(found.get(claim)) for claim in ("power", "power, t test", "power, Holm")),
            ]


def _level(row: Mapping[str, Any]) -> str:
    """Return the level of a claim, or the coverage that it stands for; empty where there is no correction that could keep one."""
    if "uncorrected" in row["claim"]:
        return ""
    return _percent(1 - row["level"] if "covered" in row["claim"] else row["level"])


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}"


@block("leaders", LEADERS)
def leaders_block(found: dict[str, Any]) -> str:
    """Errors of the family of pairs among configurations of which the best is chosen by the same scores."""
    rows = table(
        ["family of pairs", "claim", "level", "found"],
        ([_family(r), r["claim"], _level(r), _percent(r["rate"])] for r in found["rows"]),
    )
    note = f"In percent; {found['trials']:,} trials a case, seeded. Uncorrected: the pair that differs most, tested as if it had been named before the scores were seen."
    return "\n\n".join([rows, note])


@block("hard_data", HARD)
def hard_block(found: dict[str, Any]) -> str:
    """Errors of verdicts under skew and rare harm, beside the sign flips and the interval alone, and what symmetric data pay."""
    rates: dict[tuple[str, ...], dict[str, float]] = {}
    for r in sorted(found["rows"], key=lambda r: (r["kind"], r["clusters"], r["items"])):
        size = f"{r['clusters']} of {r['items']} items" if r["clusters"] < r["items"] else f"{r['items']} items of their own"
        words = {"skew": SKEWED.get(r["kind"], r["kind"]), "harm": HARM.get(r.get("configurations"), "")}
        part, _, claim = r["claim"].partition(", ")
        if "power" in claim:
            part, what = "power", f"{SHAPES[r['shape']]} clusters"
        elif part == "harm":
            what = f"{words['harm']}{r['kind']}, {_percent(r['loss'])} points in all"
        else:
            what = words.get(part, "") + ("" if r.get("promised", True) else " *")
        rates.setdefault((part, what, size), {})[claim] = r["rate"]

    def rows(part: str, *claims: str) -> list[list[str]]:
        return [[*case[1:], *(_percent(of.get(claim)) for claim in claims)] for case, of in rates.items() if case[0] == part]

    note = (
        f"In percent; {found['trials']:,} trials a case, seeded. * outside the promise of at most 6.5, which begins at 60 items and 20 clusters, counted by their sizes. "
        f""
    )
    return "\n\n".join(
        [
            table(
                ["no difference on average", "clusters", "better, worse (5)", "sign flips alone"],
                rows("skew", "", "sign flips alone"),
            ),
            table(
                ["a loss as large as the tolerance", "clusters", "safe (2.5)", "equivalent (2.5)", "interval alone"],
                rows("harm", "safe", "equivalent", "safe by the interval alone"),
            ),
            table(
                ["power, symmetric differences", "clusters", "found", "sign flips alone"],
                rows("power", "power", "power of sign flips alone"),
            ),
            note,
        ]
    )
