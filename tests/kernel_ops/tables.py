"""The tables of kernels/README.md: what the compiler made, the modelled roofline, and the errors seen.

`python -m tests.kernel_ops.tables` writes them anew, the first from kernels/resources.csv.
"""

import runpy
from collections.abc import Iterable

import torch

from lora_ft.speed import bench, twins
from tests.kernel_ops import compiled

README = compiled.REPOSITORY / "kernels" / "README.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resources() -> list[str]:
    """Returns the worst of each kernel's launches: registers, KiB of shared memory, warps; and bytes over the least."""
    with compiled.TABLE.open(newline="") as file:
        rows = compiled.read(file)
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in compiled.ARCHITECTURES) + " | moved / least |"]
    lines.append("| --- |" + " --- |" * len(compiled.ARCHITECTURES) + " ---: |")
    for kernel in dict.fromkeys(row.kernel for row in rows):
        of_kernel = [row for row in rows if row.kernel == kernel]
        cells = []
        for arch in compiled.ARCHITECTURES:
            here = [row for row in of_kernel if row.arch == arch]
            shared = max(row.shared_bytes for row in here) // 1024
            cells.append(f"{max(row.registers for row in here)} · {shared} · {min(row.warps for row in here)}")
        most = max(row.times_minimum for row in of_kernel)
        lines.append(f"| `{kernel.removesuffix('_kernel')}` | {' | '.join(cells)} | {most:.2f} |")
    return lines


def roofline() -> list[str]:
    return runpy.run_path(str(compiled.REPOSITORY / "benchmarks" / "model_roofline.py"))["table"]()


def errors() -> list[str]:
    """Returns the error of each operation and of its gradients here, and in brackets that of its twin."""
    found: dict[str, list[str]] = {}
    for dtype in DTYPES:
        for one in twins.check(bench.device(), dtype):
            found.setdefault(one.op, []).append(f"{one.error:.1e} ({one.plain:.1e})")
    names = " | ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    head = [f"| operation | {names} |", "| --- |" + " ---: |" * len(DTYPES)]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in found.items()]


def put(text: str, table: Iterable[str]) -> str:
    """Returns the text with the table in place of the one that has the same first columns."""
    new, lines = list(table), text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split(" | ")[:2] == new[0].split(" | ")[:2])
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    return "\n".join([*lines[:first], *new, *lines[last:]]) + "\n"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for table in (resources(), roofline(), errors()):
        text = put(text, table)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
