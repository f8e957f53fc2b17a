"""Files of safetensors: their header checked before anything is mapped, then their tensors.

The format: 8 bytes with the length of the header, a JSON header, the data (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import LoraFtError
from lora_ft.foreign.strictjson import INT64, JsonError, loads, quoted

if TYPE_CHECKING:
    import torch

# 100 bytes a tensor: this is room for 80,000 in one file.
MAX_HEADER_BYTES = 8 * 2**20
MAX_NAME_CHARS = 512
MAX_DIMENSIONS = 16
# Of the floating-point dtypes, as whole numbers.
INFINITIES = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
NOT_WHOLE = "not a safetensors file, or cut short"
DAMAGED = "the file was damaged or made to deceive; fetch it again."
# Numbers of fewer than 8 bits are packed.
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def header(file: Path, error: type[LoraFtError]) -> tuple[int, dict[str, Any]]:
    """Returns where the data starts, in bytes, and the header: name -> dtype, shape and data_offsets.

    Raises `error` where it is not a whole safetensors file: a header too long or not JSON, a name twice or with a path
    in it, an unknown dtype, a shape that is not the size of its data, data that overlaps, leaves a gap or is missing.
    """
    held = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if held < 8 or size > held - 8:
            raise error(f"{file.name}: {NOT_WHOLE} ({held} bytes): fetch it again.")
        if size > MAX_HEADER_BYTES:
            raise error(f"{file.name}: its header has {size:,} bytes, more than {MAX_HEADER_BYTES:,}: fetch it again.")
        raw = stream.read(size)
    try:
        found = loads(raw.decode())
    except (JsonError, UnicodeDecodeError) as why:
        raise error(f"{file.name}: {NOT_WHOLE} ({held} bytes): its header {why}: fetch it again.") from None
    if not isinstance(found, dict):
        raise error(f"{file.name}: {NOT_WHOLE} ({held} bytes): its header is no object: fetch it again.")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{file.name}: the metadata in its header is not text: fetch it again.")
    for name, spec in found.items():
        if problem := _misnamed(name) or _malformed(spec):
            raise error(f"{file.name}: {quoted(name)} {problem}: {DAMAGED}")
    end = 0
    for name, spec in sorted(found.items(), key=lambda item: item[1]["data_offsets"]):
        if spec["data_offsets"][0] != end:
            gap = "overlaps with another tensor" if spec["data_offsets"][0] < end else "leaves a gap before its data"
            raise error(f"{file.name}: {quoted(name)} {gap}: {DAMAGED}")
        end = spec["data_offsets"][1]
    if 8 + size + end != held:
        raise error(f"{file.name}: {NOT_WHOLE} ({held} bytes): fetch it again.")
    return 8 + size, found


def has_nan(data: bytes, dtype: str) -> bool:
    """Returns whether a number in the data of a tensor is none, which those of 8 bits and integers never are."""
    import numpy as np

    if dtype not in INFINITIES:
        return False
    bits = np.frombuffer(data, f"<u{BITS[dtype] // 8}")
    without_sign = bits & bits.dtype.type(2 ** (BITS[dtype] - 1) - 1)
    return bool((without_sign > bits.dtype.type(INFINITIES[dtype])).any())


def load(file: Path, error: type[LoraFtError]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file by name, on the CPU, its header checked first. Raises `error`."""
    import safetensors
    from safetensors.torch import load_file

    header(file, error)
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError, LookupError) as why:
        raise error(f"{file}: cannot be read: {why}.") from None


def _misnamed(name: str) -> str:
    if not 0 < len(name) <= MAX_NAME_CHARS:
        return f"is a name of {len(name)} characters"
    if not name.isprintable() or set(name) & set("/\\") or ".." in name:
        return "is no name of a tensor: it holds a path or a character that does not print"
    return ""


def _malformed(spec: Any) -> str:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has the dtype {quoted(str(dtype))}, which is none of safetensors"
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return "has a shape that is none"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has data_offsets that are none"
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        return f"has {offsets[1] - offsets[0]} bytes of data, but its shape calls for {bits // 8}"
    return ""


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 and value in INT64 for value in values)
