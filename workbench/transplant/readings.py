"""Texts as two models read them: common positions, what linear layers read and write there, and maps between the units of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.facts.facts import joined
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import head_sees, hooked, shaped
from workbench.models.texts import Text, batch_limit, by_length, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


HELD_OUT = 5
"""Every fifth text is held out: nothing is fitted or trained on it."""
POSITIONS = 4096
"""Largest number of common positions; later texts are not read."""
LEAST = 64
"""Smallest number of common positions for a correlation."""
_BLOCK = 8  # tokens of similar frequency that are exchanged among each other


@dataclass(frozen=True)
class Reading:
    """A text as both models read it.

    Attributes:
        source: The source's tokens.
        target: The target's tokens.
        pairs: (position in the source, position in the target) at which both have read the same text.
        held_out: Whether the text is held out.
    """

    source: list[int]
    target: list[int]
    pairs: list[tuple[int, int]]
    held_out: bool


def read_aligned(texts: Sequence[Text], source: Any, target: Any, longest: int) -> list[Reading]:
    """Tokenize texts with both tokenizers and find their common positions.

    A position is common if the tokens of both models up to it end at the same character; equal tokens make all positions common. The
    first position of a text is left out, because many models keep a large activation there whatever the text is.

    Args:
        texts: The texts; a prompt and its answer are read as one text.
        source: The source's tokenizer.
        target: The target's tokenizer.
        longest: Largest number of tokens of a text; the rest is not read.

    Raises:
        WorkbenchError: If the tokenizers differ and one has no character offsets; if the texts to fit on, or those that are held out, have
            too few common positions.
    """
    readings: list[Reading] = []
    equal = source.get_vocab() == target.get_vocab()
    for number, text in enumerate(texts):
        whole = text.prompt + joined(text.prompt, text.answer) if text.prompt else text.answer
        ids = [tokenizer(whole)["input_ids"][:longest] for tokenizer in (source, target)]
        if equal and ids[0] == ids[1]:
            pairs = [(i, i) for i in range(1, len(ids[0]))]
        else:
            ends = [_ends(tokenizer, whole, longest) for tokenizer in (source, target)]
            pairs = sorted((i, ends[1][end]) for end, i in ends[0].items() if end in ends[1])
            pairs = [(i, j) for i, j in pairs if i and j]
        readings.append(Reading(ids[0], ids[1], pairs, number % HELD_OUT == HELD_OUT - 1))
        if sum(len(reading.pairs) for reading in readings) >= POSITIONS and len(readings) >= HELD_OUT:
            break
    for held_out, least in ((False, LEAST), (True, LEAST // HELD_OUT)):
        count = sum(len(reading.pairs) for reading in readings if reading.held_out == held_out)
        if count < least:
            kind = "held-out texts (every fifth one)" if held_out else "texts"
            raise WorkbenchError(
                f"the two tokenizers have {count} common positions on the {kind}, expected {least} or more: positions at which tokens of "
                "both end at the same character",
                "Use more or longer texts in --texts.",
            )
    return readings


def _ends(tokenizer: Any, text: str, longest: int) -> dict[int, int]:
    """Return end of a token's characters -> its position; of tokens with the same end, such as bytes of one character, the last one."""
    if not getattr(tokenizer, "is_fast", False):
        raise WorkbenchError(
            f"{type(tokenizer).__name__} has no character offsets, which are needed to find common positions of different tokenizers",
            "Save it as tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        )
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][:longest]
    return {end: position for position, (start, end) in enumerate(offsets) if end > start}


