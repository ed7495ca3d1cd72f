"""LAPE: neurons whose firing rate is concentrated on few functions (Tang et al. 2024, arXiv 2402.16438, there on languages)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workbench.emergent.functions import FunctionScores
from workbench.emergent.sets import NeuronSet, set_of
from workbench.lazy import torch

_CHOSEN, _QUANTILE = 0.01, 0.95  # share of all neurons to choose; quantile of all firing rates


def lape_sets(scores: FunctionScores) -> dict[str, NeuronSet]:
    """Return the sets of language-specific neurons of Tang et al. 2024 (LAPE, arXiv 2402.16438), with functions in place of languages.

    Neurons whose firing rate exceeds a quantile of all rates for no function are left out. Of the others, those with the lowest entropy are
    chosen, and each belongs to every function for which its rate exceeds the quantile.
    """
    lape = [entropies(rates) for rates in scores.firing]
    firing = np.concatenate(scores.firing, 1)
    entropy = np.concatenate(lape)
    bar = float(np.quantile(firing, _QUANTILE))
    entropy = np.where((firing > bar).any(0), entropy, np.inf)
    best = np.argsort(entropy, kind="stable")[: max(1, round(_CHOSEN * len(entropy)))]
    best = best[np.isfinite(entropy[best])]
    sizes = [site.units for site in scores.sites]
    result = {}
    for number, name in enumerate(scores.functions):
        member = np.zeros(len(entropy), bool)
        member[best] = firing[number, best] > bar
        chosen = [part.nonzero().flatten() for part in torch.split(torch.from_numpy(member), sizes)]
        values = [torch.from_numpy(-e.copy()) for e in lape]
        result[name] = set_of(name, scores.sites, chosen, values)
    return result


def entropies(firing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy in nats of each neuron's firing rates over functions, normalized to add up to 1.

    Args:
        firing: Share of a function's tokens with a positive activation [functions, units].

    Returns:
        [units]; 0 if a neuron fires on one function only, log(functions) if it fires on all alike.
    """
    share = firing / np.maximum(firing.sum(0), 1e-30)
    return np.asarray(-(share * np.log(np.maximum(share, 1e-30))).sum(0))
