"""The server's HTTP side: files, jobs and models in the database, errors in OpenAI's form, who may ask."""

import json
import random
import sqlite3
import threading
from pathlib import Path

import pytest

from lora_ft.serve import access, events, hyperparameters, jobs
from lora_ft.serve.files import MAX_BYTES
from lora_ft.serve.refusals import RequestError
from lora_ft.serve.states import FINAL, TRANSITIONS
from lora_ft.serve.store import Store
from tests.in_process import FORM, Client, form


@pytest.fixture
def client(tmp_path: Path) -> Client:
    table = {
        "bases": {"tiny": "nowhere", "org/name": "nowhere"},
        "aliases": {"gpt-4o-mini": "tiny", "gpt-4.1*": "tiny"},
    }
    (tmp_path / "models.json").write_text(json.dumps(table))
    return Client(tmp_path)


def refused(answer, status, code=None, param=None):
    """Returns the message of an answer that must be an error object."""
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
    return error["message"]


# Files


def test_a_file_comes_back_byte_for_byte(client):
    content = b'{"messages": []}\n' + random.Random(0).randbytes(3 << 20).replace(b"\0", b"x")
    status, file = client.upload(content)
    assert status == 200
    assert (
        file.items() >= {"object": "file", "bytes": len(content), "status": "processed", "purpose": "fine-tune"}.items()
    )
    assert client("GET", f"/v1/files/{file['id']}")[1] == file
    path = client.state.files.path(client.state.files.get(file["id"]))
    assert path.read_bytes() == content


def test_a_file_is_written_as_it_comes_and_never_whole_in_memory(client, monkeypatch):
    from lora_ft.serve import forms

    largest = 0
    write = forms.run_in_threadpool

    async def watched(function, data, *args):
        nonlocal largest
        largest = max(largest, len(data))
        return await write(function, data, *args)

    monkeypatch.setattr(forms, "run_in_threadpool", watched)

    async def chunks():
        body = form(b'{"a": 1}\n' * 200_000, purpose="fine-tune")
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    import asyncio

    written = []
    found = asyncio.run(forms.read(FORM["content-type"], chunks(), "file", MAX_BYTES, written.append))
    assert sum(map(len, written)) == found.file_bytes == 9 * 200_000
    assert 0 < largest <= 65_536


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"a,b\n1,2\n", "Line 1: begins with"),
        (b"[{}]", "Line 1: begins with"),
        (b"\x1f\x8b\x08", "gzip"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    ],
)
def test_what_cannot_be_jsonl_is_refused_when_it_comes(client, content, said):
    assert said in refused(client.upload(content), 400, "invalid_file", "file")
    assert client("GET", "/v1/files")[1]["data"] == []
    assert not list(client.state.files.folder.iterdir())


def test_a_byte_order_mark_and_other_purposes(client):
    assert client.upload(b"\xef\xbb\xbf" + b'{"messages": []}')[0] == 200
    assert client.upload(b"anything", purpose="user_data")[0] == 200
    refused(client.upload(b"{}", purpose="assistants"), 400, "invalid_value", "purpose")
    refused(client.upload(b"{}", purpose="fine-tune", other="x"), 400, "unknown_parameter", "other")


@pytest.mark.parametrize(
    ("body", "headers", "code", "param"),
    [
        (b"{}", {}, "invalid_content_type", None),
        (b"--edge\r\n", FORM, "invalid_form", None),
        (form(b"{}", purpose="fine-tune")[:-12], FORM, "invalid_form", None),
        (form(b"{}", field="other", purpose="fine-tune"), FORM, "missing_required_parameter", "file"),
        (form(b"{}"), FORM, "invalid_value", "purpose"),
    ],
)
def test_forms_that_are_none(client, body, headers, code, param):
    refused(client("POST", "/v1/files", body, headers), 400, code, param)


def test_a_file_that_is_too_large_is_refused_by_what_is_told_and_by_what_comes(client, monkeypatch):
    from lora_ft.serve import files

    refused(
        client("POST", "/v1/files", b"", {**FORM, "content-length": str(MAX_BYTES * 2)}), 413, "file_too_large", "file"
    )
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    refused(client.upload(b'{"messages": []}\n'), 413, "file_too_large", "file")


