"""Licenses of a recipe's base, bricks and data."""

from __future__ import annotations

from workbench.bricks.brick import Brick
from workbench.bricks.card import read_licence, read_title
from workbench.errors import WorkbenchError
from workbench.resolve.resolved import Resolved

# Words in licenses that forbid, or may forbid, common uses of a merged model.
_RESTRICTED = ("-nc", "non-commercial", "noncommercial", "-nd", "research")
_UNKNOWN = ("unknown", "other")
_CAUTION = (*_RESTRICTED, *_UNKNOWN)


def base_title(resolved: Resolved) -> str:
    """Return the title in the base's README, or the recipe's `base` if there is none."""
    return read_title(resolved.base_path) or resolved.recipe.fields.base


def licences(resolved: Resolved) -> dict[str, str]:
    """Return the license of the base and of every brick that a step uses; "unknown" if none is stated."""
    stated = {"base": read_licence(resolved.base_path) or "unknown"}
    for name in resolved.parents:
        brick = resolved.bricks[name]
        inner = brick.licence() if isinstance(brick, Brick) else ", ".join(sorted(set(licences(brick).values())))
        stated[name] = inner or "unknown"
    return {name: licence.lower() for name, licence in stated.items()}


def data_licences(resolved: Resolved) -> list[tuple[str, str, str]]:
    """Return (brick, data set, license) for all data in the bricks' cards; "unknown" if no license is stated."""
    rows = []
    for name in resolved.parents:
        brick = resolved.bricks[name]
        if isinstance(brick, Resolved):
            rows += [(f"{name}/{inner}", data, licence) for inner, data, licence in data_licences(brick)]
        else:
            rows += [(name, data, (licence or "unknown").lower()) for data, licence in brick.data_licences().items()]
    return rows


def require_licences(resolved: Resolved) -> None:
    """Check the licenses of the base, of the bricks that steps use, and of the bricks' data.

    Raises:
        WorkbenchError: If a license is unknown or restricts use.
    """
    stated = [(name if name == "base" else f"brick '{name}'", licence) for name, licence in licences(resolved).items()]
    stated += [(f"brick '{name}', data {data}", licence) for name, data, licence in data_licences(resolved)]
    bad = [
        f"{who}: {'restricted' if any(word in licence for word in _RESTRICTED) else 'unknown'} license ({licence})"
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
        for name, licence in licences(resolved).items()
        if any(word in licence for word in _CAUTION)
    ]
