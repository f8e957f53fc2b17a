"""The commands, from rows on disk to a merged model, on a tiny random Llama; exit statuses and messages."""

import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_ft import runs, saved, sources
from lora_ft.cli import COMMANDS, main
from lora_ft.config import DataConfig, RunConfig, TrainConfig
from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.training import started
from tests import tiny

ROOT = Path(__file__).parents[1]
FOLDER = {
    "adapter_config.json", "adapter_model.safetensors", "config.yaml", "seal.safetensors", "seal.json", "metrics.jsonl",
    "environment.json", "report.html", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md",
    "summary.json", "loss.png",
}  # fmt: skip


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Conversations whose answer follows from the first word."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            words = [rng.randrange(40, 200) for _ in range(rng.randrange(3, 8))]
            kind = words[0] % 3
            messages = [
                {"role": "user", "content": " ".join(f"w{w}" for w in words)},
                {"role": "assistant", "content": f"w{10 + kind} w{20 + kind}"},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows and an adapter trained on them by the command."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.model_folder(folder / "base")
    write_rows(folder / "train.jsonl", 30)
    write_rows(folder / "held_out.jsonl", 12, seed=1)
    assert main(train_words(folder, folder / "adapter", "--data.metrics", "exact_match")) == 0
    return folder


def train_words(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "chat", "--base", str(folder / "base"), "--out", str(out)),
        *("--data.train", str(folder / "train.jsonl"), "--data.eval", str(folder / "held_out.jsonl")),
        *("--train.epochs", "4", "--train.lr", "1e-2", "--lora.rank", "4", *more),
    ]


def test_training_writes_the_whole_folder_and_nothing_else(place):
    assert {p.name for p in (place / "adapter").iterdir()} == FOLDER


def test_nothing_in_the_folder_names_the_machine(place):
    for file in (place / "adapter").iterdir():
        assert str(place).encode() not in file.read_bytes(), file.name


def test_training_ends_with_speed_memory_and_evaluation(place, tmp_path, capsys):
    assert main(train_words(place, tmp_path / "again")) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "tokens/s" in last
    assert "peak" in last
    assert "GiB" in last
    assert "loss" in last


def test_the_same_command_gives_the_same_adapter(place, tmp_path):
    assert main(train_words(place, tmp_path / "again")) == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (place / "adapter" / weights).read_bytes()


