"""The report's last part: suites, plans, versions, checks and families of tests, and explanations of its terms."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from workbench.compare.comparison import Comparison, Family
from workbench.ground.numbers import MINUS, count, listed, plural, small
from workbench.report.numbers import PERCENT, POINTS, unit_of
from workbench.report.wording import chance_correction
from workbench.scores.documents import Check

_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")  # fmt: skip


def created(view: Comparison) -> str:
    """Return the date of the comparison in words, or the document's text if it is not an ISO time."""
    text = view.provenance.created
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    month = _MONTHS[when.month - 1]  # `%B` is a word of the locale that the program around us has set
    return f"{when.day} {month} {when.year}, {when:%H:%M}" + (
        " UTC" if when.utcoffset() is not None and not when.utcoffset() else ""
    )


def facts(view: Comparison) -> list[tuple[str, str]]:
    """Return the terms and texts of the provenance list, without those that the document lacks."""
    prov = view.provenance
    tasks = [t for t in view.tasks if t.contrast is None]
    items = [f"{t.name} {count(t.n)}" + f" in {count(t.clusters)} clusters" for t in tasks]
    chances = [f"{t.name} {unit_of(view, t.name).score(t.chance)}" for t in view.tasks if t.chance]
    entries = [
        ("Suites", listed(prov.suites)),
        ("Plans", ", ".join(prov.plans)),
        ("Baseline", view.baseline),
        ("Items", ", ".join(items)),
        ("Chance score", ", ".join(chances)),
        ("Scorers", ", ".join(f"{suite}: {name}" for suite, name in prov.scorers.items())),
        ("Families", family(view)),
        ("Device", prov.device),
        ("Versions", ", ".join(f"{k} {v}" for k, v in prov.versions.items())),
        ("Created", created(view)),
    ]
    return [(term, text) for term, text in entries if text]


@dataclass(frozen=True)
class CheckRow:
    """A check of a scorer on one configuration and suite."""

    configuration: str
    suite: str
    check: Check


def checks(view: Comparison) -> list[CheckRow]:
    """Return the checks of scorers against lm-eval's own, by configuration."""
    return [
        CheckRow(c.name, suite, check)
        for c in view.by_role
        for suite, check in zip(view.provenance.suites, c.check, strict=False)
        if check
    ]


def self_check(view: Comparison) -> str:
    """Return sentences on how much the scorers differ from lm-eval's own, and on configurations that were not checked."""
    found = [(row.configuration, row.check) for row in checks(view)]
    if not found:
        names = set(view.provenance.scorers.values())
        if names == {"hflm"}:
            return "All scores come from lm-eval's own model class (hflm), so no check is needed."
        return "This document records no check of the scorer against lm-eval's own model class."
    failed = list(dict.fromkeys(name for name, k in found if not k.passed))
    largest = max((k.max_difference for _, k in found), default=None)
    without = [c.name for c in view.by_role if not any(c.check)]
    text = (
        "To check the scorer, lm-eval's own model class (hflm) scored some documents of each suite again, and the log-probabilities were "
        "compared"
    )
    text += f": the largest difference is {small(largest)} nats." if largest is not None else "."
    text += f" Above the tolerance: {listed(failed)}." if failed else ""
    if wholes := list(dict.fromkeys(k.whole for _, k in found if k.whole)):
        text += (
            f" The whole check ran on {listed(wholes)}; configurations that differ from it in their weights alone were compared in float32 on "
            "one document."
        )
    return text + (f" Not checked: {listed(without)}." if without else "")


def family(view: Comparison) -> str:
    """Return the declared families with their sizes and the correction."""
    level = f"at {PERCENT.score(view.family.alpha)} %"
    text = f"{view.family.text} ({families(view.family)})"
    if view.family.correction == "none":
        return f"{text}; no correction for multiple comparisons"
    return f"{text}; {correction(view)} {level} for each family"


