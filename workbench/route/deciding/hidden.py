"""Read prompts for routers: the last message of a chat, and hidden states of the base at one depth, pooled over the last tokens of each prompt.

The mean over the last tokens follows the request wherever it stands in the text; a mean over the whole prompt changes with a greeting
in front of it. Models give the first token of a text, and sometimes one or two early ones, a state of very large norm that has nothing
to do with its meaning (attention sinks). One of them would outweigh all other states in the mean, so they are left out.

States of a brick's prompts are kept in a file beside its card, which holds digests of the prompts, not the prompts:

states       [prompt or copy, window, hidden size], float32; see `windows`
digests      [prompt or copy, 16], uint8: digest of each text
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import bytes_digest
from workbench.ground.lazy import no_grad, torch
from workbench.models.architecture import model_depth
from workbench.models.hooks import Stopped, hooked, states_of
from workbench.models.layout import stack_prefix
from workbench.models.prompts import encode_text
from workbench.models.texts import batch_limit, longest_row, side_by_side
from workbench.route.deciding.samples import copies
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


WINDOW = 16
"""Number of last tokens that are pooled."""
SHIFTS = (0, 4, 8, 12)
"""Tokens after each of the windows of a prompt. The request may stand before thanks or a signature."""
POOLING = 2
"""Version of the pooling. Raise it when `pooled` gives other numbers: states that were kept before are then measured again."""
SINK = 4.0
"""A state whose norm is larger than this multiple of the row's median norm is left out. Other states lie below twice the median."""


