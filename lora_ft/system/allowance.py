"""What the system lets this process have: processor cores, and bytes of memory.

torch counts the logical processors of the machine and psutil its memory, also in a container that may use a part.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")
# What says that threads were chosen by hand.
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Returns how many physical cores this process may use at the same time, at least 1.

    Two threads on one core share the units that multiply: matrix products are not faster with them.
    """
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    places = os.sched_getaffinity(0)
    twins = {_read(PROCESSORS / f"cpu{n}" / "topology" / "thread_siblings_list") or str(n) for n in places}
    return max(1, math.ceil(min(len(twins), _quota())))


def memory_bytes() -> int:
    """Returns how many bytes this process may yet take: of what is free, no more than its control groups leave."""
    return max(0, min([psutil.virtual_memory().available, *_left()]))


def threads(environ: Mapping[str, str] = os.environ) -> tuple[int | None, str]:
    """Returns how many threads torch should compute with on a processor and why; None where it was chosen by hand."""
    launched = "TORCHELASTIC_RUN_ID" in environ or "LOCAL_WORLD_SIZE" in environ
    chosen = {name: environ[name] for name in CHOSEN if environ.get(name)}
    # torchrun gives each process a single thread where nothing is chosen.
    if chosen and not (launched and chosen == {"OMP_NUM_THREADS": "1"}):
        return None, ", ".join(f"{name}={value}" for name, value in chosen.items())
    allowed, beside = cores(), int(environ.get("LOCAL_WORLD_SIZE", "1"))
    share = f" for {beside} processes" if beside > 1 else ""
    return max(1, allowed // beside), f"{allowed} physical cores{share}"


def allot(count: Callable[[], int], choose: Callable[[int], None]) -> None:
    """Makes torch compute with as many threads as `threads` says; `count` and `choose` are its own functions."""
    wanted, why = threads()
    if wanted is not None and wanted != count():
        log.info("computing with %d threads instead of %d: %s", wanted, count(), why)
        choose(wanted)


def _quota() -> float:
    """Returns the processors that the control groups allow, infinite where they do not say."""
    return min((_of_time(group) for group in _groups("cpu")), default=math.inf)


def _of_time(group: Path) -> float:
    told = _read(group / "cpu.max").split()
    if not told:
        told = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
    numbers = [float(word) for word in told if word.isdigit()]
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] else math.inf


def _left() -> Iterator[int]:
    """Yields the bytes that each control group with a limit leaves."""
    for group in _groups("memory"):
        names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        for limit, used in ((_read(group / a), _read(group / b)) for a, b in names):
            if limit.isdigit() and used.isdigit():
                # What was read from files counts as used and is given up when it is needed.
                cached = dict(line.split() for line in _read(group / "memory.stat").splitlines()).get("inactive_file")
                yield int(limit) - int(used) + int(cached or 0)


def _groups(controller: str) -> Iterator[Path]:
    """Yields the folders of this process's control groups that a controller may have a word in, from the inside out."""
    for line in _read(OWN_GROUPS).splitlines():
        _, names, place = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        root = CGROUPS / names if names else CGROUPS
        group = root / place.lstrip("/")
        # In a container the path may be the host's, of which only the root is there.
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root) and folder.is_dir())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