def families(sizes: Family) -> str:
    """Return the sizes of the families: "12 comparisons in the main family; tested separately: 4 on guarded tasks, 30 of controls"."""
    others = [f"{count(sizes.guarded)} on guarded tasks"] if sizes.guarded else []
    others += [f"{count(sizes.controls)} of controls"] if sizes.controls else []
    main = f"{plural(sizes.compared, 'comparison')} in the main family"
    return f"{main}; tested separately: {', '.join(others)}" if others else main


def correction(view: Comparison) -> str:
    """Return the name of the correction."""
    return "step-down max-T over sign flips of clusters" if view.family.correction == "max-t" else "no correction"


Entry = tuple[str, str]
_POWER = "in 80 of 100 repetitions"


def glossary(view: Comparison) -> list[Entry]:
    """Return terms and their explanations, without the terms that this comparison does not use."""
    return [
        *_scores(view),
        ("Adjusted interval", _adjusted(view)),
        *_family(view),
        (
            "Better, worse",
            "The adjusted interval is entirely above or entirely below zero. Where lower is better, an interval below zero means better.",
        ),
        ("Equivalent", f"The adjusted interval lies entirely within the smallest effect of interest{_margin(view)}."),
        (
            "Cannot tell",
            "These items show neither a difference nor equivalence: there may be a difference that they are too few to detect. "
            "“Items needed”: the approximate number of items that would detect a difference as large as the observed one, or as the smallest "
            f"effect of interest if that is larger, {_POWER}.",
        ),
        *_harm(view),
        ("Detectable", f"The smallest true difference that these items would detect {_POWER}."),
        (
            "Kept",
            "A configuration's chance-corrected score divided by that of its best parent alone, per task; overall, the sum of its scores "
            "divided by the sum of its parents' scores. 100 % means that merging lost nothing. A ratio is withheld if the parent is too close "
            "to chance: if the lower end of the parent's 95 % interval is less than half as far from chance as the parent's score.",
        ),
        *_metrics(view),
        _pairs(view),
    ]


def _pairs(view: Comparison) -> Entry:
    """Explain which configurations are tested against each other."""
    family = view.recommendation.family if view.recommendation else None
    if family is None or not family.pairs:
        return (
            "Not tested",
            "Configurations are compared with the baseline and not with each other; --baseline NAME selects another baseline.",
        )
    return (
        "Leaders",
        "The configuration with the highest mean over skills, controls among them, and all that are not shown to be worse than it. The tests "
        f"behind this ({plural(family.pairs, 'pair')} of {family.members} configurations) are two families: each configuration against the "
        "baseline, and every two of the others. "
        f"Every difference is compared with the largest one of its family under sign flips of clusters (step-down max-T at "
        f"{PERCENT.score(family.alpha)} %), so that the verdicts hold although the leaders "
        "are chosen by the same scores. On single tasks, configurations are compared with the baseline and not with each other.",
    )


def _scores(view: Comparison) -> list[Entry]:
    """Explain scores, means over skills and the chance correction."""
    score = "Mean of the task's primary metric over its items, in percent; for accuracies, the share of items answered correctly."
    mean = f"Mean of (score {MINUS} chance) / (1 {MINUS} chance) over the skill tasks: 0 is guessing, 100 is every item right."
    if bare := [t.name for t in view.tasks if t.chance is None and t.role == "skill"]:
        mean += f" The chance score of {listed(bare)} is not known, so the score is not corrected there: 0 is no item right."
    return [
        ("Score", f"{score} Metrics outside the range 0 to 1, or where lower is better, are shown in their own unit."),
        ("Mean over skills", f"{mean} Retention tasks are not included."),
        ("Difference", f"Score minus the score of {view.baseline} on the same items, in percentage points."),
        (
            "95 % interval",
            "The interval of one comparison on its own: paired by item, with the items of one template or passage counted as one "
            "cluster. Whether the intervals of two configurations overlap does not show whether these two differ.",
        ),
    ]


