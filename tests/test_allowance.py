"""What the system allows a process: cores by their threads and quotas, memory by its groups."""

import psutil
import pytest

from lora_ft.system import allowance

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns what makes files of a machine: 8 logical processors, two to a core, all of them allowed."""
    monkeypatch.setattr(allowance, "PROCESSORS", tmp_path / "cpu")
    monkeypatch.setattr(allowance, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(allowance, "OWN_GROUPS", tmp_path / "self")
    monkeypatch.setattr(allowance.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GIB}))
    for n in range(8):
        write(tmp_path / f"cpu/cpu{n}/topology/thread_siblings_list", f"{n % 4},{n % 4 + 4}\n")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_two_threads_of_a_core_count_once(machine, monkeypatch):
    assert allowance.cores() == 4
    monkeypatch.setattr(allowance.os, "sched_getaffinity", lambda pid: {0, 4, 1})
    assert allowance.cores() == 2


def test_without_limits_all_free_memory_is_allowed(machine):
    assert allowance.memory_bytes() == 100 * GIB


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cgroup/a/b/cpu.max": "150000 100000"}, 2),
        ({"cgroup/a/cpu.max": "50000 100000", "cgroup/a/b/cpu.max": "max 100000"}, 1),
        ({"cgroup/a/b/cpu.max": "max 100000"}, 4),
        ({"cgroup/cpu.max": "900000 100000"}, 4),
    ],
)
def test_a_quota_bounds_the_cores(machine, files, cores):
    write(machine / "self", "0::/a/b\n")
    for name, text in files.items():
        write(machine / name, text)
    assert allowance.cores() == cores


def test_quotas_of_the_first_version_are_read(machine):
    write(machine / "self", "4:memory:/host/path\n3:cpu,cpuacct:/host/path\n")
    write(machine / "cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    write(machine / "cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", str(8 * GIB))
    write(machine / "cgroup/memory/memory.usage_in_bytes", str(3 * GIB))
    assert allowance.cores() == 3
    assert allowance.memory_bytes() == 5 * GIB
    write(machine / "cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert allowance.cores() == 4


def test_the_tightest_group_bounds_the_memory(machine):
    write(machine / "self", "0::/a/b\n")
    write(machine / "cgroup/a/memory.max", str(6 * GIB))
    write(machine / "cgroup/a/memory.current", str(5 * GIB))
    write(machine / "cgroup/a/memory.stat", f"anon 1\ninactive_file {2 * GIB}\n")
    write(machine / "cgroup/a/b/memory.max", "max")
    write(machine / "cgroup/a/b/memory.current", str(5 * GIB))
    assert allowance.memory_bytes() == 3 * GIB


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "7"}, None),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 2),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, None),
        ({"LOCAL_WORLD_SIZE": "9"}, 1),
    ],
)
def test_processes_share_the_cores_unless_threads_were_chosen(machine, environ, threads):
    assert allowance.threads(environ)[0] == threads


def test_torch_is_told_what_differs_from_its_own_choice(machine, monkeypatch, caplog):
    for name in (*allowance.CHOSEN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    chosen = []
    with caplog.at_level("INFO"):
        allowance.allot(lambda: 4, chosen.append)
        allowance.allot(lambda: 8, chosen.append)
    assert chosen == [4]
    assert caplog.messages == ["computing with 4 threads instead of 8: 4 physical cores"]
