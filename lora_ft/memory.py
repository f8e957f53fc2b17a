"""The plan: how much memory a training takes at its largest, and how to make it fit, before any weight is loaded.

The step of a training runs on fake tensors, which have shapes and no numbers: the model of the configuration with
adapters in it, its loss, its backward pass and the optimizer, by the code that trains. What they would hold is counted.
For a GPU the forms of the operators are those of processors, with a weight dequantized whole as it is there.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from lora_ft import adapters, attention, blocks, devices, four_bits, rows, sources, tasks
from lora_ft import base as bases
from lora_ft import optimizer as optimizers
from lora_ft.base import Base
from lora_ft.config import BaseCache, RunConfig
from lora_ft.devices import Device
from lora_ft.errors import ConfigError, UnsupportedModelError
from lora_ft.ledger import ACTIVATIONS, LOGITS, WORKSPACE, Ledger
from lora_ft.modes import mixed_precision
from lora_ft.rates import matmul_rate
from lora_ft.sources import Source
from lora_ft.tasks import Batch, Features, Task
from lora_ft.train import Packs, Rows
from lora_kernels import slabs

WEIGHTS, DENSE, ADAPTERS, GRADIENTS, OPTIMIZER = "weights", "dense weights", "adapters", "gradients", "optimizer"
KINDS = (WEIGHTS, DENSE, ADAPTERS, OPTIMIZER, GRADIENTS, ACTIVATIONS, LOGITS, WORKSPACE)
# What lies outside of the memory that is planned.
PAGED = "paged"
# Of the rate of matrix products alone, about what a step reaches: SmolLM2-135M on two cores. No GPU was measured.
REACHED = 0.35
# Scales that share one of their own in NF4.
NESTED = 256


@dataclass(frozen=True)
class Step:
    """What a step of the longest batch holds at its largest, and what it computes."""

    rows: int
    """Rows in a forward pass, packs where rows are packed."""
    checkpointing: bool
    cache: BaseCache
    bytes: dict[str, int]
    """At the peak, by `KINDS`."""
    tokens: int
    flops: float
    """Of matrix products, forwards and backwards, what is computed again included."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.bytes.values())


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
        words += " --train.checkpoint-activations" if self.fitting.checkpointing else ""
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
            outline(config, task, source, device),
            settings,
            peft_task=task.peft_task,
            special_tokens=config.data.special_tokens,
        )
        # The device that is planned for need not be the one that this is planned on.
        asked = config.train.base_cache
        self.cache: BaseCache = "off" if self.on_gpu and asked == "auto" else asked
        if self.on_gpu:
            blocks.presume(self.model)
        against = (
            attention.structural_refusal(self.model) if task.shares_rows else f"rows of the task {task.name} cannot"
        )
        self.shared = against is None
        if config.data.packing and not self.shared:
            raise UnsupportedModelError(f"data.packing: several rows cannot share one here: {against}; leave it out.")
        self._steps: dict[tuple[int, int, bool, BaseCache], Step] = {}

    def asked(self) -> Step:
        """Returns the step that the configuration asks for."""
        train = self.config.train
        return self.step(train.batch_size, train.accumulate, train.checkpoint_activations, self.cache)

    def step(self, rows: int, accumulate: int, checkpointing: bool, cache: BaseCache) -> Step:
        """Returns what a step holds whose forward passes have so many rows, the state of the optimizer included."""
        key = (rows, accumulate, checkpointing, cache)
        if key not in self._steps:
            self._steps[key] = self._measured(*key)
        return self._steps[key]

    def _measured(self, rows: int, accumulate: int, checkpointing: bool, cache: BaseCache) -> Step:
        ledger = Ledger()
        batch = self._batch(rows)
        model: Any = self.model
        four_bits.choose_cache(model, cache)
        with ExitStack() as inside:
            if self.on_gpu:
                inside.enter_context(_weights_whole())
            inside.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            inside.enter_context(ledger)
            inside.enter_context(_filled(model, ledger))
            inside.enter_context(_checkpointed(model) if checkpointing else nullcontext())
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
                ledger.call(moments, PAGED)
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
        members = [row for item in items for row in item]
        return self.task.end_to_end(members) if self.shared else self.task.collate(members)

    def fitting(self) -> Step | None:
        """Returns the step with the most rows that fits, of the same global batch.

        Without the dense copy of 4-bit weights only if it must be, and with checkpointing only if even that does not
        suffice, which costs more time. None where not even one row fits.
        """
        train, asked = self.config.train, self.asked()
        of = train.batch_size * train.accumulate
        caches: list[BaseCache] = [self.cache, "off"] if asked.bytes[DENSE] else [self.cache]
        for checkpointing, cache in itertools.product(dict.fromkeys((train.checkpoint_activations, True)), caches):
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

    def _fits(self, rows: int, checkpointing: bool, cache: BaseCache) -> Step | None:
        accumulate = self.config.train.batch_size * self.config.train.accumulate // rows
        found = self.step(rows, accumulate, checkpointing, cache)
        return found if found.peak_bytes <= self.device.usable_bytes else None