def _adjusted(view: Comparison) -> str:
    """Explain the adjusted interval under the document's correction."""
    percent = f"{PERCENT.score(view.family.alpha)} %"
    if view.family.correction == "none":
        return "Not adjusted: among many comparisons, some verdicts are false by chance."
    whole = f"Verdicts are based on this interval: the probability that any better or worse verdict in the family is false is at most {percent}."
    return (
        "The interval of the same difference, widened for the number of comparisons in its family. The test flips the signs of whole "
        "clusters, with the same flips for all configurations of a task, and compares each difference with the largest one under the flips "
        f"(step-down max-T). Outside guarded tasks, the interval excludes zero exactly if the adjusted p is at most {percent}. {whole}"
    )


def _family(view: Comparison) -> list[Entry]:
    """Explain the families."""
    sizes = view.family
    text = (
        f"Comparisons that are tested together. The named configurations on the tasks that are not guarded are one family "
        f"({plural(sizes.compared, 'comparison')}). The base, bricks and averages are controls and are tested separately "
        f"({plural(sizes.controls, 'comparison')}), so they never lower the power for the configurations. "
        f"Guarded tasks are also tested separately ({plural(sizes.guarded, 'comparison')}; configurations, bricks and other "
        "controls each on their own)."
    )
    if view.family.correction == "max-t":
        text += " More configurations on the same items cost little power; each further task costs more."
    return [("Family", text)]


def _margin(view: Comparison) -> str:
    """Return the smallest effect of interest, in parentheses."""
    if not view.family.min_effect:
        return ""
    own = any(unit_of(view, t.name).scale != POINTS.scale for t in view.tasks)
    tail = ", or the suite's value for a metric in its own unit)" if own else ")"
    return f" (within {POINTS.score(view.family.min_effect)} points of zero{tail}"


def _harm(view: Comparison) -> list[Entry]:
    """Explain the verdicts of guarded tasks; empty if no guarded task was tested."""
    if not view.harm_tested:
        return []
    units = [(t, unit_of(view, t.name)) for t in view.guarded if t.tolerance is not None]
    limits = [f"{t.name} {unit.score(t.tolerance)} {unit.word}".rstrip() for t, unit in units]
    return [
        (
            "Safe",
            "A verdict on guarded tasks, which must not get worse: the adjusted interval rules out a loss as large as the tolerance. The "
            "interval holds for all guarded comparisons together, so that among many harmful configurations it is unlikely that any passes by "
            "chance. A certain loss that is smaller than the tolerance is still safe.",
        ),
        (
            "Worse, on a guarded task",
            "A test of this configuration's guarded tasks alone finds a loss, and the loss is not shown to be smaller than the tolerance. "
            "Other configurations do not influence this test. The adjusted interval covers all guarded comparisons and may still include zero.",
        ),
        (
            "Not shown safe",
            "The test finds no loss, but it does not rule out a loss as large as the tolerance either. “Items needed”: the approximate number "
            "of items that would show that a loss as large as the observed one is safe, if it is smaller than the tolerance, "
            f"{_POWER}.",
        ),
        (
            "Tolerance",
            "A loss smaller than this on a guarded task counts as safe. It is the suite's tolerance, or else its smallest effect of interest"
            + (f"; {', '.join(limits)}" if limits else "")
            + ". Choose it before you look at the scores.",
        ),
    ]


def _metrics(view: Comparison) -> list[Entry]:
    """Explain metrics that not every comparison has."""
    more = []
    if any(d.companion for d in view.rows):
        more.append(
            (
                "Margin",
                "Log-likelihood of the right choice minus the largest log-likelihood of the other choices, in nats. It changes before the "
                "answer changes, so it shows smaller effects. Its interval is not adjusted, and it does not decide any verdict.",
            )
        )
    if any(c.forgetting for c in view.by_role):
        correction_of_chance = chance_correction(view, "retention")
        more.append(
            (
                "Forgetting",
                f"Mean over the retention tasks, configuration minus base, {correction_of_chance}, in points; negative values mean forgetting.",
            )
        )
    if any(t.ratio for t in view.tasks):
        more.append(
            ("Ratio metrics", "One number for all texts of a task: a sum of log-likelihoods divided by a sum of lengths.")
        )
    if any(t.contrast for t in view.tasks):
        more.append(("Contrasts", "The score on one task minus the score on another, over the items that both have."))
    return more
