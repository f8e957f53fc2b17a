"""The look at a job's files before it is queued: every row read and rendered, and with that what it is trained with."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_ft import base as bases
from lora_ft import sources, tasks
from lora_ft.config import DataConfig, LoraConfig, PreferConfig, RunConfig, TrainConfig
from lora_ft.data import formats, pack
from lora_ft.data.examples import Chat, Example, Pair, Text
from lora_ft.data.preferences import Preference
from lora_ft.errors import AdapterError, DataError, LoraFtError, UnsupportedModelError
from lora_ft.proof import recorded
from lora_ft.serve import hyperparameters
from lora_ft.serve.files import ROWS
from lora_ft.serve.leftovers import CONFIGS, RUNS
from lora_ft.settings import plain
from lora_ft.system import atomicio

FEWEST = 10
# Steps between the checkpoints that a job goes on from after a crash; at the end of an epoch there is one anyway.
SAVE_STEPS = 50


class JobError(LoraFtError):
    """A job that cannot be trained as it was asked for."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True)
class Plan:
    """What a job will do."""

    config: RunConfig
    values: dict[str, Any]
    """The hyperparameters, all of them numbers."""
    total_steps: int
    notes: tuple[str, ...]
    """What the client should know of its rows, though they can be trained on."""


def folder(home: Path, job_id: str) -> Path:
    """Returns where the adapter of a job is made."""
    return home / RUNS / job_id


def config_path(home: Path, job_id: str) -> Path:
    """Returns the file that says how a job is trained."""
    return home / CONFIGS / job_id / "config.yaml"


def write_config(path: Path, config: RunConfig) -> None:
    """Writes what a worker reads again. Unlike an adapter's own record it keeps paths, for it stays on this machine."""
    atomicio.write(path, yaml.safe_dump(plain(config), sort_keys=False))


def examine(row: sqlite3.Row | Mapping[str, Any], source: str, parent: Path | None) -> Plan:
    """Returns the plan of a job, in whose server's folder this process is.

    Args:
        row: the job's, or the columns of one that there is none of.
        source: what `sources.resolve` takes for the base.
        parent: the folder of the adapter to go on from.

    Raises:
        JobError: says what is wrong with which file, or with the base.
    """
    examples = _read(row["training_file"], "training_file")
    held_out = _read(row["validation_file"], "validation_file") if row["validation_file"] else []
    if len(examples) < FEWEST:
        told = f"Training file has {len(examples)} example(s), but must have at least {FEWEST} examples"
        raise JobError("invalid_n_examples", told, "training_file")
    asked = json.loads(row["hyperparameters"])
    method = hyperparameters.method_of(asked)
    name = _task_of(examples, "training_file", method)
    if held_out and _task_of(held_out, "validation_file", method) != name:
        raise JobError("invalid_validation_file", "The two files hold rows of different formats.", "validation_file")
    values = hyperparameters.resolve(asked, len(examples))
    extensions = json.loads(row["extensions"])
    base = _base(source)
    try:
        sections = hyperparameters.configs(values, extensions)
        lora = _lora_of(parent, base) if parent else LoraConfig(**sections["lora"])
        rows = DataConfig(**sections["data"])
        prefer = PreferConfig(beta=values["beta"]) if method == hyperparameters.DPO else PreferConfig()
        task = tasks.get(name)
        task.configure(prefer if method == hyperparameters.DPO else None)
        longest = min(rows.max_length, _context(base) or rows.max_length)
        task.prepare(bases.load_tokenizer(base.folder), longest)
    except (ValueError, LoraFtError) as error:
        raise JobError("invalid_model", str(error), "model") from None
    lengths = [len(one["input_ids"]) for one in _features(task, examples, "training_file")]
    notes = _notes(task, examples, held_out)
    if extensions.get("context_length", 0) > longest:
        told = (
            f"context_length is {extensions['context_length']}; the base was made for {longest} tokens, which are used."
        )
        notes = (told, *notes)
    if held_out:
        _features(task, held_out, "validation_file")
    per_epoch = steps_per_epoch(lengths, sections["train"], task.max_length if rows.packing else None)
    total = per_epoch * values["n_epochs"]
    # The first step of a warm-up has a learning rate of 0: of a job of few steps it would take a good part, or all.
    if TrainConfig().warmup * total < 1:
        sections["train"].setdefault("warmup", 0.0)
    train = TrainConfig(**sections["train"], seed=row["seed"], save_steps=min(per_epoch, SAVE_STEPS))
    config = RunConfig(
        task=name,  # type: ignore[arg-type]
        base=source,
        out=folder(Path(), row["id"]),
        lora=lora,
        prefer=prefer,
        data=dataclasses.replace(
            rows,
            train=_path(row["training_file"]).as_posix(),
            eval=_path(row["validation_file"]).as_posix() if held_out else None,
            max_length=task.max_length,
        ),
        train=train,
    )
    return Plan(config, values, total, notes)


