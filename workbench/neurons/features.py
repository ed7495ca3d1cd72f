"""Features beside neurons: do a dictionary's features tell functions apart better than as many neurons of the same layer, or than chance directions?

Five families of units of one layer take the same test, `statistics.task_test` and FuncScore, on the same tokens.

| family | unit | bias |
| --- | --- | --- |
| neurons | the feed-forward neurons of the layer | the model's |
| features | the dictionary's features | the dictionary's |
| random | ReLU of a random direction at the dictionary's place | minus the mean over tokens |
| random_encoder | the dictionary with random encoder rows of the same norms | the dictionary's, with its activation |
| singular | ReLU of each singular direction at the place and of its opposite | minus the mean over tokens |

The last three tell what is due to learning from what is due to the place, to its largest directions, or to sparseness alone. The best of many units
is better than the best of few, so that families are compared at equal count: each is cut to the smallest count by drawing units, several times.

**More selective?** At equal count, the best hundredth of the units by FuncScore on one half of a function's tasks is judged by its mean FuncScore
on the other half, both ways, as the mean over draws. The summary is the mean over functions of the family's score minus the neurons', with a 95 %
t interval over functions. Choice and judgement share no task, so that the best of many is not overrated; a hundredth and both ways, because the
single best unit on a few tasks is mostly luck (it stands beside it, in `heldout`). The interval is about functions like these: with few
functions it is wide. Units that the test finds depend on the largest effect of the whole family; they stand beside it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from workbench.activations.labelled import SPLITS, Labelled, Split
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Measured, Number
from workbench.neurons.feature_families import Family, Units, directions_at, families_of, fill
from workbench.neurons.function_scores import BLOCK, labels_of
from workbench.neurons.sparse_coder import Dictionary, Place, check_fit
from workbench.neurons.statistics import Floats, Ranked, task_test
from workbench.neurons.subject import Analysis, NeuronSubject, analyzed
from workbench.scores.statistics import upper_t

if TYPE_CHECKING:
    from torch import Tensor

DRAWS = 20
"""How often each family is cut to the smallest count."""
SHARE = 0.01
"""Share of a family's units, at least one unit, that the summary judges."""


class FeatureSettings(JsonObject):
    """Settings of the comparison."""

    seed: int = 0
    """Seed of random directions, draws of units and draws of the test."""
    draws: int = DRAWS
    """How often each family is cut to the smallest count."""


class DictionaryRecord(JsonObject):
    """The dictionary."""

    folder: str
    """Its folder."""
    layout: str
    """Layout of its files: saelens or sparsify."""
    layer: int
    """Its layer."""
    reads: Place
    """Place that it reads."""
    writes: Place
    """Place that it reconstructs."""
    activation: str
    """relu, topk or jumprelu."""
    explained: Measured
    """Share of the variance at the place that it writes which it explains on these texts."""


class FamilyScore(JsonObject):
    """A function's units in one family."""

    function: str
    """The function."""
    prevalence: Number
    """Share of the held-out texts, the expected FuncScore of a random unit."""
    found: int
    """Units that the test of the whole family finds."""
    found_per_mille: Number
    """The same for 1,000 units."""
    found_equal: Number
    """Units found for 1,000 units at equal count, mean over draws."""
    heldout: Number
    """FuncScore on held-out tasks of the family's best unit on train tasks."""
    heldout_equal: Number
    """The same at equal count, mean over draws."""
    crossed_equal: Number
    """Mean FuncScore, on the tasks of one split, of the best hundredth of units on those of the other, both ways; at equal count, mean over
    draws."""
    largest_effect: Number
    """Largest effect of a unit, in standard deviations over tasks."""
    smallest_effect: Measured
    """Effect from which a unit is found; null if the tasks are too few to find any."""
    density: Number
    """Share of the function's tokens at which the best unit on train tasks is active."""
    density_others: Number
    """The same on other tokens."""


class FamilyScores(JsonObject):
    """One family of units."""

    family: Family
    """The family."""
    units: int
    """Number of units."""
    alive: int
    """Units that are active at any token."""
    density: Number
    """Share of tokens at which a unit is active, mean over units."""
    functions: list[FamilyScore]
    """Scores by function."""


class Selectivity(JsonObject):
    """A family at equal count, compared with the neurons over functions."""

    family: Family
    """The family."""
    difference: Number
    """`crossed_equal` minus the neurons', mean over functions."""
    low: Measured
    """Lower end of the 95 % t interval over functions."""
    high: Measured
    """Upper end."""
    verdict: Literal["more", "less", "undecided"]
    """Whether the family is more or less selective than neurons: whether the interval lies above or below 0."""
    found_difference: Number
    """Units found for 1,000 units at equal count minus the neurons', mean over functions."""


class FeaturesResult(Analysis):
    """A dictionary's features beside the neurons of its layer."""

    kind: str = "features"
    """Kind of analysis."""
    settings: FeatureSettings
    """Option -> its value."""
    dictionary: DictionaryRecord
    """The dictionary."""
    count: int
    """Number of units at equal count."""
    families: list[FamilyScores]
    """The families."""
    summary: list[Selectivity]
    """Each family beside the neurons."""


