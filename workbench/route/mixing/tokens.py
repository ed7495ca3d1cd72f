"""The texts behind the tokens of one forward pass, for routers whose weights depend on each token's role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

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
