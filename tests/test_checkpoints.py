"""Checkpoints: what they hold, what they refuse, what is kept of them, and that any Trainer can have them."""

import errno
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from lora_ft import adapters, checkpoints, train
from lora_ft.errors import AdapterError, ConfigError, DivergedError, LoraFtError, StorageError
from lora_ft.system import atomicio, manifest
from lora_ft.training import exact, optimizer, started, trainers
from tests import tiny
from tests.reliability.disks import Failing
from tests.reliability.forks import fingerprints
from tests.test_train import StopAt, fit, prepared, rewrite, same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, logger="lora_ft")


def stopped(out: Path, folder: Path, at: int = 3, **settings) -> Path:
    """Returns the checkpoint of a run that a signal stopped after step `at`."""
    settings = {"steps": 6, "batch_size": 4, **settings}
    fit(out, folder, tiny.rows("complete", 12), callbacks=[StopAt(at - 1, signal.SIGINT)], **settings)
    return checkpoints.newest(out / train.CHECKPOINTS)


def resumed(out: Path, folder: Path, **settings):
    settings = {"steps": 6, "batch_size": 4, **settings}
    return fit(out, folder, tiny.rows("complete", 12), resume=True, **settings)


def test_a_checkpoint_is_safetensors_and_json_by_the_names_of_parameters(tmp_path, folder):
    place = stopped(tmp_path / "run", folder)
    assert {path.name for path in place.iterdir()} == {
        "adapter.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "progress.json",
        "trainer_state.json", "manifest.json",
    }  # fmt: skip
    names = set(adapters.trained(prepared(folder)[2]))
    assert set(load_file(place / checkpoints.ADAPTER)) == names
    moments = load_file(place / optimizer.TENSORS)
    assert set(moments) == {f"{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
    for path in place.glob("*.json"):
        text = path.read_text()
        assert str(tmp_path) not in text
        json.loads(text)
    progress = json.loads((place / checkpoints.PROGRESS).read_text())
    assert (progress["step"], progress["epoch"], progress["rows"]) == (3, 1.0, 12)


def test_the_order_of_the_parameters_does_not_matter_but_their_names_do(tmp_path, folder):
    place = stopped(tmp_path / "run", folder)
    groups = json.loads((place / optimizer.GROUPS).read_text())
    groups["groups"][0]["parameters"][0] += "x"
    rewrite(place, optimizer.GROUPS, json.dumps(groups))
    with pytest.raises(AdapterError, match="its optimizer trained other parameters"):
        resumed(tmp_path / "run", folder)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, folder):
    stopped(tmp_path / "run", folder)
    with pytest.raises(AdapterError, match=r"of another adapter, \d+ tensors differ: .*lora_A.* is \(4, 128\) of"):
        resumed(tmp_path / "run", folder, lora={"rank": 8})
    with pytest.raises(AdapterError, match=r"tensors differ: .* has no place in the model"):
        resumed(tmp_path / "run", folder, lora={"targets": ("q_proj",)})


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, folder, caplog):
    rows = tiny.rows("complete", 12)
    _, weights = fit(tmp_path / "whole", folder, rows, steps=6, batch_size=4)
    place = stopped(tmp_path / "run", folder, at=4, save_steps=1)
    data = bytearray((place / optimizer.TENSORS).read_bytes())
    data[-3] ^= 4
    (place / optimizer.TENSORS).write_bytes(data)
    done, again = resumed(tmp_path / "run", folder, save_steps=1)
    assert f"{place.name} is left aside as {place.name}.corrupt" in caplog.text
    assert "optimizer.safetensors has the right size but other bytes than were written" in caplog.text
    assert same(again, weights)
    assert done.steps == 6


