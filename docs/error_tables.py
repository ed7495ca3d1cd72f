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
    "pareto": "no range, Pareto",
    "beta": "probabilities, few rise much",
    "chapters": "10 % of 30 clusters gain much",
}
MIXED = {
    "f1 items, f1 items, beta, chapters": "four unequal tasks",
    "f1 items, chapters, log normal, few gain, bits": "five kinds, four metrics",
}
LAYOUTS = {
    "1 task": ((1, 1),),
    "2 to 5": ((2, 1), (3, 1), (4, 1), (5, 1)),
    "12": ((12, 1),),
    "12 configurations": ((1, 12),),
    "5 on 4 tasks": ((4, 5),),
}
STEPS = ("small steps, power", "small steps, power of sign flips alone")
HARMS = ("harm, safe", "harm, safe by the interval alone")
CLAIMS = ("better or worse", "equivalent", "safe")
FAMILY = ("any better or worse", "any false better or worse", "any equivalent", "any safe")


@block("error_rates", RATES)
def rates_block(found: dict[str, Any]) -> str:
    """The largest rates of single rows by kind of items, those of families by claim, then power."""
    rows = [row for row in found["rows"] if row["kind"] in KINDS]
    single = [r for r in rows if "configurations" not in r and not r["claim"].startswith("power")]
    groups = {kind: [r for r in single if r["kind"] == kind] for kind in KINDS}
    first = table(
        ["items", "better, worse (5)", "equivalent (2.5)", "safe (2.5)", "coverage (95)"],
        ([KINDS[kind], *(_most(group, claim) for claim in CLAIMS), _range(group, "coverage")] for kind, group in groups.items()),
        left=1,
    )
    families = {claim: [r for r in rows if "configurations" in r and r["claim"] == claim] for claim in FAMILY}
    second = table(
        ["claim on a family", "families", "level", "found, at most"],
        ([claim, str(len(same)), _percent(same[0]["level"]), _most(same, claim)] for claim, same in families.items() if same),
        left=1,
    )
    third = table(["power to find a difference", "sign flips", "t test", "Holm on p of one row"], _powers(rows), left=1)
    note = (
        f"In percent; {found['trials']:,} trials a case, {max(2000, found['trials']):,} of a family, seeded. The largest rate, and the range of coverage, over "
        "equal, log-normal and Zipf clusters and one that holds half of the items: 12, 24 and 50 clusters of 240 to 500 items, and 240 items of their own. In "
        "brackets: the level. Intervals are wider than needed where clusters are few or unequal, or few items change."
    )
    return "\n\n".join([first, second, third, note])


def _most(rows: Sequence[Mapping[str, Any]], claim: str) -> str:
    found = [r["rate"] for r in rows if r["claim"] == claim]
    return _percent(max(found)) if found else ""


def _range(rows: Iterable[Mapping[str, Any]], claim: str) -> str:
    found = [r["rate"] for r in rows if r["claim"] == claim]
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
            yield [case, *(_percent(found.get(claim)) for claim in ("power", "power, t test", "power, Holm"))]


def _level(row: Mapping[str, Any]) -> str:
    """Return the level of a claim, or the coverage that it stands for; empty where there is no correction that could keep one."""
    if "uncorrected" in row["claim"]:
        return ""
    return _percent(1 - row["level"] if "covered" in row["claim"] else row["level"])


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}"


@block("leaders", LEADERS)
def leaders_block(found: dict[str, Any]) -> str:
    """Errors of the family of pairs among configurations of which the best is chosen by the same scores, by claim."""
    claims: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        claims.setdefault(row["claim"], []).append(row)
    rows = ([claim, str(len(same)), _level(same[0]), _range(same, claim)] for claim, same in claims.items())
    sizes = [row["configurations"] for row in found["rows"]]
    note = (
        f"In percent; families of {min(sizes)} to {max(sizes)} configurations, {found['trials']:,} trials each, seeded. Uncorrected: the pair that differs "
        "most, tested as if it had been named before the scores were seen."
    )
    return f"{table(['claim', 'families', 'level', 'found'], rows, left=1)}\n\n{note}"


@block("hard_data", HARD)
def hard_block(found: dict[str, Any]) -> str:
    """Errors of verdicts under skew and rare harm, beside the sign flips and the interval alone, and what symmetric data pay."""
    by_claim: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(found["rows"], key=lambda r: (r.get("clusters", 0), r.get("items", 0))):
        by_claim.setdefault(row["claim"], []).append(row)

    def largest(claim: str, kind: str, **case: object) -> str:
        same = [r["rate"] for r in by_claim[claim] if r["kind"] == kind and all(r[k] == v for k, v in case.items())]
        return _percent(max(same, default=None))

    skewed = (
        [
            text,
            largest("skew", kind, promised=True),
            largest("skew", kind, promised=False),
            largest("skew, sign flips alone", kind, promised=True),
        ]
        for kind, text in SKEWED.items()
        if kind in {r["kind"] for r in by_claim["skew"]}
    )
    families = [
        [
            text,
            *(
                _percent(max((r["rate"] for r in of_kind if (r["tasks"], r["configurations"]) in sizes), default=None))
                for sizes in LAYOUTS.values()
            ),
            largest("family, skew, sign flips alone", kind),
        ]
        for kind, text in {**SKEWED, **MIXED}.items()
        if (of_kind := [r for r in by_claim["family, skew"] if r["kind"] == kind])
    ]
    harm = [
        [
            f"{'ten, ' if r['configurations'] > 1 else ''}{_size(r)}",
            *(
                largest(claim, r["kind"], clusters=r["clusters"], configurations=r["configurations"], loss=r["loss"])
                for claim in HARMS
            ),
        ]
        for r in by_claim["harm, safe"]
    ]
    symmetric = [
        [
            f"{SHAPES[r['shape']]}, {_size(r)}",
            _percent(r["rate"]),
            largest("skew, power of sign flips alone", r["kind"], clusters=r["clusters"], shape=r["shape"]),
            "",
        ]
        for r in by_claim["skew, power"]
    ]
    steps = [
        [
            f"{r['kind']}; {_size(r)}",
            *(largest(claim, r["kind"], clusters=r["clusters"], tasks=1) for claim in STEPS),
            largest(STEPS[0], r["kind"], clusters=r["clusters"], tasks=12),
        ]
        for r in by_claim[STEPS[0]]
        if r["tasks"] == 1
    ]
    heads = ["no difference on average", "better, worse (promised: 6.5)", "with fewer items or clusters", "sign flips alone"]
    note = (
        f"In percent; {found['trials']:,} trials a case, fewer of large families, seeded. First table: the largest rate over sizes; the promise begins at 60 "
        "items and 20 clusters, counted by their sizes. Harm (equivalent: no more often): all lose the tolerance, 2 points of items or 5 of clusters or of ten configurations."
    )
    return "\n\n".join(
        [
            table(heads, skewed, left=1),
            table(["any false better or worse", *LAYOUTS, "sign flips alone, at most"], families, left=1),
            table(["a loss as large as the tolerance", "safe (2.5)", "interval alone"], harm, left=1),
            table(["power", "found", "sign flips alone", "12 tasks"], [*symmetric, *steps], left=1),
            note,
        ]
    )


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['clusters']} clusters" if row["clusters"] < row["items"] else f"{row['items']} items"
