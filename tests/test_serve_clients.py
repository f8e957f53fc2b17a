"""Scripts with OpenAI's own client, three versions of it, against a server with a tiny base."""

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from lora_ft.data import formats
from lora_ft.serve import engine
from tests import openai_clients, tiny_server
from tests.in_process import Client

# Of one script, from its first request to its last.
LONGEST_S = 60.0
ROWS = Path(__file__).parents[2] / "shared" / "data" / "alpaca_en_demo.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clients")
    (made / "train.jsonl").write_text(tiny_server.chats(12))
    (made / "valid.jsonl").write_text(tiny_server.chats(4, seed=1))
    (made / "pairs.jsonl").write_text(tiny_server.pairs(12))
    (made / "held_out.jsonl").write_text(tiny_server.pairs(4, seed=1))
    tiny_server.base_folder(made / "base")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tiny_server.Server]:
    with tiny_server.Server(tiny_server.home(folder / "home", folder / "base")) as running:
        yield running
    assert running.process.returncode == 0
    assert "Traceback" not in "\n".join(running.log)


@pytest.mark.parametrize("script", ["whole_way.py", "pausing.py"])
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("version", openai_clients.VERSIONS)
def test_a_script_runs_unchanged(server: tiny_server.Server, folder: Path, version: str, way: str, script: str) -> None:
    said = openai_clients.run(version, server.url, server.token, script, way, str(folder)).split()
    assert said[:2] == [version, way]
    assert float(said[2]) < LONGEST_S


# What the others differ in is told by the scripts above.
@pytest.mark.parametrize("version", [*[pytest.param(v, marks=pytest.mark.slow) for v in openai_clients.VERSIONS[:-1]],
                                     openai_clients.VERSIONS[-1]])  # fmt: skip
def test_preferences_are_learned_on_top_of_replies(server: tiny_server.Server, folder: Path, version: str) -> None:
    pytest.importorskip("trl")
    said = openai_clients.run(version, server.url, server.token, "preferring.py", str(folder)).split()
    assert said[0] == version


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not ROWS.is_file(), reason=f"the real rows are not in {ROWS.name}")
def test_a_script_runs_unchanged_with_a_real_base_and_real_rows(tmp_path: Path) -> None:
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]}
        )
        for row in formats.read(str(ROWS))[:68]
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:60]))
    (tmp_path / "valid.jsonl").write_text("\n".join(lines[60:]))
    with tiny_server.Server(tmp_path / "home") as running:
        words = ("whole_way.py", "sync", str(tmp_path), "1", "4", "1")
        said = openai_clients.run(openai_clients.VERSIONS[-1], running.url, running.token, *words, timeout=3000)
    assert said.split()[:2] == [openai_clients.VERSIONS[-1], "sync"]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("version", openai_clients.VERSIONS)
def test_a_stream_that_breaks_makes_the_client_raise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, way: str
) -> None:
    step, made = engine._Batch.step, itertools.count()

    def breaks(batch):
        if next(made) > 3:
            raise RuntimeError("a secret of the inside")
        return step(batch)

    monkeypatch.setattr(engine._Batch, "step", breaks)
    here = Client(tiny_server.home(tmp_path / "home", folder / "base"))
    listening = socket.create_server(("127.0.0.1", 0))
    serving = uvicorn.Server(uvicorn.Config(here.app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        *came, end = openai_clients.run(version, url, here.token, "broken.py", "told", way).splitlines()
    finally:
        serving.should_exit = True
        thread.join()
        here.state.answers.stop()
    assert came
    assert end.startswith("raised internal_error The answer")
    assert "inside" not in end


# Each takes a server of its own.
@pytest.mark.parametrize("version", ["1.109.1", pytest.param("2.54.0", marks=pytest.mark.slow), "3.54.0"])
def test_a_server_that_is_killed_in_a_stream_makes_the_client_raise(folder: Path, tmp_path: Path, version: str) -> None:
    end = str(tiny_server.tokenizer().eos_token_id)
    with tiny_server.Server(tiny_server.home(tmp_path / "home", folder / "base")) as running:
        words = ("stream", str(running.process.pid), end)
        said = openai_clients.run(version, running.url, running.token, "broken.py", *words)
    assert said.startswith("raised ")


class Deaf:
    """A proxy that hands the first request for a new job on and drops the answer to it."""

    def __init__(self, url: str) -> None:
        self.target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.dropped = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            data = b""
            while b"\r\n\r\n" not in data:
                data += client.recv(65536)
            head, _, rest = data.partition(b"\r\n\r\n")
            # The Host is the server's own, and one request a connection is enough.
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"host:", b"connection:"))]
            size = next((int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")), 0)
            while len(rest) < size:
                rest += client.recv(65536)
            server.sendall(b"\r\n".join([*lines, b"Host: localhost", b"Connection: close"]) + b"\r\n\r\n" + rest)
            answer = b""
            while more := server.recv(65536):
                answer += more
            if lines[0].startswith(b"POST /v1/fine_tuning/jobs ") and not self.dropped:
                self.dropped += 1
                return
            client.sendall(answer)


@pytest.mark.parametrize("version", openai_clients.VERSIONS)
def test_a_client_that_does_not_hear_the_answer_makes_one_job(server: tiny_server.Server, version: str) -> None:
    proxy, file = Deaf(server.url), server.upload(tiny_server.chats(12))
    said = openai_clients.run(version, proxy.url, server.token, "broken.py", "create", file)
    proxy.socket.close()
    assert proxy.dropped == 1
    jobs = [
        job for job in server.ask("GET", f"{tiny_server.JOBS}?limit=100")[1]["data"] if job["training_file"] == file
    ]
    assert [job["id"] for job in jobs] == [said.split()[1]]
    server.ask("POST", f"{tiny_server.JOBS}/{jobs[0]['id']}/cancel")
