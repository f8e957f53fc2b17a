"""What an adapter says to each row of a file, written beside the fields of the row: JSONL or CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lora_ft import base as bases
from lora_ft import generate, saved, tasks
from lora_ft.commands.options import PredictConfig
from lora_ft.data import formats, questions
from lora_ft.data.examples import Example
from lora_ft.data.rows import Row
from lora_ft.errors import ConfigError, DataError, LoraFtError
from lora_ft.foreign.strictjson import bare
from lora_ft.model.modes import unwrapped
from lora_ft.proof import recorded
from lora_ft.scoring import losses
from lora_ft.system import atomicio
from lora_ft.tasks import Batch, Features, Task
from lora_ft.training import progress

log = logging.getLogger(__name__)
T = TypeVar("T")

# Rows held at once, in batches: those of like length among them share one.
WINDOW_BATCHES = 64


@dataclass(frozen=True)
class Done:
    """How many rows were answered, and in what time once all were read."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class Live:
    """A loaded model as `tasks.Answering` has it."""

    task: Task
    model: Any
    batch_size: int
    max_new_tokens: int
    note: Callable[[int], None] = lambda rows: None
    """Told of how many more rows are done."""

    def of_rows(self, rows: Sequence[Features], compute: Callable[[nn.Module, Batch], Sequence[T]]) -> list[T]:
        """Returns what `compute` gives for each row, in the order of the rows."""
        made: dict[int, T] = {}

        def take(chosen: list[int], batch: Batch) -> None:
            made.update(zip(chosen, compute(self.model, batch), strict=True))
            self.note(len(chosen))

        losses.each_batch(self.task, self.model, rows, self.batch_size, take)
        return [made[place] for place in range(len(rows))]

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
        """Returns the greedy reply to each prompt, and whether it came to its end."""
        return generate.replies(
            self.model,
            self.task.tokenizer,
            prompts,
            sampling=generate.Sampling(self.max_new_tokens),
            stop_ids=self.task.end_ids(),
            most_rows=self.batch_size,
            note=self.note,
        )


def predict(config: PredictConfig, console: Any) -> Done:
    """Returns what was done, every row of `config.input` being answered in `config.out`, in their order.

    All rows are checked before the first is answered; a window of them is held at a time.

    Raises:
        ConfigError: the file to write is there already.
        DataError: with all problems of the rows.
        AdapterError, SourceError: the adapter or its base cannot be loaded.
    """
    if config.out.exists():
        raise ConfigError(f"{config.out} is there already, and is not overwritten: choose another --out, or remove it.")
    # The rows are read before the base, which may be gigabytes to fetch.
    _, task = recorded.task(config.adapter, recorded.read(config.adapter))
    if not task.questions:
        raise LoraFtError(f"{config.adapter}: was trained for the task {task.name}, which makes no predictions.")
    total, fields = _checked(config, task, lambda row, example: None)
    loaded = saved.load(config.adapter, config.base)
    loaded.prepare_task()
    task = loaded.task
    held = bases.positions(unwrapped(loaded.model).config, "the base")

    def look(row: Row, example: Example) -> None:
        length = len(task.asked(example)["input_ids"])
        if held is not None and length > held:
            raise DataError([f"{row.where}: has {length} tokens, and the base has positions for {held}; shorten it."])

    _checked(config, task, look)
    tasks.tell_of_cut_rows(task)
    began, cut = time.perf_counter(), 0
    sheet = Sheet(list(fields)) if config.out.suffix.lower() == ".csv" else None
    with atomicio.growing(config.out) as write, progress.of_rows(console, total) as note:
        live = Live(task, loaded.model, config.batch_size, config.max_new_tokens, note)
        # What is wrong with a row was said.
        pairs = (made for made in _each(config, task) if not isinstance(made, DataError))
        while window := list(itertools.islice(pairs, WINDOW_BATCHES * config.batch_size)):
            said = task.predict(live, [task.asked(example) for _, example in window])
            _refuse_twins(fields, [*said[0], *(_spread(said[0]) if sheet else ())])
            cut += sum(prediction.get("finish_reason") == "length" for prediction in said)
            lines = [row.fields | prediction for (row, _), prediction in zip(window, said, strict=True)]
            write(sheet.text(lines, said[0]) if sheet else "".join(f"{_json(line)}\n" for line in lines))
    if cut:
        log.warning(
            "%d replies were cut at %d tokens: their finish_reason is length, --max-new-tokens allows more",
            cut,
            config.max_new_tokens,
        )
    return Done(total, time.perf_counter() - began)


class Sheet:
    """Rows as CSV: what is an object has a column for each of its keys, a list is written as JSON."""

    def __init__(self, fields: Sequence[str]) -> None:
        self.columns = list(fields)
        self._begun = False

    def text(self, lines: Sequence[Mapping[str, Any]], prediction: Mapping[str, Any]) -> str:
        """Returns the text of more rows, below the names of the columns where they are the first.

        Args:
            prediction: one of them, without the fields of its row.
        """
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        if not self._begun:
            self.columns += _spread(prediction)
            writer.writerow(self.columns)
            self._begun = True
        for line in lines:
            # The fields of a row stay as they are, though one be an object.
            spread = {**line, **_spread({key: line[key] for key in prediction})}
            writer.writerow([_cell(spread.get(name)) for name in self.columns])
        return stream.getvalue()


def _spread(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what stands in the columns of a prediction, by their names."""
    spread: dict[str, Any] = {}
    for key, value in prediction.items():
        spread |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return spread


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return _json(value) if isinstance(value, dict | list | bool) else value


def _each(config: PredictConfig, task: Task) -> Iterator[tuple[Row, Example] | DataError]:
    return questions.each(config.input, config.columns, task.questions)


def _checked(config: PredictConfig, task: Task, look: Callable[[Row, Example], None]) -> tuple[int, dict[str, str]]:
    """Returns how many rows there are, and all fields with the place of the first row that has each.

    Raises:
        DataError: with the problems of all rows, those that `look` raises too.
    """
    total, fields, problems = 0, dict[str, str](), list[str]()
    try:
        for made in _each(config, task):
            total += 1
            try:
                if isinstance(made, DataError):
                    raise made
                row, example = made
                for name in row.fields:
                    fields.setdefault(name, row.where)
                _refuse_no_json(row)
                look(row, example)
            except DataError as error:
                problems += error.problems
            if len(problems) >= formats.MAX_PROBLEMS:
                problems.append(f"The rest was not read, after {len(problems):,} problems.")
                break
    except DataError as last:
        problems += last.problems
    if problems:
        raise DataError(problems)
    return total, fields


def _refuse_no_json(row: Row) -> None:
    """Raises DataError where a field of a row, as Parquet has them, cannot be written beside its prediction."""
    problems = []
    for name, value in row.fields.items():
        try:
            _json(value)
        except (TypeError, ValueError) as error:
            problems.append(f"{row.where}: {bare(name)} cannot be written as JSON ({error}); convert it, or drop it.")
    if problems:
        raise DataError(problems)


def _refuse_twins(fields: Mapping[str, str], names: Sequence[str]) -> None:
    """Raises DataError where a row has a field of the name of a prediction, which would be written over it."""
    twins = [name for name in dict.fromkeys(names) if name in fields]
    if twins:
        raise DataError(
            [f"{fields[name]}: has a field {name}, which is what a prediction is called; rename it." for name in twins]
        )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
