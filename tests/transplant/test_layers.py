"""Layer maps: by depth, by hand, and what is wrong with them."""

from __future__ import annotations

import pytest

from workbench.ground.errors import UsageError
from workbench.transplant.counterparts import layer_map, parsed_map


@pytest.mark.parametrize(
    ("source", "target", "rule", "taken"),
    [
        (3, 3, "same", [0, 1, 2]),
        (8, 4, "skip", [0, 2, 4, 6]),  # multiples are the paper's
        (16, 4, "skip", [0, 4, 8, 12]),
        (7, 3, "skip", [0, 2, 4]),
        (3, 6, "skip", [0, 0, 1, 1, 2, 2]),
    ],
)
def test_layers_by_depth(source: int, target: int, rule: str, taken: list[int]) -> None:
    found = layer_map(source, target)
    assert (found.rule, found.sources) == (rule, dict(enumerate(taken)))


def test_a_map_by_hand() -> None:
    found = parsed_map("2:4, 0:0", 6, 3)
    assert (found.rule, list(found.sources.items())) == ("map", [(0, 0), (2, 4)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:0,1", "--map: expected TARGET:SOURCE, found '1'"),
        ("0:1+2", "--map: expected TARGET:SOURCE, found '0:1+2'"),
        ("0:a", "--map: expected TARGET:SOURCE, found '0:a'"),
        ("", "--map: expected TARGET:SOURCE, found ''"),
        ("-1:0", "--map: expected TARGET:SOURCE, found '-1:0'"),
        ("3:0", "--map 3:0: layer 3 of the target does not exist; it has layers 0 to 2"),
        ("0:6", "--map 0:6: layer 6 of the source does not exist; it has layers 0 to 5"),
        ("0:1,0:2", "--map: layer 0 of the target stands in the map twice"),
    ],
)
def test_wrong_maps(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parsed_map(text, 6, 3)
    assert error.value.message == message
    assert error.value.hint
