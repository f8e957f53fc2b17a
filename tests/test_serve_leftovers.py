"""What jobs and models leave in a server's folder once nobody needs it: nothing."""

import json
import threading
from pathlib import Path

import pytest

from lora_ft.serve import jobs, leftovers
from lora_ft.serve.models import register
from lora_ft.serve.states import FAILED, PAUSED, QUEUED, RUNNING, SUCCEEDED
from lora_ft.system import atomicio, locks
from tests.in_process import Client
from tests.test_serve_queue import taken_to

JOBS = "/v1/fine_tuning/jobs"
ROOMS = ("runs", "checkpoints", "jobs")


@pytest.fixture
def client(tmp_path: Path) -> Client:
    (tmp_path / "models.json").write_text(json.dumps({"bases": {"tiny": "nowhere"}, "aliases": {}}))
    return Client(tmp_path)


def file(client: Client, *parts: str) -> Path:
    """Returns a file in the server's folder that is there now."""
    path = client.state.store.home.joinpath(*parts)
    atomicio.write(path, "x")
    return path


def worked_on(client: Client, job: str) -> tuple[Path, Path, Path]:
    """Returns what a job in the middle of its training has: its run, a published checkpoint, its configuration."""
    made = file(client, "runs", job, "checkpoints", "optimizer"), file(client, "checkpoints", job, "step-1", "adapter")
    published(client, job, Path("checkpoints", job, "step-1"))
    return *made, file(client, "jobs", job, "config.yaml")


def published(client: Client, job: str, folder: Path) -> str:
    home = client.state.store.home
    with client.state.store.change() as connection:
        register(connection, f"ft:{folder.name}:{job}", "tiny", home / folder, home, job, 0)
    return f"ft:{folder.name}:{job}"


@pytest.mark.parametrize("state", [RUNNING, PAUSED])
def test_a_cancelled_job_keeps_what_the_api_lists(client, state):
    job = taken_to(client, QUEUED, RUNNING, *([PAUSED] if state == PAUSED else []))
    run, checkpoint, config = worked_on(client, job)
    client("POST", f"{JOBS}/{job}/cancel")
    client.state.queue.turn()
    assert not run.parents[1].exists()
    assert checkpoint.exists()
    assert config.exists()
    Client(client.state.store.home)
    assert checkpoint.exists()
    assert config.exists()


def test_a_failed_job_keeps_nothing_to_go_on_from(client):
    job = taken_to(client, QUEUED, RUNNING)
    run, checkpoint, _ = worked_on(client, job)
    with client.state.store.change() as connection:
        jobs.fail(connection, job, "nan_loss", "it diverged")
    assert client.state.jobs.get(job)["status"] == FAILED
    leftovers.clear(client.state.store)
    assert not run.parents[1].exists()
    assert checkpoint.exists()


def test_what_a_process_still_writes_is_removed_when_it_ends(client):
    job = taken_to(client, QUEUED, RUNNING)
    run = worked_on(client, job)[0]
    client("POST", f"{JOBS}/{job}/cancel")

    def clear() -> None:
        # In a thread of its own, which does not hold what this one holds.
        thread = threading.Thread(target=lambda: (leftovers.clear(client.state.store), client.state.store.close()))
        thread.start()
        thread.join()

    with locks.run_folder(run.parents[1]):
        clear()
        assert run.exists()
    clear()
    assert not run.exists()
    assert not client.state.store.all("SELECT * FROM leftovers")


def test_a_server_that_died_before_it_removed_them_does_so_at_its_next_start(client):
    job = taken_to(client, QUEUED, RUNNING)
    run, checkpoint, _ = worked_on(client, job)
    client("POST", f"{JOBS}/{job}/cancel")
    client.state.store.connection.execute("DELETE FROM leftovers")  # as if an earlier version had left them
    Client(client.state.store.home)
    assert not run.exists()
    assert checkpoint.exists()


def test_a_model_that_is_deleted_goes_whatever_stops_the_server(client, monkeypatch):
    job = taken_to(client, QUEUED, RUNNING)
    adapter = file(client, "runs", job, "adapter")
    name = published(client, job, Path("runs", job))
    with client.state.store.change() as connection:
        jobs.change_state(connection, job, SUCCEEDED, fine_tuned_model=name)
    Client(client.state.store.home)
    assert adapter.exists()

    def killed(place: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomicio, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        client.state.models.delete(name)
    monkeypatch.undo()
    assert adapter.exists()
    Client(client.state.store.home).state.queue.turn()
    assert not adapter.exists()


def test_folders_of_no_job_are_swept_at_the_start(client):
    job = taken_to(client, QUEUED, RUNNING)
    kept = [*worked_on(client, job), file(client, "checkpoints", job, "step-2", "not yet told")]
    kept.append(file(client, "runs", f".tmp-{job}-01234567", "half written"))
    for room in ROOMS:
        file(client, room, "ftjob-nobody", "x", "y")
    file(client, "runs", ".del-ftjob-nobody-01234567", "x")
    Client(client.state.store.home)
    assert all(path.exists() for path in kept)
    assert {place.name for room in ROOMS for place in (client.state.store.home / room).iterdir()} == {
        job, f".tmp-{job}-01234567",
    }  # fmt: skip


def test_a_checkpoint_that_was_never_told_of_is_swept_once_its_job_has_ended(client):
    job = taken_to(client, QUEUED, RUNNING)
    checkpoint = worked_on(client, job)[1]
    untold = file(client, "checkpoints", job, "step-2", "x")
    client("POST", f"{JOBS}/{job}/cancel")
    Client(client.state.store.home)
    assert checkpoint.exists()
    assert not untold.parent.exists()
