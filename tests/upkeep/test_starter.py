"""The starter base that `brick fetch starter` makes."""

from __future__ import annotations

import json

import pytest

from worlds.places import STARTER

from workbench.upkeep.fetch import CONFIG, DIGEST
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digests, weights_digest
from workbench.weights.writer import output_specs


@pytest.mark.starter
def test_the_starter_base_has_the_configuration_that_its_digest_counts() -> None:
    """What `brick fetch starter` writes, and what lies on disk: each field of it is part of the digest that bricks name."""
    if not (STARTER / "config.json").is_file():
        pytest.skip("workbench brick fetch starter")
    checkpoint = Checkpoint(STARTER, "base")
    digests = tensor_digests(checkpoint.entries, None)
    assert weights_digest(output_specs(checkpoint.specs, None), digests, CONFIG) == DIGEST
    stored = json.loads((STARTER / "config.json").read_text("utf-8"))
    assert {key: stored[key] for key in CONFIG} == CONFIG
