"""An adapter alone as a GGUF file, which llama.cpp puts on its base as it loads (`--lora`).

llama.cpp computes W x + (alpha / r) B A x, with one alpha for all layers and r the rank of each. A scale that is not
that (rsLoRA, patterns of alphas) is therefore written into B.

Shapes: M outputs, K inputs, R rank, V tokens, H hidden size.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from lora_ft import saved
from lora_ft.errors import AdapterError
from lora_ft.export.model import Described
from lora_ft.model import changes
from lora_ft.model.changes import Bias, Change, LowRank, LowRankRows, Tokens
from lora_ft.proof import recorded

INSTEAD = "Export the merged model, which holds all of it: --format gguf."


def write(folder: Path, file: Path, base_name: str | None = None) -> None:
    """Writes the adapter in a folder as one GGUF file, in float32.

    Args:
        base_name: where to find its base, when it has moved.

    Raises:
        AdapterError: it holds what such a file cannot; the message names all of it.
        UnsupportedModelError: its base cannot be written as GGUF.
    """
    source = saved.find_base(folder, recorded.read(folder)["base"], base_name)
    model, settings = Described.of(source.folder), saved.lora_settings(folder)
    changed = changes.read(folder, model.skeleton)
    refused = list(dict.fromkeys(why for name, change in changed.items() if (why := _why_not(model, name, change))))
    if refused:
        raise AdapterError(f"{folder}: llama.cpp has no place for all of this adapter: {'; '.join(refused)}. {INSTEAD}")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[model.family.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings.lora_alpha))
    for name, change in changed.items():
        for part, tensor in _factors(model, name, change, settings.lora_alpha).items():
            writer.add_tensor(f"{model.name_of(name)}.lora_{part}", tensor)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _why_not(model: Described, name: str, change: Change) -> str | None:
    """Returns why llama.cpp cannot apply a change of a parameter, None where it can."""
    module = name.rpartition(".")[0]
    if isinstance(change, Tokens):
        return f"rows of single tokens are trained ({module})"
    if isinstance(change, Bias):
        return "its B have biases"
    if isinstance(change, LowRank) and change.magnitude_M is not None:
        return "it is a DoRA, whose magnitudes it does not know"
    if not isinstance(change, LowRank | LowRankRows):
        return f"{module} is trained whole"
    ends = [model.skeleton.get_input_embeddings(), model.skeleton.get_output_embeddings()]
    if model.is_tied() and model.skeleton.get_submodule(module) in ends:
        return f"it changes {module}, one of two embeddings that are one and the same there"
    return None


def _factors(model: Described, name: str, change: Change, alpha: float) -> dict[str, np.ndarray]:
    """Returns A and B of a change as llama.cpp has them, so that (alpha / r) B A is the change."""
    if isinstance(change, LowRankRows):
        a, b = change.a_RV.float().T, change.b_HR.float()
    else:
        assert isinstance(change, LowRank)  # noqa: S101 - `_why_not` let nothing else through
        a, b = change.a_RK.float(), model.in_order(name, change.b_MR.float())
    rank = b.shape[1]
    factor = change.scaling * rank / alpha
    b = b if factor == 1 else (b.double() * factor).to(torch.float32)
    return {"a": a.contiguous().numpy(), "b": b.contiguous().numpy()}