def test_the_saved_configuration_runs_again(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    weights = "adapter_model.safetensors"
    assert main(["train", "--config", "adapter/config.yaml", "--base", "base", "--data.train", "train.jsonl",
                 "--data.eval", "held_out.jsonl", "--out", str(tmp_path / "again")]) == 0  # fmt: skip
    assert (tmp_path / "again" / weights).read_bytes() == (place / "adapter" / weights).read_bytes()


def test_evaluate_gives_one_object_with_plain_names(place, capsys):
    words = ["evaluate", str(place / "adapter"), "--data", str(place / "held_out.jsonl"), "--json"]
    assert main([*words, "--metrics", "exact_match"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] < found["base"]["loss"]
    assert found["loss_change_interval"][1] < 0
    assert found["exact_match"] >= found["base"]["exact_match"] == 0
    environment = json.loads((place / "adapter" / "environment.json").read_text())
    assert environment["data"]["train"]["rows"] == 30


def test_one_row_has_no_interval(place, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text((place / "held_out.jsonl").read_text().splitlines()[0] + "\n")
    words = ["evaluate", str(place / "adapter"), "--data", str(one)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss_change_interval"] is None
    assert main(words) == 0
    assert "None" not in capsys.readouterr().out


def test_verify_passes_and_says_each_check(place, capsys, caplog):
    assert main(["verify", str(place / "adapter")]) == 0
    assert ": as in the run" in caplog.text
    assert "asked for" not in caplog.text
    assert "FAIL" not in capsys.readouterr().out
    assert main(["verify", str(place / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_merge_then_verify_the_merged_model(place, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(place / "adapter"), "--out", str(out)]) == 0
    assert "merged onto" in capsys.readouterr().out
    report = json.loads((out / "merge_report.json").read_text())
    assert set(report["candidates"]) == {"original", "dequantized"}
    assert report["candidates"][report["onto"]]["kl"] == min(c["kl"] for c in report["candidates"].values())
    assert main(["verify", str(place / "adapter"), "--model", str(out)]) == 0


def test_verify_fails_with_3_on_another_model(place, tmp_path, capsys):
    other = tiny.model_folder(tmp_path / "other", seed=5)
    assert main(["verify", str(place / "adapter"), "--model", str(other)]) == 3
    assert "does not do what its seal says" in capsys.readouterr().err


def test_chat_answers_one_prompt(place, capsys):
    assert main(["chat", str(place / "adapter"), "--prompt", "w42 w50 w60", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_dry_run_checks_rows_and_loads_no_weights(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs.bases, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    assert main(train_words(place, tmp_path / "never", "--dry-run")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"]["train"]["rows"] == 30
    assert plan["steps"] == 4 * 8
    assert plan["tokens"] > 30 * 5
    assert not (tmp_path / "never").exists()


def test_data_check_counts_and_shows(place, capsys):
    words = ["data", "check", str(place / "train.jsonl"), "--base", str(place / "base"), "--show", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "30 chat rows" in out
    assert "train.jsonl:1" in out


@pytest.mark.parametrize(
    ("task", "rows", "architecture", "told", "lengths"),
    [
        ("classify", [{"text": "w50 w51", "label": "x"}, {"text": "w52", "label": "y"}], "bert", "-> x", [2, 1]),
        ("seq2seq", [{"source": "w50 w51", "target": "w60 w61"}], "t5", "-> w60 w61 </s>", [2, 3]),
        ("embed", [{"anchor": "w50 w51", "positive": "w60 w61 w62"}] * 2, "bert", "-> w60 w61 w62", [2, 3, 2, 3]),
    ],
)
def test_data_check_shows_and_counts_what_is_trained(tmp_path, capsys, task, rows, architecture, told, lengths):
    base = tiny.model_folder(tmp_path / "base", architecture)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "check", str(file), "--base", str(base), "--task", task, "--show", "2"]
    assert main(words) == 0
    assert told in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    words = ["train", task, "--base", str(base), "--data.train", str(file), "--out", str(tmp_path / "x"), "--dry-run"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert found["tokens"] == plan["tokens"] == sum(lengths)
    assert found["longest_row"] == plan["longest_row"] == max(lengths)


@pytest.mark.parametrize(
    ("architecture", "task", "positions", "held"),
    [
        ("bert", "classify", {"max_position_embeddings": 32}, 32),
        ("gpt2", "chat", {"n_positions": 48}, 48),
        ("llama", "chat", {"max_position_embeddings": 40}, 40),
    ],
)
def test_rows_end_where_the_base_has_no_more_positions(tmp_path, capsys, caplog, architecture, task, positions, held):
    base = tiny.model_folder(tmp_path / "base", architecture, **positions)
    file = tmp_path / "rows.jsonl"
    long = " ".join(f"w{i}" for i in range(40, 100))
    texts = [("w50 w51", "w10"), ("w60 w61", "w11"), ("w70", f"w12 {long}")]
    said = (
        [{"text": f"{text} {answer}", "label": answer[:3]} for text, answer in texts]
        if task == "classify"
        else [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
            for text, answer in texts
        ]
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in said * 2))
    told = f"rows end at {held} tokens, for which base has positions, and not at 1024"
    assert main(["data", "check", str(file), "--base", str(base), "--task", task]) == 0
    assert f"2 cut at {held}" in capsys.readouterr().out
    assert told in caplog.text
    words = ["train", task, "--base", str(base), "--data.train", str(file), "--out", str(tmp_path / "run")]
    words += ["--train.steps", "12", "--train.lr", "1e-2"]
    assert main([*words, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["cut_rows"], plan["longest_row"]) == (2, held)
    assert main(words) == 0
    assert f"Rows longer than {held} tokens were cut" in (tmp_path / "run" / "README.md").read_text()
    caplog.clear()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(file), "--json"]) == 0
    assert told in caplog.text
    assert f"2 rows have more than {held} tokens, and were cut" in caplog.text
    if task == "chat":
        assert main(["chat", str(tmp_path / "run"), "--prompt", long, "--max-new-tokens", "4"]) == 1
        assert f"the model has positions for {held}: shorten it" in capsys.readouterr().err
        asked = tmp_path / "asked.jsonl"
        turns = [("user", "w50"), ("assistant", "w1"), ("user", long), ("assistant", "w2")]
        messages = [{"role": role, "content": content} for role, content in turns]
        asked.write_text(json.dumps({"messages": messages}) + "\n")
        measured = ["--data.eval", str(asked), "--data.metrics", "exact_match", "--out", str(tmp_path / "other")]
        assert main([*words, *measured]) == 1
        assert f"tokens, and base has positions for {held}, so no reply could be measured" in capsys.readouterr().err


def test_bad_rows_are_all_named_and_the_status_is_1(place, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"messages": [{"role": "bot", "content": "w1"}]}\n{"messages": []}\n{"messages"\n', encoding="utf-8"
    )
    words = ["train", "chat", "--base", str(place / "base"), "--out", str(tmp_path / "x"), "--data.train", str(bad)]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert all(f"bad.jsonl:{line}:" in error for line in (1, 2, 3))
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["nonsense"], 2, "no command 'nonsense'"),
        (["verify", "nowhere"], 1, "nowhere"),
        (["data"], 2, "usage:"),
        (["evaluate", "nowhere", "--data", "rows.jsonl"], 1, "rows.jsonl"),
        (["train", "--config", "nowhere.yaml"], 2, "there is no file nowhere.yaml"),
        (["train", "complete", "--base", "./nowhere", "--out", "x", "--data.train", "good.txt"], 1, "no such folder"),
        (["train", "complete", "--base", "./nowhere", "--out", "x", "--data.train", "y.txt"], 1, "y.txt"),
        (["merge", "nowhere", "--out", "x"], 1, "nowhere"),
    ],
)
def test_what_the_user_can_mend_is_one_message(words, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("w1 w2\n")
    assert main(words) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat", "nowhere", "--max-new-tokens", "0"], "max-new-tokens must be at least 1, got 0"),
        (["chat", "nowhere", "--temperature", "-1"], "temperature must be at least 0, got -1"),
        (["evaluate", "nowhere", "--data", "y", "--batch-size", "0"], "batch-size must be at least 1, got 0"),
        (["data", "check", "y", "--show", "-1"], "show must be at least 0, got -1"),
        (["data", "check", "y", "--max-length", "4"], "max-length must be at least 8, got 4"),
    ],
)
def test_numbers_out_of_range_exit_2(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_flags_exit_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "chat", "--base", "b", "--out", "o", "--lora.rnak", "3"])
    assert caught.value.code == 2


def test_an_adapter_is_never_overwritten(place, capsys):
    assert main(train_words(place, place / "adapter")) == 2
    assert "already holds an adapter" in capsys.readouterr().err


def test_an_interrupt_exits_130_with_the_command_that_resumes(place, tmp_path, capsys, monkeypatch):
    from lora_ft import train
    from tests.test_train import StopAt

    real = train.fit
    monkeypatch.setattr(
        train, "fit", lambda *args: real(*args[:6], [*args[6], StopAt(2, 2)], *args[7:]) if stop else real(*args)
    )
    stop = True
    words = train_words(place, tmp_path / "run")
    assert main(words) == 130
    error = capsys.readouterr().err
    assert error.strip().endswith("--resume")
    assert str(tmp_path / "run") in error
    assert main(words) == 2  # not silently from the start
    stop = False
    assert main([*words, "--resume", "--train.lr", "3e-3"]) == 2  # nor as another run
    told = capsys.readouterr().err
    assert "train.lr was 0.01, is 0.003" in told
    assert "add --allow-changed train.lr if that is meant" in told
    assert main([*words, "--resume"]) == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (place / "adapter" / weights).read_bytes()


def test_a_resumed_run_may_change_what_it_is_allowed_to(place, tmp_path, capsys, monkeypatch):
    from lora_ft import train
    from tests.test_train import StopAt

    real = train.fit
    words = train_words(place, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", lambda *args: real(*args[:6], [*args[6], StopAt(2, 2)], *args[7:]))
        assert main(words) == 130
    assert main([*words, "--resume", "--allow-changed", "train.lr", "--train.lr", "3e-3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert rates[3] > 0.009
    assert rates[4] < 0.003
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["lr"] == 3e-3


def test_a_base_with_another_template_is_another_run(place, tmp_path, capsys, monkeypatch):
    from lora_ft import train
    from tests.test_train import StopAt

    real = train.fit
    shutil.copytree(place / "base", tmp_path / "base")
    words = [str(tmp_path / "base") if w == str(place / "base") else w for w in train_words(place, tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", lambda *args: real(*args[:6], [*args[6], StopAt(2, 2)], *args[7:]))
        assert main(words) == 130
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ eos_token }}", " {{ eos_token }}"))
    assert main([*words, "--resume"]) == 2
    assert "tokenizer.sha256 was" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["evaluation", "seal", "proof"])
def test_an_interrupt_after_the_training_loses_nothing(place, tmp_path, capsys, monkeypatch, where):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    words = train_words(place, tmp_path / "run", "--data.metrics", "exact_match")
    with monkeypatch.context() as patch:
        stages = {"evaluation": (runs.evaluate, "compare"), "seal": (runs.seal, "make"), "proof": (runs.seal, "verify")}
        patch.setattr(*stages[where], stop)
        assert main(words) == 130
    error = capsys.readouterr().err
    assert "Stopped after the training, whose adapter is saved" in error
    assert error.strip().endswith("--resume")
    if where != "seal":
        assert main(["verify", str(tmp_path / "run")]) == 0
    assert main(words) == 2
    assert "go on with --resume" in capsys.readouterr().err
    monkeypatch.setattr(runs.train, "fit", lambda *_: pytest.fail("it was trained again"))
    assert main([*words, "--resume"]) == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == FOLDER
    for file in ("adapter_model.safetensors", "seal.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (place / "adapter" / file).read_bytes()
    assert main([*words, "--resume"]) == 2
    assert "already holds an adapter" in capsys.readouterr().err


def test_the_base_is_found_again_or_asked_for(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "another machine"))
    adapter = str(place / "adapter")
    assert main(["chat", adapter, "--prompt", "w42"]) == 1
    assert "name it with --base" in capsys.readouterr().err
    assert main(["chat", adapter, "--prompt", "w42", "--max-new-tokens", "2", "--base", str(place / "base")]) == 0
    other = tiny.model_folder(tmp_path / "other", seed=5)
    assert main(["chat", adapter, "--prompt", "w42", "--base", str(other)]) == 1
    assert "belongs to base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.metrics", "json_match"], "data.eval"),
        (["--train.eval-steps", "2"], "train.eval-steps needs held-out rows"),
        (["--train.report-to", "wandb"], "not installed"),
    ],
)
def test_what_could_not_be_evaluated_or_reported_is_refused_before_training(place, tmp_path, capsys, more, message):
    words = train_words(place, tmp_path / "run", *more)
    words = words[: words.index("--data.eval")] + words[words.index("--data.eval") + 2 :]
    assert main(words) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_missing_tracker_is_noticed_before_anything_is_loaded(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs.sources, "resolve", lambda *_: pytest.fail("the base was looked for"))
    for more in ([], ["--dry-run"]):
        assert main(train_words(place, tmp_path / "run", "--train.report-to", "wandb", *more)) == 2
        assert "train.report-to wandb: the package is not installed" in capsys.readouterr().err


def test_each_run_has_its_events_and_none_lies_in_the_adapter(place, tmp_path, monkeypatch):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    for name, steps in (("one", 2), ("two", 3)):
        words = train_words(place, tmp_path / name, "--train.report-to", "tensorboard", "--train.steps", str(steps))
        assert main(words) == 0
        assert {p.name for p in (tmp_path / name).iterdir()} == FOLDER
        (events,) = (tmp_path / f"{name}-tensorboard").iterdir()
        found = [event for event in loader.EventFileLoader(str(events)).Load() if event.HasField("summary")]
        losses = [event.step for event in found for value in event.summary.value if value.tag == "train/loss"]
        assert losses == list(range(1, steps + 1))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_references_that_are_no_json_are_refused_before_training(place, tmp_path, capsys):
    assert main(train_words(place, tmp_path / "run", "--data.metrics", "json_match")) == 1
    assert "JSON" in capsys.readouterr().err


def test_a_folder_with_other_files_is_never_written_into(place, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert main(train_words(place, tmp_path)) == 2
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_a_failing_training_gives_the_cursor_back(place, tmp_path, monkeypatch):
    from rich.console import Console

    from lora_ft.settings import from_yaml
    from lora_ft.training import trainers, watch

    def fail(*args, **kwargs):
        raise LoraFtError("the training fails")

    monkeypatch.setattr(trainers.AdapterTrainer, "compute_loss", fail)
    screen = Console(file=io.StringIO(), force_terminal=True)
    config = from_yaml(RunConfig, place / "adapter" / "config.yaml")
    local = {"base": str(place / "base"), "out": tmp_path / "run"}
    data = dataclasses.replace(config.data, train=str(place / "train.jsonl"), eval=None, metrics=())
    with pytest.raises(LoraFtError, match="the training fails"):
        runs.run(dataclasses.replace(config, **local, data=data), console=screen)
    written = screen.file.getvalue()
    show = watch.SHOW_CURSOR.decode()
    assert written.rfind(show) > written.rfind(show.replace("h", "l")) > -1


def test_a_second_signal_gives_the_cursor_back():
    import pty

    ours, theirs = pty.openpty()
    code = "from lora_ft.training.watch import Interrupt; i = Interrupt(); i._ask(2, None); i._ask(2, None)"
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, timeout=120)
    assert done.returncode == 130
    assert b"\x1b[?25hStopped at once." in os.read(ours, 10_000)
    for end in (ours, theirs):
        os.close(end)


def test_a_failing_evaluation_loses_no_adapter(place, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise LoraFtError("the evaluation fails")

    monkeypatch.setattr(runs.evaluate, "compare", fail)
    assert main(train_words(place, tmp_path / "run")) == 1
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (place / "adapter" / weights).read_bytes()
    saved.load(tmp_path / "run")


def test_streaming_trains_on_rows_as_they_come(place, tmp_path):
    words = train_words(place, tmp_path / "run", "--data.streaming", "--train.steps", "6")
    assert main(words) == 0
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["data"]["train"]["rows"] is None
    assert record["fit"]["steps"] == 6


def test_a_streamed_run_is_not_resumed_on_other_rows(place, tmp_path, capsys, monkeypatch):
    from lora_ft import train
    from tests.test_train import StopAt

    real = train.fit
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((place / "train.jsonl").read_bytes())
    words = train_words(place, tmp_path / "run", "--data.streaming", "--train.steps", "6")
    words[words.index("--data.train") + 1] = str(rows)
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", lambda *args: real(*args[:6], [*args[6], StopAt(2, 2)], *args[7:]))
        assert main(words) == 130
    write_rows(rows, 30, seed=5)
    assert main([*words, "--resume"]) == 2
    assert "rows.train.sha256 was" in capsys.readouterr().err
    rows.write_bytes((place / "train.jsonl").read_bytes())
    assert main([*words, "--resume"]) == 0


def test_a_dry_run_streams_through_the_rows_once(place, tmp_path, capsys, caplog):
    rows = shutil.copy(place / "train.jsonl", tmp_path / "rows.jsonl")
    words = train_words(place, tmp_path / "run", "--data.streaming", "--train.steps", "6", "--dry-run")
    words[words.index("--data.train") + 1] = str(rows)
    with rows.open("a") as file:
        file.write(json.dumps(long_row()) + "\n")
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows"], plan["cut_rows"], plan["longest_row"], plan["steps"]) == (31, 1, 512, 6)
    assert "1 rows have more than 512 tokens, and were cut" in caplog.text
    with rows.open("a") as file:
        file.write('{"messages": []}\n{"messages"\n{"text": "w1"}\n')
    assert main(words) == 1
    error = capsys.readouterr().err
    assert all(f"rows.jsonl:{line}:" in error for line in (32, 33, 34))


def long_row():
    turns = [("user", "w50"), ("assistant", "w9 " * 600)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_streamed_rows_that_were_cut_are_told(place, tmp_path, caplog):
    rows = shutil.copy(place / "train.jsonl", tmp_path / "rows.jsonl")
    rows.write_text(json.dumps(long_row()) + "\n" + rows.read_text())
    words = train_words(place, tmp_path / "run", "--data.streaming", "--train.steps", "10")
    words[words.index("--data.train") + 1] = str(rows)
    assert main(words) == 0
    # More than a pass: no row is counted twice.
    assert "1 of the 31 rows read have more than 512 tokens, and were cut" in caplog.text
    data = json.loads((tmp_path / "run" / "environment.json").read_text())["data"]["train"]
    assert (data["rows"], data["rows_read"], data["cut_rows"]) == (None, 31, 1)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "The training rows were streamed: 31 of them were read, and 1 cut, as too long." in card


def test_a_bad_row_in_mid_run_saves_the_steps_before_it(place, tmp_path, capsys):
    good = (place / "train.jsonl").read_text()
    rows = tmp_path / "rows.jsonl"
    words = train_words(place, tmp_path / "run", "--data.streaming", "--train.steps", "7")
    words[words.index("--data.train") + 1] = str(rows)
    rows.write_text(good)
    whole = [*words]
    whole[words.index("--out") + 1] = str(tmp_path / "whole")
    assert main(whole) == 0
    lines = good.splitlines()
    rows.write_text("\n".join([*lines[:20], '{"messages": []}', *lines[21:]]) + "\n")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl:21: messages" in error
    assert re.search(r"A checkpoint of step [345] is saved: mend the row in its place", error)
    assert "go on with --resume --allow-changed rows.train.sha256." in error
    rows.write_text(good)
    assert main([*words, "--resume"]) == 2
    assert "add --allow-changed rows.train.sha256" in capsys.readouterr().err
    assert main([*words, "--resume", "--allow-changed", "rows.train.sha256"]) == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_bad_row_at_the_start_saves_nothing(place, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "w1"}]}\n')
    words = train_words(place, tmp_path / "run", "--data.streaming", "--train.steps", "7")
    words[words.index("--data.train") + 1] = str(rows)
    assert main(words) == 1
    assert "No checkpoint was saved before it: mend the row and start anew." in capsys.readouterr().err


def test_rows_of_the_hub_have_no_digest_so_a_resumed_run_keeps_their_name(place, tmp_path):
    def keep(train: str, resume: bool) -> None:
        data = DataConfig(train=train, streaming=True)
        config = RunConfig(task="chat", base="b", out=tmp_path, data=data, train=TrainConfig(steps=2), resume=resume)
        facts = {"train": {"name": "x", "rows": None, "sha256": None}}
        started.keep_or_compare(config, facts, "0", sources.resolve(str(place / "base")).record())

    keep("org/a.b:train", resume=False)
    keep("org/a.b:train", resume=True)
    with pytest.raises(ConfigError, match=r"data\.train was org/a\.b:train, is other/a\.b:train"):
        keep("other/a.b:train", resume=True)


@pytest.mark.parametrize("more", [[], ["--data.streaming", "--train.steps", "2"]])
def test_the_training_rows_cannot_be_the_held_out_ones(place, tmp_path, capsys, more):
    words = train_words(place, tmp_path / "run", *more)
    words[words.index("--data.eval") + 1] = str(place / "train.jsonl")
    assert main(words) == 2
    assert "nothing is held out" in capsys.readouterr().err


def test_held_out_rows_that_are_trained_on_are_counted(place, tmp_path, caplog):
    train, held_out = ((place / f"{name}.jsonl").read_text().splitlines() for name in ("train", "held_out"))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*held_out, *train[:3]]) + "\n")
    words = train_words(place, tmp_path / "run", "--dry-run")
    assert main(words) == 0
    assert "are trained on too" not in caplog.text
    words[words.index("--data.eval") + 1] = str(mixed)
    assert main(words) == 0
    assert "3 of 15 held-out rows are trained on too" in caplog.text


