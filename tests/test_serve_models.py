"""The table of models in a server's folder, changed while the server runs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_ft.serve import trial
from lora_ft.serve.models import register
from lora_ft.serve.worker import Worker
from tests import tiny_server
from tests.in_process import Client

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    write(tmp_path, {"tiny": "here"})
    return Client(tmp_path)


def write(home: Path, bases: dict[str, Any], **aliases: str) -> None:
    (home / "models.json").write_text(json.dumps({"bases": bases, "aliases": aliases}))


def names(client: Client) -> list[str]:
    return [model["id"] for model in client("GET", "/v1/models")[1]["data"]]


def test_a_base_that_is_added_is_there_at_once(client):
    home = client.state.store.home
    assert client("GET", "/v1/models/more")[0] == 404
    write(home, {"tiny": "here", "more": "there"}, gpt="more")
    assert client("GET", "/v1/models/more")[0] == 200
    assert names(client) == ["tiny", "more", "gpt"]
    assert client.job(model="gpt")["model"] == "more"


@pytest.mark.parametrize("text", ["{", '{"bases": {"a": 1}, "aliases": {}}', None])
def test_a_change_that_is_wrong_is_told_once_and_changes_nothing(client, caplog, text):
    path = client.state.models.path
    path.unlink()
    if text is not None:
        path.write_text(text)
    for _ in range(3):
        assert names(client) == ["tiny"]
    assert [record.levelname for record in caplog.records if "models.json" in record.getMessage()] == ["WARNING"]
    write(path.parent, {"other": "here"})
    assert names(client) == ["other"]


def test_an_edit_of_the_same_length_is_seen(client):
    path = client.state.models.path
    before = path.stat()
    write(path.parent, {"yint": "here"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert names(client) == ["yint"]


def test_a_job_trains_on_what_its_base_meant_when_it_was_made(client, monkeypatch):
    home, looked = client.state.store.home, []

    def examine(row: Any, source: str, parent: Path | None) -> Any:
        looked.append(source)
        raise trial.JobError("invalid_model", "enough was seen")

    monkeypatch.setattr(trial, "examine", examine)
    job = client.job()["id"]
    write(home, {"other": "elsewhere"})
    assert Worker(client.state.store, job, 0).validate() is False
    assert looked == ["here"]


def test_a_job_whose_model_was_deleted_as_it_was_made_does_not_train_on_the_base(client):
    store, home = client.state.store, client.state.store.home
    first = client.job()["id"]
    client("POST", f"{JOBS}/{first}/cancel")
    with store.change() as connection:
        register(connection, "ft:tiny:local::x", "tiny", home / "runs" / "x", home, first, 0)
    job = client.job(model="ft:tiny:local::x")["id"]
    store.connection.execute("DELETE FROM models")
    assert Worker(store, job, 0).validate() is False
    error = client("GET", f"{JOBS}/{job}")[1]["error"]
    assert (error["code"], error["param"]) == ("invalid_model", "model")
    assert "was deleted" in error["message"]


def test_another_base_behind_a_name_answers_from_then_on(tmp_path):
    bases = [tiny_server.base_folder(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    (tmp_path / "home").mkdir()
    client = Client(tmp_path / "home")
    homes = []
    for base in bases:
        write(client.state.store.home, {"tiny": str(base)})
        homes.append(client.state.answers.voices.of("tiny").home.source.folder)
    assert homes == bases
