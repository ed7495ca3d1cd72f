"""A synthetic document of a comparison."""

from __future__ import annotations

import pytest

from worlds.report_document import make_document
from worlds.report_page import Document, render


@pytest.fixture(scope="module")
def document() -> Document:
    return make_document()


@pytest.fixture(scope="module")
def text(document: Document, tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(document, tmp_path_factory.mktemp("report") / "starter")[0].read_text("utf-8")