def test_files_are_listed_both_ways_and_by_purpose(client):
    made = [client.upload('{"a": 1}', purpose=purpose)[1]["id"] for purpose in ("fine-tune", "user_data") * 3]
    listed = [file["id"] for file in client("GET", "/v1/files?order=asc")[1]["data"]]
    assert listed == made
    page = client("GET", "/v1/files?purpose=user_data&limit=2")[1]
    assert [file["id"] for file in page["data"]] == [made[5], made[3]]
    assert page["has_more"]
    assert (page["first_id"], page["last_id"]) == (made[5], made[3])
    rest = client("GET", f"/v1/files?purpose=user_data&limit=2&after={made[3]}")[1]
    assert [file["id"] for file in rest["data"]] == [made[1]]
    assert not rest["has_more"]
    refused(client("GET", "/v1/files?limit=0"), 400, "invalid_value", "limit")
    refused(client("GET", "/v1/files?after=file-x"), 400, "invalid_value", "after")


def test_a_file_expires(client, monkeypatch):
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = client.upload("{}", **fields)[1]
    assert file["expires_at"] == file["created_at"] + 3600
    refused(
        client.upload("{}", **{**fields, "expires_after[seconds]": "10"}),
        400,
        "invalid_value",
        "expires_after[seconds]",
    )
    from lora_ft.serve import files

    monkeypatch.setattr(files, "now", lambda: file["expires_at"])
    refused(client("GET", f"/v1/files/{file['id']}"), 404, None, "id")
    assert client("GET", "/v1/files")[1]["data"] == []
    client.state.files.clear_up()
    assert not (client.state.files.folder / file["id"]).exists()


def test_a_file_that_a_job_needs_stays(client):
    job = client.job()
    path = f"/v1/files/{job['training_file']}"
    assert job["id"] in refused(client("DELETE", path), 400)
    client("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert client("DELETE", path)[1] == {"id": job["training_file"], "object": "file", "deleted": True}
    refused(client("GET", path), 404, None, "id")
    refused(client("DELETE", path), 404, None, "id")


def test_what_a_killed_server_left_is_swept_at_the_next_start(client):
    file = client.upload("{}")[1]
    folder = client.state.files.folder
    for name in (".tmp-file-x-00", "file-without-a-row"):
        (folder / name).mkdir()
    Client(client.state.store.home)
    assert [place.name for place in folder.iterdir()] == [file["id"]]


# Uploads


def test_a_file_in_parts(client):
    pieces = [b'{"messages": [1]}\n' * 10, b'{"messages": [2]}\n' * 10]
    size = sum(map(len, pieces))
    about = {"bytes": size, "filename": "big.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    upload = client("POST", "/v1/uploads", about)[1]
    assert upload.items() >= {"object": "upload", "status": "pending", "bytes": size, "file": None}.items()
    path = f"/v1/uploads/{upload['id']}"
    ids = [client("POST", f"{path}/parts", form(piece, "data", "upload"), FORM)[1]["id"] for piece in pieces]
    refused(client("POST", f"{path}/complete", {"part_ids": ids[:1]}), 400, "invalid_value", "part_ids")
    refused(client("POST", f"{path}/complete", {"part_ids": [ids[0], ids[0]]}), 400, "invalid_value", "part_ids")
    refused(client("POST", f"{path}/complete", {"part_ids": ids, "md5": "0" * 32}), 400, "invalid_value", "md5")
    done = client("POST", f"{path}/complete", {"part_ids": ids[::-1]})[1]
    assert done["status"] == "completed"
    assert client("GET", f"/v1/files/{done['file']['id']}")[1] == done["file"]
    held = client.state.files.path(client.state.files.get(done["file"]["id"])).read_bytes()
    assert held == pieces[1] + pieces[0]
    assert client("POST", f"{path}/complete", {"part_ids": ids})[1] == done  # as a client's retry has it
    refused(client("POST", f"{path}/cancel"), 400, "invalid_upload_state", "upload_id")
    assert {place.name for place in client.state.files.folder.iterdir()} == {done["file"]["id"]}


def test_more_than_was_told_and_after_the_end(client, monkeypatch):
    upload = client("POST", "/v1/uploads", {"bytes": 3, "filename": "a", "mime_type": "", "purpose": "fine-tune"})[1]
    path = f"/v1/uploads/{upload['id']}"
    refused(client("POST", f"{path}/parts", form(b"abcd", "data"), FORM), 400, "invalid_value", "data")
    assert client("POST", f"{path}/cancel")[1]["status"] == "cancelled"
    assert client("POST", f"{path}/cancel")[1]["status"] == "cancelled"
    refused(client("POST", f"{path}/parts", form(b"a", "data"), FORM), 400, "invalid_upload_state", "upload_id")
    refused(client("POST", "/v1/uploads/upload_x/cancel"), 404, None, "upload_id")


# Jobs

MULTIPLIER, DPO = "learning_rate_multiplier", "method.dpo.hyperparameters"


def test_a_job_as_it_is_told(client):
    job = client.job(suffix="mine", seed=5, metadata={"k": "v"}, hyperparameters={"n_epochs": 2, "lora_r": 4})
    assert job == client("GET", f"/v1/fine_tuning/jobs/{job['id']}")[1]
    assert job["error"] == {"code": None, "message": None, "param": None}
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job["method"]["supervised"]["hyperparameters"] == {**job["hyperparameters"], "lora_r": 4}
    assert job["status"] == "validating_files"
    assert (job["user_provided_suffix"], job["seed"], job["metadata"]) == ("mine", 5, {"k": "v"})
    told = client("GET", f"/v1/fine_tuning/jobs/{job['id']}/events")[1]["data"]
    assert [event["message"] for event in told] == [
        f"Validating training file: {job['training_file']}",
        f"Created fine-tuning job: {job['id']}",
    ]


def test_a_job_of_preferences_as_it_is_told(client):
    job = client.job(method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, "n_epochs": 2}}})
    assert job["hyperparameters"] is None
    values = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto", "beta": 0.5}
    assert job["method"] == {"type": "dpo", "dpo": {"hyperparameters": values}}
    assert client.job(method={"type": "dpo"})["method"]["dpo"]["hyperparameters"]["beta"] == "auto"


