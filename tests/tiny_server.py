"""A server on a free port with a tiny base that writes bytes, and rows for it, for tests of the whole way."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.in_process import FORM, form
from tests.tiny import ARCHITECTURES

ROOT = Path(__file__).parents[1]
JOBS = "/v1/fine_tuning/jobs"
SPECIALS = ("<pad>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer with a token a byte, so that it can write anything, and a ChatML template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>")
    made.add_tokens([AddedToken("<|im_start|>", special=True)], special_tokens=True)
    made.chat_template = TEMPLATE
    return made


def base_folder(folder: Path, seed: int = 0, context: int = 2048) -> Path:
    """Returns `folder` holding a random model over bytes."""
    model_name, config_name, small = ARCHITECTURES["llama"]
    transformers.set_seed(seed)
    words = tokenizer()
    config = getattr(transformers, config_name)(
        **{**small, "max_position_embeddings": context}, vocab_size=len(words), initializer_range=0.2,
        bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    getattr(transformers, model_name)(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def chats(count: int = 12, seed: int = 0) -> str:
    """Returns JSONL of conversations that can be learned."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        word = "".join(rng.choice("abcdef") for _ in range(4))
        said = [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word.upper()}]
        lines.append(json.dumps({"messages": said}))
    return "\n".join(lines) + "\n"


def pairs(count: int = 12, seed: int = 0) -> str:
    """Returns JSONL of preferences that can be learned: words that are written large, rather than small."""
    lines = []
    for line in chats(count, seed).splitlines():
        asked, reply = json.loads(line)["messages"]
        worse = {**reply, "content": reply["content"].lower()}
        row = {"input": {"messages": [asked]}, "preferred_output": [reply], "non_preferred_output": [worse]}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def home(folder: Path, base: Path) -> Path:
    """Returns a server's folder in which every name that scripts use means the tiny base."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("gpt-4o-mini-2024-07-18", "gpt-3.5-turbo", "babbage-002")
    table = {"bases": {"tiny": str(base)}, "aliases": dict.fromkeys(names, "tiny")}
    (folder / "models.json").write_text(json.dumps(table))
    return folder


class Server:
    """`lora-ft serve` in a process of its own, from `with` to the end of the block."""

    def __init__(self, home: Path, *options: str, token: str = "", **environment: str) -> None:
        self.home, self.options, self.token, self.environment = home, options, token, environment
        self.log: list[str] = []

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "lora_ft.cli", "serve", "--home", str(self.home), "--port", "0", *self.options]
        paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        settings = {
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }
        self.process = subprocess.Popen(
            command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        threading.Thread(target=self._read_log, daemon=True).start()
        self.url = ""
        for line in self.process.stdout:
            if "/v1 is ready" in line:
                self.url = line.split("/v1")[0]
                if self.token:
                    break
            if line.startswith("OPENAI_API_KEY="):
                self.token = line.strip().partition("=")[2]
                break
        assert self.url, "\n".join(self.log)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Returns status and JSON (or text) of an answer."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=120)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", **headers}
        try:
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def upload(self, text: str) -> str:
        """Returns the id of a new file of rows."""
        kind = {"Content-Type": str(FORM["content-type"])}
        return str(self.ask("POST", "/v1/files", form(text.encode(), purpose="fine-tune"), **kind)[1]["id"])

    def start_job(self, file: str, **more: Any) -> str:
        """Returns the id of a new job."""
        status, made = self.ask("POST", JOBS, {"model": "tiny", "training_file": file, **more})
        assert status == 200, made
        return str(made["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """Returns a job as it stands."""
        return dict(self.ask("GET", f"{JOBS}/{job_id}")[1])

    def until(self, job_id: str, is_so: Callable[[dict[str, Any]], bool], seconds: float = 120) -> dict[str, Any]:
        """Returns the job once something holds of it."""
        end = time.monotonic() + seconds
        while not is_so(found := self.job(job_id)):
            assert time.monotonic() < end, (found, self.log[-30:])
            time.sleep(0.05)
        return found

    def ended(self, job_id: str) -> dict[str, Any]:
        """Returns the job once it has ended."""
        return self.until(job_id, lambda job: job["status"] in ("succeeded", "failed", "cancelled"))

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """Returns all events of a job, the oldest first."""
        return list(self.ask("GET", f"{JOBS}/{job_id}/events?limit=1000")[1]["data"])[::-1]

    def steps(self, job_id: str) -> int:
        """Returns how many steps of a job were told."""
        return sum(event["type"] == "metrics" for event in self.events(job_id))

    def adapter(self, job_id: str) -> bytes:
        """Returns the bytes of the adapter that a job made."""
        return (self.home / "runs" / job_id / "adapter_model.safetensors").read_bytes()

    def workers(self, job_id: str) -> list[psutil.Process]:
        """Returns the processes that work on a job."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if "lora_ft.serve.worker" in words and job_id in words and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
        # A process that one of them forked has the same words.
        return [process for process in found.values() if process.ppid() not in found]

    def kill(self) -> None:
        """Ends the server as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
