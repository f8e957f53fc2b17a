"""What this machine has and can do, for people and for bug reports."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import psutil
import torch

from lora_ft import fused, sources
from lora_ft.base import choose_dtype
from lora_ft.model import blocks
from lora_ft.proof import environment


def examine() -> dict[str, Any]:
    """Returns versions, devices, memory, the dtype that would be used and why, and which weight sources answer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = choose_dtype("auto", device)
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        **environment.versions(),
        "device": environment.device_name(torch.device(device)),
        "compute_dtype": f"{str(dtype).removeprefix('torch.')}: {why}",
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_free_gib": round(memory.available / 2**30, 1),
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["gpu_memory_gib"], found["gpu_memory_free_gib"] = round(total / 2**30, 1), round(free / 2**30, 1)
        found["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    found["nf4"] = _nf4_works(device)
    found["kernels"] = fused.implementation(torch.device(device))
    found["decoder_layers"] = blocks.implementation(torch.device(device))
    found["hub"] = _hub_answers()
    found["cache"] = sorted(p.name for p in (sources.cache_home() / "wheels").glob("*") if p.is_dir())
    found["trackers"] = [name for name in ("tensorboard", "wandb") if _installed(name)]
    return found


def _nf4_works(device: str) -> str:
    import bitsandbytes.functional as bnb

    weight = torch.randn(64, 64, device=device)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = float((bnb.dequantize_4bit(packed, state) - weight).abs().mean() / weight.abs().mean())
    # NF4's own rounding moves normal weights by about 9% on average.
    return "works" if error < 0.15 else f"broken: weights come back {error:.0%} off"


def _hub_answers() -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(sources.ALIASES["smollm2-135m"].repo, timeout=5)
    except (httpx2.TransportError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        # A firewall's page instead of an answer is a ValueError.
        return f"does not answer ({type(error).__name__}); aliases come from the package index"
    return "answers"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
