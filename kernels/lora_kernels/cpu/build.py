"""Compiles `loops.cpp` for the processor at hand, once; what comes out is kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("loops.cpp")
NUMBERS = {torch.bfloat16: "bfloat16", torch.float32: "float"}
"""What the source calls the dtypes that it takes."""
# NaN and infinity are what they are, and sums are in the order of the source: what these leave out nobody looks at.
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
LONGEST_S = 120


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """Returns the loops on numbers of a dtype, compiled where they are not yet, or why there are none."""
    if dtype not in NUMBERS:
        return f"they do not take {dtype}"
    if sys.platform != "linux":
        return f"they are compiled on Linux only, this is {sys.platform}"
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return "there is no C++ compiler: install g++ or set CXX"
    runtime = _openmp_of_torch()
    if runtime is None:
        return "torch has loaded no OpenMP of which they could share the threads"
    try:
        return ctypes.CDLL(str(_compiled(compiler, runtime, NUMBERS[dtype])))
    except subprocess.CalledProcessError as failed:
        return f"{compiler} failed: {failed.stderr.strip()[-300:]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def name(dtype: torch.dtype) -> str:
    """Returns what the last bits of sums in a dtype depend on: the name of the compiled file, or `torch`."""
    made = library(dtype)
    return "torch" if isinstance(made, str) else Path(made._name).stem


def _compiled(compiler: str, runtime: str, number: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"
    flags = [*FLAGS, f"-DNUMBER={number}"]
    if platform.machine() == "x86_64":
        # Left to itself, g++ uses half of a register of AVX-512.
        flags.append("-mprefer-vector-width=512")
    version = _output(compiler, "--version")
    made_of = [SOURCE.read_text(encoding="utf-8"), *flags, version, runtime, platform.machine(), _instructions()]
    path = folder / f"loops-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        unlinked, linked = Path(fresh) / "loops.o", Path(fresh) / "loops.so"
        _output(compiler, *flags, "-c", str(SOURCE), "-o", str(unlinked))
        # With -fopenmp here it would bring a runtime of its own, whose threads fight those of torch for the cores.
        _output(compiler, "-shared", str(unlinked), runtime, "-o", str(linked))
        linked.replace(path)
    return path


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_S).stdout


def _instructions() -> str:
    """Returns what the processor says that it can do: a cache may be shared by machines that differ."""
    found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[0] if found else ""


def _openmp_of_torch() -> str | None:
    """Returns the path of the OpenMP runtime in this process that has what g++ calls: torch's own before any other."""
    mapped = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    paths = dict.fromkeys(parts[5] for parts in mapped if len(parts) == 6)
    found = [path for path in paths if re.match(r"lib(gomp|iomp5)\b", Path(path).name)]
    return min(found, key=lambda path: Path(torch.__file__).parent not in Path(path).parents, default=None)
