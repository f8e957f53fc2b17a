"""Whether a resumed run is the run that was started, and that an adapter is moved into its folder whole."""

import json
import shutil
from pathlib import Path

import pytest

from lora_ft import runs, saved, train
from lora_ft.config import DataConfig, RunConfig, TrainConfig
from lora_ft.errors import ConfigError, LoraFtError, StorageError
from lora_ft.proof import environment, recorded
from lora_ft.system import atomicio, manifest
from lora_ft.training import rows as rows_of_a_run
from lora_ft.training import started
from tests import tiny
from tests.reliability.disks import Failing

FACTS = {"train": {"name": "rows.jsonl", "rows": 12, "sha256": "a"}, "eval": {"name": "x", "rows": 2, "sha256": "b"}}
BASE = {"name": "base", "source": "folder", "repo": None, "revision": None, "origin": "here", "weights_sha256": "c",
        "config_sha256": "d"}  # fmt: skip


def config(out: Path, **changes) -> RunConfig:
    train_changes = {key: changes.pop(key) for key in list(changes) if key in TrainConfig.__dataclass_fields__}
    return RunConfig(
        task="chat",
        base="b",
        out=out,
        data=DataConfig(train="rows.jsonl"),
        train=TrainConfig(**train_changes),
        **changes,
    )


def keep(out: Path, *, facts=FACTS, tokenizer="t", base=BASE, **changes) -> None:
    started.keep_or_compare(config(out, **changes), facts, tokenizer, base)


def other(tree, **changes):
    return {**tree, **changes}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr": 1e-5}, "train.lr"),
        ({"optimizer": "adamw-8bit"}, "train.optimizer"),
        ({"seed": 1}, "train.seed"),
        ({"quant": "none"}, "quant"),
        ({"facts": other(FACTS, train=other(FACTS["train"], sha256="z"))}, "rows.train.sha256"),
        ({"facts": other(FACTS, eval=other(FACTS["eval"], sha256="z"))}, "rows.eval.sha256"),
        ({"tokenizer": "z"}, "tokenizer.sha256"),
        ({"base": other(BASE, weights_sha256="z")}, "weights.weights_sha256"),
        ({"base": other(BASE, config_sha256="z")}, "weights.config_sha256"),
    ],
)
def test_what_changed_is_named_and_refused_unless_it_is_allowed(tmp_path, caplog, changes, key):
    keep(tmp_path)
    keep(tmp_path, resume=True)
    with pytest.raises(ConfigError, match=f"or add --allow-changed {key} if that is meant:\n  {key} was .*, is .*"):
        keep(tmp_path, resume=True, **changes)
    with pytest.raises(ConfigError, match=key):  # another key does not open the door to this one
        keep(tmp_path, resume=True, allow_changed=("train.warmup",), **changes)
    keep(tmp_path, resume=True, allow_changed=(key,), **changes)
    assert f"the run goes on, but not as it was started:\n  {key} was" in caplog.text
    # From now on it is that run.
    keep(tmp_path, resume=True, **changes)


@pytest.mark.parametrize("key", ["torch", "device", "loops"])
def test_other_versions_and_devices_are_told_and_not_refused(tmp_path, caplog, monkeypatch, key):
    keep(tmp_path)
    keep(tmp_path, resume=True)
    assert not caplog.text
    was = environment.made_with()
    monkeypatch.setattr(environment, "made_with", lambda: {**was, key: "another"})
    keep(tmp_path, resume=True)
    assert f"no longer the run in one piece bit for bit:\n  {key} was {was[key]}, is another" in caplog.text
    caplog.clear()
    keep(tmp_path, resume=True)
    assert not caplog.text


def test_a_key_that_no_run_has_is_named(tmp_path):
    keep(tmp_path)
    with pytest.raises(ConfigError, match=r"allow-changed: a run has no key train\.rate; its keys are .*train\.lr"):
        keep(tmp_path, resume=True, allow_changed=("train.rate",))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"[1]",
        lambda data: b"[" * 100_000,
        lambda data: data.replace(b"train.lr", b"train.ls"),
        lambda data: data.replace(b'"seed": 42', b'"seed": 43').replace(b'"train.seed": 42', b'"train.seed": 43'),
        # What the versions before wrote.
        lambda data: json.dumps(json.loads(data)["content"]).encode(),
    ],
)
def test_a_damaged_record_of_the_start_is_one_clear_message(tmp_path, damage):
    keep(tmp_path)
    path = tmp_path / train.CHECKPOINTS / started.FILE
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(StorageError, match=r"run\.json: is not as it was written: .* put the file back, or start anew"):
        keep(tmp_path, resume=True)
    path.write_bytes(data)
    keep(tmp_path, resume=True)


def test_what_does_not_change_the_adapter_may_change(tmp_path):
    keep(tmp_path)
    keep(tmp_path, resume=True, log_steps=5, report_to=())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("base")
    return tiny.run(folder / "run", tiny.model_folder(folder / "base"), steps=1, sealed=False)


def save(trained, out: Path) -> None:
    """Writes the adapter of a finished training, as a run does."""
    trained.task.prepare(trained.base.tokenizer, 64)
    rows = rows_of_a_run.Rows([], [], [], [], {"train": FACTS["train"]})
    settings = RunConfig(task="complete", base=str(trained.base_folder), out=out)
    runs._save(settings, trained.task, trained.base, trained.model, rows, train.Fit(1, 2, 3.0, 4, False))


def names(out: Path) -> set[str]:
    return {path.name for path in out.glob("*")}


