"""A hub to send to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from worlds.hub_server import TOKEN
from worlds.upload_server import UploadServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadServer]:
    """A hub that this process may write to."""
    with UploadServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
