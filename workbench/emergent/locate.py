"""Knowledge neurons: the neurons that carry the answer to a prompt, by integrated gradients, and what changing them does.

Attrᵢ = āᵢ / m · Σₖ ∂P(y | x; sₖ ā) / ∂aᵢ with scales sₖ from 0 to 1: the activations of one layer are scaled from zero to their value ā,
and the gradient of the answer's probability is integrated. The attributions of a layer add up to P(ā) − P(0). Where a norm follows the
output projection (Gemma 2, OLMo 2), scaling changes nothing until just above zero, and the sums miss that jump: see `Attribution.error`
and `norm_behind`.

Source: Dai et al. 2022, Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.emergent.answers import Earlier, FactPrompt, earlier_tokens, probabilities
from workbench.emergent.sets import NeuronSet, set_of
from workbench.emergent.sites import Site, Visitor, visiting
from workbench.errors import WorkbenchError
from workbench.facts import Fact, joined
from workbench.lazy import no_grad, torch
from workbench.models.hooks import first_of, frozen, hooked, shaped
from workbench.models.prompts import encode_pair
from workbench.models.texts import BATCH_TOKENS, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Answer: TypeAlias = Literal["target", "target_true", "own"]
"""Answer of a fact that is attributed: its target, its true target, or the model's own next token."""
At: TypeAlias = Literal["last", "all"]
"""Tokens whose activations are scaled: the prompt's last token, or all tokens of the prompt."""
Rule: TypeAlias = Literal["midpoint", "right"]
"""Scales of the integral: (k − ½) / m, whose error falls with m², or k / m as in the paper, whose error falls with m."""
ROWS = 128
"""Number of rows of one token that a pass has at once. More rows hardly make the products faster, and layers below the scaled ones wait."""


def fact_prompts(model: PreTrainedModel, tokenizer: Any, fact: Fact, answer: Answer = "target") -> list[FactPrompt]:
    """Tokenize a fact's prompt and its paraphrases, each with the answer.

    Args:
        model: The live model; it is run only for the answer "own", which is its most likely token after the fact's own prompt.
        tokenizer: The model's tokenizer.
        fact: The fact.
        answer: Answer to attribute.

    Raises:
        WorkbenchError: If the fact has no true target but `answer` asks for it, or a prompt or the answer has no tokens.
    """
    text = {"target": fact.target, "target_true": fact.target_true, "own": fact.target}[answer]
    if text is None:
        raise WorkbenchError(f"{fact.place or fact.id}: the fact has no 'target_true'", "Add it, or attribute another answer.")
    prompts = []
    for wording in (fact.text, *fact.paraphrases):
        pair = encode_pair(tokenizer, wording, joined(wording, text), "continuation")
        if not pair.prompt or not pair.continuation:
            shown = text if pair.prompt else wording
            raise WorkbenchError(
                f"{fact.place or fact.id}: {shown!r} has no tokens in the model's vocabulary", "Rephrase the fact."
            )
        prompts.append(FactPrompt(fact.id, (*pair.prompt, *pair.continuation[:-1]), len(pair.prompt), tuple(pair.continuation)))
    if answer != "own":
        return prompts
    first = torch.tensor([prompts[0].tokens[: prompts[0].prompt]], device=next(model.parameters()).device)
    with torch.no_grad():
        own = int(model(input_ids=first, use_cache=False).logits[0, -1].argmax())
    return [FactPrompt(p.fact, p.tokens[: p.prompt], p.prompt, (own,)) for p in prompts]


@dataclass(frozen=True)
class Attribution:
    """Attributions of the probability of a prompt's answer to all neurons, one layer at a time.

    Attributes:
        scores: Per site, attribution of every unit, float64 [units].
        clean: Probability of the answer.
        zeroed: Per site, its probability with the layer's activations set to zero at the scaled tokens.
    """

    scores: tuple[Tensor, ...]
    clean: float
    zeroed: tuple[float, ...]

    @property
    def attributed(self) -> tuple[float, ...]:
        """Sum of each layer's attributions."""
        return tuple(float(scores.sum()) for scores in self.scores)

    @property
    def gaps(self) -> tuple[float, ...]:
        """P(ā) − P(0) of each layer, to which its attributions should add up."""
        return tuple(self.clean - zeroed for zeroed in self.zeroed)

    @property
    def error(self) -> float:
        """Relative error of the sums over all layers: Σ |attributed − gap| / Σ |gap|."""
        total = sum(abs(gap) for gap in self.gaps)
        wrong = sum(abs(a - gap) for a, gap in zip(self.attributed, self.gaps, strict=True))
        return wrong / total if total else wrong


