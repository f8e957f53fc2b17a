"""The quickstart: one real run from download to merged model, measured against the base at each stage."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_ft import evaluate, runs, seal, tasks, train
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.data import meetings
from lora_ft.data.examples import Chat
from lora_ft.errors import ConfigError, Interrupted
from lora_ft.merge import REPORT, merge
from lora_ft.model import modes
from lora_ft.system import atomicio, heap
from lora_ft.training import started

FOLDER = Path("runs/quickstart")
MERGED = "merged"
BASE = "smollm2-135m"
TRAIN_ROWS = 600
HELD_OUT_ROWS = 100
SHOTS = 3
METRIC = "json_match"


def quickstart(out: Path | None = None, *, resume: bool = False) -> None:
    """Makes rows, fine-tunes SmolLM2-135M on them, proves the adapter, merges it and prints what came of it.

    Args:
        out: folder for all of it; unset, `runs/quickstart`, with a number where that is taken.
        resume: go on with the one that was interrupted there, in whatever it was doing.

    Raises:
        ConfigError: the folder holds something else.
        ProofError: the adapter or the merged model is not what its seal says.
        Interrupted: it was stopped and can be resumed.
    """
    console = Console()
    began = time.perf_counter()
    folder = out or _free_folder(resume)
    run_config, merged_folder = dataclasses.replace(config(folder), resume=resume), folder / MERGED
    train_rows, held_out = meetings.rows(TRAIN_ROWS, "train"), meetings.rows(HELD_OUT_ROWS, "held_out")
    files = {str(run_config.data.train): _lines(train_rows), str(run_config.data.eval): _lines(held_out)}
    _refuse_to_overwrite(run_config, files, merged_folder)
    for path, text in files.items():
        atomicio.write(Path(path), text)
    finished = runs.run(run_config, console=console)
    try:
        few_shot, merged_score, onto = _merge_and_measure(finished, held_out, merged_folder, console)
    except KeyboardInterrupt:
        raise Interrupted("Stopped after the training, whose adapter is saved. To go on:") from None
    # Last, as it ends the run: until here it can be resumed.
    with console.status("loading the adapter anew and replaying its seal"):
        finished.prove()

    metrics = finished.metrics
    columns = {
        "base": metrics["base"],
        f"base, {SHOTS} examples": few_shot,
        "adapter": metrics["adapter"],
        "merged": merged_score,
    }
    peak = train.peak_bytes(torch.device("cpu")) / 2**30
    _show_samples(console, finished.page.samples)
    console.print(_table(columns))
    console.print(
        f"trained on {finished.fit.tokens:,} tokens in {finished.fit.seconds:.0f} s: {finished.summary()}\n"
        f"adapter {finished.page.adapter_bytes / 2**20:.1f} MiB in {finished.folder}; "
        f"merged onto {onto} weights in {merged_folder}\n"
        f"all of it in {time.perf_counter() - began:.0f} s, peak {peak:.2f} GiB\n\nNext:\n"
        f"  {sys.argv[0]} chat {finished.folder}\n"
        f"  {sys.argv[0]} evaluate {finished.folder} --data {folder / 'held_out.jsonl'} --metrics {METRIC}\n"
        f"  {sys.argv[0]} train chat --base {BASE} --data.train YOUR.jsonl --data.eval 0.1 --out runs/mine",
        highlight=False,
        soft_wrap=True,
    )


def _merge_and_measure(
    finished: runs.Run, held_out: Sequence[Chat], merged_folder: Path, console: Console
) -> tuple[dict[str, float], dict[str, float], str]:
    """Returns the scores of the base with examples in its prompt and of the merged model, and what was merged onto."""
    task, shots = finished.task, meetings.rows(SHOTS, "train", seed=1)
    with console.status("measuring the base with three examples in the prompt"), modes.without(finished.model):
        few_shot = _score(task, finished.model, held_out, shots)
    finished.release()
    with console.status("merging"):
        if merged_folder.exists():  # of the quickstart that was interrupted
            atomicio.remove(merged_folder)
        report = merge(finished.folder, merged_folder)
    with console.status("measuring the merged model"):
        merged, _ = seal.load_merged(task, merged_folder)
        merged_score = _score(task, merged, held_out)
    del merged
    seal.verify(finished.folder, model_folder=merged_folder).require(merged_folder)
    return few_shot, merged_score, report["onto"]


def _refuse_to_overwrite(run_config: RunConfig, files: dict[str, str], merged_folder: Path) -> None:
    """Raises ConfigError where anything in the folder is not of the quickstart that is to be resumed."""
    started.refuse_to_overwrite(run_config)
    for name, text in files.items():
        path = Path(name)
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise ConfigError(f"{path} is there already and is not the quickstart's: choose another --out.")
    if merged_folder.exists() and not (run_config.resume and (merged_folder / REPORT).is_file()):
        raise ConfigError(f"{merged_folder} is there already: choose another --out, or move it away.")


def _free_folder(resume: bool) -> Path:
    """Returns the first folder no quickstart has used, or on resuming the last one that was."""
    names = (FOLDER.with_name(f"{FOLDER.name}-{i}") if i > 1 else FOLDER for i in itertools.count(1))
    used = list(itertools.takewhile(Path.exists, names))
    if resume and used:
        return used[-1]
    return FOLDER.with_name(f"{FOLDER.name}-{len(used) + 1}") if used else FOLDER


def config(folder: Path) -> RunConfig:
    """Returns the run of the quickstart; `lora-ft train --config` on the saved file runs it again."""
    return RunConfig(
        task="chat",
        base=BASE,
        out=folder / "adapter",
        lora=LoraConfig(rank=16, alpha=32, plus_ratio=4.0),
        data=DataConfig(
            train=str(folder / "train.jsonl"), eval=str(folder / "held_out.jsonl"), metrics=(METRIC,), max_length=256
        ),
        train=TrainConfig(batch_size=4, epochs=1, lr=1e-3, warmup=0.05),
    )


def _score(task: tasks.Task, model: Any, rows: Sequence[Chat], shots: Sequence[Chat] = ()) -> dict[str, float]:
    prompted = [
        Chat(row.where, (*meetings.prompt(row.messages[-2]["content"], shots), row.messages[-1])) for row in rows
    ]
    heap.give_back()
    return evaluate.replies_match(task, model, prompted, (METRIC,))


def _lines(rows: Sequence[Chat]) -> str:
    return "".join(json.dumps({"messages": list(row.messages)}) + "\n" for row in rows)


def _table(columns: dict[str, dict[str, float]]) -> Table:
    title = f"{HELD_OUT_ROWS} held-out sentences: new names, titles and phrasings"
    table = Table("right", *columns, title=title)
    for key in (METRIC, *(f"{METRIC}.{field}" for field in meetings.FIELDS)):
        name = "whole JSON" if key == METRIC else key.removeprefix(f"{METRIC}.")
        table.add_row(name, *[f"{values[key]:.0%}" for values in columns.values()])
    return table


def _show_samples(console: Console, samples: Sequence[dict[str, str]]) -> None:
    for sample in samples:
        console.print(sample["prompt"], style="bold", markup=False, highlight=False, soft_wrap=True)
        for when in ("before", "after"):
            reply = " ".join(sample[when].split())
            console.print(f"  {when:<7} {reply}", markup=False, highlight=False, soft_wrap=True)
