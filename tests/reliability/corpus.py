"""Hostile adapters, bases, templates and configurations, each made from a good one by spoiling one thing in it."""

from __future__ import annotations

import itertools
import random

from tests.reliability.cases import ADAPTER, MODEL, Case, Good, Maker
from tests.reliability.hostile_gguf import gguf_bombs, gguf_heads
from tests.reliability.hostile_programs import adapter_yaml, templates, yaml_files
from tests.reliability.hostile_runs import adapter_numbers, base_programs, run_folders, tokenizer_programs
from tests.reliability.hostile_settings import adapter_record, adapter_settings, base_config, links, tokenizer_files
from tests.reliability.hostile_weights import (
    adapter_tensors,
    base_index,
    base_tensors,
    headers_of,
    pickles,
    sparse_header,
)
from tests.reliability.phrases import phrase_of

MAKERS: tuple[tuple[str, Maker], ...] = (
    ("adapter", headers_of(ADAPTER, "adapter")),
    ("adapter", sparse_header),
    ("adapter", pickles(ADAPTER, "adapter_model")),
    ("adapter", adapter_settings),
    ("adapter", adapter_tensors),
    ("adapter", adapter_numbers),
    ("adapter", adapter_record),
    ("adapter", tokenizer_programs),
    ("adapter", adapter_yaml),
    ("adapter", tokenizer_files),
    ("adapter", links("adapter_config.json", ADAPTER, "tokenizer.json", "config.yaml", "environment.json")),
    ("base", headers_of(MODEL, "base")),
    ("base", pickles(MODEL, "pytorch_model")),
    ("base", base_index),
    ("base", base_config),
    ("base", base_tensors),
    ("base", base_programs),
    ("base", gguf_bombs),
    ("base", gguf_heads),
    ("base", tokenizer_programs),
    ("base", tokenizer_files),
    ("base", links("config.json", MODEL, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    ("template", templates),
    ("config", yaml_files),
    ("run", run_folders),
)


def cases(good: Good, count: int, seed: int = 0) -> list[Case]:
    """Returns `count` cases: every maker in turn, and again with other draws until there are enough."""
    rng = random.Random(seed)
    made: list[Case] = []
    for turn in itertools.count():
        before = len(made)
        for kind, maker in MAKERS:
            # Those without draws are all made in the first turn.
            for name, *phrase, make in maker(good, rng, turn):
                made.append(Case(kind, name, make, phrase[0] if phrase else phrase_of(kind, name)))
        if len(made) >= count or len(made) == before:
            break
    rng.shuffle(made)
    return made[:count]
