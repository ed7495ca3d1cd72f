"""A hub on this machine that takes uploads: the endpoints that huggingface_hub asks to create a repository and to commit files.

It keeps what the protocol keeps: large files by SHA-256, apart from commits, so that a second upload is told which are there.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from worlds.hub_server import TOKEN
from worlds.local_server import Handler, LocalServer

LARGE = (".safetensors",)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repository:
    """A repository: branches with their newest commit, and the files of every commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = sha1(f"{len(self.commits)}{branch}{sorted(files)}".encode()).hexdigest()
        self.branches[branch], self.commits[oid] = oid, files
        self.messages.append(message)
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass
class UploadServer:
    """Repositories by name, and what was asked for.

    Attributes:
        repositories: Name -> repository.
        objects: SHA-256 -> content of large files that have arrived.
        put: SHA-256 -> times that a large file came.
        failing: Status that answers every further large file, after the first `failing_after` ones; 0 for a server that never answers.
        stuck: Set when a large file gets no answer.
        roles: Token -> its role. Other tokens are refused.
        requests: (method, path) of every request.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    put: Counter[str] = field(default_factory=Counter)
    failing: int | None = None
    failing_after: int = 0
    stuck: threading.Event = field(default_factory=threading.Event)
    roles: dict[str, str] = field(default_factory=lambda: {TOKEN: "write"})
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> UploadServer:
        hub = self

        class Answers(Handler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                code, heads, document = hub.answer(self.command, path, body, self.headers.get("Authorization") or "", self.path)
                data = json.dumps(document).encode()
                self.send_response(code)
                for key, value in {"Content-Type": "application/json", **heads, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer

        self._server = LocalServer(Answers)
        self.url = self._server.__enter__()
        return self

    def __exit__(self, *_args: object) -> None:
        self._server.__exit__()

    def answer(self, method: str, path: str, body: bytes, authorization: str, url: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and document of a request."""
        if method == "PUT":
            return self._receive(path.removeprefix("/lfs/"), body)
        role = self.roles.get(authorization.removeprefix("Bearer "))
        if role is None:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {}, {"name": "org", "auth": {"accessToken": {"role": role}}}
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(found[1], json.loads(body))
        name, rest = "/".join(path.split("/")[3:5]), path.split("/")[5:]
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        repository = self.repositories[name]
        if method == "GET":
            return self._describe(name, rest[1] if rest else "main", "blobs" in parse_qs(urlsplit(url).query))
        verb, revision = rest
        if verb == "branch":
            if revision in repository.branches:
                return 409, {}, {"error": "Reference already exists"}
            repository.branches[revision] = repository.branches["main"]
            return 201, {}, {}
        if revision not in repository.branches:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {}
        if verb == "preupload":
            return self._preupload(repository.files(revision), json.loads(body))
        return self._commit(name, revision, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if asked["organization"] != "org":
            return 403, {"X-Error-Message": "You don't have the rights to create a model under this namespace"}, {}
        name = f"{asked['organization']}/{asked['name']}"
        document = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, {}, {**document, "error": "You already created this model repo"}
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        self.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, {}, document

    def _validate(self, content: str) -> tuple[int, dict[str, str], Any]:
        """Check a card as the hub does: ids of models, and a name for licenses that the hub does not know."""
        header = yaml.safe_load(content.split("---\n")[1]) or {}
        bases = header.get("base_model") or []
        errors = [
            f'"base_model" with value "{base}" is not valid. Use a model id from the hub.'
            for base in ([bases] if isinstance(bases, str) else bases)
            if not HUB_ID.fullmatch(base)
        ]
        if header.get("license") not in (None, "mit", "apache-2.0", "other"):
            errors.append('"license" must be one of [apache-2.0, mit, other]')
        document = {"errors": [{"message": text} for text in errors], "warnings": []}
        return (400 if errors else 200), {}, document

    def _preupload(self, present: dict[str, bytes], asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        rows = []
        for file in asked["files"]:
            large, content = file["path"].endswith(LARGE), present.get(file["path"])
            oid = None if content is None else sha256(content).hexdigest() if large else _git_hash(content)
            rows.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return 200, {}, {"files": rows}

    def _batch(self, name: str, asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        assert name in self.repositories
        rows = []
        for file in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{file['oid']}"}}} if file["oid"] not in self.objects else {}
            rows.append({**file, **upload})
        return 200, {}, {"transfer": "basic", "objects": rows}

    def _receive(self, oid: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if self.failing is not None and sum(self.put.values()) >= self.failing_after:
            if self.failing == 0:
                self.stuck.set()
                threading.Event().wait()
            return self.failing, {}, {}
        if sha256(body).hexdigest() != oid:
            return 400, {}, {"error": "checksum"}
        self.put[oid] += 1
        self.objects[oid] = body
        return 200, {}, {}

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, str], Any]:
        repository = self.repositories[name]
        files = dict(repository.files(branch))
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(branch, files, message)
        return 200, {}, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}

    def _describe(self, name: str, revision: str, blobs: bool) -> tuple[int, dict[str, str], Any]:
        repository = self.repositories[name]
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {}
        siblings: list[dict[str, Any]] = []
        for path, content in repository.commits[oid].items():
            sizes: dict[str, Any] = {"size": len(content), "blobId": _git_hash(content)} if blobs else {}
            if blobs and path.endswith(LARGE):
                sizes["lfs"] = {"sha256": sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append({"rfilename": path, **sizes})
        return 200, {}, {"id": name, "modelId": name, "sha": oid, "private": repository.private, "siblings": siblings}


def _git_hash(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()
