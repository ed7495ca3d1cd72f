"""Chat with recipes, runs and models: one to three of them answer the same prompt, and share one live model where their weights allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.api.naming import open_named
from workbench.ground.errors import UsageError, size
from workbench.ground.events import Events, no_events

if TYPE_CHECKING:
    import torch

Write = Callable[[str], None]
"""Callback that takes a piece of an answer as it is generated."""
TOP = 5
"""Number of first tokens that an answer names."""


@dataclass(frozen=True)
class Reply:
    """An answer, and what is known of how it came about.

    Attributes:
        text: The answer.
        first: The most probable first tokens with their probabilities, the chosen one first.
        acted: What chose or changed it, and how: "router" with bricks, such as "add+reverse"; "memory" with each fact that was put before
            the prompt, the best one first; "codebook" with each fact whose entries replaced outputs.
    """

    text: str
    first: Sequence[tuple[str, float]]
    acted: Sequence[tuple[str, str]]


@dataclass
class Speaker:
    """A model that one chats with.

    Attributes:
        name: Its name, as typed.
        model: Returns the live model with its weights.
        tokenizer: Its tokenizer.
        templated: Prompts are put into the tokenizer's chat template, with the turns before them.
        history: The turns so far.
    """

    name: str
    model: Callable[[], Any]
    tokenizer: Any
    templated: bool
    history: list[dict[str, str]] = field(default_factory=list)

    def answer(self, line: str, limit: int, write: Write, stop: Callable[[], bool] = bool) -> Reply:
        """Answer a line.

        Args:
            line: The user's line.
            limit: Maximum length of the answer in tokens.
            write: Takes the answer piece by piece.
            stop: Returns True if the answer shall end now; asked after each token.
        """
        self.history.append({"role": "user", "content": line})
        if self.templated:
            tokens = self.tokenizer.apply_chat_template(
                self.history, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            tokens = self.tokenizer(line, return_tensors="pt")
        model, first = self.model(), list[tuple[int, float]]()
        with model.codebook.noting() if hasattr(model, "codebook") else nullcontext(list[str]()) as entries:
            made = model.generate(
                **tokens.to(model.device),
                max_new_tokens=limit,
                do_sample=False,
                streamer=_streamer(self.tokenizer, write),
                logits_processor=[partial(_note_first, first)],
                stopping_criteria=[lambda ids, *_, **__: ids.new_full((len(ids),), stop(), dtype=bool)],
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        prompt = tokens["input_ids"]
        text = str(self.tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))
        self.history.append({"role": "assistant", "content": text})
        named = [(str(self.tokenizer.decode([token])), share) for token, share in first]
        acted = [*_chosen(model, prompt[0].tolist(), limit), *(("codebook", entry) for entry in entries)]
        return Reply(text, named, acted)


def _chosen(model: Any, prompt: Sequence[int], limit: int) -> Iterator[tuple[str, str]]:
    """Yield the bricks that a router chose for a prompt, and the facts that a text memory puts before it."""
    routing, recall = getattr(model, "routing", None), getattr(model, "recall", None)
    if routing is not None and not routing.by_token:
        yield "router", str(routing.label(routing.last.weights[0]))
    if recall is not None and recall.extended(prompt, limit) is not None:
        from workbench.edit.memories.textmemory import query_of, sentence

        for fact in recall.store.recall(query_of(recall.tokenizer, prompt)):
            yield "memory", sentence(fact)


def open_speakers(
    targets: Sequence[str],
    runs: Path | None,
    device: torch.device,
    *,
    plain: bool,
    say: Callable[[str], None],
    events: Events = no_events,
) -> list[Speaker]:
    """Load recipes, runs or models; those of one base share one live model if their weights allow it.

    Args:
        targets: Their names; see `naming.find`.
        runs: Directory of runs; default: runs/ in the project.
        device: Device of the models.
        plain: Do not use chat templates.
        say: Receives how much memory they share.
        events: Receives progress.

    Raises:
        WorkbenchError: If there is no such recipe, run or model, or if one has no model that can be loaded.
    """
    from workbench.models.prompts import load_tokenizer
    from workbench.run.materialize import SharedModel, materialize, shared

    if twice := next((name for name in targets if list(targets).count(name) > 1), None):
        raise UsageError(f"{twice} is named twice", "Name different models, or one.")
    opened = [open_named(target, events, runs).resolved for target in targets]
    tokenizers = [load_tokenizer(resolved.tokenizer_path) for resolved in opened]
    one = shared(opened, device, events) if len(opened) > 1 else None
    if one is not None:
        all_ = "both" if len(opened) == 2 else "all three"
        say(f"{all_} share one model of {opened[0].recipe.fields.base_name}; {size(one.bytes)} of weights differ")
        models: list[Callable[[], Any]] = [partial(one.holding, i) for i in range(len(opened))]
    else:
        alone = [SharedModel(materialize(resolved, device, events=events), []) for resolved in opened]
        models = [partial(model.holding, 0) for model in alone]
        if len(models) > 1:
            say(f"{'two' if len(models) == 2 else 'three'} models are in memory, because they cannot share their weights")
    return [
        Speaker(target, model, tokenizer, bool(tokenizer.chat_template) and not plain)
        for target, model, tokenizer in zip(targets, models, tokenizers, strict=True)
    ]


def _note_first(first: list[tuple[int, float]], _ids: Any, scores: Any) -> Any:
    """Note the most probable tokens at the first call of an answer, and return the scores as they are."""
    if not first:
        best = scores[0].float().softmax(-1).topk(min(TOP, scores.shape[-1]))
        first += zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return scores


def _streamer(tokenizer: Any, write: Write) -> Any:
    """Return the streamer that passes generated text on, without the prompt and special tokens."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: write(text)
    return streamer
