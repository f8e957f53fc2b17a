"""Scripts with OpenAI's own client, three versions of it, against a server with a tiny base."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import openai_clients, tiny_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clients")
    (made / "train.jsonl").write_text(tiny_server.chats(12))
    (made / "valid.jsonl").write_text(tiny_server.chats(4, seed=1))
    tiny_server.base_folder(made / "base")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tiny_server.Server]:
    with tiny_server.Server(tiny_server.home(folder / "home", folder / "base")) as running:
        yield running
    assert running.process.returncode == 0
    assert "Traceback" not in "\n".join(running.log)


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("version", openai_clients.VERSIONS)
def test_a_script_runs_unchanged(server: tiny_server.Server, folder: Path, version: str, way: str) -> None:
    said = openai_clients.run(version, server.url, server.token, "whole_way.py", way, str(folder))
    assert said.split()[:2] == [version, way]
