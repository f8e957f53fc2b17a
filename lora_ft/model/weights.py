"""The weights in a base's files under the model's own names, one at a time: as stored, or as training computed with.

Shapes: M outputs, K inputs of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from lora_ft import sources
from lora_ft.errors import UnsupportedModelError
from lora_ft.model.four_bits import BLOCK, unpacked

# What bitsandbytes keeps beside a quantized weight.
STATISTICS = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$|\.(SCB|weight_format)$"
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights:
    """The tensors of a folder of safetensors, read through memory maps and never all at once."""

    def __init__(
        self, folder: Path, skeleton: PreTrainedModel, quant: str, dtype: torch.dtype, left_whole: set[str]
    ) -> None:
        """Maps the names in the files to those of the model.

        Args:
            skeleton: the model on the meta device, without an adapter in it.
            quant: `nf4`, `int8` or `none`, as the adapter's run had it.
            dtype: what that run computed in.
            left_whole: linear layers that were not quantized.
        """
        self.files = sources.safetensors_files(folder)
        self.quant, self.dtype = quant, dtype
        self.place: dict[str, Path] = {}
        """File of each stored name."""
        self.stored_name: dict[str, str] = {}
        """Stored name of each parameter that the files hold, in the order of the files."""
        self.written_name: dict[str, str] = {}
        """What the parameter is called when it is written again."""
        self.unused: list[str] = []
        """Stored names that have no place in the model, such as the head of another task."""
        self.fused: list[str] = []
        """Stored names that transformers joins into one parameter as it loads."""
        linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear}
        self.quantized = linears.keys() - left_whole if quant != "none" else set()
        self.transposed = {n for n, m in linears.items() if isinstance(m, Conv1D)}
        self.kept_whole = _kept_in_float32(skeleton, dtype)
        headers = {file: sources.safetensors_header(file)[1] for file in self.files}
        sizes: dict[str, int] = {}
        for file, header in headers.items():
            for name, spec in header.items():
                self.place[name] = file
                begin, end = spec["data_offsets"]
                sizes[spec["dtype"]] = sizes.get(spec["dtype"], 0) + end - begin
        self.prequantized = any(STATISTICS.search(name) for name in self.place)
        floats = {DTYPES[name]: size for name, size in sizes.items() if name in DTYPES}
        # A quantized store keeps little in floating point, so it is the run that says what to write.
        self.stored_dtype = dtype if self.prequantized or not floats else max(floats, key=lambda d: floats[d])
        self._match(skeleton)

    def names_in(self, file: Path) -> list[str]:
        """Returns the parameters that `file` holds."""
        return [name for name, stored in self.stored_name.items() if self.place[stored] == file]

    @contextmanager
    def opened(self) -> Iterator[_Reader]:
        """Yields a reader of these weights; the memory maps close after the block."""
        with ExitStack() as stack:
            handles = {file: stack.enter_context(safe_open(file, framework="pt", device="cpu")) for file in self.files}
            yield _Reader(self, handles)

    def _match(self, skeleton: PreTrainedModel) -> None:
        """Names each stored tensor the way transformers does when it loads it."""
        state, prefix = skeleton.state_dict(), skeleton.base_model_prefix
        mapping = get_model_conversion_mapping(skeleton)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
        for stored in self.place:
            if STATISTICS.search(stored):
                continue
            plain, _ = rename_source_key(stored, get_checkpoint_conversion_mapping("legacy"), [], prefix, state)
            name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
            if plain in state:
                # Only its prefix or an old name of its layer differs: written as any model of this class names it.
                name, written = plain, plain
            elif pattern is not None:
                self.fused.append(stored)
                continue
            elif name in state:
                written = stored
            else:
                if not any(pattern.search(name) for pattern in ignored):
                    self.unused.append(stored)
                continue
            self.stored_name[name], self.written_name[name] = stored, written


class _Reader:
    """Reads weights by the model's names from open files."""

    def __init__(self, weights: Weights, handles: dict[Path, Any]) -> None:
        self.weights, self.handles = weights, handles

    def original(self, name: str) -> torch.Tensor:
        """Returns the parameter as stored, of any dtype, backed by the file."""
        return self._read(self.weights.stored_name[name])

    def dequantized(self, name: str) -> torch.Tensor:
        """Returns the parameter as training computed with it: quantized and back where it was quantized."""
        of, stored = self.weights, self.original(name)
        module, _, kind = name.rpartition(".")
        if module in of.quantized and kind == "weight":
            weight_MK = stored
            if of.prequantized:
                weight_MK = self._stored_quantized(name, stored)
            else:
                if module in of.transposed:
                    weight_MK = stored.T
                weight_MK = round_trip(weight_MK.to(of.dtype), of.quant)
            return weight_MK.T if module in of.transposed else weight_MK
        if not stored.is_floating_point() or any(pattern.search(name) for pattern in of.kept_whole):
            return stored
        return stored.to(of.dtype)

    def _stored_quantized(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        key = self.weights.stored_name[name]
        statistics = {n.removeprefix(f"{key}."): n for n in self.weights.place if n.startswith(f"{key}.")}
        if statistics:
            tensors = {short: self._read(full) for short, full in statistics.items()}
            weight = bnb.nn.Params4bit.from_prequantized(stored, tensors, device="cpu")
            return unpacked(weight, weight.quant_state)
        scale_name = f"{key.removesuffix('weight')}SCB"
        if scale_name not in self.weights.place:
            return stored
        return bnb.functional.int8_vectorwise_dequant(stored, self._read(scale_name))

    def _read(self, stored: str) -> torch.Tensor:
        return self.handles[self.weights.place[stored]].get_tensor(stored)


def round_trip(weight_MK: torch.Tensor, quant: str) -> torch.Tensor:
    """Returns a weight quantized by bitsandbytes and back: in its own dtype for `nf4`, float32 for `int8`."""
    if quant == "nf4":
        packed, state = bnb.functional.quantize_4bit(
            weight_MK.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return unpacked(packed, state)
    # Rows are scaled by their largest absolute value, found in float16 whatever the run computes in.
    rows, scale_M, _ = bnb.functional.int8_vectorwise_quant(weight_MK.contiguous().to(torch.float16))
    return bnb.functional.int8_vectorwise_dequant(rows, scale_M)


def _kept_in_float32(skeleton: PreTrainedModel, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """Returns patterns of the parameters that transformers keeps in float32 although the model is in `dtype`."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(skeleton._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names |= set(skeleton._keep_in_fp32_modules or ())
    return [re.compile(name.replace("*", ".*")) for name in sorted(names)]


def require(weights: Weights, wanted: list[str], model: str) -> None:
    """Raises UnsupportedModelError where the files lack a parameter that is needed from them."""
    missing = [name for name in wanted if name not in weights.stored_name]
    if not missing:
        return
    if weights.fused:
        raise UnsupportedModelError(
            f"{model}: the files hold {weights.fused[0]} and {len(weights.fused) - 1} more tensors that transformers "
            f"joins into {missing[0]} as it loads; such models cannot be merged file by file. Use the adapter as it is."
        )
    raise UnsupportedModelError(
        f"{model}: its files hold no tensor for {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, "
        "so a merged model would miss weights. Use the adapter as it is."
    )
