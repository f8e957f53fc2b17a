"""The check of a request for a job without a job, and integrations, which are taken and told to do nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_ft.serve import checks
from tests import tiny_server
from tests.in_process import Client
from tests.tiny_server import chats

JOBS, VALIDATE = "/v1/fine_tuning/jobs", "/v1/fine_tuning/validate"
WANDB = {"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    folder = tmp_path_factory.mktemp("checks")
    return Client(tiny_server.home(folder / "home", tiny_server.base_folder(folder / "base")))


def validated(client: Client, rows: str, **more: Any) -> tuple[int, Any]:
    file = client.upload(rows)[1]["id"]
    return client("POST", VALIDATE, {"model": "tiny", "training_file": file, **more})[:2]


def test_what_a_job_would_find_is_told_and_no_job_is_made(client):
    more = {"model": "gpt-3.5-turbo", "hyperparameters": {"batch_size": 4}, "integrations": [WANDB]}
    status, found = validated(client, chats(12) + chats(1), **more)
    assert status == 200
    assert found["valid"] is True, found
    assert found["model"] == "tiny"
    assert found["hyperparameters"] == {"n_epochs": 7, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert found["total_steps"] == 7 * 4
    assert found["error"] == {"code": None, "message": None, "param": None}
    assert [word for word in ("stands for tiny", "Weights & Biases", "repeat another") for one in found["warnings"]
            if word in one] == ["stands for tiny", "Weights & Biases", "repeat another"]  # fmt: skip
    assert client("GET", JOBS)[1]["data"] == []
    assert not [room for room in ("jobs", "runs") if (client.state.store.home / room).exists()]


def test_what_a_job_would_fail_with_is_told(client):
    status, found = validated(client, chats(12) + "{}\n")
    assert (status, found["valid"]) == (200, False)
    assert (found["error"]["code"], found["error"]["param"]) == ("invalid_training_file", "training_file")
    assert "Line 13: " in found["error"]["message"]


def test_what_no_job_is_made_of_is_refused_as_there(client):
    status, refused = validated(client, chats(12), hyperparameters={"n_epochs": 0})
    assert (status, refused["error"]["param"]) == (400, "hyperparameters.n_epochs")


@pytest.mark.parametrize(("command", "code"), [("raise SystemExit(3)", None), ("import time; time.sleep(60)", 400)])
def test_a_check_that_ends_badly_or_takes_too_long(client, monkeypatch, command, code):
    monkeypatch.setattr(checks, "LONGEST_S", 5.0)
    real = checks.subprocess.run

    def run(words: list[str], **more: Any) -> Any:
        return real([words[0], "-c", command], **more)

    monkeypatch.setattr(checks.subprocess, "run", run)
    status, found = validated(client, chats(12))
    if code:
        assert (status, found["error"]["code"]) == (code, "check_takes_too_long")
    else:
        assert (status, found["valid"], found["error"]["code"]) == (200, False, "internal_error")
    assert not client.state.checking.locked()


# Integrations


@pytest.fixture
def plain(tmp_path: Path) -> Client:
    (tmp_path / "models.json").write_text(json.dumps({"bases": {"tiny": "nowhere"}, "aliases": {}}))
    return Client(tmp_path)


def test_an_integration_is_told_as_it_came_and_that_nothing_is_reported(plain):
    job = plain.job(integrations=[WANDB])
    inner = {"project": "p", "name": None, "entity": None, "tags": ["a"], "run_id": None}
    assert job["integrations"] == [{"type": "wandb", "wandb": inner}]
    told = plain("GET", f"{JOBS}/{job['id']}/events")[1]["data"]
    assert [event["message"] for event in told if event["level"] == "warn"] == [
        "Nothing is reported to Weights & Biases: this server sends nothing to anybody."
    ]
    assert plain.job(integrations=[])["integrations"] == plain.job(integrations=None)["integrations"] == []


@pytest.mark.parametrize(
    ("integration", "param"),
    [
        ({"type": "comet", "wandb": {"project": "p"}}, "integrations[0].type"),
        ({"type": "wandb"}, "integrations[0].wandb"),
        ({"type": "wandb", "wandb": {}}, "integrations[0].wandb.project"),
        ({"type": "wandb", "wandb": {"project": "p", "tags": [1]}}, "integrations[0].wandb.tags[0]"),
        ({"type": "wandb", "wandb": {"project": "p", "colour": 1}}, "integrations[0].wandb.colour"),
    ],
)
def test_an_integration_of_another_shape_is_refused(plain, integration, param):
    file = plain.upload("{}")[1]["id"]
    body = {"model": "tiny", "training_file": file, "integrations": [integration]}
    status, refused, _ = plain("POST", JOBS, body)
    assert (status, refused["error"]["param"]) == (400, param)
