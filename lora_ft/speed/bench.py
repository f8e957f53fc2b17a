"""`lora-ft bench kernels`: every operation held against its twin, timed against what users have, and tuned on the card.

Shapes: M rows of activations, N outputs and K inputs of a weight, R the rank of an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn

from lora_ft import base as bases
from lora_ft import fused
from lora_ft.model import four_bits
from lora_ft.speed import tuning
from lora_ft.speed.rates import Rated, Run, bandwidth, matmul_rate, one_by_one, operations, times
from lora_ft.speed.twins import RANK, Checked, check
from lora_kernels import dispatch

# Rows and weights [N, K] to time: on a GPU those of Llama-3-8B, else of SmolLM2-135M and a square.
CPU_ROWS, CPU_WEIGHTS = (1, 16, 128, 1024, 4096), ((2048, 2048), (1536, 576))
GPU_ROWS, GPU_WEIGHTS = (1, 16, 128, 512, 2048, 8192), ((4096, 4096), (14336, 4096), (4096, 14336))
TUNED_ROWS = tuple(2**power for power in range(14))
"""Every row count that `dispatch.shape_key` knows up to the largest, so that no shape between is left to the table."""


@dataclass(frozen=True)
class Timed:
    """A product with a frozen weight and its adapter, forward and backward, timed in one run with its rivals."""

    rows: int
    weight: tuple[int, int]
    """(N, K)."""
    dtype: str
    seconds: float
    share: float
    """Of the rate of matrix products alone that the machine reaches."""
    rivals: dict[str, float]
    """Seconds of each, by name."""

    def ratio(self, rival: str) -> float:
        """Returns how many times as long the rival takes."""
        return self.rivals[rival] / self.seconds


def device() -> torch.device:
    """Returns the device to measure: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layers(n: int, k: int, dtype: torch.dtype, on: torch.device, quant: str = "nf4") -> dict[str, nn.Module]:
    """Returns one adapted linear layer [n, k] twice: `fused`, and `peft` as PEFT and bitsandbytes make it."""
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    plain = nn.Linear(k, n, bias=False, dtype=dtype)
    if quant == "nf4":
        # Loading its state would widen it to float32 first, and so all that is dequantized from it.
        linear.weight.data = plain.weight.data
    stem = nn.Sequential(linear if quant == "nf4" else plain).to(on)
    four_bits.keep_in_place(stem)
    stem.requires_grad_(False)
    stem.is_loaded_in_4bit = quant == "nf4"  # type: ignore[assignment]
    made: dict[str, nn.Module] = {}
    for name in ("fused", "peft"):
        settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
        if name == "fused":
            fused.register(settings)
        torch.manual_seed(1)
        made[name] = peft.get_peft_model(copy.deepcopy(stem), settings)
    return made


def step(layer: nn.Module, x_MK: torch.Tensor, dy_MN: torch.Tensor) -> None:
    """Runs a layer forward and backward, in the precision of training."""
    x_MK.grad = None
    half = x_MK.dtype if x_MK.dtype != torch.float32 else None
    with torch.autocast(x_MK.device.type, dtype=half, enabled=half is not None):
        y_MN = layer(x_MK)
    y_MN.backward(dy_MN)


def _one_by_one(layer: Any, x_MK: torch.Tensor, dy_MN: torch.Tensor) -> Run:
    """Returns what `rates.one_by_one` does with the numbers of a layer."""
    a_RK, b_NR = (matrices["default"].weight.detach() for matrices in (layer.lora_A, layer.lora_B))
    weight, scaling = layer.base_layer.weight, layer.scaling["default"]

    def run() -> None:
        a, b = a_RK.to(x_MK.dtype), b_NR.to(x_MK.dtype)
        one_by_one(x_MK.detach(), weight, weight.quant_state, a, b, dy_MN, scaling)

    return run


