"""Steps that are not finite: skipped, told with their rows, and three in a row the end of the run."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from lora_ft import train
from lora_ft.errors import DivergedError
from lora_ft.training import guard, trainers
from tests import tiny
from tests.test_train import fit, same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def broken(monkeypatch, steps, value=math.nan, where="loss"):
    """Makes the loss, or a gradient, of the steps given, counted from 1, something that is not finite."""
    real = trainers.AdapterTrainer.compute_loss

    def compute(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 not in steps:
            return loss
        if where == "gradient":
            loss.register_hook(lambda gradient: gradient * value)
            return loss
        return loss * value

    monkeypatch.setattr(trainers.AdapterTrainer, "compute_loss", compute)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("value", "where"), [(math.nan, "loss"), (math.inf, "loss"), (math.nan, "gradient")])
def test_a_step_that_is_not_finite_is_skipped_and_told_with_its_rows(
    tmp_path, folder, monkeypatch, caplog, value, where
):
    rows = tiny.rows("complete", 12)
    broken(monkeypatch, {2}, value, where)
    names = [f"rows.jsonl:{i + 1}" for i in range(12)]
    done, weights = fit(tmp_path / "run", folder, rows, steps=4, batch_size=2, row_names=names)
    assert done.steps == 4
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    (event,) = [line for line in lines(tmp_path / "run") if "event" in line]
    assert (event["step"], event["event"]) == (2, "step skipped")
    assert event["reason"] == f"the {where} is not a number"
    assert len(event["rows"]) == 2
    told = ", ".join(f"rows.jsonl:{row + 1}" for row in event["rows"])
    assert f"step 2 was skipped, the {where} is not a number: it was made of {told}" in caplog.text
    logged = {line["step"]: line["loss"] for line in lines(tmp_path / "run") if "loss" in line}
    assert logged[2] is None  # JSON has no word for it, and a mean of others would hide it
    assert all(logged[step] > 0 for step in (1, 3, 4))


def test_a_skipped_step_leaves_the_adapter_and_its_momentum_alone(tmp_path, folder, monkeypatch):
    seen = []

    class Look(train.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            optimizer = kwargs["optimizer"]
            seen.append([s["exp_avg"].clone() for s in optimizer.state.values()] + [
                p.detach().clone() for group in optimizer.param_groups for p in group["params"]
            ])  # fmt: skip

    broken(monkeypatch, {2})
    fit(tmp_path / "run", folder, tiny.rows("complete", 12), steps=3, batch_size=2, callbacks=[Look()])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))


def test_without_the_guard_one_step_would_spoil_the_adapter(tmp_path, folder, monkeypatch):
    broken(monkeypatch, {2})
    monkeypatch.setattr(trainers.AdapterTrainer, "_reason", lambda self, norm: None)
    _, weights = fit(tmp_path / "run", folder, tiny.rows("complete", 12), steps=3, batch_size=2)
    assert not all(torch.isfinite(weight).all() for weight in weights.values())


def test_only_the_micro_step_that_broke_is_named(tmp_path, folder, monkeypatch):
    rows = tiny.rows("complete", 12)
    real, calls = trainers.AdapterTrainer.compute_loss, []

    def compute(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(trainers.AdapterTrainer, "compute_loss", compute)
    fit(tmp_path / "run", folder, rows, steps=2, batch_size=2, accumulate=3)
    (event,) = [line for line in lines(tmp_path / "run") if "event" in line]
    assert len(event["rows"]) == 2


def test_three_in_a_row_stop_the_run_and_bring_the_last_good_adapter_back(tmp_path, folder, monkeypatch):
    rows = tiny.rows("complete", 12)
    _, good = fit(tmp_path / "good", folder, rows, steps=2, batch_size=2, schedule="constant")
    broken(monkeypatch, {2, 4, 5, 6})
    kept = {}
    back = trainers.AdapterTrainer.back_to_last_good

    def remember(self):
        step = back(self)
        kept.update({n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad})
        return step

    monkeypatch.setattr(trainers.AdapterTrainer, "back_to_last_good", remember)
    settings = {"steps": 9, "batch_size": 2, "schedule": "constant"}
    with pytest.raises(DivergedError) as caught:
        fit(tmp_path / "run", folder, rows, save_steps=1, **settings)
    told = str(caught.value)
    assert "Stopped at step 6: the loss is not a number, in 3 steps in a row" in told
    assert "--train.lr" in told
    assert "The adapter is that of step 5 again" in told  # skipped steps are saved, and leave it as it was
    assert caught.value.exit_status == 1
    assert kept.keys() == good.keys()
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert not same(kept, good)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path, folder, monkeypatch):
    broken(monkeypatch, {1, 2, 3})
    with pytest.raises(DivergedError, match="No checkpoint had been saved: start anew"):
        fit(tmp_path / "run", folder, tiny.rows("complete", 12), steps=5, batch_size=2)


def test_a_batch_without_a_scored_position_is_no_division_by_zero(tmp_path, folder):
    rows = tiny.rows("complete", 8)
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[:4]]
    done, weights = fit(tmp_path / "run", folder, [*masked, *rows[4:]], epochs=3, batch_size=1)
    assert done.steps == 24
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    events = [line for line in lines(tmp_path / "run") if "event" in line]
    assert {line["reason"] for line in events} == {"no position is scored"}
    assert sorted(row for line in events for row in line["rows"]) == sorted([0, 1, 2, 3] * 3)


def test_what_the_scaler_of_float16_skips_is_left_to_it():
    class Trainer(guard.GuardedSteps):
        step_losses = (torch.tensor(1.0),)
        step_items = torch.tensor(4)

        class accelerator:  # noqa: N801
            scaler = object()

    trainer = Trainer()
    assert trainer._reason(torch.tensor(math.inf)) is None
    Trainer.accelerator.scaler = None
    assert trainer._reason(torch.tensor(math.inf)) == "the gradient is not a number"
    trainer.step_losses = (torch.tensor(math.nan),)
    Trainer.accelerator.scaler = object()
    assert trainer._reason(torch.tensor(math.nan)) == "the loss is not a number"


def test_a_mean_over_a_skipped_step_is_that_of_the_others(tmp_path, folder, monkeypatch):
    rows = tiny.rows("complete", 12)
    fit(tmp_path / "each", folder, rows, steps=2, batch_size=2, lr=1e-12)
    broken(monkeypatch, {2})
    fit(tmp_path / "mean", folder, rows, steps=2, batch_size=2, log_steps=2, lr=1e-12)
    first = next(line["loss"] for line in lines(tmp_path / "each") if line["step"] == 1)
    (mean,) = [line["loss"] for line in lines(tmp_path / "mean") if "loss" in line]
    assert mean == pytest.approx(first, rel=1e-6)


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, logger="lora_ft")
