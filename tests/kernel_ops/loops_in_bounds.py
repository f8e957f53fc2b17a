"""Each loop on tensors between pages that nobody may touch; the first that leaves them ends this process by SIGSEGV.

`python -m tests.kernel_ops.loops_in_bounds` prints what went well. With the name of a case that one alone runs, told of
more rows than there are, to show that it would be caught.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from lora_kernels.cpu import loops
from tests.kernel_ops import guard


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns rows that stand apart."""
    return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., : shape[-1]]


def logits(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    z = _random(rows, columns, dtype=dtype)
    labels = torch.randint(columns, (rows,))
    return [loops.differentiate_logits_(z, labels, 0.5, False), loops.differentiate_logits_(z, labels, 0.5, True), z]


def activation(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    h, gate, up = (_random(rows, columns, dtype=dtype) for _ in range(3))
    loops.swiglu_into(h, gate, up)
    return [h]


def activation_gradients(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    found = [torch.empty(rows, columns, dtype=dtype) for _ in range(4)]
    others = [_random(rows, columns, dtype=dtype) for _ in range(3)]
    loops.differentiate_swiglu_into(found[0], found[1], None, *others)
    loops.differentiate_swiglu_into(*found[:3], *others)
    # h in the place of dh.
    found[3].copy_(others[0])
    loops.differentiate_swiglu_into(found[0], found[1], found[3], found[3], *others[1:])
    return found


def norm(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    y, x, residual, weight = (_random(size, columns, dtype=dtype) for size in (rows, rows, rows, 1))
    h, rstd = torch.empty(rows, columns, dtype=dtype), torch.empty(rows)
    loops.rms_norm_into(y, h[:0], rstd, x, None, weight[0], 1e-5)
    loops.rms_norm_into(y, h, rstd, x, residual, weight[0], 1e-5)
    return [y, h, rstd]


def norm_gradients(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    dx, (dy, dh, h) = torch.empty(rows, columns, dtype=dtype), (_random(rows, columns, dtype=dtype) for _ in range(3))
    rstd, weight = torch.rand(rows), _random(1, columns, dtype=dtype)[0]
    loops.differentiate_rms_norm_into(dx, dy, None, h, rstd, weight)
    loops.differentiate_rms_norm_into(dx, dy, dh, h, rstd, weight)
    return [dx]


def rotation(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    width = columns // 2 * 2
    x, found = _random(2, rows, 3, width, dtype=dtype).transpose(1, 2), []
    for angles in (1, 2):
        for inverse in (False, True):
            found.append(torch.empty_like(x))
            loops.rotate_into(found[-1], x, *torch.rand(2, angles, rows, width), inverse)
    return found


def scores(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    found = []
    for keys in (columns, columns // 32 * 32):
        for window in (0, 5):
            s, dp = (torch.randn(2, 3 * (keys // 2), keys).to(dtype) for _ in range(2))
            loops.differentiate_scores_(s, dp, keys // 2, window, 0.3)
            found += [s, dp]
    return found


def _parts(rows: int) -> list[slice]:
    return [slice(0, rows - 2), slice(rows + 1, 2 * rows + 1)]


def gathering(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    stacked = torch.empty(2, 3, rows, columns, dtype=dtype)
    loops.gather_into(stacked, _random(2 * rows + 1, 3, columns, dtype=dtype).transpose(0, 1), _parts(rows))
    return [stacked]


def scattering(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    x = _random(2 * rows + 1, 3, columns, dtype=dtype).transpose(0, 1)
    loops.scatter_into(x, torch.randn(2, 3, rows, columns).to(dtype), _parts(rows))
    return [x]


def adding(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    x = _random(2 * rows + 1, 3, columns, dtype=torch.float32).transpose(0, 1)
    loops.scatter_add(x, torch.randn(2, 3, rows, columns).to(dtype), _parts(rows))
    return [x]


CASES: dict[str, Callable[[int, int, torch.dtype], list[torch.Tensor]]] = {
    "logits": logits,
    "activation": activation,
    "activation_gradients": activation_gradients,
    "norm": norm,
    "norm_gradients": norm_gradients,
    "rotation": rotation,
    "scores": scores,
    "gathering": gathering,
    "scattering": scattering,
    "adding": adding,
}


def main() -> None:
    torch.set_num_threads(1)
    wild, run = sys.argv[1:], loops._run
    for case in wild or CASES:
        for dtype in (torch.bfloat16, torch.float32):
            for side in ("start", "end"):
                with mock.patch.object(loops, "_run", _fenced(run, side, bool(wild))):
                    CASES[case](7, 67, dtype)
                print(f"{case}-{dtype}-{side}", flush=True)


def _fenced(run: Callable[..., None], side: guard.Side, wild: bool) -> Callable[..., None]:
    def run_fenced(name: str, *arguments: Any) -> None:
        spans: dict[int, tuple[int, int]] = {}
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor) and argument.numel()]
        for tensor in tensors:
            storage = tensor.untyped_storage().data_ptr()
            first, last = spans.get(storage, (tensor.data_ptr(), 0))
            spans[storage] = min(first, tensor.data_ptr()), max(last, guard.last_byte(tensor))
        fences = {storage: guard.Fenced(first, last, side) for storage, (first, last) in spans.items()}
        fenced = [
            fences[argument.untyped_storage().data_ptr()].view(argument)
            if isinstance(argument, torch.Tensor) and argument.numel()
            else argument
            for argument in arguments
        ]
        if wild:
            rows = next(place for place, argument in enumerate(arguments) if type(argument) is int)
            fenced[rows] += 1 << 20
        run(name, *fenced)
        for fence in fences.values():
            fence.release()

    return run_fenced


if __name__ == "__main__":
    main()
