"""Several processes train what one does: the same batches, steps, adapter and files, and a run goes on with more."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_ft.cli import main
from lora_ft.training import replicas
from tests import tiny

ROWS = 11
"""With two rows a batch and two processes, the last batch of an epoch is ragged and goes to one of them alone."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("replicas")
    tiny.model_folder(place / "base")
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": " ".join(f"w{j}" for j in range(i % 5 + 1))} for i in range(ROWS)
    ]
    held_out = [{"prompt": f"w{i + 40}", "completion": f"w{i} w{i + 3}"} for i in range(3)]
    for name, part in (("train", rows), ("eval", held_out)):
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    return place


def options(place: Path, out: str, *more: str) -> list[str]:
    """Returns the command of a run in float32 with dropout, whose masks must not depend on who makes a pass."""
    return [
        "train", "complete", "--base", str(place / "base"), "--out", str(place / out), "--quant", "none",
        "--data.train", str(place / "train.jsonl"), "--data.eval", str(place / "eval.jsonl"), "--train.eval-steps", "3",
        "--train.dtype", "float32", "--train.batch-size", "2", "--train.epochs", "3", "--train.lr", "5e-3",
        "--train.save-steps", "3", "--lora.rank", "4", "--lora.dropout", "0.1", *more,
    ]  # fmt: skip


def launched(command: list[str], processes: int = 2) -> subprocess.Popen:
    """Starts a command in several processes, as a user would."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    quiet = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*torchrun, "-m", "lora_ft.cli", *command], env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done(process: subprocess.Popen) -> str:
    said, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    return said


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def require_same(one: Path, other: Path) -> None:
    """Requires the same steps and evaluations, and the same adapter, within what sums in another order round."""
    assert len(lines(one)) == len(lines(other))
    for before, after in zip(lines(one), lines(other), strict=True):
        for key in ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens"):
            assert (key in before) == (key in after)
            if key in before:
                assert after[key] == pytest.approx(before[key], rel=1e-5), (before, after)
    adapter, again = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert adapter.keys() == again.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-6)


def test_two_processes_train_what_one_does_with_twice_as_many_passes(place):
    packing = ["--data.packing", "--data.max-length", "16"]
    assert main(options(place, "one", "--train.accumulate", "2", *packing)) == 0
    said = done(launched(options(place, "two", *packing)))
    assert said.count("tokens/s") == 1  # by the first process alone
    require_same(place / "one", place / "two")
    assert {path.name for path in (place / "one").iterdir()} == {path.name for path in (place / "two").iterdir()}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """Returns the folder of a run that one process made, with two passes a step."""
    assert main(options(place, "whole", "--train.accumulate", "2")) == 0
    return place / "whole"


def test_a_base_spread_over_two_processes_trains_as_a_whole_one(place, whole):
    process = launched(options(place, "spread", "--train.shard-base", "--train.checkpoint-activations"))
    said, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    held, of = map(float, re.search(r"spread over 2 processes: ([\d.]+) of ([\d.]+) MiB", told).groups())
    # Its layers are; embeddings, which are a fifth of this base, and the adapter are not.
    assert 0.4 * of < held < 0.75 * of
    require_same(whole, place / "spread")
    assert "loaded anew and verified" in said


def test_a_packed_base_is_not_spread(place, capsys):
    with pytest.raises(SystemExit):
        main(options(place, "packed", "--train.shard-base", "--quant", "nf4"))
    assert "use --quant none" in " ".join(capsys.readouterr().err.split())


def test_a_run_stopped_with_one_process_goes_on_with_two(place, whole, monkeypatch):
    from lora_ft.training import trainers

    out = place / "more"
    # As a signal would, but at a step that is known.
    save = trainers.AdapterTrainer._save_checkpoint

    def stopping(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        if trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainers.AdapterTrainer, "_save_checkpoint", stopping)
    assert main(options(place, "more", "--train.accumulate", "2")) == 130
    monkeypatch.undo()
    done(launched(options(place, "more", "--resume")))
    require_same(whole, out)


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_after_the_same_step_and_one_goes_on(place, whole):
    process = launched(options(place, "stopped", "--train.log-steps", "1"))
    metrics = place / "stopped" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    if not (place / "stopped" / "environment.json").is_file():  # else the signal came after the last step
        assert main(options(place, "stopped", "--resume", "--train.accumulate", "2")) == 0
    require_same(whole, place / "stopped")


@pytest.mark.slow
def test_a_problem_is_said_once_and_ends_all(place):
    process = launched(options(place, "wrong", "--data.train", str(place / "none.jsonl")))
    _, problems = process.communicate(timeout=300)
    assert process.returncode != 0
    assert problems.count("none.jsonl") == 1
    assert "[rank" not in problems  # a traceback of one of them


def test_sharding_by_others_or_over_one_process_is_refused(place, monkeypatch, capsys):
    assert main(options(place, "alone", "--train.shard-base")) == 2
    assert "several processes" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(options(place, "sharded")) == 2
    assert "FSDP" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [[5, -100, 7], 2, [0.5, 1.0]])
def test_a_row_that_only_fills_a_place_has_no_labels(labels):
    row = replicas.without_labels({"input_ids": [1, 2, 3], "labels": labels})
    assert row == {"input_ids": [1, 2, 3], "labels": [-100] * len(labels) if isinstance(labels, list) else -100}


@pytest.mark.parametrize("rows", range(1, 12))
def test_all_processes_make_as_many_passes_and_every_row_is_in_one(rows, monkeypatch):
    dealt: list[list[list[int]]] = []
    monkeypatch.setattr(replicas.processes, "count", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(replicas.processes, "rank", lambda rank=rank: rank)
        batches = torch.utils.data.BatchSampler(range(rows), 2, drop_last=False)
        share = replicas.Share(batches, rows)
        dealt.append(list(share))
        assert len(dealt[-1]) == len(share)
    assert len({len(batches) for batches in dealt}) == 1
    seen = [row for batches in dealt for batch in batches for row in batch]
    assert sorted(row for row in seen if row < rows) == list(range(rows))


def test_the_shares_of_a_stream_are_the_batches_of_the_stream(monkeypatch):
    monkeypatch.setattr(replicas.processes, "count", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(replicas.processes, "rank", lambda rank=rank: rank)
        shares.append(list(replicas.SharedStream(range(10), 2)))  # type: ignore[arg-type]
    assert shares == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]
