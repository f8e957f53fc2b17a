"""The real llama.cpp, as the package xllamacpp brings it: its server in this process, asked over its own interface."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# Log-probabilities of one model in float16 and in float32 differ by some hundredths; of another, by far more.
CLOSE = 0.05


@dataclass
class LlamaCpp:
    """A running server."""

    server: Any

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Returns the answer to a request."""
        request = urllib.request.Request(
            f"{self.server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[float | None]]:
        """Returns the likeliest tokens after a prompt, and the log-probability of each that is told.

        Of a token that is half a letter it is not.
        """
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "n_probs": 1, "return_tokens": True}
        found = self.post("/completion", {**body, "cache_prompt": False, "samplers": ["temperature"]})
        told, logp = list(found.get("completion_probabilities", ())), []
        for token in found["tokens"]:
            logp.append(told.pop(0)["logprob"] if told and told[0]["id"] == token else None)
        return found["tokens"], logp

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Returns the tokens that a conversation is asked with, by the template and the tokenizer in the file."""
        text = self.post("/apply-template", {"messages": list(messages)})["prompt"]
        # As the server does it for a chat: the template writes its own BOS, if any.
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]


@contextmanager
def running(model: Path, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """Yields llama.cpp with a GGUF file, and an adapter of it; skips where it is not installed."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(model), 1024, 1
    params.cpuparams.n_threads, params.warmup, params.n_gpu_layers, params.verbosity = 2, False, 0, -1
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    yield LlamaCpp(xllamacpp.Server(params))


def agreed(model: Any, prompt: Sequence[int], said: list[int], logp: list[float | None], room: float = CLOSE) -> int:
    """Returns how many tokens llama.cpp said as the model would, up to the first where two were as likely.

    Fails where another token was likelier by more than `room`, or its log-probability is further off.
    """
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1].float()
    logp_TV = logits_TV.log_softmax(dim=-1)
    for place, token in enumerate(said):
        best = float(logp_TV[place].max())
        assert best - float(logp_TV[place, token]) < room, (place, token)
        told = logp[place]
        assert told is None or abs(float(logp_TV[place, token]) - told) < room, (place, token)
        if int(logp_TV[place].argmax()) != token:
            return place
    return len(said)
