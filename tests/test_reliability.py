"""The harnesses of `tests/reliability`: few of each in every run, all of them in the slow ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def figures(*words: str) -> str:
    """Returns what the harnesses print, in a process of their own: they fork, which threads do not survive."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.reliability", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


def test_a_few_kills_resumes_full_disks_and_damages_lose_nothing():
    told = figures("--small")
    assert "6 kills: 0 unreadable checkpoints chosen, 0 with more than one save interval lost, 0 resumed" in told
    assert "kill, from within an evaluation: 5 kills: 0 unreadable" in told
    assert "resume: 6 of 6" in told
    # Mounted, or where that may not be with limits on files; never passed over.
    assert re.search(r"a real disk of 3 MB: (0|may not be mounted .* bytes instead: 0) faults", told)
    assert "corrupt: 300 of 300" in told
    assert "signals: 5 of 5" in told
    # The same faults on the stock Trainer are not survived: the harness would see it if they were not here either.
    assert "kill, Trainer and PEFT: 2 kills: 0 unreadable checkpoints chosen" not in told


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_of_them_do_not_either():
    assert "500 kills: 0 unreadable" in figures()
