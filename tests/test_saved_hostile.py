"""Adapters that fit in words and not in numbers: refused before they cost memory or time, or lose a number unseen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft import runs, saved
from lora_ft.errors import AdapterError
from lora_ft.foreign import adapter
from tests import tiny
from tests.reliability import hostile
from tests.reliability.cases import Case, Good, change


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def good(scratch: Path) -> Good:
    return hostile.prepare(scratch)


@pytest.fixture
def folder(good: Good, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good.adapter, tmp_path / "adapter"))


def refused(good: Good, folder: Path, told: str) -> str:
    with pytest.raises(AdapterError, match=told) as raised:
        saved.load(folder, str(good.base), "cpu")
    assert len(str(raised.value)) < 1500
    return str(raised.value)


def converted(folder: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: how(tensor) for name, tensor in load_file(folder / saved.WEIGHTS).items()}
    save_file(tensors, folder / saved.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("told", "how"),
    [
        ("F64", lambda t: torch.full_like(t, 1e300, dtype=torch.float64)),
        ("F64", lambda t: t.double()),
        ("I8", lambda t: t.to(torch.int8)),
        ("C64", lambda t: t * (1 + 1j)),
        ("F8_E4M3", lambda t: t.to(torch.float8_e4m3fn)),
        ("BOOL", lambda t: t > 0),
    ],
)
def test_tensors_that_would_become_something_else_are_refused(good: Good, folder: Path, told: str, how) -> None:
    converted(folder, how)
    refused(good, folder, rf"is of {told}, not F32, BF16, F16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_as_it_is(good: Good, folder: Path, dtype: torch.dtype) -> None:
    converted(folder, lambda t: t.to(dtype))
    held = load_file(folder / saved.WEIGHTS)
    model = saved.load(folder, str(good.base), "cpu").model
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == held.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in held.items())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"trainable_token_indices": [10**6]}, "has 1000000, which is none of the 296 tokens"),
        ({"trainable_token_indices": {"embed_tokens": [1, 296]}}, 'of "embed_tokens" has 296, which is none'),
        ({"trainable_token_indices": {"q_proj": [1]}}, "PEFT cannot use it|does not fit its base"),
        ({"target_modules": ["norm"]}, "PEFT cannot use it"),
        ({"modules_to_save": ["model"]}, "PEFT cannot use it|does not fit its base"),
        ({"modules_to_save": ["norm"] * 257}, "not a list of at most 256 names"),
        ({"target_modules": [f"a{i}" for i in range(5001)]}, "not a list of at most 5000 names"),
        ({"rank_pattern": {f"a{i}": 4 for i in range(5001)}}, "not an object of at most 5000"),
        ({"rank_pattern": {"a": 1}, "alpha_pattern": {f"b{i}": 4 for i in range(512)}}, "have 513 patterns"),
    ],
)
def test_settings_that_fit_no_model_are_named(good: Good, folder: Path, fields: dict[str, Any], told: str) -> None:
    change(folder / saved.CONFIG, **fields)
    refused(good, folder, told)


def test_a_model_of_many_modules_may_have_as_many_patterns() -> None:
    """EVA gives each module a rank of its own."""

    class Deep:
        def named_modules(self) -> list[tuple[str, None]]:
            return [(f"layers.{i}.q_proj", None) for i in range(700)]

        def named_parameters(self) -> list[tuple[str, None]]:
            return []

    adapter.refuse_patterns({"rank_pattern": {f"layers.{i}.q_proj": 4 for i in range(700)}}, Deep(), "a")


@pytest.mark.parametrize("cut", [("task", ["x" * 50] * 10_000), ("task", {"labels": 5}), ("dtype", "x" * 10**6)])
def test_no_message_is_as_long_as_what_it_complains_of(good: Good, folder: Path, cut: tuple[str, Any]) -> None:
    change(folder / "environment.json", **{cut[0]: cut[1]})
    refused(good, folder, f"{cut[0]} is ")


def test_a_rank_takes_no_memory_before_it_is_refused(scratch: Path, tmp_path: Path) -> None:
    """The base is large enough that 4096 in all its layers would be 2 GB."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10}
    base = tiny.model_folder(tmp_path / "base", **sizes)
    made = tiny.run(tmp_path / "run", base, task="complete", quant="none", steps=1, sealed=False)
    large = Good(base, made.folder, tmp_path / "canary")
    work = tmp_path / "scratch"
    (work / "other").mkdir(parents=True)

    def more(folder: Path) -> None:
        change(folder / saved.CONFIG, r=4096)

    found = hostile.attempt(Case("adapter", "rank", more), large, work)
    assert found.ending == "refused"
    assert re.search(r"lora_A.weight is \(4, 512\), the model needs \(4096, 512\)", found.said)
    plain = hostile.attempt(Case("adapter", "plain", lambda folder: None), large, work)
    assert plain.ending == "loaded"
    assert found.grown_bytes < plain.grown_bytes + 60 * 10**6
    assert found.seconds < plain.seconds + 0.5


@pytest.mark.parametrize(
    ("fit", "told"),
    [
        (None, "fit is None"),
        ([1], r"fit is \[1\]"),
        ({"steps": 1}, "fit.tokens is missing"),
        ({"steps": "1", "tokens": 2, "seconds": 3.0, "peak_bytes": 4, "interrupted": False}, 'fit.steps is "1"'),
        (
            {"steps": 1, "tokens": 2, "seconds": 0, "peak_bytes": 4, "interrupted": False},
            "fit.seconds is 0, not a time",
        ),
        ({"steps": 1, "tokens": 2, "seconds": 3, "peak_bytes": 4, "interrupted": False, "x": 1}, "fit.x is none"),
    ],
)
def test_what_a_record_says_of_the_training_is_looked_at(tmp_path: Path, fit: Any, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        runs._fit(tmp_path, {"fit": fit})
    good = {"steps": 1, "tokens": 2, "seconds": 3, "peak_bytes": 4, "interrupted": False}
    assert runs._fit(tmp_path, json.loads(json.dumps({"fit": good}))).tokens_per_s == 2 / 3
