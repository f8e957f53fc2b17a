"""Clients that go away in the middle of their request: no failure of the server's."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.in_process import FORM, HOST, Client, form

BODY = form(b'{"messages": []}\n' * 100, purpose="fine-tune")


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def broken_off(client: Client, path: str, data: bytes) -> None:
    """Sends the beginning of a body, and then goes away."""
    headers = {"host": HOST, "authorization": f"Bearer {client.token}", "content-type": FORM["content-type"]}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
        "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": data, "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        pass

    asyncio.run(client.app(scope, receive, send))


@pytest.mark.parametrize("path", ["/v1/files", "/v1/fine_tuning/jobs", "/v1/uploads", "/v1/uploads/{}/parts"])
def test_a_body_that_breaks_off_is_no_error_of_the_servers(client, caplog, path):
    caplog.set_level(logging.INFO)
    about = {"bytes": 10, "filename": "a", "mime_type": "", "purpose": "fine-tune"}
    upload = client("POST", "/v1/uploads", about)[1]["id"]
    broken_off(client, path.format(upload), BODY[: len(BODY) // 2])
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert client("GET", "/v1/files")[1]["data"] == []
    assert not client.state.files.folder.exists() or not list(client.state.files.folder.iterdir())
