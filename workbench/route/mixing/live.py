"""Routed live models: `forward` and `generate` of a transformers model choose bricks for each row of a batch.

The choice is made once for a text, from its tokens: `generate` makes it from the prompt and keeps it while it decodes, and `forward`
makes it from the whole row. A cache carries the choice of the text that filled it, so that decoding loops of one's own keep it too.
A pass of the base up to the router's layer comes first; no brick acts in it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import CACHES
from workbench.models.prompts import encode_text
from workbench.route.deciding.hidden import ChatFrame, pooled, pooled_behind
from workbench.route.deciding.pooling import PooledRouter
from workbench.route.deciding.router import BASE
from workbench.route.mixing.kernel import Mix, Mixer, Pair
from workbench.route.mixing.roles import SEEN, weights_by_token
from workbench.steps.route import Decisions, Prompts, Router

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHOICE = "_routed_choice"
TURNS = 4
"""Number of user messages of a conversation that are read to find its topic."""


class Choice:
    """Weights of the bricks for the rows of a text or batch.

    Args:
        weights: [bricks] for any rows, [rows, bricks], or [rows, tokens, bricks].
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._mixes: dict[int, Mix | None] = {}

    def mix(self, rows: int) -> Mix | None:
        """Return the weights for a batch; `generate` repeats each row for beams and for several returned sequences."""
        if self.weights.dim() == 1:
            rows = 1
        elif rows % len(self.weights):
            raise WorkbenchError(
                f"the bricks were chosen for {len(self.weights)} rows, but the batch has {rows}",
                "Pass the rows of the prompt, in the same order.",
            )
        if rows not in self._mixes:
            repeated = self.weights if self.weights.dim() == 1 else self.weights.repeat_interleave(rows // len(self.weights), 0)
            self._mixes[rows] = Mix.of(repeated)
        return self._mixes[rows]


class Routing:
    """The router of a live model (`model.routing`).

    Args:
        model: The live model.
        tokenizer: Its tokenizer.
        router: The router.
        factors: Brick -> live module -> factors (A [rank, in], B [out, rank]), for the router's bricks.

    Attributes:
        router: The router.
        mixer: The bricks on the model's modules.
        last: The newest decisions, for those who want to show them; None before the first one.
        frame: What the chat template puts around a user's text.
        calibration: Digest of each calibration prompt -> its file, so that no such prompt is scored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        router: Router,
        factors: Mapping[str, Mapping[str, Pair]],
    ) -> None:
        if set(factors) != set(router.bricks):
            raise WorkbenchError(
                f"the router chooses among {', '.join(router.bricks)}, but the bricks are {', '.join(factors)}",
                "Use the router with the bricks that it was fitted on, or fit it again.",
            )
        self.router = router
        self.mixer = Mixer(model, {name: factors[name] for name in router.bricks})
        self.last: Decisions | None = None
        self.calibration: Mapping[str, str] = {}
        self._model, self._tokenizer = model, tokenizer
        self.frame = ChatFrame.of(tokenizer)
        self._fixed: Choice | None = None
        self._call = threading.local()

    def renew(self, router: Router, factors: Mapping[str, Mapping[str, Pair]]) -> None:
        """Take the place of the router and its bricks by others, while no call runs."""
        mixer = Mixer(self._model, {name: factors[name] for name in router.bricks})
        self.mixer.detach()
        self.router, self.mixer, self.last = router, mixer, None

    @property
    def bricks(self) -> tuple[str, ...]:
        """The bricks, in the order of the columns of weights."""
        return self.router.bricks

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of bricks that count as one, because prompts do not tell them apart."""
        ties = self.router.settings().get("ties")
        return tuple(tuple(group) for group in ties) if isinstance(ties, Sequence) else ()

    @property
    def by_token(self) -> bool:
        """True if the weights are those of each token's role, so that no choice is made for a prompt."""
        return hasattr(self.router, "token_weights")

    @property
    def whole_rows(self) -> bool:
        """True if a token's weights depend on the tokens before it, so that a row must be forwarded from its first token, in order."""
        return bool(getattr(self.router, "spans", False))

    @no_grad
    def decide(self, rows: Sequence[Sequence[int]]) -> Decisions:
        """Choose bricks for prompts. Of a conversation under a chat template, the last message counts.

        A message that would go to the base stays with the brick of the message before if, behind it, it is like that brick's prompts. A prompt
        without text goes to the base, with confidence 0.
        """
        read = [self._messages(row) for row in rows]
        with self._choosing(Choice(torch.zeros(len(self.bricks)))):
            decisions = self.last = self._decided([messages[-TURNS:] for messages, _ in read], [own for _, own in read])
        return decisions  # not self.last, which another thread may have set meanwhile

    def _decided(self, conversations: Sequence[Sequence[str]], rows: Sequence[Sequence[int]]) -> Decisions:
        """Return the decisions about the last message of each conversation, which has these tokens; no brick acts meanwhile."""
        weights, scores = torch.zeros(len(rows), len(self.bricks)), torch.zeros(len(rows), len(self.bricks))
        confidence, router = torch.zeros(len(rows)), self.router
        asked = [i for i, messages in enumerate(conversations) if messages[-1].strip()]
        if asked:
            prompts = [rows[i] for i in asked]
            hidden = None if router.layer is None else pooled(self._model, prompts, router.layer, router.window)
            made = router.decide(Prompts([conversations[i][-1] for i in asked], hidden, router.measure(self._model, prompts)))
            weights[asked], scores[asked], confidence[asked] = made.weights.float(), made.scores.float(), made.confidence.float()
        decisions = Decisions(weights, scores, confidence)
        if isinstance(router, PooledRouter):
            self._follow(router, conversations, decisions)
        return decisions

    def _follow(self, router: PooledRouter, conversations: Sequence[Sequence[str]], decisions: Decisions) -> None:
        """Let last messages that go to the base stay with the brick of the message before, where the router says so."""
        leaving = [i for i, messages in enumerate(conversations) if len(messages) > 1 and not decisions.weights[i].any()]
        leaving = [i for i in leaving if conversations[i][-1].strip()]
        if not leaving:
            return
        before = [conversations[i][:-1] for i in leaving]
        earlier = self._decided(before, [encode_text(self._tokenizer, messages[-1]) for messages in before]).weights
        topics = {i: int(row.argmax()) for i, row in zip(leaving, earlier, strict=True) if row.any()}
        if not topics:
            return
        texts = [("\n".join(conversations[i][:-1]), conversations[i][-1]) for i in topics]
        assert router.layer is not None
        behind = pooled_behind(self._model, self._tokenizer, texts, router.layer, router.window)
        made = router.follow(["\n".join(pair) for pair in texts], behind, torch.tensor(list(topics.values())))
        for place, i in enumerate(topics):
            if made.weights[place].any():
                decisions.weights[i], decisions.scores[i] = made.weights[place], made.scores[place]
                decisions.confidence[i] = made.confidence[place]

    def label(self, weights: Tensor) -> str:
        """Return the names of the bricks of one row of weights [bricks]: "add", "add+reverse", or "base" for none."""
        return "+".join(name for name, weight in zip(self.bricks, weights.tolist(), strict=True) if weight) or BASE

    @contextmanager
    def fixed(self, choice: str | Mapping[str, float] | Tensor | None) -> Iterator[None]:
        """Let the same bricks act in every call within the block, in all threads; the router is not asked.

        Args:
            choice: A brick, weights by brick, a tensor of weights ([bricks], [rows, bricks] or [rows, tokens, bricks]), or None for
                the base.
        """
        before, self._fixed = self._fixed, Choice(self._weights(choice))
        try:
            yield
        finally:
            self._fixed = before

    def _weights(self, choice: str | Mapping[str, float] | Tensor | None) -> Tensor:
        """Return a choice as weights."""
        if isinstance(choice, torch.Tensor):
            if choice.dim() == 0 or choice.shape[-1] != len(self.bricks):
                raise WorkbenchError(
                    f"expected weights of {len(self.bricks)} bricks, found a tensor {list(choice.shape)}",
                    f"The columns are {', '.join(self.bricks)}.",
                )
            return choice.detach().float()
        named = {choice: 1.0} if isinstance(choice, str) else dict(choice or {})
        if unknown := [name for name in named if name not in self.bricks]:
            raise WorkbenchError(f"no brick '{unknown[0]}' in this model. {nearest(unknown[0], self.bricks)}")
        return torch.tensor([float(named.get(name, 0.0)) for name in self.bricks])

    def _messages(self, row: Sequence[int]) -> tuple[list[str], Sequence[int]]:
        """Return the user messages of a conversation, or the prompt, and the tokens of the last one, which is routed."""
        messages = self.frame.messages(str(self._tokenizer.decode(list(row), skip_special_tokens=False)))
        if not messages:
            return [str(self._tokenizer.decode(list(row), skip_special_tokens=True))], row
        return messages, encode_text(self._tokenizer, messages[-1])

    @contextmanager
    def _choosing(self, choice: Choice) -> Iterator[None]:
        """Keep a choice for the calls of this thread within the block."""
        before = getattr(self._call, "choice", None)
        self._call.choice = choice
        try:
            yield
        finally:
            self._call.choice = before

    def _chosen(self) -> Choice | None:
        """Return the choice that is in effect, of this thread's call or of `fixed`; None if the router must be asked."""
        chosen: Choice | None = getattr(self._call, "choice", None)
        return chosen or self._fixed

    def _of_tokens(self, ids: Any, mask: Any, caches: Sequence[Any]) -> tuple[Choice, Tensor]:
        """Return the weights of tokens by their roles, and the texts from their first tokens; see `weights_by_token`."""
        generated, self._call.generated = getattr(self._call, "generated", None), None
        weights, whole = weights_by_token(self.router, ids, mask, caches, generated)
        return Choice(weights), whole

    def _of_prompts(self, ids: Any, mask: Any) -> Choice:
        """Ask the router for the choice of whole prompts."""
        if (
            not isinstance(ids, torch.Tensor)
            or ids.dim() != 2
            or (mask is not None and getattr(mask, "shape", None) != ids.shape)
        ):
            raise WorkbenchError(
                "a routed model chooses bricks from tokens: expected input_ids [rows, tokens] and an attention_mask of the same shape",
                "To forward embeddings or packed rows, say which bricks act: `with model.routing.fixed(BRICK)`.",
            )
        real = torch.ones_like(ids) if mask is None else mask
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, real, strict=True)]
        return Choice(self.decide(rows).weights)


