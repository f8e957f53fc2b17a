"""The plan: how much memory a training takes at its largest, and how to make it fit, before any weight is loaded.

The step of a training runs on fake tensors, which have shapes and no numbers: the model of the configuration with
adapters in it, its loss, its backward pass and the optimizer, by the code that trains. What they would hold is counted.
For a GPU the forms of the operators are those of processors, with a weight dequantized whole as it is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)

from lora_ft import adapters, sources, tasks
from lora_ft import base as bases
from lora_ft.config import BaseCache, RunConfig
from lora_ft.data.examples import Example
from lora_ft.errors import ConfigError, UnsupportedModelError
from lora_ft.foreign.reading import first_line
from lora_ft.memory import outline
from lora_ft.memory.ledger import ACTIVATIONS, ELSEWHERE, LOGITS, WORKSPACE, Ledger
from lora_ft.memory.outline import ADAPTERS, WEIGHTS
from lora_ft.model import activations, attention, blocks, four_bits
from lora_ft.model.activations import Checkpointing
from lora_ft.model.modes import mixed_precision
from lora_ft.sources import Source
from lora_ft.speed.rates import matmul_rate
from lora_ft.system import devices, processes
from lora_ft.system.devices import GIB, Device
from lora_ft.tasks import Batch, Features, Task
from lora_ft.train import Packs, Passes, Rows, Streamed
from lora_ft.training import optimizer as optimizers
from lora_ft.training import origin, rows, trainers
from lora_ft.training.halving import Halving

log = logging.getLogger(__name__)

DENSE, GRADIENTS, OPTIMIZER = "dense weights", "gradients", "optimizer"
KINDS = (WEIGHTS, DENSE, ADAPTERS, OPTIMIZER, GRADIENTS, ACTIVATIONS, LOGITS, WORKSPACE)
# Of the rate of matrix products alone, about what a step reaches: SmolLM2-135M on two cores. No GPU was measured.
REACHED = 0.35
# What torch and the libraries beside it take of a process's memory, about.
LIBRARIES = 5e8
# How many times as much as a rough guess there must be for it to be enough.
SURE = 4
# From the one that takes most memory to the one that takes most time.
FRUGAL: tuple[Checkpointing, ...] = ("off", "on", "offload")
# What a model raises that asks for numbers where there are shapes only.
NO_NUMBERS = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What a step of the longest batch holds at its largest, and what it computes."""

    rows: int
    """Rows in a forward pass, packs where rows are packed."""
    checkpointing: Checkpointing
    cache: BaseCache
    bytes: dict[str, int]
    """At the peak, by `KINDS`."""
    tokens: int
    flops: float
    """Of matrix products, forwards and backwards, what is computed again included."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.bytes.values())

    def passes(self, asked_rows: int) -> Passes:
        """Returns how a training makes such steps of batches of `asked_rows` rows."""
        return Passes(asked_rows // self.rows, self.checkpointing, self.cache)


@dataclass(frozen=True)
class Plan:
    """What was asked for, and what fits."""

    device: Device
    asked: Step
    fitting: Step | None
    """The step with the most rows that fits, of the same global batch; None where not even one row does."""
    accumulate: int
    """Forward passes of `fitting` to a step of the optimizer."""
    tokens_per_epoch: int | None
    """None where no rows are named."""

    @property
    def seconds_per_epoch(self) -> float | None:
        """About how long an epoch takes; None where no rows are named, or nothing is known of the device."""
        if self.tokens_per_epoch is None or self.device.flops_per_s is None:
            return None
        step = self.fitting or self.asked
        return self.tokens_per_epoch * step.flops / step.tokens / (REACHED * self.device.flops_per_s)

    @property
    def fits(self) -> bool:
        """Whether what was asked for does."""
        return self.asked.peak_bytes <= self.device.usable_bytes

    def options(self) -> str:
        """Returns the options of the largest passes that fit, empty where they are as asked for or there are none."""
        if self.fitting is None or self.fitting is self.asked:
            return ""
        words = f"--train.batch-size {self.fitting.rows} --train.accumulate {self.accumulate}"
        words += " --train.checkpoint-activations" if self.fitting.checkpointing != "off" else ""
        return words + (" --train.base-cache off" if self.fitting.cache != self.asked.cache else "")


class Planner:
    """A model without numbers, adapters in it, and its step on fake tensors.

    Args:
        task: with a tokenizer.
        source: needs a configuration only.
        items: what batches are made of, rows or packs of rows, those of the most tokens first.
    """

    def __init__(
        self, config: RunConfig, task: Task, source: Source, device: Device, items: Sequence[Sequence[Features]]
    ) -> None:
        if config.lora.dora:
            raise ConfigError(
                "lora.dora cannot be planned: it starts from the numbers of the weights; plan without it."
            )
        if config.train.shard_base:
            raise ConfigError("train.shard-base cannot be planned: the plan is of one process; plan without it.")
        self.config, self.task, self.device, self.items = config, task, device, items
        self.on_gpu = device.kind == "cuda"
        # Other starts are made of numbers. They leave adapters of the same shapes, but for EVA's, which moves ranks.
        settings = dataclasses.replace(config.lora, init="default")
        self.model = adapters.attach(
            outline.made(config, task, source, device),
            settings,
            peft_task=task.peft_task,
            special_tokens=config.data.special_tokens,
        )
        # The device that is planned for need not be the one that this is planned on.
        asked = config.train.base_cache
        self.cache: BaseCache = "off" if self.on_gpu and asked == "auto" else asked
        blocks.presume(self.model, self.on_gpu)
        against = (
            attention.structural_refusal(self.model) if task.shares_rows else f"rows of the task {task.name} cannot"
        )
        self.shared = against is None
        if config.data.packing and not self.shared:
            raise UnsupportedModelError(f"data.packing: several rows cannot share one here: {against}; leave it out.")
        self.checkpointing: Checkpointing = "on" if config.train.checkpoint_activations else "off"
        self._steps: dict[tuple[int, int, Checkpointing, BaseCache], Step] = {}

    def asked(self) -> Step:
        """Returns the step that the configuration asks for."""
        train = self.config.train
        return self.step(train.batch_size, train.accumulate, self.checkpointing, self.cache)

    def step(self, rows: int, accumulate: int, checkpointing: Checkpointing, cache: BaseCache) -> Step:
        """Returns what a step holds whose forward passes have so many rows, the state of the optimizer included."""
        key = (rows, accumulate, checkpointing, cache)
        if key not in self._steps:
            self._steps[key] = self._measured(*key)
        return self._steps[key]

    def _measured(self, rows: int, accumulate: int, checkpointing: Checkpointing, cache: BaseCache) -> Step:
        ledger = Ledger(self.on_gpu)
        batch = self._batch(rows)
        model: Any = self.model
        four_bits.choose_cache(model, cache)
        with ExitStack() as inside:
            if self.on_gpu:
                inside.enter_context(outline.weights_whole())
            inside.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            inside.enter_context(ledger)
            inside.enter_context(outline.filled(model, ledger))
            inside.enter_context(activations.kept(model, checkpointing, away=ledger.away))
            with ledger.counting(DENSE):
                inside.enter_context(four_bits.dequantized(model))
            inside.enter_context(attention.packed(model) if self.shared else nullcontext())
            model.train()
            learned = list(adapters.trained(model).values())
            with unset_fake_temporarily():  # the tables of 8 bits are numbers
                kind, options = optimizers.made_of(self.config.train, self.device.kind)
                optimizer = kind(learned, **options)
            optimizers.keep_embeddings_whole(optimizer, model)
            with ledger.counting(GRADIENTS):
                for parameter in learned:
                    parameter.grad = torch.zeros_like(parameter)
            with ledger.counting(OPTIMIZER):
                optimizer.step()
            # A GPU gives them up while a pass needs the memory.
            for moments in optimizer.paged() if isinstance(optimizer, optimizers.BlockwiseAdamW) else ():
                ledger.call(moments, ELSEWHERE)
            if accumulate == 1:
                optimizer.zero_grad()
            ledger.begin()
            with mixed_precision(model):
                loss = self.task.loss(model, batch)
            loss.backward()
            for parameter in learned:
                ledger.call(parameter.grad, GRADIENTS)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
        return Step(rows, checkpointing, cache, {k: ledger.peak[k] for k in KINDS}, tasks.tokens(batch), ledger.flops)

    def _batch(self, rows: int) -> Batch:
        items = [self.items[min(i, len(self.items) - 1)] for i in range(rows)]
        members = [one for item in items for row in item for one in self.task.passes(row)]
        return self.task.end_to_end(members) if self.shared else self.task.collate(members)

    def fitting(self, of: int) -> Step | None:
        """Returns the step with the most rows that fits; None where not even one row does.

        Without the dense copy of 4-bit weights only if it must be, with checkpointing only if even that does not
        suffice, which costs more time, and with what that keeps in the host's memory if nothing else does.

        Args:
            of: what the number of rows divides.
        """
        asked = self.asked()
        for checkpointing, cache in self._ways():
            least = self._fits(1, checkpointing, cache)
            if least is None:
                continue
            # Memory grows by the same for each row: what one row and those asked for take says where it ends.
            share = (asked.peak_bytes - least.peak_bytes) / max(asked.rows - 1, 1)
            room = self.device.usable_bytes - least.peak_bytes
            known = (checkpointing, cache) == (asked.checkpointing, asked.cache)
            for count in sorted((n for n in range(1, of + 1) if of % n == 0), reverse=True):
                if count == 1:
                    return least
                if known and share > 0 and (count - 1) * share > 1.1 * room:
                    continue
                found = self._fits(count, checkpointing, cache)
                if found is not None:
                    return found
        return None

    def smallest(self) -> Step:
        """Returns the step of a single row that takes the least memory."""
        checkpointing, cache = self._ways()[-1]
        return self.step(1, self.config.train.batch_size * self.config.train.accumulate, checkpointing, cache)

    def _ways(self) -> list[tuple[Checkpointing, BaseCache]]:
        """Returns the ways of checkpointing and caching from what is asked for on, the quicker ones first."""
        caches: list[BaseCache] = [self.cache, "off"] if self.asked().bytes[DENSE] else [self.cache]
        ways = [way for way in FRUGAL[FRUGAL.index(self.checkpointing) :] if way != "offload" or self.on_gpu]
        return list(itertools.product(ways, caches))

    def _fits(self, rows: int, checkpointing: Checkpointing, cache: BaseCache) -> Step | None:
        accumulate = self.config.train.batch_size * self.config.train.accumulate // rows
        found = self.step(rows, accumulate, checkpointing, cache)
        return found if found.peak_bytes <= self.device.usable_bytes else None


def plan(config: RunConfig, asked_device: str | None = None) -> Plan:
    """Returns what a training takes and what of it fits; downloads no weight that it can do without.

    The longest batch is that of the rows which `config.data` names, or of rows as long as they may be.

    Args:
        asked_device: as `devices.find` takes it.

    Raises:
        SourceError, UnsupportedModelError: there is no such base, or it does not suit the task, packing or a plan.
        ConfigError: the device is unknown, or the adapter starts from numbers.
        DataError: with all problems of the rows.
    """
    device = devices.find(asked_device)
    config, from_adapter = origin.adopted(config)
    task = from_adapter.task_of(config) if from_adapter else tasks.of(config)
    source = sources.describe(config.base, config.revision)
    items, in_epoch = items_of(config, task, source)
    if in_epoch is not None and (device.kind == "cpu" or asked_device is None):
        dtype = getattr(torch, device.dtype if config.train.dtype == "auto" else config.train.dtype)
        device = dataclasses.replace(device, flops_per_s=matmul_rate(dtype, torch.device(device.kind)))
    train = config.train
    of = train.batch_size * train.accumulate
    with shapes_suffice(config.base):
        planner = Planner(config, task, source, device, items)
        asked, fitting = planner.asked(), planner.fitting(of)
    return Plan(device, asked, fitting, train.accumulate if fitting is None else of // fitting.rows, in_epoch)


@contextmanager
def shapes_suffice(base: str) -> Iterator[None]:
    """Raises UnsupportedModelError where a model asks for numbers in the block."""
    try:
        yield
    except NO_NUMBERS as error:
        raise UnsupportedModelError(
            f"{base} cannot be planned: its step depends on numbers, and a plan has shapes only ({first_line(error)}); "
            "train it without one: where the memory does not suffice, a training makes its batches in smaller passes."
        ) from error


def of_training(config: RunConfig, task: Task, source: Source, found: rows.Rows) -> Step | None:
    """Returns the step that a training which is about to begin makes: as asked, where that fits, else one that does.

    Its rows are as many as asked or a share of them, so that the global batch stays. What is planned, and what of it
    was changed, is logged; None where it cannot be planned, or need not be, which is logged with the reason.

    Args:
        task, found: as `rows.prepare` leaves them.
    """
    features: Any = found.train_features
    if not issubclass(trainers.of(task), Halving):
        log.info("memory is not planned: the task %s has no batches that could be made in parts", task.name)
        return None
    try:
        device = devices.find(None)
        if device.kind == "cpu":
            device = dataclasses.replace(device, usable_bytes=device.usable_bytes // processes.count())
        items = [[task.longest()]] if isinstance(features, Streamed) else _longest_items(config, task, features)
        if device.kind == "cpu" and (reason := _is_small(config, task, source, device, items)):
            log.info("memory is not planned: %s", reason)
            return None
        planner = Planner(config, task, source, device, items)
        step = asked = planner.asked()
        if asked.peak_bytes > device.usable_bytes:
            step = planner.fitting(config.train.batch_size) or planner.smallest()
    except (ConfigError, *NO_NUMBERS) as error:
        log.info("memory is not planned: %s", first_line(error))
        return None
    usable = device.usable_bytes / GIB
    log.info("a step takes %.2f GiB at its largest; %.2f are free", step.peak_bytes / GIB, usable)
    if step is not asked:
        fits = "fits" if step.peak_bytes <= device.usable_bytes else "comes closest"
        told = "the step asked for takes %.2f GiB, and %.2f are free: %s, which %s (%.2f)"
        log.warning(told, asked.peak_bytes / GIB, usable, _words(step, asked), fits, step.peak_bytes / GIB)
    return step


def _is_small(
    config: RunConfig, task: Task, source: Source, device: Device, items: Sequence[Sequence[Features]]
) -> str | None:
    """Returns that a training takes a small part of a device, if a rough guess is that sure of it; None if not.

    On a processor the plan of a small model would take as long as some of its steps.
    """
    told = bases.text_config(source, task.model_class)
    longest = max(sum(task.lengths(row)) for item in items for row in item)
    dtype = getattr(torch, device.dtype if config.train.dtype == "auto" else config.train.dtype)
    guess = roughly(sources.count_numbers(source.folder), told, config.train.batch_size, longest, dtype)
    if guess is None or guess * SURE > device.usable_bytes:
        return None
    return f"a step takes about {guess / GIB:.2g} GiB of the {device.usable_bytes / GIB:.3g} that are free"


def roughly(numbers: int, told: Any, rows: int, length: int, dtype: torch.dtype) -> float | None:
    """Returns about how many bytes training takes; None where the configuration does not say how large a layer is.

    Weights, and what layers keep for the backward pass: 34 bytes a token and column in 16 bits, and 5 a score of
    attention (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1).

    Args:
        numbers: in the weights.
        told: the model's configuration.
        length: tokens of the longest row.
    """
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    sizes = [size for name in names if isinstance(size := getattr(told, name, None), int)]
    if len(sizes) < len(names):
        return None
    layers, width, heads = sizes
    kept = layers * rows * length * (34 * width + 5 * heads * length) * dtype.itemsize / 2
    return numbers * dtype.itemsize + kept + LIBRARIES


def _words(step: Step, asked: Step) -> str:
    """Returns what of a step is not as asked."""
    words = [f"each batch is made in {asked.rows // step.rows} passes"] if step.rows < asked.rows else []
    if step.cache != asked.cache:
        words.append("4-bit weights are not held dense")
    if step.checkpointing != asked.checkpointing:
        words.append(
            "activations are computed again"
            + (" from inputs in host memory" if step.checkpointing == "offload" else "")
        )
    return " and ".join(words) or "there is no smaller one"


def items_of(
    config: RunConfig, task: Task, source: Source, examples: Sequence[Example] | None = None
) -> tuple[list[list[Features]], int | None]:
    """Returns what batches are made of, the longest first, and the tokens of an epoch where rows are known.

    Args:
        examples: rows to train on, instead of those that `config.data` names.
    """
    if config.data.streaming or (examples is None and config.data.train is None):
        return [[_longest(config, task, source)]], None
    read = rows.read(config) if examples is None else (examples, ())
    features: Any = rows.prepare(config, task, source, *read).train_features
    in_epoch = sum(length for row in features for length in task.lengths(row))
    return _longest_items(config, task, features), in_epoch


def _longest_items(config: RunConfig, task: Task, features: Sequence[Features]) -> list[list[Features]]:
    """Returns the longest of what batches are made of, as many as a step of the optimizer takes."""
    items = Packs(features, config.data.max_length) if config.data.packing else Rows(features)
    longest = items.longest(task, config.train.batch_size * config.train.accumulate)
    return [item if config.data.packing else [item] for item in longest]


def _longest(config: RunConfig, task: Task, source: Source) -> Features:
    """Returns a row of as many tokens as one may have, having given `task` what it needs for that."""
    task.max_length = bases.longest_row(source, task.model_class, config.data.max_length)
    if config.data.special_tokens or config.lora.train_tokens:
        task.tokenizer = bases.load_tokenizer(source.folder)
    else:
        padding = getattr(bases.text_config(source, task.model_class), "pad_token_id", None) or 0
        task.tokenizer = SimpleNamespace(pad_token_id=padding, unk_token_id=None, convert_tokens_to_ids=lambda _: [])
    return task.longest()
