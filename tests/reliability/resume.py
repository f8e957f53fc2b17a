"""Runs that are stopped and resumed, against the same runs in one piece: fingerprints and adapters, bit for bit.

    python -m tests.reliability.resume --count 50

Each draw takes an accumulation, a kind of adapter, a base, rows one by one or packed, a step at an epoch's end or
within one, and whether a signal stopped the run, which then saved, or `kill -9` did. Dropout is on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_ft import adapters, tasks, train
from lora_ft import base as bases
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from tests import tiny
from tests.reliability.forks import MEMORY, fingerprints, fork, one_thread

ROWS, BATCH, EPOCHS = 14, 2, 3
# Tokens that rows are packed into: two rows each, so that packed or not a batch has the same number of them.
PACK = 24
ADAPTERS = {"LoRA": {}, "DoRA": {"dora": True}, "rsLoRA": {"rslora": True}}
BASES = {"NF4": {"quant": "nf4", "dtype": "float32"}, "bf16": {"quant": "none", "dtype": "bfloat16"}}


@dataclasses.dataclass(frozen=True)
class Draw:
    """One run, and where it is stopped."""

    accumulate: int
    adapter: str
    base: str
    packed: bool
    at_epoch_end: bool
    stop: int
    """The step at the end, or in the middle, of which the run is stopped."""
    by: signal.Signals
    log_steps: int

    @classmethod
    def of(cls, rng: random.Random) -> Draw:
        accumulate, at_epoch_end = rng.choice([1, 4]), rng.random() < 0.5
        each = -(-(ROWS // BATCH) // accumulate)
        stops = [step for step in range(1, EPOCHS * each) if (step % each == 0) == at_epoch_end]
        return cls(
            accumulate, rng.choice(list(ADAPTERS)), rng.choice(list(BASES)), rng.random() < 0.5, at_epoch_end,
            rng.choice(stops), rng.choice([signal.SIGTERM, signal.SIGKILL]), rng.choice([1, 3]),
        )  # fmt: skip

    @property
    def run(self) -> tuple[Any, ...]:
        """What the run in one piece depends on."""
        return self.accumulate, self.adapter, self.base, self.packed, self.log_steps


class Stop(TrainerCallback):
    """Sends the process a signal: within a step to have it saved, after a save to have it dead."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.draw.stop - 1 and self.draw.by == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_substep_end(self, args, state, control, **kwargs):
        # With accumulation, in the middle of the step after the one that was saved.
        self.kill(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.kill(state.global_step)

    def kill(self, step: int) -> None:
        if step == self.draw.stop and self.draw.by == signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(base: Path, draw: Draw, out: Path, *, stopped: bool, resume: bool = False) -> None:
    """Trains into `out`, and writes the digest of the adapter beside the metrics once it is done."""
    kind, stored = ADAPTERS[draw.adapter], BASES[draw.base]
    lora = LoraConfig(rank=4, alpha=16.0, dropout=0.2, **kind)
    settings = TrainConfig(
        batch_size=1 if draw.packed else BATCH, accumulate=draw.accumulate, epochs=EPOCHS, lr=1e-2, warmup=0.1,
        dtype=stored["dtype"], save_steps=1 if draw.by == signal.SIGKILL else None, log_steps=draw.log_steps,
    )  # fmt: skip
    data = DataConfig(packing=draw.packed, max_length=PACK)
    config = RunConfig(
        task="complete", base=str(base), out=out, quant=stored["quant"], lora=lora, data=data, train=settings,
        resume=resume,
    )  # fmt: skip
    task = tasks.get("complete")
    loaded = bases.load(str(base), quant=stored["quant"], dtype=stored["dtype"], device="cpu")
    task.prepare(loaded.tokenizer, PACK)
    model = adapters.attach(loaded, lora, peft_task=task.peft_task, seed=settings.seed)
    rows = tiny.rows("complete", ROWS)
    done = train.fit(task, loaded, model, rows, [], config, [Stop(draw)] if stopped else [])
    if not done.interrupted:
        digest = hashlib.sha256()
        for name, parameter in sorted(adapters.trained(model).items()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
        (out / "digest.json").write_text(json.dumps([digest.hexdigest(), done.tokens]))


def differing(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Returns what differed in each of `count` draws between the resumed run and the one in one piece."""
    one_thread()
    base, said, rng = tiny.model_folder(folder / "base"), folder / "said.txt", random.Random(seed)
    whole: dict[tuple[Any, ...], Path] = {}
    wrong, out = [], folder / "run"
    for i in range(count):
        draw = Draw.of(rng)
        if draw.run not in whole:
            whole[draw.run] = folder / f"whole-{i}"
            plain = dataclasses.replace(draw, by=signal.SIGTERM)
            ended = fork(lambda p=plain, o=whole[draw.run]: fit(base, p, o, stopped=False), said)
            assert ended.status == 0, ended.said
        first = fork(lambda d=draw: fit(base, d, out, stopped=True), said)
        if first.status not in (0, -draw.by) or (out / "digest.json").exists():
            wrong.append(f"{draw}: was not stopped: {first}")
        then = fork(lambda d=draw: fit(base, d, out, stopped=False, resume=True), said)
        if then.status != 0:
            wrong.append(f"{draw}: {then.said}")
        elif fingerprints(out) != fingerprints(whole[draw.run]):
            wrong.append(f"{draw}: fingerprints {fingerprints(out)}, not {fingerprints(whole[draw.run])}")
        elif (out / "digest.json").read_text() != (whole[draw.run] / "digest.json").read_text():
            wrong.append(f"{draw}: another adapter, or other tokens were counted")
        shutil.rmtree(out)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        wrong = differing(Path(scratch), options.count, options.seed)
    print(f"{options.count} resumed runs: {options.count - len(wrong)} equal the run in one piece bit for bit")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
