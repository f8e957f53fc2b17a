"""Jobs in the database: made once, taken from state to state, told to clients as OpenAI's API tells them."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ft.serve import events, hyperparameters, ids, leftovers
from lora_ft.serve.models import OWNER
from lora_ft.serve.refusals import RequestError, bad, no_job
from lora_ft.serve.states import (
    ACTIONS,
    CANCELLED,
    DONE_ALREADY,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    VALIDATING,
    legal,
)
from lora_ft.serve.store import Page, Store, dumps, now

NO_ERROR = {"code": None, "message": None, "param": None}
"""Scripts read `job.error.code` unguarded, so there is an object where nothing is wrong, as the hosted service has."""
LISTED = 100
# How long it is kept what requests have made jobs.
KEPT_S = 86_400.0


@dataclass(frozen=True)
class Order:
    """A checked request for a job."""

    asked: str
    """The model as the script names it."""
    model: str
    """The base that it means."""
    source: str
    """What `sources.resolve` takes for that base: the job trains on it, whatever `models.json` says later."""
    training_file: str
    values: dict[str, Any]
    """Hyperparameters, numbers or `auto`."""
    seed: int
    parent: str | None = None
    """The fine-tuned model to go on from."""
    validation_file: str | None = None
    suffix: str | None = None
    extensions: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def warnings(self) -> dict[str, str]:
        """What the client should know of it, though it can be met; each under a mark."""
        told = {}
        if self.asked not in (self.model, self.parent):
            told["substituted"] = (
                f"{self.asked} stands for {self.model} on this server (models.json): that is what is trained."
            )
        if self.integrations:
            told["unreported"] = "Nothing is reported to Weights & Biases: this server sends nothing to anybody."
        return told


@dataclass(frozen=True)
class Sent:
    """What tells that a request for a job is another one, sent again."""

    key: str
    """The same for both."""
    body: str
    """A digest of what was sent under that key."""
    repeats: bool
    """Whether it says itself that it may be a repetition."""
    since: float
    """When the other came at the earliest, in seconds since 1970."""


def public(row: sqlite3.Row) -> dict[str, Any]:
    """Returns the job object of the API."""
    values = json.loads(row["hyperparameters"])
    extensions = json.loads(row["extensions"])
    method = hyperparameters.method_of(values)
    return {
        "id": row["id"],
        "object": "fine_tuning.job",
        "model": row["model"],
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
        "fine_tuned_model": row["fine_tuned_model"],
        "organization_id": OWNER,
        "result_files": [row["result_file"]] if row["result_file"] else [],
        "status": row["status"],
        "validation_file": row["validation_file"],
        "training_file": row["training_file"],
        # As the API has it, they stand in the method alone but for the method that was there first.
        "hyperparameters": values if method == hyperparameters.SUPERVISED else None,
        "trained_tokens": row["trained_tokens"],
        "error": json.loads(row["error"]) if row["error"] else NO_ERROR,
        "user_provided_suffix": row["suffix"],
        "seed": row["seed"],
        "estimated_finish": row["estimated_finish"] if row["status"] == RUNNING else None,
        "integrations": json.loads(row["integrations"]),
        "metadata": json.loads(row["metadata"]) if row["metadata"] else None,
        "usage_metrics": None,
        "shared_with_openai": False,
        "step": row["step"],
        "total_steps": row["total_steps"],
        "method": {"type": method, method: {"hyperparameters": {**values, **extensions}}},
    }


class Jobs:
    """The jobs of a server."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def create(self, order: Order, sent: Sent | None = None) -> sqlite3.Row:
        """Returns a new job, or the one that the same request has made already.

        A first try that a repetition of it has overtaken is known by that one's having come while it was under way.

        Args:
            sent: it and the job are written together, so that there is never a second.

        Raises:
            RequestError: another body was sent under the same key.
        """
        job_id = ids.new("ftjob-")
        with self.store.change() as connection:
            if sent is not None:
                connection.execute("DELETE FROM requests WHERE created_at < ?", (time.time() - KEPT_S,))
                known = connection.execute("SELECT * FROM requests WHERE key = ?", (sent.key,)).fetchone()
                if known and known["created_at"] >= sent.since and (sent.repeats or known["repeats"]):
                    if known["body"] != sent.body:
                        told = f"Another request came with the same Idempotency-Key, and made {known['job_id']}"
                        raise bad(None, f"{told}: give each request a key of its own.", "idempotency_key_reused")
                    return self._row(connection, known["job_id"])
                values = (sent.key, sent.body, sent.repeats, time.time(), job_id)
                connection.execute("INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?)", values)
            connection.execute(
                "INSERT INTO jobs(id, created_at, asked, model, source, parent, training_file, validation_file, "
                "suffix, seed, hyperparameters, extensions, metadata, integrations, status) VALUES "
                "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job_id, now(), order.asked, order.model, order.source, order.parent, order.training_file,
                    order.validation_file, order.suffix, order.seed, dumps(order.values), dumps(order.extensions),
                    None if order.metadata is None else dumps(order.metadata), dumps(order.integrations), VALIDATING,
                ),
            )  # fmt: skip
            events.add(connection, job_id, f"Created fine-tuning job: {job_id}", mark="created")
            for mark, told in order.warnings.items():
                events.add(connection, job_id, told, level="warn", mark=mark)
            both = f" and validation file: {order.validation_file}" if order.validation_file else ""
            told = f"Validating training file: {order.training_file}{both}"
            events.add(connection, job_id, told, mark="validating")
            return self._row(connection, job_id)

    def get(self, job_id: str) -> sqlite3.Row:
        """Returns a job. Raises RequestError where there is none."""
        row = self.store.one("SELECT * FROM jobs WHERE id = ?", ids.checked(job_id, no_job))
        if row is None:
            raise no_job(job_id)
        return row

    def page(self, metadata: dict[str, str] | None, after: str | None, limit: int) -> Page:
        """Returns a stretch of the jobs, newest first, that have all pairs of `metadata`; {} means none at all."""
        where: list[tuple[str, Any]] = []
        for name, value in (metadata or {}).items():
            pair = dumps([name, value])
            test = (
                "EXISTS (SELECT 1 FROM json_each(metadata) AS held, (SELECT ? AS pair) WHERE "
                "held.key = json_extract(pair, '$[0]') AND held.value = json_extract(pair, '$[1]'))"
            )
            where.append((f"metadata IS NOT NULL AND {test}", pair))
        if metadata == {}:
            where.append(("metadata IS NULL AND 1 = ?", 1))
        return self.store.page("jobs", where, after=after, limit=limit)

    def ask(self, job_id: str, action: str) -> sqlite3.Row:
        """Returns the job after a client asked to `cancel`, `pause` or `resume` it.

        Cancelling is done at once, whoever works on the job; pausing is noted, and done by who works on it.

        Raises:
            RequestError: the state of the job does not allow it; what is the case already is no error.
        """
        self.get(job_id)
        with self.store.change() as connection:
            row = self._row(connection, job_id)
            state = row["status"]
            if action == "resume" and row["wanted"] == "pause":
                connection.execute("UPDATE jobs SET wanted = 'resume' WHERE id = ?", (job_id,))
                events.add(connection, job_id, "The job goes on: it was resumed before it was paused")
                return self._row(connection, job_id)
            if state in DONE_ALREADY[action] and action not in ACTIONS.get(state, ()):
                return row
            if action not in ACTIONS.get(state, ()):
                message = (
                    f"Job {job_id} is {state}, so it cannot be asked to {action}; it can be asked to {legal(state)}."
                )
                raise RequestError(400, message, code="invalid_job_state", param="fine_tuning_job_id")
            if action == "cancel":
                change_state(connection, job_id, CANCELLED, finished_at=now())
                events.add(connection, job_id, "The job has been cancelled", mark="ended")
            elif action == "pause":
                connection.execute("UPDATE jobs SET wanted = 'pause' WHERE id = ?", (job_id,))
            else:
                change_state(connection, job_id, QUEUED)
                events.add(connection, job_id, "The job has been resumed and waits in the queue")
            return self._row(connection, job_id)

    def recover(self) -> list[str]:
        """Returns the jobs that were running when the last server ended; they wait in the queue again."""
        with self.store.change() as connection:
            rows = connection.execute("SELECT * FROM jobs WHERE status = ?", (RUNNING,)).fetchall()
            for row in rows:
                back_to_queue(connection, row, "the server ended before the job did")
            # Whoever may still be validating for the last server writes no more.
            connection.execute("UPDATE jobs SET attempt = attempt + 1 WHERE status = ?", (VALIDATING,))
        return [row["id"] for row in rows]

    @staticmethod
    def _row(connection: sqlite3.Connection, job_id: str) -> sqlite3.Row:
        return connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()


