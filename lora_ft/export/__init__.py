"""An adapter, or what it was merged into, in the formats that other servers read.

Each file is written whole or not at all. None holds a path of this machine, and the same model gives the same bytes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from lora_ft import base as bases
from lora_ft import merge, saved
from lora_ft.errors import AdapterError, ProofError, StorageError
from lora_ft.export import lora, model, modelfile
from lora_ft.export.model import Described, Kind
from lora_ft.foreign.files import object_of
from lora_ft.proof import recorded
from lora_ft.system import atomicio

log = logging.getLogger(__name__)

Format = Literal["gguf", "gguf-lora", "ollama"]
MODELFILE, WEIGHTS = "Modelfile", "model.gguf"


def export(source: Path, out: Path, *, form: Format = "gguf", kind: Kind = "f16", base_name: str | None = None) -> int:
    """Returns the bytes of what was written to `out`: a file, or for Ollama a folder.

    Args:
        source: an adapter folder, which is merged first, or a folder of a whole model.
        kind: of the weights.
        base_name: where to find the adapter's base, when it has moved.

    Raises:
        AdapterError: `source` is neither, or such a file cannot hold the adapter.
        UnsupportedModelError: the model, its tokenizer or its template has no exact counterpart in that format.
        ProofError: what is merged does not do what the adapter does.
        StorageError: `out` is there already, or cannot be written.
    """
    if out.exists() and (out.is_file() or form != "ollama" or any(out.iterdir())):
        raise StorageError(f"{out}: is there already, and stays as it is: remove it, or choose another place.")
    is_adapter = (source / saved.CONFIG).is_file()
    if not is_adapter and not (source / "config.json").is_file():
        raise AdapterError(f"{source}: it holds neither {saved.CONFIG} nor config.json: name an adapter or a model.")
    if not is_adapter:
        if form == "gguf-lora":
            raise AdapterError(f"{source}: it is a whole model, not an adapter: use --format gguf.")
        return _write(source, out, form, kind, _name_of(source), None)
    record = recorded.read(source)
    _, task = recorded.task(source, record)
    if task.peft_task != "CAUSAL_LM":
        raise AdapterError(
            f"{source}: it was trained for {task.name}, and GGUF is for models that generate: merge it instead, with "
            "lora-ft merge, and load that with transformers."
        )
    if form == "gguf-lora":
        return atomicio.by_library(out, lambda file: lora.write(source, file, base_name))
    # Before the merge, which takes a while.
    Described.of(saved.find_base(source, record["base"], base_name).folder)
    with atomicio.draft(out) as scratch:
        merged = scratch.path / "merged"
        # What is measured is what is written: 8 bits are made of all that there is.
        dtype: Literal["float16", "float32"] = "float16" if kind == "f16" else "float32"
        try:
            merge.merge(source, merged, dtype=dtype, base_name=base_name)
        except ProofError as error:
            told = _after_place(error).replace("try --dtype", "keep it whole with lora-ft merge --dtype")
            raise ProofError(f"{source} is not exported: merged, it is not proven. {told}") from None
        except AdapterError as error:
            raise AdapterError(str(error).replace("--dtype bfloat16 or float32", "--quant q8_0")) from None
        return _write(merged, out, form, kind, record["base"]["name"], task.facts().get("system"))


def _write(folder: Path, out: Path, form: Format, kind: Kind, name: str, system: str | None) -> int:
    if form == "gguf":
        return atomicio.by_library(out, lambda file: model.write(folder, file, kind, name))
    with atomicio.folder(out) as draft:
        # First, for it may be refused.
        draft.write(MODELFILE, modelfile.of(name, bases.load_tokenizer(folder), WEIGHTS, system))
        draft.library(lambda place: model.write(folder, place / WEIGHTS, kind, name))
    return sum(file.stat().st_size for file in out.iterdir())


def _name_of(folder: Path) -> str:
    """Returns the name of what a merged model was made of, as its report has it, or the kind of the model."""
    report = folder / merge.REPORT
    base = object_of(report, AdapterError).get("base") if report.is_file() else None
    if isinstance(base, dict) and isinstance(base.get("name"), str):
        return base["name"]
    return bases.read_config(folder).model_type


def _after_place(error: ProofError) -> str:
    """Returns the reason in the error of a merge, which names a folder that is gone by now."""
    return str(error).partition("but is not proven: ")[2]
