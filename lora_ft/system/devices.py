"""What a run may be planned for: a card by its name, so much memory, or this machine; and when its memory is out."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from lora_ft.errors import ConfigError
from lora_ft.system import allowance

GIB = 2**30
UNITS = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
# What a CUDA context, its libraries and the kernels that are loaded take of a card, and what the allocator cannot use.
CONTEXT_BYTES, FRAGMENTED = GIB // 2, 0.05
# How torch says that memory is used up where it does not raise its own class for that.
USED_UP = (
    "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
WORDS = "a card such as 'RTX 3060', a size such as 12GiB, or cpu, also as cpu:8GiB"


@dataclass(frozen=True)
class Device:
    """A place for a run, and how much memory it has for one."""

    name: str
    kind: str
    """`cuda` or `cpu`."""
    usable_bytes: int
    """For the tensors of a run."""
    dtype: str
    """That a run computes in unless it is told otherwise."""
    flops_per_s: float | None = None
    """Of dense products in that dtype with float32 sums, by the datasheet; None where it is not known."""


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet."""

    gib: float
    """Memory that programs see, where it is less than what the card is sold with."""
    teraflops: float
    """A second, of dense bfloat16 products with float32 sums; float16 where there is no bfloat16."""
    dtype: str = "bfloat16"


CARDS = {
    "T4": Card(14.6, 65, "float16"),
    "V100": Card(15.8, 125, "float16"),
    "RTX 2080 Ti": Card(10.7, 53.8, "float16"),
    "RTX 3060": Card(11.8, 25.5),
    "RTX 3070": Card(7.8, 40.6),
    "RTX 3080": Card(9.8, 59.5),
    "RTX 3090": Card(23.7, 71),
    "RTX 4060": Card(7.7, 30),
    "RTX 4060 Ti": Card(15.6, 44),
    "RTX 4070": Card(11.7, 58),
    "RTX 4080": Card(15.7, 97.5),
    "RTX 4090": Card(23.6, 165.2),
    "RTX 5070": Card(11.6, 61.7),
    "RTX 5080": Card(15.5, 112.6),
    "RTX 5090": Card(31.4, 209.5),
    "A10": Card(22.1, 125),
    "L4": Card(22.1, 121),
    "A100": Card(39.4, 312),
    "H100": Card(79.2, 989),
}
"""From the makers' datasheets. Of cards sold in several sizes the most common: 12 GB of the 3060, 16 of the 4060 Ti."""


def find(asked: str | None) -> Device:
    """Returns the device that is asked for, None for the one that a run would take on this machine.

    Raises:
        ConfigError: it is neither a known card nor a size.
    """
    if asked is None:
        return _own_gpu() if torch.cuda.is_available() else _own_processor(None)
    words = asked.strip()
    card = next((name for name in CARDS if _plain(name) == _plain(words)), None)
    if card is not None:
        of = CARDS[card]
        return Device(card, "cuda", _for_tensors(of.gib * GIB), of.dtype, of.teraflops * 1e12)
    kind, colon, size = words.rpartition(":")
    if words.lower() == "cpu":
        return _own_processor(None)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)", size, re.IGNORECASE)
    if not found or (colon and kind.lower() != "cpu"):
        raise ConfigError(f"--device {asked!r} is no device known here: take {WORDS}. Cards: {', '.join(CARDS)}.")
    held = int(float(found[1]) * UNITS[found[2].lower()])
    if colon:
        return _own_processor(held)
    return Device(f"a GPU of {held / GIB:.4g} GiB", "cuda", _for_tensors(held), "bfloat16")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[\s-]", "", name.lower())


def _for_tensors(held: float) -> int:
    return max(int((held - CONTEXT_BYTES) * (1 - FRAGMENTED)), 0)


def _own_gpu() -> Device:
    """Returns this machine's GPU with the memory that is free on it."""
    from lora_ft.base import choose_dtype

    dtype = str(choose_dtype("auto", "cuda")[0]).removeprefix("torch.")
    free, _ = torch.cuda.mem_get_info()
    # What the context takes is taken already.
    return Device(torch.cuda.get_device_name(), "cuda", int(free * (1 - FRAGMENTED)), dtype)


def _own_processor(held: int | None) -> Device:
    """Returns this machine's processor with the memory that is free, or with `held` bytes for the whole process."""
    from lora_ft.base import choose_dtype

    dtype = str(choose_dtype("auto", "cpu")[0]).removeprefix("torch.")
    # What the program and its libraries take is this process's, which has imported them.
    usable = allowance.memory_bytes() if held is None else max(held - psutil.Process().memory_info().rss, 0)
    return Device("this processor", "cpu", usable, dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether torch raised it for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in USED_UP)
