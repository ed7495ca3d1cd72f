"""Servers that nobody vouches for: no key leaves, nothing ends in a traceback, and nothing is held without limit."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from worlds.jsonl import write_jsonl

from workbench.cli.app import app
from workbench.evaluate.backends import WrittenCheckpoint, _check_server
from workbench.ground import http
from workbench.ground.errors import WorkbenchError

SECRET = "sk-secretsecret"
ROW = {
    "model": "m", "adapter": None, "prompt": "p", "prompt_tokens": [1], "text": "abc", "tokens": [5, 6, 7],
    "logprobs": [-1.0, -0.5, -0.25], "margins": [1.0, 1.0, 1.0], "ends": [1, 2, 3],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@contextmanager
def raw(send: Callable[[socket.socket], None] | bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request and sends what it likes; gives its address and the requests that came."""
    listener, came = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(300)
                head = b""
                while b"\r\n\r\n" not in head and (data := peer.recv(65536)):
                    head += data
                came.append(head)
                try:
                    if callable(send):
                        send(peer)
                    else:
                        peer.sendall(send)
                    peer.shutdown(socket.SHUT_WR)
                    while peer.recv(65536):
                        pass
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", came
    finally:
        listener.close()


def whole(body: bytes, status: str = "200 OK", heads: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{heads}\r\n".encode() + body


def completion(logprobs: str, text: str = "abc") -> bytes:
    return whole(f'{{"choices": [{{"text": "{text}", "logprobs": {{"token_logprobs": {logprobs}}}}}]}}'.encode())


def flood(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    for _ in range(400):
        peer.sendall(b"1," * (1 << 19))


def drip(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:  # until the client hangs up
        peer.sendall(b"x")
        time.sleep(0.05)


def check(url: str, folder: Path) -> Result:
    write_jsonl(folder / "expected.jsonl", [ROW])
    return CliRunner().invoke(app, ["export", "check", url, "--expected", str(folder), "--quiet"])


BAD: dict[str, tuple[Any, str]] = {
    "a redirect": (whole(b"", "302 Found", "Location: http://127.0.0.1:9/v1/completions\r\n"), "redirects to http://127.0.0.1:9"),
    "a redirect that keeps the method": (whole(b"", "307 X", "Location: //[::1]/\r\n"), "redirects are not followed"),
    "a redirect to nowhere": (whole(b"", "301 Moved"), "redirects to nowhere"),
    "400 MB": (flood, "larger than"),
    "400 MB as chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"100000\r\n" + b"1" * 0x100000 + b"\r\n", "breaks off"),
    "a bad chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", "breaks off"),
    "a bad status line": (b"HTTP/9 two hundred\r\n\r\n{}", "breaks off"),
    "a status that is no number": (b"HTTP/1.1 2x0 OK\r\n\r\n{}", "breaks off"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "breaks off"),
    "nothing": (b"", "breaks off"),
    "a body that ends early": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "breaks off"),
    "a negative length": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}", "breaks off"),
    "endless heads": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, "breaks off"),
    "a compressed answer": (whole(b"\x1f\x8b", heads="Content-Encoding: gzip\r\n"), "compressed"),
    "no JSON": (whole(b"<html>"), "not JSON"),
    "no UTF-8": (whole(b'{"a": "\xff"}'), "not UTF-8"),
    "deep JSON": (whole(b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    "a long number": (whole(b"1" * 5000), "not JSON"),
    "an escape in an error": (whole(b"\x1b[2Jgone", "500 X"), "status 500"),
    "no key": (whole(b"", "401 Unauthorized"), "asks for a key"),
    "no model": (whole(b"", "404 Not Found"), "does not serve"),
    "a list": (whole(b"[]"), "choices[0].text"),
    "a text that is a number": (whole(b'{"choices": [{"text": 5}]}'), "choices[0].text"),
    "no log-probabilities": (whole(b'{"choices": [{"text": "abc"}]}'), "not a list of finite numbers"),
    "NaN": (completion("[NaN, NaN, NaN]"), "NaN, expected a finite number"),
    "a first NaN": (completion("[NaN, -9.5, -9.25]"), "NaN, expected a finite number"),
    "infinite": (completion("[-Infinity, -0.5, -0.25]"), "expected a finite number"),
    "1e999": (completion("[-1e999, -0.5, -0.25]"), "expected a number up to"),
    "10**400": (completion(f"[-1{'0' * 400}, -0.5, -0.25]"), "not a list of finite numbers"),
    "null first": (completion("[null, -0.5, -0.25]"), "not a list of finite numbers"),
    "true": (completion("[true, -0.5, -0.25]"), "not a list of finite numbers"),
    "one value alone": (completion("[-1.0]"), "1 of 1 answers differ"),
    "one value too many": (completion("[-1.0, -0.5, -0.25, -0.125]"), "1 of 1 answers differ"),
    "another value": (completion("[-1.0, -0.5, -9.25]"), "1 of 1 answers differ"),
    "a tie without values": (completion("[-1.0]", "abx"), "1 of 1 answers differ"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "message"), BAD.values(), ids=BAD)
@pytest.mark.part("ship")
def test_bad_servers_fail_the_check(tmp_path: Path, answer: Any, message: str) -> None:
    with raw(answer) as (url, came):
        result = check(url, tmp_path)
    assert isinstance(result.exception, WorkbenchError), result.exception
    assert message in result.exception.message
    assert result.exception.hint
    assert SECRET not in f"{result.exception.message} {result.exception.hint}"
    assert "\x1b" not in result.exception.message
    assert len(came) == 1


@pytest.mark.part("ship")
def test_the_key_stays_with_the_server(tmp_path: Path) -> None:
    with raw(whole(b"{}")) as (other, stolen):
        redirect = whole(b"", "302 Found", f"Location: {other}/v1/completions\r\n")
        with raw(redirect) as (url, came):
            assert "redirects" in str(check(url, tmp_path).exception)
    assert f"Bearer {SECRET}".encode() in came[0]
    assert not stolen


@pytest.mark.parametrize("key", ["a\nb-secret", "s\u00e9cret", "secret\r\nX: y", "sec\x00ret"])
def test_keys_that_no_header_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    write_jsonl(tmp_path / "expected.jsonl", [ROW])
    with pytest.raises(WorkbenchError, match="no header can have") as caught:
        http.ask("http://127.0.0.1:1", "", key=key)
    assert "cret" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://a", "file:///etc/passwd", "http://", "http://[::1", "http://a b", "http://h:99999", "http://\x00", "http://\udcff", "", "h" * 100_000],
)  # fmt: skip
@pytest.mark.part("ship")
def test_bad_addresses(tmp_path: Path, url: str) -> None:
    error = check(url, tmp_path).exception
    assert isinstance(error, WorkbenchError), error
    assert len(error.message) < 12_000


