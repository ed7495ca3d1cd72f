"""Adapter: learn facts in a LoRA of many layers that keeps the base's predictions, from zero or from a closed-form edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from workbench.adapters.lora import Places
from workbench.edit.closed_form.closed_form import ClosedForm, editor
from workbench.edit.gradient.learning import (
    CONTINUED,
    END_WEIGHT,
    REPLAY_TEXTS,
    REPLAY_TOKENS,
    REPLAYED,
    Course,
    Preserved,
    Wordings,
    continued,
    lessons_of,
    prompt_rows,
    target_losses,
    text_rows,
    train,
)
from workbench.edit.gradient.tuning import LowRankUpdate
from workbench.edit.inputs import DistinctLayers, contexts, generated_prompts, read_for, read_prompts, statistics_texts
from workbench.edit.places.parts import LONGEST, Parts, check_rows
from workbench.facts.conflicts import require_consistent
from workbench.facts.facts import Fact
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.hooks import frozen, is_attention, n_outputs
from workbench.models.layout import Model
from workbench.models.texts import Text, encode, longest_row, read_texts
from workbench.steps import Cost, Edit, EditMethod, KeyContext, MethodContext, register
from workbench.steps.fields import Real, Whole
from workbench.weights.device import one_thread
from workbench.weights.lowrank import Factors

RANK = 16


@register
class AdapterEdit(EditMethod):
    """Learn facts in a LoRA of the feed-forward parts, while next-token distributions on other prompts and on text stay.

    Every step has a batch of facts, each in its own wording and in one other: a paraphrase, the prompt after a few words of text, or
    the chat template. Divergences from the base's own distributions keep neighbors and text. With `start`, the update begins as that
    closed-form edit.
    """

    paper = "Hu et al. 2021, LoRA, arXiv 2106.09685"
    formula = "min over B, A of Σ −log p(target | wording) + ε·−log p(end) + w_n·KL(neighbors) + w_r·KL(text);  ΔW = s·BA"

    version = 2  # rows that begin alike are run as one, which changes last bits

    edit: Literal["adapter"]
    facts: str
    """Facts file or published data set (see docs/facts.md), relative to the project."""
    first: Whole | None = Field(None, ge=1)
    """Use only the first N facts of the file."""
    layers: DistinctLayers = "auto"
    """Layers whose feed-forward parts are adapted, and those of the edit in `start`; `auto`: all layers."""
    modules: Literal["feed_forward", "output"] = "feed_forward"
    """Linear modules that are adapted in each layer: all of the feed-forward part, or its output projection only."""
    rank: Whole | None = Field(None, ge=1, le=1024)
    """Rank of every update. Default: 16, and the rank of the edit in `start` where that is larger. A smaller rank keeps the
    largest singular values of that edit."""
    start: Literal["none", "memit", "rome", "emmet", "encore", "alphaedit"] = "none"
    """Closed-form edit of the same facts that the update begins as; `none`: an update of zero."""
    start_fields: dict[str, object] = Field(default_factory=dict)
    """Fields of that edit, such as {layers: [7]}. Its `unconverged` is `skip` unless it is set here."""
    paraphrases: bool = True
    """Also learn the facts' paraphrases. Scores on these paraphrases then say nothing about wordings that were not learned."""
    contexts: Whole = Field(3, ge=0, le=10)
    """Number of text beginnings that are put before prompts, as other wordings."""
    chat: bool = False
    """Also learn each prompt as a user's message in the tokenizer's chat template."""
    preserve: str | None = None
    """JSONL file of prompts whose answers must not change, relative to the project: {"text":} or {"prompt":} per line, or facts,
    whose neighbours are used."""
    preserve_generated: Whole = Field(128, ge=0)
    """Number of further prompts to preserve: the facts' own wordings with other subjects."""
    preserve_weight: Real = Field(4.0, ge=0)
    """Weight of the divergence from the base on these prompts and the base's own first four tokens after them."""
    replay: str | None = None
    """JSONL file of texts whose next-token distributions must not change, relative to the project. Default: the text that comes
    with the workbench."""
    replay_weight: Real = Field(1.0, ge=0)
    """Weight of the divergence from the base on these texts."""
    epochs: Whole = Field(60, ge=0)
    """Largest number of passes over the facts. Training stops after a pass that `stop` accepts. 0 leaves the edit in `start` as it
    is."""
    batch_size: Whole = Field(8, ge=1)
    """Number of facts, and of prompts to preserve, per gradient step."""
    learning_rate: Real = Field(3e-4, gt=0, le=10)
    """Adam's step size."""
    stop: Real = Field(0.1, ge=0)
    """Training stops after a pass in which the loss of every fact, its weighted end of text included, and the mean divergences on
    prompts and on texts were below this value, in nats per token."""

    constants = MappingProxyType({"end_weight": END_WEIGHT, "scale": 1.0})

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.start == "none" and self.start_fields:
            raise ValueError("`start_fields` needs `start`")
        if self.start == "none" and self.epochs == 0:
            raise ValueError("nothing is learned with `epochs: 0` and `start: none`")
        taken = sorted({"edit", "facts", "first", "mode", "min_efficacy", "id"} & set(self.start_fields))
        if taken:
            raise ValueError(f"`start_fields` cannot set {taken[0]!r}, which is that of this step")
        self._start()
        return self

    def _start(self) -> ClosedForm | None:
        """Return the edit to start from; None for a start from zero."""
        if self.start == "none":
            return None
        fields = {"edit": self.start, "facts": self.facts, "first": self.first, "unconverged": "skip", **self.start_fields}
        try:
            return editor(self.start).model_validate(fields)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(["start_fields", *map(str, problem["loc"])])
            unknown = problem["type"] == "extra_forbidden"
            reason = f"edit {self.start} has no such field" if unknown else problem["msg"]
            raise ValueError(f"{place}: {reason}") from None

    def inputs(self) -> list[str]:
        """Return the files of facts, prompts to preserve and texts, and those of the edit to start from."""
        start = self._start()
        files = [self.facts, *filter(None, [self.preserve, self.replay]), *(start.inputs() if start else [])]
        return list(dict.fromkeys(files))

    def check_inputs(self, project: Path) -> None:
        """Read facts, prompts and texts, and check that facts do not contradict each other."""
        require_consistent(read_for("joint", self.first, project, self.facts))
        if self.preserve:
            read_prompts(project / self.preserve, self.preserve)
        if self.replay:
            read_texts(project / self.replay, self.replay)
        if start := self._start():
            start.check_inputs(project)

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return those of every edit, the version of the edit to start from, and the chat template if prompts are learned in it."""
        start = self._start()
        words = context.wording(None, context.number) if self.chat else []
        return [*super().key_parts(context), *([[start.name, start.version]] if start else []), *words]

    def cost(self, model: Model, project: Path, cache: Path) -> Cost:
        """Estimate the tokens of half of the epochs, and those of the edit to start from."""
        facts, row = len(read_for("joint", self.first, project, self.facts)), 12
        steps = -(-facts // self.batch_size) * self.epochs
        preserved = (
            2 * self.batch_size * (row + CONTINUED) * bool(self.preserve_weight and (self.preserve or self.preserve_generated))
        )
        replay = 2 * REPLAYED * REPLAY_TOKENS * bool(self.replay_weight)
        tokens = facts * self.epochs * 2 * row + steps * (preserved + replay)
        start = self._start()
        before = start.cost(model, project, cache)["tokens"] if start else 0
        return {"facts": facts, "steps": steps, "tokens": before + tokens // 2}

    def solve(self, context: MethodContext) -> Edit:
        """Attach an update to each module, train the updates, detach and return them; the model is left unchanged.

        Raises:
            WorkbenchError: If a module cannot be adapted, a rank is too large, or a fact or text cannot be tokenized.
        """
        facts = read_for("joint", self.first, context.project, self.facts)
        longest = longest_row(context.layout.config, LONGEST)
        check_rows(facts, context.tokenizer, longest)
        parts = Parts.find(context)
        if self.layers != "auto":
            parts.check_layers(self.layers, f"edit {self.name}")
        modules = self._modules(context, parts, parts.editable if self.layers == "auto" else self.layers)
        self._check_rank(parts, modules)
        wordings = Wordings(contexts(statistics_texts(), self.contexts), self.paraphrases, self.chat)
        lessons = lessons_of(facts, context.tokenizer, wordings, longest)
        begun, record = self._begin(context)
        modules = list(dict.fromkeys([*modules, *begun]))
        generator = torch.Generator().manual_seed(context.seed % 2**63)
        updates: dict[str, LowRankUpdate] = {}
        with frozen(context.model), one_thread():
            preserved = self._preserved(context, parts, facts, longest) if self.epochs else []
            try:
                for name in modules:
                    updates[name] = self._attach(parts, name, begun.get(name), generator)
                course = Course(self.epochs, self.batch_size, self.learning_rate, self.stop)
                trained = train(parts, lessons, preserved, list(updates.values()), course, generator, context.progress)
                losses = target_losses(parts, lessons, self.batch_size)
            finally:
                for update in updates.values():
                    update.remove()
        # Keyed by live names, because PEFT looks for those.
        factors = {f"{name}.weight": update.factors() for name, update in updates.items()}
        layers = sorted({int(name.removeprefix(f"{parts.prefix}.").split(".")[0]) for name in modules})
        record |= {
            "layers": layers,
            "order": "free",
            "rank": {name: update.rank for name, update in factors.items()},
            **trained,
            "losses": {fact.id: round(loss, 4) for fact, loss in zip(facts, losses, strict=True)},
        }
        return Edit(factors, record, fan_in_fan_out=parts.transposed, facts=facts)

    def _modules(self, context: MethodContext, parts: Parts, layers: Sequence[int]) -> list[str]:
        """Return the live names of the modules to adapt."""
        if self.modules == "output":
            return [parts.modules[layer] for layer in sorted(layers)]
        on_disk = Places(context.layout.weights.specs, context.layout.config)
        names = []
        for layer in sorted(layers):
            for inner, module in parts.layers[layer].named_modules():
                if n_outputs(module) is None or is_attention(inner):
                    continue
                name = f"{parts.prefix}.{layer}.{inner}"
                if on_disk.whole(f"{name}.weight") is None:
                    raise WorkbenchError(
                        f"edit adapter: {name} is not stored as a weight of its own, because transformers fuses or renames it",
                        "Set `modules: output`, which adapts the output projections only.",
                    )
                names.append(name)
        return names

    def _check_rank(self, parts: Parts, modules: Sequence[str]) -> None:
        """Raise InvalidRecipeError if the rank is larger than a side of a weight."""
        for name in modules if self.rank is not None else ():
            shape = tuple(parts.model.get_submodule(name).weight.shape)
            if self.rank > min(shape):
                raise InvalidRecipeError(
                    f"edit adapter: rank is {self.rank}, but {name} is a matrix of {shape[0]} x {shape[1]}",
                    f"Set rank: {min(shape)} or less.",
                )

    def _begin(self, context: MethodContext) -> tuple[dict[str, Factors], dict[str, object]]:
        """Return module -> update of the edit to start from, cut to the rank, and its record.

        The factors of a closed-form edit are singular vectors times roots of singular values, the largest first, so that their first
        terms are the best approximation of that rank.
        """
        method = self._start()
        if method is None:
            return {}, {}
        edit = method.solve(context)
        begun, shares = {}, {}
        for tensor, factors in edit.factors.items():
            squares = (factors.left.double().square().sum(0) * factors.right.double().square().sum(1)).tolist()
            rank = min(self.rank or factors.rank, factors.rank)
            begun[tensor.removesuffix(".weight")] = Factors(factors.left[:, :rank], factors.right[:rank])
            shares[tensor] = {"rank": rank, "of": factors.rank, "kept": sum(squares[:rank]) / (sum(squares) or 1.0)}
        return begun, {"start": {"edit": method.name, "layers": edit.record["layers"], "updates": shares}}

    def _attach(self, parts: Parts, name: str, begun: Factors | None, generator: torch.Generator) -> LowRankUpdate:
        """Attach a trainable update to a module."""
        rank = self.rank or max(RANK, begun.rank if begun else 0)
        update = LowRankUpdate(parts.model.get_submodule(name), rank, None, generator)
        if begun is not None:
            update.start_from(begun)
        return update

    def _preserved(self, context: MethodContext, parts: Parts, facts: Sequence[Fact], longest: int) -> list[Preserved]:
        """Return the prompts and texts whose distributions stay."""
        tokenizer, preserved = context.tokenizer, []
        if self.preserve_weight:
            listed = read_prompts(context.project / self.preserve, self.preserve) if self.preserve else []
            prompts = [*listed, *generated_prompts(facts, self.preserve_generated)]
            rows = prompt_rows(prompts, tokenizer, longest)
            answers = continued(parts, rows, CONTINUED, tokenizer.eos_token_id)
            preserved.append(Preserved("neighbours", answers, self.preserve_weight, self.batch_size))
        if self.replay_weight:
            if self.replay:
                texts = read_texts(context.project / self.replay, self.replay, REPLAY_TEXTS)
            else:
                own = statistics_texts()[:REPLAY_TEXTS]
                texts = [Text("", text, f"built-in text {number}") for number, text in enumerate(own, 1)]
            rows = text_rows(encode(texts, tokenizer, min(REPLAY_TOKENS, longest)))
            preserved.append(Preserved("replay", rows, self.replay_weight, REPLAYED))
        return preserved