def change_state(connection: sqlite3.Connection, job_id: str, state: str, **fields: Any) -> None:
    """Takes a job to another state; the database holds it to the table of transitions.

    What a job would go on from is not needed once it has failed or was cancelled.
    """
    if state in (FAILED, CANCELLED):
        leftovers.add(connection, Path(leftovers.RUNS, job_id))
    settings = {"status": state, "wanted": None, "estimated_finish": None, **fields}
    names = ", ".join(f"{name} = ?" for name in settings)
    connection.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*settings.values(), job_id))


def back_to_queue(connection: sqlite3.Connection, row: sqlite3.Row, why: str) -> None:
    """Puts a job whose process ended back into the queue, and says so; one that was to be paused is paused."""
    paused = row["wanted"] == "pause"
    change_state(connection, row["id"], PAUSED if paused else QUEUED, attempt=row["attempt"] + 1)
    where = (
        f"it goes on from its last checkpoint, having reached step {row['step']}" if row["step"] else "it starts anew"
    )
    told = f"The job was interrupted: {why}. It is {'paused' if paused else 'queued again'}; {where}."
    events.add(connection, row["id"], told, level="warn")


def fail(connection: sqlite3.Connection, job_id: str, code: str, message: str, param: str | None = None) -> None:
    """Ends a job with an error."""
    error = {"code": code, "message": message, "param": param}
    change_state(connection, job_id, FAILED, finished_at=now(), error=dumps(error))
    events.add(connection, job_id, f"The job failed: {message}", level="error", data=error, mark="ended")


def next_to_run(store: Store, but: tuple[str, ...] = ()) -> sqlite3.Row | None:
    """Returns the oldest job that waits for a device."""
    rows = store.all("SELECT * FROM jobs WHERE status = ? ORDER BY n", QUEUED)
    return next((row for row in rows if row["id"] not in but), None)
