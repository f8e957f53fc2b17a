"""What a server holds that requests can name: each time made anew, in the state in which the request is of use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_ft.serve import events, ids, jobs, models
from lora_ft.serve.states import CANCELLED, PAUSED, QUEUED, RUNNING
from tests.in_process import FORM, Client, form

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
ACTIONS = {"cancel": (), "pause": (QUEUED, RUNNING), "resume": (QUEUED, RUNNING, PAUSED)}
MESSAGES = [{"role": "user", "content": "a"}]
# What a request of each endpoint cannot do without.
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/files": {"file": ROW, "purpose": "fine-tune"},
    "POST /v1/uploads": {"bytes": 9, "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"},
    "POST /v1/uploads/{upload_id}/parts": {"data": ROW},
    "POST /v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 2},
    "POST /v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 2},
}


class Things:
    """Makes what requests name."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def path(self, operation: str) -> dict[str, str]:
        """Returns the ids in the path of a request."""
        if "{job_id}" in operation and (action := operation.rpartition("/")[2]) in ACTIONS:
            return {"job_id": self.job(*ACTIONS[action])}
        if "{job_id}" in operation:
            # What follows the events of a job waits for its end.
            return {"job_id": self.job(CANCELLED)}
        if "{upload_id}" in operation:
            return {"upload_id": self.upload(operation.endswith("/complete"))}
        if "{file_id}" in operation:
            return {"file_id": self.file()}
        if "{model}" in operation:
            return {"model": self.model() if operation.startswith("DELETE") else "tiny"}
        return {}

    def after(self, operation: str, path: dict[str, str]) -> str | None:
        """Returns an id that stands in the list that is asked for; None where it is none of pages."""
        if operation == "GET /v1/files":
            return self.file()
        if operation == "GET /v1/fine_tuning/jobs":
            return self.job()
        if operation.endswith("/events"):
            return str(events.since(self.client.state.store, path["job_id"], 0)[0]["id"])
        return self.checkpoint(path["job_id"]) if operation.endswith("/checkpoints") else None

    def body(self, operation: str, path: dict[str, str]) -> dict[str, Any] | None:
        """Returns the least that a request must say, where it says anything."""
        if operation in ("POST /v1/fine_tuning/jobs", "POST /v1/fine_tuning/validate"):
            return {"model": "tiny", "training_file": self.file()}
        if operation.endswith("/complete"):
            query = "SELECT id FROM parts WHERE upload_id = ?"
            return {"part_ids": [row["id"] for row in self.client.state.store.all(query, path["upload_id"])]}
        return BODIES.get(operation)

    def file(self) -> str:
        """Returns the id of a new file."""
        return str(self.client.upload(ROW)[1]["id"])

    def job(self, *states: str) -> str:
        """Returns the id of a new job that went through some states."""
        job = str(self.client.job()["id"])
        for state in states:
            with self.client.state.store.change() as connection:
                jobs.change_state(connection, job, state)
        return job

    def upload(self, whole: bool) -> str:
        """Returns the id of a new upload, with its only part or with room for some."""
        body = {**BODIES["POST /v1/uploads"], "bytes": len(ROW) if whole else 1 << 20}
        upload = str(self.client("POST", "/v1/uploads", body)[1]["id"])
        if whole:
            self.client("POST", f"/v1/uploads/{upload}/parts", form(ROW, "data"), FORM)
        return upload

    def model(self) -> str:
        """Returns the name of a new fine-tuned model."""
        job = self.job(CANCELLED)
        place = Path(self.client.state.store.home, "runs", job)
        place.mkdir(parents=True)
        name = models.fine_tuned_name("tiny", None, job[-8:])
        with self.client.state.store.change() as connection:
            models.register(connection, name, "tiny", place, self.client.state.store.home, job, 1)
        return name

    def checkpoint(self, job: str) -> str:
        """Returns the id of a new checkpoint of a job."""
        made = ids.new("ftckpt_")
        with self.client.state.store.change() as connection:
            names = "id, job_id, created_at, step, model, metrics"
            connection.execute(f"INSERT INTO checkpoints({names}) VALUES (?, ?, 1, 1, 'ft:x', '{{}}')", (made, job))
        return made
