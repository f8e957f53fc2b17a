"""Lists that change while a client goes through them page by page."""

import json
from pathlib import Path

import pytest

from lora_ft.serve import files
from tests.in_process import Client


@pytest.fixture
def client(tmp_path: Path) -> Client:
    (tmp_path / "models.json").write_text(json.dumps({"bases": {"tiny": "nowhere"}, "aliases": {}}))
    return Client(tmp_path)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_files_can_be_deleted_while_they_are_listed(client, order):
    made = [client.upload("{}")[1]["id"] for _ in range(7)]
    deleted, after = [], ""
    while True:
        status, page, _ = client("GET", f"/v1/files?limit=3&order={order}{after}")
        assert status == 200, page
        for file in page["data"]:
            assert client("DELETE", f"/v1/files/{file['id']}")[0] == 200
            deleted.append(file["id"])
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert deleted == (made if order == "asc" else made[::-1])
    assert client("GET", "/v1/files")[1]["data"] == []


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_file_that_expires_keeps_its_place_in_the_list(client, monkeypatch, is_removed):
    kept = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    made = [client.upload("{}", **more)[1] for more in ({}, kept, {})]
    monkeypatch.setattr(files, "now", lambda: made[1]["expires_at"])
    if is_removed:
        client.state.files.clear_up()
    page = client("GET", f"/v1/files?after={made[1]['id']}")[1]
    assert [file["id"] for file in page["data"]] == [made[0]["id"]]


def test_a_file_is_no_place_in_the_list_of_jobs(client):
    file = client.upload("{}")[1]["id"]
    client("DELETE", f"/v1/files/{file}")
    assert client("GET", f"/v1/fine_tuning/jobs?after={file}")[0] == 400
