"""One run a folder and a GPU: who holds it is told at once, and a dead owner holds nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

from lora_ft import cli
from lora_ft.errors import BusyError, StorageError
from lora_ft.system import locks

GPU = f"GPU-{uuid.uuid4()}"


@pytest.fixture(autouse=True)
def clean():
    yield
    for file in locks.shared().glob(f"gpu-{GPU}*"):
        file.unlink()


HOLDER = """
import sys, time
from pathlib import Path
from lora_ft.system import locks
with locks.run_folder(Path(sys.argv[1])), locks.gpu(sys.argv[2], Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"` and a GPU."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), f"{GPU}-1"]
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
    assert not any((tmp_path / "run").iterdir())


def test_a_second_run_on_a_gpu_is_refused_and_on_another_is_not(holder, tmp_path):
    told = pytest.raises(BusyError, match=f"the GPU {GPU}-1 is in use by process {holder.pid}")
    with told, locks.gpu(f"{GPU}-1", tmp_path / "other"):
        pass
    with locks.gpu(f"{GPU}-2", tmp_path / "other"), locks.gpu(None, tmp_path), locks.run_folder(tmp_path / "other"):
        pass


def test_the_lock_of_a_dead_owner_is_free_at_once(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.run_folder(tmp_path / "run"), locks.gpu(f"{GPU}-1", tmp_path / "run"):
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
    return (
        b"BusyError" in subprocess.run([sys.executable, "-c", code, str(place), f"{GPU}-9"], capture_output=True).stderr
    )


def test_a_lock_that_cannot_be_made_is_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    words = ["train", "chat", "--base", "b", "--out", str(tmp_path / "file" / "run"), "--data.train", "x.jsonl"]
    assert cli.main(words) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_001)
    place = locks.Path("/tmp") / f"lora_ft-{os.getuid()}"
    place.symlink_to(tmp_path)
    try:
        with pytest.raises(StorageError, match="is not a folder of this user"), locks.run_folder(tmp_path):
            pass
    finally:
        place.unlink()


def test_no_other_user_comes_to_the_locks():
    assert locks.shared().stat().st_mode & 0o777 == 0o700


def test_a_second_thread_holds_nothing_that_the_first_does(tmp_path):
    said = []

    def other():
        try:
            with locks.run_folder(tmp_path / "run"), locks.gpu(f"{GPU}-1", tmp_path):
                said.append("held")
        except BusyError as error:
            said.append(str(error))

    for held in (locks.run_folder(tmp_path / "run"), locks.gpu(f"{GPU}-1", tmp_path)):
        with held:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert all(f"is in use by process {os.getpid()}" in one for one in said)
    assert len(said) == 2


@pytest.mark.parametrize("names", [("LORA_FT_HOME",), ("HOME", "TMPDIR", "XDG_CACHE_HOME")])
def test_another_environment_opens_no_lock(holder, tmp_path, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    with pytest.raises(BusyError, match=f"in use by process {holder.pid}"), locks.run_folder(tmp_path / "run"):
        pass
    with pytest.raises(BusyError, match=f"in use by process {holder.pid}"), locks.gpu(f"{GPU}-1", tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_holds_nothing_that_its_parent_does(tmp_path):
    with locks.run_folder(tmp_path / "run"), locks.gpu(f"{GPU}-1", tmp_path):
        child = os.fork()
        if not child:
            status = 0
            for held in (locks.run_folder(tmp_path / "run"), locks.gpu(f"{GPU}-1", tmp_path)):
                try:
                    with held:
                        pass
                except BusyError:
                    status += 1
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_a_folder_that_nothing_was_put_into_is_removed_and_any_other_stays(tmp_path):
    with locks.run_folder(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with locks.run_folder(tmp_path / "b"):
        (tmp_path / "b" / "x").write_text("")
    (tmp_path / "c").mkdir()
    with locks.run_folder(tmp_path / "c"):
        pass
    assert (tmp_path / "b" / "x").is_file()
    assert (tmp_path / "c").is_dir()


def test_where_folders_cannot_be_locked_a_file_is_and_that_is_told(tmp_path, monkeypatch, caplog):
    real = locks._lock

    def no_folders(handle):
        if os.fstat(handle).st_mode & 0o040000:
            raise OSError(9, "Bad file descriptor")
        return real(handle)

    caplog.set_level("INFO", logger="lora_ft")
    monkeypatch.setattr(locks, "_lock", no_folders)
    with locks.run_folder(tmp_path / "run"):
        held = []

        def other():
            with pytest.raises(BusyError), locks.run_folder(tmp_path / "run"):
                pass
            held.append(1)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert held
    assert "cannot be locked itself (Bad file descriptor)" in caplog.text


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
