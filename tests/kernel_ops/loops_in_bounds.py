"""Each loop on tensors between pages that nobody may touch; the first that leaves them ends this process by SIGSEGV.

`python -m tests.kernel_ops.loops_in_bounds` prints what went well; with `wild` it runs a loop that is told of a row too
many, to show that it would be caught.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from lora_kernels.cpu import loops
from tests.kernel_ops import guard

BF16 = torch.bfloat16


def _random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Returns rows that stand apart."""
    return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., : shape[-1]]


def logits(rows: int, columns: int) -> list[torch.Tensor]:
    z = _random(rows, columns)
    return [z, loops.differentiate_logits_(z, torch.randint(columns, (rows,)), 0.5, True)]


def activation(rows: int, columns: int) -> list[torch.Tensor]:
    h = _random(rows, columns)
    loops.swiglu_into(h, _random(rows, columns), _random(rows, columns))
    return [h]


def activation_gradients(rows: int, columns: int) -> list[torch.Tensor]:
    found = [torch.empty(rows, columns, dtype=BF16) for _ in range(3)]
    loops.differentiate_swiglu_into(*found, *(_random(rows, columns) for _ in range(3)))
    return found


def norm(rows: int, columns: int) -> list[torch.Tensor]:
    y, h, rstd = _random(rows, columns), torch.empty(rows, columns, dtype=BF16), torch.empty(rows)
    loops.rms_norm_into(y, h, rstd, _random(rows, columns), _random(rows, columns), _random(columns), 1e-5)
    return [y, h, rstd]


def norm_gradients(rows: int, columns: int) -> list[torch.Tensor]:
    dx, others = torch.empty(rows, columns, dtype=BF16), [_random(rows, columns) for _ in range(3)]
    loops.differentiate_rms_norm_into(dx, *others, torch.rand(rows), _random(columns))
    return [dx]


def rotation(rows: int, columns: int) -> list[torch.Tensor]:
    width = columns // 2 * 2
    x, (cos, sin) = _random(2, rows, 3, width).transpose(1, 2), torch.rand(2, 2, rows, width)
    found = []
    for inverse in (False, True):
        found.append(torch.empty_like(x))
        loops.rotate_into(found[-1], x, cos, sin, inverse)
    return found


def scores(rows: int, columns: int) -> list[torch.Tensor]:
    found = []
    for window in (0, 5):
        s, dp = (torch.randn(2, 3 * (columns // 2), columns).to(BF16) for _ in range(2))
        loops.differentiate_scores_(s, dp, columns // 2, window, 0.3)
        found += [s, dp]
    return found


CASES: dict[str, Callable[[int, int], list[torch.Tensor]]] = {
    "logits": logits,
    "activation": activation,
    "activation_gradients": activation_gradients,
    "norm": norm,
    "norm_gradients": norm_gradients,
    "rotation": rotation,
    "scores": scores,
}


def main() -> None:
    torch.set_num_threads(1)
    wild, run = "wild" in sys.argv, loops._run
    for case, call in CASES.items():
        for side in ("start", "end"):
            with mock.patch.object(loops, "_run", _fenced(run, side, wild)):
                call(7, 67)
            print(f"{case}-{side}", flush=True)


def _fenced(run: Callable[..., None], side: guard.Side, wild: bool) -> Callable[..., None]:
    def run_fenced(name: str, *arguments: Any) -> None:
        fences: list[guard.Fenced] = []
        fenced = list(arguments)
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor) and argument.numel():
                fences.append(guard.Fenced(argument.data_ptr(), guard.last_byte(argument), side))
                fenced[place] = fences[-1].view(argument)
        if wild:
            first = next(place for place, argument in enumerate(arguments) if type(argument) is int)
            fenced[first] += 1 << 20
        run(name, *fenced)
        for fence in fences:
            fence.release()

    return run_fenced


if __name__ == "__main__":
    main()
