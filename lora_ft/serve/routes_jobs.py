"""Routes of fine-tuning jobs: made, listed, asked to pause, resume or end; their events and checkpoints."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import random
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from lora_ft.serve import checks, events, files, hyperparameters, jobs
from lora_ft.serve.bodies import Body, documented, parse, raw
from lora_ft.serve.models import SUFFIX
from lora_ft.serve.refusals import RequestError, bad
from lora_ft.serve.state import Server, State
from lora_ft.serve.states import FINAL, RUNNING

router = APIRouter(prefix="/v1/fine_tuning")
MAX_SEED = 2**31 - 1
# How long a client that pauses a job is kept waiting for the step to end, and how often the job is looked at.
PAUSE_WAIT_S, LOOK_S = 20.0, 0.1
PING_S = 15
RETRIES = "x-stainless-retry-count"
# A client's own retries come within seconds; a script that is started again is another matter.
SAME_REQUEST_S = 600.0


class Method(Body):
    """How to train."""

    type: str
    supervised: dict[str, Any] | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class Wandb(Body):
    """Where a job would be reported to, at Weights & Biases."""

    project: str = Field(min_length=1, max_length=256)
    name: str | None = Field(None, max_length=256)
    entity: str | None = Field(None, max_length=256)
    tags: list[Annotated[str, Field(max_length=64)]] = Field([], max_length=50)


class Integration(Body):
    """Somebody else's service to report to."""

    type: Literal["wandb"]
    wandb: Wandb

    @property
    def told(self) -> dict[str, Any]:
        """The integration as the job tells it: there is no run, for nothing is reported."""
        return {"type": self.type, "wandb": {**self.wandb.model_dump(), "run_id": None}}


class NewJob(Body):
    """A request for a job."""

    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=64)
    validation_file: str | None = Field(None, max_length=64)
    hyperparameters: dict[str, Any] | None = None
    suffix: str | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    method: Method | None = None
    integrations: list[Integration] | None = Field(None, max_length=5)
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )


@router.post("/jobs", openapi_extra=documented(NewJob))
async def create_job(request: Request, server: Server) -> dict[str, Any]:
    """Returns the new job, or the one that the same request, sent again, has made already."""
    came = time.time()
    data = await raw(request)
    order = await run_in_threadpool(lambda: _order(server, parse(NewJob, data)))
    row = await run_in_threadpool(server.jobs.create, order, _sent(request, data, came))
    server.queue.wake()
    return jobs.public(row)


@router.post("/validate", openapi_extra=documented(NewJob))
async def validate_job(request: Request, server: Server) -> dict[str, Any]:
    """Returns what a job of the same request would find in its files, as far as that is known before it trains.

    An extension: nothing is made. One is looked at after another, in a process of its own as that of a job is.
    """
    data = await raw(request)
    order = await run_in_threadpool(lambda: _order(server, parse(NewJob, data)))
    while not server.checking.acquire(blocking=False):
        await asyncio.sleep(LOOK_S)
    try:
        return await run_in_threadpool(checks.check, server.models, order)
    finally:
        server.checking.release()


@router.get("/jobs")
def list_jobs(
    request: Request,
    server: Server,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=jobs.LISTED)] = 20,
) -> dict[str, Any]:
    """Returns a page of the jobs, the newest first."""
    found = server.jobs.page(_metadata(request), after, limit)
    return {"object": "list", "data": list(map(jobs.public, found.rows)), "has_more": found.has_more}


@router.get("/jobs/{job_id}")
def get_job(job_id: str, server: Server) -> dict[str, Any]:
    """Returns one job."""
    return jobs.public(server.jobs.get(job_id))


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, server: Server) -> dict[str, Any]:
    """Returns the job, cancelled; whatever body came is not looked at."""
    return jobs.public(await _asked(server, job_id, "cancel"))


@router.post("/jobs/{job_id}/pause")
async def pause_job(job_id: str, server: Server) -> dict[str, Any]:
    """Returns the job once it is paused, or as it is where that takes long."""
    row = await _asked(server, job_id, "pause")
    end = time.monotonic() + PAUSE_WAIT_S
    while row["status"] == RUNNING and row["wanted"] == "pause" and time.monotonic() < end:
        await asyncio.sleep(LOOK_S)
        row = await run_in_threadpool(server.jobs.get, job_id)
    return jobs.public(row)


@router.post("/jobs/{job_id}/resume")
async def resume_job(job_id: str, server: Server) -> dict[str, Any]:
    """Returns the job, which goes on."""
    return jobs.public(await _asked(server, job_id, "resume"))


@router.get("/jobs/{job_id}/events")
def list_events(
    job_id: str,
    server: Server,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=events.EVENTS_LISTED)] = 20,
    stream: bool = False,
) -> Any:
    """Returns a page of a job's events, the newest first; with `stream`, all events behind `after` as they come."""
    server.jobs.get(job_id)
    if stream:
        number = _number(server, job_id, after)
        return EventSourceResponse(_stream(server, job_id, number), ping=PING_S, sep="\n")
    found = events.page(server.store, job_id, after, limit)
    return {"object": "list", "data": list(map(events.public, found.rows)), "has_more": found.has_more}


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    server: Server,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=events.CHECKPOINTS_LISTED)] = 10,
) -> dict[str, Any]:
    """Returns a page of a job's checkpoints, the newest first."""
    server.jobs.get(job_id)
    found = events.checkpoint_page(server.store, job_id, after, limit)
    data = list(map(events.checkpoint, found.rows))
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": found.has_more}


async def _asked(server: State, job_id: str, action: str) -> sqlite3.Row:
    """Returns a job that was asked to do something."""
    row = await run_in_threadpool(server.jobs.ask, job_id, action)
    server.queue.wake()
    return row


