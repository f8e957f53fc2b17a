"""Training: the gradient of the global batch, seeds, proofs, checkpoints, signals; on a tiny random Llama."""

import json
import math
import os
import signal
from pathlib import Path

import peft
import pytest
import torch
from transformers import TrainerCallback

from lora_ft import adapters, base, checkpoints, tasks, train
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.errors import AdapterError, ProofError, UnsupportedModelError
from lora_ft.scoring import losses
from lora_ft.system import atomicio, manifest
from lora_ft.training import frozen, logged, trainers
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def prepared(
    folder: Path, *, seed: int = 42, quant: str = "none", dtype="float32", **lora
) -> tuple[tasks.Task, base.Base, peft.PeftModel]:
    task = tasks.get("complete")
    loaded = base.load(str(folder), quant=quant, dtype=dtype, device="cpu")
    task.prepare(loaded.tokenizer, 64)
    settings = LoraConfig(**{"rank": 4, "alpha": 16.0, **lora})
    return task, loaded, adapters.attach(loaded, settings, peft_task=task.peft_task, seed=seed)


def fit(
    out: Path,
    folder: Path,
    rows,
    eval_rows=(),
    *,
    lora=None,
    quant="none",
    callbacks=(),
    resume=False,
    row_names=(),
    **settings,
):
    """Returns what training did, and the weights of the adapter after it."""
    settings = {"lr": 1e-2, "warmup": 0.0, "dtype": "float32", **settings}
    task, loaded, model = prepared(
        folder, seed=settings.get("seed", 42), quant=quant, dtype=settings["dtype"], **(lora or {})
    )
    config = RunConfig(
        task="complete",
        base=str(folder),
        out=out,
        quant=quant,
        lora=LoraConfig(**{"rank": 4, "alpha": 16.0, **(lora or {})}),
        data=DataConfig(),
        train=TrainConfig(**settings),
        resume=resume,
    )
    done = train.fit(task, loaded, model, rows, list(eval_rows), config, callbacks, row_names)
    return done, {name: p.detach().clone() for name, p in adapters.trained(model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def uneven_rows(count: int = 8) -> list[tasks.Features]:
    """Rows with very different numbers of labels, which a mean of means would weight wrongly."""
    rows = tiny.rows("complete", count, seed=3)
    for i, row in enumerate(rows):
        if i % 2:
            row["labels"] = [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]
    return rows


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 8), (2, 4), (4, 2)])
def test_accumulating_gives_the_step_of_the_big_batch(tmp_path, folder, batch, accumulate):
    rows = uneven_rows()
    _, big = fit(tmp_path / "big", folder, rows, batch_size=8, steps=2, lr=1e-3)
    _, small = fit(tmp_path / "small", folder, rows, batch_size=batch, accumulate=accumulate, steps=2, lr=1e-3)
    for name, value in big.items():
        torch.testing.assert_close(small[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_a_mean_of_means_would_be_another_step(tmp_path, folder, monkeypatch):
    rows = uneven_rows()
    _, big = fit(tmp_path / "big", folder, rows, batch_size=8, steps=2, lr=1e-3)
    right = trainers.TaskLoss.compute_loss
    monkeypatch.setattr(
        trainers.TaskLoss, "compute_loss", lambda self, model, inputs, *_, **__: right(self, model, inputs) / 8
    )
    _, wrong = fit(tmp_path / "wrong", folder, rows, batch_size=1, accumulate=8, steps=2, lr=1e-3)
    assert any(not torch.allclose(wrong[name], big[name], rtol=1e-2, atol=1e-5) for name in big)


def test_the_loss_of_rows_does_not_depend_on_how_they_are_batched(folder):
    task, _, model = prepared(folder)
    rows = uneven_rows(7)
    one, seven = losses.of_rows(task, model, rows, 1), losses.of_rows(task, model, rows, 7)
    assert one.count.sum() == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert one.mean == pytest.approx(seven.mean, abs=1e-5)
    assert list(one.nll) == pytest.approx(list(seven.nll), abs=1e-4)


def test_the_loss_is_that_of_the_plain_model(folder):
    task, loaded, model = prepared(folder)
    (row,) = uneven_rows(1)
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.double()
    labels = torch.tensor(row["labels"])
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
    assert losses.of_rows(task, model, [row], 1).nll[0] == pytest.approx(expected.item(), abs=1e-4)


def test_one_seed_is_one_run_and_another_is_another(tmp_path, folder):
    rows = tiny.rows("complete")
    _, first = fit(tmp_path / "a", folder, rows, steps=4, batch_size=4, lora={"dropout": 0.2})
    _, again = fit(tmp_path / "b", folder, rows, steps=4, batch_size=4, lora={"dropout": 0.2})
    _, other = fit(tmp_path / "c", folder, rows, steps=4, batch_size=4, lora={"dropout": 0.2}, seed=7)
    assert same(first, again)
    assert not same(first, other)


def test_the_seed_covers_the_start_of_the_adapter(folder):
    def start(seed: int) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in adapters.trained(prepared(folder, seed=seed)[2]).items()}

    torch.manual_seed(1)
    first = start(5)
    torch.manual_seed(2)
    assert same(first, start(5))
    assert not same(first, start(6))


def test_an_interrupted_run_compares_a_sum_and_the_one_that_goes_on_the_digest(tmp_path, folder, monkeypatch):
    rows, asked, real = tiny.rows("complete"), [], adapters.frozen_digest
    monkeypatch.setattr(adapters, "frozen_digest", lambda model: asked.append(1) or real(model))
    settings = {"steps": 4, "batch_size": 4}
    fit(tmp_path / "run", folder, rows, callbacks=[StopAt(1, signal.SIGINT)], **settings)
    assert len(asked) == 1  # before training; the time after it is the interrupt's

    class Spoil(StopAt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                kwargs["model"].get_input_embeddings().weight.data[3, 5] += 1e-3
            super().on_step_begin(args, state, control, **kwargs)

    with pytest.raises(ProofError, match="A frozen weight of the base changed during training"):
        fit(tmp_path / "spoilt", folder, rows, callbacks=[Spoil(1, signal.SIGINT)], **settings)
    other = tiny.model_folder(tmp_path / "other", seed=1)
    with pytest.raises(ProofError, match="are not those that the run was started on"):
        fit(tmp_path / "run", other, rows, resume=True, **settings)
    fit(tmp_path / "run", folder, rows, resume=True, **settings)
    assert len(asked) == 5


def test_every_change_of_a_frozen_weight_changes_the_sum():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)).requires_grad_(False)
    model.register_buffer("odd", torch.arange(11, dtype=torch.uint8)[1:])
    before = frozen.frozen_sum(model)
    model[1].weight.requires_grad_(True)  # that one is trained
    assert (trained := frozen.frozen_sum(model)) != before
    model[1].weight.data += 1
    assert frozen.frozen_sum(model) == trained
    for tensor in (model[0].weight, model[0].bias, model.odd):
        held = tensor.data.view(torch.uint8).view(-1)
        for at in (0, len(held) - 1):
            held[at] ^= 1
            assert frozen.frozen_sum(model) != trained
            held[at] ^= 1
    assert frozen.frozen_sum(model) == trained


