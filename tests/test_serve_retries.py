"""Requests for a job that are sent again, in whatever order they come: one job."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from lora_ft.serve import routes_jobs
from tests.in_process import Client

PATH = "/v1/fine_tuning/jobs"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    (tmp_path / "models.json").write_text(json.dumps({"bases": {"tiny": "nowhere"}, "aliases": {}}))
    return Client(tmp_path)


def body(client: Client, **more: Any) -> bytes:
    return json.dumps({"model": "tiny", "training_file": client.upload("{}")[1]["id"], **more}).encode()


def ask(client: Client, data: bytes, retry: int) -> str:
    return str(client("POST", PATH, data, {"x-stainless-retry-count": str(retry)})[1]["id"])


def test_a_first_try_that_its_retry_overtakes_makes_no_second_job(client, monkeypatch):
    data, first = body(client), []
    held, come = threading.Event(), threading.Event()
    real = routes_jobs.raw

    async def slow(request: Any) -> bytes:
        if request.headers["x-stainless-retry-count"] == "0":
            come.set()
            while not held.is_set():
                await asyncio.sleep(0.01)
        return await real(request)

    monkeypatch.setattr(routes_jobs, "raw", slow)
    thread = threading.Thread(target=lambda: first.append(ask(client, data, 0)))
    thread.start()
    assert come.wait(10)
    retried = ask(client, data, 1)
    held.set()
    thread.join()
    assert first == [retried]
    # A script that is started again is another matter.
    assert ask(client, data, 0) != retried


def test_a_key_is_of_one_body(client):
    made = client("POST", PATH, body(client), {"idempotency-key": "a"})[1]
    status, refused, _ = client("POST", PATH, body(client, seed=1), {"idempotency-key": "a"})
    assert (status, refused["error"]["code"]) == (400, "idempotency_key_reused")
    assert made["id"] in refused["error"]["message"]
    assert [job["id"] for job in client("GET", PATH)[1]["data"]] == [made["id"]]
