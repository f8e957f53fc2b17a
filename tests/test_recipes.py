"""The recipes run as their first lines say, in processes of their own, and leave adapters that load."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_ft import cli, config, saved, sources, tasks, train
from lora_ft.data.examples import Labelled
from lora_ft.model import changes, miniature
from lora_ft.settings import from_yaml
from lora_ft.training import rows as of_runs
from tests import tiny
from tests.test_cli import write_rows

RECIPES = Path(__file__).parents[1] / "recipes"
DATA = Path(__file__).parents[2] / "shared" / "data"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
WEIGHTS = "adapter_model.safetensors"


def run(folder: Path, *words: str | Path, **environ: str) -> str:
    """Returns what a recipe printed, having checked that it succeeded."""
    command = [sys.executable, str(RECIPES / words[0]), *map(str, words[1:])]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | ONE_THREAD | environ, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_adapter(folder: Path, base: Path | None = None, task: str = "CausalLM", **head: Any) -> None:
    """Checks that training moved every B off zero, and that plain PEFT says something else with it than without."""
    tensors = load_file(folder / WEIGHTS)
    moved = [bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name]
    assert moved
    assert all(moved)
    if base is not None:
        plain = getattr(transformers, f"AutoModelFor{task}").from_pretrained(base, **head)
        model = peft.PeftModel.from_pretrained(plain, folder).eval()
        ids = {"input_ids": torch.tensor([[1, 60, 61, 62]])}
        if task == "Seq2SeqLM":
            ids["decoder_input_ids"] = torch.tensor([[0, 60]])
        with torch.no_grad():
            changed = model(**ids).logits
            with model.disable_adapter():
                assert not torch.allclose(model(**ids).logits, changed)


RECIPE_NAMES = sorted(file.stem for file in RECIPES.glob("*.py") if "run_recipe(" in file.read_text(encoding="utf-8"))


def recipe(name: str) -> type[config.RunConfig]:
    """Returns the configuration class of a recipe, which is the last that it defines."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    own = [thing for thing in vars(module).values() if getattr(thing, "__module__", "") == spec.name]
    return [thing for thing in own if isinstance(thing, type) and issubclass(thing, config.RunConfig)][-1]