def test_the_time_of_an_exchange_is_limited(tmp_path: Path) -> None:
    """Also if every single read is in time."""
    with raw(drip) as (url, _), pytest.raises(WorkbenchError, match=r"did not answer within 0\.5 s"):
        http.ask(url, "", seconds=0.5)


@pytest.mark.parametrize(
    "answer", [whole(b"[]"), whole(b'{"data": 5}'), whole(b'{"data": [{}]}'), whole(b"", "302 F", "Location: http://x\r\n"), b""]
)
def test_bad_lists_of_models(answer: bytes) -> None:
    with raw(answer) as (url, _), pytest.raises(WorkbenchError) as caught:
        _check_server(WrittenCheckpoint(Path("model"), "m", url))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("found", "text"),
    [("[-1.0, -0.5, -0.25]", "abc"), ("[-1.0, -0.5, -0.25]", " abc "), ("[-1.001, -0.5, -0.25]", "abc")],
)
@pytest.mark.part("ship")
def test_sound_answers_pass(tmp_path: Path, found: str, text: str) -> None:
    with raw(completion(found, text)) as (url, _):
        assert check(url, tmp_path).exit_code == 0


@pytest.mark.part("ship")
def test_the_token_that_ends_the_text_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROW, "ends", [1, 3, 3])
    with raw(completion("[-1.0, -0.5]")) as (url, _):
        assert check(url, tmp_path).exit_code == 0


@pytest.mark.parametrize("tolerance", ["nan", "-1"])
@pytest.mark.part("ship")
def test_a_tolerance_that_is_no_number_passes_nothing(tmp_path: Path, tolerance: str) -> None:
    write_jsonl(tmp_path / "expected.jsonl", [ROW])
    with raw(completion("[-1.0, -0.5, -9.0]")) as (url, _):
        arguments = ["export", "check", url, "--expected", str(tmp_path), "--tolerance", tolerance]
        assert CliRunner().invoke(app, arguments).exit_code != 0


@pytest.mark.part("ship")
def test_expected_answers_with_a_huge_number(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "expected.jsonl", [{**ROW, "logprobs": [-(10**400), -0.5, -0.25]}])
    result = CliRunner().invoke(app, ["export", "check", "http://127.0.0.1:1", "--expected", str(tmp_path)])
    assert "not a row that `export` writes" in str(result.exception)


@pytest.mark.parametrize(
    ("place", "variable"),
    [("home/.cache", "HF_HOME"), ("home/.cache/hf/hub/x", "HF_HOME"), ("data/json", "HF_DATASETS_CACHE"), ("tasks", None)],
)
def test_a_cache_that_cannot_be_written_is_told_from_a_file_of_the_user(
    place: str, variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home" / ".cache" / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    file = str(tmp_path / place)
    told = http.refused_cache(PermissionError(errno.EACCES, "Permission denied", file), "task 'x'")
    assert (told is None) == (variable is None)
    if told is not None and variable:
        assert told.message == f"task 'x': the cache {file} cannot be written: Permission denied"
        assert f"Set {variable} to a folder" in str(told.hint)
    assert http.refused_cache(FileNotFoundError(errno.ENOENT, "none", file), "x") is None
    assert http.refused_cache(ValueError("x"), "x") is None
