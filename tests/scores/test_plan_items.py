"""Ids of items."""

from __future__ import annotations

import pytest

from workbench.ground.errors import WorkbenchError
from workbench.scores.plan import item_ids


def test_items_without_ids_are_known_by_their_content() -> None:
    docs = [{"q": "a"}, {"q": "b"}, {"q": "a"}]
    ids = item_ids(docs, "mine")
    assert ids[2] == f"{ids[0]}-2"
    assert len(set(ids)) == 3
    assert item_ids(reversed(docs[:2]), "mine") == ids[1::-1], "the same in another order"


def test_some_ids_alone_are_a_mistake() -> None:
    with pytest.raises(WorkbenchError, match=r"task 'mine': item 2 has no field 'id', but others have one"):
        item_ids([{"id": 1}, {"q": "b"}], "mine")
    assert item_ids([{"id": 1}, {"q": "b"}], "bundled", bundled=True)[0] == "1"
