"""One run a folder and a GPU: who holds it is told at once, and a dead owner holds nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lora_ft import cli, locks
from lora_ft.errors import BusyError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "home"))


HOLDER = """
import sys, time
from pathlib import Path
from lora_ft import locks
with locks.run_folder(Path(sys.argv[1])), locks.gpu(sys.argv[2], Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"` and the GPU `GPU-1`."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), "GPU-1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_says_in_under_a_second_who_holds_the_folder(holder, tmp_path, capsys):
    began = time.perf_counter()
    status = cli.main(["train", "chat", "--base", "b", "--out", str(tmp_path / "run"), "--data.train", "x.jsonl"])
    assert time.perf_counter() - began < 1
    assert status == 1
    error = capsys.readouterr().err
    assert f"in use by process {holder.pid}, which trains into {tmp_path / 'run'}" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_second_run_on_a_gpu_is_refused_and_on_another_is_not(holder, tmp_path):
    told = pytest.raises(BusyError, match=f"the GPU GPU-1 is in use by process {holder.pid}")
    with told, locks.gpu("GPU-1", tmp_path / "other"):
        pass
    with locks.gpu("GPU-2", tmp_path / "other"), locks.gpu(None, tmp_path), locks.run_folder(tmp_path / "other"):
        pass


def test_the_lock_of_a_dead_owner_is_free_at_once(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.run_folder(tmp_path / "run"), locks.gpu("GPU-1", tmp_path / "run"):
        pass


def test_a_folder_is_the_same_by_any_of_its_names(holder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(BusyError), locks.run_folder(tmp_path / "link" / "x" / ".." / "run"):
        pass


def test_the_process_that_holds_a_lock_may_take_it_again_and_gives_it_back_at_the_outer_end(tmp_path):
    with locks.run_folder(tmp_path):
        with locks.run_folder(tmp_path):
            pass
        assert refused(tmp_path)
    assert not refused(tmp_path)


def refused(place) -> bool:
    """Returns whether another process may not take the lock."""
    code = HOLDER.split("print")[0] + "pass"
    return b"BusyError" in subprocess.run([sys.executable, "-c", code, str(place), "GPU-9"], capture_output=True).stderr


def test_a_lock_that_cannot_be_made_is_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "file"))
    words = ["train", "chat", "--base", "b", "--out", str(tmp_path / "run"), "--data.train", "x.jsonl"]
    assert cli.main(words) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_process_forked_in_the_block_does_not_hold_it_on(tmp_path):
    with locks.run_folder(tmp_path / "run"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with locks.run_folder(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
