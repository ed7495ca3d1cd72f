"""A hub on this machine: the endpoints that huggingface_hub needs, serving directories and counting what it sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from worlds.local_server import Handler, LocalServer

TOKEN = "hf_secretsecretsecret"
DRIVER = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from workbench.cli.app import main
for line in sys.stdin:
    sys.argv, os.environ["COLUMNS"] = ["workbench", *json.loads(line)["args"]], "400"
    os.chdir(json.loads(line)["cwd"])
    texts, code = (io.StringIO(), io.StringIO()), 0
    with redirect_stdout(texts[0]), redirect_stderr(texts[1]):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, *(t.getvalue() for t in texts)]), flush=True)
"""


def commit_of(name: str) -> str:
    """The commit of a repository on this hub."""
    return sha1(name.encode()).hexdigest()


def header_bytes(file: Path) -> int:
    """Bytes before the tensors of a safetensors file."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@dataclass
class HubServer:
    """Repositories by name, and what was asked for.

    Attributes:
        repositories: Name -> directory.
        revisions: Name -> tag or first line of a commit -> its directory; a title has spaces.
        gated: Names whose files are refused.
        ranges: Whether ranges are honoured; otherwise whole files are sent.
        sent: "name/file" -> bytes of bodies sent.
        requests: (method, path) of every request.
        tokens: Authorization headers that came.
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    sent: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def __enter__(self) -> HubServer:
        hub = self

        class Answers(Handler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        self._server = LocalServer(Answers)
        self.url = self._server.__enter__()
        return self

    def __exit__(self, *_args: object) -> None:
        self._server.__exit__()

    def forget(self) -> None:
        """Start counting anew."""
        self.sent.clear()
        self.requests.clear()

    def answer(self, handler: Handler, *, body: bool) -> None:
        """Answer one request."""
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path))
        self.tokens.add(handler.headers.get("Authorization"))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.repositories:
            return self._reply(handler, 404, {"X-Error-Code": "RepoNotFound"}, b"", body)
        tops = {"main": (self.repositories[name], commit_of(name))}
        tops |= {one: (top, commit_of(f"{name}@{one}")) for one, top in self.revisions.get(name, {}).items()}
        tops |= {commit: (top, commit) for top, commit in tops.values()}
        if rest[:1] == ["refs"] or rest[:1] == ["commits"]:
            return self._reply(handler, 200, {}, json.dumps(self._history(name, rest[0])).encode(), body)
        if len(rest) > 1 and (rest[1] not in tops or " " in rest[1]):
            return self._reply(handler, 404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        top, commit = tops[rest[1] if len(rest) > 1 else "main"]
        if api:
            return self._reply(
                handler, 200, {}, json.dumps(self._describe(name, top, commit, tree=rest[:1] == ["tree"])).encode(), body
            )
        if name in self.gated:
            return self._reply(handler, 403, {"X-Error-Code": "GatedRepo"}, b"", body)
        file = top / "/".join(rest[2:])
        if not file.is_file():
            return self._reply(handler, 404, {"X-Error-Code": "EntryNotFound"}, b"", body)
        data = file.read_bytes()
        heads = {"X-Repo-Commit": commit, "ETag": f'"{sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        code, asked = 200, handler.headers.get("Range")
        if asked and self.ranges:
            start, stop = asked.removeprefix("bytes=").split("-")
            code, heads["Content-Range"] = 206, f"bytes {start}-{stop}/{len(data)}"
            data = data[int(start) : int(stop or len(data)) + 1]
        if body:
            self.sent[f"{name}/{'/'.join(rest[2:])}"] += len(data)
        return self._reply(handler, code, heads, data, body)

    def _history(self, name: str, kind: str) -> Any:
        """The tags beside main, or the commits, the newest first."""
        known = {one: commit_of(f"{name}@{one}") for one in self.revisions.get(name, {})}
        if kind == "commits":
            made = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""}
            return [{**made, "id": commit, "title": one} for one, commit in reversed(known.items()) if " " in one]
        tags = [
            {"name": one, "ref": f"refs/tags/{one}", "targetCommit": commit} for one, commit in known.items() if " " not in one
        ]
        return {
            "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit_of(name)}],
            "converts": [],
            "tags": tags,
        }

    def _describe(self, name: str, top: Path, commit: str, *, tree: bool) -> Any:
        files = [(p.relative_to(top).as_posix(), p.stat().st_size) for p in sorted(top.rglob("*")) if p.is_file()]
        if tree:
            return [{"type": "file", "path": f, "size": size, "oid": sha1(f.encode()).hexdigest()} for f, size in files]
        siblings = [{"rfilename": f, "size": size, "blobId": sha1(f.encode()).hexdigest()} for f, size in files]
        return {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "gated": name in self.gated}

    def _reply(self, handler: Handler, code: int, heads: dict[str, str], data: bytes, body: bool) -> None:
        handler.send_response(code)
        for key, value in {**heads, "Content-Length": str(len(data))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if body:
            try:
                handler.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                handler.close_connection = True


class CommandLine:
    """One process that runs `workbench` commands with an environment, a hub and a hub cache of its own."""

    def __init__(self, url: str, home: Path, *, offline: bool = False, token: str | None = TOKEN) -> None:
        environment = {
            **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": token or "", "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(home / "hub"),
        }  # fmt: skip
        self._process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env=environment)  # fmt: skip

    def __call__(self, cwd: Path, *args: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a command; no output holds the token."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"cwd": str(cwd), "args": args}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process ended with {self._process.wait()}"
        assert TOKEN not in answer
        code, out, err = json.loads(answer)
        return code, out, err

    def kill_after(self, cwd: Path, *args: str, until: threading.Event) -> None:
        """Start a command, and kill the process when an event is set."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"cwd": str(cwd), "args": args}) + "\n")
        self._process.stdin.flush()
        try:
            until.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Kill the process: each command's answer has come, or nobody waits for it any more."""
        self._process.kill()
        self._process.communicate()
