"""What the compiler makes of every kernel, on each architecture, on a machine with no GPU.

Triton's own just-in-time path runs, with a driver that names an architecture and launches nothing: the functions that
launch kernels are called as on a GPU, with tensors that have no memory. What comes out is disassembled, and counted.
How many bytes a kernel asks for is counted in the interpreter, in the last program of its grid.

`python -m tests.kernel_ops.compiled --write` writes kernels/resources.csv, without `--write` prints it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lora_kernels import backend
from tests.kernel_ops import interpreter
from tests.kernel_ops.launches import Launch

REPOSITORY = Path(__file__).parents[2]
TABLE = REPOSITORY / "kernels" / "resources.csv"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has: CUDA C++ Programming Guide 13, Technical Specifications per Compute Capability."""

    shared_bytes: int
    block_shared_bytes: int
    threads: int
    blocks: int
    matrix: str
    """What multiplies tiles of 64 rows and more; for smaller ones it is HMMA everywhere."""

    registers = 65536
    partitions = 4


KIB = 1024
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
ARCHITECTURES = {
    80: Architecture(164 * KIB, 163 * KIB, 2048, 32, "HMMA"),
    86: Architecture(100 * KIB, 99 * KIB, 1536, 16, "HMMA"),
    89: Architecture(100 * KIB, 99 * KIB, 1536, 24, "HMMA"),
    90: Architecture(228 * KIB, 227 * KIB, 2048, 32, "HGMMA"),
    100: Architecture(228 * KIB, 227 * KIB, 2048, 32, "UTCHMMA"),
    120: Architecture(100 * KIB, 99 * KIB, 1536, 24, "HMMA"),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: one kernel of one launch on one architecture."""

    launch: str
    kernel: str
    arch: int
    threads: int
    registers: int
    """A thread."""
    spill_bytes: int
    """Of stack and local memory, a thread."""
    shared_bytes: int
    """A block."""
    blocks: int
    """At once on a multiprocessor."""
    warps: int
    """At once on a multiprocessor."""
    matrix: str
    """Kinds of matrix instructions, and how many of each there are in the code."""
    loads_128: float
    """Share of the bytes that the code loads from global memory by 128 bits at a time."""
    stores_128: float
    instructions_per_element: float
    """Instructions of a thread in its innermost loops over the elements of 2 bytes it loads and stores there."""
    megabytes: float = math.nan
    """Asked of memory by the launch and what torch does for it, whatever the caches make of it."""
    times_minimum: float = math.nan
    """The same over the bytes of what the operation reads and writes."""


class _NoDriver(DriverBase):
    """Says which architecture to compile for, and is asked for nothing else."""

    def __init__(self, arch: int):
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs, so that nothing can be timed")


def compiled(launch: Callable[[], object], arch: int) -> dict[str, Any]:
    """Returns the kernels that `launch` would have launched, compiled for `arch`, by name."""
    kernels = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)
        return kernels[self.__name__]

    driver.set_active(_NoDriver(arch))
    with mock.patch.object(JITFunction, "run", compile_only), torch.device("meta"), backend.triton_anywhere():
        launch()
    return kernels


def tool(name: str, *args: str) -> str:
    """Returns what a program of the CUDA toolkit prints. Raises FileNotFoundError where triton came without it."""
    if not (TOOLS / name).exists():
        raise FileNotFoundError(f"{TOOLS / name} is missing: Triton's wheel for Linux has it; reinstall triton.")
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Returns the resources of a binary as cuobjdump puts them, and its instructions; kept in Triton's cache."""
    kept = Path(triton.knobs.cache.dir) / f"{hashlib.sha256(cubin).hexdigest()}.sass.json"
    if not kept.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            texts = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", "-c", "-ndf", file.name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(texts))
        part.replace(kept)
    resources, code = json.loads(kept.read_text())
    return resources, code


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel, without predicates and operands, such as `LDG.E.128`."""

    instructions: list[str]
    loops: list[range]
    """From each label that is jumped back to, to the jump."""

    @classmethod
    def of(cls, text: str) -> Code:
        labels: dict[str, int] = {}
        instructions, loops = [], []
        for line in text.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                labels[label[1]] = len(instructions)
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
                target = re.search(r"`\((\.L_\w+)\)", found[2])
                if found[1].startswith("BRA") and target and target[1] in labels:
                    loops.append(range(labels[target[1]], len(instructions) + 1))
                instructions.append(found[1])
        return cls(instructions, loops)

    def count(self, *opcodes: str) -> int:
        return sum(instruction.split(".")[0] in opcodes for instruction in self.instructions)

    def innermost(self) -> list[list[str]]:
        """Returns the loops that touch global memory and hold no other such loop; the whole code if there is none."""
        touching = [loop for loop in self.loops if global_bytes(self.instructions[loop.start : loop.stop])]
        inner = [
            loop
            for loop in touching
            if not any(other != loop and other.start >= loop.start and other.stop <= loop.stop for other in touching)
        ]
        return [self.instructions[loop.start : loop.stop] for loop in inner] or [self.instructions]


LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def global_bytes(instructions: Iterable[str], opcodes: tuple[str, ...] = LOADS + STORES, least: int = 1) -> int:
    """Returns the bytes that these move to or from global memory for a thread, in steps of `least` bytes or more."""
    moved = 0
    for instruction in instructions:
        opcode, *parts = instruction.split(".")
        if opcode in opcodes:
            step = next((WIDTHS[part] for part in parts if part in WIDTHS), 4)
            moved += step if step >= least else 0
    return moved


def occupancy(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Returns how many blocks a multiprocessor holds at once; 0 where one is too much for it."""
    limits, warps = ARCHITECTURES[arch], threads // 32
    if shared_bytes > limits.block_shared_bytes:
        return 0
    # Registers are given to a warp 256 at a time, from the partition that the warp runs on; 1 KiB of shared memory of
    # each block is the system's.
    by_registers = limits.partitions * (limits.registers // limits.partitions // (-(-registers * 32 // 256) * 256))
    by_shared = limits.shared_bytes // (-(-(shared_bytes + KIB) // 128) * 128)
    return min(by_registers // warps, by_shared, limits.threads // threads, limits.blocks)


def measured(launch: str, name: str, kernel: Any, arch: int) -> Row:
    """Returns the line of one compiled kernel, its traffic not yet known."""
    resources, text = disassembled(kernel.asm["cubin"])
    code = Code.of(text)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    threads, shared_bytes = 32 * kernel.metadata.num_warps, kernel.metadata.shared
    blocks = occupancy(arch, threads, used["REG"], shared_bytes)
    inner = code.innermost()

    def share(opcodes: tuple[str, ...]) -> float:
        total = global_bytes(code.instructions, opcodes)
        return round(global_bytes(code.instructions, opcodes, least=16) / total, 2) if total else 1.0

    return Row(
        launch=launch,
        kernel=name,
        arch=arch,
        threads=threads,
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared_bytes,
        blocks=blocks,
        warps=blocks * threads // 32,
        matrix=" ".join(f"{kind}:{code.count(kind)}" for kind in MATRIX if code.count(kind)),
        loads_128=share(LOADS),
        stores_128=share(STORES),
        instructions_per_element=round(sum(map(len, inner)) * ELEMENT_BYTES / max(sum(map(global_bytes, inner)), 1), 2),
    )


class _HostTraffic(TorchDispatchMode):
    """Adds up what torch's own operations between launches read and write, such as the sum of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [value for value in tree_leaves((args, kwargs, found)) if isinstance(value, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found


def traffic(launch: Callable[[], object]) -> int:
    """Returns the bytes that `launch` asks of memory, whatever the caches make of it.

    Runs in the interpreter, the last program of each grid alone: the others ask for as much.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    from tests.kernel_ops import guard

    asked = 0
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(pointers: Any, mask: Any) -> None:
        nonlocal asked
        lanes = int(np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape)))
        asked += programs * lanes * pointers.get_element_ty().primitive_bitwidth // 8

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        nonlocal programs
        programs = math.prod(executor.grid)
        with _disable_current_modes():
            run(executor, *args, **kwargs)

    programs = 0
    with (
        guard.last_program_only(),
        mock.patch.object(InterpreterBuilder, "create_masked_load", noted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", noted_store),
        backend.triton_anywhere(),
    ):
        run = GridExecutor.__call__
        with mock.patch.object(GridExecutor, "__call__", counted), _HostTraffic() as host:
            launch()
    return asked + host.bytes


FEWEST_WARPS = 8
"""On a multiprocessor: two for each of its four schedulers, so that one has work while the other waits."""
REGRESSION = 1.05
FEWER_IS_BETTER = ("registers", "shared_bytes", "instructions_per_element", "megabytes")
MORE_IS_BETTER = ("warps", "loads_128", "stores_128")


def faults(row: Row, launch: Launch) -> list[str]:
    """Returns what is wrong with a kernel, whatever it was before."""
    kinds = re.findall(r"[A-Z]+", row.matrix)
    wanted = ARCHITECTURES[row.arch].matrix if launch.matrix_rows >= 64 else "HMMA"
    found = {
        f"{row.spill_bytes} bytes a thread are spilled": row.spill_bytes > 0,
        f"{row.shared_bytes} bytes of shared memory are more than a block may have": row.blocks == 0,
        f"{row.warps} warps fit a multiprocessor, not {FEWEST_WARPS}": row.warps < FEWEST_WARPS,
        f"multiplied by {kinds}, not {wanted}": launch.matrix_rows > 0 and wanted not in kinds,
        f"multiplied by {kinds}, which round": launch.matrix_rows == 0 and len(kinds) > 0,
        f"{row.loads_128:.0%} loaded by 128 bits": row.loads_128 < launch.loads_128,
        f"{row.stores_128:.0%} stored by 128 bits": row.stores_128 < launch.stores_128,
    }
    return [fault for fault, there in found.items() if there]


def regressions(row: Row, before: Row) -> list[str]:
    """Returns in what a kernel is more than 5% worse than it was."""
    found = {name: (getattr(before, name), getattr(row, name)) for name in FEWER_IS_BETTER + MORE_IS_BETTER}
    return [
        f"{name} was {was}, is {now}"
        for name, (was, now) in found.items()
        if (now > REGRESSION * was if name in FEWER_IS_BETTER else was > REGRESSION * now)
    ]


def launches_of(module: str) -> dict[str, Launch]:
    return importlib.import_module(module).LAUNCHES


def compiled_rows(module: str, name: str, arch: int) -> list[Row]:
    kernels = compiled(launches_of(module)[name].run, arch)
    return [measured(name, kernel, made, arch) for kernel, made in kernels.items()]


def measure(module: str, architectures: Iterable[int]) -> list[Row]:
    """Returns the table of the launches in `module`. Compiles in two processes, and counts traffic in a third."""
    launches = launches_of(module)
    jobs = [(module, launch, arch) for launch in launches for arch in architectures]
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_ops.compiled", "--launches", module, "--traffic"]
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    with (
        subprocess.Popen(command, env=interpreted, stdout=subprocess.PIPE, text=True) as counting,
        multiprocessing.get_context("fork").Pool(2) as pool,
    ):
        rows = [row for found in pool.starmap(compiled_rows, jobs, chunksize=1) for row in found]
        answer = counting.communicate()[0]
    if counting.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {counting.returncode}")
    asked = json.loads(answer)
    return [
        dataclasses.replace(
            row,
            megabytes=round(asked[row.launch] / 1e6, 2),
            times_minimum=round(asked[row.launch] / launches[row.launch].minimum_bytes, 2),
        )
        for row in rows
    ]


def write(rows: Iterable[Row], file: TextIO) -> None:
    table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    table.writeheader()
    table.writerows(map(dataclasses.asdict, rows))


def read(file: TextIO) -> list[Row]:
    types = typing.get_type_hints(Row)
    return [Row(**{name: types[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(REPOSITORY)}")
    parser.add_argument("--launches", default="tests.kernel_ops.launches", help="module with the launches")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), help="such as 86 for sm_86")
    parser.add_argument("--traffic", action="store_true", help="count in the interpreter what is asked of memory")
    options = parser.parse_args()
    if options.traffic:
        interpreter.make_bfloat16_exact()
        print(json.dumps({name: traffic(launch.run) for name, launch in launches_of(options.launches).items()}))
        return
    rows = measure(options.launches, options.arch)
    write(rows, sys.stdout)
    if options.write:
        with TABLE.open("w", newline="") as file:
            write(rows, file)


if __name__ == "__main__":
    main()
