"""Names of models: the bases of this server, the names that stand for them, and what its jobs have made.

`models.json` in the server's folder says which bases there are and which names scripts may call them by; it is written
at the first start, for people to change.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.foreign.files import object_of
from lora_ft.serve import leftovers
from lora_ft.serve.refusals import RequestError, no_model
from lora_ft.serve.states import FINAL
from lora_ft.serve.store import Store
from lora_ft.system import atomicio

log = logging.getLogger(__name__)

TABLE = "models.json"
OWNER, ORGANIZATION = "org-local", "local"
BASE = "smollm2-135m"
HOSTED = (
    "gpt-4o-mini-2024-07-18", "gpt-4o-mini", "gpt-4o-2024-08-06", "gpt-4o", "gpt-4.1-2025-04-14", "gpt-4.1",
    "gpt-4.1-mini-2025-04-14", "gpt-4.1-mini", "gpt-4.1-nano-2025-04-14", "gpt-4.1-nano", "gpt-3.5-turbo",
    "gpt-3.5-turbo-0125", "gpt-3.5-turbo-1106", "gpt-3.5-turbo-0613", "babbage-002", "davinci-002",
)  # fmt: skip
"""What could be fine-tuned where this API comes from, and so stands in scripts."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", re.ASCII)
SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Model:
    """A model that can be asked, or trained on."""

    name: str
    """What it is called by."""
    base: str
    """The key of its base in the table."""
    source: str
    """What `sources.resolve` takes for that base."""
    adapter: str | None = None
    """The adapter's folder, relative to the server's."""


@dataclass(frozen=True)
class Table:
    """What `models.json` says."""

    bases: dict[str, str]
    """Names of bases, and what `sources.resolve` takes for each."""
    aliases: dict[str, str]
    """Other names, or patterns of them, and the base that each stands for."""

    def base_of(self, name: str) -> str | None:
        """Returns the base that a name means, itself or through another name; None for all that are unknown."""
        if name in self.bases:
            return name
        if name in self.aliases:
            return self.aliases[name]
        return next(
            (base for pattern, base in self.aliases.items() if "*" in pattern and fnmatchcase(name, pattern)), None
        )


