"""Writing: whole or not there, whatever call fails, and nothing that was changed later taken for whole."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from lora_ft.errors import StorageError
from lora_ft.system import atomicio, manifest
from tests.reliability.disks import Failing


def test_a_file_is_written_whole_and_in_place_of_another(tmp_path):
    file = tmp_path / "new" / "a.json"
    atomicio.write_json(file, {"b": 1})
    atomicio.write(file, "second")
    assert file.read_text() == "second"
    assert [p.name for p in file.parent.iterdir()] == ["a.json"]


def calls(action) -> int:
    """Returns how many calls of the disk an action makes."""
    counting = Failing(0)
    atomicio.disk, before = counting, atomicio.disk
    try:
        action()
    finally:
        atomicio.disk = before
    return counting.calls


def test_a_full_disk_leaves_the_old_file_at_every_call(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("old")
    total = calls(lambda: atomicio.write(file, "new"))
    assert total >= 5
    for number in range(1, total + 1):
        file.write_text("old")
        monkeypatch.setattr(atomicio, "disk", Failing(number))
        with pytest.raises(
            StorageError, match=r"a\.txt: cannot be written: No space left on device: free some"
        ) as told:
            atomicio.write(file, "new")
        assert told.value.full
        # The last call is the flush of the folder, after the rename.
        assert file.read_text() == ("old" if number < total else "new")
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_that_is_no_full_disk_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(atomicio, "disk", Failing(1, errno.EACCES))
    with pytest.raises(StorageError, match="Permission denied: see that the folder may be written to") as told:
        atomicio.write(tmp_path / "a", "b")
    assert not told.value.full


def test_what_a_library_in_rust_says_of_a_full_disk_is_understood(tmp_path):
    def fail(folder):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match="No space left"), atomicio.folder(tmp_path / "a") as draft:
        draft.library(fail)
    with pytest.raises(KeyError), atomicio.folder(tmp_path / "a") as draft:
        draft.library(lambda folder: {}["x"])  # a fault of the program stays one
    assert not list(tmp_path.iterdir())


def make(place: Path) -> Path:
    with atomicio.folder(place, {"step": 3}) as draft:
        draft.tensors("t.safetensors", {"a": torch.arange(6.0)})
        draft.write_json("b.json", [1, 2])
        draft.library(lambda folder: (folder / "inner").mkdir() or (folder / "inner" / "c.txt").write_text("c"))
    return place


def test_a_folder_appears_whole_with_a_manifest_and_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        place = make(tmp_path / "f")
    finally:
        os.umask(before)
    assert manifest.verify(place) == {"step": 3}
    assert torch.equal(load_file(place / "t.safetensors")["a"], torch.arange(6.0))
    assert {p.stat().st_mode & 0o777 for p in place.rglob("*") if p.is_file()} == {0o640}
    assert place.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


class Noting(atomicio.Disk):
    """Notes what is renamed and what is brought to the disk."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Path]] = []

    def sync(self, path):
        self.told.append(("sync", path))
        super().sync(path)

    def rename(self, old, new):
        self.told.append(("rename", new))
        super().rename(old, new)


def test_every_folder_that_gains_a_name_is_brought_to_the_disk(tmp_path, monkeypatch):
    noting = Noting()
    monkeypatch.setattr(atomicio, "disk", noting)
    place = tmp_path / "new" / "deep" / "f"
    with atomicio.folder(place, {}) as draft:
        draft.library(lambda folder: (folder / "a" / "b").mkdir(parents=True))
        draft.library(lambda folder: (folder / "a" / "b" / "c.txt").write_text("c"))
    before = noting.told[: noting.told.index(("rename", place))]
    synced = [path for what, path in before if what == "sync"]
    inner = [draft.path / "a" / "b" / "c.txt", draft.path / "a" / "b", draft.path / "a", draft.path]
    assert [path for path in synced if path in inner] == inner
    assert {tmp_path, tmp_path / "new", tmp_path / "new" / "deep"} <= set(synced)
    assert noting.told[-1] == ("sync", tmp_path / "new" / "deep")
    noting.told.clear()
    atomicio.write(tmp_path / "x" / "y" / "file", "content")
    assert {tmp_path, tmp_path / "x", tmp_path / "x" / "y"} <= {path for what, path in noting.told if what == "sync"}


