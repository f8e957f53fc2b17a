"""Which way of a product is fastest on this very card: measured by `lora-ft bench kernels`, kept by the card's name."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_ft.sources import cache_home
from lora_ft.system import atomicio
from lora_kernels import dispatch

log = logging.getLogger(__name__)


def file_of(card_name: str) -> Path:
    """Returns where the measurements of a card are kept."""
    return cache_home() / "kernels" / f"{re.sub(r'[^A-Za-z0-9]+', '-', card_name).strip('-').lower()}.json"


def keep(card_name: str, ways: Mapping[str, str]) -> Path:
    """Writes the fastest way of each shape, by `dispatch.shape_key`, has the kernels use it, and returns the file."""
    dispatch.use_measured(card_name, ways)
    file = file_of(card_name)
    record = {"card": card_name, "torch": torch.__version__, "ways": dict(sorted(ways.items()))}
    atomicio.write_json(file, record)
    return file


def recall(card_name: str) -> bool:
    """Has the kernels use what was measured on a card, and returns whether anything was.

    What another version of torch measured, whose cuBLAS may be faster, does not count.
    """
    file = file_of(card_name)
    if not file.is_file():
        return False
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["torch"] != torch.__version__:
            log.info("the kernels were measured with torch %s: run lora-ft bench kernels again", record["torch"])
            return False
        dispatch.use_measured(card_name, record["ways"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s) and was left aside: run lora-ft bench kernels again", file, error)
        return False
    return True
