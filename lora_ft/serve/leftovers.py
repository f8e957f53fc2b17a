"""Folders of a server that nobody needs any more: removed when that is known, and looked for at the start."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from lora_ft.errors import BusyError, StorageError
from lora_ft.serve.states import FINAL
from lora_ft.serve.store import Store
from lora_ft.system import atomicio, locks

log = logging.getLogger(__name__)

RUNS, CHECKPOINTS, CONFIGS = "runs", "checkpoints", "jobs"
"""In the server's folder: each with a folder a job in it."""


def add(connection: sqlite3.Connection, folder: Path) -> None:
    """Notes a folder of the server's that `clear` is to remove, with what makes it needless in one transaction."""
    connection.execute("INSERT OR IGNORE INTO leftovers VALUES (?)", (folder.as_posix(),))


def clear(store: Store) -> None:
    """Removes the folders that the database says are not needed; one that a process still holds waits for it."""
    for row in store.all("SELECT folder FROM leftovers"):
        try:
            _remove(store.home / row["folder"])
        except BusyError:
            continue
        except StorageError as error:
            log.warning("%s stays until the next start: %s", row["folder"], error)
        with store.change() as connection:
            connection.execute("DELETE FROM leftovers WHERE folder = ?", (row["folder"],))


def sweep(store: Store) -> None:
    """Removes the folders of jobs that belong to no row. For the start only, when no model is being made."""
    over = {row["id"]: row["status"] in FINAL for row in store.all("SELECT id, status FROM jobs")}
    models = {row["folder"] for row in store.all("SELECT folder FROM models")}
    for room in (RUNS, CHECKPOINTS, CONFIGS):
        for place in _inside(store.home / room):
            job_id = left[2] if (left := atomicio.LEFT.fullmatch(place.name)) else place.name
            if over.get(job_id) is False or (room == CONFIGS and place.name in over):
                continue
            inner = _inside(place) if room == CHECKPOINTS else [place]
            gone = [one for one in inner if one.relative_to(store.home).as_posix() not in models]
            for folder in [place] if len(gone) == len(inner) else gone:
                try:
                    _remove(folder)
                except (BusyError, StorageError) as error:
                    log.warning("%s stays until the next start: %s", folder, error)


def _inside(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.is_dir() else []


def _remove(place: Path) -> None:
    """Removes a folder that may not be there. Raises BusyError while a process trains into it."""
    if place.is_dir():
        with locks.run_folder(place):
            atomicio.remove(place)
