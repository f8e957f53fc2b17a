"""The processes that torchrun or `accelerate launch` started for one run: which is the first, and what they agree on.

Each holds a copy of the model and computes its share of every batch (`lora_ft.training.replicas`). The first one alone
writes, and goes on alone once the training is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from lora_ft.errors import ConfigError

T = TypeVar("T")

# The first may fetch a base or read rows for long while the others wait; where it ends, the launcher ends them.
PATIENCE = timedelta(hours=24)
# Beyond this a process that is waited for in the middle of a step is not coming.
IN_STEP = timedelta(minutes=30)
LAST_WORDS = timedelta(minutes=1)
# Bytes of gradients that are added up in one go: few calls, and little memory beside them.
AT_ONCE = 2**25

_patient: Any = None
"""The group of all processes in which they may wait for the first for long."""


def asked() -> int:
    """Returns how many processes the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Returns whether this is the process that writes; true of one that is alone."""
    return asked() == 1 or os.environ.get("RANK", "0") == "0"


def gpu() -> str | None:
    """Returns the GPU of this process as torch names it, where there are several processes and GPUs."""
    import torch

    return f"cuda:{os.environ['LOCAL_RANK']}" if asked() > 1 and torch.cuda.is_available() else None


def join() -> None:
    """Joins the others, where there are any, each with a GPU of its own if the machine has GPUs.

    Raises:
        ConfigError: they are not all of one machine, or more than it has GPUs.
    """
    import torch
    from torch import distributed

    if asked() == 1 or distributed.is_initialized():
        return
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if "LOCAL_RANK" not in os.environ or here != os.environ["WORLD_SIZE"]:
        raise ConfigError(
            f"{asked()} processes were started, {here or 'an unknown number'} of them on this machine; a run has one "
            "machine: start it with `torchrun --nproc-per-node N` or `accelerate launch`."
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu and asked() > torch.cuda.device_count():
        raise ConfigError(f"{asked()} processes were started on {torch.cuda.device_count()} GPUs: start one for each.")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=IN_STEP)
    global _patient
    _patient = distributed.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """Leaves the others: each goes on, or ends, by itself."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def end_together() -> None:
    """Waits for the others, or a minute, before a process ends with an error that all have met.

    The launcher ends those that are left as soon as one is gone, and the first has to say why.
    """
    if asked() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        with suppress(RuntimeError):
            distributed.monitored_barrier(_patient, LAST_WORDS)


def count() -> int:
    """Returns how many processes are joined: one from `leave` on."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    from torch import distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def in_turn() -> Iterator[None]:
    """Runs the block in the first process, and when it is done there in the others.

    Where it raises in the first, the others end without a word: a problem is said once.

    Raises:
        SystemExit: in the others.
    """
    if count() > 1 and not is_first() and not told(True, _patient):
        raise SystemExit(1)
    done = False
    try:
        yield
        done = True
    finally:
        if count() > 1 and is_first():
            told(done, _patient)


def told(value: T, group: Any = None) -> T:
    """Returns what the first process gave, in every one; anything that can be pickled."""
    if count() == 1:
        return value
    from torch import distributed

    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0, group=group)
    return held[0]


def gathered(numbers: Sequence[float]) -> list[list[float]]:
    """Returns the numbers of each process, by its rank; as many from each, as float64."""
    if count() == 1:
        return [list(numbers)]
    import torch
    from torch import distributed

    mine = torch.tensor(numbers, dtype=torch.float64)
    found = [torch.empty_like(mine) for _ in range(count())]
    distributed.all_gather(found, mine)
    return [numbers.tolist() for numbers in found]


def joined(tensor: Any) -> Any:
    """Returns the tensors of all processes one after the other, by rank; they may have unlike numbers of rows."""
    if count() == 1:
        return tensor
    import torch
    from torch import distributed

    sizes = [int(size) for (size,) in gathered([len(tensor)])]
    mine = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    mine[: len(tensor)] = tensor
    found = [torch.empty_like(mine) for _ in sizes]
    distributed.all_gather(found, mine)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


def share(tensors: Iterable[Any]) -> None:
    """Makes the numbers of tensors those of the first process."""
    from torch import distributed

    if count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def average_gradients(parameters: Iterable[Any]) -> None:
    """Makes the gradient of each parameter the mean over the processes; where none has one, it stays without."""
    import torch
    from torch import distributed

    learned = list(parameters)
    has_one = torch.tensor([p.grad is not None for p in learned], dtype=torch.uint8)
    distributed.all_reduce(has_one, distributed.ReduceOp.MAX)
    for p, has in zip(learned, has_one.tolist(), strict=True):
        if has and p.grad is None:
            p.grad = torch.zeros_like(p)
    for gradients in _batched([p.grad for p in learned if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= count()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _batched(tensors: Iterable[Any]) -> Iterator[list[Any]]:
    """Yields tensors in their order, together as long as they are of one dtype and below `AT_ONCE`."""
    batch: list[Any] = []
    held = 0
    for tensor in tensors:
        if batch and (tensor.dtype != batch[0].dtype or held + tensor.nbytes > AT_ONCE):
            yield batch
            batch, held = [], 0
        batch.append(tensor)
        held += tensor.nbytes
    if batch:
        yield batch
