"""Pooled hidden states, against transformers' `output_hidden_states` on one row at a time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.tiny import live, save_model

from workbench.route.deciding.hidden import depth_of, hidden_states, moving, pooled, token_batches, windows

ROWS = [[5, 9, 3, 7, 2, 11, 8], [4], [6, 3], [9, 8, 7, 6, 5, 4, 3, 2, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return live(save_model(tmp_path_factory.mktemp("model") / request.param, request.param))


def whole(model: Any, row: list[int], layer: int) -> torch.Tensor:
    """The output of a block [token, width]; the last one before the final norm is not in `hidden_states`."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
    return states[layer][0].float()


@pytest.mark.parametrize("layer", [1, 2])
def test_states_are_those_of_each_row_alone(model: Any, layer: int) -> None:
    found = hidden_states(model, ROWS, layer)
    for row, states in zip(ROWS, found, strict=True):
        assert states.shape == (len(row), 32)
        torch.testing.assert_close(states, whole(model, row, layer), rtol=1e-4, atol=1e-5)


def test_states_stop_at_the_layer_and_skip_the_first_token(model: Any) -> None:
    found = pooled(model, ROWS, 1, 4)
    for row, mean in zip(ROWS, found[:, 0], strict=True):
        states = whole(model, row, 1)
        expected = states[0] if len(row) == 1 else states[max(1, len(row) - 4) :].mean(0)  # no state of these models is a sink
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    runs = [0] * len(blocks)
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1)) for i, block in enumerate(blocks)
    ]
    hooks = sum(len(module._forward_hooks) for module in model.modules())  # transformers has some of its own
    hidden_states(model, ROWS[:1], 1)
    for handle in handles:
        handle.remove()
    assert runs == [1] + [0] * (len(blocks) - 1)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert depth_of(model) == max(1, model.config.num_hidden_layers // 2)


def test_other_threads_may_run_the_model_at_the_same_time(model: Any) -> None:
    block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    whole_passes: list[Any] = []

    def run_whole(*_: Any) -> None:
        handle.remove()
        ids = torch.tensor(ROWS[:1])
        with torch.no_grad():
            thread = threading.Thread(target=lambda: whole_passes.append(model(input_ids=ids).logits), daemon=True)
            thread.start()
            thread.join()

    expected = hidden_states(model, ROWS[:1], 1)
    handle = block.register_forward_pre_hook(run_whole)  # another thread's pass, while this thread is inside the first block
    (found,) = hidden_states(model, ROWS[:1], 1)
    assert len(whole_passes) == 1  # it was not ended early
    assert torch.equal(found, expected[0])


def test_windows_leave_out_sinks_and_end_before_the_end() -> None:
    states = torch.randn(12, 8)
    sinks = states.clone()
    sinks[1] *= 1000
    sinks[5] *= 50
    kept = torch.cat([states[2:5], states[6:]])
    for window in (4, 8, 100):
        torch.testing.assert_close(windows(sinks, window)[0], kept[-window:].mean(0))
    assert torch.equal(windows(sinks[:2], 4), sinks[1].expand(4, -1))  # the only state after the first
    # A window that has less than half of its tokens repeats the one before it.
    states = torch.randn(1 + 17, 8)
    found = windows(states, 8)
    for place, (first, end) in enumerate(((9, 17), (5, 13), (1, 9), (0, 5))):
        torch.testing.assert_close(found[place], states[1:][first:end].mean(0))
    assert torch.equal(windows(states, 16)[3], windows(states, 16)[2])
    states = torch.randn(30, 5)
    for window in (1, 4, 16, 100):
        expected = torch.stack([windows(states[: i + 1], window) for i in range(len(states))])
        torch.testing.assert_close(moving(states, window), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(moving(states[:1], 4), states[:1].expand(4, -1)[None])


def test_a_row_longer_than_the_positions_loses_its_start(tmp_path: Path) -> None:
    model = live(save_model(tmp_path / "gpt2", "gpt2"))
    row = [3 + i % 20 for i in range(80)]  # 64 positions
    found = pooled(model, [row], 1, 4)
    torch.testing.assert_close(found, pooled(model, [row[-64:]], 1, 4))


def test_batches_hold_every_row_once_and_few_tokens() -> None:
    rows = [[1] * length for length in (3, 300, 5, 200, 4, 600)]
    groups = token_batches(rows, torch.device("cpu"))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert all(len(group) == 1 or max(len(rows[i]) for i in group) * len(group) <= 512 for group in groups)