def unreadable(monkeypatch, place: Path, number: int, name: str) -> None:
    """Has a file of a checkpoint fail to be read, as a disk or a limit of the system does."""
    opened = Path.open

    def fail(self, *args, **kwargs):
        if self == place / name:
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_left_as_it_is(
    tmp_path, folder, monkeypatch, caplog, number, name
):
    older, newest = (saved(tmp_path / f"checkpoint-{step}") for step in (3, 4))
    with monkeypatch.context() as patch:
        unreadable(patch, newest, number, name)
        assert checkpoints.newest(tmp_path) == older
        unreadable(patch, older, number, name)
        with pytest.raises(AdapterError, match=r"no checkpoint can be gone on from, .*cannot be"):
            checkpoints.newest(tmp_path)
    assert f"checkpoint-4 is passed over: {newest}" in caplog.text
    assert os.strerror(number) in caplog.text
    assert checkpoints.newest(tmp_path) == newest


def test_a_checkpoint_of_a_newer_version_is_no_damaged_one(tmp_path, monkeypatch):
    older = saved(tmp_path / "checkpoint-3")
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 99)
        newest = saved(tmp_path / "checkpoint-4")
    assert checkpoints.newest(tmp_path) == older
    assert newest.is_dir()


def saved(place: Path) -> Path:
    """Returns a folder that is written as a checkpoint is."""
    with atomicio.folder(place, {"step": checkpoints.step_of(place)}) as draft:
        draft.write("optimizer.safetensors", "numbers")
    return place


def test_where_no_checkpoint_is_whole_nothing_starts_from_the_beginning(tmp_path, folder):
    place = stopped(tmp_path / "run", folder)
    (place / checkpoints.ADAPTER).unlink()
    with pytest.raises(AdapterError, match=r"no checkpoint is whole \(checkpoint-3\); start anew without --resume"):
        resumed(tmp_path / "run", folder)