def exchanged(readings: Sequence[Reading], keep: Collection[int], seed: int) -> list[Reading]:
    """Return the same readings with the source's tokens exchanged for others, the same one each time.

    The source then reads other words in the same pattern: repetitions, lengths and positions stay. What still agrees between the two
    models is chance.

    Args:
        readings: The readings.
        keep: Tokens that stay, such as special ones.
        seed: Chooses the exchange. A token is exchanged for one of similar frequency.
    """
    counts = Counter(token for reading in readings for token in reading.source if token not in keep)
    ordered = [token for token, _ in counts.most_common()]
    generator = torch.Generator().manual_seed(seed)
    table: dict[int, int] = {}
    blocks = [ordered[start : start + _BLOCK] for start in range(0, len(ordered), _BLOCK)]
    if len(blocks) > 1 and len(blocks[-1]) == 1:
        blocks[-2:] = [blocks[-2] + blocks[-1]]
    for block in blocks:
        mixed = [block[i] for i in torch.randperm(len(block), generator=generator).tolist()]
        table |= dict(zip(mixed, [*mixed[1:], mixed[0]], strict=True))
    return [replace(r, source=[table.get(token, token) for token in r.source]) for r in readings]


@dataclass
class Recorded:
    """Inputs and outputs of linear layers.

    Attributes:
        inputs: Module -> what it read [positions, inputs], float32. Modules that read the same tensor are one entry.
        outputs: Module -> what it wrote [positions, outputs], float32.
        alike: Module -> the module under whose name its input is kept.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    alike: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """Shape [texts, tokens] of a batch; text and position of each recorded token in it, and its place in the result."""

    size: tuple[int, ...]
    rows: Tensor
    positions: Tensor
    places: Tensor


@no_grad
def record(
    model: PreTrainedModel, modules: Sequence[str], rows: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]
) -> Recorded:
    """Run texts through a model and record what modules read and write.

    Args:
        model: The live model.
        modules: Names of linear layers.
        rows: Tokens of each text.
        chosen: Positions of each text to record, in the order of the result.
    """
    device = next(model.parameters()).device
    counts = [len(positions) for positions in chosen]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    kept, total = Recorded(), sum(counts)
    batch: _Batch | None = None
    last: tuple[Any, str] = (None, "")

    def take(store: dict[str, Tensor], name: str, values: Tensor) -> None:
        assert batch is not None
        picked = shaped(values, *batch.size)[batch.rows, batch.positions].float().cpu()
        if name not in store:
            store[name] = torch.empty(total, picked.shape[1])
        store[name][batch.places] = picked

    def see(name: str, _module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal last
        if args[0] is not last[0]:
            take(kept.inputs, name, args[0])
            last = args[0], name
        kept.alike[name] = last[1]
        take(kept.outputs, name, output)

    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for name in modules:
            stack.enter_context(hooked(model.get_submodule(name), after=partial(see, name)))
        if head is not None:  # logits are not needed
            stack.enter_context(head_sees(head, torch.zeros(1, dtype=torch.long, device=device)))
        for index in by_length([len(row) for row in rows], batch_limit(device)):
            padded = side_by_side([rows[i] for i in index], device)
            last = (None, "")
            batch = _Batch(
                size=tuple(padded.tokens.shape),
                rows=torch.tensor([b for b, i in enumerate(index) for _ in chosen[i]], dtype=torch.long, device=device),
                positions=torch.tensor([p for i in index for p in chosen[i]], dtype=torch.long, device=device),
                places=torch.tensor([starts[i] + k for i in index for k in range(counts[i])], dtype=torch.long),
            )
            model(input_ids=padded.tokens, attention_mask=padded.mask, use_cache=False)
    return kept


_CONSTANT = 1e-6  # deviation, relative to the mean, below which a unit counts as constant


def standardized(values: Tensor) -> Tensor:
    """Return columns with mean 0 and norm 1, and columns of zeros for units that are constant.

    Args:
        values: [positions, units].
    """
    mean = values.mean(0)
    centered = values - mean
    norm = centered.norm(dim=0)
    varies = norm > _CONSTANT * (mean.abs() + 1e-30) * values.shape[0] ** 0.5
    return torch.where(varies, centered / norm.clamp_min(1e-30), torch.zeros(()))


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Return the correlation of each unit with each other one [first units, second units]; 0 for units that are constant.

    Args:
        first: [positions, first units].
        second: [positions, second units].
    """
    return standardized(first).T @ standardized(second)


