"""Licenses of a recipe's base, bricks and data."""

from __future__ import annotations

from workbench.bricks.card import read_title
from workbench.errors import WorkbenchError
from workbench.resolve.resolved import Resolved

# Words in licenses that forbid, or may forbid, common uses of a merged model.
_RESTRICTED = ("-nc", "non-commercial", "noncommercial", "-nd", "research")
_UNKNOWN = ("unknown", "other")
_CAUTION = (*_RESTRICTED, *_UNKNOWN)


def base_title(resolved: Resolved) -> str:
    """Return the title in the base's README, or the recipe's `base` if there is none or the base has an adapter on it."""
    if resolved.base_adapter:
        return resolved.recipe.fields.base_name
    return read_title(resolved.base_path) or resolved.recipe.fields.base_name


def is_unknown(licence: str) -> bool:
    """Return True if a license is not stated, or has no name."""
    return any(word in licence for word in _UNKNOWN)


def is_restricted(licence: str) -> bool:
    """Return True if a license forbids, or may forbid, common uses of a merged model."""
    return any(word in licence for word in _RESTRICTED)


def require_licences(resolved: Resolved) -> None:
    """Check the licenses of the base, of the bricks that steps use, and of the bricks' data.

    Raises:
        WorkbenchError: If a license is unknown or restricts use.
    """
    stated = [(name if name == "base" else f"brick '{name}'", licence) for name, licence in resolved.licences.items()]
    stated += [(f"brick '{name}', data {data}", licence) for name, data, licence in resolved.data_licences]
    bad = [
        f"{who}: {'restricted' if is_restricted(licence) else 'unknown'} license ({licence})"
        for who, licence in stated
        if any(word in licence for word in _CAUTION)
    ]
    if bad:
        raise WorkbenchError(
            "--require-license: " + "; ".join(bad),
            "Use other inputs. If you know a license that is not stated, add it: `license:` in the YAML header of the directory's README.md, "
            "or `licence:` and `data_licences:` in a brick's brick.yaml.",
        )


def licence_warnings(resolved: Resolved) -> list[str]:
    """Return a warning for each license that is unknown or restricts use."""
    return [
        f"license of {name}: {licence}" + (" (none stated)" if licence == "unknown" else "")
        for name, licence in resolved.licences.items()
        if any(word in licence for word in _CAUTION)
    ]