def plan(config: RunConfig, asked_device: str | None = None) -> Plan:
    """Returns what a training takes and what of it fits; downloads no weight that it can do without.

    The longest batch is that of the rows which `config.data` names, or of rows as long as they may be.

    Args:
        asked_device: as `devices.find` takes it.

    Raises:
        SourceError, UnsupportedModelError: there is no such base, or it does not suit the task or packing.
        ConfigError: the device is unknown, or the adapter starts from numbers.
        DataError: with all problems of the rows.
    """
    device = devices.find(asked_device)
    task = tasks.get(config.task)
    source = sources.describe(config.base, config.revision)
    items, in_epoch = _items(config, task, source)
    if in_epoch is not None and (device.kind == "cpu" or asked_device is None):
        dtype = getattr(torch, device.dtype if config.train.dtype == "auto" else config.train.dtype)
        device = dataclasses.replace(device, flops_per_s=matmul_rate(dtype, torch.device(device.kind)))
    planner = Planner(config, task, source, device, items)
    train = config.train
    asked = planner.asked()
    fitting = planner.fitting()
    accumulate = train.accumulate if fitting is None else train.batch_size * train.accumulate // fitting.rows
    return Plan(device, asked, fitting, accumulate, in_epoch)


def _items(config: RunConfig, task: Task, source: Source) -> tuple[list[list[Features]], int | None]:
    """Returns what batches are made of, the longest first, and the tokens of an epoch where rows are named."""
    if config.data.train is None or config.data.streaming:
        return [[_longest(config, task, source)]], None
    features: Any = rows.prepare(config, task, source, *rows.read(config)).train_features
    in_epoch = sum(length for row in features for length in task.lengths(row))
    items = Packs(features, config.data.max_length) if config.data.packing else Rows(features)
    longest = items.longest(task, config.train.batch_size * config.train.accumulate)
    return [item if config.data.packing else [item] for item in longest], in_epoch


def _longest(config: RunConfig, task: Task, source: Source) -> Features:
    """Returns a row of as many tokens as one may have, having given `task` what it needs for that."""
    task.max_length = bases.longest_row(source, task.model_class, config.data.max_length)
    if config.data.special_tokens or config.lora.train_tokens:
        task.tokenizer = bases.load_tokenizer(source.folder)
    else:
        padding = getattr(bases.text_config(source, task.model_class), "pad_token_id", None) or 0
        task.tokenizer = SimpleNamespace(pad_token_id=padding, unk_token_id=None, convert_tokens_to_ids=lambda _: [])
    return task.longest()


