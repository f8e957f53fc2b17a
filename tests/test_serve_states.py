"""Jobs under any order of events, and lists under any order of inserts: what must hold whatever happens."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lora_ft.serve import events, jobs
from lora_ft.serve.jobs import Jobs, Order, Sent
from lora_ft.serve.queue import Process, Queue
from lora_ft.serve.refusals import RequestError
from lora_ft.serve.states import (
    ACTIONS,
    DONE_ALREADY,
    FINAL,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TRANSITIONS,
    VALIDATING,
)
from lora_ft.serve.store import Store
from lora_ft.serve.worker import TakenAway, Worker

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


LEGAL = {
    "validating_files": ("queued", "failed", "cancelled"),
    "queued": ("running", "failed", "cancelled"),
    "running": ("succeeded", "failed", "cancelled", "paused", "queued"),
    "paused": ("queued", "cancelled"),
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}
"""What the contract allows, written down a second time: a slip in the library's own table must not go unseen."""


class Ended:
    """A process that has ended, as the queue sees it."""

    stdin = None

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode


def order(**more: object) -> Order:
    values = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    return Order(asked="m", model="m", source="s", training_file="file-1", values=values, seed=1, **more)  # type: ignore[arg-type]


class Life(RuleBasedStateMachine):
    """Clients, workers, crashes and restarts, in any order, on one database."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=MEMORY))
        # No disk to lose anything from: what is at stake is the order of things.
        self.open()

    def open(self) -> None:
        self.store = Store(self.home)
        self.store.connection.execute("PRAGMA synchronous = OFF")
        self.jobs, self.queue = Jobs(self.store), Queue(self.store)

    @initialize()
    def begin(self) -> None:
        self.seen: dict[str, str] = {}
        self.final: dict[str, tuple[object, ...]] = {}
        self.requests: dict[str, str] = {}
        self.workers: list[Worker] = []
        self.create("a")

    def some_job(self, data: st.DataObject) -> str:
        # In the order of their making: ids are made at random, and a life that is run again must be the same.
        return data.draw(st.sampled_from(list(self.seen)))

    @rule(key=st.sampled_from("abc"))
    def create(self, key: str) -> None:
        row = self.jobs.create(order(), Sent(key, "body", repeats=True, since=0.0))
        assert self.requests.setdefault(key, row["id"]) == row["id"], "a retried request made another job"
        self.seen.setdefault(row["id"], row["status"])

    @rule(data=st.data(), action=st.sampled_from(("cancel", "pause", "resume")))
    def ask(self, data: st.DataObject, action: str) -> None:
        job = self.some_job(data)
        before = self.jobs.get(job)["status"]
        try:
            after = self.jobs.ask(job, action)["status"]
        except RequestError:
            assert action not in ACTIONS.get(before, ())
            assert before not in DONE_ALREADY[action]
            return
        assert action in ACTIONS.get(before, ()) or after == before

    @rule(data=st.data())
    def start_worker(self, data: st.DataObject) -> None:
        job = self.some_job(data)
        self.workers.append(Worker(self.store, job, self.jobs.get(job)["attempt"]))

    @rule(data=st.data(), what=st.sampled_from(("validated", "bad", "run", "step", "done", "failed", "stopped")))
    def work(self, data: st.DataObject, what: str) -> None:
        """A worker writes what it thinks is so: it may have lost its job long ago."""
        if self.workers:
            self.write(data.draw(st.sampled_from(self.workers)), what)

    @rule(data=st.data())
    def work_as_it_should_be(self, data: st.DataObject) -> None:
        """A new worker takes a job one step further."""
        job = self.some_job(data)
        row = self.jobs.get(job)
        if row["status"] not in (VALIDATING, QUEUED, RUNNING):
            return
        stops = "stopped" if row["wanted"] else "step"
        self.workers.append(Worker(self.store, job, row["attempt"]))
        self.write(self.workers[-1], {VALIDATING: "validated", QUEUED: "run", RUNNING: stops}[row["status"]])

    def write(self, worker: Worker, what: str) -> None:
        now = self.jobs.get(worker.job_id)
        needed = {"validated": VALIDATING, "bad": VALIDATING, "run": QUEUED}.get(what, RUNNING)
        is_its = (now["status"], now["attempt"]) == (needed, worker.attempt)
        try:
            with worker.change(needed) as connection:
                if what == "validated":
                    jobs.change_state(connection, worker.job_id, QUEUED)
                elif what in ("bad", "failed"):
                    jobs.fail(connection, worker.job_id, "code", "message")
                elif what == "run":
                    jobs.change_state(connection, worker.job_id, RUNNING)
                elif what == "step":
                    connection.execute("UPDATE jobs SET step = step + 1 WHERE id = ?", (worker.job_id,))
                elif what == "done":
                    jobs.change_state(connection, worker.job_id, SUCCEEDED, fine_tuned_model="ft")
            if what == "stopped" and is_its:
                worker._stopped()
        except TakenAway:
            assert not is_its
        else:
            assert is_its

    @rule(data=st.data(), status=st.sampled_from((0, 75, -9, 1)))
    def worker_ends(self, data: st.DataObject, status: int) -> None:
        if not self.workers:
            return
        worker = data.draw(st.sampled_from(self.workers))
        self.workers.remove(worker)
        step = self.jobs.get(worker.job_id)["step"]
        process = Process(worker.job_id, worker.attempt, 0, step, Ended(status))  # type: ignore[arg-type]
        before = self.jobs.get(worker.job_id)
        self.queue._ended(process)
        after = self.jobs.get(worker.job_id)
        if before["status"] == RUNNING and before["attempt"] == worker.attempt:
            assert after["status"] != RUNNING, "a job runs and nobody works on it"

    @rule(data=st.data())
    def slip(self, data: st.DataObject) -> None:
        """Somebody's mistake: every step that is not in the table."""
        job = self.some_job(data)
        before = self.jobs.get(job)["status"]
        for after in sorted(LEGAL.keys() - {before, *LEGAL[before]}):
            try:
                with self.store.change() as connection:
                    jobs.change_state(connection, job, after)
            except sqlite3.IntegrityError:
                continue
            raise AssertionError(f"a job went from {before} to {after}")

    @rule()
    def server_is_killed_and_starts_again(self) -> None:
        self.store.close()
        self.open()
        self.jobs.recover()
        assert not self.store.all("SELECT 1 FROM jobs WHERE status = ?", RUNNING)

    @invariant()
    def only_legal_steps_were_made(self) -> None:
        for job, before in list(getattr(self, "seen", {}).items()):
            row = self.jobs.get(job)
            now = row["status"]
            assert now == before or now in LEGAL[before]
            self.seen[job] = now
            if job in self.final:
                assert self.final[job] == tuple(row), "a job that has ended was changed"
            elif now in FINAL:
                self.final[job] = tuple(row)

    @invariant()
    def events_are_in_order_and_marks_come_once(self) -> None:
        for job in getattr(self, "seen", {}):
            told = events.since(self.store, job, 0)
            numbers = [row["n"] for row in told]
            assert numbers == sorted(set(numbers))
            marks = [row["mark"] for row in told if row["mark"]]
            assert len(marks) == len(set(marks))
            assert marks[:2] == ["created", "validating"]

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.home)


