"""A model hub and a package index on loopback, for tests of the real clients without the internet.

`LocalHub` answers what huggingface_hub asks to download a model: its info at a revision, its files, each file with
its headers. `PackageIndex` serves wheels the way `pip download` looks for them. Both fail on demand.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

BLOCKED = b"<html>This site is blocked by your network.</html>"


class LocalServer:
    """A server on a free port of loopback, from `with` to the end of the block."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """`METHOD path` of everything that was asked."""
        self.released = threading.Event()
        """Set when the block ends: hanging answers give up then."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                outer.requests.append(f"{self.command} {path}")
                outer.answer(self, path)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LocalServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        raise NotImplementedError

    def send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def fail(self, handler: BaseHTTPRequestHandler, how: int | str) -> None:
        """Answers with a status, `hang`s until the block ends, `cut`s the connection or shows a firewall's page."""
        handler.close_connection = True
        if how == "hang":
            self.released.wait(60)
        elif how == "page":
            self.send(handler, 200, BLOCKED, {"Content-Type": "text/html"})
        elif how != "cut":
            self.send(handler, int(how), b"{}")


@dataclass
class Repo:
    """A model repository: its commits, the branches that name them, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    """As the hub does it, anyone reads what there is, but no file."""


class LocalHub(LocalServer):
    """A model hub. `faults` maps `info`, `tree` or `file` to what `fail` does; `cuts` counts files to break off."""

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, int | str] = {}
        self.cuts = 0

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits `files` to a branch and returns the commit."""
        repo = self.repos.setdefault(name, Repo())
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo.commits[commit] = files
        repo.branches[branch] = commit
        return commit

    def add_folder(self, name: str, folder: Path, branch: str = "main", **more: bytes) -> str:
        """Commits the files of a folder, and more of them, to a branch and returns the commit."""
        return self.add(name, {**{f.name: f.read_bytes() for f in folder.iterdir()}, **more}, branch)

    def downloaded(self) -> set[str]:
        """Returns the names of the files that were fetched."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for path in self.requests
            if path.startswith("GET /") and "/resolve/" in path
        }

    def answer(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        parts = path.strip("/").split("/")
        kind = "file" if "resolve" in parts else "tree" if "tree" in parts else "info"
        if kind in self.faults:
            return self.fail(handler, self.faults[kind])
        words = parts if kind == "file" else parts[2:]
        name, rest = "/".join(words[:2]), words[2:]
        repo = self.repos.get(name)
        if repo is None or not self.sees(handler, repo):
            return self.refuse(handler, 401, "RepoNotFound")
        # Of a pull request it has slashes in it.
        revision = "/".join(rest[1:] if kind == "info" else rest[1:2]) or "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(handler, 404, "RevisionNotFound")
        files = repo.commits[commit]
        if kind == "info":
            about = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0}
            about["cardData"] = card_data(files.get("README.md", b""))
            return self.json(handler, {**about, "likes": 0, "siblings": [{"rfilename": file} for file in files]})
        if kind == "tree":
            entries = [self.entry(file, body) for file, body in files.items()]
            return self.json(handler, entries)
        file = "/".join(rest[2:])
        if repo.gated:
            return self.refuse(handler, 403, "GatedRepo")
        if file not in files:
            return self.refuse(handler, 404, "EntryNotFound", commit)
        return self.file(handler, files[file], commit)

    def sees(self, handler: BaseHTTPRequestHandler, repo: Repo) -> bool:
        """Returns whether whoever asks may know of a repository."""
        return not repo.private

    def entry(self, file: str, body: bytes) -> dict[str, Any]:
        """Returns what is said of a file in the list of a repository's."""
        return {"type": "file", "path": file, "size": len(body), "oid": oid_of(body)}

    def file(self, handler: BaseHTTPRequestHandler, body: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid_of(body)}"', "Accept-Ranges": "bytes"}
        status, wanted = 200, handler.headers.get("Range", "")
        if handler.command == "GET" and wanted.startswith("bytes="):
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[begin:]
        if handler.command == "GET" and self.cuts > 0 and len(body) > 1000:
            self.cuts -= 1
            handler.close_connection = True
            return self.send(handler, status, body[: len(body) // 2], {**headers, "Content-Length": str(len(body))})
        return self.send(handler, status, body, headers)

    def json(self, handler: BaseHTTPRequestHandler, value: Any) -> None:
        self.send(handler, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, handler: BaseHTTPRequestHandler, status: int, code: str, commit: str | None = None) -> None:
        about = {"X-Error-Code": code, "X-Error-Message": code}
        self.send(handler, status, b"{}", {**about, "X-Repo-Commit": commit} if commit else about)


class PackageIndex(LocalServer):
    """A package index of `files`, name -> bytes; `fault` makes it `fail`."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.fault: int | str | None = None

    def answer(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        if self.fault is not None:
            return self.fail(handler, self.fault)
        parts = path.strip("/").split("/")
        if parts[0] == "simple":
            names = [f for f in self.files if f.replace("_", "-").startswith(f"{parts[1]}-")]
            links = "".join(f'<a href="/files/{file}">{file}</a>' for file in names)
            return self.send(handler, 200 if names else 404, links.encode(), {"Content-Type": "text/html"})
        return self.send(handler, 200, self.files[parts[1]])

    def add_wheel(self, package: str, members: dict[str, bytes], version: str = "1.0") -> str:
        """Serves a wheel of `members`, path -> bytes, and returns its sha256."""
        about = f"{package}-{version}.dist-info"
        texts = {
            f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
            f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{about}/RECORD": "",
        }
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, body in {**members, **{k: v.encode() for k, v in texts.items()}}.items():
                archive.writestr(name, body)
        self.files[f"{package}-{version}-py3-none-any.whl"] = made.getvalue()
        return hashlib.sha256(made.getvalue()).hexdigest()


def oid_of(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def card_data(card: bytes) -> dict[str, Any]:
    """Returns the metadata of a model card, empty where it has none."""
    found = re.match(rb"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    return yaml.safe_load(found[1]) or {} if found else {}