def outline(config: RunConfig, task: Task, source: Source, device: Device) -> Base:
    """Returns a base as `base.load` makes it, on the meta device: shapes and dtypes of weights, and none of them."""
    dtype = getattr(torch, device.dtype if config.train.dtype == "auto" else config.train.dtype)
    told = bases.text_config(source, task.model_class)
    for key, value in task.config_changes().items():
        setattr(told, key, value)
    if getattr(told, "pad_token_id", None) is None:
        told.pad_token_id = task.tokenizer.pad_token_id
    told.dtype = dtype
    quant = config.quant
    stored = bases.stored_quant(told, source, quant)
    if stored:
        del told.quantization_config
    model = bases.skeleton(source.name, told, task.model_class)
    output, task_heads = bases.heads(model)
    if quant != "none":
        misread = four_bits.misread(model, but=output + task_heads) if quant == "nf4" and device.kind == "cpu" else ()
        in_float32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
        settings: Any = bases.quantization(quant, dtype, output + task_heads + misread + in_float32)
        replace_with_bnb_linear(
            model, modules_to_not_convert=settings.llm_int8_skip_modules, quantization_config=settings
        )
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                _pack(module, dtype)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                _narrow(module)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    four_bits.keep_in_place(model)
    return Base(model, task.tokenizer, source, quant, dtype, (), task_heads)


def _pack(layer: Any, dtype: torch.dtype) -> None:
    """Gives a 4-bit layer on the meta device the weight and the scales that loading gives it."""
    n, k = layer.out_features, layer.in_features
    scales = -(-n * k // four_bits.BLOCK)
    with torch.device("meta"):
        groups = QuantState(
            absmax=torch.empty(-(-scales // NESTED)), code=torch.empty(256), blocksize=NESTED, dtype=torch.float32
        )
        weight: Any = nn.Parameter(torch.empty(-(-n * k // 2), 1, dtype=torch.uint8), requires_grad=False)
        absmax, offset = torch.empty(scales, dtype=torch.uint8), torch.empty(())
    # Numbers, by which the operators know what kind of weight it is.
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    weight.quant_state = layer.quant_state = QuantState(
        absmax=absmax, shape=torch.Size((n, k)), code=code, blocksize=four_bits.BLOCK, quant_type="nf4", dtype=dtype,
        offset=offset, state2=groups,
    )  # fmt: skip
    weight.compress_statistics, weight.quant_type, weight.blocksize = True, "nf4", four_bits.BLOCK
    weight.quant_storage, weight.bnb_quantized = torch.uint8, True
    layer.weight, layer.compute_type_is_set = weight, True


def _narrow(layer: Any) -> None:
    """Gives an 8-bit layer on the meta device the weight and the scales that loading gives it."""
    with torch.device("meta"):
        weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8)
        layer.state.SCB = torch.empty(layer.out_features)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)


@contextmanager
def _filled(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Runs the block with fake tensors in the place of those on the meta device, each counted as what it is."""
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (owned, name, tensor)
        for module in model.modules()
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if tensor is not None
    ]
    made: dict[int, torch.Tensor] = {}

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            with ledger.counting(ADAPTERS if tensor.requires_grad else WEIGHTS):
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                vars(fake).update({key: _with(value, filled) for key, value in vars(tensor).items()})
            made[id(tensor)] = fake
        return made[id(tensor)]

    states = [(m, m.quant_state) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    narrow: list[Any] = [(m, m.state) for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    try:
        for owned, name, tensor in places:
            owned[name] = filled(tensor)
        for layer, _ in states:
            layer.quant_state = layer.weight.quant_state
        for layer, state in narrow:
            layer.state = copy.copy(state)
            layer.state.CB, layer.state.SCB = layer.weight.data, filled(state.SCB)
        yield
    finally:
        for owned, name, tensor in places:
            owned[name] = tensor
        for layer, state in states:
            layer.quant_state = state
        for layer, state in narrow:
            layer.state = state


def _with(value: Any, change: Any) -> Any:
    """Returns how a weight is packed, with its tensors changed; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, QuantState):
        value = copy.copy(value)
        vars(value).update({key: _with(part, change) for key, part in vars(value).items()})
    return value


@contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def _weights_whole() -> Iterator[None]:
    """Runs the block as a GPU does: a weight is dequantized whole, and decoder layers are computed whole."""
    before = slabs.SLAB, blocks.ON_CPU
    slabs.SLAB, blocks.ON_CPU = sys.maxsize, True
    try:
        yield
    finally:
        slabs.SLAB, blocks.ON_CPU = before