def _order(server: State, body: NewJob) -> jobs.Order:
    """Returns a request for a job, checked against what this server has. Raises RequestError."""
    model = server.models.resolve(body.model)
    method, place, given = _hyperparameters(body)
    asked = hyperparameters.read(given, place, method)
    parent = body.model if model.adapter is not None else None
    shape = [name for name in asked.extensions if name.startswith("lora_")]
    if parent and shape:
        told = f"{shape[0]} cannot be set: the job goes on from {parent}, whose adapter has its shape already."
        raise bad(f"{place}.{shape[0]}", told)
    if body.suffix is not None and not SUFFIX.fullmatch(body.suffix):
        rule = "give 1 to 64 of the characters a-z, A-Z, 0-9, - _ and ."
        raise bad("suffix", f"suffix is {body.suffix[:64]!r}; {rule}")
    for name in ("training_file", "validation_file"):
        _check_file(server, name, getattr(body, name))
    if body.validation_file == body.training_file:
        raise bad("validation_file", "validation_file is the training file; give other rows, or leave it out.")
    return jobs.Order(
        asked=body.model,
        model=model.base,
        source=model.source,
        parent=parent,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=random.SystemRandom().randint(0, MAX_SEED) if body.seed is None else body.seed,
        values=asked.values,
        extensions=asked.extensions,
        metadata=body.metadata,
        integrations=[one.told for one in body.integrations or []],
    )


def _hyperparameters(body: NewJob) -> tuple[str, str, dict[str, Any]]:
    """Returns the method of a request, where its hyperparameters stand, and what they are. Raises RequestError."""
    old = body.hyperparameters
    if body.method is None:
        return hyperparameters.SUPERVISED, "hyperparameters", old or {}
    method = body.method.type
    lacks = method == hyperparameters.DPO and importlib.util.find_spec("trl") is None
    if method not in hyperparameters.METHODS or lacks:
        raise hyperparameters.unsupported(method)
    place = f"method.{method}.hyperparameters"
    inner = getattr(body.method, method) or {}
    unknown = [name for name in inner if name != "hyperparameters"]
    if unknown:
        name = f"method.{method}.{unknown[0]}"[:128]
        raise bad(name, f"Unrecognized request argument supplied: {name}", "unknown_parameter")
    new = inner.get("hyperparameters") or {}
    if not isinstance(new, dict):
        raise bad(place, f"{place} must be an object.")
    differ = [name for name in old or {} if name in new and (old or {})[name] != new[name]]
    if differ:
        told = f"hyperparameters.{differ[0]} and {place}.{differ[0]} differ; give it once, in method."
        raise bad(f"hyperparameters.{differ[0]}"[:128], told)
    return method, place, {**(old or {}), **new}


def _check_file(server: State, name: str, file_id: str | None) -> None:
    if file_id is None:
        return
    try:
        row = server.files.get(file_id)
    except RequestError:
        raise bad(name, f"No such File object: {file_id}", "invalid_file") from None
    if row["purpose"] != files.FINE_TUNE:
        told = f"{name} {file_id} has the purpose {row['purpose']}; upload it with the purpose {files.FINE_TUNE}."
        raise bad(name, told, "invalid_file")


def _sent(request: Request, data: bytes, came: float) -> jobs.Sent:
    """Returns what tells that a request is an earlier one sent again.

    The client sends no key of its own. Its first try is kept as it is, and a retry of the same body finds it.
    """
    key = request.headers.get("idempotency-key") or None
    who = request.headers.get("authorization", request.headers.get("api-key", ""))
    body = hashlib.sha256(data).hexdigest()
    same = hashlib.sha256(f"{'body' if key is None else 'key'}\n{who}\n{body if key is None else key}".encode())
    if key is not None:
        return jobs.Sent(same.hexdigest(), body, True, came - jobs.KEPT_S)
    retried = request.headers.get(RETRIES, "0") != "0"
    # Two first tries are two jobs.
    return jobs.Sent(same.hexdigest(), body, retried, came - (SAME_REQUEST_S if retried else 0.0))


def _metadata(request: Request) -> dict[str, str] | None:
    """Returns the pairs that jobs must have, {} for jobs without any, None for all jobs."""
    query = request.query_params
    if query.get("metadata") == "null":
        return {}
    pairs = {name[9:-1]: query[name] for name in query if name.startswith("metadata[") and name.endswith("]")}
    if len(pairs) > 16:
        raise bad("metadata", "metadata has more than 16 pairs; no job has so many.")
    return pairs or None


def _number(server: State, job_id: str, after: str | None) -> int:
    """Returns the row number of an event, 0 where none is named. Raises RequestError for an event of another job."""
    if after is None:
        return 0
    row = server.store.one("SELECT n FROM events WHERE job_id = ? AND id = ?", job_id, after)
    if row is None:
        raise bad("after", f"after is {after[:64]!r}, which is no event of this job.")
    return int(row["n"])


async def _stream(server: State, job_id: str, number: int) -> AsyncIterator[dict[str, str]]:
    """Yields the events behind a row number as they come, until the job has ended."""
    while True:
        # The state first: what is written with a job's end is there once the job has ended.
        ended = (await run_in_threadpool(server.jobs.get, job_id))["status"] in FINAL
        found = await run_in_threadpool(events.since, server.store, job_id, number)
        for row in found:
            number = row["n"]
            yield {"data": json.dumps(events.public(row))}
        if ended and not found:
            yield {"data": "[DONE]"}
            return
        if not found:
            await asyncio.sleep(LOOK_S)
