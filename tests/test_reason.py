"""The task `reason`: what its rows may be, that a reward rises, and that a resumed run is the run in one piece."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainerCallback

from lora_ft import checkpoints, evaluate, memory, runs, seal, tasks
from lora_ft.cli import main
from lora_ft.commands.options import EvaluateConfig
from lora_ft.config import DataConfig, LoraConfig, ReasonConfig, RunConfig, TrainConfig
from lora_ft.data import formats
from lora_ft.data.examples import Chat, Pair, Text
from lora_ft.data.problems import Problem
from lora_ft.errors import ConfigError, DataError, OutOfMemoryError, ProofError, SourceError
from lora_ft.memory import planned
from lora_ft.model.modes import unwrapped
from lora_ft.settings import cli, from_yaml, to_yaml
from lora_ft.training import guard, judged
from lora_ft.training.rows import digest
from tests import tiny

trl = pytest.importorskip("trl")

FEW = "def few(reply, answer):\n    return sum(word in {f'w{n}' for n in range(12)} for word in reply.split()) / 4\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reason")
    tiny.model_folder(place / "base")
    (place / "mine.py").write_text(FEW)
    return place


def problems(count: int) -> list[Problem]:
    rng = random.Random(0)
    return [
        Problem(f"made:{i + 1}", " ".join(f"w{rng.randrange(40, 200)}" for _ in range(2 + i % 4)), "few")
        for i in range(count)
    ]


def config(place: Path, out: Path, *, quant: str = "none", reward: str | None = None, **train) -> RunConfig:
    return RunConfig(
        task="reason", base=str(place / "base"), out=out, quant=quant,  # type: ignore[arg-type]
        lora=LoraConfig(rank=8, alpha=64), data=DataConfig(max_length=32),
        reason=ReasonConfig(reward=reward or f"{place}/mine.py:few", samples=8, max_new_tokens=4),
        train=TrainConfig(
            **{"batch_size": 6, "steps": 14, "lr": 3e-2, "schedule": "constant", "dtype": "float32", **train}
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(place: Path) -> runs.Run:
    rows = problems(28)
    done = runs.run(config(place, place / "out"), examples=rows[:21], held_out=rows[21:])
    done.prove()
    return done


def test_how_the_prompts_went_is_kept():
    text, talk = Problem("a:1", "one", "1"), Problem("a:2", ({"role": "user", "content": "one"},), "1")
    for rows, told in (([text], "text"), ([talk], "messages"), ([Pair("a:3", "one?", "1")], "messages"),
                       ([text, talk], "messages"), ([], None)):  # fmt: skip
        task = tasks.get("reason")
        task.learn(rows)
        assert task.facts()["prompts"] == told
        assert tasks.get("reason", task.facts()).facts() == task.facts()
    with pytest.raises(TypeError, match="prompts is text, messages or null"):
        tasks.get("reason", {"prompts": "songs"})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_reward_rises_and_is_told(finished):
    base, adapter = finished.metrics["base"], finished.metrics["adapter"]
    assert adapter["reward"] > base["reward"] + 0.4
    low, high = adapter["reward_change_interval"]
    assert 0 < low < adapter["reward"] - base["reward"] < high
    assert "loss" not in adapter
    assert f"reward {base['reward']:.4g} -> {adapter['reward']:.4g}" in finished.summary()
    told = [line for line in lines(finished.folder) if "loss" in line]
    assert sum(line["reward"] for line in told[-3:]) > sum(line["reward"] for line in told[:3]) + 0.3
    assert all(
        {"reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy", "fingerprint"} <= line.keys()
        for line in told
    )
    assert told[-1]["tokens"] == finished.fit.tokens > 0
    for name in ("README.md", "report.html"):
        assert "reward" in (finished.folder / name).read_text()
    assert "loss is" not in (finished.folder / "README.md").read_text()
    assert not [path for path in finished.folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_folder_is_evaluated_without_running_the_code_it_names(finished):
    from lora_ft import saved
    from lora_ft.errors import LoraFtError

    loaded = saved.load(finished.folder, None)
    loaded.prepare_task()
    rows = tasks.featurize(loaded.task, problems(6))
    with pytest.raises(LoraFtError, match="no code is run because an adapter folder names it"):
        evaluate.compare(loaded.task, loaded.model, problems(6), rows)
    with pytest.raises(LoraFtError, match=r"no code is run.*--metrics exact_match"):
        evaluate.require(loaded.task)
    # What the error advises.
    evaluate.require(loaded.task, ("exact_match",))
    found = evaluate.compare(loaded.task, loaded.model, problems(6), rows, names=("exact_match",))
    assert found.adapter["exact_match"] == 0
    assert not {"reward", "reward_change_interval"} & found.adapter.keys()
    loaded.task.configure(ReasonConfig(reward="exact", max_new_tokens=4))
    found = evaluate.compare(loaded.task, loaded.model, problems(6), rows, names=("exact_match",))
    assert found.adapter["reward"] == found.adapter["exact_match"] == 0
    assert seal.verify(finished.folder).passed


def test_a_folder_whose_rewards_would_run_programs_unfenced_is_not_evaluated(finished, monkeypatch):
    from lora_ft import saved
    from lora_ft.scoring import sandbox

    monkeypatch.setattr(sandbox, "_open_to", lambda: ("network",))
    loaded = saved.load(finished.folder, None)
    loaded.prepare_task()
    loaded.task.configure(ReasonConfig(reward="unit_tests", max_new_tokens=4))
    rows = [{"prompt": [1, 50], "answer": "assert one() == 1"}]
    for measure in (lambda: judged.judge(loaded.task, loaded.model, rows), lambda: evaluate.require(loaded.task)):
        with pytest.raises(ConfigError, match="cannot keep the programs of replies from network"):
            measure()


def test_a_plan_of_a_folder_runs_nothing_that_it_names(finished, tmp_path, monkeypatch):
    """Its rows are those of the run alone, whatever file has their name."""
    folder, given = tmp_path / "theirs", problems(9)
    shutil.copytree(finished.folder, folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("open('ran', 'w').close()\n" + FEW)
    lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n" for row in given]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["reason"]["reward"] == "mine.py:few"
    settings["data"] |= {"train": "rows.jsonl", "eval": "theirs/rows", "metrics": ["hub:theirs/metric"]}
    settings["train"] |= {"eval_steps": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    record = json.loads((folder / "environment.json").read_text())
    record["data"]["train"]["sha256"] = digest(given)
    (folder / "environment.json").write_text(json.dumps(record))
    measured = planned.plan(folder)
    assert measured["measured_rows"]
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-1]))
    without = planned.plan(folder)
    assert not without["measured_rows"]
    assert without["tokens"] > measured["tokens"]
    (tmp_path / "rows.jsonl").write_text("{}")
    assert planned.plan(folder) == without
    assert not (tmp_path / "ran").exists()


def test_a_report_is_written_where_there_can_be_no_plan(finished, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "moved"
    shutil.copytree(finished.folder, folder)

    def lost(*args, **kwargs):
        raise SourceError("the base is gone")

    monkeypatch.setattr(planned.sources, "recall", lost)
    with caplog.at_level("WARNING", logger="lora_ft"):
        page = planned.report(folder)
    assert "the report has no plan: the base is gone" in caplog.text
    assert "reward" in page.read_text()


def test_a_selftest_runs_no_function_that_its_file_names(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("open('ran', 'w').close()\n" + FEW)
    text = to_yaml(config(place, tmp_path / "out", reward=f"{tmp_path}/mine.py:few"))
    (tmp_path / "theirs.yaml").write_text(text)
    assert main(["selftest", "theirs.yaml", "--twin"]) == 2
    assert "theirs.yaml names the reward mine.py:few, whose code would be run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_file_alone_names_no_metric_of_the_hub_for_an_evaluation(tmp_path):
    (tmp_path / "theirs.yaml").write_text("adapter: a\ndata: rows.jsonl\nmetrics: [hub:theirs/metric]\n")
    words = ["--config", str(tmp_path / "theirs.yaml")]
    with pytest.raises(ConfigError, match="type --metrics hub:theirs/metric too"):
        cli(EvaluateConfig, words)
    assert cli(EvaluateConfig, [*words, "--metrics", "hub:theirs/metric"]).metrics == ("hub:theirs/metric",)


class Die(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise InterruptedError


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_resumed_run_is_the_run_in_one_piece(place, tmp_path, quant):
    """Of 11 rows the second batch of the second step of an epoch is short, and the run is cut in that step."""
    rows, settings = problems(11), {"steps": 5, "accumulate": 2, "batch_size": 3, "save_steps": 1, "quant": quant}
    whole = runs.run(config(place, tmp_path / "whole", **settings), examples=rows)
    torch.manual_seed(99)
    with pytest.raises(InterruptedError):
        runs.run(config(place, tmp_path / "cut", **settings), examples=rows, watch=lambda *_: [Die(3)])
    torch.manual_seed(100)
    again = dataclasses.replace(config(place, tmp_path / "cut", **settings), resume=True)
    runs.run(again, examples=rows)
    told = [[(line["step"], line["fingerprint"], line["reward"], line["num_tokens"]) for line in lines(folder)]
            for folder in (whole.folder, tmp_path / "cut")]  # fmt: skip
    assert told[0] == told[1]
    assert len({fingerprint for _, fingerprint, *_ in told[0]}) == 5


def gradients(place: Path, out: Path, **train) -> dict[str, torch.Tensor]:
    """Returns the gradient of the first step."""
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            raise InterruptedError

    with pytest.raises(InterruptedError):
        runs.run(config(place, out, clip=0.0, **train), examples=problems(8), watch=lambda *_: [Look()])
    return found


def test_accumulating_changes_nothing(place, tmp_path):
    """Replies of a step are sampled together, and the loss is summed over all their tokens."""
    whole = gradients(place, tmp_path / "a", batch_size=6, accumulate=1)
    parts = gradients(place, tmp_path / "b", batch_size=2, accumulate=3)
    ragged = gradients(place, tmp_path / "c", batch_size=4, accumulate=2)  # all 8 rows, to see that these do differ
    assert any(bool(gradient.any()) for gradient in whole.values())
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(ragged[name], gradient, rtol=1e-3, atol=1e-5) for name, gradient in whole.items())


def test_log_probabilities_are_those_of_the_model_whatever_the_padding(place):
    from lora_ft.training import rollouts

    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32).eval()

    class Alone(rollouts.Rollouts):
        def __init__(self):
            self.model = model

    prompts, replies = [[1, 50, 51], [1, 60]], [[70, 71], [80, 81, 82]]
    ids = torch.tensor([[1, 50, 51, 70, 71, 0], [0, 1, 60, 80, 81, 82]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    logp, entropy, _ = Alone()._get_per_token_logps_and_entropies(model, ids, mask, 3)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        with torch.no_grad():
            said = torch.log_softmax(unwrapped(model)(torch.tensor([prompt + reply])).logits[0].double(), -1)
        own = said[range(len(prompt) - 1, len(prompt + reply) - 1)]
        assert torch.allclose(logp[row, : len(reply)].double(), own[range(len(reply)), reply], atol=1e-4)
        assert torch.allclose(entropy[row, : len(reply)].double(), -(own.exp() * own).sum(-1), atol=1e-4)
    assert logp[0, 2] == entropy[0, 2] == 0


def test_steps_without_a_signal_are_skipped_and_a_run_of_them_proves_nothing(place, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="lora_ft"), pytest.raises(ProofError, match=guard.UNRANKED):
        runs.run(config(place, tmp_path / "out", reward="exact", steps=5), examples=problems(8))
    assert caplog.text.count(guard.UNRANKED) == 5
    events = [line for line in lines(tmp_path / "out") if line.get("event") == "step skipped"]
    assert len(events) == 5
    assert [line["frac_reward_zero_std"] for line in lines(tmp_path / "out") if "loss" in line] == [1] * 5


def test_equal_rewards_do_not_pass_as_ranked_by_rounding(place, tmp_path):
    (tmp_path / "same.py").write_text("def same(reply, answer):\n    return 0.3\n")
    asked = config(place, tmp_path / "out", reward=f"{tmp_path}/same.py:same", steps=1)
    asked = dataclasses.replace(asked, reason=dataclasses.replace(asked.reason, samples=6))
    with pytest.raises(ProofError, match=guard.UNRANKED):
        runs.run(asked, examples=problems(6))


def test_evaluations_in_training_choose_the_best_step(place, tmp_path):
    rows = problems(14)
    done = runs.run(config(place, tmp_path / "out", steps=4, eval_steps=2), examples=rows[:8], held_out=rows[8:])
    found = [line for line in lines(done.folder) if "eval_reward" in line]
    assert [line["step"] for line in found] == [2, 4]
    best = max(line["eval_reward"] for line in found)
    assert done.metrics["adapter"]["reward"] == pytest.approx(best)
    assert all(line["eval_loss"] == -line["eval_reward"] for line in found)


def test_sampling_draws_from_the_whole_distribution(place):
    """Of 296 tokens that are about as likely each comes first sometimes, where it may."""
    task = tasks.get("reason")
    task.configure(ReasonConfig(max_new_tokens=1))
    task.prepare(tiny.tokenizer(), 512)
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.01)  # tied: all logits are nearly alike
    torch.manual_seed(0)
    rows = [{"prompt": [1, 50]}] * 1500
    drawn = {ids[0] for ids in judged.replies(task, model, rows, temperature=1.0, top_k=0)}
    assert len(drawn) > 250
    assert len({ids[0] for ids in judged.replies(task, model, rows, temperature=1.0)}) <= 50


ROWS = {
    "prompt": ({"prompt": "2 + 3 =", "answer": 5}, lambda at: Problem(at, "2 + 3 =", "5")),
    "question": ({"question": "Why?", "answer": "So.\n#### 1"}, lambda at: Pair(at, "Why?", "So.\n#### 1")),
    "question with a number": (
        {"question": "2 + 3?", "answer": 5},
        lambda at: Problem(at, ({"role": "user", "content": "2 + 3?"},), "5"),
    ),
    "messages and a schema": (
        {"prompt": [{"role": "user", "content": "Give."}], "answer": {"type": "object"}},
        lambda at: Problem(at, ({"role": "user", "content": "Give."},), '{"type": "object"}'),
    ),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_with_an_answer(tmp_path, name):
    row, wanted = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert formats.read(str(tmp_path / "rows.jsonl")) == [wanted("rows.jsonl:1")]


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({"prompt": "2", "answer": None}, "answer is null"),
        ({"prompt": "2", "answer": True}, "answer is true"),
        ({"prompt": "2", "answer": []}, "answer is an empty list"),
        ({"prompt": " ", "answer": "2"}, "prompt is empty"),
        ({"prompt": [], "answer": "2"}, "prompt is an empty list"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "2"},
         r"prompt\[1\] is from assistant"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_checked_is_told_with_its_place(tmp_path, row, phrase):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1", "answer": "1"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl:2: {phrase}"):
        formats.read(str(tmp_path / "rows.jsonl"))


def prepared(reward: str = "exact", max_new_tokens: int = 8, template: bool = True) -> tasks.Task:
    task = tasks.get("reason")
    task.configure(ReasonConfig(reward=reward, max_new_tokens=max_new_tokens))
    tokenizer = tiny.tokenizer()
    if not template:
        tokenizer.chat_template = None
    task.prepare(tokenizer, 16)
    return task


def test_a_question_is_asked_and_a_text_gone_on_from():
    task = prepared()
    text = task.features(Problem("a:1", "w1 w2", "w3"))
    asked = task.features(Pair("a:1", "w1 w2", "w3"))
    told = task.tokenizer.decode
    assert told(text["prompt"]) == "w1 w2"
    assert told(asked["prompt"]) == "<s> <|user|> w1 w2 </s> <|assistant|>"
    assert [told([i for i in row["labels"] if i >= 0]) for row in (text, asked)] == ["w3", "w3"]
    assert task.asked(Problem("a:1", "w1 w2", ""))["input_ids"] == text["prompt"]


@pytest.mark.parametrize(
    ("example", "settings", "phrase"),
    [
        (Text("a:1", "w1"), {}, "a:1: a text row has no answer"),
        (Chat("a:1", ({"role": "user", "content": "w1"},)), {}, "a:1: a chat row has no answer"),
        (Problem("a:1", "w1 " * 9, "w1"), {}, "a:1: the prompt has 9 tokens.*there are 8"),
        (Problem("a:1", "w1", "[a"), {"reward": "regex"}, "a:1: the answer is no regular expression"),
        (Problem("a:1", "w1", "f()"), {"reward": "unit_tests"}, "a:1: the answer asserts nothing"),
        (Pair("a:1", "w1", "w2"), {"template": False}, "a:1: the base has no chat template"),
    ],
)
def test_rows_that_do_not_suit_are_refused(example, settings, phrase):
    with pytest.raises(DataError, match=phrase):
        prepared(**settings).features(example)


def test_no_room_for_a_prompt_is_said_first():
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        prepared(max_new_tokens=16)


def test_code_is_named_by_who_types_it(tmp_path):
    typed = ["reason", "--base", "b", "--out", "o", "--reason.reward", "mine.py:few"]
    config = cli(RunConfig, typed)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    with pytest.raises(ConfigError, match=r"--config names the reward mine.py:few, whose code would be run"):
        cli(RunConfig, ["--config", str(tmp_path / "run.yaml")])
    again = cli(RunConfig, ["--config", str(tmp_path / "run.yaml"), "--reason.reward", "mine.py:few"])
    assert again == config
    # An adapter folder is read without running what it names.
    assert from_yaml(RunConfig, tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["reason", "--reason.reward", "nice"], "exact, json_schema, regex, unit_tests or FILE.py:FUNCTION"),
        (["reason", "--reason.samples", "1"], "reason.samples must be at least 2"),
        (["reason", "--data.packing"], "data.packing is for rows with replies"),
        (["reason", "--data.streaming", "--train.steps", "3"], "data.streaming is for rows with replies"),
        (["chat", "--reason.samples", "4"], "are options of the task reason, and the task is chat"),
    ],
)
def test_options_that_do_not_suit_are_refused(words, phrase, capsys):
    with pytest.raises((SystemExit, ConfigError)):
        cli(RunConfig, [*words, "--base", "b", "--out", "o"])
    assert phrase in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_several_processes_are_refused(place, tmp_path, monkeypatch):
    from lora_ft import train

    monkeypatch.setattr(train, "processes", SimpleNamespace(count=lambda: 2))
    with pytest.raises(ConfigError, match="the task reason trains in one process"):
        runs.run(config(place, tmp_path / "out"), examples=problems(8))
    assert not checkpoints.found(tmp_path / "out" / "checkpoints")


def test_a_plan_counts_every_reply(place, tmp_path):
    settings = config(place, tmp_path / "out", batch_size=2, accumulate=1)
    # A batch of 2 rows, 8 replies to each, of 32 tokens with their prompts.
    assert memory.plan(settings, "cpu:8GiB").asked.tokens == 2 * 8 * 32


def test_a_dry_run_counts_the_tokens_that_replies_may_have(place, tmp_path):
    rows = problems(4)
    told = runs.dry_run(config(place, tmp_path / "out"), rows)
    assert told["tokens"] == 8 * sum(len(row.prompt.split()) + 4 for row in rows)
    assert told["longest_row"] == 9
    assert told["cut_rows"] == 0


def test_replies_that_do_not_fit_the_memory_are_told_with_what_to_do(place, tmp_path, monkeypatch):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(judged, "replies", short)
    for rows, phrase in ((6, "48 replies does not fit the memory: halve"), (1, "8 replies .* lower --reason.samples")):
        with pytest.raises(OutOfMemoryError, match=phrase):
            runs.run(config(place, tmp_path / str(rows), batch_size=rows), examples=problems(8))
