"""Hidden states from a block's output: one for each token, or an error."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.models.hooks import states_of, with_first

TOKENS = torch.zeros(2, 3, dtype=torch.long)


def test_states_of_a_tensor_and_of_a_tuple() -> None:
    states = torch.randn(2, 3, 8)
    assert states_of(states, TOKENS) is states
    assert states_of((states, None), TOKENS) is states
    assert states_of([states], TOKENS) is states


@pytest.mark.parametrize("output", [(1, 2), [1, 2]])
def test_another_state_keeps_the_rest(output: object) -> None:
    assert with_first(output, 7) == type(output)((7, 2))  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (4, 2, 3, 8), (2, 4, 8), (3, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """Several states of a token, as hyper-connections and AltUp carry them, would otherwise be read as another row's or token's."""
    with pytest.raises(WorkbenchError, match="expected one state for each token"):
        states_of(torch.randn(shape), TOKENS)
