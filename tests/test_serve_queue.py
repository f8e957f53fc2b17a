"""The queue of a server and the workers it starts: pauses called off, devices in use, what is left of jobs that end."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lora_ft import runs
from lora_ft.serve import jobs, worker
from lora_ft.serve.queue import LAST_WAIT_S, Process
from lora_ft.serve.states import PAUSED, QUEUED, RUNNING
from lora_ft.serve.worker import BUSY, Worker
from lora_ft.system import locks
from tests.in_process import Client
from tests.test_serve_states import Ended

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    (tmp_path / "models.json").write_text(json.dumps({"bases": {"tiny": "nowhere"}, "aliases": {}}))
    return Client(tmp_path)


def taken_to(client: Client, *states: str) -> str:
    """Returns a new job, taken from state to state."""
    job = str(client.job()["id"])
    for state in states:
        with client.state.store.change() as connection:
            jobs.change_state(connection, job, state)
    return job


def told(client: Client, job: str) -> list[str]:
    """Returns the messages of a job, the newest first."""
    return [event["message"] for event in client("GET", f"{JOBS}/{job}/events?limit=1000")[1]["data"]]


def process(job: str, end: Any = None) -> Process:
    return Process(job, 0, 0, 0, end)


class Going:
    """A process that goes on, as the queue sees it."""

    stdin = None

    def __init__(self) -> None:
        self.signals: list[int] = []

    def poll(self) -> None:
        return None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


# A pause that is called off


def test_a_resume_before_the_process_is_told_to_stop_calls_the_pause_off(client):
    job, going = taken_to(client, QUEUED, RUNNING), Going()
    client.state.jobs.ask(job, "pause")
    assert client("POST", f"{JOBS}/{job}/resume")[1]["status"] == RUNNING
    client.state.queue._heed(process(job, going))
    assert not going.signals
    row = client.state.jobs.get(job)
    assert (row["status"], row["wanted"]) == (RUNNING, None)
    assert told(client, job)[0] == "The job goes on: it was resumed before it was paused"


def test_a_resume_while_the_process_stops_has_the_job_go_on(client):
    job = taken_to(client, QUEUED, RUNNING)
    running = process(job, Going())
    client.state.jobs.ask(job, "pause")
    client.state.queue._heed(running)
    assert client("POST", f"{JOBS}/{job}/resume")[0] == 200
    client.state.queue._heed(running)
    Worker(client.state.store, job, 0)._stopped()
    assert client.state.jobs.get(job)["status"] == QUEUED
    assert not any("interrupted" in message or "paused at" in message for message in told(client, job))


def test_a_pause_after_the_resume_is_a_pause(client):
    job = taken_to(client, QUEUED, RUNNING)
    for action in ("pause", "resume", "pause"):
        client.state.jobs.ask(job, action)
    Worker(client.state.store, job, 0)._stopped()
    assert client.state.jobs.get(job)["status"] == PAUSED


# A device that is in use


def test_a_job_whose_gpu_is_in_use_stays_in_the_queue_and_says_so_once(client, monkeypatch, tmp_path):
    monkeypatch.chdir(client.state.store.home)
    name = f"test-{time.time_ns()}"
    monkeypatch.setattr(runs, "gpu", lambda: name)
    job = taken_to(client, QUEUED)
    states: list[tuple[int, str]] = []

    def work() -> None:
        # Of a thread of its own, which holds what this one holds as little as another process does.
        status = worker.run(client.state.store, job, 0, whole=True)
        states.append((status, client.state.jobs.get(job)["status"]))
        client.state.store.close()

    with locks.gpu(name, tmp_path / "other"):
        for _ in range(3):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert states == [(BUSY, QUEUED)] * 3
    (waits,) = [message for message in told(client, job) if "is in use by process" in message]
    assert waits.startswith(f"The job waits: the GPU {name}")
    assert "Fine-tuning job started" not in told(client, job)


def test_a_worker_that_waits_for_a_job_it_has_lost_just_ends(client, monkeypatch):
    job = taken_to(client, QUEUED)

    def lost(self: Worker) -> int:
        self.store.connection.execute("UPDATE jobs SET attempt = attempt + 1")
        raise locks.BusyError("in use")

    monkeypatch.setattr(Worker, "train", lost)
    assert worker.run(client.state.store, job, 0, whole=True) == BUSY


def test_a_job_whose_gpu_cannot_be_asked_fails_and_does_not_begin_for_ever(client, monkeypatch):
    monkeypatch.chdir(client.state.store.home)
    job = taken_to(client, QUEUED)

    def broken() -> str:
        raise RuntimeError("CUDA driver error")

    monkeypatch.setattr(runs, "gpu", broken)
    assert worker.run(client.state.store, job, 0, whole=True) == 0
    found = client("GET", f"{JOBS}/{job}")[1]
    assert (found["status"], found["error"]["code"]) == ("failed", "internal_error")


def test_what_is_in_use_is_looked_at_less_and_less_often(client):
    job, queue = taken_to(client, QUEUED), client.state.queue
    seconds = []
    for _ in range(9):
        queue._ended(process(job, Ended(BUSY)))
        seconds.append(round(queue._waits[job].until - time.monotonic()))
    assert seconds[:4] == [1, 2, 4, 8]
    assert seconds[-1] == LAST_WAIT_S
    assert job in queue._passed_over()
    queue._ended(process(job, Ended(0)))
    assert not queue._waits


def test_no_job_runs_without_a_process_whatever_that_ended_with(client):
    job = taken_to(client, QUEUED, RUNNING)
    client.state.jobs.ask(job, "pause")
    client.state.queue._ended(process(job, Ended(BUSY)))
    assert client.state.jobs.get(job)["status"] == PAUSED
