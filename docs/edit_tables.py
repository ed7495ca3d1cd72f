"""Tables of edits, from the results files of benchmarks/edit*.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cells import MISSING, SIGNS, block, interval, signed, table

METHODS = "benchmarks/results/edit-methods.json"
MERGE = "benchmarks/results/edit-merge.json"
SPEED = "benchmarks/results/edit.json"
SOLVE = "benchmarks/results/edit-solve.json"

Row = Mapping[str, Any]
# Kind -> heading; the strict scores first.
STRICT = {
    "efficacy": "efficacy",
    "paraphrase": "paraphrases",
    "neighbours": "neighbours unchanged",
    "portability": "portability",
    "begun": "generated text begins with the answer",
    "generated": "is the answer",
}
PREFERRED = {
    "preferred": "target preferred (ES)",
    "preferred-paraphrase": "on paraphrases (PS)",
    "preferred-neighbours": "neighbours (NS)",
}
MERGES = {"task-arithmetic": "task arithmetic", "ties": "TIES", "dare": "DARE"}


@block("edit-methods", METHODS)
def methods_block(found: dict[str, Any]) -> str:
    """Every method on the same facts of the starter base: what is taught, what is spared, what it costs."""
    rows = [row for row in found["rows"] if "error" not in row]
    strict = [kind for kind in STRICT if any(kind in row["scores"] for row in rows)]
    first = table(
        ["edit", *(STRICT[kind] for kind in strict), "retention, difference"],
        ([_name(row), *(interval(row["scores"].get(kind)) for kind in strict), _retention(row)] for row in rows),
        left=1,
    )
    heads = ["edit", "layer", "rank", "‖ΔW‖ / ‖W‖", "facts left out", *SECONDS.values()]
    parts = [
        first,
        _legend(found),
        table(["edit", *PREFERRED.values(), "n-gram entropy, bits", "perplexity of text"], (_soft(row) for row in rows), left=1),
        table(heads, (_cost(row) for row in rows if row["row"] != "base"), left=1),
        _seconds_note(rows),
    ]
    if refused := [f"`{row['row']}`: {row['error']}" for row in found["rows"] if "error" in row]:
        parts.append("Refused: " + "; ".join(refused) + ".")
    return "\n\n".join([*parts, ""])


@block("edit-methods-alone", METHODS)
def alone_block(found: dict[str, Any]) -> str:
    """Facts edited one at a time, and what strengths trade."""
    parts = _single(found.get("single")) + _curve(found.get("curve"))
    return "\n\n".join([*parts, ""]) if parts else MISSING


SECONDS = {"statistics": "statistics, CPU s", "values": "values", "search": "place", "solve": "solve"}
_PARTS = {
    "statistics": "statistics",
    "trace": "search",
    "sweep": "search",
    "refining": "values",
    "solve": "solve",
    "training": "values",
}


def _name(row: Row) -> str:
    return "base, not edited" if row["row"] == "base" else f"`{row['row']}`"


def _retention(row: Row) -> str:
    """Difference from the base in points, adjusted for the family."""
    found = row.get("retention", {})
    if "diff" not in found:
        return ""
    low, high = (signed(found[key]) for key in ("low_adj", "high_adj"))
    return f"{signed(found['diff'])} [{low}, {high}] {SIGNS.get(found['verdict'], '')}".rstrip()


def _soft(row: Row) -> list[str]:
    """Preferences between two answers, entropy, and the relative change of perplexity."""
    scores, change = row["scores"], row.get("perplexity", {}).get("change")
    entropy = scores.get("entropy")
    text = ""
    if change:
        ends = [change.get(key) for key in ("low", "high")]
        text = _percent(change["value"]) + ("" if None in ends else f" [{_percent(ends[0])}, {_percent(ends[1])}]")
    elif "perplexity" in row:
        text = f"{row['perplexity']['value']:.1f}"
    return [
        _name(row),
        *(interval(scores.get(kind)) for kind in PREFERRED),
        "" if not entropy else f"{entropy['value']:.2f}",
        text,
    ]


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %".replace("-", "−")


def _cost(row: Row) -> list[str]:
    updates = row.get("updates", [])
    seconds: dict[str, float] = {}
    for part, value in row["seconds"].items():
        kind = "values" if part.startswith("values") else _PARTS.get(part)
        if kind:
            seconds[kind] = seconds.get(kind, 0.0) + value
    layers = row.get("layers")
    return [
        _name(row),
        ", ".join(map(str, layers if isinstance(layers, list) else [] if layers is None else [layers])),
        ", ".join(str(u["rank"]) for u in updates),
        ", ".join(f"{u['relative']:.3f}" for u in updates),
        str(row.get("skipped", "")),
        *(f"{seconds[kind]:.1f}" if kind in seconds else "" for kind in SECONDS),
    ]


def _legend(found: Row) -> str:
    asked, skip = found["prompts"], found.get("skip")
    behind = f" behind its first {skip}" if skip else ""
    return (
        f"{found['facts']} facts of `{found['file']}`{behind} at once, {asked['paraphrases']} paraphrases, {asked['neighbours']} neighbours; {found['dtype']}; default settings. In percent of "
        "prompts, with 95 % intervals. Strict: every token of the answer is the most probable one; neighbours: the base's own answer stays; generated: written by the model, ended by "
        "itself, a line's end or a full stop. Retention: points on the suite `retention`, adjusted interval; − worse, ✓ safe, ! not shown safe."
        + (f" A quick look: at most {found['limit']} items a task." if found.get("limit") else "")
    )


def _seconds_note(rows: Sequence[Row]) -> str:
    shared = any(row.get("shared") for row in rows)
    return (
        "CPU seconds of one thread. Values: ROME's optimisation, or all training of methods without values; place: tracing and the sweep over layers, once for a base."
        + (
            " Statistics and values that a method found in the cache count as they took where they were computed."
            if shared
            else ""
        )
        + " ES, PS and NS compare the mean log-likelihood of a token between target and true answer, as Meng et al. 2022 do; "
        "perplexity: of a word of fixed text, relative to the base."
    )


def _single(found: Row | None) -> list[str]:
    """Facts that are edited one at a time."""
    if not found:
        return []
    kinds = ["efficacy", "paraphrase", "neighbours"]
    rows = [["base, not edited", *(interval(found["before"].get(kind)) for kind in kinds), ""]]
    rows += [
        [f"`{name}`", *(interval(row["scores"].get(kind)) for kind in kinds), str(row["failed"])]
        for name, row in found["rows"].items()
    ]
    facts = next(iter(found["rows"].values()))["facts"] if found["rows"] else 0
    heads = ["edit", *(STRICT[kind] for kind in kinds), "refused"]
    note = (
        "Here and in the next table in float32, where no token of the base's answers to neighbours is left out as too close to call: "
        "longer answers have to stay than in the first table."
    )
    return [f"Each of {facts} facts edited alone, the base restored in between:", table(heads, rows, left=1), note]


def _curve(found: Sequence[Row] | None) -> list[str]:
    """Efficacy against neighbours, over strengths."""
    if not found:
        return []
    kinds = ["efficacy", "paraphrase", "neighbours"]
    rows = [[_name(row), _fields(row), *(interval(row["scores"].get(kind)) for kind in kinds)] for row in found]
    return ["What strengths trade, without refining:", table(["edit", "fields", *(STRICT[kind] for kind in kinds)], rows)]


def _fields(row: Row) -> str:
    fields = {key: value for key, value in row["fields"].items() if key != "preserve"}
    told = [f"`{key}: {value}`" for key, value in fields.items()]
    return ", ".join([*told, *([f"{row['preserved']} other prompts preserved"] if row.get("preserved") else [])])


def _fixture_block(name: str, file: str, title: str) -> None:
    """Register the table of the same methods on a trained fixture, over the number of facts: a table a kind of score."""
    block(name, file)(lambda found: "\n\n".join(_fixture(found, title)))


def _fixture(found: Row, title: str) -> list[str]:
    numbers = found["numbers"]
    names = list(dict.fromkeys(row["row"] for part in numbers for row in part["rows"]))
    parts = []
    for kind, heading in STRICT.items():
        cells = [[_name({"row": name}), *(_at(part, name, kind) for part in numbers)] for name in names]
        if any(cell not in ("", "–") for line in cells for cell in line[1:]):
            parts.append(
                table([heading, *(f"{part['facts']} fact{'s' if part['facts'] > 1 else ''}" for part in numbers)], cells, left=1)
            )
    note = (
        f"{title}, facts at once; in percent of prompts with 95 % intervals, strict scores. Paraphrases include the question form, neighbours the subject's other attributes. "
        f"–: the method refuses these facts."
    )
    return [*parts, note]


def _at(part: Row, name: str, kind: str) -> str:
    row = next((row for row in part["rows"] if row["row"] == name), None)
    if row is None:
        return ""
    return "–" if "error" in row else interval(row["scores"].get(kind))


@block("edit-merge", MERGE)
def merge_block(found: dict[str, Any]) -> str:
    """Facts after a merge with two skills, and after a rebase onto it."""
    rows = [line for row in found["rows"] for line in _merges(row)]
    heads = [
        "edit",
        "merge",
        "said without the edit",
        "of those right alone, right in the merge",
        "after the rebase",
        "paraphrases in the merge",
        "after the rebase",
        "neighbours unchanged",
        "after the rebase",
        *found["skills"],
    ]
    alone = ", ".join(f"`{row['method']}` {interval(row['alone']['efficacy'])} %" for row in found["rows"])
    note = (
        f"{found['facts']} facts of `{found['file']}` as one brick, merged with {' and '.join(f'`{s}`' for s in found['skills'])}, all with weight 1: "
        f"{'; '.join(_settings(name, fields) for name, fields in found['merges'].items())}. Strict scores; right alone: {alone}. In percent with 95 % intervals over facts; "
        "skills: in the merge with the edit, and after the rebase in brackets. Said without the edit: targets that the merge of the skills alone says. "
        f""
    )
    return table(heads, rows) + "\n\n" + note


def _merges(row: Row) -> Iterator[list[str]]:
    for merge, found in row["merges"].items():
        control, merged, rebased = (found[name] for name in ("control", "merged", "rebased"))
        kept = [_kept(c["survival"].get(kind)) for kind in ("efficacy", "paraphrase") for c in (merged, rebased)]
        skills = [f"{_whole(merged['skills'][s])} ({_whole(rebased['skills'][s])})" for s in merged["skills"]]
        yield [
            f"`{row['method']}`",
            MERGES.get(merge, merge),
            interval(control["efficacy"]),
            *kept,
            interval(merged["neighbours"]),
            interval(rebased["neighbours"]),
            *skills,
        ]


def _kept(found: Row | None) -> str:
    """ "18 of 20 (90 [70, 97])"."""
    return "" if not found else f"{found['kept']} of {found['of']} ({interval(found)})"


def _whole(found: Row) -> str:
    return f"{round(100 * found['value'])}"


def _settings(name: str, fields: Row) -> str:
    return f"{MERGES.get(name, name)} (" + ", ".join(f"`{key}: {value}`" for key, value in fields.items() if key != "merge") + ")"


@block("edit-speed", SPEED)
def speed_block(found: dict[str, Any]) -> str:
    """Values and solve apart, memory, and a straightforward implementation in the same run."""
    rows = [
        [
            f"`{name}`",
            title,
            str(row["facts"]),
            f"{row[name]['values']:.2f}",
            f"{row[name]['solve']:.2f}",
            _megabytes(row[name]["values_peak"]),
            _megabytes(row[name]["solve_peak"]),
        ]
        for title, part in _places(found)
        for name in part["linear"]
        for row in part["rows"]
        if name in row
    ]
    heads = ["edit", "model", "facts", "values, CPU s", "solve, CPU s", "values, peak MB", "solve, peak MB"]
    notes = [
        f"{title.capitalize()}, layer {part['layer']}: statistics take {part['statistics']:.1f} CPU s, once; a covariance of its {part['inputs']} inputs is {_megabytes(part['covariance_bytes'])} MB. "
        + " ".join(_growth(name, part) for name in part["linear"])
        for title, part in _places(found)
    ]
    return "\n\n".join([table(heads, rows), *notes, *_peer(found.get("peer")), ""])


@block("edit-solve", SOLVE)
def solve_block(found: dict[str, Any]) -> str:
    """The linear solve alone, for thousands of facts, beside systems that grow with the facts."""
    heads = ["inputs", "facts", "CPU s", "whole systems, CPU s", "ratio", "peak MB", "whole systems, peak MB"]
    rows: list[list[str]] = []
    for row in found["rows"]:
        ours, theirs = (f"{sum(row[name]) / len(row[name]):.2f}" for name in ("seconds", "reference_seconds"))
        rows.append(
            [
                str(row["inputs"]),
                f"{row['facts']:,}",
                ours,
                theirs,
                f"{row['ratio']:.1f}",
                _megabytes(row["peak"]),
                _megabytes(row["reference_peak"]),
            ]
        )
        rows.append(
            [str(row["inputs"]), f"{row['most']:,}", f"{row['most_seconds']:.2f}", "", "", _megabytes(row["most_peak"]), ""]
        )
    worst = max(row["difference"] for row in found["rows"])
    note = (
        f"Random facts behind {found['contexts'] + 1} beginnings each, MEMIT's metric. Whole systems: one of facts x beginnings and one of facts, as earlier "
        f"versions solved them, in the same run. The two updates differ by {worst:.0e} of the largest wanted change. Peaks are above what keys and changes take."
    )
    return "\n\n".join([table(heads, rows, left=0), note, ""])


def _places(found: Row) -> list[tuple[str, Row]]:
    return [(title, found[key]) for key, title in (("starter", "starter base"), ("fixture", "fixture")) if key in found]


def _growth(name: str, part: Row) -> str:
    linear, facts = part["linear"][name], [row["facts"] for row in part["rows"] if name in row]
    few, many = facts[0], facts[-1]
    memory = linear["solve_bytes_a_fact"]
    grown = "does not grow" if memory is None or memory <= 0 else f"grows by {memory / 1e3:.1f} kB a fact"
    told = "" if memory is None else f", and the solve's peak {grown}"
    return f"`{name}`: {many} facts take {linear['both']:.2f} times what {few} take, by the ratio of their numbers (1: linear){told}."


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def _peer(found: Row | None) -> list[str]:
    if not found:
        return []
    blocks, ratio = found["blocks"], found["ratio"]

    def told(name: str) -> str:
        return f"{ratio[name]['value']} [{ratio[name]['low']}, {ratio[name]['high']}]"

    facts = sum(b["facts"] for b in blocks)
    rows = [
        ["values", *(f"{sum(b['values'][i] for b in blocks) / facts:.2f}" for i in (0, 1)), told("values")],
        [
            "values and ROME's solve",
            f"{_ours(blocks) / facts:.2f}",
            f"{sum(b['values'][1] + b['rome'] for b in blocks) / facts:.2f}",
            told("rome"),
        ],
        [
            "values and MEMIT's solve",
            f"{_ours(blocks) / facts:.2f}",
            f"{sum(b['values'][1] + b['memit_one_by_one'] for b in blocks) / facts:.2f}",
            told("memit"),
        ],
    ]
    note = (
        f"{facts} facts in {len(blocks)} blocks, at layer {found['layer']}. The plain implementation (`benchmarks/edit_reference.py`) looks for the same values with the same steps, one fact after the other, "
        f"through all layers and with logits at every position, and solves a system of the projection's width a fact. Median cosine of the two sides' values: {found['cosine']['median']:.2f}. "
        "Ratio with a 95 % bootstrap interval over blocks."
    )
    return [table(["on the starter base", "CPU s a fact", "plain implementation", "ratio"], rows, left=1), note]


def _ours(blocks: Sequence[Row]) -> float:
    return float(sum(b["values"][0] + b["solve"] for b in blocks))


_fixture_block("edit-fixture", "benchmarks/results/edit-fixture.json", "The model that finds facts at the subject")
_fixture_block(
    "edit-fixture-prompt", "benchmarks/results/edit-fixture-prompt.json", "The model that finds facts at the prompt's last token"
)