class Models:
    """All models of a server. Its table is read again when it was changed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.path = store.home / TABLE
        if not self.path.exists():
            table = {"bases": {BASE: BASE}, "aliases": dict.fromkeys(HOSTED, BASE)}
            atomicio.write_json(self.path, table)
        self._seen = self._state()
        self._table = self._read()
        self._turn = threading.Lock()

    @property
    def table(self) -> Table:
        """The table as it stands in the folder; the last one that was right, where what stands there is wrong."""
        with self._turn:
            if (state := self._state()) != self._seen:
                self._seen = state
                try:
                    self._table = self._read()
                    log.info("%s was changed, and is read again", self.path)
                except LoraFtError as error:
                    log.warning("the change is not taken over until it is mended: %s", error)
            return self._table

    def resolve(self, name: str) -> Model:
        """Returns the model of a name. Raises RequestError where there is none."""
        table = self.table
        base = table.base_of(name)
        if base is not None:
            return Model(name, base, table.bases[base])
        row = self.store.one("SELECT * FROM models WHERE id = ?", name)
        if row is None:
            listed = ", ".join(table.bases)
            raise no_model(printable(name), f" This server has the bases {listed}; {TABLE} in its folder names them.")
        if row["base"] not in table.bases:
            raise RequestError(400, f"The base {row['base']} is no longer in {TABLE}: put it back.", param="model")
        return Model(name, row["base"], table.bases[row["base"]], row["folder"])

    def list(self) -> list[dict[str, Any]]:
        """Returns the model objects of the API: bases, other names for them, then what jobs made, the newest first."""
        made, table = int(self.store.get("made_at") or 0), self.table
        plain = [public(name, made) for name in table.bases]
        other = [public(name, made, root=base) for name, base in table.aliases.items() if "*" not in name]
        rows = self.store.all("SELECT * FROM models ORDER BY n DESC")
        return [*plain, *other, *map(of_row, rows)]

    def get(self, name: str) -> dict[str, Any]:
        """Returns one model object. Raises RequestError where there is none."""
        model = self.resolve(name)
        if model.adapter is None:
            root = None if model.base == name else model.base
            return public(name, int(self.store.get("made_at") or 0), root=root)
        row = self.store.one("SELECT * FROM models WHERE id = ?", name)
        if row is None:
            raise no_model(printable(name))
        return of_row(row)

    def delete(self, name: str) -> None:
        """Forgets a fine-tuned model or checkpoint. Raises RequestError for any other, and while a job needs it."""
        model = self.resolve(name)
        if model.adapter is None:
            raise RequestError(
                400, f"{name} is a base of this server; only fine-tuned models can be deleted.", param="model"
            )
        with self.store.change() as connection:
            job = connection.execute(
                f"SELECT id FROM jobs WHERE status NOT IN {FINAL} AND (parent = ? OR id = "
                "(SELECT job_id FROM models WHERE id = ?))",
                (name, name),
            ).fetchone()
            if job:
                raise RequestError(400, f"{name} belongs to {job['id']}, which has not ended: cancel that job first.")
            leftovers.add(connection, Path(model.adapter))
            connection.execute("DELETE FROM models WHERE id = ?", (name,))
        leftovers.clear(self.store)

    def _state(self) -> tuple[int, int, int] | None:
        """Returns what changes with the file, None where it is not there."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> Table:
        table = object_of(self.path, ConfigError)
        problems = [
            f"it needs an object {key!r}" for key in ("bases", "aliases") if not isinstance(table.get(key), dict)
        ]
        if not problems:
            named = [*table["bases"].items(), *table["aliases"].items()]
            problems += [f"{key!r} must name a string" for key, value in named if not isinstance(value, str)]
            problems += [
                f"{key!r} is no name for a base: letters, digits, and . _ - / between them"
                for key in table["bases"]
                if not NAME.fullmatch(key) or ".." in key
            ]
            problems += [
                f"the alias {key!r} stands for {value!r}, which is not among the bases"
                for key, value in table["aliases"].items()
                if value not in table["bases"]
            ]
        if problems:
            raise ConfigError(f"{self.path}: {'; '.join(problems)}.")
        return Table(dict(table["bases"]), dict(table["aliases"]))


def fine_tuned_name(base: str, suffix: str | None, tail: str) -> str:
    """Returns the name of what a job makes, of five parts with colons between: scripts take it apart so."""
    return f"ft:{base}:{ORGANIZATION}:{suffix or ''}:{tail}"


def checkpoint_name(model: str, step: int) -> str:
    """Returns the name of a checkpoint of a job."""
    return f"{model}:ckpt-step-{step}"


def register(
    connection: sqlite3.Connection, name: str, base: str, folder: Path, home: Path, job_id: str, made: int
) -> None:
    """Writes the row of a model whose folder is whole."""
    connection.execute(
        "INSERT INTO models(id, created_at, base, folder, job_id) VALUES (?, ?, ?, ?, ?)",
        (name, made, base, folder.relative_to(home).as_posix(), job_id),
    )


def public(name: str, created: int, root: str | None = None, **more: Any) -> dict[str, Any]:
    """Returns the model object of the API; `root` is the base that stands behind a name."""
    told = {"id": name, "object": "model", "created": created, "owned_by": OWNER}
    return told | ({"root": root} if root else {}) | more


def of_row(row: sqlite3.Row) -> dict[str, Any]:
    """Returns the model object of what a job made."""
    return public(row["id"], row["created_at"], root=row["base"], parent=row["base"], job=row["job_id"])


def printable(name: str) -> str:
    """Returns a name of a request as it may stand in an answer: not longer than any name is."""
    return name if len(name) <= 256 else name[:256] + "..."
