"""What others made: each limit holds just where it should, and what is within it is read."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils.chat_template_utils import render_jinja_template

from lora_ft.errors import AdapterError, LoraFtError, SourceError
from lora_ft.foreign import adapter, cell, files, model, strictjson, strictyaml, templates, tensors
from tests import stock_templates

LIBRARY = Path(__file__).parents[1] / "lora_ft"


# Cell


def double(question: Any) -> Any:
    if question == "environment":
        return dict(os.environ)
    if question == "write":
        Path("/tmp/written by a cell").write_text("x")
    if question == "spin":
        while True:
            pass
    if question == "one long call":
        return 10 ** (10**9) > 1
    if question == "memory":
        return len(bytearray(1 << 30))
    if question == "long":
        return "a" * (cell.MAX_ANSWER_BYTES + 1)
    if question == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(question, list) and question[0] == "die once" and not Path(question[1]).exists():
        Path(question[1]).symlink_to("/")  # a file could not be written
        os.kill(os.getpid(), signal.SIGKILL)
    if question == "whole group":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    if question == "raise":
        raise KeyError("no such thing")
    return 2 * question


@pytest.fixture
def doubling():
    made = cell.Cell(double, seconds=0.5, memory_bytes=200 << 20)
    yield made
    made.close()


def test_a_cell_answers_one_question_after_another(doubling: cell.Cell) -> None:
    assert [doubling.ask(i) for i in (1, 2.5, "ab", [1, None])] == [2, 5.0, "abab", [1, None, 1, None]]


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("spin", r"takes more than 0\.5 s"),
        ("one long call", r"takes more than (0\.5 s|200 MiB)"),
        ("memory", "takes more than 200 MiB"),
        ("long", "gives more than"),
    ],
)
def test_a_cell_is_stopped_and_answers_again(doubling: cell.Cell, question: str, told: str) -> None:
    before = time.process_time()
    with pytest.raises(cell.StoppedError, match=told):
        doubling.ask(question)
    assert time.process_time() - before < 1
    assert doubling.ask(4) == 8


def test_a_cell_outlives_what_stops_the_program(doubling: cell.Cell) -> None:
    assert doubling.ask("whole group") == "whole group" * 2


def test_a_cell_that_was_killed_is_asked_once_more(doubling: cell.Cell, tmp_path: Path) -> None:
    assert doubling.ask(3) == 6
    doubling._process.kill()
    assert doubling.ask(4) == 8
    assert doubling.ask(["die once", str(tmp_path / "mark")]) == ["die once", str(tmp_path / "mark")] * 2
    with pytest.raises(cell.DiedError, match=r"ended twice \(SIGKILL\), not for its time"):
        doubling.ask("die")
    assert doubling.ask(5) == 10


def test_a_cell_ends_with_its_program() -> None:
    code = (
        "from lora_ft.foreign import cell\n"
        "from tests.test_foreign import double\n"
        "made = cell.Cell(double, seconds=0.5, memory_bytes=200 << 20)\n"
        "print(made.ask(1), made._process.pid, flush=True)\n"
    )
    for end, status in (("", 0), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)):
        done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        answer, process = map(int, done.stdout.split())
        assert answer == 2
        deadline = time.monotonic() + 10
        while Path(f"/proc/{process}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_cell_has_no_environment_and_writes_no_file(doubling: cell.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    assert doubling.ask("environment") == {}
    with pytest.raises(cell.RaisedError, match="File too large"):
        doubling.ask("write")
    with pytest.raises(cell.RaisedError, match="no such thing"):
        doubling.ask("raise")


# Chat templates

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1.5}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "What is “2 + 2”?\n"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "f", "content": "4"},
    {"role": "assistant", "content": "Four. 😀"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("name", sorted(stock_templates.STOCK))
@pytest.mark.parametrize("prompt", [False, True])
def test_a_cell_writes_what_transformers_writes(name: str, prompt: bool) -> None:
    source = stock_templates.STOCK[name].template
    present = [{key: value for key, value in turn.items() if value is not None} for turn in MESSAGES]
    try:
        texts, _ = render_jinja_template(
            conversations=[present], chat_template=source, add_generation_prompt=prompt, **SPECIAL
        )
    except Exception as error:
        with pytest.raises(templates.TemplateError, match=f"^{re.escape(str(error))}$"):
            templates.render(source, MESSAGES, special_tokens=SPECIAL, prompt=prompt)
    else:
        assert templates.render(source, MESSAGES, special_tokens=SPECIAL, prompt=prompt) == (texts[0], [])


def test_a_template_that_was_stopped_is_not_tried_again() -> None:
    source = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(templates.TemplateError, match="takes more than 1 s"):
        templates.render(source, MESSAGES, special_tokens=SPECIAL)
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(templates.TemplateError, match="takes more than 1 s"):
            templates.render(source, MESSAGES, special_tokens=SPECIAL)
    assert time.monotonic() - started < 1


def test_a_template_whose_process_was_killed_is_not_banned(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(question: Any) -> None:
        raise cell.DiedError("the process it runs in was ended twice")

    source = "{{ messages|length }} of them"
    assert templates.render(source, MESSAGES, special_tokens=SPECIAL)[0] == "4 of them"
    with monkeypatch.context() as patch:
        patch.setattr(templates._RENDERER.cell, "ask", die)
        with pytest.raises(templates.TemplateError, match="ended twice"):
            templates.render(source, MESSAGES, special_tokens=SPECIAL)
    assert templates.render(source, MESSAGES, special_tokens=SPECIAL)[0] == "4 of them"
    assert templates._RENDERER.cell is not None
    templates._RENDERER.cell._process.kill()
    assert templates.render(source, MESSAGES[:3], special_tokens=SPECIAL)[0] == "3 of them"


def test_a_template_that_bides_its_time_is_stopped() -> None:
    source = "{% if messages|length > 3 %}{{ 'a' * 9000000000 }}{% endif %}b"
    assert templates.render(source, MESSAGES[:2], special_tokens=SPECIAL)[0] == "b"
    with pytest.raises(templates.TemplateError, match="takes more than 256 MiB"):
        templates.render(source, MESSAGES, special_tokens=SPECIAL)


# JSON and YAML


def test_the_files_of_transformers_may_hold_any_number(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{"model_max_length": 1000000000000000019884624838656, "time_step_limit": [0.0, Infinity]}')
    assert files.object_of(file, SourceError, any_number=True)["time_step_limit"] == [0.0, float("inf")]
    with pytest.raises(SourceError, match="beyond 64 bits"):
        files.object_of(file, SourceError)
    with pytest.raises(strictjson.JsonError, match="NaN"):
        strictjson.loads("[NaN]", any_number=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "a": 2}', 'has the key "a" twice'),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested deeper than 64"),
        ('{"a": "\\ud800"}', "a holds half of a surrogate pair"),
        ("[]", "it holds a list, not an object"),
        ("{", "is not JSON at character 2"),
        (" " * files.MAX_CONFIG_BYTES + "{}", "bytes; such a file has 4,194,304 at most"),
    ],
)
def test_json_of_others_is_refused_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AdapterError, match=rf"a\.json: .*{told}"):
        files.object_of(tmp_path / "a.json", AdapterError)


def test_yaml_is_read_as_before() -> None:
    text = "a: &x {b: [1, 2.5, true, null, 'c']}\nd: *x\ne:\n  <<: *x\n  f: 2026-01-02\n"
    assert strictyaml.loads(text)["e"]["b"] == [1, 2.5, True, None, "c"]
    assert strictyaml.loads("") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: the key 'c' stands twice"),
        ("a: " + "[" * 16 + "]" * 16, "nested deeper than 16"),
        ("a: &a 1\nb: [" + ", ".join(["*a"] * 17) + "]", "more than 16 aliases"),
        ("a: 9223372036854775808", "beyond 64 bits"),
        ("a: !!python/name:os.system", "line 1: could not determine a constructor"),
        ("a: '" + "b" * strictyaml.MAX_BYTES + "'", "longer than 65,536 bytes"),
    ],
)
def test_yaml_of_others_is_refused_with_its_line(text: str, told: str) -> None:
    with pytest.raises(strictyaml.YamlError, match=told):
        strictyaml.loads(text)


# Safetensors


DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
)


def test_each_dtype_of_safetensors_is_known(tmp_path: Path) -> None:
    """A size for each that torch can write; any other is refused."""
    header = b'{"a":{"dtype":"EVIL","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(SourceError, match='"EVIL", which is none of safetensors'):
        tensors.header(tmp_path / "a", SourceError)
    for dtype in DTYPES:
        save_file({"a": torch.zeros(3, 5).to(dtype), "empty": torch.zeros(0, 4).to(dtype)}, tmp_path / "b")
        start, found = tensors.header(tmp_path / "b", SourceError)
        assert found["a"]["shape"] == [3, 5]
        assert start + found["a"]["data_offsets"][1] == (tmp_path / "b").stat().st_size
        assert tensors.load(tmp_path / "b", SourceError)["a"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_none_are_told_from_infinity(dtype: torch.dtype) -> None:
    def bytes_of(*numbers: float) -> bytes:
        return torch.tensor(numbers, dtype=dtype).view(torch.uint8).numpy().tobytes()

    name = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}[dtype]
    assert not tensors.has_nan(bytes_of(0.0, -0.0, float("inf"), -float("inf"), 6e4, -6e4), name)
    assert tensors.has_nan(bytes_of(1.0, float("nan")), name)
    assert tensors.has_nan(bytes_of(-float("nan"), 1.0), name)
    assert not tensors.has_nan(b"\xff" * 8, "I32")


# Adapters


def settings(**fields: Any) -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "megatron_core": "megatron.core", **fields}


def test_what_says_nothing_is_dropped_and_what_is_known_is_kept() -> None:
    kept = adapter.checked(settings(corda_config=None, eva_config=None, loftq_config={}, new_switch=False), Path("a"))
    assert kept == {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    assert adapter.checked(settings(r=adapter.MAX_RANK), Path("a"))["r"] == 4096


@pytest.mark.parametrize(
    "fields",
    [
        {"r": adapter.MAX_RANK + 1},
        {"r": True},
        {"target_modules": "a" * (adapter.MAX_PATTERN_CHARS + 1)},
        {"target_modules": "("},
        {"lora_alpha": float("inf")},
        {"corda_config": {"cache_file": "x.pt"}},
        {"lora_ga_config": {"cache_file": "x.pt"}},
        {"auto_mapping": {"parent_library": "os"}},
        {"layer_replication": [[0, 9]]},
        {"new_switch": True},
    ],
)
def test_settings_out_of_limits_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=rf"a: {next(iter(fields))} "):
        adapter.checked(settings(**fields), Path("a"))


class Named:
    """A model as far as its names go."""

    def named_modules(self) -> list[tuple[str, None]]:
        layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
        return [(name, None) for name in ("", "model", *layers, "model." + "a" * 60)]

    def named_parameters(self) -> list[tuple[str, None]]:
        return [("model.layers.0.mlp.experts.gate_up_proj", None)]


NAMED = Named()


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.gate_up_proj",
        "q_proj",
        r"layers\.[01]\..*\.q_proj",
        r".*\.(q|v)_proj",
        r"(?!.*vision).*layers\.\d+\..*(k_proj|o_proj)",
    ],
)
def test_patterns_in_use_pass(pattern: str) -> None:
    adapter.refuse_patterns({"rank_pattern": {pattern: 4}, "target_modules": pattern}, NAMED, "a")


@pytest.mark.parametrize("pattern", ["(a+)+b", r"(\w|\w\w)+!", "(a|a)*c", "(.*)*x"])
def test_patterns_that_take_years_are_stopped(pattern: str) -> None:
    with pytest.raises(AdapterError, match=r"takes more than 1 s|no module of the base is called"):
        adapter.refuse_patterns({"target_modules": pattern}, NAMED, "a")


def test_patterns_that_fit_nothing_are_named() -> None:
    with pytest.raises(AdapterError, match='no module of the base is called "g_proj", "__class__"'):
        adapter.refuse_patterns({"rank_pattern": {"g_proj": 4}, "modules_to_save": ["__class__"]}, NAMED, "a")


# Folders


def test_links_within_a_folder_and_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "same.json").symlink_to("config.json")
    files.refuse_links_out(snapshot, SourceError)
    (tmp_path / "outside.json").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(SourceError, match=r"tokenizer\.json is a link out of the folder"):
        files.refuse_links_out(snapshot, SourceError)


def test_a_whole_base_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    files.refuse_links_out(tmp_path / "link", SourceError)


@pytest.mark.parametrize("name", ["default", "tool_use", "rag-2.1"])
def test_templates_of_plain_names_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": name, "template": "x"}]}))
    model.check_tokenizer(tmp_path)


def test_code_in_a_known_base_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "a.B"}}))
    with caplog.at_level("INFO", logger="lora_ft"):
        model.check_config(tmp_path)
        model.check_config(tmp_path)
    assert caplog.text.count("names code of its own (auto_map), which is never run") == 1


# Rules that hold everywhere


def test_one_call_loads_with_code_forbidden_and_no_other_loads() -> None:
    """Whatever reads a folder by transformers goes through `reading.opened`, which lets no code be trusted."""
    seen = []
    for file in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                seen.append(file.name)
            if isinstance(node, ast.Call) and any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert ast.unparse(given["trust_remote_code"]) == "False", f"{file.name}:{node.lineno}"
                assert ast.unparse(given["local_files_only"]) == "True", f"{file.name}:{node.lineno}"
                seen.append(file.name)
    assert seen == ["reading.py"] * 2


def test_json_and_yaml_are_read_in_one_place() -> None:
    """Files of others go through the strict readers; the few that read what this program wrote are listed."""
    own = {"saved.py", "runs.py", "train.py", "report.py", "tuning.py", "cell.py", "template.py", "metrics.py"}
    # What a run writes for itself alone, and compares with a digest where it matters.
    own |= {"atomicio.py", "manifest.py", "optimizer.py", "watch.py", "started.py", "locks.py", "logged.py"}
    # What a tokenizer or a task says of itself, once it is loaded; and what the server keeps in its own database.
    own |= {"checks.py", "environment.py", "events.py", "jobs.py", "trial.py", "vocabulary.py", "selftest.py"}
    # A line of at most 64 KiB between the sandbox and what runs in it, which is none of a verdict if it is no JSON.
    own |= {"sandbox.py", "caged.py"}
    reading = {
        file.name
        for file in LIBRARY.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("json", "loads"), ("json", "load"), ("yaml", "safe_load"), ("yaml", "load")}
    }  # fmt: skip
    assert reading <= own


def test_what_does_not_print_is_escaped_in_every_error() -> None:
    assert str(LoraFtError("a\x1b[2J\u202eb\nc é")) == "a\\x1b[2J\\u202eb\nc é"


def test_a_pickle_is_named_as_one_wherever_it_is_given(tmp_path: Path) -> None:
    from lora_ft import saved, sources

    for ending in files.PICKLES:
        folder = tmp_path / ending
        folder.mkdir()
        (folder / f"adapter_model{ending}").touch()
        (folder / "config.json").write_text("{}")
        for action in (
            lambda folder=folder: saved.read_settings(folder),
            lambda folder=folder: sources.resolve(str(folder)),
            lambda folder=folder, ending=ending: sources.resolve(str(folder / f"adapter_model{ending}")),
        ):
            with pytest.raises(LoraFtError, match="a pickle, which can run code when opened"):
                action()
        shutil.rmtree(folder)


def test_no_compiled_code_of_the_hub_is_fetched(tmp_path: Path) -> None:
    """`kernels` stands in for the package of that name, through which libraries below this one fetch what they run."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("open('canary', 'w')\ndef get_kernel(*_, **__): ...\n")
    code = "import lora_ft.base, lora_ft.adapters, transformers; print(transformers.utils.is_kernels_available())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert "gemm_4bit" not in done.stderr
    assert not (tmp_path / "canary").exists()
