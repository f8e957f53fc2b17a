"""A server on a free port with a tiny base that writes bytes, and rows for it, for tests of the whole way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.tiny import ARCHITECTURES

ROOT = Path(__file__).parents[1]
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

    def kill(self) -> None:
        """Ends the server as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
