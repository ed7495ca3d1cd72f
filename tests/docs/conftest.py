"""The scripts that write the generated parts of the documents."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from worlds.places import PROJECT


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """docs/build.py as a module."""
    return script("build")


@pytest.fixture(scope="module")
def notebooks() -> ModuleType:
    """docs/notebook_outputs.py as a module."""
    return script("notebook_outputs")


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", PROJECT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