def test_preferences_need_trl(client, monkeypatch):
    monkeypatch.setattr("lora_ft.serve.routes_jobs.importlib.util.find_spec", lambda name: None)
    file = client.upload("{}")[1]
    answer = client(
        "POST", "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file["id"], "method": {"type": "dpo"}}
    )
    assert "lora-ft[prefer]" in refused(answer, 400, "unsupported_method", "method.type")


def test_another_name_is_resolved_and_told(client):
    for name in ("gpt-4o-mini", "gpt-4.1-anything"):
        job = client.job(model=name)
        assert job["model"] == "tiny"
        told = client("GET", f"/v1/fine_tuning/jobs/{job['id']}/events")[1]["data"]
        assert [event["message"] for event in told if event["level"] == "warn"] == [
            f"{name} stands for tiny on this server (models.json): that is what is trained."
        ]


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"model": "gpt-5"}, "model_not_found", "model"),
        ({"training_file": "file-nothing"}, "invalid_file", "training_file"),
        ({"validation_file": "file-nothing"}, "invalid_file", "validation_file"),
        ({"hyperparameters": {"n_epochs": 0}}, "invalid_value", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "invalid_value", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "invalid_value", "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "invalid_value", f"hyperparameters.{MULTIPLIER}"),
        ({"hyperparameters": {"lora_r": 0}}, "invalid_value", "hyperparameters.lora_r"),
        ({"hyperparameters": {"lora_r": "four"}}, "invalid_value", "hyperparameters.lora_r"),
        ({"hyperparameters": {"magic": 1}}, "unknown_parameter", "hyperparameters.magic"),
        ({"method": {"type": "reinforcement"}}, "unsupported_method", "method.type"),
        ({"method": {"type": "dpo", "dpo": {"x": 1}}}, "unknown_parameter", "method.dpo.x"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"packing": True}}}}, "invalid_value", f"{DPO}.packing"),
        ({"method": {"type": "magic"}}, "unsupported_method", "method.type"),
        ({"hyperparameters": {"beta": 0.1}}, "unknown_parameter", "hyperparameters.beta"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "invalid_value", f"{DPO}.beta"),
        ({"suffix": "a b"}, "invalid_value", "suffix"),
        ({"suffix": "ä"}, "invalid_value", "suffix"),
        ({"suffix": "a" * 65}, "invalid_value", "suffix"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata.k"),
        ({"colour": "red"}, "unknown_parameter", "colour"),
    ],
)  # fmt: skip
def test_requests_that_no_job_is_made_of(client, more, code, param):
    file = client.upload("{}")[1]
    answer = client("POST", "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file["id"], **more})
    status = 404 if code == "model_not_found" else 400
    assert refused(answer, status, code, param)
    assert client("GET", "/v1/fine_tuning/jobs")[1]["data"] == []


def test_the_method_wins_and_a_contradiction_is_told(client):
    inner = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}}
    assert client.job(method=inner, hyperparameters={"batch_size": 2})["hyperparameters"]["n_epochs"] == 4
    file = client.upload("{}")[1]
    body = {"model": "tiny", "training_file": file["id"], "method": inner, "hyperparameters": {"n_epochs": 3}}
    refused(client("POST", "/v1/fine_tuning/jobs", body), 400, "invalid_value", "hyperparameters.n_epochs")