def test_evaluate_says_how_many_rows_it_cut(place, tmp_path, caplog):
    rows = tmp_path / "rows.jsonl"
    long = {"role": "user", "content": "w50 " * 1100}
    lines = (place / "held_out.jsonl").read_text().splitlines()[:2]
    cut = {"messages": [*json.loads(lines[0])["messages"], long, {"role": "assistant", "content": "w9"}]}
    rows.write_text("\n".join([*lines, json.dumps(cut)]) + "\n")
    assert main(["evaluate", str(place / "adapter"), "--data", str(rows), "--json"]) == 0
    assert "rows end at 512 tokens, for which base has positions, and not at 1024" in caplog.text
    assert "1 rows have more than 512 tokens, and were cut" in caplog.text


@pytest.mark.parametrize("error", [ValueError("a page, not JSON"), OSError("no route")])
def test_doctor_outlives_what_answers_for_the_hub(monkeypatch, error):
    import huggingface_hub

    from lora_ft.commands import doctor

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert f"does not answer ({type(error).__name__})" in doctor._hub_answers()


def test_a_damaged_configuration_is_one_message(place, tmp_path, capfd):
    folder = shutil.copytree(place / "adapter", tmp_path / "copy")
    (folder / "config.yaml").write_text("task: chat\nbase: b\nout: o\nlora: {rank: many}\n")
    assert main(["evaluate", str(folder), "--data", str(place / "held_out.jsonl")]) == 2
    assert "config.yaml: Error parsing --lora.rank" in capfd.readouterr().err
    assert main(["verify", str(folder)]) == 3


