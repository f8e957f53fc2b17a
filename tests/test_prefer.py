"""Preference training: TRL's losses to the letter, rows that say no preference, and runs that are proven and go on."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from lora_ft import adapters, base, evaluate, runs, tasks, train
from lora_ft.cli import main
from lora_ft.config import DataConfig, LoraConfig, PreferConfig, RunConfig, TrainConfig
from lora_ft.data import formats
from lora_ft.data.examples import Pair
from lora_ft.data.preferences import Judged, Preference
from lora_ft.errors import ConfigError, DataError, LoraFtError, UnsupportedModelError
from lora_ft.model import modes
from lora_ft.scoring import losses, preference
from lora_ft.scoring.preference import Judge, Replies
from lora_ft.tasks import prefer
from tests import tiny

pytest.importorskip("trl")

LOSSES = ["ipo", "kto", "orpo", "sigmoid"]
BETA = 0.3


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def file_of(folder: Path, *lines: Any, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return folder / name


# The losses


def said(count: int = 5) -> Replies:
    draw = torch.Generator().manual_seed(3)
    logp_B2 = (-20 * torch.rand(count, 2, generator=draw, dtype=torch.float64)).requires_grad_()
    reference_B2 = -20 * torch.rand(count, 2, generator=draw, dtype=torch.float64)
    tokens_B2 = torch.randint(3, 12, (count, 2), generator=draw)
    return Replies(logp_B2, reference_B2, tokens_B2, torch.arange(count) % 3 > 0)


def formula(name: str, replies: Replies) -> torch.Tensor:
    """Returns the loss of each row as its paper has it."""
    ratio_B2 = replies.logp_B2 - replies.reference_B2
    if name == "sigmoid":
        return -logsigmoid(BETA * (ratio_B2[:, 0] - ratio_B2[:, 1]))
    if name == "ipo":
        mean_B2 = ratio_B2 / replies.tokens_B2
        return (mean_B2[:, 0] - mean_B2[:, 1] - 1 / (2 * BETA)).square()
    if name == "kto":
        distance = ratio_B2[:, 1].mean().detach().clamp(min=0)
        sign_B = torch.where(replies.good_B, 1.0, -1.0).double()
        return 1 - torch.sigmoid(sign_B * BETA * (ratio_B2[:, 0] - distance))
    logp_B2 = replies.logp_B2 / replies.tokens_B2
    odds_B2 = logp_B2 - torch.log1p(-logp_B2.exp())
    return -logp_B2[:, 0] - BETA * logsigmoid(odds_B2[:, 0] - odds_B2[:, 1])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_their_papers(name: str) -> None:
    replies, judge = said(), Judge(name, BETA)
    mean, numbers = judge(replies)
    wanted_B = formula(name, replies)
    accuracy = 1e-12 if name != "orpo" else 1e-6  # TRL takes the odds in float32
    torch.testing.assert_close(mean.double(), wanted_B.mean(), rtol=accuracy, atol=accuracy)
    ours, theirs = (torch.autograd.grad(loss, replies.logp_B2)[0] for loss in (mean, wanted_B.mean()))
    torch.testing.assert_close(ours, theirs, rtol=accuracy, atol=accuracy)
    each, margins = judge.of_each(replies)
    np.testing.assert_allclose(each, wanted_B.detach().numpy(), rtol=max(accuracy, 1e-6))
    assert set(numbers) <= set(preference.STATISTICS)
    assert np.mean(margins) == pytest.approx(numbers["rewards/margins"], rel=1e-5)


def test_a_loss_without_trl_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-ft\[prefer\]'"):
        tasks.get("prefer").learn([])


# The rows

ASKED, BETTER, WORSE = [user("w1"), says("w2"), user("w3")], "w4 w5", "w6"
OPENAI = {
    "input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True},
    "preferred_output": [says(BETTER)],
    "non_preferred_output": [says(WORSE)],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "w1"},
        {"from": "gpt", "value": "w2"},
        {"from": "human", "value": "w3"},
    ],
    "chosen": {"from": "gpt", "value": BETTER},
    "rejected": {"from": "gpt", "value": WORSE},
}
PAIRS = {
    "openai": OPENAI,
    "messages": {"prompt": ASKED, "chosen": [says(BETTER)], "rejected": [says(WORSE)]},
    "prompt repeated": {"prompt": ASKED, "chosen": [*ASKED, says(BETTER)], "rejected": [*ASKED, says(WORSE)]},
    "sharegpt": SHAREGPT,
    "whole conversations": {"chosen": [*ASKED, says(BETTER)], "rejected": [*ASKED, says(WORSE)]},
}
SHORT = {
    "prompt": {"prompt": "w3", "chosen": BETTER, "rejected": WORSE},
    "question": {"question": "w3", "chosen": BETTER, "rejected": WORSE},
    "alpaca": {"instruction": "w3", "chosen": BETTER, "rejected": WORSE},
}


@pytest.mark.parametrize("name", sorted(PAIRS | SHORT))
def test_every_way_to_write_a_pair(tmp_path: Path, name: str) -> None:
    (row,) = formats.read(str(file_of(tmp_path, (PAIRS | SHORT)[name])))
    assert isinstance(row, Preference)
    prompt = (user("w1"), says("w2") | {"weight": 0}, user("w3")) if name in PAIRS else (user("w3"),)
    assert (row.prompt, row.chosen, row.rejected) == (prompt, (says(BETTER),), (says(WORSE),))


JUDGED = {
    "label": {"prompt": "w3", "completion": BETTER, "label": False},
    "messages": {"messages": [user("w3"), says(BETTER)], "label": False},
    "tag": {"messages": [user("w3"), says(BETTER)], "kto_tag": False},
    "text": {"prompt": "w3", "completion": BETTER, "label": "false"},
}


@pytest.mark.parametrize("name", sorted(JUDGED))
def test_every_way_to_judge_a_reply(tmp_path: Path, name: str) -> None:
    (row,) = formats.read(str(file_of(tmp_path, JUDGED[name])))
    assert row == Judged("rows.jsonl:1", (user("w3"),), (says(BETTER),), False)


def test_a_label_that_is_no_verdict_leaves_a_row_what_it_was(tmp_path: Path) -> None:
    (row,) = formats.read(str(file_of(tmp_path, {"prompt": "a", "completion": "b", "label": 3})))
    assert isinstance(row, Pair)


PROMPT = SHORT["prompt"]
BAD = {
    "the same twice": (PROMPT | {"rejected": BETTER}, "rejected is the same as chosen; give two replies that differ"),
    "empty": (PROMPT | {"chosen": " "}, "chosen is empty; give a string"),
    "no rejected": ({k: v for k, v in PROMPT.items() if k != "rejected"}, "rejected is missing"),
    "null": (PROMPT | {"rejected": None}, "rejected is null"),
    "no prompt": (PROMPT | {"prompt": ""}, "prompt is empty"),
    "ends with a reply": (PROMPT | {"prompt": ASKED[:2]}, "ends with a turn of assistant; a reply answers the user"),
    "a question for a reply": (PROMPT | {"chosen": [user("w1")]}, "has no assistant message"),
    "a question in a reply": (PROMPT | {"chosen": [user("w9"), says("w1")]}, "has a turn of user"),
    "another role": (PROMPT | {"chosen": [{"role": "bot", "content": "x"}]}, 'chosen[0].role is "bot"'),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_row_that_says_no_preference_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        formats.read(str(file_of(tmp_path, PROMPT, BAD[name][0], PROMPT, BAD[name][0])))
    assert [one.partition(": ")[0] for one in caught.value.problems] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert BAD[name][1] in caught.value.problems[0]


def test_other_tasks_do_not_learn_the_rejected_reply(tmp_path: Path, folder: Path) -> None:
    for row, name in ((PROMPT, "preference"), (JUDGED["label"], "judged")):
        examples = formats.read(str(file_of(tmp_path, row)))
        chat = tasks.get("chat")
        chat.prepare(base.load_tokenizer(folder), 64)
        with pytest.raises(DataError, match=f"rows.jsonl:1: a {name} row is not a conversation"):
            tasks.featurize(chat, examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield tiny.model_folder(tmp_path_factory.mktemp("prefer") / "base")  # type: ignore[misc]


def prepared(folder: Path, loss: str = "sigmoid", length: int = 64) -> tasks.Task:
    task = tasks.get("prefer")
    task.configure(PreferConfig(loss=loss, beta=BETA))  # type: ignore[arg-type]
    task.prepare(base.load_tokenizer(folder), length)
    return task


def words(task: tasks.Task, ids: list[int], labels: list[int]) -> str:
    return task.tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])


def test_the_replies_alone_are_learned_and_cut_ones_must_still_differ(tmp_path: Path, folder: Path) -> None:
    task = prepared(folder)
    (row,) = tasks.featurize(task, formats.read(str(file_of(tmp_path, OPENAI))))
    learned = [words(task, text["input_ids"], text["labels"]) for text in task.texts(row)]
    assert learned == [f"{BETTER} </s>", f"{WORSE} </s>"]
    assert row["labels"] == [-100, 1]
    alike = PROMPT | {"chosen": "w5 " * 40 + "w6", "rejected": "w5 " * 40 + "w7"}
    task = prepared(folder, length=32)
    with pytest.raises(DataError, match=r"rows.jsonl:1: both replies are the same in the 32 tokens"):
        tasks.featurize(task, formats.read(str(file_of(tmp_path, alike))))


def test_a_judged_reply_is_set_beside_one_to_another_prompt(tmp_path: Path, folder: Path) -> None:
    asked = [("w1", "w10", True), ("w1", "w11", False), ("w2", "w12", True)]
    path = file_of(tmp_path, *({"prompt": p, "completion": c, "label": good} for p, c, good in asked))
    task, examples = prepared(folder, "kto"), formats.read(str(path))
    made = tasks.featurize(task, examples)
    assert [words(task, row["second_ids"], row["second_targets"]) for row in made] == [
        "w12 </s>", "w12 </s>", "w10 </s>",
    ]  # fmt: skip
    assert [row["labels"][1] for row in made] == [1, 0, 1]
    with pytest.raises(DataError, match=r"rows.jsonl:1: no row has another prompt"):
        tasks.featurize(task, examples[:2])
    with pytest.raises(DataError, match=r"leave out --data\.streaming"):
        prepared(folder, "kto").features(examples[0])
    with pytest.raises(DataError, match=r"one reply; train on it with --prefer.loss kto"):
        tasks.featurize(prepared(folder), examples)
    with pytest.raises(DataError, match="takes prompt, completion and label"):
        tasks.featurize(task, formats.read(str(file_of(tmp_path, PROMPT))))


def test_finding_another_prompt_takes_a_look_at_each_row_and_no_more() -> None:
    looks = []

    class Prompt(tuple):  # type: ignore[type-arg]
        def __ne__(self, other: object) -> bool:
            looks.append(1)
            return tuple(self) != tuple(other)  # type: ignore[arg-type]

    task = tasks.get("prefer")
    task.configure(PreferConfig(loss="kto"))
    prompts = [*["w1"] * 500, "w2", *["w1"] * 499]
    made = [Judged(f"a:{n}", Prompt([user(p)]), (says("w3"),), True) for n, p in enumerate(prompts)]
    task.see(made)
    others = [task._others[row.where] for row in made]  # type: ignore[attr-defined]
    assert [made.index(other) for other in others] == [*[500] * 500, 501, *[500] * 499]
    assert len(looks) <= 2 * len(made)


# Runs


def pairs(count: int = 14) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"w{40 + n} w{90 + n} " + "w8 " * (n % 4),
            "chosen": f"w{n % 3} w5 w6 " + "w7 " * (n % 5),
            "rejected": f"w{20 + n % 3} w9 " + "w11 " * (n % 3),
        }
        for n in range(count)
    ]


def rows_for(loss: str) -> list[dict[str, Any]]:
    if loss != "kto":
        return pairs()
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
        for n, row in enumerate(pairs())
    ]


def configured(folder: Path, out: Path, path: Path, loss: str = "sigmoid", **more: Any) -> RunConfig:
    settings: dict[str, Any] = {"steps": 6, "lr": 5e-3, "batch_size": 4, "dtype": "float32", "warmup": 0.0, **more}
    return RunConfig(
        task="prefer", base=str(folder), out=out, lora=LoraConfig(rank=4), prefer=PreferConfig(loss=loss, beta=BETA),  # type: ignore[arg-type]
        data=DataConfig(train=str(path), eval="0.4", max_length=64), train=TrainConfig(**settings),
    )  # fmt: skip


def lines_of(out: Path) -> list[dict[str, Any]]:
    timeless = lambda line: {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per", "peak"))}  # noqa: E731
    return [timeless(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_moves_the_margin_and_proves_it(tmp_path: Path, folder: Path, loss: str) -> None:
    path = file_of(tmp_path, *rows_for(loss))
    done = runs.run(configured(folder, tmp_path / "run", path, loss))
    done.prove()
    before, after = done.metrics["base"], done.metrics["adapter"]
    first = lines_of(tmp_path / "run")[0]
    if loss != "orpo":
        # The adapter begins as its base, which is the reference, so that nothing is preferred yet.
        start = {"sigmoid": math.log(2), "ipo": 1 / (2 * BETA) ** 2, "kto": 0.5}[loss]
        assert first["loss"] == pytest.approx(start, abs=1e-6)
        assert (before["reward_margin"], before["reward_accuracy"]) == (0, 0.5)
        assert before["loss"] == pytest.approx(start, abs=1e-6)
        assert after["reward_margin"] > 0.1
    assert after["loss"] < before["loss"]
    assert after["reward_margin"] > before["reward_margin"]
    assert after["loss_change_interval"][1] < 0 < after["reward_margin_change_interval"][0]
    assert {"rewards/margins", "rewards/chosen"} <= first.keys()
    assert f"reward_margin {before['reward_margin']:.4g} -> " in done.summary()
    assert "reward_margin" in (tmp_path / "run" / "README.md").read_text()
    assert f"loss: {loss}" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_stopped_run_goes_on_to_the_same_adapter_and_statistics(tmp_path: Path, folder: Path) -> None:
    path = file_of(tmp_path, *pairs())
    config = configured(folder, tmp_path / "whole", path, save_steps=1, log_steps=2)
    runs.run(config)

    class Stop(train.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:  # between two lines of metrics
                os.kill(os.getpid(), signal.SIGINT)

    stopped = configured(folder, tmp_path / "run", path, save_steps=1, log_steps=2)
    with pytest.raises(LoraFtError, match="Stopped at step 3"):
        runs.run(stopped, watch=lambda *_: [Stop()])
    runs.run(RunConfig(**{**vars(stopped), "resume": True}))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def loaded(folder: Path, loss: str = "sigmoid") -> tuple[tasks.Task, Any]:
    """Returns the task and a model whose adapter has an effect."""
    task = prepared(folder, loss)
    held = base.load(str(folder), quant="nf4", dtype="float32", device="cpu")
    model = adapters.attach(held, LoraConfig(rank=4), peft_task=task.peft_task)
    for name, parameter in adapters.trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return task, model


def gradient(task: tasks.Task, model: Any, made: list[tasks.Features], sizes: list[int]) -> list[torch.Tensor]:
    """Returns the gradient of the mean loss of rows that are computed in batches of these sizes."""
    model.zero_grad()
    start = 0
    for size in sizes:
        (task.loss(model, task.collate(made[start : start + size])) / len(made)).backward()
        start += size
    return [p.grad.clone() for p in adapters.trained(model).values()]


def test_ragged_batches_give_the_gradient_of_the_whole_as_means_of_trl_would_not(tmp_path: Path, folder: Path) -> None:
    task, model = loaded(folder)
    made = tasks.featurize(task, formats.read(str(file_of(tmp_path, *pairs(5)))))
    whole, ragged = gradient(task, model, made, [5]), gradient(task, model, made, [4, 1])
    for one, other in zip(whole, ragged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    # A mean of means counts the last row four times.
    model.zero_grad()
    for batch in (made[:4], made[4:]):
        (task.loss(model, task.collate(batch)) / len(batch) / 2).backward()
    wrong = [p.grad for p in adapters.trained(model).values()]
    assert any(not torch.allclose(one, other, rtol=1e-2) for one, other in zip(whole, wrong, strict=True))


@pytest.mark.parametrize("passes", ["two", "halved"])
def test_the_estimate_of_kto_is_that_of_the_whole_step(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    path = file_of(tmp_path, *rows_for("kto"))

    def logged(name: str, size: int, accumulate: int) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
        task, model = loaded(folder, "kto")
        held = base.load(str(folder), quant="nf4", dtype="float32", device="cpu")
        torch.manual_seed(0)
        for name_, parameter in adapters.trained(model).items():
            if "lora_B" in name_:
                torch.nn.init.normal_(parameter, std=0.3)
        config = configured(folder, tmp_path / name, path, "kto", batch_size=size, accumulate=accumulate, steps=3)
        made = tasks.featurize(task, formats.read(str(path)))[:12]
        train.fit(task, held, model, train.Streamed(lambda: iter(made)), [], config)
        lines = [line for line in lines_of(tmp_path / name) if "loss" in line]
        return lines, [parameter.detach() for parameter in adapters.trained(model).values()]

    whole, wanted = logged("whole", 6, 1)
    assert min(line["kl"] for line in whole) > 0.01
    if passes == "halved":
        real = prefer._log_probs

        def small(model: Any, batch: Any, sides: slice) -> torch.Tensor:
            if len(batch["labels"]) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return real(model, batch, sides)

        monkeypatch.setattr(prefer, "_log_probs", small)
    parts, found = logged("parts", *((6, 1) if passes == "halved" else (2, 3)))
    keys = {
        "loss",
        "grad_norm",
        "kl",
        *(f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")),
    }
    for one, other in zip(whole, parts, strict=True):
        assert {key: other[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-3)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["kto", "sigmoid"])
def test_the_reference_is_the_base_also_where_the_base_is_measured(tmp_path: Path, folder: Path, loss: str) -> None:
    task, model = loaded(folder, loss)
    examples = formats.read(str(file_of(tmp_path, *rows_for(loss))))
    made = tasks.featurize(task, examples)
    found = evaluate.compare(task, model, examples, made, batch_size=3)
    assert (found.base["reward_margin"], found.base["reward_accuracy"]) == (0, 0.5)
    assert found.adapter["reward_margin"] != 0
    other = losses.of_rows(task, model, made, 5)
    assert other.mean == pytest.approx(found.adapter["loss"], rel=1e-5)
    assert model.active_adapter == "default"
    assert all(parameter.requires_grad for parameter in adapters.trained(model).values())


def test_a_start_that_moves_the_base_is_compared_with_the_base_before_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepared(folder)
    held = base.load(str(folder), quant="none", dtype="float32", device="cpu")
    made = tasks.featurize(task, formats.read(str(file_of(tmp_path, *pairs(3)))))
    batch = task.collate(made)
    said = lambda model: prefer._log_probs(model, batch, slice(0, 2)).detach()  # noqa: E731
    plain_B2 = said(held.model)
    settings = LoraConfig(rank=4, init="pissa", save_modules=("norm",))
    model = adapters.attach(held, settings, peft_task=task.peft_task)
    for parameter in adapters.trained(model).values():
        parameter.data *= 1.2
    now = task._said(model, batch)  # type: ignore[attr-defined]
    torch.testing.assert_close(now.reference_B2, plain_B2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(now.logp_B2, plain_B2, rtol=1e-2)
    now.logp_B2.sum().backward()
    assert all(bool(p.grad.any()) for name, p in adapters.trained(model).items() if "lora_B" in name)
    # A block in another, as where the base is measured: at the end of the inner the outer is what it was.
    after = []
    for guard in (modes._bare, type("Blind", (set,), {"__contains__": lambda self, one: False})()):
        monkeypatch.setattr(modes, "_bare", guard)
        with modes.without(model):
            with modes.without(model):
                pass
            after.append(said(model))
    torch.testing.assert_close(after[0], plain_B2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after[1], plain_B2, rtol=1e-3)


def test_plan_check_and_what_cannot_be(tmp_path: Path, folder: Path, capsys: Any) -> None:
    path = file_of(tmp_path, *pairs())
    given = [
        "--base",
        str(folder),
        "--data.train",
        str(path),
        "--out",
        str(tmp_path / "run"),
        "--data.max-length",
        "64",
    ]
    assert main(["plan", "prefer", *given, "--device", "cpu:8GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"] is True
    assert main(["train", "prefer", *given, "--dry-run"]) == 0
    assert main(["data", "check", str(path), "--task", "prefer", "--base", str(folder), "--max-length", "64"]) == 0
    shown = capsys.readouterr().out
    assert "14 prefer rows" in shown
    judged = file_of(tmp_path, *rows_for("kto"), name="judged.jsonl")
    assert main(["data", "check", str(judged), "--task", "prefer", "--base", str(folder), "--max-length", "64"]) == 0
    config = configured(folder, tmp_path / "packed", path)
    config = RunConfig(**{**vars(config), "data": DataConfig(train=str(path), max_length=64, packing=True)})
    with pytest.raises(UnsupportedModelError, match="rows of the task prefer cannot"):
        runs.run(config)
    with pytest.raises(ValueError, match=r"prefer\.\* are options of the task prefer, and the task is chat"):
        RunConfig(task="chat", base="x", out=Path("y"), prefer=PreferConfig(loss="ipo"))
    with pytest.raises(ValueError, match=r"prefer\.loss kto sets each row beside a reply to another prompt"):
        RunConfig(
            task="prefer", base="x", out=Path("y"), prefer=PreferConfig(loss="kto"), train=TrainConfig(steps=1),
            data=DataConfig(train="z", streaming=True),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"prefer\.beta must be above 0"):
        PreferConfig(beta=0)
