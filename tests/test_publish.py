"""Publishing an adapter: a whole round trip, every request failed in turn, what is refused, and what the card says."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http
from markdown_it import MarkdownIt

from lora_ft import publish, remote, saved
from lora_ft.cli import main
from lora_ft.data import vectors
from lora_ft.errors import AdapterError
from lora_ft.foreign import tensors
from lora_ft.pages import card, summary
from lora_ft.proof import environment
from lora_ft.remote import PublishError, Remote
from lora_ft.system import manifest, redaction
from tests import hub_cards, publishing_hub, tiny
from tests.publishing_hub import FAULTS, LARGE, TOKEN, PublishingHub
from tests.test_cli import write_rows
from tests.test_report import summary as of_reports
from tests.test_sources import point_at

LICENSED = b"---\nlicense: apache-2.0\n---\n"
PLACE = "me/tiny-replies"
UNKNOWN = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublishingHub]:
    """A hub that holds a base, asked with a token that may write."""
    folder = tmp_path_factory.mktemp("hub")
    with PublishingHub(folder / "cas") as server, pytest.MonkeyPatch.context() as patch:
        (folder / "cas").mkdir()
        point_at(server.url, folder / "cache", patch)
        # What PEFT asks by a function, and not by a client of its own, is asked where this one was made for.
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("LORA_FT_HOME", str(folder / "home"))
        server.add_folder("org/base", tiny.model_folder(folder / "base"), **{"README.md": LICENSED})
        yield server


@pytest.fixture(scope="module")
def adapter(hub: PublishingHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained on the hub's base by the command, and proven."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "held_out.jsonl", 8, seed=1)
    words = ["train", "chat", "--base", "org/base", "--out", str(folder / "tiny"), "--lora.rank", "4"]
    words += ["--data.train", str(folder / "train.jsonl"), "--data.eval", str(folder / "held_out.jsonl")]
    assert main([*words, "--train.epochs", "3", "--train.lr", "1e-2"]) == 0
    for file in (folder / "tiny").iterdir():
        if file.name.endswith(LARGE):
            hub.large[environment.file_sha256(file)] = file.read_bytes()
    return folder / "tiny"


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the seal as proven, where that is not what is looked at: it takes longer than all the rest."""
    verdict = type("Verdict", (), {"require": lambda self, what: None})()
    monkeypatch.setattr(publish.seal, "verify", lambda *_, **__: verdict)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the client's own repetitions come without a pause; the hub of the tests keeps the clock that all have."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))


@pytest.fixture
def transport(request: pytest.FixtureRequest, hub: PublishingHub, monkeypatch: pytest.MonkeyPatch) -> str:
    """How large files are sent: the client's own way, or as before it."""
    if request.param == "lfs":
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "cas", None)
        monkeypatch.setattr(hub, "large", {})
    return request.param


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 60, 61, 62]])).logits


