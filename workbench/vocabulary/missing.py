"""Rows of tokens that no merged model has, made of rows of tokens that the base and another model, the donor, share.

The donor gives the output its tokenizer. Its rows may have any width: a donor's row is approximated by a sparse combination of the donor's
rows of shared tokens, and the same combination of the base's rows is the new row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.files import bytes_digest, json_digest
from workbench.lazy import torch
from workbench.models.architecture import is_head_module
from workbench.models.identity import computed_on
from workbench.vocabulary.pursuit import pursue
from workbench.weights.row_alignment import Combination
from workbench.weights.saving import save_tensors
from workbench.weights.specs import Weights, load

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.weights.row_alignment import Index

VERSION = 1
"""Version of the combinations; part of the keys of all that depends on them."""


@dataclass
class MadeRows:
    """Combinations for the rows that a base lacks; those of a tensor are computed when they are first read, and kept in the cache.

    Attributes:
        donor: The donor's weights.
        tensors: Tensor of the base -> tensor of the donor.
        rows: [made]: rows of the output, and of the donor, that are made.
        shared: [shared]: the donor's rows of tokens that the base has.
        base: [shared]: the base's rows of the same tokens.
        k: Largest number of rows of a combination.
        size: Number of rows of the output.
        cache: Folder for combinations.
        residuals: Tensor -> mean share of a donor's row that its combination leaves unexplained, for tensors that were computed.
    """

    donor: Weights
    tensors: Mapping[str, str]
    rows: Index
    shared: Index
    base: Index
    k: int
    size: int
    cache: Path
    residuals: dict[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the largest tensor of the donor in float32, twice, for the time of the computation."""
        return 2 * max(4 * self.donor.specs[name].numel for name in self.tensors.values())

    def combination(self, name: str, device: torch.device) -> Combination:
        """Return the combinations of a tensor's rows.

        Args:
            name: Tensor of the base.
            device: Device to compute on.
        """
        spec = self.donor.specs[self.tensors[name]]
        rows = load(self.donor, self.tensors[name], torch.float32, device).view(spec.rows, spec.cols)
        found = self._kept(rows, device)
        self.residuals[name] = float(found["residuals"].mean()) if len(self.rows) else 0.0
        number = np.full(self.size, -1, dtype=np.int64)
        number[self.rows] = np.arange(len(self.rows))
        atoms = torch.from_numpy(self.base).to(device)[found["atoms"].to(device)]
        return Combination(number, atoms, found["coefficients"].to(device))

    def _kept(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return atoms (numbers of shared tokens), coefficients and residuals, from the cache if they are there."""
        from safetensors.torch import load_file

        words = [VERSION, self.k, computed_on(device), *(bytes_digest(part.tobytes()) for part in (self.rows, self.shared))]
        place = self.cache / "combinations" / f"{json_digest([*words, bytes_digest(rows.cpu().numpy().tobytes())])}.safetensors"
        if not place.is_file():
            made, shared = (rows[torch.from_numpy(index).to(device)] for index in (self.rows, self.shared))
            found = pursue(made, shared, self.k)
            save_tensors({"atoms": found.atoms, "coefficients": found.coefficients, "residuals": found.residuals}, place)
        kept: dict[str, Tensor] = load_file(place)
        return kept

    def describe(self) -> dict[str, Any]:
        """Return the fields for the run's record."""
        return {
            "shared": len(self.shared),
            "made": len(self.rows),
            "k": self.k,
            **({"residual": {name: round(value, 4) for name, value in self.residuals.items()}} if self.residuals else {}),
        }


def counterparts(tensors: Sequence[str], donors: Sequence[str]) -> dict[str, str]:
    """Return for each vocabulary tensor of the base the donor's tensor that its combinations are computed from.

    Embeddings go with embeddings, and a head with the donor's head, or with its embeddings where these are tied. A bias has the
    combinations of its head.

    Args:
        tensors: Vocabulary tensors of the base.
        donors: Vocabulary tensors of the donor, embeddings first.
    """
    matrices = [name for name in donors if name.endswith(".weight")]
    heads = [name for name in matrices if is_head_module(name.rpartition(".")[0])]
    return {name: heads[0] if heads and is_head_module(name.rpartition(".")[0]) else matrices[0] for name in tensors}