def test_a_quantized_base_is_frozen_and_checked(tmp_path, folder, monkeypatch):
    fit(tmp_path / "good", folder, tiny.rows("complete"), steps=2, quant="nf4")

    class Leak(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            norm = next(m for n, m in kwargs["model"].named_modules() if n.endswith("input_layernorm"))
            norm.weight.data += 1e-3

    with pytest.raises(ProofError, match="frozen weight of the base changed"):
        fit(tmp_path / "bad", folder, tiny.rows("complete"), steps=2, quant="nf4", callbacks=[Leak()])


def test_checkpointed_activations_are_computed_again_and_give_the_same_gradients(tmp_path, folder):
    class Count(TrainerCallback):
        calls = 0

        def on_train_begin(self, args, state, control, **kwargs):
            norm = next(m for n, m in kwargs["model"].named_modules() if n.endswith("layers.0.input_layernorm"))
            norm.register_forward_hook(self.count)

        def count(self, module, inputs, output):
            self.calls += 1

    rows, once, twice = tiny.rows("complete"), Count(), Count()
    settings = {"steps": 3, "batch_size": 4}
    _, kept = fit(tmp_path / "kept", folder, rows, callbacks=[once], **settings)
    _, again = fit(tmp_path / "again", folder, rows, callbacks=[twice], checkpoint_activations=True, **settings)
    # Before the steps the longest batch is tried; two more in each are the probe of the head, which nothing repeats.
    assert (once.calls, twice.calls) == (4 + 2, 8 + 2)
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6, msg=name)


