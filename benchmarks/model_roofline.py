"""The share of the roofline each operation should reach, modelled from datasheets: nothing here is measured.

    python benchmarks/model_roofline.py

An operation is a sequence of passes. A pass takes as long as its bytes or its arithmetic at 85% of the datasheet rate,
whichever is longer; the roofline is the least bytes and arithmetic of the whole at the full rate. Caches are not
modelled. M = 2048 rows, K = N = 4096, rank 16, bfloat16, NF4 with double quantization, V = 128,256 words.
"""

from __future__ import annotations

from dataclasses import dataclass

REACHED = 0.85
"""Of datasheet rates, for arithmetic and memory alike: what good kernels reach."""
M, K, N, R, V = 2048, 4096, 4096, 16, 128_256
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: four bits, a byte of scale a block of 64, a float a group of 256 blocks."""


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet."""

    name: str
    flops: float
    """Dense bfloat16 with float32 sums, a second."""
    bandwidth: float
    """Bytes a second."""


CARDS = (
    Card("RTX 3060", 25.5e12, 360e9),
    Card("RTX 3090", 71e12, 936e9),
    Card("RTX 4090", 165.2e12, 1008e9),
    Card("RTX 5090", 209.5e12, 1792e9),
    Card("H100 SXM", 989e12, 3350e9),
)


@dataclass(frozen=True)
class Pass:
    """One trip through memory."""

    moved: float
    """Bytes."""
    flops: float = 0.0


@dataclass(frozen=True)
class Operation:
    """What an operation does, and the least it could."""

    name: str
    least_moved: float
    passes: tuple[Pass, ...]

    def share(self, card: Card) -> float:
        """Returns the modelled share of the roofline."""
        flops = sum(one.flops for one in self.passes)
        ideal = max(self.least_moved / card.bandwidth, flops / card.flops)
        taken = sum(max(one.moved / card.bandwidth, one.flops / card.flops) for one in self.passes) / REACHED
        return ideal / taken

    @property
    def moved(self) -> float:
        """Bytes of all passes."""
        return sum(one.moved for one in self.passes)


def operations() -> tuple[Operation, ...]:
    """Returns every operation at the shapes above."""
    x, y, w, adapter, packed = 2 * M * K, 2 * M * N, 2 * N * K, 2 * R * (N + K), PACKED * N * K
    dequantized, narrow = Pass(packed + w), 2 * M * R
    down = Pass(x + 2 * R * K + narrow, 2 * M * K * R)
    # Partial sums of dB: float32, one for each block of 64 rows, written and read once.
    partial = 2 * 4 * (M // 64) * N * R
    forward = (dequantized, down, Pass(x + w + y, 2 * M * N * K), Pass(2 * y + narrow, 2 * M * N * R))
    backward = (
        dequantized,
        Pass(y + 2 * N * R + 2 * narrow + partial, 4 * M * N * R),
        Pass(y + w + x, 2 * M * N * K),
        Pass(2 * x + narrow, 2 * M * K * R),
        Pass(x + narrow, 2 * M * K * R),
    )
    # Queries, keys and values of Llama-3-8B, with x @ a.T brought by the norm: each weight is multiplied, and written,
    # with its adapter behind it. Backward their gradients are put side by side first.
    ranks, outputs = 3 * R, N + N // 4 + N // 4
    wide, tails, qkv = 2 * M * (K + ranks), 2 * R * outputs, 2 * M * outputs
    grouped = tuple(
        step
        for n in (N, N // 4, N // 4)
        for step in (
            Pass(PACKED * n * K + 2 * n * (K + ranks)),
            Pass(wide + 2 * n * (K + ranks) + 2 * M * n, 2 * M * n * (K + ranks)),
        )
    )
    grouped_back = (
        Pass((PACKED + 2) * outputs * K),
        Pass(qkv + tails + 3 * 2 * narrow + 2 * 4 * (M // 128) * outputs * R, 4 * M * outputs * R),
        Pass(2 * qkv),
        Pass(qkv + 2 * outputs * K + x, 2 * M * outputs * K),
    )
    chunk = 2 * M * V
    loss = (Pass(x + 2 * V * K + chunk, 2 * M * V * K), Pass(3 * chunk), Pass(chunk + 2 * V * K + x, 2 * M * V * K))
    return (
        Operation("nf4_dequant", packed + w, (dequantized,)),
        Operation("lora_down", x + 2 * R * K + narrow, (down,)),
        Operation("lora_bwd_up", y + 2 * N * R + 2 * narrow + 4 * N * R, (backward[1],)),
        Operation("lora_linear, forward", packed + x + y + adapter, forward),
        Operation("lora_linear, backward", packed + y + 2 * x + 2 * adapter, backward),
        Operation("lora_group of q, k, v, forward", PACKED * outputs * K + wide + tails + qkv, grouped),
        Operation("lora_group of q, k, v, backward", PACKED * outputs * K + wide + 2 * tails + qkv, grouped_back),
        Operation("rms_norm_lora", 2 * x + 2 * R * K + narrow, (Pass(3 * x + 2 * R * K + narrow, 2 * M * K * R),)),
        Operation("swiglu_lora", 3 * y + 2 * R * N + narrow, (Pass(3 * y + 2 * R * N + narrow, 2 * M * N * R),)),
        Operation("rope", 2 * (x + x // 4), (Pass(2 * (x + x // 4)),)),
        Operation("linear_cross_entropy", 2 * x + 2 * V * K, loss),
    )


def main() -> None:
    print("| operation | MB moved | least | " + " | ".join(card.name for card in CARDS) + " |")
    print("| --- | ---: | ---: |" + " ---: |" * len(CARDS))
    for one in operations():
        shares = " | ".join(f"{one.share(card):.0%}" for card in CARDS)
        print(f"| {one.name} | {one.moved / 1e6:.0f} | {one.least_moved / 1e6:.0f} | {shares} |")


if __name__ == "__main__":
    main()