@pytest.mark.parametrize("transport", ["xet", "lfs"], indirect=True)
def test_what_is_published_downloads_loads_and_says_the_same(
    hub: PublishingHub, adapter: Path, transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{PLACE}-{transport}"
    assert main(["publish", str(adapter), "--repo", name]) == 0
    told = capsys.readouterr().out
    assert "published" in told
    assert "tag v1, private" in told
    assert "8 rows as token ids and 3 samples in words" in told
    repo = hub.kept(name)
    assert repo.private
    assert repo.tags == {"v1": repo.branches["main"]}
    assert len(repo.history) == 2, "the hub's first commit and one of ours"
    got = Path(huggingface_hub.snapshot_download(name, local_dir=tmp_path / "got"))
    shutil.rmtree(got / ".cache")
    assert manifest.verify(got)["base_model"] == "org/base"
    assert {f.name for f in got.iterdir()} == {*publish.BELONG, ".gitattributes", manifest.NAME} - {
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
        "spiece.model", "sentencepiece.bpe.model", *vectors.FILES,
    }  # fmt: skip
    settings = json.loads((got / saved.CONFIG).read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (
        "org/base",
        hub.repos["org/base"].branches["main"],
    )
    assert (got / saved.WEIGHTS).read_bytes() == (adapter / saved.WEIGHTS).read_bytes()
    here, there = saved.load(adapter, device="cpu"), saved.load(got, device="cpu")
    assert torch.equal(logits(here.model), logits(there.model))
    plain = transformers.AutoModelForCausalLM.from_pretrained("org/base", revision=settings["revision"])
    without = logits(plain)
    assert not torch.allclose(logits(peft.PeftModel.from_pretrained(plain, name)), without)
    # The same again changes nothing.
    before = len(hub.requests)
    assert main(["publish", str(adapter), "--repo", name]) == 0
    assert "is the same already" in capsys.readouterr().out
    assert (len(repo.history), repo.tags) == (2, {"v1": repo.branches["main"]})
    assert not [asked for asked in hub.requests[before:] if asked.startswith("POST")]


# A minute of processor time in all: what differs most is tried always.
OFTEN = {("xet", "lost"), ("xet", "truncated"), ("lfs", "drop")}


def each(often: set[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(transport, how, marks=[] if (transport, how) in often else pytest.mark.slow)
        for transport in ("xet", "lfs")
        for how in FAULTS
    ]


@pytest.mark.parametrize(("transport", "how"), each(OFTEN), indirect=["transport"])
def test_whichever_request_fails_a_second_call_completes_it(
    hub: PublishingHub, adapter: Path, transport: str, how: str, unproven: None, at_once: None
) -> None:
    hub.begin()
    count, fault = 1, 0
    while fault < count:
        name = f"{PLACE}-{transport}-{how}-{fault}"
        hub.begin((fault, how))
        with contextlib.suppress(PublishError):
            publish.publish(adapter, name)
        hub.begin()
        done = publish.publish(adapter, name)
        repo = hub.kept(name)
        whole = repo.commits[done.commit]
        assert whole[manifest.NAME]
        assert repo.tags == {"v1": done.commit}
        assert repo.private
        # Nobody ever saw a half: what the branch has been at is nothing of ours, or all of it.
        assert [files == whole or set(files) == {".gitattributes"} for files in hub.versions(name)] == [True, True]
        if fault == 0:
            hub.begin()
            publish.publish(adapter, f"{name}-count")
            count = hub.asked
            assert count >= 10
        fault += 1


@pytest.mark.parametrize(("transport", "how"), each({("xet", "lost")}), indirect=["transport"])
def test_a_new_version_takes_the_place_of_the_old_in_one_commit_whichever_request_fails(
    hub: PublishingHub, adapter: Path, transport: str, how: str, unproven: None, at_once: None, tmp_path: Path
) -> None:
    """Also what was part of the old and is not of the new goes, and the tag of the old stays where it is."""
    new = shutil.copytree(adapter, tmp_path / "tiny")
    (new / "chat_template.jinja").unlink()
    told = summary.read(new)
    summary.write(new, dataclasses.replace(told, title="other", samples=[]))
    count, fault = 1, 0
    while fault < count:
        name = f"{PLACE}-new-{transport}-{how}-{fault}"
        hub.begin()
        old = publish.publish(adapter, name)
        hub.begin((fault, how))
        with contextlib.suppress(PublishError):
            publish.publish(new, name)
        count = max(count, hub.asked) if fault else hub.asked + 8
        hub.begin()
        done = publish.publish(new, name)
        repo = hub.kept(name)
        first, *later = hub.versions(name)
        assert set(first) == {".gitattributes"}
        assert later == [repo.commits[old.commit], repo.commits[done.commit]]
        assert repo.tags == {"v1": old.commit, "v2": done.commit}
        assert "chat_template.jinja" in repo.commits[old.commit]
        assert "chat_template.jinja" not in repo.commits[done.commit]
        fault += 1


def test_a_commit_that_is_not_whole_would_be_noticed(
    hub: PublishingHub, adapter: Path, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: files that come one commit after the other leave a half behind when a request is lost."""
    whole = Remote.commit

    def one_by_one(self: Remote, files: Any, gone: Any, message: str, parent: str, *, request: bool = False) -> str:
        for name in sorted(files):
            parent = whole(self, {name: files[name]}, [], message, parent, request=request)
        return parent

    monkeypatch.setattr(Remote, "commit", one_by_one)
    publish.publish(adapter, f"{PLACE}-halves")
    seen = hub.versions(f"{PLACE}-halves")
    assert not all(files == seen[-1] or set(files) == {".gitattributes"} for files in seen)


def test_a_pull_request_leaves_the_repository_alone_and_is_not_opened_twice(
    hub: PublishingHub, adapter: Path, unproven: None
) -> None:
    hub.repos["other/model"] = publishing_hub.Kept(branches={"main": "0" * 40}, commits={"0" * 40: {"README.md": b"x"}})
    done = publish.publish(adapter, "other/model", as_request=True, public=True)
    assert (done.commit, done.tag) == ("refs/pr/1", None)
    again = publish.publish(adapter, "other/model", as_request=True, public=True)
    assert (again.commit, again.changed) == ("refs/pr/1", False)
    repo = hub.kept("other/model")
    assert repo.commits[repo.branches["main"]] == {"README.md": b"x"}
    assert saved.WEIGHTS in repo.commits[repo.branches["refs/pr/1"]]
    assert len(repo.requests) == 1
    # Opened, with the answer lost: the request is found.
    hub.begin()
    publish.publish(adapter, "other/model", as_request=True, public=True)
    repo.requests.clear()
    for number in range(hub.asked + 6):
        hub.begin((number, "lost"))
        with contextlib.suppress(PublishError):
            publish.publish(adapter, "other/model", as_request=True, public=True)
        hub.begin()
        publish.publish(adapter, "other/model", as_request=True, public=True)
        assert len(repo.requests) == 1
        repo.requests.clear()


def test_public_is_only_what_is_asked_to_be(
    hub: PublishingHub, adapter: Path, unproven: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(adapter), "--repo", f"{PLACE}-seen"]) == 0
    assert main(["publish", str(adapter), "--repo", f"{PLACE}-seen", "--public"]) == 0
    assert "for everybody to read" in capsys.readouterr().out
    assert not hub.kept(f"{PLACE}-seen").private
    assert main(["publish", str(adapter), "--repo", f"{PLACE}-seen"]) == 1
    assert "everybody can read this repository: add --public" in capsys.readouterr().err


def test_a_request_on_a_public_repository_needs_consent_and_never_changes_who_may_read(
    hub: PublishingHub, adapter: Path, unproven: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, private in (("other/seen", False), ("other/unseen", True)):
        hub.repos[name] = publishing_hub.Kept(
            branches={"main": "2" * 40}, commits={"2" * 40: {"README.md": b"x"}}, private=private
        )
    words = ["publish", str(adapter), "--pr"]
    assert main([*words, "--repo", "other/seen"]) == 1
    assert "everybody can read this repository, and requests on it: add --public" in capsys.readouterr().err
    assert not hub.kept("other/seen").requests
    assert main([*words, "--repo", "other/seen", "--public"]) == 0
    assert "for everybody to read" in capsys.readouterr().out
    assert main([*words, "--repo", "other/unseen", "--public"]) == 0
    assert hub.kept("other/unseen").private


def test_a_broken_seal_is_never_published(
    hub: PublishingHub, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(adapter, tmp_path / "tiny")
    weights = bytearray((broken / saved.WEIGHTS).read_bytes())
    weights[-2] ^= 0x40
    (broken / saved.WEIGHTS).write_bytes(bytes(weights))
    hub.begin()
    assert main(["publish", str(broken), "--repo", f"{PLACE}-broken"]) == 3
    assert "does not do what its seal says" in capsys.readouterr().err
    assert f"{PLACE}-broken" not in hub.repos
    assert not [asked for asked in hub.requests if asked.startswith(("POST", "PUT"))]


@pytest.mark.parametrize(
    "ask",
    [
        lambda there: there.state(),
        lambda there: there.create(public=False),
        lambda there: there.request("a title"),
        lambda there: there.tag("3" * 40),
        lambda there: there.make_public(),
    ],
    ids=["state", "create", "request", "tag", "make_public"],
)
def test_a_hub_that_says_nothing_is_not_waited_for(
    ask: Callable[[Remote], Any], hub: PublishingHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, told = Remote(PLACE), []

    def asked() -> None:
        try:
            ask(there)
        except PublishError as error:
            told.append(error)

    monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    # The system takes the connection, and nobody reads from it.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there.api.endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        asking = threading.Thread(target=asked, daemon=True)
        asking.start()
        asking.join(30)
        assert not asking.is_alive()
    assert "the hub did not answer" in str(told[0])
    assert told[0].lost


@pytest.mark.parametrize(
    ("part", "status", "headers", "told"),
    [
        ("/api/models/me/", 401, UNKNOWN, "does not know this token"),
        ("/repos/create", 403, {}, "this token may not"),
        ("/preupload/", 403, {}, "give it the right to write there"),
        ("/commit/", 412, {}, "somebody else has changed the repository in the meantime"),
        ("/tag/", 409, {}, "somebody else has changed the repository in the meantime"),
        ("/commit/", 413, {}, "make room in the namespace"),
        ("/commit/", 429, {"Retry-After": "77"}, "Call the same command again in 77 seconds."),
        ("/commit/", 502, {}, "the hub answered with 502"),
        ("/validate-yaml", 400, {}, "the hub does not take the card"),
    ],
)  # fmt: skip
def test_each_refusal_says_what_to_do(
    hub: PublishingHub, adapter: Path, unproven: None, at_once: None, monkeypatch: pytest.MonkeyPatch,
    part: str, status: int, headers: dict[str, str], told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(hub, "status", {part: (status, headers)})
    with pytest.raises(PublishError) as caught:
        publish.publish(adapter, f"{PLACE}-{part.strip('/').replace('/', '-')}-{status}")
    assert told in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_what_stands_against_it_is_said_before_anything_is_sent(
    hub: PublishingHub, adapter: Path, unproven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refused(*words: str, status: int = 1, folder: Path = adapter) -> str:
        assert main(["publish", str(folder), *words]) == status
        return capsys.readouterr().err

    hub.repos["me/taken"] = publishing_hub.Kept(
        branches={"main": "1" * 40}, commits={"1" * 40: {"model.safetensors": b"x"}}, private=True
    )
    hub.repos["other/hidden"] = publishing_hub.Kept(private=True)
    monkeypatch.setattr(hub, "sees", lambda handler, repo: repo is not hub.repos["other/hidden"])
    assert "it holds model.safetensors, and no adapter of lora-ft" in refused("--repo", "me/taken")
    assert "taken by a repository that this token may not see" in refused("--repo", "other/hidden")
    assert "leave out --pr" in refused("--repo", "me/nowhere", "--pr")
    assert "this token may not (you may not write to elsewhere)" in refused("--repo", "elsewhere/x")
    assert "there is no such folder" in refused("--repo", "me/x", folder=tmp_path / "none")
    assert "no summary.json" in refused("--repo", "me/x", folder=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing can be published" in refused("--repo", "me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    assert "publishing needs a token" in refused("--repo", "me/x")
    for bad in ("x", "a/b/c", "me/..", "-a/b", "/home/x"):
        with pytest.raises(SystemExit) as stopped:
            main(["publish", str(adapter), f"--repo={bad}"])
        assert stopped.value.code == 2


def test_nothing_of_the_machine_nor_any_secret_is_published(
    hub: PublishingHub, adapter: Path, unproven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Canaries where such things get to: rows, metadata of a tokenizer, what lies beside an adapter."""
    home = tmp_path / "people" / "alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(publish.getpass, "getuser", lambda: "alice")
    canary = "hf_" + "c4n4ry" * 5
    folder = shutil.copytree(adapter, tmp_path / "tiny")
    for name in ("optimizer.pt", "training_args.bin", "notes.txt"):
        (folder / name).write_text(f"{home} {canary}")
    (folder / "checkpoints").mkdir()
    told = summary.read(folder)
    said = f"{home}/rows and /home/alice/x and {canary}"
    samples = [{"prompt": said, "expected": said, "before": said, "after": said}]
    (folder / summary.FILE).write_text(
        json.dumps({**json.loads((folder / summary.FILE).read_text()), "samples": samples})
    )
    assert told.samples
    (folder / "report.html").write_text((folder / "report.html").read_text() + said)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "name_or_path": "/fsx/bob/model"}))
    done = publish.publish(folder, f"{PLACE}-clean")
    files = hub.kept(f"{PLACE}-clean").commits[done.commit]
    assert done.left_out == ("notes.txt", "optimizer.pt", "training_args.bin", "checkpoints/")
    assert not [name for name in files if name.endswith((".pt", ".bin", ".txt"))]
    for name, body in files.items():
        for secret in (str(home), "alice", canary, "/fsx/bob", str(tmp_path), TOKEN):
            assert secret.encode() not in body, (name, secret)
    assert b"[redacted]" in files["README.md"]
    # What nobody can do without is not changed behind their back.
    for name, change in (("config.yaml", f"{home}/rows.jsonl"), ("chat_template.jinja", canary)):
        kept = (folder / name).read_text()
        (folder / name).write_text(f"{kept}\n# {change}\n")
        with pytest.raises(AdapterError, match=rf"{name}:\d+: (holds a secret|names a place)"):
            publish.publish(folder, f"{PLACE}-dirty")
        (folder / name).write_text(kept)
    assert f"{PLACE}-dirty" not in hub.repos


def test_the_same_folder_gives_the_same_bytes(hub: PublishingHub, adapter: Path, unproven: None) -> None:
    one, two = (publish.publish(adapter, f"me/{space}") for space in ("first-place", "other-place"))
    files = [hub.kept(done.repo).commits[done.commit] for done in (one, two)]
    assert files[0].keys() == files[1].keys()
    for name in files[0].keys() - {manifest.NAME}:
        assert files[0][name].replace(b"first-place", b"other-place") == files[1][name], name


def test_what_is_published_names_no_place_outside_the_folder_nor_the_folder(
    hub: PublishingHub, adapter: Path, unproven: None, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "acme-secret")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["data"] |= {"train": "../../bob/acme/rows.jsonl", "eval": "x/../../bob/acme/held.jsonl"}
    settings |= {"out": "acme-secret", "init_from": "~/bob/first"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    told = summary.read(folder)
    summary.write(folder, dataclasses.replace(told, title="acme-secret", config={**told.config, **settings}))
    done = publish.publish(folder, "me/places")
    repo = hub.kept("me/places")
    files = repo.commits[done.commit]
    for name, body in files.items():
        assert not [word for word in (b"bob", b"acme") if word in body], name
    assert hub.messages[-1].startswith("places, adapter ")
    made = yaml.safe_load(files["config.yaml"])
    assert (made["data"]["train"], made["data"]["eval"], made["out"]) == ("rows.jsonl", "held.jsonl", "places")
    assert made["init_from"] == "first"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/home/bob/rows.jsonl", "rows.jsonl"), ("../../bob/acme/rows.jsonl", "rows.jsonl"), ("~/acme/x", "x"),
        ("~bob/acme/x", "x"), ("./../bob/x.py:reward", "x.py:reward"), ("runs/../../bob/x", "x"), ("..", "."),
        ("C:\\Users\\bob\\x", "x"), ("..\\bob\\x", "x"), ("org/name", "org/name"), ("runs/x", "runs/x"),
        ("0.1", "0.1"), ("runs/a..b", "runs/a..b"), ("runs/../x", "runs/../x"),
    ],
)  # fmt: skip
def test_of_a_path_that_leads_out_the_last_part_is_left(name: str, told: str) -> None:
    assert redaction.portable(name) == told
    assert not publish._is_place(told)


