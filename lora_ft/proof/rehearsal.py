"""A recipe's twin: the whole way from rows to merged model on a random model of the base's kind, in seconds."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lora_ft import runs, seal, tasks
from lora_ft.config import FROM_HUB, TOOL_CALLS, LoraConfig, RunConfig, TrainConfig
from lora_ft.errors import ConfigError, Interrupted
from lora_ft.merge import merge
from lora_ft.model import miniature
from lora_ft.system import processes
from lora_ft.training import rows

# Enough for random weights to say something else.
STEPS, LEAST_LR = 6, 5e-3
MOST_ROWS, MOST_PASSES = 4, 2
MOST_RANK = 8
BASE, ADAPTER, MERGED = "base", "adapter", "merged"


def rehearse(config: RunConfig, say: Callable[[str], None]) -> None:
    """Trains, saves, reloads, merges and verifies the twin of a run in a folder that goes away, and tells of each.

    Raises:
        ProofError: the twin does not do what it should. DataError, ConfigError, UnsupportedModelError: as of the run.
    """
    if processes.asked() > 1:
        raise ConfigError("twin is tried out in one process: start it without torchrun or accelerate launch.")
    began = time.perf_counter()
    task = tasks.of(config)
    config = task.rehearsed(config)
    train_rows, held_out = rows.few(config, task)
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter, merged = (Path(scratch) / name for name in (BASE, ADAPTER, MERGED))
        small = miniature.make(base, config, task, [*train_rows, *held_out])
        say(f"twin of {config.base or config.task}: {small}")
        where = "of data.train" if config.data.train is not None else "made up by the task"
        if config.init_from is not None:
            say("The twin begins anew: the adapter of --init-from fits no other base.")
        say(f"rows: {len(train_rows)} to train on and {len(held_out)} held out, {where}")
        try:
            finished = runs.run(_shortened(config, base, adapter), examples=train_rows, held_out=held_out,
                                console=Console(quiet=True))  # fmt: skip
        except Interrupted:
            # What it would go on from goes away with the folder.
            raise KeyboardInterrupt from None
        say(f"trained {finished.fit.steps} steps: {finished.summary()}")
        live = finished.prove()
        say(f"ok  the adapter changes what the model says: {live.kl_effect:.3g} nats, at least {seal.LEAST_EFFECT:g}")
        within = f"at most {seal.SHARE * live.kl_effect:.3g}"
        say(f"ok  loaded anew it says the same: {live.kl_live:.3g} nats apart, {within}; {len(live.checks)} checks of "
            "its folder passed")  # fmt: skip
        onto = merge(adapter, merged)["onto"]
        whole = seal.verify(adapter, model_folder=merged)
        whole.require(merged)
        say(f"ok  merged onto the {onto} weights it says the same: {whole.kl_live:.3g} nats apart, {within}; "
            f"{len(whole.checks)} checks passed")  # fmt: skip
    say(f"The twin passed in {time.perf_counter() - began:.1f} s. Nothing was fetched for it, and nothing is kept.")


def _shortened(config: RunConfig, base: Path, out: Path) -> RunConfig:
    """Returns the configuration of the twin: that of the run, but for its base, its length and its size."""
    return dataclasses.replace(
        config,
        base=str(base),
        revision=None,
        init_from=None,
        out=out,
        lora=_narrowed(config.lora),
        data=dataclasses.replace(
            config.data,
            train=None,
            eval=None,
            streaming=False,
            # Of made-up rows none calls a tool.
            metrics=tuple(m for m in config.data.metrics if not m.startswith(FROM_HUB) and m != TOOL_CALLS),
        ),
        train=_hastened(config.train),
        twin=False,
    )


def _narrowed(lora: LoraConfig) -> LoraConfig:
    return dataclasses.replace(
        lora,
        rank=min(lora.rank, MOST_RANK),
        rank_pattern={name: min(rank, MOST_RANK) for name, rank in lora.rank_pattern.items()},
        rslora=lora.uses_rslora,
    )


def _hastened(train: TrainConfig) -> TrainConfig:
    half = STEPS // 2
    return dataclasses.replace(
        train,
        batch_size=min(train.batch_size, MOST_ROWS),
        accumulate=min(train.accumulate, MOST_PASSES),
        steps=STEPS,
        lr=max(train.lr, LEAST_LR),
        warmup=0.0,
        eval_steps=train.eval_steps and half,
        save_steps=train.save_steps and half,
        shard_base=False,
        report_to=(),
    )
