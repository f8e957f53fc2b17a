"""Files that come in parts: a folder a part, joined in the order that the client says at the end."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_ft.serve import files, ids
from lora_ft.serve.files import Files
from lora_ft.serve.refusals import RequestError, bad
from lora_ft.serve.store import now
from lora_ft.system import atomicio

MAX_BYTES = 8 << 30
MAX_PART_BYTES = 64 << 20
OPEN_S = 3600

_busy: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""A lock for each upload that something is being done to; ids are made at random, so that no two servers share one."""
_naming = threading.Lock()


def create(held: Files, size: int, filename: str, purpose: str, keep_s: int | None) -> dict[str, Any]:
    """Returns a new upload of so many bytes."""
    upload_id, made = ids.new("upload_"), now()
    with held.store.change() as connection:
        connection.execute(
            "INSERT INTO uploads(id, filename, purpose, bytes, created_at, expires_at, status, keep_s) "
            "VALUES (?, ?, ?, ?, ?, ?, 'pending', ?)",
            (upload_id, filename, purpose, size, made, made + OPEN_S, keep_s),
        )
    return _public(held, upload_id)


def pending(held: Files, upload_id: str) -> sqlite3.Row:
    """Returns an upload that parts can be added to. Raises RequestError for any other."""
    row = _get(held, upload_id)
    if _status(row) != "pending":
        told = f"Upload {upload_id} is {_status(row)}; only a pending one can be changed: create another."
        raise RequestError(400, told, code="invalid_upload_state", param="upload_id")
    return row


def add_part(held: Files, upload_id: str, part_id: str, draft: atomicio.Draft, size: int) -> dict[str, Any]:
    """Returns the part that the draft holds, kept."""
    if size == 0:
        raise bad("data", "The part is empty; send at least one byte.")
    made = now()
    with _alone(upload_id):
        row = pending(held, upload_id)
        there = held.store.all("SELECT bytes FROM parts WHERE upload_id = ?", upload_id)
        total = size + sum(part["bytes"] for part in there)
        if total > row["bytes"]:
            told = f"The parts have {total} bytes, more than the {row['bytes']} that the upload was made for."
            raise bad("data", told)
        atomicio.make_folder(held.folder / upload_id)
        # Brought to the disk before the database is held: whoever else writes there waits for no part.
        draft.commit(held.folder / upload_id / part_id)
        with held.store.change() as connection:
            connection.execute(
                "INSERT INTO parts(id, upload_id, bytes, created_at) VALUES (?, ?, ?, ?)",
                (part_id, upload_id, size, made),
            )
    return {"id": part_id, "object": "upload.part", "created_at": made, "upload_id": upload_id}


def complete(held: Files, upload_id: str, part_ids: list[str], md5: str | None) -> dict[str, Any]:
    """Returns the upload with its file, the parts of which are named in order.

    Raises:
        RequestError: a part is not of this upload, or the bytes or their MD5 are others than were told.
    """
    with _alone(upload_id):
        # A retried request waits for the first one, and has its answer.
        if _get(held, upload_id)["status"] != "completed":
            _join(held, pending(held, upload_id), part_ids, md5)
        return _public(held, upload_id)


def _join(held: Files, row: sqlite3.Row, part_ids: list[str], md5: str | None) -> None:
    """Makes the file of an upload of its parts."""
    upload_id = row["id"]
    known = {part["id"] for part in held.store.all("SELECT id FROM parts WHERE upload_id = ?", upload_id)}
    wrong = [part for part in part_ids if part not in known]
    if wrong or len(set(part_ids)) < len(part_ids):
        told = f"{wrong[0][:64]!r} is no part of {upload_id}" if wrong else "a part is named twice"
        raise bad("part_ids", f"part_ids: {told}; name each part once, in the order of the file.")
    file_id, digest = ids.new("file-", 22), hashlib.md5(usedforsecurity=False)
    with held.draft(file_id) as draft:
        size = 0
        for part in part_ids:
            path = held.folder / upload_id / part / files.ROWS
            draft.copy(path)
            size += path.stat().st_size
            with path.open("rb") as stream:
                while chunk := stream.read(atomicio.CHUNK):
                    digest.update(chunk)
        if size != row["bytes"]:
            raise bad("part_ids", f"The parts have {size} bytes, and the upload was made for {row['bytes']}.")
        if md5 is not None and md5.lower() != digest.hexdigest():
            raise bad("md5", f"The MD5 of the parts is {digest.hexdigest()}, not {md5}: upload them again.")
        if row["purpose"] == files.FINE_TUNE:
            files.refuse_other_formats(draft.path / files.ROWS)
        draft.commit(held.folder / file_id)
    with held.store.change() as connection:
        connection.execute("UPDATE uploads SET status = 'completed', file_id = ? WHERE id = ?", (file_id, upload_id))
        files.insert(connection, file_id, row["filename"], row["purpose"], size, row["keep_s"])
    _let_go(held, upload_id)


def cancel(held: Files, upload_id: str) -> dict[str, Any]:
    """Returns the upload, cancelled."""
    with _alone(upload_id):
        if _get(held, upload_id)["status"] != "cancelled":
            pending(held, upload_id)
            _end(held, upload_id, "cancelled")
        return _public(held, upload_id)


def expire(held: Files) -> None:
    """Ends the uploads whose time is over, but for those that something is being done to."""
    over = held.store.all("SELECT id FROM uploads WHERE status = 'pending' AND expires_at <= ?", now())
    for row in over:
        with _alone(row["id"], waits=False) as is_ours:
            if is_ours and _status(_get(held, row["id"])) == "expired":
                _end(held, row["id"], "expired")


@contextmanager
def _alone(upload_id: str, waits: bool = True) -> Iterator[bool]:
    """Yields whether this thread alone changes an upload in the block, having waited for its turn."""
    with _naming:
        turn = _busy.setdefault(upload_id, threading.Lock())
    taken = turn.acquire(blocking=waits)
    try:
        yield taken
    finally:
        if taken:
            turn.release()


def _get(held: Files, upload_id: str) -> sqlite3.Row:
    row = held.store.one("SELECT * FROM uploads WHERE id = ?", ids.checked(upload_id, _missing))
    if row is None:
        raise _missing(upload_id)
    return row


def _status(row: sqlite3.Row) -> str:
    is_over = row["status"] == "pending" and row["expires_at"] <= now()
    return "expired" if is_over else str(row["status"])


def _end(held: Files, upload_id: str, status: str) -> None:
    with held.store.change() as connection:
        connection.execute("UPDATE uploads SET status = ? WHERE id = ?", (status, upload_id))
    _let_go(held, upload_id)


def _missing(upload_id: str) -> RequestError:
    return RequestError(404, f"No such Upload object: {upload_id}", param="upload_id")


def _let_go(held: Files, upload_id: str) -> None:
    """Removes the parts, which are in the file now or nowhere."""
    if (held.folder / upload_id).is_dir():
        atomicio.remove(held.folder / upload_id)


def _public(held: Files, upload_id: str) -> dict[str, Any]:
    row = _get(held, upload_id)
    made = held.store.one("SELECT * FROM files WHERE id = ?", row["file_id"]) if row["file_id"] else None
    return {
        "id": row["id"],
        "object": "upload",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": _status(row),
        "file": files.public(made) if made else None,
    }
