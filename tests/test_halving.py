"""Where the memory does not suffice, a step is made in parts, and what is learned is the same."""

import logging

import pytest
import torch
from transformers import TrainerCallback

from lora_ft import adapters, tasks
from lora_ft.errors import OutOfMemoryError
from lora_ft.scoring import losses
from lora_ft.system import devices
from lora_ft.tasks.causal import Causal
from lora_ft.tasks.classify import Classify
from lora_ft.training import halving
from tests import tiny
from tests.test_train import fit, folder, prepared, same, uneven_rows

__all__ = ["folder"]
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Memory:
    """Lets no pass have more than so many tokens: those that have more fail half way through the backward pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, error: type[Exception] = torch.OutOfMemoryError):
        self.room, self.error, self.passes = room, error, []
        self.loss = Causal.loss
        monkeypatch.setattr(Causal, "loss", lambda task, model, batch: self._loss(task, model, batch))

    def _loss(self, task, model, batch):
        found = self.loss(task, model, batch)
        self.passes.append(tasks.tokens(batch))
        if self.passes[-1] > self.room:
            # Of the first layer, whose gradient comes last.
            first = next(iter(adapters.trained(model).values()))

            def fail(_):
                handle.remove()
                raise self.error(FULL)

            handle = first.register_hook(fail)
        return found


@pytest.fixture(name="rows")
def _rows() -> list[tasks.Features]:
    return uneven_rows(16)


def tokens(rows) -> int:
    return sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2)])
def test_the_steps_are_those_of_enough_memory(tmp_path, folder, rows, batch, accumulate, monkeypatch, caplog):
    settings = {"batch_size": batch, "accumulate": accumulate, "steps": 4, "lr": 1e-3}
    enough, wanted = fit(tmp_path / "enough", folder, rows, **settings)
    longest = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    memory = Memory(monkeypatch, room=sum(longest[: batch // 2]))
    with caplog.at_level(logging.WARNING, "lora_ft"):
        done, found = fit(tmp_path / "little", folder, rows, **settings)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert (done.steps, done.tokens) == (enough.steps, enough.tokens)
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    told = "out of memory with {} rows in a pass: each batch is made in 2 passes from here on, for the same gradient"
    assert said == [told.format(batch)]
    # It was seen before the first step, with the longest rows.
    assert memory.passes[0] == sum(longest[:batch])
    assert max(memory.passes[1:]) <= memory.room


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_that_is_too_large_only_later(tmp_path, folder, rows, accumulate, monkeypatch):
    settings = {"batch_size": 4, "accumulate": accumulate, "steps": 3, "lr": 1e-3}
    _, wanted = fit(tmp_path / "enough", folder, rows, **settings)
    memory = Memory(monkeypatch, room=tokens(rows))
    # The memory is used up by something else after the trial and two passes.
    loss = memory._loss
    monkeypatch.setattr(
        memory,
        "_loss",
        lambda *given: (setattr(memory, "room", 30) if len(memory.passes) == 3 else None, loss(*given))[1],
    )
    monkeypatch.setattr(Causal, "loss", lambda *given: memory._loss(*given))
    done, found = fit(tmp_path / "little", folder, rows, **settings)
    assert done.steps == 3
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_run_is_made_in_as_many_parts(tmp_path, folder, rows, monkeypatch):
    settings = {"batch_size": 8, "steps": 4, "lr": 1e-3, "save_steps": 2}
    Memory(monkeypatch, room=tokens(rows) // 4)
    _, whole = fit(tmp_path / "whole", folder, rows, **settings)
    first = {**settings, "steps": 4}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_training_stop or state.global_step == 2

    fit(tmp_path / "parts", folder, rows, callbacks=[Stop()], **first)
    monkeypatch.undo()  # where it is gone on with, there is room enough
    _, gone_on = fit(tmp_path / "parts", folder, rows, resume=True, **settings)
    assert same(whole, gone_on)


def test_a_single_row_that_does_not_fit_is_said_so(tmp_path, folder, rows, monkeypatch):
    Memory(monkeypatch, room=2)
    longest = max(len(row["input_ids"]) for row in rows)
    with pytest.raises(
        OutOfMemoryError, match=rf"One row of {longest} tokens alone does not fit the memory: shorten rows"
    ):
        fit(tmp_path / "run", folder, rows, batch_size=4, steps=1)


def test_other_errors_are_not_taken_for_it(tmp_path, folder, rows, monkeypatch):
    memory = Memory(monkeypatch, room=2, error=RuntimeError)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        fit(tmp_path / "run", folder, rows, batch_size=4, steps=1)
    assert len(memory.passes) == 1


def test_a_processor_says_it_in_words():
    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    assert devices.is_out_of_memory(RuntimeError(said))
    assert devices.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert devices.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not devices.is_out_of_memory(RuntimeError("expected scalar type Float"))


def test_an_evaluation_goes_on_with_fewer_rows(folder, rows, monkeypatch, caplog):
    task, _, model = prepared(folder)
    wanted, whole, sizes = losses.of_rows(task, model, rows, 8), losses.row_losses, []

    def little(task, model, batch):
        sizes.append(len(batch["labels"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError(FULL)
        return whole(task, model, batch)

    monkeypatch.setattr(losses, "row_losses", little)
    found = losses.of_rows(task, model, rows, 8)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-5)
    assert (found.count == wanted.count).all()
    assert sizes == [8, 4, *[2] * 8]
    monkeypatch.setattr(losses, "row_losses", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError(FULL)))
    with pytest.raises(torch.OutOfMemoryError):
        losses.of_rows(task, model, rows, 2)


# Parts of batches


def rejoined(task, rows, parts: int, end_to_end: bool) -> list[list[int]]:
    make = task.end_to_end if end_to_end else task.collate
    return [
        ids[: len(ids) if end_to_end else int(mask.sum())].tolist()
        for part in halving.split(make(rows), parts)
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=False)
    ]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_parts_hold_all_rows_in_their_order(rows, parts):
    task = tasks.get("complete")
    task.tokenizer = tiny.tokenizer()
    five = rows[:5]
    assert rejoined(task, five, parts, end_to_end=False) == [row["input_ids"] for row in five]
    whole = [i for row in five for i in row["input_ids"]]
    assert [i for part in rejoined(task, five, parts, end_to_end=True) for i in part] == whole
    for batch in (task.collate(five), task.end_to_end(five)):
        made = list(halving.split(batch, parts))
        assert sum(map(halving.rows, made)) == halving.rows(batch) == 5
        assert max(map(halving.rows, made)) == -(-5 // parts)
        assert all(part.keys() == batch.keys() for part in made)
    (first, *_) = halving.split(task.end_to_end(five), 5)
    assert first["position_ids"].tolist() == [list(range(len(five[0]["input_ids"])))]


def test_labels_of_rows_go_with_them():
    task = Classify(tiny.LABELS)
    task.tokenizer = tiny.tokenizer()
    batch = task.collate(tiny.rows("classify", 4))
    parts = list(halving.split(batch, 2))
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])
    assert [len(part["labels"]) for part in parts] == [2, 2]