def matched(map_: Tensor | None, start: Tensor, goal: Tensor) -> Tensor:
    """Return the correlation of each unit of the goal with what a map gives for it, leaving out units that are constant on either side.

    Args:
        map_: [goal units, start units]; None is the identity.
        start: [positions, start units].
        goal: [positions, goal units].
    """
    given = standardized(start if map_ is None else start @ map_.T)
    wanted = standardized(goal)
    varies = (given.abs().amax(0) > 0) & (wanted.abs().amax(0) > 0)
    return (given * wanted).sum(0)[varies]


def assignment(start: Tensor, goal: Tensor) -> Tensor:
    """Return the signed assignment of units with the largest sum of |correlation|, as a map from start to goal.

    If the models have different numbers of units, those that are left over are matched with none: their row or column is zero.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].

    Returns:
        [goal units, start units] with at most one entry, 1 or −1, in each row and column.

    Source:
        Klimaszewski et al. 2024, Is Modularity Transferable?, arXiv 2403.18804, section 3.2. There the largest signed correlations are
        matched; here their magnitudes, and the sign is kept.
    """
    from scipy.optimize import linear_sum_assignment

    found = correlations(goal, start)
    rows, columns = linear_sum_assignment(-found.abs().double().numpy())
    map_ = torch.zeros_like(found)
    map_[rows, columns] = torch.where(found[rows, columns] < 0, -1.0, 1.0)
    return map_


PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties to choose from, relative to the mean square of a start unit."""


def input_map(start: Tensor, goal: Tensor) -> Tensor:
    """Return the map of what modules read: the ridge map around zero.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].
    """
    return ridge(start, goal, centered=False)


def output_map(start: Tensor, goal: Tensor) -> Tensor:
    """Return the map of what modules write, on which updates act: the ridge map around the signed assignment.

    What a module writes spans no more directions than it has inputs, so activations do not say how the others are mapped, and an update
    may use them. There the assignment decides, with the slope of each matched pair. Updates are changes, so means do not count.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].
    """
    start, goal = start - start.mean(0), goal - goal.mean(0)
    rows, columns = assignment(start, goal).nonzero(as_tuple=True)
    one, other = start[:, columns], goal[:, rows]
    slopes = torch.zeros(goal.shape[1], start.shape[1])
    slopes[rows, columns] = (one * other).sum(0) / one.square().sum(0).clamp_min(1e-30)
    return slopes + ridge(start, goal - start @ slopes.T, centered=True)


def ridge(start: Tensor, goal: Tensor, *, centered: bool) -> Tensor:
    """Return the map M that minimizes Σ ‖M start − goal‖² + λ‖M‖².

    λ is chosen among `PENALTIES`: solved on the first four fifths of the positions, the map with the smallest error on the others; it is
    then solved again on all positions.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].
        centered: Whether both are taken as deviations from their means.

    Returns:
        [goal units, start units].
    """
    if centered:
        start, goal = start - start.mean(0), goal - goal.mean(0)
    split = start.shape[0] * 4 // 5
    errors = [
        float((start[split:] @ map_.T - goal[split:]).square().sum())
        for map_ in _solutions(start[:split], goal[:split], PENALTIES)
    ]
    best = PENALTIES[min(range(len(errors)), key=errors.__getitem__)]
    return _solutions(start, goal, (best,))[0]


def _solutions(start: Tensor, goal: Tensor, penalties: tuple[float, ...]) -> list[Tensor]:
    """Return the map for each penalty, from one pair of Gram matrices.

    They are summed in float64: where a few units are a thousand times as large as the others, rounding in float32 exceeds the smallest
    penalty, and the matrix is not positive definite.
    """
    start, goal = start.double(), goal.double()
    gram, cross = start.T @ start, start.T @ goal
    size = gram.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return [torch.cholesky_solve(cross, torch.linalg.cholesky(gram + penalty * size * eye)).T.float() for penalty in penalties]
