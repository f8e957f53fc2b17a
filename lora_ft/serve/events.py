"""What is told of a job while it goes on: events, the numbers of each step, checkpoints."""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Literal

from lora_ft.serve import ids
from lora_ft.serve.store import Page, Store, dumps, now
from lora_ft.system.redaction import redacted

EVENTS_LISTED, CHECKPOINTS_LISTED = 1000, 100
Level = Literal["info", "warn", "error"]


def add(
    connection: sqlite3.Connection,
    job_id: str,
    message: str,
    *,
    level: Level = "info",
    data: dict[str, Any] | None = None,
    metrics: bool = False,
    mark: str | None = None,
) -> None:
    """Writes an event.

    Args:
        mark: what happens once in the life of a job; a job that goes on after a crash does not tell it again.
    """
    kind = "metrics" if metrics else "message"
    connection.execute(
        "INSERT OR IGNORE INTO events(id, job_id, created_at, level, message, type, data, mark) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            ids.new("ftevent-"), job_id, now(), level, redacted(message), kind,
            redacted(dumps(data)) if data is not None else None, mark,
        ),
    )  # fmt: skip


def public(row: sqlite3.Row) -> dict[str, Any]:
    """Returns the event object of the API."""
    return {
        "object": "fine_tuning.job.event",
        "id": row["id"],
        "created_at": row["created_at"],
        "level": row["level"],
        "message": row["message"],
        "data": json.loads(row["data"]) if row["data"] else {},
        "type": row["type"],
    }


def page(store: Store, job_id: str, after: str | None, limit: int) -> Page:
    """Returns a stretch of a job's events, newest first."""
    return store.page("events", [("job_id = ?", job_id)], after=after, limit=limit)


def since(store: Store, job_id: str, number: int) -> list[sqlite3.Row]:
    """Returns the events of a job behind a row number, oldest first."""
    return store.all("SELECT * FROM events WHERE job_id = ? AND n > ? ORDER BY n LIMIT 1000", job_id, number)


def checkpoint(row: sqlite3.Row) -> dict[str, Any]:
    """Returns the checkpoint object of the API."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": row["id"],
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["model"],
        "fine_tuning_job_id": row["job_id"],
        "step_number": row["step"],
        "metrics": json.loads(row["metrics"]),
    }


def checkpoint_page(store: Store, job_id: str, after: str | None, limit: int) -> Page:
    """Returns a stretch of a job's checkpoints, newest first."""
    return store.page("checkpoints", [("job_id = ?", job_id)], after=after, limit=limit)


REWARDS = (
    "train_reward_margin", "valid_reward_accuracy", "valid_reward_margin", "full_valid_reward_accuracy",
    "full_valid_reward_margin",
)  # fmt: skip


def step_line(numbers: dict[str, Any]) -> str:
    """Returns the message of a step, in the words that scripts look for."""
    parts = [f"training loss={numbers['train_loss']:.2f}"]
    if "valid_loss" in numbers:
        parts.append(f"validation loss={numbers['valid_loss']:.2f}")
    if "full_valid_loss" in numbers:
        parts.append(f"full validation loss={numbers['full_valid_loss']:.2f}")
    return f"Step {numbers['step']}/{numbers['total_steps']}: {', '.join(parts)}"


def table(store: Store, job_id: str) -> str:
    """Returns the CSV of a job's steps: OpenAI's columns in its order, then ours; empty where nothing was measured.

    Of replies that are compared no token is right or wrong: the accuracy is that of the rewards, whose margins follow.
    """
    rows = [
        json.loads(row["numbers"])
        for row in store.all("SELECT numbers FROM steps WHERE job_id = ? ORDER BY step", job_id)
    ]
    compared = any("train_reward_accuracy" in numbers for numbers in rows)
    columns = {
        "step": "step",
        "train_loss": "train_loss",
        "train_accuracy": "train_mean_token_accuracy",
        "valid_loss": "valid_loss",
        "valid_mean_token_accuracy": "valid_mean_token_accuracy",
        "full_valid_loss": "full_valid_loss",
        "full_valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "tokens": "tokens",
        "seconds": "seconds",
    }
    if compared:
        columns["train_accuracy"] = "train_reward_accuracy"
        columns |= {name: name for name in REWARDS}
    lines = [",".join(columns)]
    for numbers in rows:
        lines.append(",".join(_cell(name, numbers.get(key)) for name, key in columns.items()))
    return "\n".join(lines) + "\n"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    # Learning rates vanish in five decimals.
    return f"{value:.6g}" if name == "learning_rate" else f"{value:.5f}"
