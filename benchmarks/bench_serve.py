"""Tokens per second of eight chats over four adapters on one base: one after the other, and all at once.

python benchmarks/bench_serve.py [--base smollm2-135m] [--tokens 64]

Random adapters at rank 16 stand for trained ones: what is measured does not depend on what they say. Each chat is
greedy and of the same length; once that length is asked for, and once none is, and the client leaves at it.

Where an answer among others parts from the one by itself, the two likeliest logits of the latter must be no further
apart than twice what rounding does there: the largest difference between the logits of that very beginning computed by
itself and beside the other chats, on one adapter, lest a mistake in mixing them pass for rounding. The run fails
otherwise, or where answers at once are not 2.5 times as fast.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora_ft import adapters, config, saved, sources, tasks
from lora_ft import base as bases
from lora_ft.proof import environment
from lora_ft.serve.decoding import Decoder, Piece
from lora_ft.serve.engine import Engine, Row
from lora_ft.serve.held import Held, Home
from lora_ft.serve.sampling import Chosen, Settings

CHATS, ADAPTERS, RANK = 8, 4, 16
TARGET = 2.5
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


def answers(engine: Engine, rows: list[Row], tokens: int, together: bool) -> tuple[list[list[Chosen]], float]:
    """Returns the first `tokens` of each answer and the seconds that all of them took."""
    found: list[list[Chosen]] = [[] for _ in rows]
    ended = [threading.Event() for _ in rows]
    began = time.perf_counter()

    def teller(place: int):
        def tell(piece: Piece | Exception) -> None:
            if isinstance(piece, Exception):
                raise SystemExit(f"an answer failed: {piece}")
            found[place] += piece.tokens
            if piece.finish or len(found[place]) >= tokens:
                rows[place].cancelled = True
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
    return [one[:tokens] for one in found], time.perf_counter() - began


@torch.inference_mode()
def rounding(held: Held, adapter: Path, prompts: list[list[int]], said: list[list[int]], chat: int) -> float:
    """Returns the largest difference of the logits behind what a chat said, read by itself and in a row among all.

    All rows have the adapter of that chat: rows of other adapters are what the difference is to judge.
    """

    def logits(rows: list[int]) -> torch.Tensor:
        names, cache = [held.name_of(adapter)] * len(rows), held.cache()
        longest = max(len(prompts[row]) for row in rows)
        padding = [longest - len(prompts[row]) for row in rows]
        ids = torch.tensor([[0] * pad + prompts[row] for row, pad in zip(rows, padding, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        for step in range(len(said[chat]) + 1):
            if step:
                ids = torch.tensor([[said[row][step - 1]] for row in rows])
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.int64)], dim=1)
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            read = {"input_ids": ids, "position_ids": places, "attention_mask": mask}
            inputs = {name: value.to(held.device) for name, value in read.items()}
            out = held.run(names, **inputs, past_key_values=cache, use_cache=True)
        return out.logits[rows.index(chat), -1].float()

    return float((logits([chat]) - logits(list(range(len(prompts))))).abs().max())


def parting(alone: list[Chosen], beside: list[Chosen]) -> int | None:
    """Returns the first place where two answers differ."""
    pairs = enumerate(zip(alone, beside, strict=True))
    return next((place for place, (one, other) in pairs if one.token != other.token), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    source = sources.resolve(options.base)
    home = Home(source, sources.weights_digest(source.folder))
    context = bases.positions(bases.read_config(source.folder), options.base) or 2048
    task = tasks.get("chat")
    wrong = []
    print(f"{CHATS} chats of {options.tokens} tokens over {ADAPTERS} adapters of rank {RANK} on {options.base}")
    with tempfile.TemporaryDirectory() as scratch:
        adapters_made = []
        for seed in range(ADAPTERS):
            base = bases.load(source)
            adapters_made.append(made(base, options.base, Path(scratch), seed))
        task.prepare(base.tokenizer, 512)
        prompts = [task.renderer.prompt([{"role": "user", "content": one}]) for one in QUESTIONS]
        del base
        engine = Engine()

        def rows(limit: int | None) -> list[Row]:
            # No token ends an answer, so that all are of the same length.
            made = []
            for n, prompt in enumerate(prompts):
                settings = Settings(max_tokens=limit or context - len(prompt), temperature=0.0, logprobs=2)
                decoder = Decoder(task.tokenizer, ())
                made.append(Row(home, adapters_made[n % ADAPTERS], prompt, settings, decoder, print))
            return made

        answers(engine, rows(4)[:ADAPTERS], 4, together=True)
        texts: dict[bool, list[list[Chosen]]] = {}
        parted = {}
        for limit in (options.tokens, None):
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(options.repeats):
                for together in (False, True):
                    texts[together], seconds = answers(engine, rows(limit), options.tokens, together)
                    times[together].append(seconds)
                for chat, pair in enumerate(zip(texts[False], texts[True], strict=True)):
                    if (place := parting(*pair)) is not None:
                        parted[chat, place] = texts[False]
            rates = {together: CHATS * options.tokens / statistics.median(s) for together, s in times.items()}
            ratio = rates[True] / rates[False]
            print(
                f"max_tokens {limit or 'not given'}: one after the other {rates[False]:.1f} tokens/s, all at once "
                f"{rates[True]:.1f}, {ratio:.2f} times"
            )
            csv.writer(sys.stdout).writerow(
                [options.base, options.tokens, limit, *(f"{r:.2f}" for r in rates.values())]
            )
            if ratio < TARGET:
                wrong.append(f"answers at once are {ratio:.2f} times as fast, not {TARGET}")
        engine.stop()
        del engine
        held = Held(home) if parted else None
        for (chat, place), alone in parted.items():
            said = [[one.token for one in text[:place]] for text in alone]
            (_, likeliest), (_, next_best) = alone[chat][place].top
            gap, apart = likeliest - next_best, rounding(held, adapters_made[chat % ADAPTERS], prompts, said, chat)
            print(f"chat {chat} parts at token {place}: the two likeliest are {gap:.4f} apart, rounding is {apart:.4f}")
            if gap > 2 * apart:
                wrong.append(f"chat {chat} parts at token {place} by more than rounding")
    print(f"{CHATS - len({chat for chat, _ in parted})} of {CHATS} answers are the same to the last token")
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