def test_a_file_of_another_purpose(client):
    file = client.upload("{}", purpose="user_data")[1]
    answer = client("POST", "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file["id"]})
    assert "purpose" in refused(answer, 400, "invalid_file", "training_file")


def test_a_retried_request_makes_one_job_and_two_requests_make_two(client):
    file = client.upload("{}")[1]
    body = json.dumps({"model": "tiny", "training_file": file["id"]}).encode()
    path = "/v1/fine_tuning/jobs"
    first = client("POST", path, body, {"x-stainless-retry-count": "0"})[1]["id"]
    assert client("POST", path, body, {"x-stainless-retry-count": "1"})[1]["id"] == first
    assert client("POST", path, body, {"x-stainless-retry-count": "2"})[1]["id"] == first
    second = client("POST", path, body, {"x-stainless-retry-count": "0"})[1]["id"]
    assert second != first
    assert client("POST", path, body, {"x-stainless-retry-count": "1"})[1]["id"] == second
    # The first try never came.
    other = json.dumps({"model": "tiny", "training_file": file["id"], "seed": 1}).encode()
    third = client("POST", path, other, {"x-stainless-retry-count": "1"})[1]["id"]
    assert client("POST", path, other, {"x-stainless-retry-count": "2"})[1]["id"] == third
    keyed = [client("POST", path, body, {"idempotency-key": "a"})[1]["id"] for _ in range(2)]
    assert keyed[0] == keyed[1] != second
    assert len(client("GET", path)[1]["data"]) == 4


def test_retries_at_the_same_time_make_one_job(client):
    file = client.upload("{}")[1]
    body = json.dumps({"model": "tiny", "training_file": file["id"]}).encode()
    made = []

    def ask():
        made.append(client("POST", "/v1/fine_tuning/jobs", body, {"x-stainless-retry-count": "1"})[1]["id"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1


def test_jobs_by_metadata(client):
    plain, red, blue = client.job(), client.job(metadata={"c": "red", "n": "1"}), client.job(metadata={"c": "blue"})

    def listed(query):
        return [job["id"] for job in client("GET", f"/v1/fine_tuning/jobs?{query}")[1]["data"]]

    assert listed("") == [blue["id"], red["id"], plain["id"]]
    assert listed("metadata%5Bc%5D=red") == [red["id"]]
    assert listed("metadata%5Bc%5D=red&metadata%5Bn%5D=2") == []
    assert listed("metadata=null") == [plain["id"]]


@pytest.mark.parametrize("body", [b"", b"null", b"{", b"\xff"])
def test_asking_a_job_takes_no_body(client, body):
    job = client.job()
    assert client("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel", body)[1]["status"] == "cancelled"
    assert client("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel", body)[1]["status"] == "cancelled"
    assert "nothing" in refused(
        client("POST", f"/v1/fine_tuning/jobs/{job['id']}/pause", body), 400, "invalid_job_state", "fine_tuning_job_id"
    )


@pytest.mark.parametrize("job_id", ["ftjob-x", "a%2F..%2Fb", "ä", "x" * 65])
def test_jobs_that_are_not_there(client, job_id):
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
    ):
        answer = client(method, f"/v1/fine_tuning/jobs/{job_id}{path}")
        assert refused(answer, 404, "fine_tune_not_found", "fine_tune_id").startswith("Could not find fine tune: ")


# The database


@pytest.mark.parametrize("before", TRANSITIONS)
def test_the_database_holds_every_job_to_the_table_of_transitions(client, before):
    store, paths = client.state.store, {"validating_files": []}
    for _ in TRANSITIONS:
        for state, way in list(paths.items()):
            for after in TRANSITIONS[state]:
                paths.setdefault(after, [*way, after])
    for after in TRANSITIONS:
        job = client.job()["id"]
        for state in paths[before]:
            with store.change() as connection:
                jobs.change_state(connection, job, state)
        if before == after and after not in FINAL:
            continue
        if after in TRANSITIONS[before]:
            with store.change() as connection:
                jobs.change_state(connection, job, after)
            assert client.state.jobs.get(job)["status"] == after
        else:
            with pytest.raises(sqlite3.IntegrityError), store.change() as connection:
                jobs.change_state(connection, job, after)
            assert client.state.jobs.get(job)["status"] == before


def test_a_job_that_has_ended_cannot_be_changed_or_deleted(client):
    job = client.job()["id"]
    client("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
    row = dict(client.state.jobs.get(job))
    for statement in ("UPDATE jobs SET trained_tokens = 1", "UPDATE jobs SET error = ''", "DELETE FROM jobs"):
        with pytest.raises(sqlite3.IntegrityError):
            client.state.store.connection.execute(statement)
    assert dict(client.state.jobs.get(job)) == row


def test_a_change_that_breaks_off_leaves_nothing(client):
    job = client.job()["id"]

    def broken():
        with client.state.store.change() as connection:
            events.add(connection, job, "never told")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert "never told" not in [row["message"] for row in events.since(client.state.store, job, 0)]


def test_a_database_of_another_version_is_refused(client):
    client.state.store.put("format", "99")
    with pytest.raises(Exception, match="format 99"):
        Store(client.state.store.home)


# Models


def test_models_are_listed_and_looked_up(client):
    names = [model["id"] for model in client("GET", "/v1/models")[1]["data"]]
    assert names == ["tiny", "org/name", "gpt-4o-mini"]
    assert client("GET", "/v1/models/org/name")[1]["id"] == "org/name"
    assert client("GET", "/v1/models/gpt-4o-mini")[1]["root"] == "tiny"
    refused(client("GET", "/v1/models/nothing"), 404, "model_not_found", "model")
    refused(client("GET", "/v1/models/a/../b"), 400, "invalid_value", "model")
    refused(client("DELETE", "/v1/models/tiny"), 400, None, "model")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "bases"),
        ({"bases": {"a:b": "x"}, "aliases": {}}, "a:b"),
        ({"bases": {"a/../b": "x"}, "aliases": {}}, "no name"),
        ({"bases": {"a": 1}, "aliases": {}}, "string"),
        ({"bases": {"a": "x"}, "aliases": {"g": "b"}}, "not among"),
    ],
)
def test_a_table_of_models_that_is_wrong(tmp_path, table, said):
    (tmp_path / "models.json").write_text(json.dumps(table))
    with pytest.raises(Exception, match=said):
        Client(tmp_path)


