"""Every kernel, compiled for every architecture, keeps to what the hardware has, and is no worse than it was."""

import dataclasses
import io
import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from tests.kernel_ops import compiled, launches
from tests.kernel_ops.compiled import ARCHITECTURES, REPOSITORY, TABLE
from tests.kernel_ops.launches import Launch

# --- Kernels with a fault each, and one without.


@triton.jit
def sound_kernel(p_x, p_y, n, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n) * 2, mask=o < n)


@triton.jit
def narrow_kernel(p_x, p_y, n, SIZE: tl.constexpr):
    """The mask changes from one number to the next, so that each is loaded and stored alone."""
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(p_y + o, tl.load(p_x + o, mask=2 * o < n) * 2, mask=2 * o < n)


@triton.jit
def spilling_kernel(p_x, p_y, SIZE: tl.constexpr):
    """One warp holds 16384 numbers, 512 a thread, until their sum is known."""
    o = tl.arange(0, SIZE)
    b_x = tl.load(p_x + o)
    tl.store(p_y + o, b_x - tl.sum(b_x))


@triton.jit
def product_kernel(p_x, p_y, p_out, k, BM: tl.constexpr, BK: tl.constexpr):
    o_row, o_k = tl.arange(0, BM), tl.arange(0, BK)
    b_sum = tl.zeros((BM, BM), tl.float32)
    for first in range(0, k, BK):
        b_x = tl.load(p_x + o_row[:, None] * k + (first + o_k)[None, :])
        b_y = tl.load(p_y + o_row[:, None] * k + (first + o_k)[None, :])
        b_sum = tl.dot(b_x, tl.trans(b_y), b_sum, input_precision="ieee")
    tl.store(p_out + o_row[:, None] * BM + o_row[None, :], b_sum)


def float32(*shape):
    return torch.empty(shape, dtype=torch.float32)


def bfloat16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def sound():
    sound_kernel[(64,)](float32(64 * 1024), float32(64 * 1024), 64 * 1024, SIZE=1024)


def narrow():
    narrow_kernel[(64,)](float32(64 * 1024), float32(64 * 1024), 2 * 64 * 1024, SIZE=1024)


def spilling():
    spilling_kernel[(1,)](float32(1 << 14), float32(1 << 14), SIZE=1 << 14, num_warps=1)


def multiplying(make, size, **options):
    product_kernel[(1,)](make(size, 4096), make(size, 4096), float32(size, size), 4096, BM=size, BK=64, **options)


def summed_afterwards():
    x, y = float32(8, 1024), float32(8, 1024)
    sound_kernel[(8,)](x, y, 8 * 1024, SIZE=1024)
    return y.sum(0)


LAUNCHES = {
    "sound": Launch(sound, 2 * 4 * 64 * 1024),
    "multiplies": Launch(lambda: multiplying(bfloat16, 64), 2 * 2 * 64 * 4096 + 4 * 64 * 64, matrix_rows=64),
    "narrow": Launch(narrow, 2 * 4 * 64 * 1024),
    "spills": Launch(spilling, 2 * 4 << 14),
    "too wide": Launch(lambda: multiplying(bfloat16, 128, num_stages=5, num_warps=8), 1, matrix_rows=64),
    "no tensor cores": Launch(lambda: multiplying(float32, 64, num_stages=2), 1, matrix_rows=64),
    "summed afterwards": Launch(summed_afterwards, 4 * (8 + 1) * 1024),
}
"""Measured by `compiled` from here, in a process that does not interpret."""