def run_lives(count: int, **more: Any) -> None:
    quiet = settings(
        max_examples=count, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), **more
    )
    run_state_machine_as_test(Life, settings=quiet)


def test_jobs_take_only_legal_steps_whatever_happens():
    run_lives(60)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_they_do_in_ten_thousand_lives():
    run_lives(10_000)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (VALIDATING, ("queued", "failed", "cancelled", "running")),
        (QUEUED, ("failed", "cancelled")),
        (RUNNING, ("succeeded", "failed", "cancelled", "paused", "queued", "validating_files")),
    ],
)
def test_a_table_with_a_wrong_step_is_seen(monkeypatch, before, after):
    monkeypatch.setitem(TRANSITIONS, before, after)
    with pytest.raises((AssertionError, sqlite3.IntegrityError)):
        run_lives(1_000, database=None, phases=[Phase.generate], report_multiple_bugs=False)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), count=st.integers(0, 25), limit=st.integers(1, 7))
def test_pages_show_each_item_once_whatever_comes_between(seed: int, count: int, limit: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        store = Store(Path(folder))
        store.connection.execute("PRAGMA synchronous = OFF")
        held = Jobs(store)
        job = held.create(order())["id"]

        def add() -> None:
            with store.change() as connection:
                events.add(connection, job, f"event {rng.random()}")

        for _ in range(count):
            add()
        there = {row["id"] for row in events.since(store, job, 0)}
        shown: list[str] = []
        after = None
        while True:
            page = events.page(store, job, after, limit)
            shown += [row["id"] for row in page.rows]
            for _ in range(rng.randrange(3)):
                add()
            if not page.has_more:
                break
            after = page.rows[-1]["id"]
        # What came meanwhile is newer than the first page, and so not shown at all.
        assert len(shown) == len(set(shown))
        assert set(shown) == there
        rising = [row["id"] for row in store.page("events", [], after=None, limit=1000, newest_first=False).rows]
        assert shown == [one for one in reversed(rising) if one in there]
        store.close()


def test_metadata_holds_quotes_and_letters_of_any_kind(tmp_path):
    store = Store(tmp_path)
    held = Jobs(store)
    odd = {"k\"'%_é": "v\"\\'\u2028 %"}
    made = held.create(order(metadata=odd))["id"]
    held.create(order(metadata={"k": "v"}))
    assert [row["id"] for row in held.page(odd, None, 10).rows] == [made]
    assert json.loads(held.get(made)["metadata"]) == odd
