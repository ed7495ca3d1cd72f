"""Routers that give every token its own weights, by its role in the text, and the texts behind the tokens of one forward pass.

A token has the role that its id belongs to. A token of a span has the span's role, whatever its id: the first marker opens the span,
and the next closing marker, which still belongs to it, closes it. All other tokens are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject
from workbench.route.deciding.router import REPAIR, Fitted, restored, state
from workbench.steps.route import Decisions, Prompts

if TYPE_CHECKING:
    from torch import Tensor


METHOD = "roles"
TEXT = 0
"""Number of the role of all other tokens. Role i of the list of roles has the number i + 1."""


@dataclass(frozen=True)
class Role:
    """The tokens that a brick acts on.

    Attributes:
        brick: The brick.
        ids: Ids of its tokens.
        span: Ids of the tokens that begin and end its spans; None if it has none.
    """

    brick: str
    ids: tuple[int, ...]
    span: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class RolesRouter(Fitted):
    """Weights for each token by its role.

    Attributes:
        roles: Brick of each role, with its span; the ids are those of `table`.
        table: [tokens of the vocabulary], int32: number of each token's role.
        weights: [1 + roles, bricks]: weights of the bricks on text, then on the tokens of each role.
    """

    method: ClassVar[str] = METHOD
    roles: tuple[Role, ...]
    table: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)

    @classmethod
    def of(cls, bricks: Sequence[str], roles: Sequence[Role], text: Mapping[str, float], rows: int) -> RolesRouter:
        """Return the router of some roles."""
        table, weights = torch.zeros(rows, dtype=torch.int32), torch.zeros(1 + len(roles), len(bricks))
        for name, weight in text.items():
            weights[TEXT, bricks.index(name)] = weight
        for number, role in enumerate(roles, 1):
            table[list(role.ids)] = number
            weights[number, bricks.index(role.brick)] = 1.0
        record = {
            "roles": {r.brick: {"tokens": len(r.ids), **({"between": list(r.span)} if r.span else {})} for r in roles},
            "text": dict(text),
        }
        without_ids = tuple(replace(role, ids=()) for role in roles)
        return cls(bricks=tuple(bricks), record=record, roles=without_ids, table=table, weights=weights)

    @property
    def spans(self) -> bool:
        """True if a token's role depends on the tokens before it."""
        return any(role.span for role in self.roles)

    def decide(self, prompts: Prompts) -> Decisions:
        """Return the weights of text for each prompt, with confidence 1: a prompt as such has no role."""
        rows = self.weights[TEXT].expand(len(prompts.texts), -1).clone()
        return Decisions(rows, rows.clone(), torch.ones(len(rows)))

    def roles_of(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the number of each token's role: 0 for text, i + 1 for role i.

        Args:
            ids: [rows, tokens], from the first token of each text.
            mask: [rows, tokens], 0 for padding, which neither opens nor closes a span; None: no padding.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.table):
            raise WorkbenchError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, but the roles were made for {len(self.table):,} tokens",
                "Use the tokenizer of this configuration, or run the recipe again.",
            )
        found = self.table.to(ids.device)[ids].long()
        if not self.spans:
            return found
        opens = {role.span[0]: number for number, role in enumerate(self.roles, 1) if role.span}
        closes = {number: role.span[1] for number, role in enumerate(self.roles, 1) if role.span}
        real = torch.ones_like(ids) if mask is None else mask
        for row, (tokens, keep) in enumerate(zip(ids.tolist(), real.tolist(), strict=True)):
            inside = 0
            for place, token in enumerate(tokens):
                if not keep[place]:
                    continue
                if inside:
                    found[row, place] = inside
                    inside = 0 if token == closes[inside] else inside
                elif token in opens:
                    found[row, place] = inside = opens[token]
        return found

    def token_weights(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return weights [rows, tokens, bricks] for the tokens of texts; see `roles_of`."""
        return self.weights.to(ids.device)[self.roles_of(ids, mask)]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of router.safetensors."""
        return {"table": self.table, "weights": self.weights}

    def own_settings(self) -> dict[str, object]:
        """Return the bricks of the roles, with their spans."""
        return {"roles": [SavedRole(brick=role.brick, between=role.span).to_dict() for role in self.roles]}


class SavedRole(JsonObject):
    """A role in routing.json; its ids are in the table."""

    brick: str
    """The brick."""
    between: tuple[int, int] | None
    """Ids of the tokens that begin and end its spans."""


def restore_roles(settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> RolesRouter:
    """Return a router from its saved state."""
    fields = restored(settings, METHOD)
    try:
        saved = TypeAdapter(list[SavedRole]).validate_python(settings.get("roles"))
    except ValidationError as error:
        raise WorkbenchError(f"routing.json: a role is missing or invalid: {error.errors()[0]['msg']}", REPAIR) from None
    roles = tuple(Role(role.brick, (), role.between) for role in saved)
    table = state(tensors, "table", [None])
    weights = state(tensors, "weights", [1 + len(roles), len(fields["bricks"])])
    if table.is_floating_point() or (len(table) and not 0 <= int(table.min()) <= int(table.max()) <= len(roles)):
        raise WorkbenchError(f"router.safetensors: 'table' names roles other than 0 to {len(roles)}", REPAIR)
    return RolesRouter(**fields, roles=roles, table=table, weights=weights)


SEEN = "_routed_tokens"
"""Attribute of a cache: the tokens [rows, tokens] that filled it."""


def weights_by_token(router: Any, ids: Any, mask: Any, caches: Sequence[Any], generated: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weights of the tokens of a forward pass by their roles.

    Args:
        router: A router with `token_weights` and `spans`; see `workbench.route.mixing.roles`.
        ids: [rows, tokens], after the tokens of the caches.
        mask: The mask of all tokens; None: no padding.
        caches: Caches with earlier tokens.
        generated: The whole rows, if `generate` makes this pass. It reorders the rows of beams, which a cache does not tell.

    Returns:
        Weights [rows, tokens, bricks], and the texts from their first tokens if weights depend on them, else `ids`.

    Raises:
        WorkbenchError: If the tokens are not given, or those before them are not known and roles depend on them.
    """
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise WorkbenchError(
            "bricks with roles act by tokens: expected input_ids [rows, tokens]",
            "To forward embeddings, say which bricks act: `with model.routing.fixed(WEIGHTS)`, with weights [rows, tokens, bricks].",
        )
    if not router.spans:
        return router.token_weights(ids), ids
    count = ids.shape[1]
    whole = ids
    if generated is not None and generated.shape[1] >= count and torch.equal(generated[:, -count:], ids):
        whole = generated
    elif filled := [cache for cache in caches if _length(cache)]:
        seen = getattr(filled[0], SEEN, None)
        if seen is None or seen.shape[1] != _length(filled[0]) or len(seen) != len(ids):
            raise WorkbenchError(
                "roles between markers depend on earlier tokens, and this cache was filled with others than this model has seen",
                "Fill the cache with this model, in the same rows, or forward whole texts.",
            )
        whole = torch.cat([seen, ids], 1)
    if mask is not None and getattr(mask, "shape", None) != whole.shape:
        raise WorkbenchError(
            "roles between markers need whole texts: expected an attention_mask [rows, tokens], found another mask",
            "Pass one text in each row.",
        )
    return router.token_weights(whole, mask)[:, -count:], whole


def _length(cache: Any) -> int:
    """Return the number of tokens in a cache; 1 if it does not tell."""
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 1
