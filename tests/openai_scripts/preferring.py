"""Supervised training and preference training on top of it with OpenAI's client, as its guide stacks them.

python preferring.py FOLDER
"""

import csv
import io
import sys
import time
from pathlib import Path

import openai
from whole_way import ASK, ENDED, HYPERPARAMETERS, MODEL, hold

DPO = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 40, "beta": 0.2}


def main(folder: Path) -> None:
    client = openai.OpenAI()
    files = {
        name: hold(client.files.create(file=folder / f"{name}.jsonl", purpose="fine-tune")).id
        for name in ("train", "pairs", "held_out")
    }
    jobs = client.fine_tuning.jobs
    first = ended(client, jobs.create(model=MODEL, training_file=files["train"], hyperparameters=HYPERPARAMETERS))
    method = {"type": "dpo", "dpo": {"hyperparameters": DPO}}
    job = jobs.create(
        model=first.fine_tuned_model, training_file=files["pairs"], validation_file=files["held_out"], method=method
    )
    assert (job.method.type, job.hyperparameters) == ("dpo", None)
    job = ended(client, job)
    assert {name: getattr(job.method.dpo.hyperparameters, name) for name in DPO} == DPO
    told = [event.data for event in jobs.list_events(job.id, limit=100).data if event.type == "metrics"]
    told.sort(key=lambda numbers: numbers["step"])
    assert [numbers["step"] for numbers in told] == [1, 2, 3, 4, 5, 6]
    # It begins as what it goes on from, which it is compared with: nothing is preferred, and the loss is ln 2.
    assert abs(told[0]["train_loss"] - 0.6931) < 1e-3, told[0]
    assert told[-1]["train_reward_margin"] > 0.1, told[-1]
    assert {"valid_loss", "valid_reward_accuracy", "full_valid_reward_margin"} <= told[-1].keys()
    text = client.files.content(job.result_files[0]).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,")
    assert [row["train_accuracy"] for row in rows] == [f"{numbers['train_reward_accuracy']:.5f}" for numbers in told]
    assert all(row["train_reward_margin"] for row in rows)
    points = jobs.checkpoints.list(job.id).data
    assert [point.step_number for point in points] == [6, 3]
    said = client.chat.completions.create(model=job.fine_tuned_model, messages=ASK, max_tokens=4, temperature=0)
    assert said.choices[0].message.content is not None


def ended(client, job):
    while job.status not in ENDED:
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    return job


if __name__ == "__main__":
    began = time.monotonic()
    main(Path(sys.argv[1]))
    print(openai.__version__, f"{time.monotonic() - began:.1f}")