def attach(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, router: Router, factors: Mapping[str, Mapping[str, Pair]]
) -> Routing:
    """Make a live model a routed one: its `forward` and `generate` ask the router.

    Args:
        model: The live model.
        tokenizer: Its tokenizer.
        router: The router.
        factors: Brick -> live module -> factors (A [rank, in], B [out, rank]), for the router's bricks.

    Returns:
        The routing, which is also set as `model.routing`.
    """
    routing: Any = Routing(model, tokenizer, router, factors)
    forward, generate = model.forward, model.generate
    parameters = inspect.signature(forward)

    @functools.wraps(forward)
    def routed_forward(*args: Any, **kwargs: Any) -> Any:
        named = {**parameters.bind_partial(*args, **kwargs).arguments, **kwargs}
        ids = named.get("input_ids")
        shape = ids.shape if ids is not None else getattr(named.get("inputs_embeds"), "shape", (1, 0))
        caches = [cache for name in CACHES if (cache := named.get(name)) is not None]
        choice, seen = routing._chosen(), None
        if choice is None and routing.by_token:
            choice, seen = routing._of_tokens(ids, named.get("attention_mask"), caches)
        elif choice is None:
            choice = _choice_of(caches)
        if choice is None:
            choice = routing._of_prompts(ids, named.get("attention_mask"))
            _check_positions(named.get("position_ids"), named.get("attention_mask"))
        elif seen is not None and routing.whole_rows:
            _check_positions(named.get("position_ids"), named.get("attention_mask"))
        with routing.mixer.acting(choice.mix(shape[0]), shape[1]):
            output = forward(*args, **kwargs)
        caches += [value for name, value in output.items() if name in CACHES] if isinstance(output, dict) else []
        for cache in caches:
            if cache is not None and not isinstance(cache, (tuple, list, torch.Tensor)):
                setattr(cache, *((_CHOICE, choice) if not routing.by_token else (SEEN, seen)))
        return output

    @functools.wraps(generate)
    def routed_generate(inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if routing.by_token:
            try:
                return generate(kwargs.pop("input_ids", None), **kwargs)
            finally:
                routing._call.generated = None
        choice = routing._chosen() or _choice_of([cache for name in CACHES if (cache := kwargs.get(name)) is not None])
        if choice is None:
            ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
            choice = routing._of_prompts(ids, _padding(ids, mask, kwargs, model, tokenizer))
        ids = kwargs.pop("input_ids", None)
        with routing._choosing(choice):
            return generate(ids, **kwargs)

    changed: Any = model
    changed.forward, changed.generate, changed.routing = routed_forward, routed_generate, routing
    if routing.by_token:
        prepare = model.prepare_inputs_for_generation

        @functools.wraps(prepare)
        def routed_prepare(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            routing._call.generated = input_ids
            return prepare(input_ids, *args, **kwargs)

        changed.prepare_inputs_for_generation = routed_prepare
    return routing  # type: ignore[no-any-return]


def _choice_of(caches: Sequence[Any]) -> Choice | None:
    """Return the choice of the text that filled a cache; None if there is no cache, or an empty one."""
    for cache in caches:
        length = getattr(cache, "get_seq_length", None)
        if length is not None and not length():
            continue
        if (choice := getattr(cache, _CHOICE, None)) is not None:
            return choice  # type: ignore[no-any-return]
        raise WorkbenchError(
            "a routed model does not know which bricks acted when this cache was filled",
            "Fill the cache with this model, or say which bricks act: `with model.routing.fixed(BRICK)`.",
        )
    return None


def _padding(ids: Any, mask: Any, kwargs: Mapping[str, Any], model: Any, tokenizer: Any) -> Any:
    """Return the mask of prompts; without one, padding tokens are found by transformers' own rule."""
    config = kwargs.get("generation_config") or model.generation_config
    pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
    stops = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    stops = [stops] if isinstance(stops, int) else list(stops or [tokenizer.eos_token_id])
    if mask is None and isinstance(ids, torch.Tensor) and isinstance(pad, int) and pad not in stops and bool((ids == pad).any()):
        return (ids != pad).long()
    return mask


def _check_positions(positions: Any, mask: Any) -> None:
    """Raise WorkbenchError if positions start again within a row, so that the row holds several texts."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return
    restarts = positions.diff(dim=1) != 1
    if mask is not None and mask.shape == positions.shape:
        restarts &= mask[:, :-1].bool() & mask[:, 1:].bool()
    if bool(restarts.any()):
        raise WorkbenchError(
            "position_ids start again within a row: a routed model chooses bricks for whole rows",
            "Pass one text in each row, or say which bricks act: `with model.routing.fixed(BRICK)`.",
        )
