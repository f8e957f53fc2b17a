"""Randomness by place: orders, seeds, fingerprints; and resumed runs that are the run in one piece."""

import itertools
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from lora_ft import checkpoints, train
from lora_ft.errors import ConfigError
from lora_ft.training import exact, trainers
from lora_ft.training.watch import Clock
from lora_kernels import new_seed
from tests import tiny
from tests.reliability.forks import fingerprints
from tests.test_checkpoints import PlainTrainer
from tests.test_train import StopAt, fit, prepared, same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def test_each_epoch_has_an_order_of_its_own_that_comes_back():
    order = exact.EpochOrder(50, 7, lambda: 2)
    assert sorted(order) == list(range(50))
    assert list(order) == order.of(2) == exact.EpochOrder(50, 7, lambda: 0).of(2)
    assert len({tuple(order.of(epoch)) for epoch in range(4)}) == 4
    assert order.of(2) != exact.EpochOrder(50, 8, lambda: 2).of(2)


def test_seeds_differ_by_every_number_of_a_place():
    seeds = {exact.seed_of(seed, step, micro) for seed in range(5) for step in range(20) for micro in range(5)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_covers_all_that_draws_the_seeds_of_fused_dropout_too():
    def draws():
        return [random.random(), np.random.rand(), torch.rand(1).item(), new_seed()]

    exact.reseed(5)
    first = draws()
    exact.reseed(5)
    assert draws() == first
    exact.reseed(6)
    assert not set(draws()) & set(first)


def test_one_bit_of_one_tensor_changes_the_checksum():
    parameters = {name: torch.nn.Parameter(torch.randn(3, 5)) for name in "ab"}
    parameters["c"] = torch.nn.Parameter(torch.randn(4).bfloat16())
    before = exact.checksum(parameters)
    assert exact.checksum(dict(reversed(parameters.items()))) == before
    for parameter in parameters.values():
        bits = parameter.data.view(torch.int32 if parameter.element_size() == 4 else torch.int16)
        bits.view(-1)[1] ^= 1
        assert exact.checksum(parameters) != before
        bits.view(-1)[1] ^= 1
    assert exact.checksum(parameters) == before


class Read(TrainerCallback):
    """Notes the rows that each micro step reads, and the numbers that the trainer says they have."""

    def __init__(self) -> None:
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        clock = next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, Clock))
        assert clock.trainer is self.trainer
        for micro in range(len(self.trainer.step_losses)):
            self.seen.append(self.trainer.rows_of(state.global_step - 1, micro))


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 1), (3, 2), (2, 4)])
def test_the_rows_of_a_step_are_those_it_reads(tmp_path, folder, monkeypatch, batch, accumulate):
    rows, read, told = tiny.rows("complete", 11), Read(), []
    number = {id(row["input_ids"]): i for i, row in enumerate(rows)}
    init = trainers.AdapterTrainer.__init__

    def remember(self, task, *args, **kwargs):
        collate = kwargs["data_collator"]

        def noted(batch):
            told.append([number[id(row["input_ids"])] for row in batch])
            return collate(batch)

        init(self, task, *args, **{**kwargs, "data_collator": noted})
        read.trainer = self

    monkeypatch.setattr(trainers.AdapterTrainer, "__init__", remember)
    fit(tmp_path / "run", folder, rows, epochs=2, batch_size=batch, accumulate=accumulate, callbacks=[read])
    assert read.seen == told
    assert sorted(row for seen in told[: len(told) // 2] for row in seen) == list(range(11))
    assert told[: len(told) // 2] != told[len(told) // 2 :]


ORDERS = [
    {"dataloader_drop_last": True},
    {"train_sampling_strategy": "group_by_length"},
    {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True},
    {"train_sampling_strategy": "sequential"},
]


@pytest.mark.parametrize("settings", ORDERS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_any_order_of_transformers_is_exact_and_its_rows_are_told(tmp_path, folder, settings):
    rows, numbers = tiny.rows("complete", 11), {}
    numbers = {id(row["input_ids"]): i for i, row in enumerate(rows)}
    read: list[list[int]] = []

    def made(out: Path, **more):
        task, _, model = prepared(folder, dropout=0.3)

        def collate(batch):
            read.append([numbers[id(row["input_ids"])] for row in batch])
            return task.collate(batch)

        arguments = TrainingArguments(
            str(out), per_device_train_batch_size=3, num_train_epochs=4, save_steps=1, use_cpu=True, report_to="none",
            disable_tqdm=True, learning_rate=1e-2, **settings,
        )  # fmt: skip
        return PlainTrainer(model=model, args=arguments, train_dataset=train.Rows(rows), data_collator=collate, **more)

    whole = made(tmp_path / "whole")
    whole.train()
    steps, each = whole.state.global_step, 3 if "dataloader_drop_last" in settings else 4
    assert steps == 4 * each
    assert read == [whole.rows_of(step, 0) for step in range(steps)]
    epochs = [read[i : i + each] for i in range(0, steps, each)]
    assert all(len(seen) == len(set(seen)) for seen in (list(itertools.chain(*epoch)) for epoch in epochs))
    if settings.get("train_sampling_strategy") != "sequential":
        assert len({str(epoch) for epoch in epochs}) == 4
    for stop in (1, each - 1, each, each + 1):  # steps made, and saved, before the one it dies in
        cut = made(tmp_path / f"cut-{stop}", callbacks=[Die(stop)])
        with pytest.raises(InterruptedError):
            cut.train()
        torch.manual_seed(999)
        again = made(tmp_path / f"cut-{stop}")
        again.train(resume_from_checkpoint=True)
        assert again.fingerprint == whole.fingerprint != ""


class Die(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise InterruptedError


def test_an_order_that_could_not_be_had_again_is_refused_by_name(tmp_path, folder):
    task, _, model = prepared(folder)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", train_sampling_strategy="batch_rebalance"
    )
    rows = train.Rows(tiny.rows("complete", 11))
    trainer = PlainTrainer(model=model, args=arguments, train_dataset=rows, data_collator=task.collate)
    with pytest.raises(ConfigError, match=r"Sampler orders the rows, .* use the train_sampling_strategy random, seq"):
        trainer.train()


STOPS = [(1, 4), (4, 1), (4, 2)]


@pytest.mark.parametrize(("accumulate", "stop"), STOPS)
def test_a_resumed_run_has_the_fingerprints_of_the_whole_one(tmp_path, folder, accumulate, stop):
    rows = tiny.rows("complete", 14)
    settings = {"epochs": 2, "batch_size": 2, "accumulate": accumulate, "log_steps": 3, "lora": {"dropout": 0.3}}
    whole, weights = fit(tmp_path / "whole", folder, rows, **settings)
    fit(tmp_path / "run", folder, rows, callbacks=[StopAt(stop, signal.SIGINT)], **settings)
    torch.manual_seed(999)  # where the generators stand does not matter
    again, resumed = fit(tmp_path / "run", folder, rows, resume=True, **settings)
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")
    assert fingerprints(tmp_path / "run")[-1][0] == whole.steps
    assert same(resumed, weights)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert (again.steps, again.tokens) == (whole.steps, whole.tokens)


def losses(out):
    """Returns the losses in the metrics, which are means over the steps since the line before."""
    return [json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", ["order", "dropout"])
def test_a_run_whose_order_or_dropout_depended_on_history_would_be_told(tmp_path, folder, monkeypatch, what):
    rows = tiny.rows("complete", 14)
    settings = {"epochs": 2, "batch_size": 2, "lora": {"dropout": 0.3}}
    drawn: list[int] = []

    def draw() -> int:
        drawn.append(1)
        return len(drawn)

    if what == "order":
        monkeypatch.setattr(exact.EpochOrder, "of", lambda self, epoch: shuffled(self.count, draw()))
    else:
        monkeypatch.setattr(exact, "reseed", lambda seed: torch.manual_seed(draw()))
    fit(tmp_path / "whole", folder, rows, **settings)
    drawn.clear()
    fit(tmp_path / "run", folder, rows, callbacks=[StopAt(9, signal.SIGINT)], **settings)
    drawn.clear()
    fit(tmp_path / "run", folder, rows, resume=True, **settings)
    whole, run = fingerprints(tmp_path / "whole"), fingerprints(tmp_path / "run")
    assert run[:10] == whole[:10]
    assert not set(run[10:]) & set(whole[10:])


def shuffled(count, seed):
    return random.Random(seed).sample(range(count), count)


def test_early_stopping_counts_on_and_the_best_is_kept_over_an_interrupt(tmp_path, folder):
    rows, held_out = tiny.rows("complete", 8), tiny.rows("complete", 6, seed=9)
    settings = {"steps": 40, "eval_steps": 4, "patience": 2, "batch_size": 4, "lr": 3e-2}
    whole, weights = fit(tmp_path / "whole", folder, rows, held_out, **settings)
    assert whole.steps < 40
    # After the first of the two evaluations that were no better.
    stop = StopAt(whole.steps - 3, signal.SIGTERM)
    stopped, _ = fit(tmp_path / "run", folder, rows, held_out, callbacks=[stop], **settings)
    assert stopped.interrupted
    resumed, again = fit(tmp_path / "run", folder, rows, held_out, resume=True, **settings)
    assert resumed.steps == whole.steps
    assert same(again, weights)
    # Resumed after it was done, it makes no step more.
    last, same_again = fit(tmp_path / "run", folder, rows, held_out, resume=True, **settings)
    assert last.steps == whole.steps
    assert same(same_again, weights)


class StopInEvaluation(TrainerCallback):
    """Sends a signal once the held-out rows are read."""

    def __init__(self, monkeypatch, times: int = 1) -> None:
        real = trainers.losses.of_rows

        def stopped(*args, **kwargs):
            if self.times > 0:
                self.times -= 1
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        self.times = times
        monkeypatch.setattr(trainers.losses, "of_rows", stopped)


def test_a_signal_in_an_evaluation_ends_it_and_the_resumed_run_makes_it_first(tmp_path, folder, monkeypatch):
    rows, held_out = tiny.rows("complete", 8), tiny.rows("complete", 6, seed=9)
    settings = {"steps": 6, "eval_steps": 3, "batch_size": 4}
    _, weights = fit(tmp_path / "whole", folder, rows, held_out, **settings)
    StopInEvaluation(monkeypatch, times=2)
    for _ in range(2):  # also in the evaluation that was made up for
        resume = (tmp_path / "run").exists()
        stopped, _ = fit(tmp_path / "run", folder, rows, held_out, resume=resume, **settings)
        assert stopped.interrupted
        assert stopped.steps == 3
        (place,) = checkpoints.found(tmp_path / "run" / train.CHECKPOINTS)
        assert json.loads((place / checkpoints.PROGRESS).read_text())["kept"]["evaluation_due"]
    done, again = fit(tmp_path / "run", folder, rows, held_out, resume=True, **settings)
    assert not done.interrupted
    assert same(again, weights)
    evaluated = [
        [line["eval_loss"] for line in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
         if "eval_loss" in line]
        for run in ("run", "whole")
    ]  # fmt: skip
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 2