# Errors


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("PUT", "/v1/files", 405, "method_not_allowed"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-x/events", 405, "method_not_allowed"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-x/nonsense", 404, "unknown_url"),
        ("POST", "/v1/fine-tunes", 404, "unknown_url"),
        ("POST", "/v1/responses", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/fine_tuning/checkpoints/x/permissions", 404, "unknown_url"),
    ],
)
def test_routes_that_are_not_there(client, method, path, status, code):
    refused(client(method, path), status, code)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"\xff", "invalid_json"),
        (b'{"model": "tiny", "model": "b"}', "invalid_json"),
        (b'{"seed": NaN}', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "invalid_json"),
    ],
)
def test_bodies_that_are_no_json(client, body, code):
    answer = client("POST", "/v1/fine_tuning/jobs", body)
    assert answer[1]["error"]["code"] == code
    assert answer[0] == 400


def test_a_missing_field_is_named(client):
    said = refused(
        client("POST", "/v1/fine_tuning/jobs", {"model": "tiny"}), 400, "missing_required_parameter", "training_file"
    )
    assert said == "Missing required parameter: 'training_file'."


def test_an_error_of_our_own_says_nothing_of_the_inside(client, monkeypatch):
    def broken(*_):
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(client.state.jobs, "page", broken)
    answer = client("GET", "/v1/fine_tuning/jobs")
    assert "inside" not in refused(answer, 500, "internal_error")
    assert answer[2]["x-request-id"].startswith("req_")