def depth_of(model: PreTrainedModel) -> int:
    """Return the number of decoder blocks whose output is pooled: half of them.

    A third of the depth fails on some sets of bricks, and two thirds take longer and route no better.
    """
    return max(1, model_depth(model.config.to_dict()) // 2)


def token_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of prompts, with the special tokens that the tokenizer puts at the start of a text."""
    return [encode_text(tokenizer, text) for text in texts]


def pooled(model: PreTrainedModel, rows: Sequence[Sequence[int]], layer: int, window: int) -> Tensor:
    """Return pooled hidden states of prompts. Blocks after `layer` do not run.

    Returns:
        [row, one of `SHIFTS`, hidden size], float32, on the CPU.
    """
    return torch.stack([windows(states, window) for states in hidden_states(model, rows, layer)])


def pooled_behind(model: PreTrainedModel, tokenizer: Any, texts: Sequence[tuple[str, str]], layer: int, window: int) -> Tensor:
    """Return pooled hidden states of messages, each read behind the messages before it; only its own tokens are pooled.

    Args:
        model: A live decoder-only model.
        tokenizer: Its tokenizer.
        texts: Pairs of what stands before a message, and the message.
        layer: Number of decoder blocks to run.
        window: Number of last tokens that are pooled.

    Returns:
        [text, one of `SHIFTS`, hidden size], float32, on the CPU.
    """
    rows = token_rows(tokenizer, [f"{before}\n{message}" for before, message in texts])
    skipped = map(len, token_rows(tokenizer, [f"{before}\n" for before, _ in texts]))
    lengths = [max(1, len(row) - before) for row, before in zip(rows, skipped, strict=True)]
    found = zip(hidden_states(model, rows, layer), lengths, strict=True)
    return torch.stack([windows(torch.cat([states[:1], states[-own:]]), window) for states, own in found])


def windows(states: Tensor, window: int) -> Tensor:
    """Return means of a row [token, width] over windows that end some tokens before its end: [one of `SHIFTS`, width].

    The first token and attention sinks do not count; if there is only one state, it is returned. A window that the
    start of the row leaves with less than half of its tokens repeats the one before it.
    """
    if len(states) > 1:
        states = states[1:]
        norms = states.norm(dim=1)
        # The lower median is an existing norm, so at least one state is kept.
        states = states[norms <= SINK * norms.median()]
    means: list[Tensor] = []
    for shift in SHIFTS:
        end = len(states) - shift
        means.append(states[max(0, end - window) : end].mean(0) if shift == 0 or end >= max(1, window // 2) else means[-1])
    return torch.stack(means)


def moving(states: Tensor, window: int) -> Tensor:
    """Return `windows` of a row after each of its tokens: [token, width] -> [token, one of `SHIFTS`, width]."""
    return torch.stack([windows(states[: i + 1], window) for i in range(len(states))])


@no_grad
def hidden_states(model: PreTrainedModel, rows: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
    """Return the output of a decoder block for each row.

    Args:
        model: A live decoder-only model.
        rows: Tokens, without padding. A row that is longer than the model's positions loses its start.
        layer: Number of decoder blocks to run, from 1.

    Returns:
        [token, hidden size] per row, float32, on the CPU.
    """
    config = model.config.to_dict()
    longest = longest_row(config, 1 << 30)
    rows = [list(row)[-longest:] for row in rows]
    block = model.get_submodule(f"{stack_prefix(model, model_depth(config))}.{layer - 1}")
    outputs: list[Tensor] = []
    read: list[Tensor] = []
    thread = threading.get_ident()

    def record(_module: Any, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:  # other threads may run the same model at the same time
            outputs.append(states_of(output, read[-1]).float().cpu())
            raise Stopped

    found: dict[int, Tensor] = {}
    with hooked(block, after=record):
        for numbers in token_batches(rows, model.device):
            batch = side_by_side([rows[i] for i in numbers], model.device)
            read[:] = [batch.tokens]
            try:
                model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
            except Stopped:
                states = outputs.pop()
                found |= {i: states[place, : len(rows[i])] for place, i in enumerate(numbers)}
    return [found[i] for i in range(len(rows))]


def token_batches(rows: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """Return the numbers of rows in batches of similar length that a forward pass on the device is fast with."""
    limit = batch_limit(device)
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if groups and len(rows[i]) * (len(groups[-1]) + 1) <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


FILE = "routing.safetensors"
"""Name of the file beside a card."""
_SHAPES = {"states": 3, "digests": 2}


@dataclass(frozen=True)
class BrickStates:
    """Pooled states of a brick's prompts and their copies.

    Attributes:
        states: [text, window, hidden size], float32.
        digests: Digest of each text, in the same order.
        layer: Number of decoder blocks whose output was pooled.
        window: Number of last tokens that were pooled.
        pooling: Version of the pooling.
    """

    states: Tensor
    digests: tuple[str, ...]
    layer: int
    window: int
    pooling: int

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {digest: row for row, digest in enumerate(self.digests)}

    def differs(self, layer: int, window: int) -> str | None:
        """Return how the states differ from those that a router needs; None if they fit."""
        if self.layer != layer:
            return f"are of layer {self.layer}, and the router reads layer {layer}"
        if self.window != window:
            return f"are of the last {self.window} tokens, and the router reads the last {window}"
        if self.pooling != POOLING:
            return f"were pooled by version {self.pooling}, and this is version {POOLING}"
        return None

    def of(self, texts: Sequence[str]) -> Tensor | None:
        """Return the states [text, window, hidden size] of some texts; None if one of them is missing."""
        rows = [self._rows.get(text_digest(text)) for text in texts]
        return None if None in rows else self.states[torch.tensor(rows, dtype=torch.long)]

    def save(self, path: Path) -> dict[str, Tensor]:
        """Write the file, and return its tensors."""
        tensors = {
            "states": self.states.contiguous(),
            "digests": torch.tensor([list(bytes.fromhex(digest)) for digest in self.digests], dtype=torch.uint8),
        }
        save_tensors(tensors, path)
        return tensors


def text_digest(text: str) -> str:
    """Return the digest of a text as it is."""
    return bytes_digest(text.encode("utf-8", "surrogatepass"))


def measure_states(model: Any, tokenizer: Any, prompts: Sequence[str], layer: int, window: int) -> BrickStates:
    """Run the base over prompts and their copies."""
    texts = list(dict.fromkeys(text for number, prompt in enumerate(prompts) for text in copies(prompt, number).values()))
    states = pooled(model, token_rows(tokenizer, texts), layer, window)
    return BrickStates(states, tuple(map(text_digest, texts)), layer, window, POOLING)


def read_states(path: Path, layer: int, window: int, pooling: int) -> tuple[BrickStates, dict[str, Tensor]]:
    """Read the file; the arguments that it does not hold come from the card.

    Returns:
        The states, and the file's tensors for their digest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise WorkbenchError(f"{path} is missing") from None
    except SafetensorError as error:
        raise WorkbenchError(f"{path} is not a safetensors file: {str(error)[:100]}") from None
    older = 2 if pooling != POOLING else 3  # one window a text: such states are measured again, with a line that says so
    wrong = [
        n for n, dimensions in _SHAPES.items() if n not in tensors or tensors[n].ndim not in (dimensions, min(dimensions, older))
    ]
    if wrong or len(tensors["states"]) != len(tensors["digests"]):
        raise WorkbenchError(f"{path} is not a file of routing statistics: '{wrong[0] if wrong else 'digests'}' does not fit")
    digests = tuple(bytes(row).hex() for row in tensors["digests"].tolist())
    return BrickStates(tensors["states"], digests, layer, window, pooling), tensors


# What comes before and after a user's text in well-known templates, for models whose tokenizer has no template or another one.
KNOWN = (
    ("<|im_start|>user\n", "<|im_end|>"),
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<start_of_turn>user\n", "<end_of_turn>"),
    ("[INST]", "[/INST]"),
    ("<|user|>\n", "<|end|>"),
    ("<|user|>\n", "</s>"),
    ("<|user|>\n", "<|assistant|>"),
    ("<｜User｜>", "<｜Assistant｜>"),
    ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>"),
    ("### Instruction:\n", "### Response:"),
)


@dataclass(frozen=True)
class ChatFrame:
    """The texts between which a user's text stands.

    Attributes:
        marks: Pairs of the text before (the opener) and the text after (the closer) of the tokenizer's own template. None is white
            space alone.
    """

    marks: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame:
        """Return the frame of a tokenizer's chat template, found by rendering it.

        A user's text is rendered with and without a system message, as first and as later message. The opener is the common end of what
        precedes it, the closer the common start of what follows it. What precedes it after a system message may have an end of its own.
        """
        if not getattr(tokenizer, "chat_template", None):
            return cls()
        gaps = {(system, later): _around(tokenizer, system, later) for system, later in product((False, True), (False, True))}
        found = [gap for gap in gaps.values() if gap]
        if not found:
            return cls()
        after = _common_start([gap[1] for gap in found])
        befores = [gap[0][::-1] for (system, later), gap in gaps.items() if gap and (later or not system)]
        openers = [_common_start(befores)[::-1]]
        if (first := gaps[True, False]) and not (openers[0].strip() and first[0].endswith(openers[0])):
            openers.append(first[0])
        return cls(tuple((opener, after) for opener in openers if opener.strip() and after.strip()))

    def message(self, text: str) -> str:
        """Return the last user message of a text; the text itself if no template is around it."""
        return (self.messages(text) or [text])[-1]

    def messages(self, text: str) -> list[str]:
        """Return the user messages of a text; none if no template is around it.

        Args:
            text: A text with the template's special tokens.
        """
        for marks in (self.marks, KNOWN):
            ends: dict[int, int] = {}  # start of a message -> its end, the first of its closers
            for opener, closer in marks:
                last = text.rfind(opener)
                if last < 0 or text.find(closer, last + len(opener)) < 0:  # the last message is not closed
                    continue
                for found in re.finditer(re.escape(opener), text):
                    end = text.find(closer, found.end())
                    ends[found.end()] = min(end, ends.get(found.end(), end))
            starts = {end: max(start for start, other in ends.items() if other == end) for end in ends.values()}
            if starts:
                return [text[start:end].strip("\n ") for end, start in sorted(starts.items())]
        return []


def _around(tokenizer: Any, system: bool, later: bool) -> tuple[str, str] | None:
    """Return what stands between the content before a user's text and that text, and what follows it; None if it cannot be rendered."""
    user, marks = "<<user-text>>", ("<<system-text>>", "<<first-text>>", "<<answer-text>>")
    messages = [{"role": "system", "content": marks[0]}] * system
    messages += [{"role": "user", "content": marks[1]}, {"role": "assistant", "content": marks[2]}] * later
    messages += [{"role": "user", "content": user}]
    texts = []
    for answer in (True, False):
        before, found, after = _rendered(tokenizer, messages, answer).rpartition(user)
        if found:
            last = max(before.rfind(mark) + len(mark) if mark in before else 0 for mark in marks)
            texts.append((before[last:], after))
    if not texts:
        return None
    whole, common = texts[0][1], _common_start([after for _, after in texts])
    return texts[0][0], common if common.strip() else whole


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], answer: bool) -> str:
    """Return messages under the chat template, with the start of an answer or without; nothing if the template takes no such messages."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except Exception:  # noqa: BLE001  a template is code of the model's author and may fail in any way
        return ""


def _common_start(texts: Sequence[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))
