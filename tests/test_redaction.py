"""Secrets are taken out of what is said and written, and nothing else is."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ft.config import RunConfig
from lora_ft.errors import ConfigError, DataError, LoraFtError
from lora_ft.settings import cli
from lora_ft.system import redaction
from lora_ft.system.redaction import HIDDEN, holds_secret, redacted

TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "secret",
    [TOKEN, "api_org_" + "a" * 34, "sk-" + "a1" * 24, "sk-proj-" + "a_-" * 12, "ghp_" + "a1" * 18],
)
def test_what_looks_like_a_secret_is_hidden(secret: str) -> None:
    assert redacted(f"asked with {secret}, and {secret}.") == f"asked with {HIDDEN}, and {HIDDEN}."


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:pass@host/x", f"https://{HIDDEN}@host/x"),
        ("https://token@host", f"https://{HIDDEN}@host"),
        ("http://me:pa/ss@host/x", f"http://{HIDDEN}@host/x"),
        ("postgres://u:p@ss@h/x", f"postgres://{HIDDEN}@h/x"),
        ("at http://me:a/b@c/d@host/x, or http://other/x", f"at http://{HIDDEN}@host/x, or http://other/x"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", f"Authorization: Basic {HIDDEN}"),
        ("Authorization: Bearer " + "a1." * 9, f"Authorization: Bearer {HIDDEN}"),
    ],
)
def test_logins_in_addresses_and_headers_are_hidden(text: str, clean: str) -> None:
    assert redacted(text) == clean


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "db_password", "AWS_SECRET", "MY_PASSWD_2"])
@pytest.mark.parametrize("value", ["0123456789abcdef" * 2, 'a"b<c>&d e/f'])
def test_values_of_secret_variables_are_hidden_in_every_spelling(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert redacted(value) == value
    monkeypatch.setenv(name, value)
    assert redacted(f"[{value}]") == f"[{HIDDEN}]"
    assert json.loads(redacted(json.dumps({"a": value}))) == {"a": HIDDEN}


@pytest.mark.parametrize("before", ["", "u", "me", "you", "user:", "name:", "Bearer "])
@pytest.mark.parametrize("after", ["", "\n", "xy", "xyz"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_secret_is_hidden_in_base64_wherever_it_begins(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str, encode
) -> None:
    for secret in (TOKEN, TOKEN + "a", TOKEN + "ab", "\u00ff\u00fe?>" * 4):
        monkeypatch.setenv("HF_TOKEN", secret)
        text = encode((before + secret + after).encode()).decode()
        clean = redacted(f"Got {text}.")
        kept = clean.removeprefix("Got ").removesuffix(".").split(HIDDEN)
        assert len(kept) == 2
        # What is left are the characters that hold bits of what is around the secret.
        assert len(kept[0]) <= -(-len(before) // 3) * 4
        assert len(kept[1]) <= -(-len(after) // 3) * 4 + 4


def test_the_hubs_store_and_the_password_of_a_mirror_are_hidden(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "elsewhere"))
    (home / "elsewhere").write_text("of no known shape 123\n")
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:opensesame@pypi.example.org/simple")
    assert redacted("of no known shape 123, opensesame") == f"{HIDDEN}, {HIDDEN}"


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct at 12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "0a1b2c3d" * 8,
        "hf_hub is a package, sk-learn too; --base hf_internal/x",
        "mail me@example.org or see https://example.org/a@b",
        "tokens/s: 1234.5; special_tokens: <|im_start|>",
        "",
    ],
)
def test_nothing_else_is_hidden(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/me/.ssh/id_rsa")
    assert redacted(text + " false /home/me/.ssh/id_rsa") == text + " false /home/me/.ssh/id_rsa"
    assert not holds_secret(text)


def test_errors_and_log_records_are_clean() -> None:
    assert str(LoraFtError(f"with {TOKEN}")) == f"with {HIDDEN}"
    assert str(DataError([f"a:1: role is {TOKEN}"])) == f"a:1: role is {HIDDEN}"
    try:
        raise ValueError(TOKEN)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "got %s", (TOKEN,), sys.exc_info())
    assert redaction.RedactingFilter().filter(record)
    text = logging.Formatter().format(record)
    assert f"got {HIDDEN}" in text
    assert f"ValueError: {HIDDEN}" in text
    assert TOKEN not in text


def test_a_process_that_installs_it_is_clean_whoever_logs_and_however_it_ends() -> None:
    code = f"""
import logging, threading
from lora_ft.system import redaction
redaction.install(); redaction.install()
logging.basicConfig(level="DEBUG")
logging.getLogger("some.library").debug("at %s", "https://me:pass@host")
def fail(): raise OSError({TOKEN!r})
thread = threading.Thread(target=fail); thread.start(); thread.join()
import warnings
warnings.warn("asked with " + {TOKEN!r})
warnings.warn("asked with {TOKEN}")
warnings.warn(DeprecationWarning({TOKEN!r}))
class D:
    def __del__(self): fail()
d = D(); del d
fail()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"https://{HIDDEN}@host" in done.stderr
    assert done.stderr.count(f"OSError: {HIDDEN}") == 3
    assert done.stderr.count(f"UserWarning: asked with {HIDDEN}") == 2
    assert "Exception ignored" in done.stderr
    assert TOKEN not in done.stderr


@pytest.mark.parametrize("flag", ["--base", "--revision", "--data.train"])
def test_a_token_is_never_an_option(flag: str, tmp_path: Path) -> None:
    words = ["chat", "--base", "a", "--out", "b"]
    with pytest.raises(ConfigError, match=rf"^{flag} holds a secret.*HF_TOKEN") as told:
        cli(RunConfig, [*words, flag, f"x/{TOKEN}"])
    assert TOKEN not in str(told.value)
    (tmp_path / "run.yaml").write_text(f"task: chat\nbase: a\nout: b\nrevision: {TOKEN}\n")
    with pytest.raises(ConfigError, match=r"^--revision holds a secret"):
        cli(RunConfig, ["--config", str(tmp_path / "run.yaml")])
