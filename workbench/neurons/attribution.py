"""Knowledge neurons: the neurons that carry the answer to a prompt, by integrated gradients.

Attrᵢ = āᵢ / m · Σₖ ∂P(y | x; sₖ ā) / ∂aᵢ with scales sₖ from 0 to 1: the activations of one layer are scaled from zero to their value ā,
and the gradient of the answer's probability is integrated. Only the prompt's last token is scaled. The attributions of a layer add up to
P(ā) − P(0). Where a norm follows the output projection (Gemma 2, OLMo 2), scaling changes nothing until just above zero, and the sums miss
that jump: see `Attribution.error` and `norm_behind`.

Source: Dai et al. 2022, Knowledge Neurons in Pretrained Transformers, arXiv 2104.08696.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.activations.losses import cross_entropies
from workbench.activations.sites import Site, Visitor, visiting
from workbench.facts.facts import Fact, joined
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import cache_name, first_of, frozen, head_sees, hooked, shaped
from workbench.models.prompts import encode_pair
from workbench.models.texts import BATCH_TOKENS, Batch, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Answer: TypeAlias = Literal["target", "target_true", "own"]
"""Answer of a fact that is attributed: its target, its true target, or the model's own next token."""
ROWS = 128
"""Number of rows of one token that a pass has at once. More rows hardly make the products faster, and layers below the scaled ones wait."""
EQUAL = 1e-4
"""Largest relative difference of the probability behind a cache from the one without, with which the cache is used."""


@dataclass(frozen=True)
class FactPrompt:
    """A wording of a fact as tokens.

    Attributes:
        fact: Id of the fact.
        tokens: Tokens of the prompt and of the answer without its last one.
        prompt: Number of the prompt's tokens.
        answer: Tokens of the answer.
    """

    fact: str
    tokens: tuple[int, ...]
    prompt: int
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Earlier:
    """Keys and values of a prompt's first tokens.

    Attributes:
        name: Name of the model's argument for them.
        cache: The cache, for one row.
        count: Number of the tokens.
    """

    name: str
    cache: Any
    count: int

    def of(self, rows: int) -> dict[str, Any]:
        """Return the argument of a forward pass over some rows, which may append to the cache."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return {self.name: cache, "use_cache": True}


@no_grad
def earlier_tokens(model: PreTrainedModel, prompt: FactPrompt, clean: float) -> Earlier | None:
    """Run a prompt without its last token, so that changes of its last token need no other pass over the others.

    Args:
        model: The live model.
        prompt: The prompt.
        clean: Probability of the answer in one pass over all tokens.

    Returns:
        The cache; None if there is no earlier token, or the model has no cache behind which the answer has that probability.
    """
    count = prompt.prompt - 1
    if count < 1:
        return None
    name = cache_name(model)
    tokens = torch.tensor([prompt.tokens[:count]], device=next(model.parameters()).device)
    try:
        cache = getattr(model(input_ids=tokens, use_cache=True), name, None)
        if not hasattr(cache, "batch_repeat_interleave"):
            return None
        earlier = Earlier(name, cache, count)
        found = probabilities(model, [prompt], earlier=earlier)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # the cache of this architecture cannot be continued in this way
    return earlier if abs(float(found) - clean) <= EQUAL * clean else None


def probabilities(
    model: PreTrainedModel, prompts: Sequence[FactPrompt], batch: Batch | None = None, *, earlier: Earlier | None = None
) -> Tensor:
    """Return the probability of each prompt's answer, float32 [prompts].

    Args:
        model: The live model.
        prompts: The prompts.
        batch: Their tokens, if they are batched already.
        earlier: Cache of their first tokens, if all are the same prompt; only the other tokens then pass the model.

    Raises:
        WorkbenchError: If the model has no output head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise WorkbenchError(f"{type(model).__name__} has no output head", "Attributions need a causal language model.")
    device = next(model.parameters()).device
    first = earlier.count if earlier else 0
    batch = batch or side_by_side([prompt.tokens[first:] for prompt in prompts], device)
    mask, cached = batch.mask, {"use_cache": False}
    if earlier:
        mask = torch.cat([mask.new_ones(len(prompts), first), mask], 1)
        cached = earlier.of(len(prompts))
    width = batch.tokens.shape[1]
    places = [b * width + p.prompt - 1 - first + j for b, p in enumerate(prompts) for j in range(len(p.answer))]
    wanted = torch.tensor([token for prompt in prompts for token in prompt.answer], device=device)
    owner = torch.tensor([b for b, prompt in enumerate(prompts) for _ in prompt.answer], device=device)
    with head_sees(head, torch.tensor(places, device=device)):
        logits = model(input_ids=batch.tokens, attention_mask=mask, **cached).logits[0]
    losses = cross_entropies(logits, wanted)
    return losses.new_zeros(len(prompts)).index_add(0, owner, -losses).exp()


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
    def error(self) -> float:
        """Relative error of the sums over all layers: Σ |attributed − gap| / Σ |gap|, where the gap of a layer is P(ā) − P(0)."""
        gaps = [self.clean - zeroed for zeroed in self.zeroed]
        total = sum(map(abs, gaps))
        wrong = sum(abs(float(scores.sum()) - gap) for scores, gap in zip(self.scores, gaps, strict=True))
        return wrong / total if total else wrong


def attribute(model: PreTrainedModel, sites: Sequence[Site], prompt: FactPrompt, *, steps: int = 20) -> Attribution:
    """Attribute the probability of a prompt's answer to the neurons of every layer, by integrated gradients.

    The probability is that of the whole answer, given its own earlier tokens. The tokens before the prompt's last one pass the model once,
    and several layers share a pass.

    Args:
        model: The live model, best in float32.
        sites: Its sites, in the order of its layers.
        prompt: The prompt.
        steps: Number m of scales between 0 and 1: (k − ½) / m, whose error falls with m².
    """
    device = next(model.parameters()).device
    scales = (torch.arange(1, steps + 1) - 0.5) / steps
    scales = torch.cat([torch.zeros(1), scales]).to(device)  # the first row is P(0)
    chosen = torch.zeros(len(prompt.tokens), dtype=torch.bool, device=device)
    chosen[prompt.prompt - 1] = True
    scores, zeroed = [], []
    with frozen(model), torch.enable_grad():
        clean = float(probabilities(model, [prompt]).detach())
        earlier = earlier_tokens(model, prompt, clean)
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
    model: PreTrainedModel, sites: Sequence[Site], prompt: FactPrompt, scales: Tensor, chosen: Tensor, earlier: Earlier | None
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


@no_grad
def answer_probabilities(
    model: PreTrainedModel, sites: Sequence[Site], prompts: Sequence[FactPrompt], units: Mapping[int, Tensor], factor: float = 1.0
) -> Tensor:
    """Return the probability of each prompt's answer with the activations of some neurons multiplied by a factor [prompts].

    They are changed at the prompt's last token.

    Args:
        model: The live model.
        sites: Its sites.
        prompts: The prompts.
        units: Layer -> indices of the neurons to change.
        factor: 0 suppresses them, 2 amplifies them.
    """
    device = next(model.parameters()).device
    result = []
    size = max(1, BATCH_TOKENS // max(len(prompt.tokens) for prompt in prompts))
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        batch = side_by_side([prompt.tokens for prompt in part], device)
        position = torch.arange(batch.tokens.shape[1], device=device)
        ends = torch.tensor([prompt.prompt for prompt in part], device=device)[:, None]
        with visiting(model, sites, _multiplying(sites, units, factor, position == ends - 1)):
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