class Cut(TrainerCallback):
    """Lets no gradient through to one adapter."""

    def on_train_begin(self, args, state, control, **kwargs):
        layer = next(m for n, m in kwargs["model"].named_modules() if n.endswith("0.self_attn.q_proj"))
        layer.register_forward_hook(lambda module, inputs, output: output.detach())


def test_an_adapter_that_gets_no_gradient_stops_the_run(tmp_path, folder):
    with pytest.raises(ProofError, match=r"No gradient reaches .*q_proj"):
        fit(tmp_path / "run", folder, tiny.rows("complete"), steps=2, callbacks=[Cut()])


def test_a_resumed_run_proves_its_gradients_too(tmp_path, folder):
    rows = tiny.rows("complete")
    fit(tmp_path / "run", folder, rows, steps=4, callbacks=[StopAt(1, signal.SIGINT)])
    with pytest.raises(ProofError, match=r"No gradient reaches .*q_proj"):
        fit(tmp_path / "run", folder, rows, steps=4, resume=True, callbacks=[Cut()])


def test_lora_plus_trains_b_faster(tmp_path, folder):
    rows = tiny.rows("complete")
    seen = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            names = {id(p): n for n, p in kwargs["model"].named_parameters()}
            for group in kwargs["optimizer"].param_groups:
                for p in group["params"]:
                    seen["B" if "lora_B" in names[id(p)] else "A"] = group["lr"]

    fit(tmp_path / "run", folder, rows, steps=1, lora={"plus_ratio": 16.0}, callbacks=[Look()])
    assert seen["B"] == pytest.approx(16 * seen["A"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_moves_the_base_is_for_linear_layers(folder, init):
    with pytest.raises(AdapterError, match=f"lora.init={init} starts linear layers only"):
        prepared(folder, init=init, targets=("q_proj", "embed_tokens"))


def test_metrics_hold_every_step_with_speed_and_memory(tmp_path, folder):
    done, _ = fit(
        tmp_path / "run", folder, tiny.rows("complete"), tiny.rows("complete", 4, seed=9), steps=4, eval_steps=2
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert all(line["tokens_per_s"] > 0 and line["peak_bytes"] > 1e6 for line in lines)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines if "loss" in line)
    assert done.tokens == lines[-1]["tokens"]
    assert done.steps == 4


def test_the_best_evaluated_adapter_is_the_one_kept(tmp_path, folder):
    rows, held_out = tiny.rows("complete", 8), tiny.rows("complete", 6, seed=9)
    # Few rows at a high rate: they are learned by heart, and the held-out loss falls, then rises.
    task, _, model = prepared(folder)
    settings = {"steps": 40, "eval_steps": 4, "patience": 2, "batch_size": 4, "lr": 3e-2}
    done, weights = fit(tmp_path / "run", folder, rows, held_out, **settings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    model.load_state_dict(weights, strict=False)
    assert losses.of_rows(task, model, held_out, 4).mean == pytest.approx(min(evaluated), rel=1e-4)
    assert done.steps < 40
    # The last two evaluations were no better than the best before them.
    assert min(evaluated[-2:]) >= min(evaluated[:-2])


class StopAt(TrainerCallback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_ends_where_the_whole_run_does(tmp_path, folder, number):
    rows = tiny.rows("complete", 12)
    _, whole = fit(tmp_path / "whole", folder, rows, steps=6, batch_size=4)
    stopped, _ = fit(tmp_path / "run", folder, rows, steps=6, batch_size=4, callbacks=[StopAt(2, number)])
    assert stopped.interrupted
    assert stopped.steps == 3
    resumed, weights = fit(tmp_path / "run", folder, rows, steps=6, batch_size=4, resume=True)
    assert resumed.steps == 6
    assert same(weights, whole)
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]


def test_a_signal_in_the_last_step_leaves_a_finished_training(tmp_path, folder):
    rows = tiny.rows("complete", 12)
    _, whole = fit(tmp_path / "whole", folder, rows, steps=3, batch_size=4)
    done, weights = fit(tmp_path / "run", folder, rows, steps=3, batch_size=4, callbacks=[StopAt(2, signal.SIGINT)])
    assert not done.interrupted
    assert done.steps == 3
    assert same(weights, whole)


def test_a_checkpoint_cut_short_is_left_aside(tmp_path, folder, caplog):
    rows, place = tiny.rows("complete", 12), tmp_path / "run" / train.CHECKPOINTS
    fit(tmp_path / "run", folder, rows, steps=6, save_steps=2, callbacks=[StopAt(4, signal.SIGINT)])
    whole, cut = checkpoints.found(place)[-2:]
    (cut / checkpoints.PROGRESS).unlink()
    assert checkpoints.newest(place) == whole
    assert f"{cut.name} is left aside as {cut.name}.corrupt" in caplog.text
    assert "progress.json is missing" in caplog.text


def test_resuming_without_a_checkpoint_is_refused(tmp_path, folder):
    with pytest.raises(AdapterError, match="no checkpoint to resume from"):
        fit(tmp_path / "run", folder, tiny.rows("complete"), steps=2, resume=True)


def test_a_constant_schedule_still_warms_up_and_steps_bound_the_run(tmp_path, folder):
    done, _ = fit(
        tmp_path / "run", folder, tiny.rows("complete"), steps=4, batch_size=4, schedule="constant", warmup=0.5, lr=1e-3
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 1e-3])
    assert done.steps == 4


def test_a_16_bit_base_trains_a_float32_adapter_step_by_step(tmp_path, folder):
    rows = tiny.rows("complete")
    _, begun = fit(tmp_path / "begun", folder, rows, steps=1, batch_size=4, dtype="bfloat16", lr=1e-9)
    _, weights = fit(tmp_path / "half", folder, rows, steps=12, batch_size=4, dtype="bfloat16")
    _, exact = fit(tmp_path / "float", folder, rows, steps=12, batch_size=4)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    # A learns only once B is no longer zero: a forward that kept using the first B would leave it as it was.
    assert all((weights[name] - begun[name]).abs().max() > 1e-3 for name in weights if "lora_A" in name)
    half, full = (
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("half", "float")
    )
    assert half == pytest.approx(full, rel=0.1)
    assert exact.keys() == weights.keys()


def rewrite(place: Path, name: str, text: str) -> None:
    """Changes a file of a checkpoint, and its manifest with it."""
    with atomicio.draft(place) as draft:
        for file in place.iterdir():
            if file.name not in (name, manifest.NAME):
                draft.copy(file)
        draft.write(name, text)
        atomicio.remove(place)
        draft.commit(place, {"step": checkpoints.step_of(place)})


@pytest.mark.parametrize("log_steps", [1, 4])
def test_a_stopped_run_counts_its_tokens_and_seconds_once(tmp_path, folder, log_steps):
    rows = tiny.rows("complete", 12)
    settings = {"steps": 6, "batch_size": 4, "log_steps": log_steps}
    whole, _ = fit(tmp_path / "whole", folder, rows, **settings)
    stopped, _ = fit(tmp_path / "run", folder, rows, callbacks=[StopAt(2, signal.SIGINT)], **settings)
    (place,) = checkpoints.found(tmp_path / "run" / train.CHECKPOINTS)
    state = json.loads((place / checkpoints.STATE).read_text())
    state["stateful_callbacks"]["Clock"]["attributes"]["earlier_s"] = 1000.0
    rewrite(place, checkpoints.STATE, json.dumps(state))
    resumed, _ = fit(tmp_path / "run", folder, rows, resume=True, **settings)
    assert resumed.tokens == whole.tokens > stopped.tokens > 0
    assert 1000 < resumed.seconds < 2000


def test_signals_belong_to_their_owner_again_after_a_failure(tmp_path, folder):
    before = signal.getsignal(signal.SIGINT)

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path / "run", folder, tiny.rows("complete"), steps=2, callbacks=[Fail()])
    assert signal.getsignal(signal.SIGINT) is before


def step_of(tmp_path, folder, rows, *, packing=False, batch_size, padded=False, monkeypatch=None):
    """Returns what training for one step on all rows did, and the adapter after it."""
    task, loaded, model = prepared(folder)
    if padded:
        monkeypatch.setattr(task, "shares_rows", False)
    config = RunConfig(
        task="complete",
        base=str(folder),
        out=tmp_path,
        quant="none",
        data=DataConfig(max_length=40, packing=packing),
        train=TrainConfig(steps=1, batch_size=batch_size, lr=1e-2, warmup=0.0, clip=0.0, dtype="float32"),
    )
    done = train.fit(task, loaded, model, rows, [], config)
    return done, {name: p.detach().clone() for name, p in adapters.trained(model).items()}


@pytest.mark.parametrize("packing", [False, True])
def test_rows_end_to_end_train_as_padded_ones(tmp_path, folder, monkeypatch, packing):
    rows = tiny.rows("complete", 9)
    wanted, plain = step_of(tmp_path / "padded", folder, rows, batch_size=9, padded=True, monkeypatch=monkeypatch)
    found, ours = step_of(tmp_path / "ours", folder, rows, batch_size=9, packing=packing)
    assert found.tokens == wanted.tokens == sum(len(row["input_ids"]) for row in rows)
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_packs_hold_every_row_once_and_name_their_rows():
    rows = tiny.rows("complete", 9)
    packs = train.Packs(rows, 40)
    assert 1 < len(packs) < len(rows)
    held = [row for i in range(len(packs)) for row in packs[i]]
    assert sorted(map(str, held)) == sorted(map(str, rows))
    assert all(sum(len(row["input_ids"]) for row in packs[i]) <= 40 for i in range(len(packs)))
    names = [f"rows.jsonl:{i}" for i in range(9)]
    assert sorted(name for pack in packs.names(names) for name in pack.split(", ")) == names


def test_packing_is_refused_where_an_example_would_see_another(tmp_path):
    folder = tiny.model_folder(tmp_path / "base", "openai-gpt")
    task, loaded, model = prepared(folder)
    config = RunConfig(task="complete", base=str(folder), out=tmp_path / "out", quant="none",
                       data=DataConfig(packing=True), train=TrainConfig(steps=1))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"data.packing: .* its attention is its own"):
        train.fit(task, loaded, model, tiny.rows("complete"), [], config)


