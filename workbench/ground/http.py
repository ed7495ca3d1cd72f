"""The one HTTP client: JSON from servers that nobody vouches for, with limits of size, time and depth, and without redirects.

With it the error for a cache of downloads that cannot be written.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground import jsondoc
from workbench.ground.errors import UsageError, WorkbenchError, printable, shortened, size

if TYPE_CHECKING:
    import httpx

LARGEST = 16 << 20
"""Largest answer, in bytes."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a disk or a folder that takes no file."""


class StatusError(WorkbenchError):
    """A server answered with a status other than 200.

    Attributes:
        status: The status.
        text: The beginning of the answer, printable.
    """

    status: int = 0
    text: str = ""


def ask(url: str, hint: str, *, body: Any = None, key: str | None = None, seconds: float = 300) -> Any:
    """Return the JSON that a server answers.

    Args:
        url: Address, http or https.
        hint: Hint of the errors: how to start a server that answers.
        body: JSON to post; None to get.
        key: Key for the header `Authorization`. No other server gets it: redirects are refused.
        seconds: Longest time for the whole exchange.

    Raises:
        UsageError: If the address is not valid.
        StatusError: If the status is not 200.
        WorkbenchError: If the server cannot be reached, takes too long, redirects, or its answer is too large or not JSON.
    """
    import httpx

    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise UsageError(f"{shortened(url)}: expected the address of a server, http://HOST:PORT")
    place = str(address.copy_with(userinfo=b"", query=None, fragment=None))
    if key is not None and not (key.isascii() and key.isprintable()):
        raise WorkbenchError(f"{place}: the key has characters that no header can have", "Set it again, without line ends.")
    request = httpx.Request(
        "GET" if body is None else "POST",
        address,
        content=None if body is None else json.dumps(body).encode(),
        headers={
            "Accept-Encoding": "identity",
            **({} if body is None else {"Content-Type": "application/json"}),
            **({} if key is None else {"Authorization": f"Bearer {key}"}),
        },
    )
    return jsondoc.parse(_within(seconds, request, place, hint), f"{place}: the answer", hint)


def _within(seconds: float, request: httpx.Request, place: str, hint: str) -> bytes:
    """Exchange in a thread, because the client's own limits hold for single reads: a server can send a byte a minute."""
    result: list[bytes | Exception] = []

    def work() -> None:
        try:
            result.append(_exchange(request, seconds, place, hint))
        except Exception as error:  # noqa: BLE001  it is raised by the thread that waits
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise WorkbenchError(f"{place}: the server did not answer within {seconds:g} s", hint)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _exchange(request: httpx.Request, seconds: float, place: str, hint: str) -> bytes:
    """Send a request and return the body of an answer with status 200."""
    import httpx

    data = bytearray()
    try:
        with httpx.Client(timeout=seconds, follow_redirects=False) as client:
            answer = client.send(request, stream=True)
            for chunk in answer.iter_raw(1 << 16):
                data += chunk
                if len(data) > LARGEST:
                    raise WorkbenchError(f"{place}: the answer is larger than {size(LARGEST)}", hint)
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError, ImportError) as error:
        reason = printable(str(error))[:200] or type(error).__name__
        raise WorkbenchError(f"{place}: the server cannot be reached or breaks off ({reason})", hint) from None
    if answer.is_redirect:
        target = printable(answer.headers.get("location", "nowhere"))[:200]
        raise WorkbenchError(
            f"{place}: the server redirects to {target}, and redirects are not followed",
            f"Name the address itself, if you trust it. {hint}",
        )
    if answer.status_code != 200:
        text = printable(bytes(data[:2000]).decode("utf-8", "replace"))
        refusal = StatusError(f"{place}: status {answer.status_code}: {text[:300]}", hint)
        refusal.status, refusal.text = answer.status_code, text
        raise refusal
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise WorkbenchError(f"{place}: the answer is compressed, which was not asked for", hint)
    return bytes(data)


def refused_cache(error: BaseException, what: str) -> WorkbenchError | None:
    """Return the error for a cache of Hugging Face's libraries that cannot be written; None if `error` has another cause."""
    from huggingface_hub.constants import HF_HOME

    if not isinstance(error, OSError) or error.errno not in DISK or error.filename is None:
        return None
    place = Path(os.fsdecode(error.filename))
    for variable, folder in {"HF_HOME": HF_HOME, "HF_DATASETS_CACHE": os.environ.get("HF_DATASETS_CACHE", HF_HOME)}.items():
        cache = Path(folder).expanduser()
        if place.is_relative_to(cache) or cache.is_relative_to(place):
            return WorkbenchError(
                f"{what}: the cache {place} cannot be written: {error.strerror}",
                f"Set {variable} to a folder that you may write to, on a disk with free space.",
            )
    return None
