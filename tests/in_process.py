"""A server's HTTP side in this process, without a queue's processes unless a test lets them run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_ft.serve import access, app
from lora_ft.serve.state import State

HOST = "127.0.0.1:8000"


class Client:
    """Sends requests to an ASGI application and reads whole answers."""

    def __init__(self, home: Path, bound: str = "127.0.0.1", queue: bool = False) -> None:
        self.state = State.of(home)
        self.token = access.make_token(self.state.store)
        if not queue:
            self.state.queue.wake = self.state.queue.start = lambda: None  # type: ignore[method-assign]
        self.app = app.create(self.state, bound)

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str | None] | None = None,
        heard: Callable[[dict[str, Any]], None] = lambda message: None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Returns status, JSON (or text) and headers of an answer; a header of None is left out.

        Args:
            heard: called with each part of the answer; what it raises, the server meets as it sends.
        """
        given: dict[str, str | None] = {"host": HOST, "authorization": f"Bearer {self.token}"}
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given |= {"content-type": "application/json", "content-length": str(len(data))}
        given |= headers or {}
        sent = [(name.encode(), value.encode()) for name, value in given.items() if value is not None]
        route, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": route, "raw_path": route.encode(), "query_string": query.encode(), "headers": sent,
            "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        return asyncio.run(self._exchange(scope, data, heard))

    async def _exchange(
        self, scope: dict[str, Any], data: bytes, heard: Callable[[dict[str, Any]], None]
    ) -> tuple[int, Any, dict[str, str]]:
        messages: list[dict[str, Any]] = []
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)
            heard(message)

        try:
            await self.app(scope, receive, send)
        except Exception:
            # What answers errors raises them again, for the server's log.
            if not messages:
                raise
        headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        text = b"".join(message.get("body", b"") for message in messages[1:]).decode()
        try:
            return messages[0]["status"], json.loads(text), headers
        except ValueError:
            return messages[0]["status"], text, headers

    def upload(self, text: str | bytes, purpose: str = "fine-tune", filename: str = "train.jsonl", **more: str) -> Any:
        """Returns what the upload of a file is answered with: status and JSON."""
        content = text if isinstance(text, bytes) else text.encode()
        return self("POST", "/v1/files", form(content, purpose=purpose, filename=filename, **more), FORM)[:2]

    def job(self, **more: Any) -> dict[str, Any]:
        """Returns a new job on a new file."""
        file = self.upload('{"messages": []}\n')[1]
        status, made, _ = self("POST", "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file["id"], **more})
        assert status == 200, made
        return made


FORM: dict[str, str | None] = {"content-type": "multipart/form-data; boundary=edge"}


def form(content: bytes, field: str = "file", filename: str = "train.jsonl", **fields: str) -> bytes:
    """Returns the body of a form with one file."""
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{filename}"\r\n'
    return b"".join(
        [*parts, head.encode(), b"Content-Type: application/octet-stream\r\n\r\n", content, b"\r\n--edge--\r\n"]
    )
