"""How to read the numbers: terms of the report and what they mean in this comparison."""

from __future__ import annotations

from workbench.report.facts import correction
from workbench.report.numbers import MINUS, PERCENT, POINTS, listed, plural
from workbench.report.view import View
from workbench.report.wording import chance_correction

Entry = tuple[str, str]
_POWER = "in 80 of 100 repetitions"


def glossary(view: View) -> list[Entry]:
    """Return terms and their explanations; terms that this comparison does not use are left out."""
    return [
        *_scores(view),
        ("Adjusted interval", _adjusted(view)),
        *_family(view),
        (
            "Better, worse",
            "The adjusted interval lies wholly above or below zero; where lower is better, below zero is better.",
        ),
        ("Equivalent", f"The adjusted interval lies wholly within the smallest effect of interest{_margin(view)}."),
        (
            "Cannot tell",
            "These items decide neither way: a difference may exist and not show. “Needs n”: about how many "
            "items would find a difference as large as the one seen, or as the smallest effect of interest "
            f"where that is larger, {_POWER}.",
        ),
        *_harm(view),
        ("Detectable", f"Smallest true difference that these items would show {_POWER}."),
        (
            "Kept",
            "Chance-corrected score over that of the configuration's best parent alone, per task; overall, "
            "the sum of its scores over the sum of theirs. 100 % is nothing lost in merging. A ratio is withheld where the lower end of "
            "the parent's 95 % interval keeps less than half of its distance from chance, since a ratio to nearly nothing says nothing.",
        ),
        *_metrics(view),
        ("Not tested", "Configurations are compared with the baseline, not with one another; --baseline NAME takes another."),
    ]


def _scores(view: View) -> list[Entry]:
    score = "Share of items answered correctly under the task's primary metric, in percent."
    mean = f"Mean of (score {MINUS} chance) / (1 {MINUS} chance) over the skill tasks: 0 is guessing, 100 is every item right."
    if bare := [t.name for t in view.tasks if t.uncorrected and t.role == "skill"]:
        mean += f" The score of guessing is not known on {listed(bare)}, whose score is taken as it is: 0 is no item right."
    return [
        ("Score", f"{score} Metrics that are not shares, or where lower is better, are shown as they are, in their own unit."),
        ("Mean over skills", f"{mean} Retention is not part of it."),
        ("Difference", f"Score minus {view.baseline}'s score on the same items, in percentage points."),
        (
            "95 % interval",
            "For one comparison taken alone: paired by item, with items of one template or passage counted "
            "as a cluster. Whether two such intervals overlap says nothing about those two.",
        ),
    ]


def _adjusted(view: View) -> str:
    """What the adjusted interval is under the document's correction."""
    percent = f"{PERCENT.score(view.alpha)} %"
    if view.correction == "none":
        return "Not adjusted: among many comparisons some verdicts will be false by chance."
    whole = f"Verdicts rest on this one: the chance that any better or worse in the family is false is at most {percent}."
    if view.correction != "max-t":  # a document of before
        size = f" ({view.family_size} comparisons)" if view.family_size else ""
        return f"The same difference at the level that the {correction(view)} gives it in the family{size}. {whole}"
    return (
        "The same difference at the critical value that its family leaves to it. The test flips the signs of whole clusters, alike for all "
        "configurations of a task, and looks at the task's largest difference (step-down max-T). Outside guarded tasks the interval "
        f"excludes zero exactly where the adjusted p is at most {percent}. {whole}"
    )


def _family(view: View) -> list[Entry]:
    """What is tested together; nothing in documents of before, which had one family."""
    if not view.families:
        return []
    sizes = view.families
    text = (
        f"Rows that are tested together. The named configurations on the tasks that are not guarded are one family "
        f"({plural(sizes.get('compared', 0), 'row')}). The base, bricks and averages are controls and are tested apart "
        f"({plural(sizes.get('controls', 0), 'row')}): they never make it harder to tell something of a configuration. "
        f"Guarded tasks are apart too ({plural(sizes.get('guarded', 0), 'row')}, configurations and controls each by themselves)."
    )
    if view.correction == "max-t":
        text += " More configurations on the same items cost little; every further task costs more."
    return [("Family", text)]


def _margin(view: View) -> str:
    """How far the smallest effect of interest reaches, in brackets."""
    if not view.margin:
        return ""
    own = any(t.unit.scale != POINTS.scale for t in view.tasks)
    tail = ", or what the suite gives for a metric in its own unit)" if own else ")"
    return f" (within {POINTS.score(view.margin)} points of zero{tail}"


def _harm(view: View) -> list[Entry]:
    """Verdicts of guarded tasks; nothing where none was tested."""
    if not view.harm_tested:
        return []
    limits = [f"{t.name} {t.unit.score(t.tolerance)} {t.unit.word}".rstrip() for t in view.guarded if t.tolerance is not None]
    return [
        (
            "Safe",
            "Said of guarded tasks, which must not get worse: the adjusted interval leaves no loss as large as the tolerance. It holds for all guarded "
            "rows at once, so that of many harmful configurations none passes by chance. A small loss that is certain is still safe.",
        ),
        (
            "Worse, on a guarded task",
            "A loss is found by a test of this configuration's guarded tasks alone, whatever else stands beside it, and it is not shown to stay "
            "below the tolerance. The adjusted interval answers for all guarded rows and may include zero all the same.",
        ),
        (
            "Not shown safe",
            "No loss is found, and one as large as the tolerance is not excluded either: neither a sign of harm nor an all-clear. “Needs n”: "
            f"about how many items would show that a loss as large as the one seen is safe, where it is below the tolerance, {_POWER}.",
        ),
        (
            "Tolerance",
            "The largest loss on a guarded task that counts as safe: the suite's tolerance, or its smallest effect of interest"
            + (f"; {', '.join(limits)}" if limits else "")
            + ". Choose it before looking at the scores.",
        ),
    ]


def _metrics(view: View) -> list[Entry]:
    """Terms of metrics that not every comparison has."""
    more = []
    if any(d.companion for d in view.rows):
        more.append(
            (
                "Margin",
                "Log-likelihood of the right choice minus the largest of the others, in nats. It moves before an answer does, "
                "so it shows smaller changes; its interval is not adjusted and it decides no verdict.",
            )
        )
    if any(c.forgetting for c in view.configurations):
        more.append(
            (
                "Forgetting",
                f"Mean over the retention tasks, configuration minus base, {chance_correction(view, 'retention')}, in points; below zero is forgotten.",
            )
        )
    if any(t.ratio for t in view.tasks):
        more.append(("Ratio metrics", "One number for all texts of a task: sums of log-likelihoods over sums of lengths."))
    if any(t.contrast for t in view.tasks):
        more.append(("Contrasts", "The score on one task minus the score on another, over the same items."))
    return more
