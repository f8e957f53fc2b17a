"""What glibc holds of freed memory: given back on demand."""

import subprocess
import sys

import pytest

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
