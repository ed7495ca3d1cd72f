"""The growing report of --watch, served beside the other pages of the viewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from workbench.view.app import application
from workbench.view.growing import Growing
from workbench.view.pages import LINKS, Site, Work
from workbench.view.server import Served, bound

ADDRESS = "the report grows at {} until the command ends"


def check(port: int) -> None:
    """Check that a port can be used; 0 stands for any.

    Raises:
        UsageError: If it cannot.
    """
    bound(port).close()


@contextmanager
def page(work: Work, port: int, say: Callable[[str], None]) -> Iterator[Growing]:
    """Serve a growing report for a `with` block.

    Args:
        work: What the command does.
        port: Port; 0 for a free one.
        say: Receives the address.
    """
    site = Site(links=[(name, path) for name, path in LINKS if name != "Chat"])  # the device is at work
    growing = Growing(site, work)
    with Served(application(site, growing=growing), port) as served:
        say(ADDRESS.format(served.url))
        try:
            yield growing
        except BaseException:
            growing.end(wait=False)
            raise
        growing.end(wait=True)
