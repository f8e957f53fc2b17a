"""Jobs from queue to adapter in processes of their own: paused, cancelled, killed, fed bad rows, gone on from."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_ft.serve import trial
from tests import tiny_server
from tests.tiny_server import JOBS, Server, chats, pairs

LONG = {"seed": 3, "hyperparameters": {"n_epochs": 4, "batch_size": 1, "learning_rate_multiplier": 10}}
STEPS = 48
AUTO = json.dumps({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("jobs")
    base = tiny_server.base_folder(folder / "base")
    with Server(tiny_server.home(folder / "home", base)) as running:
        yield running


@pytest.fixture(scope="module")
def whole(server: Server) -> str:
    """The job that nothing happens to."""
    job = server.start_job(server.upload(chats(12)), **LONG)
    assert server.ended(job)["status"] == "succeeded"
    return job


def same_as(server: Server, job: str, whole: str, paused: bool = False) -> None:
    """Holds that a job ended as the one that nothing happened to: adapter, checkpoints and what was told of steps."""
    assert server.ended(job)["status"] == "succeeded", server.job(job)
    assert server.adapter(job) == server.adapter(whole)
    told = [[e["data"] for e in server.events(one) if e["type"] == "metrics"] for one in (job, whole)]
    assert told[0] == told[1]
    assert [line["step"] for line in told[0]] == list(range(1, STEPS + 1))
    listed = [server.ask("GET", f"{JOBS}/{one}/checkpoints?limit=100")[1]["data"] for one in (job, whole)]
    steps = [[one["step_number"] for one in found] for found in listed]
    # A paused job has one checkpoint more, that of the pause.
    assert steps[0] == steps[1] or (paused and set(steps[1]) < set(steps[0]) and len(steps[0]) == len(steps[1]) + 1)
    assert server.job(job)["trained_tokens"] == server.job(whole)["trained_tokens"]


def test_a_paused_job_frees_the_device_and_goes_on_as_if_it_never_was(server: Server, whole: str) -> None:
    job = server.start_job(server.upload(chats(12)), **LONG)
    server.until(job, lambda _: server.steps(job) > 5)
    status, paused = server.ask("POST", f"{JOBS}/{job}/pause")
    assert (status, paused["status"]) == (200, "paused")
    assert server.ask("POST", f"{JOBS}/{job}/pause")[1]["status"] == "paused"
    steps = server.steps(job)
    assert steps < STEPS
    assert (paused["step"], paused["total_steps"]) == (steps, STEPS)
    name = server.ask("GET", f"{JOBS}/{job}/checkpoints")[1]["data"][0]["fine_tuned_model_checkpoint"]
    assert name.endswith(f":ckpt-step-{steps}")
    ask = {"model": name, "messages": [{"role": "user", "content": "say ab"}], "max_tokens": 2}
    assert server.ask("POST", "/v1/chat/completions", ask)[0] == 200
    # The device is free: another job runs to its end meanwhile.
    short = {"hyperparameters": {"n_epochs": 1, "batch_size": 12}}
    assert server.ended(server.start_job(server.upload(chats(12)), **short))["status"] == "succeeded"
    assert server.job(job)["status"] == "paused"
    assert server.ask("POST", f"{JOBS}/{job}/resume")[1]["status"] == "queued"
    same_as(server, job, whole, paused=True)


def test_a_cancelled_job_ends_at_once(server: Server) -> None:
    job = server.start_job(server.upload(chats(12)), **LONG)
    server.until(job, lambda _: server.steps(job) > 2)
    assert server.ask("POST", f"{JOBS}/{job}/cancel")[1]["status"] == "cancelled"
    steps, until = server.steps(job), time.monotonic() + 10
    while server.workers(job):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert server.steps(job) == steps
    status, refused = server.ask("POST", f"{JOBS}/{job}/resume")
    assert (status, refused["error"]["code"]) == (400, "invalid_job_state")


def test_a_job_whose_process_is_killed_ends_as_if_it_never_was(server: Server, whole: str) -> None:
    job = server.start_job(server.upload(chats(12)), **LONG)
    server.until(job, lambda _: server.steps(job) > 20)
    (process,) = server.workers(job)
    process.kill()
    same_as(server, job, whole)
    (told,) = [event["message"] for event in server.events(job) if event["message"].startswith("The job was inter")]
    assert "ended by signal 9" in told


def test_jobs_of_a_killed_server_go_on_with_the_next(server: Server, whole: str) -> None:
    job = server.start_job(server.upload(chats(12)), **LONG)
    waiting = server.start_job(server.upload(chats(12)), **LONG)
    server.until(job, lambda _: server.steps(job) > 20)
    server.kill()
    with Server(server.home, token=server.token) as after:
        try:
            told = [event["message"] for event in after.events(job) if event["level"] == "warn"]
            assert any("the server ended before the job did" in message for message in told)
            same_as(after, job, whole)
            after.ask("POST", f"{JOBS}/{waiting}/cancel")
        finally:
            after.process.terminate()
            after.process.wait(60)
    server.__enter__()


def test_a_server_that_is_stopped_leaves_its_jobs_to_the_next(server: Server, whole: str) -> None:
    job = server.start_job(server.upload(chats(12)), **LONG)
    server.until(job, lambda _: server.steps(job) > 5)
    server.__exit__()
    assert server.process.returncode == 0
    server.__enter__()
    assert any("the server was stopped" in event["message"] for event in server.events(job))
    same_as(server, job, whole)


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        (chats(7), "invalid_n_examples", "Training file has 7 example(s), but must have at least 10 examples"),
        (
            chats(12) + '{"messages": [{"role": "bot", "content": "x"}]}\n',
            "invalid_training_file",
            'Line 13: messages[0].role is "bot"; use system',
        ),
        ('{"text": "a", "label": "b"}\n' * 12, "invalid_training_file", "Line 1: a labelled row"),
        ('{"prompt": "a"}\n' * 12, "invalid_training_file", "Line 1: has the fields prompt"),
        (chats(12) + "{\n", "invalid_training_file", "Line 13: "),
        (pairs(12), "invalid_training_file", "Line 1: is a preference, which the method supervised does not learn"),
    ],
)
def test_bad_rows_are_told_with_their_lines(rows: str, code: str, said: str, server: Server, monkeypatch) -> None:
    monkeypatch.chdir(server.home)
    file = server.upload(rows)
    row = {"id": "ftjob-x", "training_file": file, "validation_file": None, "hyperparameters": AUTO, "extensions": "{}"}
    with pytest.raises(trial.JobError) as caught:
        trial.examine({**row, "seed": 1}, json.loads(Path("models.json").read_text())["bases"]["tiny"], None)
    assert (caught.value.code, caught.value.param) == (code, "training_file")
    assert said in str(caught.value)


SAID = [{"role": "assistant", "content": "b"}]
ALIKE = {
    "input": {"messages": [{"role": "user", "content": "a"}]}, "preferred_output": SAID, "non_preferred_output": SAID,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (chats(12), "Line 1: is no preference; the method dpo takes input, preferred_output and non_preferred_output"),
        (
            pairs(12) + json.dumps(ALIKE) + "\n",
            "Line 13: non_preferred_output is the same as preferred_output; ",
        ),
    ],
    ids=["chats", "no preference"],
)
def test_rows_of_another_method_are_told_with_their_lines(rows: str, said: str, server: Server, monkeypatch) -> None:
    monkeypatch.chdir(server.home)
    values = json.dumps({**json.loads(AUTO), "beta": "auto"})
    row = {"id": "ftjob-x", "training_file": server.upload(rows), "validation_file": None, "hyperparameters": values,
           "extensions": "{}", "seed": 1}  # fmt: skip
    with pytest.raises(trial.JobError) as caught:
        trial.examine(row, json.loads(Path("models.json").read_text())["bases"]["tiny"], None)
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "training_file")
    assert said in str(caught.value)


def test_a_job_with_bad_rows_fails_and_says_why(server: Server) -> None:
    job = server.ended(server.start_job(server.upload(chats(12) + "{}\n")))
    assert (job["status"], job["error"]["code"], job["error"]["param"]) == (
        "failed", "invalid_training_file", "training_file",
    )  # fmt: skip
    assert "Line 13: " in job["error"]["message"]
    assert job["finished_at"] is not None
    told = server.events(job["id"])[-1]
    assert (told["level"], told["data"]) == ("error", job["error"])


def test_prompts_and_completions_and_going_on_from_what_was_made(server: Server) -> None:
    rows = "".join(json.dumps({"prompt": f"{n} ->", "completion": f" {n}{n}"}) + "\n" for n in range(12))
    # The same seed, and so the same rows in the first step of both.
    options = {"seed": 3, "hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 10}}
    first = server.ended(server.start_job(server.upload(rows), model="babbage-002", **options))
    assert first["status"] == "succeeded", first
    name = first["fine_tuned_model"]
    second = server.ended(server.start_job(server.upload(rows), model=name, **options))
    assert second["status"] == "succeeded", second
    assert second["model"] == "tiny"
    losses = [[e["data"]["train_loss"] for e in server.events(job["id"]) if e["data"]] for job in (first, second)]
    # The second begins where the first ended, not where it began.
    assert losses[1][0] < losses[0][0]


def test_the_steps_of_a_job_are_streamed(server: Server, whole: str) -> None:
    status, text = server.ask("GET", f"{JOBS}/{whole}/events?stream=true")
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200
    assert lines[-1] == "[DONE]"
    assert [json.loads(line) for line in lines[:-1]] == server.events(whole)
    middle = server.events(whole)[9]["id"]
    _, rest = server.ask("GET", f"{JOBS}/{whole}/events?stream=true&after={middle}")
    assert rest.count("data: {") == len(lines) - 11


def test_files_of_a_job_survive_in_the_folder_alone(server: Server, whole: str) -> None:
    config = Path(server.home / "jobs" / whole / "config.yaml").read_text()
    assert "task: chat" in config
    assert (server.home / "runs" / whole / "seal.json").is_file()
    assert not (server.home / "runs" / whole / "checkpoints").exists()
