"""Uploads that several requests change at once: one file, one answer, nothing left."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora_ft.serve import uploads
from lora_ft.system import atomicio
from tests.in_process import FORM, Client, form

PIECE = b'{"messages": []}\n'


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def start(client: Client, size: int = len(PIECE)) -> str:
    about = {"bytes": size, "filename": "a.jsonl", "mime_type": "", "purpose": "fine-tune"}
    return f"/v1/uploads/{client('POST', '/v1/uploads', about)[1]['id']}"


def part(client: Client, path: str) -> tuple[int, Any, Any]:
    return client("POST", f"{path}/parts", form(PIECE, "data"), FORM)


def slowed(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], Any]) -> None:
    """Has a draft do something else first, each time that it is asked for `name`."""
    real = getattr(atomicio.Draft, name)

    def slow(draft: atomicio.Draft, *args: Any, **more: Any) -> Any:
        action()
        return real(draft, *args, **more)

    monkeypatch.setattr(atomicio.Draft, name, slow)


def left(client: Client) -> set[str]:
    return {place.name for place in client.state.files.folder.iterdir()}


def test_the_same_upload_completed_at_once_is_one_file(client, monkeypatch):
    path = start(client)
    ids = [part(client, path)[1]["id"]]
    slowed(monkeypatch, "copy", lambda: time.sleep(0.2))
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: client("POST", f"{path}/complete", {"part_ids": ids})[:2], range(6)))
    assert {status for status, _ in answers} == {200}
    files = {done["file"]["id"] for _, done in answers}
    assert len(files) == 1
    assert left(client) == files
    assert len(client("GET", "/v1/files")[1]["data"]) == 1


@pytest.mark.parametrize("name", ["pending", "commit"])
def test_a_cancel_during_a_part_leaves_nothing(client, monkeypatch, name):
    path = start(client)
    cancels: list[str] = []

    def cancel() -> None:
        thread = threading.Thread(target=lambda: cancels.append(client("POST", f"{path}/cancel")[1]["status"]))
        thread.start()
        thread.join(0.3)

    if name == "commit":
        slowed(monkeypatch, "commit", cancel)
    else:
        looks, real = [], uploads.pending

        def looked(*args: Any) -> Any:
            row = real(*args)
            looks.append(row)
            if len(looks) == 2:  # when the part has come, and is about to be kept
                cancel()
            return row

        monkeypatch.setattr(uploads, "pending", looked)
    part(client, path)
    end = time.monotonic() + 10
    while not cancels and time.monotonic() < end:
        time.sleep(0.01)
    assert cancels == ["cancelled"]
    assert not left(client)


def test_parts_side_by_side_are_counted_together(client, monkeypatch):
    path = start(client)
    slowed(monkeypatch, "commit", lambda: time.sleep(0.1))
    with ThreadPoolExecutor(3) as threads:
        statuses = [status for status, *_ in threads.map(lambda _: part(client, path), range(3))]
    assert sorted(statuses) == [200, 400, 400]


def test_the_database_is_free_while_a_part_is_written(client, monkeypatch):
    path = start(client)
    slowed(monkeypatch, "commit", lambda: client.state.store.connection.in_transaction and pytest.fail("it is held"))
    assert part(client, path)[0] == 200


def test_an_upload_whose_time_is_over_ends_unless_it_is_being_completed(client, monkeypatch):
    over, completed = start(client), start(client)
    parts = [part(client, path)[1]["id"] for path in (over, completed)]
    later = uploads.now() + uploads.OPEN_S

    def time_passes() -> None:
        monkeypatch.setattr(uploads, "now", lambda: later)
        uploads.expire(client.state.files)

    slowed(monkeypatch, "copy", time_passes)
    done = client("POST", f"{completed}/complete", {"part_ids": parts[1:]})[1]
    assert done["status"] == "completed"
    assert left(client) == {done["file"]["id"]}
    refused = client("POST", f"{over}/complete", {"part_ids": parts[:1]})
    assert (refused[0], refused[1]["error"]["code"]) == (400, "invalid_upload_state")
    assert "is expired" in refused[1]["error"]["message"]
