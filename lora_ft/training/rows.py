"""The rows of a run: read, split, checked whole, and what there is to say of them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft import base as bases
from lora_ft import evaluate, sources, tasks
from lora_ft.config import RunConfig
from lora_ft.data import formats, labels
from lora_ft.data.examples import Example, Labelled, Tagged
from lora_ft.data.tagged import OUTSIDE
from lora_ft.errors import ConfigError, DataError, LoraFtError
from lora_ft.proof import environment
from lora_ft.system import processes
from lora_ft.tasks import Features, Task
from lora_ft.train import Streamed

log = logging.getLogger(__name__)

# Of the rows named, so many are looked at for a few, and so many of them are those few.
LOOKED_AT, FEW = 2000, 24
FEW_HELD_OUT = 0.25
MOST_CLASSES = 6
# What the directions of EVA are estimated from.
EVA_BATCHES = 8


@dataclass
class Rows:
    """The rows of a run: examples as read and features as the model takes them."""

    train: Sequence[Example]
    train_features: Sequence[Features] | Streamed
    held_out: Sequence[Example]
    held_out_features: Sequence[Features]
    facts: dict[str, Any]
    """Name, number and digest of each part."""


def read(
    config: RunConfig, examples: Sequence[Example] | None = None, held_out: Sequence[Example] | None = None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Returns the rows to train on and those held out, as they are in their files; what is streamed is not read yet.

    Args:
        examples, held_out: rows already made, instead of those that `config.data` names.

    Raises:
        ConfigError: no rows are named, or those held out are trained on.
        DataError: with all problems of the files.
    """
    data = config.data
    if examples is None and data.train is None:
        raise ConfigError("--data.train is needed: a file of rows, or the name of a hub data set.")
    if examples is None:
        examples = [] if data.streaming else formats.read(str(data.train), data.columns)
    if held_out is None and data.eval is not None and data.eval_fraction is None:
        held_out = formats.read(data.eval, data.columns)
    elif held_out is None and data.eval_fraction is not None:
        examples, held_out = _split(examples, data.eval_fraction, config.train.seed, config.task)
    held_out = held_out or []
    _refuse_rows_trained_on(config, examples, held_out)
    return examples, held_out