@pytest.mark.parametrize("file", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_measured_run_is_its_recipe_on_named_rows(file: Path) -> None:
    told = from_yaml(config.RunConfig, file)
    made = recipe(told.task)(data=told.data, base=told.base, quant=told.quant, out=told.out, train=told.train)
    assert dataclasses.asdict(told) == dataclasses.asdict(made)
    assert told.data.train
    assert told.data.eval


def twin(name: str, *words: str) -> int:
    return cli.run_recipe(recipe(name), ["--twin", *words])


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder on a machine that holds no base and reaches nothing."""
    for name in ("LORA_FT_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"something was fetched: {args}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(sources, "_download_wheel", refused)
    return here


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_the_twin_of_a_recipe_goes_the_whole_way(alone: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    assert twin(name) == 0, capsys.readouterr().err
    # Of two processors, and of this process alone.
    assert time.process_time() - began < 120
    shown = capsys.readouterr().out
    told = [line for line in shown.splitlines() if line.startswith("ok  ")]
    for what in ("changes what the model says", "loaded anew it says the same", "merged onto the"):
        assert any(what in line for line in told), shown
    assert "Nothing was fetched for it, and nothing is kept." in shown.splitlines()[-1]
    assert not list(alone.iterdir())


def test_a_twin_needs_no_recipe_and_no_names(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "complete", "--twin", "--quant", "none"]) == 0
    assert "twin of complete: a random llama of 2 layers" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "complete", "--twin", "--resume"])
    assert ended.value.code == 2
    assert "leave out resume and dry-run" in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_the_twin_of_a_base_at_hand_is_made_of_its_files_and_of_the_rows(
    base: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(alone / "rows.jsonl", 40)
    assert twin("chat", "--base", str(base), "--data.train", "rows.jsonl", "--data.packing", "--quant", "none") == 0
    shown = capsys.readouterr().out
    assert "a random llama of 2 layers" in shown
    assert "its configuration made small, its tokenizer" in shown
    assert "rows: 18 to train on and 6 held out, of data.train" in shown
    assert cli.main(["train", "chat", "--twin", "--base", "./nowhere"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    (alone / "rows.jsonl").write_text('{"messages": []}\n{"messages": 3}\n')
    assert twin("chat", "--data.train", "rows.jsonl") == 1
    assert capsys.readouterr().err.count("rows.jsonl:") == 2


@pytest.mark.parametrize("fault", ["untrained", "reload", "merge"])
def test_a_twin_fails_where_the_way_does(
    fault: str, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"untrained": "The adapter has no effect", "reload": "Failed: replay", "merge": "is not proven: KL"}[fault]
    if fault == "untrained":
        fit = train.fit

        def undone(task: Any, base: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            done = fit(task, base, model, *args, **kwargs)
            for name, parameter in model.named_parameters():
                parameter.data.copy_(before[name])
            return done

        monkeypatch.setattr(train, "fit", undone)
    elif fault == "reload":
        monkeypatch.setattr(saved, "fill", lambda *args, **kwargs: None)
    else:
        monkeypatch.setattr(changes.LowRank, "rows", lambda self, before, rows: before)
    assert twin("complete", "--quant", "none") == 3
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["bart", "deberta-v2", "deepseek_v3", "gemma2", "gpt2", "mixtral", "phi3", "qwen3_next", "t5"]
)
def test_any_architecture_can_be_made_small(kind: str) -> None:
    settings: Any = transformers.AutoConfig.for_model(kind)
    settings.vocab_size, settings.use_cache = 300, False
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        setattr(settings, name, 1)
    miniature._shrink(settings)
    assert settings.num_hidden_layers == 2
    model = miniature._maker(settings).from_config(settings).eval()
    assert model.num_parameters() < 3e7
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        said = model(input_ids=ids, **({"decoder_input_ids": ids} if settings.is_encoder_decoder else {}))
    assert said[0].isfinite().all()


def test_a_few_rows_hold_few_classes_and_some_of_each() -> None:
    made = [Labelled(f"a:{n}", f"text {n}", f"class {n % 50}") for n in range(500)]
    settings = config.RunConfig(task="classify", base="b", out=Path("o"), data=config.DataConfig(train="a", eval="b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_runs.formats, "each", lambda *args, **kwargs: iter(made))
        chosen, held_out = of_runs.few(settings, tasks.get("classify"))
    assert len(chosen) + len(held_out) == of_runs.FEW
    assert {row.label for row in held_out} <= {row.label for row in chosen}
    assert len({row.label for row in chosen}) == of_runs.MOST_CLASSES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("recipes") / "base")


@pytest.mark.parametrize("name", ["chat", "classify", "complete"])
def test_a_recipe_trains(base: Path, tmp_path: Path, name: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    if name != "chat":
        said = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
        fields = ("prompt", "completion") if name == "complete" else ("text", "label")
        made = [dict(zip(fields, (ask["content"], reply["content"]), strict=True)) for ask, reply in said]
        rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    words = ["--train.steps", "2", "--data.max-length", "64"]
    run(tmp_path, f"{name}.py", "--base", base, "--data.train", rows, "--out", "out", *words,
        LORA_FT_HOME=str(tmp_path / "home"))  # fmt: skip
    assert_adapter(tmp_path / "out", base if name != "classify" else None)
    if name == "classify":
        assert "score" in " ".join(load_file(tmp_path / "out" / WEIGHTS))
        assert "accuracy" in (tmp_path / "out" / "README.md").read_text()


def test_the_rows_of_the_recipe_for_classes_are_made_as_it_says(tmp_path: Path) -> None:
    parts = {"train": [["what is 'it'?", "ask"], ["go on", "go"]], "val": [["hm", "ask"]], "test": [["on", "go"]]}
    (tmp_path / "data_full.json").write_text(json.dumps(parts | {"oos_test": [["x", "oos"]]}))
    told = ast.get_docstring(ast.parse((RECIPES / "classify.py").read_text(encoding="utf-8")))
    found = re.search(r'python -c "(.*?)"', told or "", flags=re.DOTALL)
    assert found
    done = subprocess.run([sys.executable, "-c", found[1]], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for part, rows in parts.items():
        made = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        assert made == [{"text": text, "label": label} for text, label in rows]


def test_the_recipe_tag_trains(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "base", "bert")
    lines = [f"w{n} B-LOW\nw{n + 100} O\n" for n in range(40, 60)]
    (tmp_path / "rows.conll").write_text("\n".join(lines), encoding="utf-8")
    shown = run(tmp_path, "tag.py", "--base", base, "--data.train", "rows.conll", "--out", "out", "--train.steps", "2",
                LORA_FT_HOME=str(tmp_path / "home"))  # fmt: skip
    assert "entity_f1 " in shown.splitlines()[-1]
    assert_adapter(tmp_path / "out", base, "TokenClassification", num_labels=3)


@pytest.mark.parametrize("metric", ["exact_match", None])
def test_the_recipe_seq2seq_trains(tmp_path: Path, metric: str | None) -> None:
    base = tiny.model_folder(tmp_path / "base", "t5")
    rows = [{"source": f"w{n} w{n + 1}", "target": f"w{n + 2} w{n + 3}"} for n in range(40, 60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--train.steps", "2", *(["--data.metrics", metric] if metric else [])]
    shown = run(tmp_path, "seq2seq.py", "--base", base, "--data.train", "rows.jsonl", "--out", "out", *words,
                LORA_FT_HOME=str(tmp_path / "home"))  # fmt: skip
    assert all(f"{name} " in shown.splitlines()[-1] for name in ([metric] if metric else ["chrf", "rougeL"]))
    assert_adapter(tmp_path / "out", base, "Seq2SeqLM")


def test_the_flat_loop_trains_and_names_the_rows_it_leaves_out(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    ask, reply = {"role": "user", "content": "w40 w41"}, {"role": "assistant", "content": "w42"}
    long = "w50 " * 600
    with rows.open("a", encoding="utf-8") as stream:
        for messages in (
            [ask, reply, ask],  # line 13 ends with a question
            [{**ask, "content": long}, reply],  # line 14 is cut before its answer
            [ask, {**reply, "content": long}],  # line 15 is cut in its answer: user w40 w41 end assistant, w50 ...
        ):
            stream.write(json.dumps({"messages": messages}) + "\n")
    shown = run(tmp_path, "flat_loop.py", rows, "out", base)
    assert "rows.jsonl:13: left out: it does not end in an answer in words to train on" in shown
    assert "rows.jsonl:14: left out: of its 606 tokens, the first 512 hold nothing to train on" in shown
    assert "13 rows, of which 1 were cut at 512 tokens and lost 95 in all" in shown
    assert "step 2/2  loss " in shown
    assert_adapter(tmp_path / "out", base)


def test_the_flat_loop_names_rows_with_tools_that_the_template_does_not_write(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    ask, reply = {"role": "user", "content": "w40 w41"}, {"role": "assistant", "content": "w42"}
    call = {"id": "c1", "type": "function", "function": {"name": "w43", "arguments": "{}"}}
    calling, result = {**reply, "tool_calls": [call]}, {"role": "tool", "content": "w44", "tool_call_id": "c1"}
    tools = [{"type": "function", "function": {"name": "w43", "parameters": {}}}]
    with rows.open("a", encoding="utf-8") as stream:
        for row in (
            {"messages": [ask, reply], "tools": tools},  # line 9
            {"messages": [ask, {**calling, "content": None}, result, reply]},  # line 10
            {"messages": [ask, calling]},  # line 11
        ):
            stream.write(json.dumps(row) + "\n")
    shown = run(tmp_path, "flat_loop.py", rows, "out", base)
    assert "rows.jsonl:9: left out: the base's chat template does not write its tools" in shown
    assert "rows.jsonl:10: left out: the base's chat template does not write its tool calls" in shown
    assert "rows.jsonl:11: left out: it does not end in an answer in words to train on" in shown
    assert "\n8 rows, of which 0 were cut" in shown


def test_the_flat_loop_leaves_out_what_the_template_refuses(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    loop = importlib.import_module("flat_loop")
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    ask, reply = {"role": "user", "content": "w40"}, {"role": "assistant", "content": "w42"}
    with rows.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"messages": [{"role": "system", "content": "w50"}, ask, reply]}) + "\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for fault in ("raise_exception('no system turn')", "messages[0].name.first", "1 + messages[0]['content']"):
        tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ " + fault + " }}{% endif %}w60 w61"
        assert len(loop.read(tokenizer, str(rows))) == 2
        assert "rows.jsonl:3: left out: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"w{n} w{n + 1} w{n + 2}"} for n in range(40, 56)],
        [{"question": f"w{n}", "answer": f"w{n + 1}"} for n in range(40, 56)],
        [
            {"conversations": [{"from": "human", "value": f"w{n}"}, {"from": "gpt", "value": f"w{n + 1}"}]}
            for n in range(40, 56)
        ],
    ],
    ids=["text", "question", "sharegpt"],
)
def test_the_flat_loop_reads_every_format(base: Path, tmp_path: Path, rows: list[dict]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    shown = run(tmp_path, "flat_loop.py", "rows.json", "out", base)
    assert "16 rows, of which 0 were cut" in shown
    assert_adapter(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA.name}")
@pytest.mark.parametrize("name", ["chat", "complete", "flat_loop"])
def test_a_recipe_trains_the_real_base_on_real_rows(tmp_path: Path, name: str) -> None:
    # The flat loop has no option for steps: two of its steps are 16 rows.
    rows = json.loads((DATA / "alpaca_en_demo.json").read_text(encoding="utf-8"))[: 16 if name == "flat_loop" else 40]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    if name == "flat_loop":
        assert "step 2/2" in run(tmp_path, "flat_loop.py", "rows.json", "out")
    else:
        words = ["--train.steps", "2", "--data.max-length", "128"]
        run(tmp_path, f"{name}.py", "--data.train", "rows.json", "--out", "out", *words)
    assert_adapter(tmp_path / "out")