def test_a_run_that_ends_at_any_call_of_saving_its_adapter_is_gone_on_with(trained, tmp_path, monkeypatch):
    keep(tmp_path / "whole")
    counting = Failing(0)
    monkeypatch.setattr(atomicio, "disk", counting)
    save(trained, tmp_path / "whole")
    whole = names(tmp_path / "whole")
    begun = 0
    for at in range(1, counting.calls + 1):
        out = tmp_path / str(at)
        monkeypatch.setattr(atomicio, "disk", atomicio.Disk())
        keep(out)
        monkeypatch.setattr(atomicio, "disk", Failing(at))
        with pytest.raises(StorageError, match="No space left"):
            save(trained, out)
        monkeypatch.setattr(atomicio, "disk", atomicio.Disk())
        # The record is the last to come, so a folder with one is whole, whatever else is still lying about.
        assert not (out / environment.FILE).exists() or whole <= names(out)
        if started.is_trained(out):
            started.clear_up(out)
            assert names(out) == whole
            recorded.read(out)
            begun += 1
        else:
            # Nothing of it is in the folder, so training goes on from the last checkpoint.
            assert names(out) <= {train.CHECKPOINTS}
        shutil.rmtree(out, ignore_errors=True)
    assert 0 < begun < counting.calls


def test_a_run_killed_in_its_first_write_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(atomicio, "_forget", lambda path: None)  # kill -9 clears nothing up
    monkeypatch.setattr(atomicio, "disk", Failing(0))
    keep(tmp_path / "whole")
    for at in range(1, atomicio.disk.calls):
        monkeypatch.setattr(atomicio, "disk", Failing(at))
        with pytest.raises(StorageError):
            keep(tmp_path / str(at))
        monkeypatch.setattr(atomicio, "disk", atomicio.Disk())
        started.clear_up(tmp_path / str(at))
        started.refuse_to_overwrite(config(tmp_path / str(at)))


def test_in_a_folder_of_another_nothing_is_cleared_up(tmp_path):
    (tmp_path / ".tmp-mine").write_text("mine")
    (tmp_path / train.CHECKPOINTS).mkdir()
    (tmp_path / train.CHECKPOINTS / ".tmp-mine").write_text("mine")
    started.clear_up(tmp_path)
    assert len(list(tmp_path.rglob(".tmp-mine"))) == 2
    with pytest.raises(ConfigError, match="is not an empty folder"):
        started.refuse_to_overwrite(config(tmp_path))


def test_an_adapter_that_was_damaged_before_it_was_moved_is_left_aside(trained, tmp_path, monkeypatch, caplog):
    keep(tmp_path)
    monkeypatch.setattr(runs.started, "move_in_adapter", lambda out: None)
    save(trained, tmp_path)
    monkeypatch.undo()
    staged = tmp_path / train.CHECKPOINTS / saved.STAGED
    (staged / saved.WEIGHTS).write_bytes(b"")
    started.clear_up(tmp_path)
    assert not started.is_trained(tmp_path)
    assert f"is left aside as {saved.STAGED}.corrupt" in caplog.text
    assert json.loads((staged.parent / f"{saved.STAGED}.corrupt" / environment.FILE).read_text())


def forged(staged: Path, **files: Path) -> None:
    """Writes a manifest with the right digests, as anybody can."""
    kept = {name: {"bytes": p.stat().st_size, "sha256": environment.file_sha256(p)} for name, p in files.items()}
    content = {"format": 1, "facts": {}, "files": kept}
    (staged / manifest.NAME).write_bytes(manifest.sealed(content))


@pytest.fixture
def deceitful(tmp_path: Path) -> Path:
    """A downloaded run whose staged adapter would be moved onto the user's `.bashrc`, two folders above it."""
    (tmp_path / ".bashrc").write_text("mine")
    out = tmp_path / "downloads" / "run"
    keep(out)
    staged = out / train.CHECKPOINTS / saved.STAGED
    staged.mkdir()
    (out / ".bashrc").write_text("evil")
    (staged / environment.FILE).write_text("{}")
    forged(staged, **{"../../.bashrc": out / ".bashrc", environment.FILE: staged / environment.FILE})
    return out


@pytest.mark.parametrize("resume", [False, True])
def test_a_downloaded_run_writes_over_no_file_outside_its_folder(deceitful: Path, resume: bool) -> None:
    with pytest.raises(LoraFtError):
        runs.run(config(deceitful, resume=resume))
    assert (deceitful.parents[1] / ".bashrc").read_text() == "mine"


def test_a_finished_move_comes_after_the_refusal_to_overwrite(trained, tmp_path, monkeypatch) -> None:
    keep(tmp_path)
    monkeypatch.setattr(runs.started, "move_in_adapter", lambda out: None)
    save(trained, tmp_path)
    monkeypatch.undo()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        runs.run(config(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", [train.CHECKPOINTS, f"{train.CHECKPOINTS}/{saved.STAGED}"])
def test_what_is_behind_a_link_is_neither_swept_nor_moved(tmp_path: Path, place: str) -> None:
    mine, out = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    (mine / started.FILE).write_text("{}")
    (mine / ".tmp-mine").write_text("mine")
    (out / place).parent.mkdir(parents=True)
    (out / place).symlink_to(mine)
    with pytest.raises(StorageError, match="it is a link"):
        started.clear_up(out)
    assert (mine / ".tmp-mine").exists()


def test_a_record_of_the_start_that_is_none_is_named(tmp_path: Path) -> None:
    """Anybody can write one with the right digest."""
    keep(tmp_path)
    atomicio.write_sealed(tmp_path / train.CHECKPOINTS / started.FILE, [1])
    with pytest.raises(StorageError, match=r"run\.json: holds no object"):
        keep(tmp_path, resume=True)
