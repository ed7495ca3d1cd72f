"""Versions of the libraries that decide numbers, for records."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed(*packages: str) -> dict[str, str]:
    """Package -> its installed version, read without importing it; "not installed" where it is missing."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
