"""Layer maps: SKIP and AVG beside the paper's, maps by hand, and what is wrong with them."""

from __future__ import annotations

import pytest

from workbench.errors import UsageError
from workbench.transplant.counterparts import layer_map, parsed_map


def test_equal_depths_take_equal_layers() -> None:
    for rule in (None, "skip", "avg"):
        assert layer_map(rule, 3, 3).sources == {0: (0,), 1: (1,), 2: (2,)}
    assert layer_map(None, 3, 3).rule == "same"


@pytest.mark.parametrize("times", [2, 3, 4])
def test_multiples_are_those_of_the_paper(times: int) -> None:
    """Student layer j takes teacher layer k·j (SKIP), or the mean of the k layers from there (AVG)."""
    skip, avg = layer_map("skip", 4 * times, 4), layer_map("avg", 4 * times, 4)
    assert skip.sources == {j: (times * j,) for j in range(4)}
    assert avg.sources == {j: tuple(range(times * j, times * (j + 1))) for j in range(4)}
    assert (layer_map(None, 4 * times, 4).rule, avg.rule) == ("skip", "avg")


def test_other_depths() -> None:
    """Every source layer belongs to one layer of a smaller target; layers of a deeper target share sources."""
    avg = layer_map("avg", 7, 3).sources
    assert [layer for taken in avg.values() for layer in taken] == list(range(7))
    assert layer_map("skip", 3, 6).sources == layer_map("avg", 3, 6).sources == {j: (j // 2,) for j in range(6)}


def test_a_map_by_hand() -> None:
    found = parsed_map("2:4+5, 0:0", 6, 3)
    assert (found.rule, found.sources) == ("map", {0: (0,), 2: (4, 5)})
    assert list(found.sources) == [0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:0,1", "--map: expected TARGET:SOURCE, found '1'"),
        ("0:a", "--map: expected TARGET:SOURCE, found '0:a'"),
        ("", "--map: expected TARGET:SOURCE, found ''"),
        ("-1:0", "--map: expected TARGET:SOURCE, found '-1:0'"),
        ("3:0", "--map 3:0: layer 3 of the target does not exist; it has layers 0 to 2"),
        ("0:1+6", "--map 0:1+6: layer 6 of the source does not exist; it has layers 0 to 5"),
        ("0:1,0:2", "--map: layer 0 of the target stands in the map twice"),
    ],
)
def test_wrong_maps(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parsed_map(text, 6, 3)
    assert error.value.message == message
    assert error.value.hint
