"""The truth of a server: one SQLite database, which several threads and the processes of jobs read and write.

In WAL mode a reader waits for nobody; a writer takes its turn before it reads what it is about to change. The rules
that nothing may break whatever runs, such as which state follows which, are triggers in the database.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import ConfigError
from lora_ft.serve.refusals import bad
from lora_ft.serve.states import FINAL, TRANSITIONS
from lora_ft.system import atomicio

DATABASE = "server.db"
FORMAT = 2
# A writer that waits longer than this for its turn has met a process that hangs.
WAIT_S = 60.0

SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE transitions(before TEXT NOT NULL, after TEXT NOT NULL, PRIMARY KEY(before, after));
CREATE TABLE files(
  n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
  bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE TABLE gone(id TEXT PRIMARY KEY, list TEXT NOT NULL, n INTEGER NOT NULL);
CREATE TRIGGER a_file_that_is_gone_keeps_its_place AFTER DELETE ON files
  BEGIN INSERT INTO gone VALUES (OLD.id, 'files', OLD.n); END;
CREATE TABLE uploads(
  n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
  bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, status TEXT NOT NULL,
  keep_s INTEGER, file_id TEXT);
CREATE TABLE parts(
  n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, upload_id TEXT NOT NULL REFERENCES uploads(id),
  bytes INTEGER NOT NULL, created_at INTEGER NOT NULL);
CREATE TABLE jobs(
  n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created_at INTEGER NOT NULL, finished_at INTEGER,
  asked TEXT NOT NULL, model TEXT NOT NULL, source TEXT NOT NULL, parent TEXT, training_file TEXT NOT NULL,
  validation_file TEXT, suffix TEXT, seed INTEGER NOT NULL, hyperparameters TEXT NOT NULL, extensions TEXT NOT NULL,
  metadata TEXT, integrations TEXT NOT NULL, status TEXT NOT NULL, wanted TEXT, attempt INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0, total_steps INTEGER, estimated_finish INTEGER,
  trained_tokens INTEGER, fine_tuned_model TEXT, result_file TEXT, error TEXT);
CREATE INDEX jobs_by_status ON jobs(status);
CREATE TABLE requests(
  key TEXT PRIMARY KEY, body TEXT NOT NULL, repeats INTEGER NOT NULL, created_at REAL NOT NULL, job_id TEXT NOT NULL);
CREATE TABLE leftovers(folder TEXT PRIMARY KEY);
CREATE TABLE events(
  n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job_id TEXT NOT NULL REFERENCES jobs(id),
  created_at INTEGER NOT NULL, level TEXT NOT NULL, message TEXT NOT NULL, type TEXT NOT NULL, data TEXT,
  mark TEXT, UNIQUE(job_id, mark));
CREATE TABLE steps(
  job_id TEXT NOT NULL REFERENCES jobs(id), step INTEGER NOT NULL, numbers TEXT NOT NULL, PRIMARY KEY(job_id, step));
CREATE TABLE checkpoints(
  n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job_id TEXT NOT NULL REFERENCES jobs(id),
  created_at INTEGER NOT NULL, step INTEGER NOT NULL, model TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE(job_id, step));
CREATE TABLE models(
  n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created_at INTEGER NOT NULL, base TEXT NOT NULL,
  folder TEXT NOT NULL, job_id TEXT NOT NULL REFERENCES jobs(id));
CREATE TRIGGER a_job_that_has_ended_stays BEFORE UPDATE ON jobs WHEN OLD.status IN {final}
  BEGIN SELECT RAISE(ABORT, 'the job has ended'); END;
CREATE TRIGGER a_job_is_never_forgotten BEFORE DELETE ON jobs
  BEGIN SELECT RAISE(ABORT, 'jobs are kept'); END;
CREATE TRIGGER a_job_goes_from_state_to_state BEFORE UPDATE OF status ON jobs
  WHEN NEW.status <> OLD.status
    AND NOT EXISTS (SELECT 1 FROM transitions WHERE before = OLD.status AND after = NEW.status)
  BEGIN SELECT RAISE(ABORT, 'no such transition'); END;
"""