def measured(config, *options):
    """Returns the rows that `python -m tests.kernel_ops.compiled` writes."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(config.cache.mkdir("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernel_ops.compiled", *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return compiled.read(io.StringIO(done.stdout))


@pytest.fixture(scope="module")
def table(pytestconfig):
    return measured(pytestconfig)


@pytest.fixture(scope="module")
def planted(pytestconfig):
    """The kernels of this file, by launch and architecture."""
    rows = measured(pytestconfig, "--launches", __name__, "--arch", "86", "90")
    return {(row.launch, row.arch): row for row in rows}


@pytest.mark.parametrize("name", launches.LAUNCHES)
def test_a_kernel_keeps_within_the_limits(name, table):
    rows = [row for row in table if row.launch == name]
    assert {row.arch for row in rows} == set(ARCHITECTURES)
    assert {row.arch: found for row in rows if (found := compiled.faults(row, launches.LAUNCHES[name]))} == {}


def test_no_kernel_is_worse_than_it_was(table):
    with TABLE.open(newline="") as file:
        before = {(row.launch, row.kernel, row.arch): row for row in compiled.read(file)}
    after = {(row.launch, row.kernel, row.arch): row for row in table}
    remedy = "If that is meant, run `python -m tests.kernel_ops.compiled --write`."
    assert before.keys() == after.keys(), remedy
    worse = {key: found for key, row in after.items() if (found := compiled.regressions(row, before[key]))}
    assert worse == {}, remedy


def test_every_kernel_is_in_the_table(table):
    sources = (REPOSITORY / "kernels/lora_kernels/gpu").glob("*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert kernels == {row.kernel for row in table}


FAULTS = [
    ("sound", 86, []),
    ("sound", 90, []),
    ("multiplies", 86, []),
    ("multiplies", 90, []),
    ("narrow", 86, ["0% loaded by 128 bits", "0% stored by 128 bits"]),
    ("spills", 86, [r"\d+ bytes a thread are spilled"]),
    ("too wide", 86, [r"\d+ bytes of shared memory are more than a block may have", "0 warps fit"]),
    ("no tensor cores", 90, [r"multiplied by \[\], not HGMMA"]),
]


@pytest.mark.parametrize(("launch", "arch", "wanted"), FAULTS)
def test_a_fault_is_found(launch, arch, wanted, planted):
    found = compiled.faults(planted[launch, arch], LAUNCHES[launch])
    assert len(found) == len(wanted), found
    for fault, pattern in zip(found, wanted, strict=True):
        assert re.match(pattern, fault)


def test_the_matrix_instructions_are_those_of_the_architecture(planted):
    assert re.fullmatch(r"HMMA:\d+", planted["multiplies", 86].matrix)
    assert re.fullmatch(r"HGMMA:\d+", planted["multiplies", 90].matrix)


def test_bytes_are_counted(planted):
    assert planted["sound", 86].times_minimum == 1.0
    # 16 KiB of x, as many of y three times: written, read by the sum; 4 KiB of the sum.
    assert planted["summed afterwards", 86].megabytes == pytest.approx(4 * 1024 * (3 * 8 + 1) / 1e6, abs=0.01)


def test_a_regression_is_found(planted):
    row = planted["multiplies", 86]
    better = dataclasses.replace(row, registers=int(row.registers / 1.1), warps=int(row.warps * 1.1) + 1)
    assert [found.split()[0] for found in compiled.regressions(row, better)] == ["registers", "warps"]
    assert compiled.regressions(better, row) == compiled.regressions(row, row) == []


OCCUPANCY = [
    (86, 32, 0, 12),  # 1536 threads
    (86, 255, 0, 2),  # 2 warps of 8192 registers on each of 4 partitions
    (90, 128, 0, 4),
    (86, 32, 99 * 1024, 1),
    (86, 32, 100 * 1024, 0),
    (90, 32, 75776, 3),  # of 1 KiB more each, in 228 KiB
]


@pytest.mark.parametrize(("arch", "registers", "shared_bytes", "blocks"), OCCUPANCY)
def test_occupancy(arch, registers, shared_bytes, blocks):
    assert compiled.occupancy(arch, 128, registers, shared_bytes) == blocks


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "TOOLS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nvdisasm is missing.*reinstall triton"):
        compiled.tool("nvdisasm")