def test_a_place_that_is_left_is_refused(
    hub: PublishingHub, adapter: Path, unproven: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: with nothing taken out, the search finds what leads outwards."""
    folder = shutil.copytree(adapter, tmp_path / "tiny")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        re.sub(r"(?m)^  train: .*$", "  train: ../../bob/acme/rows.jsonl", text, count=1)
    )
    monkeypatch.setattr(publish, "without_places", lambda told: told)
    with pytest.raises(AdapterError, match=r"data\.train is a path"):
        publish.publish(folder, "me/outwards")


def test_what_sentence_transformers_reads_is_published_with_its_folder(
    hub: PublishingHub, adapter: Path, unproven: None, tmp_path: Path
) -> None:
    folder, made = shutil.copytree(adapter, tmp_path / "tiny"), vectors.files("mean", 64, 128)
    assert tuple(made) == vectors.FILES
    for name, value in made.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    done = publish.publish(folder, "me/vectors")
    files = hub.kept("me/vectors").commits[done.commit]
    assert {name: json.loads(files[name]) for name in made} == made
    assert not done.left_out
    assert json.loads(files[manifest.NAME])["files"].keys() >= made.keys()


def test_a_card_edited_on_the_hub_stays_and_one_edited_here_is_told(
    hub: PublishingHub, adapter: Path, unproven: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "tiny")
    publish.publish(folder, "me/edited")
    assert "edited" not in caplog.text, "nobody has edited anything yet"
    repo = hub.kept("me/edited")
    files = dict(repo.commits[repo.branches["main"]])
    mine = files["README.md"] + b"\nMine.\n"
    hub._put("me/edited", {**files, "README.md": mine})
    for number in range(2):
        summary.write(folder, dataclasses.replace(summary.read(folder), adapter_bytes=number + 1))
        caplog.clear()
        done = publish.publish(folder, "me/edited")
        assert "me/edited: README.md was edited there, and stays as it is" in caplog.text
        assert done.changed
        got = repo.commits[done.commit]
        assert got["README.md"] == mine
        listed = json.loads(got[manifest.NAME])["files"]["README.md"]["sha256"]
        assert listed == hashlib.sha256(mine).hexdigest()
    assert not publish.publish(folder, "me/edited").changed
    (folder / "README.md").write_text("mine alone")
    caplog.clear()
    publish.publish(folder, "me/edited-here")
    assert "README.md was edited, or is of another version of lora-ft" in caplog.text
    # Removed on the hub, it is written anew.
    hub._put("me/edited", {name: body for name, body in got.items() if name != "README.md"})
    done = publish.publish(folder, "me/edited")
    assert b"Mine." not in repo.commits[done.commit]["README.md"]
    assert b"## Use" in repo.commits[done.commit]["README.md"]


# The base


def local(adapter: Path, to: Path, **base: Any) -> Path:
    """Returns a copy of the adapter whose record has another origin of its base."""
    folder = shutil.copytree(adapter, to)
    record = json.loads((folder / environment.FILE).read_text())
    record["base"] |= {"source": "folder", "name": "mine", "repo": None, "revision": None, "origin": "a local folder"}
    record["base"] |= base
    (folder / environment.FILE).write_text(json.dumps(record))
    return folder


def test_a_local_base_needs_a_name_on_the_hub_and_the_same_weights(
    hub: PublishingHub, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = local(adapter, tmp_path / "tiny")
    assert main(["publish", str(folder), "--repo", "me/mine"]) == 1
    assert "nobody else could load the adapter: name the hub repository" in capsys.readouterr().err
    hub.add_folder("org/other", tiny.model_folder(tmp_path / "other", seed=3))
    assert main(["publish", str(folder), "--repo", "me/mine", "--base", "org/other"]) == 3
    assert "org/other" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        tiny.model_folder(tmp_path / "org" / "base")
        assert main(["publish", str(folder), "--repo", "me/mine", "--base", "org/base"]) == 1
    assert "--base org/base: a folder of this name is here" in capsys.readouterr().err
    assert main(["publish", str(folder), "--repo", "me/mine", "--base", "org/base"]) == 0
    repo = hub.kept("me/mine")
    files = repo.commits[repo.branches["main"]]
    commit = hub.repos["org/base"].branches["main"]
    record, settings = json.loads(files[environment.FILE])["base"], json.loads(files[saved.CONFIG])
    assert (record["source"], record["repo"], record["revision"]) == ("hub", "org/base", commit)
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", commit)
    assert front(files)["base_model"] == "org/base"


def front(files: dict[str, bytes]) -> dict[str, Any]:
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


def test_of_a_quantized_copy_the_model_it_was_made_of_is_named(
    hub: PublishingHub, adapter: Path, unproven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card_of = b"---\nbase_model: org/base\nbase_model_relation: quantized\n---\n"
    commit = hub.add("org/base-bnb-4bit", {"README.md": card_of})
    copy = {"source": "hub", "name": "org/base-bnb-4bit", "repo": "org/base-bnb-4bit", "revision": commit}
    folder = local(adapter, tmp_path / "tiny", **copy)
    monkeypatch.setattr(publish, "_config_of", lambda base: {"quantization_config": {}})
    done = publish.publish(folder, "me/of-a-copy")
    files = hub.kept("me/of-a-copy").commits[done.commit]
    settings, said = json.loads(files[saved.CONFIG]), files["README.md"].decode()
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", None)
    assert front(files)["base_model"] == "org/base"
    assert front(files)["license"] == "apache-2.0"
    assert f"`org/base-bnb-4bit` at commit `{commit}`. That is a quantized copy of `org/base`." in said
    assert json.loads(files[manifest.NAME])["facts"]["base"]["repo"] == "org/base-bnb-4bit"


@pytest.mark.parametrize(
    ("base_card", "stated"),
    [
        (b"", {}),
        (b"---\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\nlicense: other\nlicense_name: own\nlicense_link: LINK\n---\n",
         {"license": "other", "license_name": "own", "license_link": "LINK"}),
        (b"---\nlicense: other\n---\n", {"license": "other", "license_name": "license-of-base"}),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_the_base(
    hub: PublishingHub, adapter: Path, unproven: None, base_card: bytes, stated: dict[str, str]
) -> None:
    repo = hub.repos["org/base"]
    held = repo.commits[repo.branches["main"]]
    before = held["README.md"]
    try:
        held["README.md"] = base_card
        done = publish.publish(adapter, f"me/licence-{len(base_card)}")
    finally:
        held["README.md"] = before
    files = hub.kept(done.repo).commits[done.commit]
    told = {key: value for key, value in front(files).items() if key.startswith("license")}
    assert told.items() >= stated.items()
    assert bool(told) == bool(stated)
    assert ("The card of the base states none." in files["README.md"].decode()) == (not stated)


# The card


def test_the_hub_takes_the_card_and_refuses_others() -> None:
    told = card.metadata(of_reports())
    good = f"---\n{yaml.safe_dump(told)}\n---\n"
    assert hub_cards.problems(good) == []
    assert huggingface_hub.ModelCard(good).data.eval_results[0].metric_type == "loss"
    for change in (
        {"base_model": "/home/alice/model"}, {"base_model_relation": "child"}, {"pipeline_tag": "singing"},
        {"license": "mine"}, {"license": "other"}, {"tags": [""]}, {"datasets": ["a/b/c"]}, {"model-index": [{}]},
        {"model-index": [{"name": "x", "results": [{"task": {"type": "a"}, "dataset": {"type": "b", "name": "c"},
                                                   "metrics": [{"type": "loss", "value": "low"}]}]}]},
    ):  # fmt: skip
        assert hub_cards.problems(f"---\n{yaml.safe_dump({**told, **change})}\n---\n"), change


def test_a_card_that_the_hub_refuses_is_an_error(
    hub: PublishingHub, adapter: Path, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = card.metadata
    monkeypatch.setattr(card, "metadata", lambda *given: {**made(*given), "license": "mine"})
    with pytest.raises(PublishError, match=r"the hub does not take the card: .*license"):
        publish.publish(adapter, "me/bad-card")
    assert set(hub.versions("me/bad-card")[-1]) == {".gitattributes"}


def test_the_published_card_is_whole(hub: PublishingHub, adapter: Path, unproven: None) -> None:
    done = publish.publish(adapter, "me/whole")
    files = hub.kept("me/whole").commits[done.commit]
    said = files["README.md"].decode()
    assert not re.search(r"TODO|TBD|More Information|None|nan\b|undefined|\n\n\n\n", said)
    headings = re.findall(r"^## (.*)$", said, flags=re.MULTILINE)
    assert headings == ["Use", "Base", "Data", "Evaluation", "What it forgot", "Samples", "Training", "Seal", "Limits",
                        "Versions", "Files"]  # fmt: skip
    assert "](loss.png)" in said
    assert files["loss.png"].startswith(b"\x89PNG")
    fit = json.loads(files[environment.FILE])["fit"]
    assert f"It took {summary.duration(fit['seconds'])} at" in said
    assert f"{summary.size(fit['peak_bytes'])} of memory at the peak" in said
    for name in (saved.WEIGHTS, saved.CONFIG):
        assert json.loads(files[manifest.NAME])["files"][name]["sha256"] in said
    assert said.count("**Prompt**") == said.count("**Base**") == said.count("**Adapter**") == 3


def blocks(text: str, language: str) -> list[str]:
    return [token.content for token in MarkdownIt().parse(text) if token.info == language]


def serve_by_vllm(words: list[str]) -> None:
    """Holds the arguments, and the adapter they name, to what vLLM's documentation asks of them."""
    model, *rest = words
    told = dict(word.removeprefix("--").split("=", 1) if "=" in word else (word.removeprefix("--"), value)
                for word, value in zip(rest, [*rest[1:], ""], strict=True) if word.startswith("--"))  # fmt: skip
    name, _, place = told["lora-modules"].partition("=")
    assert re.fullmatch(r"[\w.-]+", name)
    folder = Path(huggingface_hub.snapshot_download(place))
    settings = json.loads((folder / saved.CONFIG).read_text())
    assert (model, told["revision"]) == (settings["base_model_name_or_path"], settings["revision"])
    assert int(told["max-lora-rank"]) in (8, 16, 32, 64, 128, 256, 320, 512)
    assert settings["r"] <= int(told["max-lora-rank"])
    assert (settings["bias"], settings["use_dora"], settings["modules_to_save"]) == ("none", False, None)
    kinds = sorted({target.rpartition(".")[2] for target in settings["target_modules"]})
    named = re.compile(rf"base_model\.model\.[\w.]+\.({'|'.join(kinds)})\.lora_[AB]\.weight")
    held = tensors.header(folder / saved.WEIGHTS, AdapterError)[1]
    assert all(named.fullmatch(tensor) for tensor in held)


def test_every_program_in_the_card_runs(
    hub: PublishingHub, adapter: Path, unproven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done = publish.publish(adapter, "me/runs")
    said = hub.kept("me/runs").commits[done.commit]["README.md"].decode()
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(builtins, "input", lambda *_: "")
        patch.setenv("HF_TOKEN", TOKEN)
        run = {
            "hf": lambda words: download(*words),
            "lora-ft": lambda words: fine(main(words)),
            "vllm": lambda words: serve_by_vllm(words[1:]),
        }
        lines = [line for block in blocks(said, "bash") for line in block.replace("\\\n", " ").splitlines()]
        for line in lines:
            program, *words = shlex.split(line, comments=True)
            run[program](words)
        assert {line.split()[0] for line in lines} == set(run)
        answers = []
        for program in blocks(said, "python"):
            capsys.readouterr()
            exec(compile(program, "card", "exec"), {})
            answers.append(capsys.readouterr().out)
    first = summary.read(adapter).samples[0]["after"]
    assert answers[0].startswith(first[:5])
    assert len(answers) == 2


def fine(status: int) -> None:
    assert status == 0


def download(action: str, repo: str, option: str, folder: str) -> None:
    """Does what the command `hf` does with these words."""
    assert (action, option) == ("download", "--local-dir")
    huggingface_hub.snapshot_download(repo, local_dir=folder)