@dataclass(frozen=True)
class Page:
    """A stretch of a list, and whether more follows it."""

    rows: list[sqlite3.Row]
    has_more: bool


class Store:
    """The database in a server's folder. Each thread has a connection of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._threads = threading.local()
        with self.change() as connection:
            made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone()
            if not made:
                self._create(connection)
        known = self.get("format")
        if known != str(FORMAT):
            raise ConfigError(f"{home / DATABASE}: has format {known}; this version reads format {FORMAT}.")

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this thread."""
        held = getattr(self._threads, "connection", None)
        if held is None:
            held = self._threads.connection = self._open()
        return held

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Runs the block as one transaction, which no other writer comes between: all of it is kept, or none."""
        connection = self.connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:
        """Returns the first row of a query, or None."""
        return self.connection.execute(query, values).fetchone()

    def all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Returns every row of a query."""
        return self.connection.execute(query, values).fetchall()

    def page(
        self,
        table: str,
        where: Sequence[tuple[str, Any]],
        *,
        after: str | None,
        limit: int,
        newest_first: bool = True,
        still: Sequence[tuple[str, Any]] = (),
    ) -> Page:
        """Returns the rows of a table that meet all of `where`, from the one behind `after` on, at most `limit`.

        The order is that of their making, whatever the clock said, so that rows made meanwhile shift nothing, nor do
        those that are gone meanwhile.

        Args:
            still: what rows must meet besides, though `after` may have ceased to.

        Raises:
            RequestError: `after` is no id of this list.
        """
        tests, values = [test for test, _ in where], [value for _, value in where]
        if after is not None:
            known = " AND ".join(["id = ?", *tests])
            place = self.one(f"SELECT n FROM {table} WHERE {known}", after, *values)
            place = place or self.one("SELECT n FROM gone WHERE id = ? AND list = ?", after, table)
            if place is None:
                raise bad("after", f"after is {after!r}, which is no id of this list; give the last id of a page.")
            tests.append("n < ?" if newest_first else "n > ?")
            values.append(place["n"])
        tests += [test for test, _ in still]
        values += [value for _, value in still]
        condition = f"WHERE {' AND '.join(tests)}" if tests else ""
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT * FROM {table} {condition} ORDER BY n {order} LIMIT ?"
        rows = self.all(query, *values, limit + 1)
        return Page(rows[:limit], len(rows) > limit)

    def get(self, key: str) -> str | None:
        """Returns what `put` kept under a key, or None."""
        row = self.one("SELECT value FROM meta WHERE key = ?", key)
        return row["value"] if row else None

    def put(self, key: str, value: str) -> None:
        """Keeps a value under a key."""
        with self.change() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def close(self) -> None:
        """Closes the connection of this thread."""
        if (held := getattr(self._threads, "connection", None)) is not None:
            held.close()
            self._threads.connection = None

    def _open(self) -> sqlite3.Connection:
        atomicio.make_folder(self.home)
        connection = sqlite3.connect(self.home / DATABASE, timeout=WAIT_S, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        # A transaction that was told of must be on the disk: what is done next counts on it.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    @staticmethod
    def _create(connection: sqlite3.Connection) -> None:
        statement = ""
        for line in SCHEMA.replace("{final}", str(FINAL)).splitlines():
            statement += line + "\n"
            if sqlite3.complete_statement(statement):
                connection.execute(statement)
                statement = ""
        pairs = [(before, after) for before, afters in TRANSITIONS.items() for after in afters]
        connection.executemany("INSERT INTO transitions VALUES (?, ?)", pairs)
        connection.execute("INSERT INTO meta VALUES ('format', ?)", (str(FORMAT),))


def now() -> int:
    """Returns the time, in whole seconds since 1970, as the API tells times."""
    return int(time.time())


def dumps(value: Any) -> str:
    """Returns compact JSON for a column."""
    return json.dumps(value, separators=(",", ":"))
