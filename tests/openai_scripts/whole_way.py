"""What scripts do with OpenAI's client, from upload to deletion; `test_serve_clients` runs it with three versions.

Nothing in it knows of another server: the address and the key come from the environment, as the client reads them.

python whole_way.py sync|async FOLDER [EPOCHS BATCH_SIZE LEARNING_RATE_MULTIPLIER]
"""

import asyncio
import csv
import io
import json
import sys
import time
from pathlib import Path

import openai

MODEL = "gpt-4o-mini-2024-07-18"
ASK = [{"role": "user", "content": "say abcd"}]
HYPERPARAMETERS = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 20}
ENDED = ("succeeded", "failed", "cancelled")
LIGHT = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"state": {"enum": ["on", "off"]}},
            "required": ["state"],
            "additionalProperties": False,
        },
    },
}
CALL = {
    "messages": ASK,
    "tools": [LIGHT],
    "tool_choice": {"type": "function", "function": {"name": "light"}},
    "max_tokens": 200,
    "temperature": 0,
}


def hold(made):
    """Returns an object of the client, having held it to its own type: the client itself checks nothing.

    Differences, which are the hosted service's own too: a job that has not failed has an error object of nulls,
    `paused` is no status of the type, and a chunk of a completion that goes on has no reason to finish.
    """
    told = made.to_dict(mode="json")
    for one in told["data"] if told.get("object") == "list" else [told]:
        if one["object"] == "fine_tuning.job":
            if set(one["error"].values()) == {None}:
                one["error"] = None
            if one["status"] == "paused":
                one["status"] = "queued"
        if one["object"] == "text_completion":
            for choice in one["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
    type(made).model_validate(told)
    return made


def listed(page) -> list:
    """Returns what is on a page and on those behind it, each held to its type, as the pages are."""
    return [one for each in page.iter_pages() for one in hold(each).data]


def sync(folder: Path) -> None:
    client = openai.OpenAI()
    with (folder / "train.jsonl").open("rb") as stream:
        training = hold(client.files.create(file=stream, purpose="fine-tune"))
    # The second file comes in parts.
    upload = client.uploads.upload_file_chunked(
        file=folder / "valid.jsonl", mime_type="text/jsonl", purpose="fine-tune", part_size=100
    )
    validation = hold(hold(upload).file)
    begun = hold(client.uploads.create(bytes=9, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"))
    hold(client.uploads.parts.create(begun.id, data=b"{}"))
    assert hold(client.uploads.cancel(begun.id)).status == "cancelled"
    assert client.files.content(validation.id).read() == (folder / "valid.jsonl").read_bytes()
    assert client.files.wait_for_processing(training.id).status == "processed"
    assert {training.id, validation.id} <= {file.id for file in listed(client.files.list(purpose="fine-tune", limit=1))}
    job = hold(
        client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=training.id,
            validation_file=validation.id,
            suffix="mine",
            seed=3,
            hyperparameters=HYPERPARAMETERS,
            metadata={"by": "sync"},
        )
    )
    assert job.status in ("validating_files", "queued", "running")
    assert job.id in [one.id for one in listed(client.fine_tuning.jobs.list(limit=1))]
    while job.status not in ENDED:
        time.sleep(0.3)
        job = hold(client.fine_tuning.jobs.retrieve(job.id))
    assert job.status == "succeeded", job.error
    assert job.error.code is None
    assert job.hyperparameters.n_epochs == HYPERPARAMETERS["n_epochs"]
    assert job.trained_tokens > 0

    table = check_table(client.files.content(job.result_files[0]).read().decode())
    events = listed(client.fine_tuning.jobs.list_events(job.id, limit=3))
    said = [event.message for event in events][::-1]
    check_events(said, job, len(table))
    assert len({event.id for event in events}) == len(events)
    checkpoints = listed(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    check_checkpoints(checkpoints, job, len(table))
    assert hold(client.files.retrieve(job.result_files[0])).purpose == "fine-tune-results"

    assert job.fine_tuned_model in [model.id for model in hold(client.models.list()).data]
    for name in (MODEL, job.fine_tuned_model, checkpoints[-1].fine_tuned_model_checkpoint):
        hold(client.models.retrieve(name))
        answer = hold(
            client.chat.completions.create(model=name, messages=ASK, max_tokens=8, temperature=0, logprobs=True)
        )
        check_answer(answer, name)
        stream = client.chat.completions.create(
            model=name, messages=ASK, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        check_stream([hold(chunk) for chunk in stream], answer)
    text = hold(
        client.completions.create(model=job.fine_tuned_model, prompt="abc", max_tokens=4, temperature=0, logprobs=1)
    )
    assert text.usage.completion_tokens <= 4
    pieces = client.completions.create(
        model=job.fine_tuned_model, prompt="abc", max_tokens=4, temperature=0, stream=True
    )
    assert "".join(hold(piece).choices[0].text for piece in pieces) == text.choices[0].text
    answer = hold(client.chat.completions.create(model=job.fine_tuned_model, **CALL))
    stream = client.chat.completions.create(model=job.fine_tuned_model, stream=True, **CALL)
    check_call(answer, [hold(chunk) for chunk in stream])
    check_errors(client, job)

    assert hold(client.models.delete(job.fine_tuned_model)).deleted
    raised(openai.NotFoundError, "model_not_found", lambda: client.models.retrieve(job.fine_tuned_model))
    assert hold(client.files.delete(training.id)).deleted


async def unsync(folder: Path) -> None:
    client = openai.AsyncOpenAI()
    training = hold(await client.files.create(file=folder / "train.jsonl", purpose="fine-tune"))
    begun = hold(await client.uploads.create(bytes=9, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"))
    hold(await client.uploads.parts.create(begun.id, data=b"{}"))
    assert hold(await client.uploads.cancel(begun.id)).status == "cancelled"
    method = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}
    job = hold(
        await client.fine_tuning.jobs.create(model=MODEL, training_file=training.id, method=method, suffix="two")
    )
    assert job.id in [one.id for one in hold(await client.fine_tuning.jobs.list(limit=5)).data]
    while job.status not in ENDED:
        await asyncio.sleep(0.3)
        job = hold(await client.fine_tuning.jobs.retrieve(job.id))
    assert job.status == "succeeded", job.error
    assert job.method.supervised.hyperparameters.n_epochs == HYPERPARAMETERS["n_epochs"]
    table = check_table((await client.files.content(job.result_files[0])).text)
    said = [hold(event).message async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)][::-1]
    check_events(said, job, len(table))
    checkpoints = hold(await client.fine_tuning.jobs.checkpoints.list(job.id)).data
    check_checkpoints(checkpoints, job, len(table), validated=False)
    names = [MODEL, job.fine_tuned_model, *(one.fine_tuned_model_checkpoint for one in checkpoints)]
    ask = {"messages": ASK, "max_tokens": 8, "temperature": 0, "logprobs": True}
    together = await asyncio.gather(*(client.chat.completions.create(model=name, **ask) for name in names))
    for name, answer in zip(names, together, strict=True):
        check_answer(hold(answer), name)
        # In 16 bits a row is rounded otherwise beside others, and one alone is to be held to one alone.
        answer = hold(await client.chat.completions.create(model=name, **ask))
        stream = await client.chat.completions.create(
            model=name, stream=True, stream_options={"include_usage": True}, **ask
        )
        check_stream([hold(chunk) async for chunk in stream], answer)
    answer = hold(await client.chat.completions.create(model=job.fine_tuned_model, **CALL))
    stream = await client.chat.completions.create(model=job.fine_tuned_model, stream=True, **CALL)
    check_call(answer, [hold(chunk) async for chunk in stream])
    other = hold(
        await client.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=training.id, method=method)
    )
    assert hold(await client.fine_tuning.jobs.cancel(other.id)).status == "cancelled"
    assert hold(await client.models.delete(job.fine_tuned_model)).deleted
    assert hold(await client.files.delete(training.id)).deleted


def ask_job(client, job: str, action: str):
    """Returns what a client's method for pausing or resuming a job does."""
    if hasattr(client.fine_tuning.jobs, action):
        return getattr(client.fine_tuning.jobs, action)(job)
    # The first client had none yet: its users send the request themselves.
    return client.post(f"/fine_tuning/jobs/{job}/{action}", cast_to=openai.types.fine_tuning.FineTuningJob)


def check_events(said: list, job, steps: int) -> None:
    assert said[0] == f"Created fine-tuning job: {job.id}"
    assert any(line.startswith(f"Validating training file: {job.training_file}") for line in said)
    for line in ("Files validated, moving job to queued state", "Fine-tuning job started"):
        assert said.count(line) == 1
    told = [f"Step {n}/{steps}" for n in range(1, steps + 1)]
    assert [line.split(":")[0] for line in said if line.startswith("Step ")] == told
    assert [line for line in said if line.startswith("Checkpoint")] == [
        f"Checkpoint created at step {n}" for n in epochs(steps)
    ]
    assert said[-2:] == [f"New fine-tuned model created: {job.fine_tuned_model}", "The job has successfully completed"]


def epochs(steps: int) -> list:
    """Returns the last step of each epoch."""
    each = steps // HYPERPARAMETERS["n_epochs"]
    return list(range(each, steps + 1, each))


def check_checkpoints(checkpoints: list, job, steps: int, validated: bool = True) -> None:
    assert [one.step_number for one in checkpoints] == epochs(steps)[::-1]
    assert {one.fine_tuning_job_id for one in checkpoints} == {job.id}
    assert all(one.metrics.train_loss > 0 for one in checkpoints)
    assert all((one.metrics.full_valid_loss is not None) == validated for one in checkpoints)


def check_table(text: str) -> list:
    """Returns the rows of a result file."""
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert list(rows[0])[:5] == columns
    assert [row["step"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    losses = [float(row["train_loss"]) for row in rows]
    third = len(rows) // 3
    assert sum(losses[-third:]) < sum(losses[:third])
    return rows


def check_answer(answer, name: str) -> None:
    (choice,) = answer.choices
    assert answer.model == name
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert all(token.logprob <= 0 for token in choice.logprobs.content)


def check_stream(chunks: list, answer) -> None:
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        answer.choices[0].finish_reason
    ]
    assert chunks[-1].usage == answer.usage
    assert len({c.id for c in chunks}) == 1


def check_call(answer, chunks: list) -> None:
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "light")
    assert json.loads(call.function.arguments)["state"] in ("on", "off")
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert parts[0].function.name == "light"
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def check_errors(client, job) -> None:
    for kind, code, ask in (
        (openai.NotFoundError, "fine_tune_not_found", lambda: client.fine_tuning.jobs.retrieve("ftjob-nothing")),
        (openai.BadRequestError, "invalid_job_state", lambda: ask_job(client, job.id, "pause")),
        (openai.NotFoundError, "model_not_found", lambda: client.chat.completions.create(model="no", messages=ASK)),
        (
            openai.BadRequestError,
            "invalid_value",
            lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "x"}]),
        ),
        (openai.AuthenticationError, "invalid_api_key", lambda: openai.OpenAI(api_key="sk-wrong").models.list()),
    ):
        raised(kind, code, ask)


def raised(kind, code: str, ask) -> None:
    """Holds that the client raises an error of that kind, with that code and an id to report it by."""
    try:
        ask()
    except kind as error:
        found = error
    assert (found.code, found.request_id[:4]) == (code, "req_")


if __name__ == "__main__":
    way, place, began = sys.argv[1], Path(sys.argv[2]), time.monotonic()
    HYPERPARAMETERS.update(zip(HYPERPARAMETERS, map(int, sys.argv[3:]), strict=False))
    if way == "sync":
        sync(place)
    else:
        asyncio.run(unsync(place))
    print(openai.__version__, way, f"{time.monotonic() - began:.1f}")
