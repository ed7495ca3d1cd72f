"""What is found while a recipe is resolved: warnings, errors, checks that `run` makes, and licenses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from workbench.bricks.card import read_title
from workbench.bricks.hub import Hub
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.resolve.resolved import Resolved
from workbench.weights.digests import digests_known
from workbench.weights.header import HeadersOnlyError


@dataclass
class Findings:
    """Warnings, deferred checks and errors of a recipe, in the order in which they were found.

    Attributes:
        warnings: Warnings for the user.
        deferred: Checks that `run` makes, because they need tensors of which only headers are local.
        problems: Errors in the recipe or its inputs.
    """

    warnings: list[str] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)
    problems: list[WorkbenchError] = field(default_factory=list)

    @contextmanager
    def or_at_run(self, check: str) -> Iterator[None]:
        """Defer the check in a `with` block to `run` if it needs tensors that are not local.

        Args:
            check: The statement that the check confirms.
        """
        try:
            yield
        except HeadersOnlyError:
            self.deferred.append(check)

    @contextmanager
    def or_problem(self) -> Iterator[None]:
        """Record an error that is raised in a `with` block, so that the message to the user lists all problems."""
        try:
            yield
        except WorkbenchError as error:
            self.problems.append(error)

    def raise_problems(self) -> None:
        """Raise one error for all problems.

        Raises:
            WorkbenchError: If there is a problem.
        """
        if not self.problems:
            return
        hints = list(dict.fromkeys(problem.hint for problem in self.problems if problem.hint))
        invalid = any(problem.exit_code == InvalidRecipeError.exit_code for problem in self.problems)
        error = InvalidRecipeError if invalid else WorkbenchError
        raise error("\n".join(problem.message for problem in self.problems), "\n".join(hints) or None)


def read_digest(resolved: Resolved, hub: Hub) -> str:
    """Return the base's digest.

    Raises:
        HeadersOnlyError: If only headers may be read and the digest is not cached.
    """
    if hub.headers_only and not digests_known(resolved.checkpoint.entries, resolved.cache):
        raise HeadersOnlyError(f"{resolved.base_path}: its tensors have not been read yet")
    return resolved.base_digest


def read_state(resolved: Resolved, steps: int, hub: Hub) -> str:
    """Return `Resolved.state`.

    Raises:
        HeadersOnlyError: If only headers may be read and a digest is not cached.
    """
    read_digest(resolved, hub)
    for name, brick in resolved.bricks.items():
        if hub.headers_only and not brick.known(resolved.cache):
            raise HeadersOnlyError(f"brick '{name}': its tensors have not been read yet")
    return resolved.state(steps)


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