def test_of_many_checkpoints_the_newest_three_and_the_best_stay(tmp_path, folder, monkeypatch):
    rows, held_out = tiny.rows("complete", 8), tiny.rows("complete", 6, seed=9)
    found = iter([5.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    monkeypatch.setattr(trainers.losses, "of_rows", lambda *_, **__: SimpleNamespace(mean=next(found)))
    stop = StopAt(28, signal.SIGINT)
    settings = {"steps": 40, "eval_steps": 4, "batch_size": 4}
    fit(tmp_path / "run", folder, rows, held_out, callbacks=[stop], **settings)
    kept = [checkpoints.step_of(path) for path in checkpoints.found(tmp_path / "run" / train.CHECKPOINTS)]
    assert kept == [8, 28, 29]  # the one of loss 4, and the newest two
    assert not list((tmp_path / "run" / train.CHECKPOINTS).glob(".*"))


def test_litter_of_a_killed_run_is_swept_when_it_goes_on(tmp_path, folder):
    place = stopped(tmp_path / "run", folder)
    for name in (".tmp-checkpoint-4-01234567", ".del-checkpoint-1-01234567", ".old-checkpoint-3-01234567"):
        (place.parent / name).mkdir()
    resumed(tmp_path / "run", folder)
    assert not list(place.parent.glob(".*"))


def test_what_another_program_keeps_in_the_folder_stays_as_it_is(tmp_path, folder, caplog):
    theirs = [".tmp-mine", ".tmp-mine-01234567", ".del-x", "checkpoint-7"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    with pytest.raises(
        AdapterError, match=r"checkpoint-7 has no manifest\.json, so it is not one of these checkpoints"
    ):
        plain(folder, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="holds the checkpoints of a run"):
        plain(folder, tmp_path).train()
    # Beside checkpoints of ours they are passed over, never overwritten nor counted among those to delete.
    for step in (1, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "whole").mkdir()
    plain(folder, tmp_path / "whole").train()
    shutil.move(tmp_path / "whole" / "checkpoint-4", tmp_path / "checkpoint-2")
    rewrite(tmp_path / "checkpoint-2", checkpoints.STATE, state_of(tmp_path / "checkpoint-2", global_step=2))
    trainer = plain(folder, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    assert "STEP 3 IS NOT SAVED, training goes on:" in caplog.text
    assert "checkpoint-3 is the checkpoint of another program, and stays: move it away" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {
        *theirs, "checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-5", "whole"
    }  # fmt: skip


def state_of(place: Path, **changes) -> str:
    return json.dumps({**json.loads((place / checkpoints.STATE).read_text()), **changes})


def test_checkpoints_of_a_run_that_is_left_are_not_taken_for_those_of_the_one_that_goes_on(tmp_path, folder, caplog):
    left = plain(folder, tmp_path)
    left.args.save_total_limit = None
    left.train()
    again = plain(folder, tmp_path, lr=1e-3)
    again.add_callback(StopAt(3, signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(InterruptedError))
    try:
        with pytest.raises(InterruptedError):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "checkpoint-5 is newer than checkpoint-2, and is left aside as checkpoint-5.left" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-2", "checkpoint-3", "checkpoint-3.left", "checkpoint-4.left", "checkpoint-5.left"
    }  # fmt: skip
    state = json.loads((checkpoints.newest(tmp_path) / checkpoints.STATE).read_text())
    assert state["log_history"] == again.state.log_history


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_wait_for_a_metric_go_on_where_they_were(tmp_path, folder, schedule):
    def made(out: Path):
        trainer = plain(
            folder, out, lr_scheduler_type=schedule, lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
            eval_strategy="steps", eval_steps=1, metric_for_best_model="loss",
            eval_dataset=train.Rows(tiny.rows("complete", 2)),
        )  # fmt: skip
        trainer.evaluate = lambda *args, **kwargs: {"eval_loss": 2.0 if trainer.state.global_step == 3 else 3.0}
        return trainer

    whole = made(tmp_path / "whole")
    whole.train()
    cut = made(tmp_path / "cut")
    cut.add_callback(StopAt(2, signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(InterruptedError))
    try:
        with pytest.raises(InterruptedError):
            cut.train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    again = made(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert again.fingerprint == whole.fingerprint != ""
    assert again.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


class Dead(BaseException):
    """The program is dead."""


def test_a_step_saved_again_is_never_without_its_checkpoint(tmp_path, folder, monkeypatch):
    rows, held_out = tiny.rows("complete", 8), tiny.rows("complete", 6, seed=9)
    settings = {"steps": 6, "eval_steps": 3, "batch_size": 4}
    _, weights = fit(tmp_path / "whole", folder, rows, held_out, **settings)
    stop = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(trainers.losses, "of_rows", stop)
        fit(tmp_path / "run", folder, rows, held_out, **settings)

    class Dies(atomicio.Disk):
        def rename(self, old, new):
            if new.name == "checkpoint-3":
                raise Dead
            super().rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(atomicio, "disk", Dies())
        patch.setattr(atomicio, "_forget", lambda path: None)
        with pytest.raises(Dead):
            fit(tmp_path / "run", folder, rows, held_out, resume=True, **settings)
    assert not checkpoints.found(tmp_path / "run" / train.CHECKPOINTS)
    _, again = fit(tmp_path / "run", folder, rows, held_out, resume=True, **settings)
    assert same(again, weights)
    assert not list((tmp_path / "run" / train.CHECKPOINTS).glob(".*"))


class NoRoom(atomicio.Disk):
    def free_bytes(self, folder):
        return 10_000


@pytest.mark.parametrize("disk", [NoRoom(), Failing(20, forever=True)])
def test_without_room_training_says_so_goes_on_and_keeps_what_it_has(tmp_path, folder, monkeypatch, caplog, disk):
    place = stopped(tmp_path / "run", folder)
    _, weights = fit(tmp_path / "whole", folder, tiny.rows("complete", 12), steps=6, batch_size=4)
    monkeypatch.setattr(atomicio, "disk", disk)
    _, again = resumed(tmp_path / "run", folder, save_steps=2)
    monkeypatch.undo()
    assert same(again, weights)
    assert "STEP 4 IS NOT SAVED, training goes on:" in caplog.text
    assert "free some space" in caplog.text
    assert "The newest checkpoint is checkpoint-3" in caplog.text
    assert checkpoints.newest(place.parent) == place
    assert [path.name for path in place.parent.iterdir()] == [place.name]


class FullForLines(atomicio.Disk):
    """Takes half a line of the metrics, and then no more until it has refused three."""

    refused = 0

    def write(self, path, data, *, append=False):
        if "metrics.jsonl" in path.name:
            self.refused += 1
            if 1 < self.refused <= 4:  # the first starts the file
                if append:
                    super().write(path, data[:10], append=True)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, data, append=append)


def test_lines_of_the_metrics_wait_for_room(tmp_path, folder, monkeypatch, caplog):
    rows = tiny.rows("complete", 12)
    fit(tmp_path / "whole", folder, rows, steps=6, batch_size=4)
    monkeypatch.setattr(atomicio, "disk", FullForLines())
    fit(tmp_path / "run", folder, rows, steps=6, batch_size=4)
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")
    assert caplog.text.count("lines of the metrics have to wait, training goes on") == 1
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_an_interrupt_on_a_full_disk_says_which_step_was_saved_last(tmp_path, folder, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(LoraFtError, match="Stopped at step 4, and no checkpoint could be saved: start anew") as told:
        raise started.interrupted(out, 4)
    assert told.value.exit_status == 1
    stopped(out, folder)
    assert "Stopped at step 3; a checkpoint is saved. To go on:" in str(started.interrupted(out, 3))
    assert "Stopped at step 5; the last checkpoint is of step 3. To go on:" in str(started.interrupted(out, 5))


def test_an_adapter_that_is_not_finite_is_never_saved(tmp_path, folder, monkeypatch):
    class Spoil(train.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                next(iter(adapters.trained(kwargs["model"]).values())).data[0] = torch.inf

    told = (
        r"After step 2, .*lora_A.* are not finite, so no checkpoint was saved: .* The adapter is that of step 1 again"
    )
    with pytest.raises(DivergedError, match=told):
        fit(tmp_path / "run", folder, tiny.rows("complete"), steps=3, save_steps=1, callbacks=[Spoil()])
    (place,) = checkpoints.found(tmp_path / "run" / train.CHECKPOINTS)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(place / checkpoints.ADAPTER).values())


def test_a_lost_best_checkpoint_is_told_and_never_replaced_unasked(tmp_path, folder, monkeypatch):
    rows, held_out = tiny.rows("complete", 8), tiny.rows("complete", 6, seed=9)
    real = checkpoints.Checkpoints._load_best_model

    def damaged(self):
        (Path(self.state.best_model_checkpoint) / checkpoints.ADAPTER).write_bytes(b"")
        real(self)

    monkeypatch.setattr(trainers.AdapterTrainer, "_load_best_model", damaged)
    with pytest.raises(StorageError, match=r"The adapter of the best evaluation, checkpoint-\d+\.corrupt, is lost"):
        fit(tmp_path / "run", folder, rows, held_out, steps=4, eval_steps=2, batch_size=4)


def test_a_rate_that_was_allowed_to_change_is_the_one_that_is_used(tmp_path, folder):
    stopped(tmp_path / "run", folder, schedule="linear", weight_decay=0.0)
    seen = []

    class Look(train.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            group = kwargs["optimizer"].param_groups[0]
            seen.append((group["lr"], group["weight_decay"]))

    settings = {"steps": 6, "batch_size": 4, "lr": 5e-3, "weight_decay": 0.1}
    fit(tmp_path / "run", folder, tiny.rows("complete", 12), resume=True, callbacks=[Look()], **settings)
    assert [lr for lr, _ in seen] == pytest.approx([5e-3 * (6 - step) / 6 for step in (3, 4, 5)])
    assert {decay for _, decay in seen} == {0.1}


class PlainTrainer(checkpoints.Checkpoints, exact.ExactSteps, Trainer):
    """transformers' own Trainer, with nothing of this library but its checkpoints and exact steps."""


def plain(folder: Path, out: Path, lr: float = 1e-2, eval_dataset=None, **settings) -> PlainTrainer:
    task, _, model = prepared(folder, dropout=0.2)
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, save_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, learning_rate=lr, save_total_limit=2, **settings,
    )  # fmt: skip
    return PlainTrainer(
        model=model,
        args=arguments,
        train_dataset=train.Rows(tiny.rows("complete", 14)),
        data_collator=task.collate,
        eval_dataset=eval_dataset,
    )


def test_any_trainer_can_have_these_checkpoints(tmp_path, folder):
    whole = plain(folder, tmp_path / "whole")
    whole.train()
    cut = plain(folder, tmp_path / "cut")
    cut.add_callback(StopAt(2, signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(InterruptedError))
    try:
        with pytest.raises(InterruptedError):
            cut.train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    again = plain(folder, tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert again.fingerprint == whole.fingerprint != ""
    assert [path.name for path in checkpoints.found(tmp_path / "cut")] == ["checkpoint-4", "checkpoint-5"]
    files = {path.name for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    again.save_model(str(tmp_path / "saved"))
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


def test_a_model_saved_after_a_save_that_failed_has_the_weights_of_now(tmp_path, folder, monkeypatch):
    trainer = plain(folder, tmp_path / "run")
    trainer.processing_class = tiny.tokenizer()

    class NoMove(atomicio.Disk):
        def rename(self, old, new):
            if old.parent.name == "staged-model":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(atomicio, "disk", NoMove())
        with pytest.raises(StorageError, match="No space left"):
            trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        for parameter in adapters.trained(trainer.model).values():
            parameter.add_(1.0)
    trainer.save_model(str(tmp_path / "saved"))
    found, now = load_file(tmp_path / "saved" / "adapter_model.safetensors"), get_peft_model_state_dict(trainer.model)
    assert same(found, now)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert "staged-model" not in names


def test_a_new_run_does_not_mix_its_checkpoints_with_another(tmp_path, folder):
    stopped(tmp_path / "run", folder)
    with pytest.raises(ConfigError, match="holds the checkpoints of a run: resume it, or choose another folder"):
        fit(tmp_path / "run", folder, tiny.rows("complete", 12), steps=2)


@pytest.mark.parametrize("hook", [*checkpoints.HOOKS, *exact.HOOKS])
def test_a_transformers_that_would_pass_a_mixin_by_is_refused(tmp_path, folder, monkeypatch, hook):
    trainer = plain(folder, tmp_path)
    monkeypatch.delattr(Trainer, hook)
    with pytest.raises(LoraFtError, match=f"has no Trainer.{hook}, without which steps are neither guarded nor"):
        trainer.train()


def test_the_stock_trainer_pickles_which_is_what_the_mixin_is_for(tmp_path, folder):
    trainer = plain(folder, tmp_path / "stock")
    trainer.create_optimizer_and_scheduler(5)
    Trainer._save_optimizer_and_scheduler(trainer, str(tmp_path))
    assert (tmp_path / "optimizer.pt").is_file()


def test_fingerprints_of_two_runs_differ_from_the_first_step_that_does(tmp_path, folder):
    rows = tiny.rows("complete", 12)
    fit(tmp_path / "a", folder, rows, steps=4, batch_size=4)
    other = [dict(row) for row in rows]
    last = exact.EpochOrder(12, 42, lambda: 0).of(0)[-1]  # read in the third step
    other[last] = {**other[last], "labels": [-100] * (len(other[last]["labels"]) - 1) + [7]}
    fit(tmp_path / "b", folder, other, steps=4, batch_size=4)
    a, b = fingerprints(tmp_path / "a"), fingerprints(tmp_path / "b")
    assert a[:2] == b[:2]
    assert not set(a[2:]) & set(b[2:])
