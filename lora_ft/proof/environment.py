"""`environment.json`: what a run was made with and on, and which weights its adapter belongs to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from lora_ft.base import Base
from lora_ft.errors import AdapterError
from lora_ft.foreign.files import object_of
from lora_ft.system import atomicio
from lora_kernels.cpu import build

FILE = "environment.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "tokenizers", "safetensors")

# Of a larger file that is streamed only so much is read for its digest: pieces of one size, first and last among them.
PIECES, PIECE_BYTES = 256, 64 * 2**10
# What a tokenizer written in Python makes of this stands for its rules, which cannot be read.
PROBE = " A b\u00e9\u0301\uff21 don't  x\t12,345.6\n\u4f60\u597d <s></s> "


def describe(base: Base, **more: Any) -> dict[str, Any]:
    """Returns versions, device and base of a run, with `more` beside them; nothing names the machine or its user."""
    return {
        "versions": versions(),
        "device": device_name(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quant": base.quant,
        "base": base.source.record(),
        "left_whole": list(base.left_whole),
        "tied_embeddings": embeddings_are_tied(base.model),
        **more,
    }


def write(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record of a run into its adapter folder."""
    atomicio.write_json(folder / FILE, record)


def read(folder: Path) -> dict[str, Any]:
    """Returns the record of the run that made an adapter folder. Raises AdapterError where there is none."""
    if not (folder / FILE).exists():
        raise AdapterError(
            f"{folder}: there is no {FILE}, so nothing says which weights this adapter was made on; "
            "it was not written by lora-ft, or it is incomplete."
        )
    return object_of(folder / FILE, AdapterError)


def versions() -> dict[str, str]:
    """Returns the version of Python, of lora_ft and of each library that a result depends on."""
    found = {"python": platform.python_version(), "lora_ft": importlib.metadata.version("lora-ft")}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Returns the device in words, such as `NVIDIA GeForce RTX 3060` or `CPU, 2 threads (AVX512)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})"


def embeddings_are_tied(model: Any) -> bool:
    """Returns whether the output embeddings are the input embeddings, adapters on either one counted."""
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or inputs is None or any(hasattr(module, "lora_A") for module in (output, inputs)):
        return False
    # PEFT's wrapper for trained tokens makes a new matrix on each access; what it wraps is what is tied.
    first, second = (getattr(module, "token_adapter", module) for module in (output, inputs))
    return getattr(first, "base_layer", first).weight is getattr(second, "base_layer", second).weight


def made_with() -> dict[str, str]:
    """Returns what the last bits of a result depend on: versions, device in words, and on a CPU what was compiled."""
    if torch.cuda.is_available():
        return {**versions(), "device": device_name(torch.device("cuda"))}
    return {**versions(), "device": device_name(torch.device("cpu")), "loops": build.digest(torch.float32)}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Returns a sha256 of a tokenizer as loaded: all that words become tokens by, beginning, end and chat template.

    Those of its files would not do: writing a tokenizer anew can change their bytes. How a batch is padded and cut is
    no part of it, for whoever calls the tokenizer says that.
    """
    told: list[Any] = [sorted(tokenizer.get_vocab().items())]
    told += [tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template]
    # Normalizer, pre-tokenizer, merges, and what is put around a text.
    if (whole := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(whole.to_str())
        told.append({key: value for key, value in rules.items() if key not in ("padding", "truncation")})
    else:
        told.append([type(tokenizer).__name__, tokenizer(PROBE)["input_ids"]])
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def streamed_facts(path: Path) -> dict[str, str | None]:
    """Returns the digest of a file that is to be streamed: its sha256, or for a large one `sampled_sha256`.

    That is of its size and of pieces spread evenly over it, 16 MiB in all, so that no file is too large to begin with.
    """
    size = path.stat().st_size
    if size <= PIECES * PIECE_BYTES:
        return {"sha256": file_sha256(path)}
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as stream:
        for piece in range(PIECES):
            stream.seek((size - PIECE_BYTES) * piece // (PIECES - 1))
            digest.update(stream.read(PIECE_BYTES))
    return {"sha256": None, "sampled_sha256": digest.hexdigest()}
