"""A job that is paused, resumed and cancelled with OpenAI's client.

python pausing.py sync|async FOLDER
"""

import asyncio
import sys
import time
from pathlib import Path

import openai
from whole_way import MODEL, ask_job, hold

# A job that does not end before it is paused.
LONG = {"n_epochs": 50, "batch_size": 1}


def sync(folder: Path) -> None:
    client = openai.OpenAI()
    file = hold(client.files.create(file=folder / "train.jsonl", purpose="fine-tune"))
    job = hold(client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, hyperparameters=LONG))
    while not reached_a_step(client.fine_tuning.jobs.list_events(job.id)):
        time.sleep(0.3)
    assert hold(ask_job(client, job.id, "pause")).status == "paused"
    assert hold(client.fine_tuning.jobs.retrieve(job.id)).status == "paused"
    assert len(hold(client.fine_tuning.jobs.checkpoints.list(job.id)).data) >= 1
    assert hold(ask_job(client, job.id, "resume")).status == "queued"
    assert hold(client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


async def unsync(folder: Path) -> None:
    client = openai.AsyncOpenAI()
    file = hold(await client.files.create(file=folder / "train.jsonl", purpose="fine-tune"))
    job = hold(await client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, hyperparameters=LONG))
    while not reached_a_step(await client.fine_tuning.jobs.list_events(job.id)):
        await asyncio.sleep(0.3)
    assert hold(await ask_job(client, job.id, "pause")).status == "paused"
    assert hold(await client.fine_tuning.jobs.retrieve(job.id)).status == "paused"
    assert len(hold(await client.fine_tuning.jobs.checkpoints.list(job.id)).data) >= 1
    assert hold(await ask_job(client, job.id, "resume")).status == "queued"
    assert hold(await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


def reached_a_step(page) -> bool:
    return any(event.message.startswith("Step ") for event in hold(page).data)


if __name__ == "__main__":
    way, place, began = sys.argv[1], Path(sys.argv[2]), time.monotonic()
    if way == "sync":
        sync(place)
    else:
        asyncio.run(unsync(place))
    print(openai.__version__, way, f"{time.monotonic() - began:.1f}")