def test_a_packed_run_resumes_exactly(tmp_path, folder):
    def lines(out):
        return [json.loads(line).get("fingerprint") for line in (out / logged.FILE).read_text().splitlines()]

    def run(out, resume=False):
        task, loaded, model = prepared(folder)
        config = RunConfig(
            task="complete",
            base=str(folder),
            out=out,
            quant="none",
            resume=resume,
            data=DataConfig(max_length=40, packing=True),
            train=TrainConfig(batch_size=2, epochs=3, save_steps=1),
        )
        return train.fit(task, loaded, model, tiny.rows("complete", 20), [], config)

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts")
    for checkpoint in sorted((tmp_path / "parts" / train.CHECKPOINTS).glob("*-*"))[-2:]:
        atomicio.remove(checkpoint)
    resumed = run(tmp_path / "parts", resume=True)
    assert resumed.steps == whole.steps
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert all(lines(tmp_path / "whole"))


def test_sixteen_bits_train_on_the_fused_path(tmp_path, folder, caplog):
    """Outside autocast, float32 adapters on a 16-bit base would go through PEFT."""
    with caplog.at_level("INFO"):
        fit(tmp_path, folder, tiny.rows("complete"), quant="nf4", dtype="bfloat16", steps=1, batch_size=4)
    assert "layers fused" in caplog.text
    assert "through PEFT" not in caplog.text
