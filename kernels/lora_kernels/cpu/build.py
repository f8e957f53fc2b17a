"""Compiles `loops.cpp` for the processor at hand, once; what comes out is kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("loops.cpp")
NUMBERS = {torch.bfloat16: "bfloat16", torch.float32: "float"}
"""What the source calls the dtypes that it takes."""
# NaN and infinity stay what they are, and sums are in the order of the source: what these leave out nobody looks at.
FLAGS = (
    *("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"),
)
LONGEST_S = 120
"""What a compiler may take: about a second is usual, and a machine may be slow or busy."""


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """Returns the loops on numbers of a dtype, compiled where they are not yet, or why there are none."""
    if dtype not in NUMBERS:
        return f"there are none for {str(dtype).removeprefix('torch.')}"
    if sys.platform != "linux":
        return f"they are compiled on Linux only, this is {sys.platform}"
    asked = os.environ.get("CXX")
    compiler = shlex.split(asked or "g++")
    if not compiler or shutil.which(compiler[0]) is None:
        missing = f"$CXX is {asked!r}, which is no command" if asked else "there is no C++ compiler"
        return f"{missing}: install g++, or set CXX to a compiler like it"
    try:
        return _loaded(compiler, NUMBERS[dtype])
    except subprocess.CalledProcessError as failed:
        return f"{compiler[0]} failed: {failed.stderr.strip()[-300:]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


@functools.cache
def digest(dtype: torch.dtype) -> str:
    """Returns what the last bits of sums in a dtype depend on: a sha256 of the compiled loops, or `torch`."""
    made = library(dtype)
    return "torch" if isinstance(made, str) else hashlib.sha256(Path(made._name).read_bytes()).hexdigest()


def _loaded(compiler: list[str], number: str) -> ctypes.CDLL:
    """Returns the loops, from the cache if they are there and whole. Raises OSError, and what `_output` does."""
    runtime, flags = _openmp_of_torch(), [*FLAGS, f"-DNUMBER={number}"]
    if platform.machine() == "x86_64":
        # Left to itself, g++ uses half of a register of AVX-512.
        flags.append("-mprefer-vector-width=512")
    version = _output(*compiler, "--version")
    made_of = [SOURCE.read_text(encoding="utf-8"), flags, version, Path(runtime).name, platform.machine()]
    key = hashlib.sha256(repr([*made_of, _instructions()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise PermissionError(f"{folder} must be yours, and nobody else may write there: what it holds is run")
    path = folder / f"loops-{key}.so"
    if path.is_file():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        unlinked, linked = Path(fresh) / "loops.o", Path(fresh) / "loops.so"
        _output(*compiler, *flags, "-c", str(SOURCE), "-o", str(unlinked))
        # With -fopenmp here it would bring a runtime of its own, whose threads fight those of torch for the cores.
        _output(*compiler, "-shared", str(unlinked), runtime, "-o", str(linked))
        ctypes.CDLL(str(linked))
        linked.replace(path)
    return ctypes.CDLL(str(path))


def _output(*command: str) -> str:
    """Returns what a command prints. Raises OSError, CalledProcessError and TimeoutExpired."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_S).stdout


def _instructions() -> str:
    """Returns what the processor says that it can do: a cache may be shared by machines that differ."""
    found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[0] if found else ""


def _openmp_of_torch() -> str:
    """Returns the path of the OpenMP runtime in this process that has what g++ calls: torch's own before any other.

    Raises OSError where there is none.
    """
    mapped = (line.split(maxsplit=5) for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines())
    paths = dict.fromkeys(parts[5] for parts in mapped if len(parts) == 6)
    found = [path for path in paths if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name)]
    if not found:
        raise OSError("torch has loaded no OpenMP of which the loops could share the threads")
    home = Path(torch.__file__).resolve().parent
    return min(found, key=lambda path: home not in Path(path).parents)
