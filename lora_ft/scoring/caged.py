"""The program that runs a reply beside its tests: first it gives up all that it may do, then it runs them.

`sandbox` starts it by its path, in a folder of its own; it imports the standard library alone. On standard input comes
a JSON object with `code`, `tests` and the limits; the two descriptors named on the command line are a token to read
once all tests have passed, and the place to write it to.

What the kernel forbids here it forbids for good: a filter of system calls (seccomp) leaves threads, but no processes,
signals, sockets or other users' permissions; Landlock leaves the folder to write in, and to read beside it only what
Python itself is made of, so neither other programs' environments nor the user's files.
"""

import ctypes
import json
import os
import platform
import struct
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

# Numbers of Linux (asm/unistd.h) by machine: those of `clone` and `prlimit64` first, then all that is refused: other
# programs, sockets, signals and memory of other processes; their priority, processors and scheduling (from the line of
# 141 and of 140 on); what System V and POSIX share between processes and keep after them; clocks, and the machine.
CALLS = {
    "x86_64": (
        0xC000003E, 56, 302,
        (57, 58, 59, 322, 41, 53, 101, 62, 200, 234, 129, 297, 424, 434, 438, 310, 311, 425, 165, 166, 272, 308, 321,
         250, 248, 249, 90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199,
         141, 142, 144, 203, 251, 314, 256, 279, 298, 440, 448,
         29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71, 220, 240, 241, 242, 243, 244, 245,
         159, 164, 169, 227, 304, 305),
    ),
    "aarch64": (
        0xC00000B7, 220, 261,
        (221, 281, 198, 199, 117, 129, 130, 131, 138, 240, 424, 434, 438, 270, 271, 425, 40, 39, 97, 268, 280, 219, 217,
         218, 52, 53, 452, 54, 55, 88, 5, 6, 7, 14, 15, 16,
         140, 118, 119, 122, 30, 274, 238, 239, 241, 440, 448,
         180, 181, 182, 183, 184, 185, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196, 197,
         112, 142, 170, 171, 265, 266),
    ),
}  # fmt: skip
CLONE3 = 435
CLONE_THREAD = 0x10000
REFUSED, ABSENT, ALLOWED = 0x00050000 | 1, 0x00050000 | 38, 0x7FFF0000
LOAD, EQUAL, AT_LEAST, HAS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
# linux/landlock.h: what may be done with a file or folder, by the version of the interface that knows it.
READ, READ_FILE, EXECUTE = 0b1100, 0b100, 0b1
ACCESS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
SYSTEM = ("/usr", "/lib", "/lib64", "/dev/null", "/dev/zero", "/dev/urandom")


def limited(seconds: int, memory_bytes: int, file_bytes: int) -> None:
    """Bounds processor time, memory above what Python has, the size of a file, and dumps of memory."""
    import resource

    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0] if sys.platform == "linux" else 0
    held = int(pages) * os.sysconf("SC_PAGE_SIZE")
    for which, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, held + memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # macOS knows no limit of the address space.
        if sys.platform == "linux" or which != resource.RLIMIT_AS:
            resource.setrlimit(which, (value, value))


def without_calls(libc: ctypes.CDLL) -> bool:
    """Returns whether the kernel refuses from here on what `CALLS` names."""
    known = CALLS.get(platform.machine())
    if known is None:
        return False
    machine, clone, limits, refused = known
    program = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, machine),
        (RETURN, 0, 0, REFUSED),
        (LOAD, 0, 0, 0),
        # Another numbering of the same calls (x32).
        (AT_LEAST, 0, 1, 0x40000000),
        (RETURN, 0, 0, REFUSED),
        (EQUAL, 0, 4, clone),
        (LOAD, 0, 0, 16),
        (HAS, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, REFUSED),
        (RETURN, 0, 0, ALLOWED),
        # Its arguments lie in memory; told that there is none, the C library takes `clone`.
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ABSENT),
        # The C library looks up the limits of the process that it is in, as process 0.
        (EQUAL, 0, 4, limits),
        (LOAD, 0, 0, 16),
        (EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOWED),
        (RETURN, 0, 0, REFUSED),
    ]
    for number in refused:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSED)]
    program.append((RETURN, 0, 0, ALLOWED))
    words = b"".join(struct.pack("HBBI", *step) for step in program)
    held = ctypes.create_string_buffer(words, len(words))
    filter_ = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(held)))
    return libc.prctl(SECCOMP, FILTER, filter_, 0, 0) == 0


def without_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Returns whether from here on only `folder` can be written in, and little else be read."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    access = ACCESS[max(known for known in ACCESS if known <= version)]
    rules = libc.syscall(CREATE_RULESET, struct.pack("Q", access), 8, 0)
    if rules < 0:
        return False
    readable = {sys.prefix, sys.base_prefix, *SYSTEM, *filter(None, sys.path)}
    for path, allowed in [(folder, access & ~EXECUTE), *((path, READ) for path in sorted(readable))]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not Path(path).is_dir():
            allowed &= READ_FILE
        done = libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
        if done != 0:
            return False
    done = libc.syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)
    return done == 0


def fenced(folder: str) -> list[str]:
    """Returns what the system cannot keep this process from."""
    if sys.platform != "linux":
        return ["files", "network", "processes"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    files = without_files(libc, folder)
    return [*([] if files else ["files"]), *([] if without_calls(libc) else ["network", "processes"])]


def ran(code: str, name: str, module: ModuleType) -> None:
    """Runs a program with the names of a module, which has its own afterwards too."""
    Path(name).write_text(code, encoding="utf-8", errors="surrogatepass")
    SourceFileLoader(module.__name__, name).exec_module(module)


def main() -> None:
    """Writes what it cannot be kept from as a line of JSON, and the token after it where all tests passed."""
    asked = json.load(sys.stdin)
    token, told = map(int, sys.argv[1:])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    limited(asked["seconds"], asked["memory_bytes"], asked["file_bytes"])
    os.write(told, json.dumps(fenced(str(Path.cwd()))).encode() + b"\n")
    sys.argv = ["reply.py"]
    sys.path.insert(0, str(Path.cwd()))
    sys.dont_write_bytecode = True
    reply = ModuleType("reply")
    ran(asked["code"], "reply.py", reply)
    before = dict(vars(reply))
    ran(asked["tests"], "tests.py", reply)
    for name, value in list(vars(reply).items()):
        if name.startswith("test_") and callable(value) and before.get(name) is not value:
            value()
    os.write(told, os.read(token, 64))
    os._exit(0)


if __name__ == "__main__":
    main()
