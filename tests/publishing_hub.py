"""A model hub on loopback that adapters are published to, by its protocol as huggingface_hub speaks it.

Repositories, commits, tags, pull requests, large files, tokens and rights. A commit is whole or not there, as on the
hub; each request can be made to fail, and every version that the main branch has had is remembered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests import hub_cards
from tests.local_hub import LocalHub, Repo, oid_of

TOKEN = "hf_" + "t" * 34
READER = "hf_" + "r" * 34
LARGE = (".safetensors", ".png", ".bin")
FAULTS = ("error", "drop", "lost", "truncated", "slow")


@dataclass
class Kept(Repo):
    """A repository that can be written to."""

    tags: dict[str, str] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    """Commits that the main branch has been at."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Title and commit of each pull request, in their order, open all of them."""


class PublishingHub(LocalHub):
    """A hub that `TOKEN` may write to in the namespace `me`, and read alone in all others."""

    def __init__(self, cas: Path | None = None) -> None:
        """Args: cas: folder of a Xet store; without one, large files come by the protocol of git's LFS."""
        super().__init__()
        self.cas = cas
        self.large: dict[str, bytes] = {}
        """Large files by their sha256; those that come through Xet are told beforehand, for the hub never sees them."""
        self.fault: tuple[int, str] | None = None
        """Which request fails, counted from 0, and how."""
        self.asked = 0
        self.status: dict[str, tuple[int, dict[str, str]]] = {}
        """Part of a path -> the status and headers that it is answered with."""
        self.uploaded: list[str] = []
        self.messages: list[str] = []
        """Of each commit that came."""

    def begin(self, fault: tuple[int, str] | None = None) -> None:
        """Counts requests from here on, and makes one of them fail."""
        self.asked, self.fault = 0, fault
        self.requests.clear()

    def kept(self, name: str) -> Kept:
        repo = self.repos[name]
        assert isinstance(repo, Kept)
        return repo

    def versions(self, name: str) -> list[dict[str, bytes]]:
        """Returns the files of each version that the main branch has had, the first one's without any of ours."""
        repo = self.kept(name)
        return [repo.commits[commit] for commit in repo.history]

    # What is asked

    def answer(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        number, self.asked = self.asked, self.asked + 1
        how = self.fault[1] if self.fault and self.fault[0] == number else None
        if how == "slow":
            time.sleep(0.2)
        elif how in ("error", "drop"):
            return self.fail(handler, 500 if how == "error" else "cut")
        elif how in ("lost", "truncated"):
            handler.wfile = _Cut(handler.wfile, how == "truncated")  # type: ignore[assignment]
            handler.close_connection = True
        for part, (status, headers) in self.status.items():
            if part in path:
                return self.send(handler, status, b'{"error": "refused"}', headers)
        return self._route(handler, path, body)

    def _route(self, handler: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        method, parts = handler.command, path.strip("/").split("/")
        if path == "/api/validate-yaml":
            wrong = hub_cards.problems(json.loads(body)["content"])
            answer = {"errors": [{"message": text} for text in wrong], "warnings": []}
            return self.send(handler, 400 if wrong else 200, json.dumps(answer).encode())
        if path == "/api/repos/create":
            return self._create(handler, json.loads(body))
        if path.startswith("/lfs/"):
            return self._large(handler, method, parts, body)
        if ".git/info/lfs" in path:
            return self._batch(handler, json.loads(body))
        name = "/".join(parts[2:4])
        action = parts[4] if len(parts) > 4 and parts[:2] == ["api", "models"] else ""
        writes = {"preupload": self._preupload, "commit": self._commit, "tag": self._tag, "settings": self._settings}
        reads = {"refs": self._refs, "discussions": self._discussions}
        if action.startswith("xet-"):
            return self._xet_token(handler)
        if action in writes or action in reads:
            repo = self.repos.get(name)
            if repo is None or not self.sees(handler, repo):
                return self.refuse(handler, 404, "RepoNotFound")
            if action in reads:
                return reads[action](handler, name)
            asks = "create_pr" in parse_qs(urlsplit(handler.path).query)
            if self.user(handler) is None or not (asks or name.startswith("me/")):
                return self.send(handler, 403, b"{}", {"X-Error-Message": "you may not write here"})
            return writes[action](handler, name, body, asks)
        return super().answer(handler, path)

    def user(self, handler: BaseHTTPRequestHandler) -> str | None:
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        return "me" if token == TOKEN else "reader" if token == READER else None

    def sees(self, handler: BaseHTTPRequestHandler, repo: Repo) -> bool:
        return not repo.private or self.user(handler) == "me"

    def entry(self, file: str, body: bytes) -> dict[str, Any]:
        told = super().entry(file, body)
        if file.endswith(LARGE):
            told["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
            told["oid"] = oid_of(f"pointer to {told['lfs']['oid']}".encode())
        return told

    def file(self, handler: BaseHTTPRequestHandler, body: bytes, commit: str) -> None:
        digest = hashlib.sha256(body).hexdigest()
        if digest not in self.large or not urlsplit(handler.path).path.endswith(LARGE):
            return super().file(handler, body, commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"',
                   "X-Linked-Size": str(len(body)), "Accept-Ranges": "bytes"}  # fmt: skip
        if self.cas is None:
            return self.send(handler, 200, body, headers)
        import hf_xet

        copy = self.cas.parent / digest
        copy.write_bytes(body)
        headers["X-Xet-Hash"] = hf_xet.hash_files([str(copy)])[0].hash
        headers["Link"] = f'<{self.url}/api/models/any/one/xet-read-token/{commit}>; rel="xet-auth"'
        # The bytes are to come from the store.
        return self.send(handler, 200 if handler.command == "HEAD" else 500, b"", headers)

    # What is written

    def _create(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        space = asked["organization"] or "me"
        name = f"{space}/{asked['name']}"
        if self.user(handler) is None:
            return self.send(handler, 401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if name in self.repos:
            return self.send(handler, 409, json.dumps({"url": f"{self.url}/{name}"}).encode())
        if self.user(handler) != "me" or space != "me":
            return self.send(handler, 403, b"{}", {"X-Error-Message": f"you may not write to {space}"})
        self.repos[name] = Kept(private=asked.get("visibility") == "private")
        self._put(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.json(handler, {"url": f"{self.url}/{name}"})

    def _put(self, name: str, files: dict[str, bytes]) -> str:
        repo = self.kept(name)
        commit = hashlib.sha1(repr((sorted(files.items()), len(repo.commits))).encode()).hexdigest()
        repo.commits[commit], repo.branches["main"] = files, commit
        repo.history.append(commit)
        return commit

    def _preupload(self, handler: BaseHTTPRequestHandler, name: str, body: bytes, asks: bool) -> None:
        repo = self.repos[name]
        held = repo.commits[repo.branches["main"]]
        told = []
        for file in json.loads(body)["files"]:
            path, there = file["path"], held.get(file["path"])
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = None if there is None else hashlib.sha256(there).hexdigest() if mode == "lfs" else oid_of(there)
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.json(handler, {"files": told})

    def _batch(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        told = []
        for one in asked["objects"]:
            told.append(dict(one))
            if one["oid"] not in self.large:
                href = f"{self.url}/lfs/{one['oid']}"
                told[-1]["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return self.json(handler, {"transfer": "basic", "objects": told})

    def _large(self, handler: BaseHTTPRequestHandler, method: str, parts: list[str], body: bytes) -> None:
        oid = parts[1]
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return self.send(handler, 400, b"{}")
            self.large[oid] = body
            self.uploaded.append(oid)
        return self.send(handler, 200 if oid in self.large else 404, b"{}")

    def _xet_token(self, handler: BaseHTTPRequestHandler) -> None:
        if self.cas is None:
            return self.send(handler, 404, b"{}")
        told = {"casUrl": f"local://{self.cas}", "accessToken": "xet", "exp": int(time.time()) + 3600}
        headers = {"X-Xet-Cas-Url": told["casUrl"], "X-Xet-Access-Token": "xet",
                   "X-Xet-Token-Expiration": str(told["exp"])}  # fmt: skip
        return self.send(handler, 200, json.dumps(told).encode(), {"Content-Type": "application/json", **headers})

    def _commit(self, handler: BaseHTTPRequestHandler, name: str, body: bytes, asks: bool) -> None:
        header, *changes = [json.loads(line) for line in body.splitlines()]
        self.messages.append(header["value"]["summary"])
        repo = self.kept(name)
        head = repo.branches["main"]
        if header["value"].get("parentCommit", head) != head:
            return self.send(handler, 412, b'{"error": "a commit has happened since"}')
        files = dict(repo.commits[head])
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                if value["oid"] not in self.large or (self.cas and not any(self.cas.rglob("*"))):
                    return self.send(handler, 400, b'{"error": "the large file was not uploaded"}')
                files[value["path"]] = self.large[value["oid"]]
            else:
                files.pop(value["path"])
        told: dict[str, Any] = {"success": True}
        if asks:
            commit = hashlib.sha1(repr((sorted(files.items()), len(repo.requests))).encode()).hexdigest()
            repo.commits[commit] = files
            repo.requests.append((header["value"]["summary"], commit))
            number = len(repo.requests)
            repo.branches[f"refs/pr/{number}"] = commit
            told["pullRequestUrl"] = f"{self.url}/{name}/discussions/{number}"
        else:
            commit = self._put(name, files)
        return self.json(handler, told | {"commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"})

    def _tag(self, handler: BaseHTTPRequestHandler, name: str, body: bytes, asks: bool) -> None:
        tag, repo = json.loads(body)["tag"], self.kept(name)
        if tag in repo.tags:
            return self.send(handler, 409, b'{"error": "this tag is there"}')
        repo.tags[tag] = urlsplit(handler.path).path.split("/")[-1]
        return self.json(handler, {})

    def _settings(self, handler: BaseHTTPRequestHandler, name: str, body: bytes, asks: bool) -> None:
        self.repos[name].private = json.loads(body)["visibility"] == "private"
        return self.json(handler, {})

    def _refs(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in self.kept(name).tags.items()]
        return self.json(handler, {"branches": [], "converts": [], "tags": tags})

    def _discussions(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        found = [
            {"title": title, "num": i, "author": {"name": "me"}, "createdAt": "2026-01-01T00:00:00.000Z",
             "status": "open", "repo": {"name": name, "type": "model"}, "isPullRequest": True}
            for i, (title, _) in enumerate(self.kept(name).requests, 1)
        ]  # fmt: skip
        return self.json(handler, {"count": len(found), "start": 0, "discussions": found})


class _Cut:
    """A connection over which an answer comes not at all, or only half of it."""

    def __init__(self, inner: Any, half: bool) -> None:
        self.inner, self.half = inner, half

    def write(self, data: bytes) -> int:
        # The headers come in one piece, and the body in another.
        if self.half:
            self.inner.write(data if data.startswith(b"HTTP/") else data[: len(data) // 2])
        return len(data)

    def flush(self) -> None:
        self.inner.flush()

    def close(self) -> None:
        self.inner.close()

    @property
    def closed(self) -> bool:
        return bool(self.inner.closed)
