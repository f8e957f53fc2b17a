"""Files that clients bring and results that jobs leave: a folder each in the server's own, a row each in its database.

A folder is whole before its row is written, and its row is gone before the folder is: what has no row is nothing to
anybody, and is removed at the next start.
"""

from __future__ import annotations

import codecs
import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lora_ft.data.texts import SIGNATURES
from lora_ft.serve import ids
from lora_ft.serve.refusals import RequestError, bad, no_file
from lora_ft.serve.states import FINAL
from lora_ft.serve.store import Page, Store, now
from lora_ft.system import atomicio

FINE_TUNE, RESULTS = "fine-tune", "fine-tune-results"
PURPOSES = (FINE_TUNE, "user_data")
MAX_BYTES = 512 << 20
LISTED = 10_000
KEPT_S = range(3_600, 2_592_001)
ROWS, TABLE = "rows.jsonl", "step_metrics.csv"
NEEDED = f"files.id IN (training_file, validation_file) AND jobs.status NOT IN {FINAL}"


def public(row: sqlite3.Row) -> dict[str, Any]:
    """Returns the file object of the API."""
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        # Old scripts wait for it; a file is looked at when it comes.
        "status": "processed",
        "expires_at": row["expires_at"],
        "status_details": None,
    }


def check_purpose(purpose: Any) -> str:
    """Returns the purpose of a new file. Raises RequestError for those that nothing here reads."""
    if purpose not in PURPOSES:
        raise bad("purpose", f"purpose is {purpose!r}; this server takes {' or '.join(PURPOSES)}.")
    return str(purpose)


def check_keep(seconds: Any) -> int:
    """Returns how long a file is to be kept, in seconds. Raises RequestError."""
    digits = str(seconds) if isinstance(seconds, int | str) and not isinstance(seconds, bool) else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits) in KEPT_S):
        rule = f"give {KEPT_S[0]} to {KEPT_S[-1]} seconds"
        raise bad("expires_after[seconds]", f"expires_after[seconds] is {str(seconds)[:40]!r}; {rule}.")
    return int(digits)


class Files:
    """The files of a server."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.home / "files"

    def draft(self, file_id: str) -> AbstractContextManager[atomicio.Draft]:
        """Returns the draft of a file's folder; `add` makes it a file."""
        return atomicio.draft(self.folder / file_id)

    def add(
        self, draft: atomicio.Draft, file_id: str, name: str, filename: str, purpose: str, keep_s: int | None = None
    ) -> sqlite3.Row:
        """Returns the row of a new file, whose bytes are under `name` in the draft.

        Raises:
            RequestError: they are not the beginning of a JSONL file, though the purpose calls for one.
        """
        held = draft.path / name
        size = held.stat().st_size
        if purpose == FINE_TUNE:
            refuse_other_formats(held)
        draft.commit(self.folder / file_id)
        with self.store.change() as connection:
            insert(connection, file_id, filename, purpose, size, keep_s)
        return self.get(file_id)

    def get(self, file_id: str) -> sqlite3.Row:
        """Returns the row of a file. Raises RequestError where there is none."""
        row = self.store.one("SELECT * FROM files WHERE id = ?", ids.checked(file_id, no_file))
        if row is None or (row["expires_at"] is not None and row["expires_at"] <= now()):
            raise no_file(file_id)
        return row

    def page(self, purpose: str | None, after: str | None, limit: int, order: str) -> Page:
        """Returns a stretch of the list of files."""
        where = [] if purpose is None else [("purpose = ?", purpose)]
        still = [("(expires_at IS NULL OR expires_at > ?)", now())]
        return self.store.page("files", where, after=after, limit=limit, newest_first=order == "desc", still=still)

    def path(self, row: sqlite3.Row) -> Path:
        """Returns where the bytes of a file are."""
        return self.folder / row["id"] / (TABLE if row["purpose"] == RESULTS else ROWS)

    def delete(self, file_id: str) -> None:
        """Removes a file. Raises RequestError where there is none, or a job still needs it."""
        self.get(file_id)
        with self.store.change() as connection:
            job = connection.execute(
                f"SELECT jobs.id FROM jobs, files WHERE files.id = ? AND {NEEDED}",
                (file_id,),
            ).fetchone()
            if job:
                raise RequestError(
                    400, f"{file_id} is read by {job['id']}, which has not ended: cancel that job first."
                )
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._remove(file_id)

    def clear_up(self) -> None:
        """Removes the files whose time is over."""
        over = f"expires_at <= ? AND NOT EXISTS (SELECT 1 FROM jobs WHERE {NEEDED})"
        with self.store.change() as connection:
            # Not those that a job still needs, whatever the client said when it brought them.
            gone = connection.execute(f"DELETE FROM files WHERE {over} RETURNING id", (now(),)).fetchall()
        for row in gone:
            self._remove(row["id"])

    def sweep(self) -> None:
        """Removes folders without a row. For the start only, when no file is being written."""
        if not self.folder.is_dir():
            return
        atomicio.sweep(self.folder)
        known = {row["id"] for row in self.store.all("SELECT id FROM files")}
        known |= {row["id"] for row in self.store.all("SELECT id FROM uploads WHERE status = 'pending'")}
        for place in self.folder.iterdir():
            if place.name not in known:
                atomicio.remove(place)

    def _remove(self, name: str) -> None:
        if (self.folder / name).is_dir():
            atomicio.remove(self.folder / name)


def insert(
    connection: sqlite3.Connection, file_id: str, filename: str, purpose: str, size: int, keep_s: int | None = None
) -> None:
    """Writes the row of a file whose folder is whole."""
    made = now()
    connection.execute(
        "INSERT INTO files(id, filename, purpose, bytes, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)",
        (file_id, filename, purpose, size, made, None if keep_s is None else made + keep_s),
    )


def refuse_other_formats(path: Path) -> None:
    """Raises RequestError for a file that cannot be JSONL, whatever its name; what is wrong with rows a job says."""
    with path.open("rb") as stream:
        head = stream.read(4096)
    text = head.removeprefix(codecs.BOM_UTF8)
    kind = next((kind for start, kind in SIGNATURES.items() if text.startswith(start)), None)
    if kind is None and (text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in text):
        kind = "UTF-16 or binary"
    if not text.strip():
        raise bad("file", "The file is empty; give JSONL, one JSON object a line.", "invalid_file")
    if kind is not None:
        raise bad("file", f"The file is {kind}; give JSONL in UTF-8, one JSON object a line.", "invalid_file")
    if not text.lstrip().startswith(b"{"):
        found = text.strip()[:20].decode("utf-8", "replace")
        raise bad(
            "file",
            f"Line 1: begins with {found!r}; give JSONL, one JSON object a line, each in {{...}}.",
            "invalid_file",
        )


def safe_name(name: str) -> str:
    """Returns the last part of what a client calls its file, for display: no path, nothing that steers a terminal."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:255] or "file"