def test_a_folder_that_is_there_is_never_passed_over_in_silence(tmp_path):
    make(tmp_path / "f")
    with pytest.raises(StorageError, match="f: is there already, and stays as it is: remove it"):
        make(tmp_path / "f")
    with atomicio.cached(tmp_path / "f") as draft:  # what another process made first will do
        draft.write("b.json", "[]")
    manifest.verify(tmp_path / "f")
    (tmp_path / "g").mkdir()
    with atomicio.cached(tmp_path / "g") as draft:
        draft.write("b.json", "[]")
    assert (tmp_path / "g" / "b.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "g"]


def test_a_full_disk_at_any_call_leaves_no_folder_and_no_litter(tmp_path, monkeypatch):
    total = calls(lambda: make(tmp_path / "f"))
    shutil.rmtree(tmp_path / "f")
    for number in range(1, total + 1):
        monkeypatch.setattr(atomicio, "disk", Failing(number))
        with pytest.raises(StorageError, match="No space left"):
            make(tmp_path / "f")
        # But for the flush of the parent, after the rename: then the folder is whole.
        assert [p.name for p in tmp_path.iterdir()] == ([] if number < total else ["f"])
    monkeypatch.undo()
    manifest.verify(tmp_path / "f")


@pytest.mark.parametrize("killed", [False, True])
def test_at_any_call_of_an_exchange_the_old_folder_or_the_new_one_is_there(tmp_path, monkeypatch, killed):
    def exchange(place: Path) -> None:
        with atomicio.draft(place) as draft:
            draft.write("b.json", "new")
            draft.commit(place, {"step": 4}, exchange=True)

    total = calls(lambda: exchange(make(tmp_path / "0" / "f"))) - calls(lambda: make(tmp_path / "0" / "g"))
    seen = set()
    for number in range(1, total + 1):
        place = make(tmp_path / str(number) / "f")
        with monkeypatch.context() as patch:
            if killed:
                # Nothing is cleared up, nor put back, by a program that is dead.
                patch.setattr(atomicio, "_forget", lambda path: None)
                patch.setattr(atomicio, "disk", Dying(number))
            else:
                patch.setattr(atomicio, "disk", Failing(number))
            # The last call, removing the old one, need not succeed.
            with contextlib.suppress(StorageError, Killed):
                exchange(place)
        atomicio.sweep(place.parent)
        assert [p.name for p in place.parent.iterdir()] == ["f"]
        seen.add(manifest.verify(place)["step"])
    assert seen == {3, 4}


class Killed(BaseException):
    """The program is dead."""


class Dying(Failing):
    """Ends the program at call number `at`; nothing goes through after it."""

    def _counted(self, call, takes_space):
        def counted(*args):
            self.calls += 1
            if self.calls >= self.at:
                raise Killed
            return call(*args)

        return counted


def test_every_change_of_a_folder_is_seen(tmp_path):
    place = make(tmp_path / "f")
    whole = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for path, data in whole.items():
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for damaged in (flipped, data[:-1], data + b" ", b"", bytes(len(data))):
            path.write_bytes(damaged)
            with pytest.raises(StorageError, match=path.name):
                manifest.verify(place)
        path.unlink()
        with pytest.raises(StorageError, match=path.name):
            manifest.verify(place)
        path.write_bytes(data)
        manifest.verify(place)


def test_without_its_digests_a_flipped_bit_is_not_seen(tmp_path, monkeypatch):
    place = make(tmp_path / "f")
    data = bytearray((place / "t.safetensors").read_bytes())
    data[-1] ^= 1
    (place / "t.safetensors").write_bytes(data)
    load_file(place / "t.safetensors")  # safetensors does not see it
    with pytest.raises(StorageError, match="other bytes than were written"):
        manifest.verify(place)
    kept = manifest.read(place)["files"]["t.safetensors"]["sha256"]
    monkeypatch.setattr(manifest, "_sha256", lambda path: kept)
    with pytest.raises(StorageError, match=r"b\.json"):  # the others then differ, this one no longer
        manifest.verify(place)


def test_a_manifest_of_another_format_is_named(tmp_path):
    place = make(tmp_path / "f")
    content = json.loads((place / manifest.NAME).read_bytes()) | {"format": 99}
    content.pop("sha256")
    (place / manifest.NAME).write_bytes(manifest.sealed(content))
    with pytest.raises(StorageError, match="has format 99; this version reads format 1"):
        manifest.verify(place)


def test_a_move_that_is_cut_short_is_finished_by_the_next(tmp_path, monkeypatch):
    first = make(tmp_path / "0" / "staged")
    total = calls(lambda: atomicio.move_in(first, tmp_path / "0", last="b.json"))
    for number in range(1, total + 1):
        place = tmp_path / str(number)
        staged = make(place / "staged")
        with monkeypatch.context() as patch:
            patch.setattr(atomicio, "disk", Failing(number))
            with pytest.raises(StorageError, match="No space left"):
                atomicio.move_in(staged, place, last="b.json")
        # The last file says that the others are there.
        assert not (place / "b.json").exists() or (place / "t.safetensors").exists()
        if staged.exists():
            atomicio.move_in(staged, place, last="b.json")
        atomicio.sweep(place)
        names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
        assert names == ["b.json", "inner/c.txt", "t.safetensors"]


def test_a_move_of_files_that_are_lost_or_damaged_is_refused(tmp_path):
    staged = make(tmp_path / "staged")
    (staged / "b.json").write_text("[1, 3]\n")
    with pytest.raises(StorageError, match=r"b\.json is missing, and staged holds no whole copy"):
        atomicio.move_in(staged, tmp_path, last="b.json")


def test_what_is_deleted_loses_its_name_first_and_litter_is_swept(tmp_path, monkeypatch):
    place = make(tmp_path / "f")
    monkeypatch.setattr(atomicio, "disk", Failing(2))
    with pytest.raises(StorageError):
        atomicio.remove(place)
    assert not place.exists()
    assert len(list(tmp_path.glob(".del-f-*"))) == 1
    monkeypatch.undo()
    (tmp_path / ".tmp-x-01234567").write_text("half")
    for name in ("mine", ".tmp-mine", ".tmp-x-1234567", ".tmpx-01234567", ".tmp-y-01234567"):
        (tmp_path / name).write_text("whole")
    atomicio.sweep(tmp_path, "[fx]")
    assert {p.name for p in tmp_path.iterdir()} == {
        "mine", ".tmp-mine", ".tmp-x-1234567", ".tmpx-01234567", ".tmp-y-01234567"
    }  # fmt: skip


def test_damaged_folders_are_set_aside_under_names_of_their_own(tmp_path):
    names = [atomicio.set_aside(make(tmp_path / "f")).name for _ in range(2)]
    assert names == ["f.corrupt", "f.2.corrupt"]


def test_lines_are_appended_one_by_one(tmp_path):
    for line in ("a", "b"):
        atomicio.append(tmp_path / "m.jsonl", line)
    assert (tmp_path / "m.jsonl").read_bytes() == b"a\nb\n"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "", ".", "a//b", "a\\b", "C:x", "a\n", "./a", "inner/.."]
)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    place = make(tmp_path / "f")
    (tmp_path / "x").write_text("x")
    content = json.loads((place / manifest.NAME).read_bytes())
    content.pop("sha256")
    content["files"][name] = content["files"].pop("b.json")
    (place / manifest.NAME).write_bytes(manifest.sealed(content))
    for action in (manifest.verify, lambda place: atomicio.move_in(place, tmp_path, last="b.json")):
        with pytest.raises(StorageError, match="which is no file in its folder"):
            action(place)


def test_nothing_is_read_or_moved_through_a_link(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "c.txt").write_text("c")
    place = make(tmp_path / "run" / "f")
    (tmp_path / "run" / "inner").symlink_to("../mine")
    with pytest.raises(StorageError, match=r"run/inner: it is a link"):
        atomicio.move_in(place, tmp_path / "run", last="b.json")
    shutil.rmtree(place / "inner")
    (place / "inner").symlink_to("../../mine")
    with pytest.raises(StorageError, match=r"f/inner: it is a link"):
        manifest.verify(place)


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["b.json"]},
        {"files": {"b.json": 5}},
        {"files": {"b.json": {"bytes": "5", "sha256": "0"}}},
        {"files": {"b.json": {"bytes": 5, "sha256": None}}},
        {"files": None},
        {"facts": []},
    ],
)
def test_a_manifest_of_the_wrong_types_is_no_traceback(tmp_path, change):
    place = make(tmp_path / "f")
    content = json.loads((place / manifest.NAME).read_bytes()) | change
    content.pop("sha256")
    (place / manifest.NAME).write_bytes(manifest.sealed(content))
    with pytest.raises(StorageError, match="was not written by lora-ft"):
        manifest.verify(place)
