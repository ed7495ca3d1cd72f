"""Make damaged documents from valid ones, and check the property that every reader keeps."""

from __future__ import annotations

import copy
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from worlds.effort import cpu_limit

from workbench.cli.app import app
from workbench.console.output import Terminal
from workbench.ground.errors import WorkbenchError

RECIPE = """\
version: 1
base: base
bricks: {one: bricks/one, full: {checkpoint: bricks/full}}
steps:
  - id: mix
    merge: ties
    density: 0.5
    bricks: {one: 1.0, full: {weight: 0.5, density: 0.3}}
"""
EXAMPLES = int(os.environ.get("WORKBENCH_FUZZ_EXAMPLES") or 4)
# CPU seconds of one example, and of each megabyte of its file; the first allows for what a command reads beside the damaged file.
SECONDS, SECONDS_A_MB = 2.0, 2.0
# A failure is reported as it is found: making the example smaller takes minutes with commands that take a tenth of a second.
# Every run of one number tries the same examples; with WORKBENCH_FUZZ_RANDOM=1 they are drawn from --hypothesis-seed, or by chance without it.
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, phases=(Phase.explicit, Phase.generate), database=None, derandomize=os.environ.get("WORKBENCH_FUZZ_RANDOM") != "1", print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)  # fmt: skip
# Readers alone take a few milliseconds, commands a hundred: they get ten times as many examples.
fuzz_reader = settings(fuzz, max_examples=10 * EXAMPLES)

TEXTS = st.one_of(
    st.sampled_from([
        "", " ", "16", "-1", "1e-3", "010", "1:30", "yes", "null", "2026-13-45", "\0", "a\0b", "x" * 300, "y" * 5_000, "\x1b[31mred\x1b[0m", "\x9b2J",
        "\u202egnp.exe", "../../etc/passwd", "/", ".", "..", "~", "C:\\x", "*", "[", "(", "(a+)+$", "(?!x)", "{subject}", "| a | b |", "```", "<b>",
        "---", "\n\n# x", "\r\n", "é", "日本", "\ufeff", "\u2028", "https://x/y", "org/name", "org/name@main", "%s%n", "{}", "lm_head", "0", "-0", "1_000",
    ]),
    st.text(max_size=12),
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]),
    st.integers(-3, 70), st.floats(-2, 2),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)), max_leaves=8
)
SPLICES = st.one_of(
    st.sampled_from([
        b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J", b"\\ud800", b"NaN", b"Infinity", b"1e999", b"-", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\n",
        b"\r", b"\t", b"#", b"&a ", b"*a", b"<<: ", b"!!python/object:x ", b"!!binary ", b"%YAML 9.9\n", b"---\n", b"...\n", b"? ", b"| ", b"> ", b"0x", b"010",
        b"1:30", b"2026-13-45", b"[" * 60, b'{"a":' * 60, b"[" * 3_000, b"9" * 5_000, b"x" * 5_000, b"\xed\xa0\x80", b"\xc0\x80",
    ]),
    st.binary(max_size=8),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in plain data, the root first."""
    found = [path]
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, valid: Any) -> Any:
    """Valid data with one to three places changed: another kind, dropped, doubled, wrapped, renamed, nested deeply, made long."""
    data = copy.deepcopy(valid)
    times = [2, 50, 2_000]
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(data)))
        how = draw(st.sampled_from(["value", "value", "value", "drop", "wrap", "rename", "deep", "many", "text"]))
        if not path:
            data = draw(VALUES) if how == "value" else [data] if how == "wrap" else data
            continue
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        key, old = path[-1], holder[path[-1]]
        if how == "drop":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(TEXTS)] = holder.pop(key)
        elif how == "wrap":
            holder[key] = draw(st.sampled_from([[old], {"a": old}, [old, old], {}, []]))
        elif how == "deep":
            for _ in range(draw(st.sampled_from([3, 30, 120]))):
                old = [old]
            holder[key] = old
        elif how == "many":
            holder[key] = [old] * draw(st.sampled_from(times))
            times = [2]  # long lists in long lists would take more memory to write than there is
        elif how == "text":
            holder[key] = str(old)
        else:
            holder[key] = draw(VALUES)
    return data


@st.composite
def spliced(draw: st.DrawFn, raw: bytes) -> bytes:
    """Valid bytes cut, repeated, spliced, or in another encoding."""
    how = draw(st.sampled_from(["cut", "splice", "splice", "splice", "repeat", "utf-16", "random"]))
    if how == "random":
        return draw(st.binary(max_size=64))
    if how == "utf-16":
        return raw.decode("utf-8", "replace").encode("utf-16")
    start = draw(st.integers(0, len(raw)))
    stop = draw(st.integers(start, min(len(raw), start + 40)))
    if how == "cut":
        return raw[:start]
    if how == "repeat":
        return raw[:stop] + raw[start:]
    return raw[:start] + draw(SPLICES) + raw[stop:]


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """Bytes of a damaged JSON file."""
    raw = json.dumps(valid).encode()

    def written(data: Any) -> bytes:
        return json.dumps(data).encode()

    return st.one_of(damaged(valid).map(written), damaged(valid).map(written), spliced(raw))


def jsonl_files(valid: list[Any]) -> st.SearchStrategy[bytes]:
    """Bytes of a damaged jsonl file."""
    raw = "".join(json.dumps(row) + "\n" for row in valid).encode()

    def written(data: Any) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in (data if isinstance(data, list) else [data])).encode()

    return st.one_of(damaged(valid).map(written), damaged(valid).map(written), spliced(raw))


def yaml_files(valid: Any, text: str | None = None) -> st.SearchStrategy[bytes]:
    """Bytes of a damaged YAML file: damaged data written again, or the text spliced."""
    raw = (text or yaml.safe_dump(valid, sort_keys=False)).encode()

    def written(data: Any) -> bytes:
        try:
            return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            return repr(data).encode("utf-8", "surrogatepass")

    return st.one_of(damaged(valid).map(written), spliced(raw), spliced(raw).flatmap(spliced))


def check_shown(error: WorkbenchError) -> None:
    """Check what the terminal gets: a line that starts with error:, of bounded length, without control characters."""
    output = Terminal()
    output.talk = Console(file=(stream := io.StringIO()), width=200, soft_wrap=True, highlight=False)
    output.error(error)
    text = stream.getvalue()
    assert text.startswith("error: ")
    assert error.message.strip()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", text), repr(text)
    assert len(text) < 25_000


def keeps(action: Callable[[], Any], size: int = 0, fixed: float = SECONDS) -> Any:
    """Check the property: success or a WorkbenchError, in time.

    Args:
        action: The reader or command.
        size: Bytes of the damaged file.
        fixed: CPU seconds that the action may take whatever the size.

    Returns:
        What the action returns, or the error.
    """
    with cpu_limit(fixed + SECONDS_A_MB * size / 1e6):
        try:
            result = action()
        except WorkbenchError as error:
            check_shown(error)
            result = error
    return result


def command(arguments: list[str], size: int = 0, fixed: float = SECONDS) -> Any:
    """Run a command in this process and check the property on it."""

    def run() -> Any:
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return keeps(run, size, fixed)


def put(path: Path, raw: bytes) -> int:
    """Write a file; returns its size."""
    path.write_bytes(raw)
    return len(raw)
