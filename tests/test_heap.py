"""What glibc holds of freed memory: given back on demand."""

import subprocess
import sys

import pytest

KEPT = """
import ctypes, psutil
from lora_ft.system import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def held_after_a_step() -> int:
    before = psutil.Process().memory_info().rss
    # 160 MB in blocks that are no mappings of their own.
    blocks = [libc.malloc(16 << 20) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, 16 << 20)
    for block in blocks:
        libc.free(block)
    return (psutil.Process().memory_info().rss - before) >> 20

with heap.free_memory_kept():
    inside = held_after_a_step()
heap.give_back()
print(inside, held_after_a_step())
"""


FREED = """
import psutil
from lora_ft.system import heap

def anonymous() -> int:
    return psutil.Process().memory_info().rss

kept = [bytes(20_000) + b"x" for _ in range(8_000)]  # 160 MB in blocks too small for a mapping of their own
last = bytes(20_000)  # above all of them, so that nothing is given back from the top
kept = [block for i, block in enumerate(kept) if i % 100 == 0]
held = anonymous()
heap.give_back()
print((held - anonymous()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_pages_between_what_is_still_held_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert int(done.stdout) > 100, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_what_one_step_frees_the_next_finds() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inside, after = map(int, done.stdout.split())
    assert after <= 65 < 150 < inside
