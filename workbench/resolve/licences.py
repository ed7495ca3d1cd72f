"""Licenses of a recipe's base, bricks and data."""

from __future__ import annotations

from workbench.bricks.brick import Brick
from workbench.bricks.card import read_licence, read_title
from workbench.errors import WorkbenchError
from workbench.resolve.resolved import Resolved

# Licences that forbid or may forbid what a merge is usually made for; unknown counts as such.
_UNKNOWN = ("unknown", "other")


_RESTRICTED = ("-nc", "non-commercial", "noncommercial", "-nd", "research")


_CAUTION = (*_RESTRICTED, *_UNKNOWN)


def base_title(resolved: Resolved) -> str:
    """The base in words, as its README names it (the starter base says that it is dequantised), else as the recipe does."""
    return read_title(resolved.base_path) or resolved.recipe.fields.base


def licences(resolved: Resolved) -> dict[str, str]:
    """Licence of the base and every brick that a step uses, "unknown" where none is stated."""
    found = {"base": read_licence(resolved.base_path) or "unknown"}
    for name in resolved.parents:
        brick = resolved.bricks[name]
        inner = brick.licence() if isinstance(brick, Brick) else ", ".join(sorted(set(licences(brick).values())))
        found[name] = inner or "unknown"
    return {name: licence.lower() for name, licence in found.items()}


def data_licences(resolved: Resolved) -> list[tuple[str, str, str]]:
    """Brick, data set and licence for all data that the bricks' cards name, "unknown" where none is stated."""
    found = []
    for name in resolved.parents:
        brick = resolved.bricks[name]
        if isinstance(brick, Resolved):
            found += [(f"{name}/{inner}", data, licence) for inner, data, licence in data_licences(brick)]
        else:
            found += [(name, data, (licence or "unknown").lower()) for data, licence in brick.data_licences().items()]
    return found


def require_licences(resolved: Resolved) -> None:
    """Errors: a licence of the base, of a brick that a step uses or of data that its card names is unknown or forbids uses."""
    stated = [(name if name == "base" else f"brick '{name}'", licence) for name, licence in licences(resolved).items()]
    stated += [(f"brick '{name}', data {data}", licence) for name, data, licence in data_licences(resolved)]
    bad = [f"{who}: {'restricted' if any(word in licence for word in _RESTRICTED) else 'unknown'} licence ({licence})"
           for who, licence in stated if any(word in licence for word in _CAUTION)]  # fmt: skip
    if bad:
        raise WorkbenchError(
            "--require-license: " + "; ".join(bad),
            "Name other inputs, or state a licence that you know: `license:` in the YAML header of the directory's README.md, "
            "`licence:` and `data_licences:` in a brick's brick.yaml.",
        )


def licence_warnings(resolved: Resolved) -> list[str]:
    """What of the licences a user should look at before sharing the result."""
    return [f"licence of {name}: {licence}" + (" (none stated)" if licence == "unknown" else "")
            for name, licence in licences(resolved).items() if any(word in licence for word in _CAUTION)]  # fmt: skip