# Who may ask: each row is a request, and the code that it must be refused with.

OK, NO_TOKEN, NO_HOST, NO_ORIGIN = None, "invalid_api_key", "invalid_host", "invalid_origin"
STATUSES = {OK: 200, NO_TOKEN: 401, NO_HOST: 403, NO_ORIGIN: 403}
HOSTS = {
    "127.0.0.1:8000": OK, "localhost": OK, "localhost:1": OK, "[::1]:8000": OK, "LOCALHOST": OK,
    "evil.example": NO_HOST, "127.0.0.1.evil.example": NO_HOST, "192.168.0.9:8000": NO_HOST, "": NO_HOST,
    "a@localhost": NO_HOST, "localhost/x": NO_HOST,
}  # fmt: skip
OPEN_HOSTS = {
    "192.168.0.9:8000": OK, "[fe80::1]:8000": OK, "localhost": OK, "box.example": NO_HOST, "evil.example": NO_HOST,
}  # fmt: skip
ORIGINS = {
    "http://127.0.0.1:8000": OK, "https://127.0.0.1:8000": OK, "http://127.0.0.1:9000": NO_ORIGIN, "null": NO_ORIGIN,
    "file://": NO_ORIGIN, "http://localhost:8000": NO_ORIGIN, "http://evil.example": NO_ORIGIN,
    "http://127.0.0.1:8000.evil.example": NO_ORIGIN,
}  # fmt: skip
OPEN_ORIGINS = {
    "http://192.168.0.9:8000": OK, "https://192.168.0.9:8000": OK, "http://192.168.0.9": NO_ORIGIN,
    "http://192.168.0.9:9000": NO_ORIGIN, "http://localhost:8000": NO_ORIGIN, "http://box.example:8000": NO_ORIGIN,
    "http://evil.example": NO_ORIGIN, "null": NO_ORIGIN, "": NO_ORIGIN,
}  # fmt: skip
TOKENS = {
    "Bearer RIGHT": OK, "bearer RIGHT": OK, "Bearer WRONG": NO_TOKEN, "Bearer ": NO_TOKEN, "RIGHT": NO_TOKEN,
    "Basic RIGHT": NO_TOKEN, "Bearer RIGHT,Bearer RIGHT": NO_TOKEN, "Bearer sk-000000000000000000000000": NO_TOKEN,
}  # fmt: skip
RULES = [
    *(({"host": host}, code) for host, code in HOSTS.items()),
    *(({"origin": origin}, code) for origin, code in ORIGINS.items()),
    *(({"authorization": token}, code) for token, code in TOKENS.items()),
    ({"authorization": None}, NO_TOKEN),
    ({"authorization": None, "api-key": "RIGHT"}, OK),
    ({"authorization": None, "api-key": "WRONG"}, NO_TOKEN),
    # A wrong host is told before a wrong token: nobody learns which tokens are right from elsewhere.
    ({"host": "evil.example", "authorization": None}, NO_HOST),
    ({"host": "evil.example", "origin": "http://evil.example"}, NO_HOST),
    ({"origin": "http://evil.example", "authorization": None}, NO_ORIGIN),
    ({"host": "localhost:8000", "origin": "http://localhost:8000"}, OK),
    ({"host": "localhost:8000", "origin": "http://localhost:8000", "authorization": "Bearer WRONG"}, NO_TOKEN),
]  # fmt: skip
OPEN_RULES = [
    *(({"host": host}, code) for host, code in OPEN_HOSTS.items()),
    *(({"host": host, "authorization": None}, code or NO_TOKEN) for host, code in OPEN_HOSTS.items()),
    *(({"host": "192.168.0.9:8000", "origin": origin}, code) for origin, code in OPEN_ORIGINS.items()),
    ({"host": "192.168.0.9:8000", "origin": "http://192.168.0.9:8000", "authorization": None}, NO_TOKEN),
    ({"host": "192.168.0.9:8000", "origin": "http://evil.example", "authorization": None}, NO_ORIGIN),
    ({"host": "evil.example", "origin": "http://evil.example"}, NO_HOST),
]  # fmt: skip