def attribute(
    model: PreTrainedModel,
    sites: Sequence[Site],
    prompt: FactPrompt,
    *,
    steps: int = 20,
    at: At = "last",
    rule: Rule = "midpoint",
) -> Attribution:
    """Attribute the probability of a prompt's answer to the neurons of every layer, by integrated gradients.

    The probability is that of the whole answer, given its own earlier tokens. If only the last token of the prompt is scaled, the tokens
    before it pass the model once, and several layers share a pass.

    Args:
        model: The live model, best in float32.
        sites: Its sites, in the order of its layers.
        prompt: The prompt.
        steps: Number m of scales between 0 and 1.
        at: Tokens whose activations are scaled.
        rule: Scales of the integral.
    """
    device = next(model.parameters()).device
    scales = (torch.arange(1, steps + 1) - (0.5 if rule == "midpoint" else 0.0)) / steps
    scales = torch.cat([torch.zeros(1), scales]).to(device)  # the first row is P(0)
    chosen = torch.zeros(len(prompt.tokens), dtype=torch.bool, device=device)
    chosen[prompt.prompt - 1 if at == "last" else 0 : prompt.prompt] = True
    scores, zeroed = [], []
    with frozen(model), torch.enable_grad():
        clean = float(probabilities(model, [prompt]).detach())
        earlier = earlier_tokens(model, prompt, clean) if at == "last" else None
        chosen = chosen[earlier.count if earlier else 0 :]
        together = max(1, ROWS // len(scales)) if earlier else 1
        for first in range(0, len(sites), together):
            part = sites[first : first + together]
            totals: list[Tensor] = []
            for number, some in enumerate(torch.split(scales, max(1, BATCH_TOKENS // len(prompt.tokens)))):
                found, gradients, activations = _scaled(model, part, prompt, some, chosen, earlier)
                if number == 0:
                    zeroed += found[:, 0].tolist()
                    gradients = [gradient[1:] for gradient in gradients]
                pieces = [
                    (gradient.double().sum(0) * unscaled.double())[chosen].sum(0)
                    for gradient, unscaled in zip(gradients, activations, strict=True)
                ]
                totals = [a + b for a, b in zip(totals, pieces, strict=True)] if totals else pieces
            scores += [total.cpu() / steps for total in totals]
    return Attribution(tuple(scores), clean, tuple(zeroed))


def _scaled(
    model: PreTrainedModel,
    sites: Sequence[Site],
    prompt: FactPrompt,
    scales: Tensor,
    chosen: Tensor,
    earlier: Earlier | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a prompt with each of some layers' activations scaled: rows of one batch, the first layer's first.

    Args:
        model: The live model.
        sites: The layers.
        prompt: The prompt.
        scales: Scales of the activations.
        chosen: Tokens whose activations are scaled, among those that pass the model.
        earlier: Cache of the tokens before them; None if all tokens pass the model.

    Returns:
        Probability of the answer at each scale [layers, scales]; per layer, its gradient [scales, time, units], and the unscaled
        activations [time, units].
    """
    count = len(scales)
    leaves: list[Tensor] = []
    unscaled: list[Tensor] = []
    factor = torch.where(chosen, scales[:, None], 1.0)

    def visit(number: int, activations: Tensor) -> Tensor:
        flat = shaped(activations, count * len(sites), len(chosen))
        own = slice(number * count, (number + 1) * count)
        plain = flat[own].detach()
        unscaled.append(plain[0])
        leaves.append((plain * factor.to(plain.dtype)[..., None]).requires_grad_())
        return torch.cat([flat[: own.start], leaves[-1], flat[own.stop :]]).reshape(activations.shape)

    with visiting(model, sites, visit):
        found = probabilities(model, [prompt] * (count * len(sites)), earlier=earlier)
    gradients = torch.autograd.grad(found.sum(), leaves)
    return found.detach().reshape(len(sites), count), list(gradients), unscaled


@no_grad
def norm_behind(model: PreTrainedModel, site: Site, tokens: Sequence[int]) -> bool:
    """Return whether a norm behind a site's output undoes the scaling of its activations, as in Gemma 2 and OLMo 2.

    Half of the activations then add to the hidden state about as much as all of them, and not half as much.

    Args:
        model: The live model.
        site: The site.
        tokens: Tokens of a prompt.
    """
    stack, _, _ = site.name.partition(f".{site.layer}.")
    layer = model.get_submodule(f"{stack}.{site.layer}")
    inputs = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    states: list[Tensor] = []

    def keep(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        states.append(first_of(output).float()[..., -1, :].flatten())

    for factor in (0.0, 0.5, 1.0):
        with visiting(model, [site], _scaling(factor)), hooked(layer, after=keep):
            model(input_ids=inputs, use_cache=False)
    none, half, whole = states
    return float((half - none - (whole - none) / 2).norm()) > 0.25 * float((whole - none).norm())


def _scaling(factor: float) -> Visitor:
    return lambda _number, activations: activations * factor


def knowledge_neurons(
    name: str,
    sites: Sequence[Site],
    attributions: Sequence[Attribution],
    *,
    threshold: float = 0.2,
    share: float = 0.7,
) -> NeuronSet:
    """Return the neurons that carry a fact in enough of its wordings.

    Args:
        name: Name of the set.
        sites: The sites.
        attributions: Attributions of the fact's prompt and of its paraphrases.
        threshold: A wording keeps neurons with an attribution above this share of its largest one.
        share: Share of the wordings that must keep a neuron; 1 intersects all of them.

    Returns:
        The set, with mean attributions as scores. It is empty if no neuron is kept often enough.
    """
    needed = max(1, math.ceil(share * len(attributions) - 1e-9))
    largest = [max(float(scores.max()) for scores in a.scores) for a in attributions]
    chosen, means = [], []
    for number in range(len(sites)):
        scores = torch.stack([a.scores[number] for a in attributions])
        bars = torch.tensor([threshold * top if top > 0 else math.inf for top in largest], dtype=scores.dtype)
        chosen.append(((scores > bars[:, None]).sum(0) >= needed).nonzero().flatten())
        means.append(scores.mean(0))
    evidence = {"threshold": threshold, "share": share, "wordings": len(attributions)}
    return set_of(name, sites, chosen, means, evidence=evidence)


@no_grad
def answer_probabilities(
    model: PreTrainedModel,
    sites: Sequence[Site],
    prompts: Sequence[FactPrompt],
    units: Mapping[int, Tensor],
    factor: float = 1.0,
    *,
    at: At = "last",
) -> Tensor:
    """Return the probability of each prompt's answer with the activations of some neurons multiplied by a factor [prompts].

    Args:
        model: The live model.
        sites: Its sites.
        prompts: The prompts.
        units: Layer -> indices of the neurons to change.
        factor: 0 suppresses them, 2 amplifies them.
        at: Tokens at which they are changed.
    """
    device = next(model.parameters()).device
    result = []
    size = max(1, BATCH_TOKENS // max(len(prompt.tokens) for prompt in prompts))
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        batch = side_by_side([prompt.tokens for prompt in part], device)
        position = torch.arange(batch.tokens.shape[1], device=device)
        ends = torch.tensor([prompt.prompt for prompt in part], device=device)[:, None]
        where = position < ends if at == "all" else position == ends - 1
        with visiting(model, sites, _multiplying(sites, units, factor, where)):
            result.append(probabilities(model, part, batch).cpu())
    return torch.cat(result)


def _multiplying(sites: Sequence[Site], units: Mapping[int, Tensor], factor: float, where: Tensor) -> Visitor:
    def visit(number: int, activations: Tensor) -> Tensor | None:
        index = units.get(sites[number].layer)
        if factor == 1.0 or index is None or not len(index):
            return None
        scale = activations.new_ones(activations.shape[-1])
        scale[index.to(scale.device)] = factor
        flat = shaped(activations, *where.shape)
        return torch.where(where[..., None], flat * scale, flat).reshape(activations.shape)

    return visit
