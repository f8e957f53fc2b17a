"""Fine-tune a language model with small adapters, and prove that it worked."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

__version__ = "0.1.0"

# Libraries below this one must not report its use to anybody.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Through this package bitsandbytes (when it is imported, on a processor with AVX512-BF16) and transformers fetch
# compiled code from the hub and run it. The first warns where it could not.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# oneDNN keeps its code for each shape of a product, 1024 of them by itself: 0.3 GB where rows have many lengths. A step
# of SmolLM2-135M has some 40 shapes, and lost no time with 64 kept.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

_ROOMS = (
    "adapters", "base", "config", "evaluate", "generate", "merge", "runs", "saved", "seal", "sources", "tasks", "train"
)  # fmt: skip
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    """Returns a module of the library, imported when it is first used: `lora_ft.base.load(...)`."""
    if name in _ROOMS:
        return importlib.import_module(f"lora_ft.{name}")
    raise AttributeError(f"lora_ft has no {name!r}")
