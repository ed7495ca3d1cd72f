"""The guard of servers on this machine against the pages of other sites, which a browser on it may show."""

from __future__ import annotations

import re
from collections.abc import Mapping

LOCAL = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
"""Host headers of this machine, at any port: a tunnel may have another one than the server."""


def foreign(headers: Mapping[str, str], method: str, hosts: re.Pattern[str] | None) -> tuple[int, str] | None:
    """Return status and reason of a request that another site's page may have sent.

    Args:
        headers: Headers of the request, under names in lower case.
        method: Its method.
        hosts: The Host headers of this server; another one is a name that a site's owner points here (DNS rebinding). None:
            Host and Origin do not matter, because requests name a key.

    Returns:
        None for a request that is no other site's: its Host is this server's, its Origin is missing or this server, and the body of a
        POST is called JSON, which a page cannot send to another site without asking first.
    """
    host = headers.get("host", "").lower()
    if hosts and not hosts.fullmatch(host):
        return 403, f"the Host header names no address of this machine: '{host[:80]}'"
    if hosts and headers.get("origin", f"http://{host}").lower() != f"http://{host}":
        return 403, f"the Origin header names another site: '{headers['origin'][:80]}'"
    if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "expected the header `Content-Type: application/json`"
    return None
