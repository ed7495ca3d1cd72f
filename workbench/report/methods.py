"""The methods paragraph of a comparison, for a paper: tests, families, correction, assumptions and versions, with its references."""

from __future__ import annotations

from importlib.metadata import version

from workbench.compare.comparison import ComparedTask, Comparison
from workbench.ground.numbers import figures, listed, plural
from workbench.report.numbers import PERCENT, unit_of
from workbench.report.provenance import families

_REFERENCES = {
    "miller2024": ("article", "Miller, Evan", "Adding Error Bars to Evals: A Statistical Approach to Language Model Evaluations", "2024", "journal={arXiv:2411.00640}"),
    "biderman2024": ("article", "Biderman, Stella and others", "Lessons from the Trenches on Reproducible Evaluation of Language Models", "2024", "journal={arXiv:2405.14782}"),
    "bell2002": ("article", "Bell, Robert M. and McCaffrey, Daniel F.", "Bias Reduction in Standard Errors for Linear Regression with Multi-Stage Samples", "2002", "journal={Survey Methodology}, volume={28}"),
    "westfall1993": ("book", "Westfall, Peter H. and Young, S. Stanley", "Resampling-Based Multiple Testing", "1993", "publisher={Wiley}"),
    "gaffke2005": ("article", "Gaffke, Norbert", "Three Test Statistics for a Nonparametric One-Sided Hypothesis on the Mean of a Nonnegative Variable", "2005", "journal={Mathematical Methods of Statistics}, volume={14}"),
    "hall1992": ("article", "Hall, Peter", "On the Removal of Skewness by Transformation", "1992", "journal={Journal of the Royal Statistical Society B}, volume={54}"),
    "tango1998": ("article", "Tango, Toshiro", "Equivalence Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design", "1998", "journal={Statistics in Medicine}, volume={17}"),
    "hsu1996": ("book", "Hsu, Jason C.", "Multiple Comparisons: Theory and Methods", "1996", "publisher={Chapman and Hall}"),
}  # fmt: skip
"""Key -> kind, authors, title, year, and further fields."""


def paragraph(view: Comparison) -> str:
    """Return the paragraph, which names its references by their BibTeX keys in brackets."""
    tasks = [f"{t.name} ({t.metric}, {plural(t.n, 'item')} in {plural(t.clusters, 'cluster')})" for t in view.tasks]
    level = figures(view.family.alpha, 2)
    sentences = [
        f"{plural(len(view.judged), 'configuration')} and {view.baseline} as the baseline were scored on {listed(tasks)} with {_software(view)} "
        "[biderman2024].",
        "Differences from the baseline are paired by item, and items of one template or passage are one cluster [miller2024].",
        f"Hypotheses of no difference were tested by flipping the signs of clusters, {_corrected(view)} ({view.family.text}; {families(view.family)}).",
        "A p value is at least what one unseen cluster [gaffke2005] and the skewness of the sample [hall1992] leave of it; an unseen item is assumed to move "
        "by half of the metric's declared range, divided by the number of rows of that metric, or as far as the family's items moved if that is more.",
        f"Intervals hold at {PERCENT.score(1 - view.family.alpha)} %: score intervals for shares [tango1998], else Student's t with CR2 errors [bell2002].",
    ]
    if limits := [f"{t.name} {_tolerance(view, t)}" for t in view.guarded if t.tolerance is not None]:
        sentences.append(f"Guarded tasks are safe if a loss as large as the tolerance ({listed(limits)}) is excluded.")
    if view.recommendation and view.recommendation.family.pairs:
        sentences.append(
            f"The leaders are the configuration with the highest mean over skills and all that are not shown to be worse, at {level} [hsu1996, westfall1993]."
        )
    if view.family.looked_at:
        sentences.append(
            f"The families include {plural(view.family.looked_at, 'configuration')} scored on the same items and not shown here."
        )
    return " ".join(sentences)


def _tolerance(view: Comparison, task: ComparedTask) -> str:
    unit = unit_of(view, task.name)
    return f"{unit.score(task.tolerance)} {unit.word}".rstrip()


def _software(view: Comparison) -> str:
    versions = view.provenance.versions
    names = {"lm_eval": "lm-evaluation-harness", "transformers": "transformers", "torch": "PyTorch"}
    return listed(
        [f"{name} {versions[key]}" for key, name in names.items() if key in versions]
        + [f"brick-workbench {version('brick-workbench')}"]
    )


def _corrected(view: Comparison) -> str:
    level = figures(view.family.alpha, 2)
    if view.family.correction == "none":
        return f"at {level} each, without a correction for their number"
    return f"with a family-wise error rate of {level} by step-down max-T [westfall1993]"


def bibtex(view: Comparison) -> str:
    """Return the entries of the references that the paragraph names."""
    text = paragraph(view)
    return "\n".join(
        f"@{kind}{{{key}, author={{{authors}}}, title={{{title}}}, year={{{year}}}, {more}}}"
        for key, (kind, authors, title, year, more) in _REFERENCES.items()
        if key in text
    )