def compare_features(subject: NeuronSubject, texts: Labelled, dictionary: Dictionary, seed: int = 0) -> FeaturesResult:
    """Compare the features of a dictionary with the neurons of its layer and with chance directions, in two passes over the texts.

    The first pass measures mean and covariance at the dictionary's place. Memory holds the scores of all units on all texts.

    Args:
        subject: The model.
        texts: The labelled texts.
        dictionary: The dictionary.
        seed: Seed of random directions and draws.

    Raises:
        WorkbenchError: If the dictionary does not fit the model, or a prompt has no tokens.
    """
    settings = FeatureSettings(seed=seed)
    site = check_fit(dictionary, subject.model, subject.config, subject.sites)
    rows = subject.rows(texts.items)
    dictionary, mean, directions = directions_at(subject, site, rows, dictionary)
    functions = torch.tensor([texts.functions.index(item.function) for item in texts.items])
    families = families_of(dictionary, site, mean, directions, (len(rows), len(texts.functions)), seed)
    tokens, explained = fill(subject, site, rows, dictionary, families, functions)
    count = min(units.scores.shape[1] for units in families.values())
    scores = [
        _scores(name, units, texts, tokens, count, settings, number) for number, (name, units) in enumerate(families.items())
    ]
    return FeaturesResult(
        model=subject.name,
        digest=subject.digest,
        data=analyzed(texts, len(texts.items), int(tokens.sum())),
        settings=settings,
        dictionary=DictionaryRecord(
            folder=dictionary.name,
            layout=dictionary.layout,
            layer=site.layer,
            reads=dictionary.reads,
            writes=dictionary.writes,
            activation=dictionary.activation,
            explained=explained,
        ),
        count=count,
        families=scores,
        summary=[selectivity(family, scores[0]) for family in scores[1:]],
    )


def _scores(
    name: Family, units: Units, texts: Labelled, tokens: Tensor, count: int, settings: FeatureSettings, number: int
) -> FamilyScores:
    """Return the scores of one family, whole and cut to `count` units; `number` seeds its draws."""
    values, tasks, of = units.scores.numpy(), np.array(texts.task_of_items), texts.functions
    owners = np.array([of.index(function) for function, _ in texts.all_tasks])
    member = np.eye(len(owners), dtype=np.float32)[:, tasks]
    means = member @ values / member.sum(1, keepdims=True)
    ap = {split: _precision(values, texts, split) for split in SPLITS}
    whole = task_test([means], owners, seed=settings.seed)
    rng, every = np.random.default_rng([settings.seed, number]), values.shape[1]
    cuts = [rng.choice(every, count, replace=False) for _ in range(settings.draws if count < every else 1)]
    found_equal = np.mean([task_test([means[:, cut]], owners, seed=settings.seed).found[0].mean(1) for cut in cuts], 0)
    train, judge = ap["train"], ap["heldout"]
    heldout_equal = np.mean([_judged(train[:, cut], judge[:, cut]) for cut in cuts], 0)
    top = max(1, round(SHARE * count))
    both = [[_judged(a[:, cut], b[:, cut], top) for a, b in ((train, judge), (judge, train))] for cut in cuts]
    crossed, heldout = np.mean(both, (0, 1)), _judged(train, judge)
    found, firing = whole.found[0].sum(1), units.firing.numpy()
    share, others = _shares(firing, tokens.numpy(), train)
    prevalence = labels_of(texts.in_split("heldout"), of).mean(1)
    scores = [
        FamilyScore(
            function=function,
            prevalence=float(prevalence[f]),
            found=int(found[f]),
            found_per_mille=1000 * float(found[f]) / every,
            found_equal=1000 * float(found_equal[f]),
            heldout=float(heldout[f]),
            heldout_equal=float(heldout_equal[f]),
            crossed_equal=float(crossed[f]),
            largest_effect=float(whole.effects[0][f].max()),
            smallest_effect=float(whole.smallest[f]),
            density=float(share[f]),
            density_others=float(others[f]),
        )
        for f, function in enumerate(of)
    ]
    alive, density = int((values > 0).any(0).sum()), float(firing.sum() / tokens.sum() / every)
    return FamilyScores(family=name, units=every, alive=alive, density=density, functions=scores)


def _precision(values: NDArray[np.float32], texts: Labelled, split: Split) -> Floats:
    """Return the average precision of all units on one split [functions, units]."""
    index = [i for i, item in enumerate(texts.items) if item.split == split]
    labels = labels_of([texts.items[i] for i in index], texts.functions)
    blocks = [values[index, start : start + BLOCK] for start in range(0, values.shape[1], BLOCK)]
    return np.concatenate([Ranked.of(block).average_precision(labels) for block in blocks], 1)


def _judged(choosing: Floats, judging: Floats, top: int = 1) -> Floats:
    """Return the mean judging score of the `top` units with the best choosing score [functions]; ties for the last places share them."""
    least = np.sort(choosing, 1)[:, -top, None]
    above, tied = choosing > least, choosing == least
    weight = above + tied * (top - above.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)
    return np.asarray((judging * weight).sum(1) / top)


def _shares(firing: NDArray[np.float32], tokens: NDArray[np.float32], train: Floats) -> tuple[Floats, Floats]:
    """Return the shares of the function's and of other tokens at which its best unit on train tasks is active [functions]."""
    best = train.argmax(1)
    own = firing[np.arange(len(best)), best].astype(np.float64)
    return own / tokens, (firing[:, best].sum(0) - own) / (tokens.sum() - tokens)


def selectivity(family: FamilyScores, neurons: FamilyScores) -> Selectivity:
    """Compare a family with the neurons, function by function."""
    pairs = list(zip(family.functions, neurons.functions, strict=True))
    differences = np.array([a.crossed_equal - b.crossed_equal for a, b in pairs])
    mean, count = float(differences.mean()), len(differences)
    half = upper_t(0.025, count - 1) * float(differences.std(ddof=1)) / count**0.5
    return Selectivity(
        family=family.family,
        difference=mean,
        low=mean - half,
        high=mean + half,
        verdict="more" if mean > half else "less" if mean < -half else "undecided",
        found_difference=float(np.mean([a.found_equal - b.found_equal for a, b in pairs])),
    )
