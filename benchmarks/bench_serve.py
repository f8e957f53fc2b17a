"""Tokens per second of eight chats over four adapters on one base: one after the other, and all at once.

python benchmarks/bench_serve.py [--base smollm2-135m] [--tokens 64]

Random adapters at rank 16 stand for trained ones: what is measured does not depend on what they say. Each chat is
greedy and of the same length. The first token two answers differ in must be one whose two likeliest were as good as
even, or the run fails.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora_ft import adapters, config, environment, saved, sources, tasks
from lora_ft import base as bases
from lora_ft.serve.decoding import Decoder, Piece
from lora_ft.serve.engine import Engine, Row
from lora_ft.serve.held import Home
from lora_ft.serve.sampling import Settings

CHATS, ADAPTERS, RANK = 8, 4, 16
# Of a difference of two logits in bfloat16, relative to logits of about 16.
EVEN = 0.25
QUESTIONS = (
    "What is the capital of France?", "Write a sentence about the sea.", "Name three primary colours.",
    "How do I boil an egg?", "What is two plus two?", "Tell me a short story.", "Who wrote Hamlet?", "What is rain?",
)  # fmt: skip


def made(base: bases.Base, name: str, folder: Path, seed: int) -> Path:
    """Returns the folder of an adapter drawn at random."""
    settings = config.RunConfig(task="chat", base=name, out=Path("x"), lora=config.LoraConfig(rank=RANK))
    task = tasks.get("chat")
    model = adapters.attach(base, settings.lora, peft_task=task.peft_task, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for key, parameter in adapters.trained(model).items():
        if "lora_B" in key:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.002
    place = folder / f"adapter-{seed}"
    saved.save(model, place)
    base.tokenizer.save_pretrained(place)
    environment.write(place, environment.describe(base))
    model.unload()
    return place


def answers(engine: Engine, rows: list[Row], together: bool) -> tuple[list[list], float]:
    """Returns the tokens of each answer and the seconds that all of them took."""
    found: list[list] = [[] for _ in rows]
    ended = [threading.Event() for _ in rows]
    began = time.perf_counter()

    def teller(place: int):
        def tell(piece: Piece | Exception) -> None:
            if isinstance(piece, Exception):
                raise piece
            found[place] += piece.tokens
            if piece.finish:
                ended[place].set()

        return tell

    for place, row in enumerate(rows):
        row.tell = teller(place)
        if not together:
            engine.submit([row])
            ended[place].wait()
    if together:
        engine.submit(rows)
        for event in ended:
            event.wait()
    return found, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    source = sources.resolve(options.base)
    home = Home(source, sources.weights_digest(source.folder))
    task = tasks.get("chat")
    with tempfile.TemporaryDirectory() as scratch:
        places = []
        for seed in range(ADAPTERS):
            base = bases.load(source)
            places.append(made(base, options.base, Path(scratch), seed))
        task.prepare(base.tokenizer, 512)
        prompts = [task.renderer.prompt([{"role": "user", "content": one}]) for one in QUESTIONS]
        del base
        engine = Engine()

        def rows() -> list[Row]:
            # No token ends an answer, so that all are of the same length.
            settings = Settings(max_tokens=options.tokens, temperature=0.0, logprobs=2)
            return [
                Row(home, places[n % ADAPTERS], prompts[n], settings, Decoder(task.tokenizer, ()), print)
                for n in range(CHATS)
            ]

        answers(engine, rows()[:ADAPTERS], together=True)
        times: dict[bool, list[float]] = {False: [], True: []}
        texts = {}
        for _ in range(options.repeats):
            for together in (False, True):
                texts[together], seconds = answers(engine, rows(), together)
                times[together].append(seconds)
        engine.stop()
    differ = 0
    for alone, beside in zip(texts[False], texts[True], strict=True):
        for one, other in zip(alone, beside, strict=True):
            if one.token != other.token:
                differ += 1
                margin = one.top[0][1] - one.top[1][1]
                if margin > EVEN:
                    raise SystemExit(f"an answer differs where the likeliest token leads by {margin:.3f}")
                break
    rates = {together: CHATS * options.tokens / min(seconds) for together, seconds in times.items()}
    print(f"{CHATS} chats of {options.tokens} tokens over {ADAPTERS} adapters of rank {RANK} on {options.base}")
    print(f"one after the other {rates[False]:.1f} tokens/s, all at once {rates[True]:.1f} tokens/s")
    print(f"{rates[True] / rates[False]:.2f} times; {CHATS - differ} of {CHATS} answers the same to the last token")
    csv.writer(sys.stdout).writerow([options.base, options.tokens, f"{rates[False]:.2f}", f"{rates[True]:.2f}"])


if __name__ == "__main__":
    main()
