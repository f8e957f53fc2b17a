"""The processes that torchrun or `accelerate launch` started for one run: which is the first, and what they agree on.

Each holds a copy of the model and computes its share of every batch (`lora_ft.replicas`). The first one alone writes,
and goes on alone once the training is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# The first may fetch a base or read rows for long while the others wait; where it ends, the launcher ends them.
PATIENCE = timedelta(hours=24)
# Bytes of gradients that are added up in one go: few calls, and little memory beside them.
AT_ONCE = 2**25


def asked() -> int:
    """Returns how many processes the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Returns whether this is the process that writes; true of one that is alone."""
    return asked() == 1 or os.environ.get("RANK", "0") == "0"


def join() -> None:
    """Joins the others, where there are any, each of this machine with a GPU of its own if it has GPUs."""
    import torch
    from torch import distributed

    if asked() == 1 or distributed.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)


def leave() -> None:
    """Leaves the others: each goes on, or ends, by itself."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


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

    Where it raises in the first, the others wait until the launcher ends them, so a problem is said once.
    """
    from torch import distributed

    if count() > 1 and not is_first():
        distributed.barrier()
    yield
    if count() > 1 and is_first():
        distributed.barrier()


def told(value: T) -> T:
    """Returns what the first process gave, in every one; anything that can be pickled."""
    if count() == 1:
        return value
    from torch import distributed

    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
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