def test_every_command_that_people_are_told_to_type_exists(place):
    files = [*(place.glob("*/README.md")), *(ROOT.glob("*.md")), *(ROOT / "lora_ft" / "pages" / "templates").iterdir()]
    told = {word for file in files for word in re.findall(r"lora-ft ([a-z]+)\b", commands(file.read_text()))}
    assert {"train", "verify", "evaluate"} <= told <= {name.split()[0] for name in COMMANDS}


def commands(text: str) -> str:
    """Returns what Markdown shows as code."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`|<code>.*?</code>", text, flags=re.DOTALL))


def test_a_fraction_of_the_rows_is_held_out(place, tmp_path):
    words = [word for word in train_words(place, tmp_path / "run") if "held_out" not in word]
    words.insert(words.index("--data.eval") + 1, "0.2")
    assert main(words) == 0
    data = json.loads((tmp_path / "run" / "environment.json").read_text())["data"]
    assert (data["train"]["rows"], data["eval"]["rows"]) == (24, 6)


def test_complete_trains_on_plain_text(place, tmp_path):
    text = tmp_path / "poem.txt"
    text.write_text("\n\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(20)), encoding="utf-8")
    words = ["train", "complete", "--base", str(place / "base"), "--out", str(tmp_path / "run")]
    assert main([*words, "--data.train", str(text), "--train.steps", "8", "--train.lr", "1e-2"]) == 0


def test_classify_keeps_its_labels_and_measures_accuracy(tmp_path, capsys):
    base = tiny.model_folder(tmp_path / "base", "bert")
    rows = tmp_path / "rows.jsonl"
    rng = random.Random(0)
    with rows.open("w", encoding="utf-8") as stream:
        for _ in range(40):
            word = rng.randrange(40, 200)
            text = f"w{word} w{rng.randrange(40, 200)}"
            stream.write(json.dumps({"text": text, "label": "low" if word < 120 else "high"}) + "\n")
    words = ["train", "classify", "--base", str(base), "--out", str(tmp_path / "run"), "--data.train", str(rows)]
    assert main([*words, "--data.eval", "0.2", "--train.steps", "30", "--train.lr", "5e-3"]) == 0
    assert "accuracy" in capsys.readouterr().out.strip().splitlines()[-1]
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] > found["base"]["accuracy"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["task"] == "classify"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["task"] == {
        "labels": ["high", "low"],
        "problem_type": "single_label_classification",
    }
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {"0": "high", "1": "low"}


def test_added_tokens_train_their_rows_only(place, tmp_path):
    words = train_words(place, tmp_path / "run", "--data.special-tokens", "<|tool|>")
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = "<|tool|> " + row["messages"][1]["content"]
    marked = tmp_path / "marked.jsonl"
    marked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words[words.index("--data.train") + 1] = str(marked)
    assert main(words) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    vocabulary = json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"]
    assert vocabulary == tiny.VOCAB + 1


def test_a_reader_that_goes_away_ends_the_command_without_a_traceback():
    started = subprocess.Popen(
        [sys.executable, "-m", "lora_ft.cli", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.stdout.close()
    _, told = started.communicate()
    assert (started.returncode, told) == (1, "Stopped: nobody reads the output any more.\n")
