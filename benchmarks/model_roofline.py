"""The share of the roofline each operation should reach, modelled from datasheets: nothing here is measured.

    python benchmarks/model_roofline.py

An operation is a sequence of passes. A pass takes as long as its bytes or its arithmetic at 85% of the datasheet rate,
whichever is longer; the roofline is the least bytes and arithmetic of the whole at the full rate. A product is taken to
read each operand once; else no cache is modelled, nor is what unpacking a weight costs beside its product. M = 2048
rows, K = N = 4096, rank 16, bfloat16, NF4 with double quantization, V = 128,256 words, 32 heads of queries and 8 of
keys, 128 wide.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_kernels import attention
from lora_kernels.gpu.lora import UP_ROWS, UP_SPLIT, WEIGHT_SPLIT

REACHED = 0.85
"""Of datasheet rates, for arithmetic and memory alike: what good kernels reach."""
M, K, N, R, V = 2048, 4096, 4096, 16, 128_256
FEW = 16
"""Rows of a product straight from the packed weight."""
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


def up_backward(outputs: int) -> Pass:
    """Returns what `lora_bwd_up` does for so many outputs: parts of dS and dB in float32 are written and read once."""
    parts = 2 * 4 * (-(-outputs // UP_SPLIT) * M * R + M // UP_ROWS * outputs * R)
    results = 2 * M * R + 4 * outputs * R
    return Pass(2 * M * outputs + 2 * outputs * R + 2 * M * R + parts + results, 4 * M * outputs * R)


def scores() -> tuple[float, float]:
    """Returns the bytes of all scores of causal attention in float32, and the arithmetic of one product with them."""
    keys = sum((last - first) * last for first, last in _blocks_of_queries())
    return 4 * 32 * keys, 2 * 32 * 128 * keys


def _blocks_of_queries() -> list[tuple[int, int]]:
    return [(first, min(first + attention.BLOCK_16_BITS, M)) for first in range(0, M, attention.BLOCK_16_BITS)]


def operations() -> tuple[Operation, ...]:
    """Returns every operation at the shapes above."""
    x, y, w, adapter, packed = 2 * M * K, 2 * M * N, 2 * N * K, 2 * R * (N + K), PACKED * N * K
    dequantized, narrow = Pass(packed + w), 2 * M * R
    down = Pass(x + 2 * R * K + narrow, 2 * M * K * R)
    # Partial sums of dA: float32, one for each block of rows, written and read once.
    down_weight = Pass(x + narrow + 2 * 4 * -(-M // WEIGHT_SPLIT) * R * K + 4 * R * K, 2 * M * K * R)
    wide = 2 * M * N * K
    # Where the weight is written out dense, the narrow product is what the wide one begins with: y once more each way.
    forward = (dequantized, down, Pass(y + narrow + 2 * N * R, 2 * M * N * R), Pass(x + w + 2 * y, wide))
    backward = (
        dequantized,
        up_backward(N),
        Pass(x + narrow + 2 * R * K, 2 * M * K * R),
        Pass(y + w + 2 * x, wide),
        down_weight,
    )
    inside = (dequantized, down, Pass(x + w + y + narrow + 2 * N * R, wide + 2 * M * N * R))
    few = 2 * FEW * (K + N + R) + adapter
    straight = (
        Pass(2 * FEW * (K + R) + 2 * R * K, 2 * FEW * K * R),
        Pass(packed + few - 2 * R * K, 2 * FEW * N * (K + R)),
    )
    # Queries, keys and values of Llama-3-8B, with x @ a.T brought by the norm: each weight is multiplied, and written,
    # with its adapter behind it, forward and backward. Backward their gradients are put side by side first, and each
    # is read once more for that of its b.
    ranks, outputs = 3 * R, N + N // 4 + N // 4
    brought, tails, qkv = 2 * M * (K + ranks), 2 * R * outputs, 2 * M * outputs
    grouped = tuple(
        step
        for n in (N, N // 4, N // 4)
        for step in (
            Pass(PACKED * n * K + 2 * n * (K + ranks)),
            Pass(brought + 2 * n * (K + ranks) + 2 * M * n, 2 * M * n * (K + ranks)),
        )
    )
    grouped_back = (
        Pass(PACKED * outputs * K + 2 * outputs * (K + ranks)),
        *(Pass(2 * M * n + narrow + 4 * n * R, 2 * M * n * R) for n in (N, N // 4, N // 4)),
        Pass(2 * qkv),
        Pass(qkv + 2 * outputs * (K + ranks) + brought, 2 * M * outputs * (K + ranks)),
    )
    chunk = 2 * M * V
    loss = (Pass(x + 2 * V * K + chunk, 2 * M * V * K), Pass(3 * chunk), Pass(chunk + 2 * V * K + x, 2 * M * V * K))
    # Scores are written, scaled, made probabilities, rounded and read: 6.5 times their bytes; those that are masked are
    # few. Backward as much again, and their gradients 5 times.
    heads, (score, product) = 2 * M * 128 * (2 * 32 + 2 * 8), scores()
    attend, attend_back = Pass(heads + 6.5 * score, 2 * product), Pass(2 * heads + 11.5 * score, 5 * product)
    return (
        Operation("nf4_dequant", packed + w, (dequantized,)),
        Operation("lora_down", x + 2 * R * K + narrow, (down,)),
        Operation("lora_bwd_up", y + 2 * N * R + 2 * narrow + 4 * N * R, (up_backward(N),)),
        Operation("lora_linear, forward", packed + x + y + adapter, forward),
        Operation("lora_linear, backward", packed + y + 2 * x + 2 * adapter, backward),
        Operation("adapted_product", packed + x + y + adapter, inside),
        Operation("adapted_product_4bit, 16 rows", packed + 2 * FEW * (K + N) + adapter, straight),
        Operation("lora_group of q, k, v, forward", PACKED * outputs * K + brought + tails + qkv, grouped),
        Operation("lora_group of q, k, v, backward", PACKED * outputs * K + brought + 2 * tails + qkv, grouped_back),
        Operation("rms_norm_lora", 2 * x + 2 * R * K + narrow, (Pass(3 * x + 2 * R * K + narrow, 2 * M * K * R),)),
        Operation(
            "rms_norm_lora, backward",
            4 * x + 4 * R * K + 2 * narrow,
            (Pass(5 * x + 2 * R * K + 2 * narrow, 2 * M * K * R), Pass(x + narrow + 4 * R * K, 2 * M * K * R)),
        ),
        Operation("swiglu_lora", 3 * y + 2 * R * N + narrow, (Pass(3 * y + 2 * R * N + narrow, 2 * M * N * R),)),
        Operation(
            "swiglu_lora, backward",
            5 * y + 4 * R * N + narrow,
            (Pass(6 * y + 2 * R * N + narrow, 2 * M * N * R), Pass(y + narrow + 4 * R * N, 2 * M * N * R)),
        ),
        Operation("packed_attention", heads, (attend,)),
        Operation("packed_attention, backward", 2 * heads, (attend_back,)),
        Operation("rope", 2 * (x + x // 4), (Pass(2 * (x + x // 4)),)),
        Operation("linear_cross_entropy", 2 * x + 2 * V * K, loss),
    )


def table() -> list[str]:
    """Returns the lines of the table in kernels/README.md."""
    lines = ["| operation | MB moved | least | moved / least | " + " | ".join(card.name for card in CARDS) + " |"]
    lines.append("| --- | ---: | ---: | ---: |" + " ---: |" * len(CARDS))
    for one in operations():
        shares = " | ".join(f"{one.share(card):.0%}" for card in CARDS)
        megabytes = f"{one.moved / 1e6:.0f} | {one.least_moved / 1e6:.0f} | {one.moved / one.least_moved:.2f}"
        lines.append(f"| {one.name} | {megabytes} | {shares} |")
    return lines


def main() -> None:
    print("\n".join(table()))


if __name__ == "__main__":
    main()