def steps_per_epoch(lengths: Sequence[int], train: dict[str, Any], packed: int | None) -> int:
    """Returns the optimizer steps of one pass over rows of these lengths, in tokens.

    Args:
        train: with `batch_size` and `accumulate`.
        packed: the tokens of a row that several examples share, where they do.
    """
    items = len(pack.fill(lengths, packed)) if packed else len(lengths)
    return math.ceil(math.ceil(items / train["batch_size"]) / train["accumulate"])


def _path(file_id: str) -> Path:
    return Path("files") / file_id / ROWS


def _read(file_id: str, param: str) -> list[Example]:
    path = _path(file_id)
    if not path.is_file():
        raise JobError(f"invalid_{param}", f"{file_id} is no longer there.", param)
    try:
        return formats.read(str(path))
    except DataError as error:
        raise _of_rows(error, param) from None


def _of_rows(error: DataError, param: str) -> JobError:
    """Returns what to say of bad rows: their lines, for the file has no name here that the client gave."""
    lines = [re.sub(rf"^{re.escape(ROWS)}:(\d+): ", r"Line \1: ", one) for one in error.problems]
    lines = [line.replace(f"{ROWS}: ", "") for line in lines]
    shown = lines[: DataError.SHOWN]
    more = f"\n... and {len(lines) - len(shown)} more problems." if len(lines) > len(shown) else ""
    word = "training" if param == "training_file" else "validation"
    told = "\n".join(shown)
    return JobError(
        f"invalid_{param}",
        f"The job failed due to an invalid {word} file. {len(lines)} problem(s):\n{told}{more}",
        param,
    )


def _task_of(examples: Sequence[Example], param: str, method: str) -> str:
    compared = isinstance(examples[0], Preference)
    if method == hyperparameters.DPO:
        if compared:
            return "prefer"
        told = "is no preference; the method dpo takes input, preferred_output and non_preferred_output."
        raise JobError(f"invalid_{param}", f"Line 1: {told}", param)
    if compared:
        told = "is a preference, which the method supervised does not learn; give method.type dpo."
        raise JobError(f"invalid_{param}", f"Line 1: {told}", param)
    if isinstance(examples[0], Chat):
        return "chat"
    if isinstance(examples[0], Pair | Text):
        return "complete"
    what = type(examples[0]).__name__.lower()
    told = f"Line 1: a {what} row cannot be trained on here; give messages, prompt and completion, or text."
    raise JobError(f"invalid_{param}", told, param)


def _features(task: tasks.Task, examples: Sequence[Example], param: str) -> list[tasks.Features]:
    try:
        return tasks.featurize(task, examples)
    except DataError as error:
        raise _of_rows(error, param) from None


def _base(source: str) -> sources.Source:
    try:
        return sources.resolve(source)
    except LoraFtError as error:
        raise JobError("base_unavailable", str(error), "model") from None


def _context(base: sources.Source) -> int | None:
    """Returns the longest text, in tokens, that the base was made for, where it says so."""
    length = getattr(bases.read_config(base.folder), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _lora_of(parent: Path, base: sources.Source) -> LoraConfig:
    """Returns the shape of the adapter that a job goes on from: its own must be the same."""
    record = recorded.read(parent)
    held = sources.weights_digest(base.folder)
    if record["base"]["weights_sha256"] != held:
        raise UnsupportedModelError(f"the adapter was made on weights that {base.name} no longer stands for")
    config, _ = recorded.task(parent, record)
    if config.lora.init in ("pissa", "olora"):
        raise AdapterError(f"lora.init={config.lora.init} is saved at another rank, and cannot be gone on from")
    return config.lora


def _notes(task: tasks.Task, examples: Sequence[Example], held_out: Sequence[Example]) -> tuple[str, ...]:
    notes = []
    if task.cut_rows:
        notes.append(f"{task.cut_rows} example(s) are longer than {task.max_length} tokens, and are cut at the end.")
    seen = [repr(dataclasses.astuple(example)[1:]) for example in examples]
    twice = len(seen) - len(set(seen))
    if twice:
        notes.append(f"{twice} example(s) repeat another one word for word.")
    shared = len({repr(dataclasses.astuple(example)[1:]) for example in held_out} & set(seen))
    if shared:
        notes.append(
            f"{shared} example(s) of the validation file are trained on too: its loss looks better than it is."
        )
    return (*notes, *(f"The chat template {rule}." for rule in task.rules))


__all__ = ["JobError", "Plan", "config_path", "examine", "folder", "write_config"]