def linear(m: int, n: int, k: int, dtype: torch.dtype, on: torch.device, rate: float) -> Timed:
    """Returns the times of one shape in 4 bits. `rate`: matrix products alone, in FLOP/s.

    Rivals: `peft`, PEFT's and bitsandbytes' layers in the same dtype; `peft in float32`, the same in the dtype that
    transformers' `BitsAndBytesConfig` computes in where nothing is said; `one by one`; on a GPU `torch.compile`.
    """
    made = layers(n, k, dtype, on)
    x_MK = torch.randn(m, k, device=on, dtype=dtype, requires_grad=True)
    dy_MN = torch.randn(m, n, device=on, dtype=dtype)
    plain = made["peft"].get_submodule("base_model.model.0")
    runs: dict[str, Run] = {
        "fused": lambda: step(made["fused"], x_MK, dy_MN),
        "peft": lambda: step(made["peft"], x_MK, dy_MN),
        "one by one": _one_by_one(plain, x_MK, dy_MN),
    }
    if dtype != torch.float32:
        wide, wide_dy_MN = layers(n, k, torch.float32, on)["peft"], dy_MN.float()
        wide_x_MK = x_MK.detach().float().requires_grad_()
        runs["peft in float32"] = lambda: step(wide, wide_x_MK, wide_dy_MN)
    if on.type == "cuda":
        compiled: Any = torch.compile(copy.deepcopy(made["peft"]))
        runs["torch.compile"] = lambda: step(compiled, x_MK, dy_MN)
    found = times(runs, on)
    seconds = found.pop("fused")
    # Two products with the weight, and six with the two halves of the adapter.
    flops = 4 * m * n * k + 6 * m * RANK * (n + k)
    return Timed(m, (n, k), str(dtype).removeprefix("torch."), seconds, flops / seconds / rate, found)


def tune(
    rows: Sequence[int], weights: Sequence[tuple[int, int]], dtype: torch.dtype, on: torch.device
) -> dict[str, str]:
    """Returns the fastest way of each shape on this GPU, in 4 bits and dense, by `dispatch.shape_key`."""
    best: dict[str, str] = {}
    for quant in ("nf4", "none"):
        packed = quant == "nf4"
        for n, k in weights:
            layer = layers(n, k, dtype, on, quant)["fused"]
            for m in rows:
                x_MK = torch.randn(m, k, device=on, dtype=dtype, requires_grad=True)
                dy_MN = torch.randn(m, n, device=on, dtype=dtype)
                runs: dict[str, Run] = {way: _forced(way, layer, x_MK, dy_MN) for way in dispatch.ways(packed, dtype)}
                found = times(runs, on, seconds=0.2)
                best[dispatch.shape_key(m, n, k, packed, dtype)] = min(found, key=lambda way: found[way])
    return best


def _forced(way: dispatch.Path, layer: nn.Module, x_MK: torch.Tensor, dy_MN: torch.Tensor) -> Run:
    def run() -> None:
        with dispatch.forced(way):
            step(layer, x_MK, dy_MN)

    return run


def kernels(
    note: Callable[[str], None] = lambda text: None,
) -> tuple[list[Checked], list[Rated], list[Timed], str | None]:
    """Returns the checks, the rates of operations, the times of layers, and the file with the fastest ways of a GPU.

    Nothing is tuned where a check fails.
    """
    on = device()
    dtype, _ = bases.choose_dtype("auto", on.type)
    note("holding every operation against its twin")
    checks = list(check(on, dtype))
    rows, weights = (GPU_ROWS, GPU_WEIGHTS) if on.type == "cuda" else (CPU_ROWS, CPU_WEIGHTS)
    written = None
    if on.type == "cuda" and all(found.passed for found in checks):
        note("tuning")
        written = str(tuning.keep(torch.cuda.get_device_name(on), tune(TUNED_ROWS, weights, dtype, on)))
    rate = matmul_rate(dtype, on)
    rated = []
    for one in operations(on, dtype, rate, bandwidth(on)):
        note(f"timed {one.op}")
        rated.append(one)
    timed = []
    for n, k in weights:
        for m in rows:
            note(f"timing {m} rows on [{n}, {k}]")
            timed.append(linear(m, n, k, dtype, on, rate))
    return checks, rated, timed, written
