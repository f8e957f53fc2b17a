"""What scripts do with OpenAI's client, from upload to deletion; `test_serve_clients` runs it with three versions.

Nothing in it knows of another server: the address and the key come from the environment, as the client reads them.
"""

import asyncio
import csv
import io
import sys
import time
from pathlib import Path

import openai

MODEL = "gpt-4o-mini-2024-07-18"
ASK = [{"role": "user", "content": "say abcd"}]


def hold(made):
    """Returns an object of the client, having held it to its own type: the client itself checks nothing.

    Differences, which are the hosted service's own too: a job that has not failed has an error object of nulls,
    `paused` is no status of the type, and a chunk of a completion that goes on has no reason to finish.
    """
    told = made.to_dict(mode="json")
    if told.get("object") == "fine_tuning.job":
        if set(told["error"].values()) == {None}:
            told["error"] = None
        if told["status"] == "paused":
            told["status"] = "queued"
    if told.get("object") == "text_completion":
        for choice in told["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    type(made).model_validate(told)
    return made


def sync(folder: Path) -> None:
    client = openai.OpenAI()
    with (folder / "train.jsonl").open("rb") as stream:
        training = hold(client.files.create(file=stream, purpose="fine-tune"))
    # The second file comes in parts.
    upload = client.uploads.upload_file_chunked(
        file=folder / "valid.jsonl", mime_type="text/jsonl", purpose="fine-tune", part_size=100
    )
    validation = hold(hold(upload).file)
    assert client.files.content(validation.id).read() == (folder / "valid.jsonl").read_bytes()
    assert client.files.wait_for_processing(training.id).status == "processed"
    assert training.id in [hold(file).id for file in client.files.list(purpose="fine-tune")]
    job = hold(
        client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=training.id,
            validation_file=validation.id,
            suffix="mine",
            seed=3,
            hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 20, "batch_size": 4},
            metadata={"by": "sync"},
        )
    )
    assert job.status in ("validating_files", "queued", "running")
    assert job.id in [hold(one).id for one in client.fine_tuning.jobs.list(limit=1)]
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.3)
        job = hold(client.fine_tuning.jobs.retrieve(job.id))
    assert job.status == "succeeded", job.error
    assert job.error.code is None
    assert job.hyperparameters.n_epochs == 2
    assert job.trained_tokens > 0

    events = [hold(event) for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]
    said = [event.message for event in events][::-1]
    check_events(said, job)
    assert len({event.id for event in events}) == len(events)
    checkpoints = [hold(one) for one in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    check_checkpoints(checkpoints, job)
    check_table(client.files.content(job.result_files[0]).read().decode())
    assert hold(client.files.retrieve(job.result_files[0])).purpose == "fine-tune-results"

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
    check_errors(client, job)

    assert client.models.delete(job.fine_tuned_model).deleted
    raised(openai.NotFoundError, "model_not_found", lambda: client.models.retrieve(job.fine_tuned_model))
    assert client.files.delete(training.id).deleted


async def unsync(folder: Path) -> None:
    client = openai.AsyncOpenAI()
    training = hold(await client.files.create(file=folder / "train.jsonl", purpose="fine-tune"))
    options = {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 20, "batch_size": 4}}
    method = {"type": "supervised", "supervised": options}
    job = hold(
        await client.fine_tuning.jobs.create(model=MODEL, training_file=training.id, method=method, suffix="two")
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        await asyncio.sleep(0.3)
        job = hold(await client.fine_tuning.jobs.retrieve(job.id))
    assert job.status == "succeeded", job.error
    assert job.method.supervised.hyperparameters.n_epochs == 2
    said = [hold(event).message async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)][::-1]
    check_events(said, job)
    checkpoints = [hold(one) async for one in client.fine_tuning.jobs.checkpoints.list(job.id)]
    check_checkpoints(checkpoints, job, validated=False)
    check_table((await client.files.content(job.result_files[0])).text)
    names = [MODEL, job.fine_tuned_model, *(one.fine_tuned_model_checkpoint for one in checkpoints)]
    ask = {"messages": ASK, "max_tokens": 8, "temperature": 0, "logprobs": True}
    answers = await asyncio.gather(*(client.chat.completions.create(model=name, **ask) for name in names))
    for name, answer in zip(names, answers, strict=True):
        check_answer(hold(answer), name)
        stream = await client.chat.completions.create(
            model=name, stream=True, stream_options={"include_usage": True}, **ask
        )
        check_stream([hold(chunk) async for chunk in stream], answer)
    other = hold(
        await client.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=training.id, method=method)
    )
    assert hold(await client.fine_tuning.jobs.cancel(other.id)).status == "cancelled"
    assert (await client.models.delete(job.fine_tuned_model)).deleted
    assert (await client.files.delete(training.id)).deleted


def check_events(said: list, job) -> None:
    assert said[0] == f"Created fine-tuning job: {job.id}"
    assert any(line.startswith(f"Validating training file: {job.training_file}") for line in said)
    for line in ("Files validated, moving job to queued state", "Fine-tuning job started"):
        assert said.count(line) == 1
    assert [line.split(":")[0] for line in said if line.startswith("Step ")] == [f"Step {n}/6" for n in range(1, 7)]
    assert [line for line in said if line.startswith("Checkpoint")] == [
        f"Checkpoint created at step {n}" for n in (3, 6)
    ]
    assert said[-2:] == [f"New fine-tuned model created: {job.fine_tuned_model}", "The job has successfully completed"]


def check_checkpoints(checkpoints: list, job, validated: bool = True) -> None:
    assert [one.step_number for one in checkpoints] == [6, 3]
    assert {one.fine_tuning_job_id for one in checkpoints} == {job.id}
    assert all(one.metrics.train_loss > 0 for one in checkpoints)
    assert all((one.metrics.full_valid_loss is not None) == validated for one in checkpoints)


def check_table(text: str) -> None:
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert list(rows[0])[:5] == columns
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


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


def check_errors(client, job) -> None:
    for kind, code, ask in (
        (openai.NotFoundError, "fine_tune_not_found", lambda: client.fine_tuning.jobs.retrieve("ftjob-nothing")),
        (openai.BadRequestError, "invalid_job_state", lambda: client.fine_tuning.jobs.pause(job.id)),
        (openai.NotFoundError, "model_not_found", lambda: client.chat.completions.create(model="no", messages=ASK)),
        (
            openai.BadRequestError,
            "invalid_value",
            lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "x"}]),
        ),
        (openai.AuthenticationError, "invalid_api_key", lambda: openai.OpenAI(api_key="sk-wrong").models.list()),
    ):
        # The first client had no pausing yet.
        if code != "invalid_job_state" or hasattr(client.fine_tuning.jobs, "pause"):
            raised(kind, code, ask)


def raised(kind, code: str, ask) -> None:
    """Holds that the client raises an error of that kind, with that code and an id to report it by."""
    try:
        ask()
    except kind as error:
        found = error
    assert (found.code, found.request_id[:4]) == (code, "req_")


if __name__ == "__main__":
    way, place = sys.argv[1], Path(sys.argv[2])
    if way == "sync":
        sync(place)
    else:
        asyncio.run(unsync(place))
    print(openai.__version__, way, "done")
