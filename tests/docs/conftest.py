"""The script that writes the generated parts of the documents."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from worlds.places import PROJECT


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """docs/build.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_build", PROJECT / "docs" / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
