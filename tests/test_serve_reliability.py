"""The server's harnesses: a few requests of any shape in every run, all of them and the kills in the slow ones."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests import tiny_server
from tests.in_process import Client
from tests.reliability import fuzz_api, serve_kill


def test_no_request_is_answered_with_a_failure_of_our_own(tmp_path: Path) -> None:
    tally = fuzz_api.fuzz(tmp_path, 400)
    assert not tally.wrong
    assert tally.total >= 400
    assert not tally.unreached, str(tally)
    assert {200, 400, 404} <= {status for _, status in tally.statuses}


def test_the_harness_sees_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_ft.serve.models import Models

    monkeypatch.setattr(Models, "list", lambda self: 1 / 0)
    assert any("/v1/models" in line for line in fuzz_api.fuzz(tmp_path, 40).wrong)


def test_the_harness_sees_an_endpoint_that_refuses_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_ft.serve import uploads
    from lora_ft.serve.refusals import bad

    def refuse(*_: object) -> None:
        raise bad("part_ids", "no")

    monkeypatch.setattr(uploads, "complete", refuse)
    assert fuzz_api.fuzz(tmp_path, 400).unreached == ["POST /v1/uploads/{upload_id}/complete"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_are_not_either(tmp_path: Path) -> None:
    tally = fuzz_api.fuzz(tmp_path, 10_000)
    print(tally)
    assert tally.total >= 10_000
    assert not tally.wrong
    assert not tally.unreached
    assert tally.grown_bytes < fuzz_api.GROWTH_BYTES


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_at_fifty_moments_change_nothing(tmp_path: Path) -> None:
    done = serve_kill.kills(tmp_path, 50)
    print(done)
    assert not done.wrong
    assert done.killed.total() == 50
    assert done.killed.keys() == set(serve_kill.WHAT)


@pytest.mark.parametrize(
    ("what", "works", "ended", "counts"),
    [
        ("server", False, False, True),
        ("server", True, True, False),
        ("worker", True, False, True),
        ("worker", False, False, False),
        ("worker", True, True, False),
        ("both", True, False, True),
        ("both", False, False, False),
    ],
)
def test_a_kill_counts_only_where_there_was_something_to_kill(
    tmp_path: Path, what: str, works: bool, ended: bool, counts: bool
) -> None:
    client = Client(tiny_server.home(tmp_path, tmp_path / "base"))
    job = client.job()["id"]
    if ended:
        client.state.jobs.ask(job, "cancel")
    server, worker = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    stub = tiny_server.Server(tmp_path)
    stub.process, stub.workers = server, lambda job: [psutil.Process(worker.pid)] if works else []  # type: ignore
    assert serve_kill._kill(stub, job, what) == counts
    if what != "server" and works:
        assert worker.wait(10) == -signal.SIGKILL
    assert (server.poll() is None) == (what == "worker")
    for process in (server, worker):
        process.kill()
        process.wait()