def few(config: RunConfig, task: Task) -> tuple[list[Example], list[Example]]:
    """Returns a few rows to train on, and some held out where the configuration holds some out.

    They are spread over the first of those that config.data names, or made up by the task where it names none.

    Raises:
        DataError: with all problems of the rows looked at.
    """
    data = config.data
    found = _first(data.train, data.columns) if data.train is not None else task.made_up()
    kinds = Counter(row.label for row in found if isinstance(row, Labelled) and isinstance(row.label, str))
    if len(kinds) > MOST_CLASSES and labels.problem_of([r for r in found if isinstance(r, Labelled)]) == labels.SINGLE:
        usual = {label for label, _ in kinds.most_common(MOST_CLASSES)}
        found = [row for row in found if isinstance(row, Labelled) and row.label in usual]
    # Of tags all that is learned is where the entities are.
    found = [row for row in found if not isinstance(row, Tagged) or {*row.tags} - {OUTSIDE}] or found
    chosen = [found[i * len(found) // FEW] for i in range(FEW)] if len(found) > FEW else found
    if data.eval is None:
        return chosen, []
    try:
        return _split(chosen, FEW_HELD_OUT, config.train.seed, config.task)
    except DataError as error:
        log.info("none of the few rows are held out: %s", error)
        return chosen, []


def _first(source: str, columns: Mapping[str, str]) -> list[Example]:
    """Returns the first rows of a file or hub data set. Raises DataError with all their problems."""
    examples: list[Example] = []
    problems: list[str] = []
    for example in itertools.islice(formats.each(source, columns, streaming=True), LOOKED_AT):
        if isinstance(example, DataError):
            problems += example.problems
        else:
            examples.append(example)
    if problems:
        raise DataError(problems)
    return examples


def prepare(
    config: RunConfig,
    task: Task,
    source: sources.Source,
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> Rows:
    """Returns the rows of a run as the model takes them, every one checked; no weight is loaded for it.

    Args:
        examples: none where they are streamed.

    Raises:
        DataError: with all problems of the rows.
        ConfigError: an evaluation that was asked for could not be made.
    """
    data, facts = config.data, {}
    streamed = data.streaming and not examples
    task.learn(examples, held_out)
    if data.class_weights is not None:
        task.weigh(examples)
    tokenizer = bases.load_tokenizer(source.folder)
    tokenizer.add_tokens(list(data.special_tokens), special_tokens=True)
    task.meet(source.folder, bases.text_config(source, task.model_class))
    task.prepare(tokenizer, bases.longest_row(source, task.model_class, data.max_length))
    facts["train"] = {"name": _name(data.train), "rows": len(examples), "sha256": digest(examples)}
    if held_out:
        facts["eval"] = {"name": _name(data.eval), "rows": len(held_out), "sha256": digest(held_out)}
    features: Sequence[Features] | Streamed
    if streamed:
        local = Path(str(data.train))
        of_file = environment.streamed_facts(local) if local.is_file() else {"sha256": None}
        facts["train"] = {"name": _name(data.train), "rows": None, **of_file}
        features = Streamed(lambda: _stream(config, task, facts["train"]))
    else:
        features = tasks.featurize(task, examples)
    held_out_features = tasks.featurize(task, held_out)
    _check_evaluation(config, task, source, held_out)
    if task.contrasts:
        # Of streamed rows too the first says what kind they are, and whether such may be streamed at all.
        first = next(iter(features.make() if isinstance(features, Streamed) else features), None)
        in_a_step = config.train.batch_size * config.train.accumulate * processes.asked()
        if first is not None and task.together(first) and in_a_step == 1:
            raise ConfigError(
                f"{task.name} tells the texts of a step from each other, and a step would have a single row: give a "
                "larger --train.batch-size, or --train.accumulate."
            )
    for rule in task.rules:
        log.info("the chat template %s", rule)
    tasks.tell_of_cut_rows(task)
    return Rows(examples, features, held_out, held_out_features, facts)


def _check_evaluation(config: RunConfig, task: Task, source: sources.Source, held_out: Sequence[Example]) -> None:
    """Raises before training where an evaluation that was asked for could not be made after it."""
    if not held_out:
        asked = {"data.metrics": config.data.metrics, "train.eval-steps": config.train.eval_steps}
        for name, value in asked.items():
            if value:
                raise ConfigError(f"{name} needs held-out rows: give --data.eval a file or a fraction.")
        return
    if config.data.metrics:
        replied = task.questioned(held_out, config.data.metrics)
        questions = [task.question(example) for example in replied]
        held = bases.positions(bases.text_config(source, task.model_class), source.name)
        too_long = [
            f"{example.where}: the prompt has {len(prompt)} tokens, and {source.name} has positions for {held}, so "
            "no reply could be measured: shorten it, or leave out --data.metrics."
            for example, (prompt, _) in zip(replied, questions, strict=True)
            if held is not None and len(prompt) > held
        ]
        if too_long:
            raise DataError(too_long)
        wanted = [reply for _, reply in questions]
        evaluate.score_replies(wanted, wanted, config.data.metrics)


def _refuse_rows_trained_on(config: RunConfig, examples: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Raises ConfigError where all held-out rows are the training rows; says how many of them are among those."""
    if not held_out:
        return
    same_name = config.data.eval is not None and config.data.eval == config.data.train
    if same_name or digest(examples) == digest(held_out):
        raise ConfigError("data.eval names the rows of data.train, so nothing is held out: give other rows, or 0.1.")
    trained = {digest([example]) for example in examples}
    shared = sum(digest([example]) in trained for example in held_out)
    if shared:
        log.warning("%d of %d held-out rows are trained on too: they look better than new ones", shared, len(held_out))


def _split(examples: Sequence[Example], fraction: float, seed: int, task: str) -> tuple[list[Example], list[Example]]:
    labelled = [example for example in examples if isinstance(example, Labelled)]
    tagged = [example for example in examples if isinstance(example, Tagged)]
    chosen: set[int] | None = None
    # What else there is among them is refused with its place.
    if task == "classify" and labelled and len(labelled) == len(examples):
        chosen = labels.held_out(labelled, fraction, seed)
    elif task == "embed" and labelled and len(labelled) == len(examples) and labelled[0].text_pair is None:
        chosen = labels.held_out_by([labels.of_row(row.label) for row in labelled], labels.SINGLE, fraction, seed)
    elif task == "tag" and tagged and len(tagged) == len(examples):
        types = [tuple(sorted({tag[2:] for tag in row.tags if tag != OUTSIDE})) for row in tagged]
        chosen = labels.held_out_by(types, labels.MULTI, fraction, seed)
    if chosen is not None:
        return (
            [example for i, example in enumerate(examples) if i not in chosen],
            [examples[i] for i in sorted(chosen)],
        )
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    count = max(1, round(fraction * len(order)))
    if count >= len(order):
        raise DataError([f"data.eval {fraction} of {len(order)} rows leaves none to train on; give more rows."])
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def _stream(config: RunConfig, task: Task, facts: dict[str, Any]) -> Iterator[Features]:
    """Yields the rows of one pass; `facts` say how many of a pass have been read, and cut, so far."""
    before = task.cut_rows
    for number, example in enumerate(formats.stream(str(config.data.train), config.data.columns), 1):
        yield task.streamed(example)
        read = {"rows_read": number, "cut_rows": task.cut_rows - before}
        facts.update({key: max(count, facts.get(key, 0)) for key, count in read.items()})


def check_stream(config: RunConfig, task: Task) -> dict[str, Any]:
    """Returns what there is to say of rows that are streamed, each read once. Raises DataError with all problems."""
    problems: list[str] = []
    rows, tokens, longest, before = 0, 0, 0, task.cut_rows
    try:
        for example in formats.each(str(config.data.train), config.data.columns, streaming=True):
            try:
                if isinstance(example, DataError):
                    raise example
                lengths = task.lengths(task.streamed(example))
            except DataError as error:
                problems += error.problems
                if len(problems) >= formats.MAX_PROBLEMS:
                    problems.append(f"The rest was not read, after {len(problems):,} problems.")
                    break
            else:
                rows, tokens, longest = rows + 1, tokens + sum(lengths), max(longest, *lengths)
    except DataError as last:
        problems += last.problems
    if problems:
        raise DataError(problems)
    cut = task.cut_rows - before
    return {"rows": rows, "tokens": tokens, "longest_row": longest, "cut_rows": cut, "steps": config.train.steps}


def first_batches(task: Task, rows: Rows, config: RunConfig) -> list[dict[str, Any]]:
    """Returns the first batches without their labels, for an adapter that begins with what its layers see."""
    if isinstance(rows.train_features, Streamed):
        raise LoraFtError("lora.init=eva reads rows before training starts, which data.streaming does not allow.")
    size = config.train.batch_size
    starts = range(0, min(len(rows.train_features), EVA_BATCHES * size), size)
    batches = [[task.texts(row)[0] for row in rows.train_features[start : start + size]] for start in starts]
    return [task.inputs(task.collate(batch)) for batch in batches]


def digest(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of what rows hold, wherever they stand."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr(dataclasses.astuple(example)[1:]).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _name(source: str | None) -> str:
    if source and (Path(source).suffix or Path(source).exists()):
        return Path(source).name
    return source if source else "rows made by the program"
