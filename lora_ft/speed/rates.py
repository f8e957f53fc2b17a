"""How fast every operation of `lora_kernels` is: time, bytes and arithmetic a second, share of the roofline, rivals."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch

from lora_ft.speed import twins
from lora_ft.speed.twins import Case, Sizes
from lora_kernels import Frozen, dispatch, lora_bwd_up, nf4_dequant

Run = Callable[[], Any]

ON_GPU = Sizes(2048, 4096, 4096, 32000, (32, 8), (0, 700, 1100, 2048))
ON_CPU = Sizes(256, 1536, 576, 8192, (9, 3), (0, 90, 140, 256))
"""Of SmolLM2-135M, with fewer words."""
COPIED_BYTES = 2**28
"""Several times the caches of any GPU."""


@dataclass(frozen=True)
class Rated:
    """An operation, forwards and backwards where it has gradients, timed in one run with its rivals."""

    op: str
    seconds: float
    gigabytes_per_s: float
    """Of the least that it must read and write, each tensor once."""
    teraflops: float
    """A second, of its matrix products."""
    share: float
    """Of the roofline: the least time at the rates of copying and of matrix products that this machine reaches."""
    rivals: dict[str, float]
    """Seconds of each, by name."""

    def ratio(self, rival: str) -> float | None:
        """Returns how many times as long a rival takes, None where there is none of that name."""
        return self.rivals[rival] / self.seconds if rival in self.rivals else None


def operations(on: torch.device, dtype: torch.dtype, flops_per_s: float, bytes_per_s: float) -> Iterator[Rated]:
    """Yields the rates of every operation.

    Rivals: `peft`, the order of operations of PEFT, transformers and bitsandbytes; `one by one`, that of hand-written
    fast paths, where it is another; on a GPU `torch.compile` of the first.
    """
    sizes = ON_GPU if on.type == "cuda" else ON_CPU

    def rated(name: str, runs: dict[str, Run], least_bytes: int, flops: float) -> Rated:
        found = times(runs, on, seconds=0.5)
        seconds = found.pop("ours")
        least = max(least_bytes / bytes_per_s, flops / flops_per_s)
        return Rated(name, seconds, least_bytes / seconds / 1e9, flops / seconds / 1e12, least / seconds, found)

    w_NK = torch.randn(sizes.n, sizes.k, device=on, dtype=dtype)
    packed, state = bnb.functional.quantize_4bit(w_NK, quant_type="nf4", compress_statistics=True)
    weight = Frozen.of(packed, state)
    weight_bytes = packed.nbytes + weight.packed().absmax.nbytes
    unpacking: dict[str, Run] = {
        "ours": lambda: nf4_dequant(weight, dtype),
        "peft": lambda: bnb.functional.dequantize_4bit(packed, state),
    }
    yield rated("nf4_dequant", unpacking, weight_bytes + sizes.n * sizes.k * dtype.itemsize, 0.0)
    for case in twins.cases(on, dtype, sizes):
        with nullcontext() if case.way is None else dispatch.forced(case.way):
            ours, upstream = _step(case, case.op)
            plain = _step(case, case.twin)[0]
            runs: dict[str, Run] = {"ours": ours, "peft": plain}
            if case.layers:
                # PEFT's layers unpack the weight forwards and backwards, each for itself.
                runs["peft"] = _in_turn([unpacking["peft"]] * 2 * case.layers + [plain])
                runs["one by one"] = _layers_one_by_one(case, upstream, packed, state)
            if case.op is lora_bwd_up:
                runs["one by one"] = _up_one_by_one(*case.inputs)
            if on.type == "cuda":
                runs["torch.compile"] = _step(case, torch.compile(case.twin))[0]
            yield rated(case.name, runs, _least_bytes(case, upstream, weight_bytes), case.flops)


def _step(case: Case, function: Callable[..., Any]) -> tuple[Run, Sequence[torch.Tensor]]:
    """Returns what runs a function forwards and backwards, and the gradients that it is given."""
    leaves = [a.detach().requires_grad_() if i in case.learned else a for i, a in enumerate(case.inputs)]
    wanted = [leaves[i] for i in case.learned]

    def outputs() -> list[torch.Tensor]:
        found = function(*leaves)
        found = list(found) if isinstance(found, tuple) else [found]
        return found[:1] if found[0].ndim == 0 else found

    upstream = [torch.randn_like(y) for y in outputs()]
    return (lambda: torch.autograd.grad(outputs(), wanted, upstream)) if wanted else outputs, upstream


def _in_turn(runs: Sequence[Run]) -> Run:
    return lambda: [run() for run in runs]


def _layers_one_by_one(case: Case, upstream: Sequence[torch.Tensor], packed: torch.Tensor, state: Any) -> Run:
    x_MK, *_, a_RK, one, other = case.inputs
    b = (one, other) if case.layers == 2 else (one,)  # of a single layer, the scaling comes last
    a = a_RK.split([part.shape[1] for part in b])
    return _in_turn(
        [partial(one_by_one, x_MK, packed, state, *three, 0.5) for three in zip(a, b, upstream, strict=True)]
    )


def _up_one_by_one(dy_MN: torch.Tensor, b_NR: torch.Tensor, xa_MR: torch.Tensor, scaling: float) -> Run:
    """dY @ B is computed for A, and once more for x."""
    return lambda: ((dy_MN @ b_NR).mul_(scaling), dy_MN @ b_NR, (dy_MN.t() @ xa_MR).mul_(scaling))


def one_by_one(
    x_MK: torch.Tensor,
    packed: torch.Tensor,
    state: Any,
    a_RK: torch.Tensor,
    b_NR: torch.Tensor,
    dy_MN: torch.Tensor,
    scaling: float,
) -> None:
    """Does what a layer and its backward pass do in the order that hand-written fast paths use.

    The weight is dequantized, multiplied, the adapter added in place; backward it is dequantized again, dy @ B is
    computed for A and once more for x, and x @ A.T anew.
    """
    with torch.no_grad():
        w_NK = bnb.functional.dequantize_4bit(packed, state)
        (x_MK @ w_NK.t()).addmm_(x_MK @ a_RK.t(), b_NR.t(), alpha=scaling)
        w_NK = bnb.functional.dequantize_4bit(packed, state)
        (dy_MN @ w_NK).addmm_(dy_MN @ b_NR, a_RK, alpha=scaling)
        torch.mm((dy_MN @ b_NR).t(), x_MK).mul_(scaling)
        torch.mm(dy_MN.t(), x_MK @ a_RK.t()).mul_(scaling)


def _least_bytes(case: Case, outputs: Sequence[torch.Tensor], weight_bytes: int) -> int:
    """Forwards inputs are read and outputs written; backwards inputs and upstream gradients read, gradients written."""
    read = [a for i, a in enumerate(case.inputs) if isinstance(a, torch.Tensor) and not (case.layers and i == 1)]
    once = sum(tensor.nbytes for tensor in (*read, *outputs)) + case.layers * weight_bytes
    return 2 * once + sum(case.inputs[i].nbytes for i in case.learned) if case.learned else once


def matmul_rate(dtype: torch.dtype, on: torch.device) -> float:
    """Returns the rate of matrix products alone on this machine, in FLOP/s."""
    size = 8192 if on.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=on, dtype=dtype) for _ in range(2))
    return 2 * size**3 / times({"matmul": lambda: left @ right}, on)["matmul"]


def bandwidth(on: torch.device) -> float:
    """Returns the rate of copying on this machine, in bytes read and written a second."""
    source, target = (torch.ones(COPIED_BYTES // 4, device=on) for _ in range(2))
    return 2 * COPIED_BYTES / times({"copy": lambda: target.copy_(source)}, on)["copy"]


def times(runs: Mapping[str, Run], on: torch.device, seconds: float = 1.0, least: int = 5) -> dict[str, float]:
    """Returns the median time of each run in seconds; the runs take turns, so that noise falls on all alike.

    On a GPU it is the time of the GPU alone: one layer is launched more slowly than it is computed.

    Args:
        seconds: time to spend on all of them; at least `least` turns are taken.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # the first of each compiles, fills caches, or grows buffers
        run()
    if on.type == "cuda":
        written = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=on)
        clocks = {name: _clock_of_gpu(run, written) for name, run in runs.items()}
    else:
        clocks = {name: partial(_clock, run) for name, run in runs.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < least:
        for name, clock in clocks.items():
            taken[name].append(clock())
    return {name: statistics.median(found) for name, found in taken.items()}


def _clock(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _clock_of_gpu(run: Run, written: torch.Tensor) -> Callable[[], float]:
    """Returns what tells the seconds that a GPU works on `run`, with no input in its caches.

    Before each run the GPU is given `written` to write, so often that the processor has launched all of the run by the
    time it is written.
    """

    def timed(work: Run, ahead: int) -> float:
        for _ in range(ahead):
            written.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    torch.cuda.synchronize(written.device)
    launching = _clock(run)
    ahead = 1 + math.ceil(2 * launching / timed(written.zero_, ahead=1))
    return partial(timed, run, ahead)