def holds(client: Client, headers: dict[str, str | None], code: str | None) -> None:
    """Holds that a request is answered, or refused with that code."""
    given = {key: value and value.replace("RIGHT", client.token) for key, value in headers.items()}
    status, answer, told = client("GET", "/v1/models", headers=given)
    assert status == STATUSES[code]
    if code is not OK:
        assert answer["error"]["code"] == code
        assert client.token not in json.dumps(answer)
        assert told["x-request-id"]


@pytest.mark.parametrize(("headers", "code"), RULES)
def test_who_may_ask_on_loopback(client, headers, code):
    holds(client, headers, code)


@pytest.mark.parametrize(("headers", "code"), OPEN_RULES)
def test_who_may_ask_on_another_address(tmp_path, headers, code):
    holds(Client(tmp_path, bound="0.0.0.0"), headers, code)


def test_there_are_forty_rules_and_more():
    assert len(RULES) + len(OPEN_RULES) >= 40


def test_the_page_needs_no_token_and_tells_nothing(client):
    status, text, headers = client("GET", "/", headers={"authorization": None})
    assert status == 200
    assert client.token not in text
    assert "default-src 'none'" in headers["content-security-policy"]
    assert client("GET", "/", headers={"authorization": None, "host": "evil.example"})[0] == 403


def test_a_new_token_takes_the_place_of_the_old(client):
    old, client.token = client.token, access.make_token(client.state.store)
    assert client("GET", "/v1/models")[0] == 200
    assert client("GET", "/v1/models", headers={"authorization": f"Bearer {old}"})[0] == 401
    stored = "\n".join(client.state.store.connection.iterdump())
    assert client.token not in stored


# Hyperparameters


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"),
    [(10, 10, 1), (33, 3, 1), (34, 3, 1), (1, 25, 1), (4, 25, 1), (100, 3, 1), (1000, 3, 2), (8333, 3, 17),
     (8334, 2, 17), (25_000, 1, 50), (200_000, 1, 256)],
)  # fmt: skip
def test_auto_is_what_the_hosted_service_makes_of_it(rows, epochs, batch):
    values = hyperparameters.resolve(dict.fromkeys(hyperparameters.NAMES, "auto"), rows)
    assert values == {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}


def test_rows_of_a_step_are_exactly_those_asked_for():
    for batch_size in range(1, 257):
        size, accumulate = hyperparameters.micro_batch(batch_size)
        assert size * accumulate == batch_size
        assert size <= hyperparameters.MICRO_BATCH


def test_numbers_as_clients_write_them():
    texts = {"n_epochs": "3", "batch_size": "4", "learning_rate_multiplier": "0.1", "learning_rate": "2e-5"}
    found = hyperparameters.read({**texts, "lora_r": "8", "lora_alpha": "16.5"}, "h")
    assert found.values == {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 0.1}
    assert found.extensions == {"learning_rate": 2e-5, "lora_r": 8, "lora_alpha": 16.5}
    assert hyperparameters.read({"batch_size": 4.0}, "h").values["batch_size"] == 4
    for wrong in (
        {"n_epochs": True}, {"n_epochs": 2.5}, {"n_epochs": "2.5"}, {"batch_size": "-1"}, {"batch_size": "0x4"},
        {"learning_rate_multiplier": True}, {"learning_rate_multiplier": "nan"}, {"learning_rate_multiplier": "inf"},
        {"learning_rate_multiplier": "0"}, {"lora_r": "8.5"}, {"packing": "1"},
    ):  # fmt: skip
        with pytest.raises(RequestError):
            hyperparameters.read(wrong, "h")
