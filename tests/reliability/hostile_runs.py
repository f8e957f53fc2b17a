"""Hostile run folders, adapters that fit in words only, tokenizers that are programs, and bases with keys for code."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_ft import saved, train
from lora_ft.config import DataConfig, RunConfig
from lora_ft.proof import environment
from lora_ft.system import atomicio, manifest
from lora_ft.training import started
from tests.reliability.cases import ADAPTER, Good, Made, change

FACTS = {"train": {"name": "rows.jsonl", "rows": 1, "sha256": "a"}}
BASE = {"name": "base", "weights_sha256": "c"}


def run_config(out: Path, *, resume: bool) -> RunConfig:
    return RunConfig(task="complete", base="b", out=out, resume=resume, data=DataConfig(train="rows.jsonl"))


def make_run(good: Good, out: Path) -> Path:
    """Returns `out`: a run that was killed as it moved its adapter into its folder."""
    out.mkdir(parents=True)
    started.keep_or_compare(run_config(out, resume=False), FACTS, "t", BASE)
    with atomicio.folder(out / train.CHECKPOINTS / saved.STAGED, {}) as draft:
        for file in sorted(path for path in good.adapter.iterdir() if path.is_file()):
            draft.copy(file)
    return out


def open_run(good: Good, folder: Path) -> None:
    """Does with the folder what `lora-ft train --resume` does before it trains; `anew` has it done without."""
    config = run_config(folder, resume=not (folder / "anew").exists())
    started.sweep(folder)
    started.refuse_to_overwrite(config)
    started.clear_up(folder)
    if not started.is_trained(folder):
        from lora_ft import checkpoints

        checkpoints.newest(folder / train.CHECKPOINTS)
    started.keep_or_compare(config, FACTS, "t", BASE)
    saved.load(folder, str(good.base), "cpu")


def forged(place: Path, **files: Any) -> None:
    """Writes a manifest that names those files, with its own right digest, as anybody can."""
    (place / manifest.NAME).write_bytes(manifest.sealed({"format": 1, "facts": {}, "files": files}))


def entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def run_folders(good: Good, rng: random.Random, turn: int) -> Made:
    """Yields downloaded runs whose manifest, or links, would have files outside of them written over."""
    staged_place = Path(train.CHECKPOINTS) / saved.STAGED

    def naming(name: str, bait: str, place: Path = staged_place, anew: bool = False) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            staged = folder / place
            if place != staged_place:
                shutil.rmtree(folder / staged_place)
            staged.mkdir(exist_ok=True)
            (folder / bait).parent.mkdir(parents=True, exist_ok=True)
            (folder / bait).write_text("evil")
            (staged / environment.FILE).write_text("{}")
            forged(staged, **{name: entry(folder / bait), environment.FILE: entry(staged / environment.FILE)})
            if anew:
                (folder / "anew").touch()

        return make

    def linked(folder: Path) -> None:
        naming("link/canary", f"{staged_place}/link/canary")(folder)
        (folder / "link").symlink_to(good.canary.parent)

    def link(name: Path) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            shutil.rmtree(folder / name)
            (folder / name).symlink_to(good.canary.parent)

        return make

    def written(file: str, text: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder / file).write_text(text)

        return make

    def of(**content: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            sealed = manifest.sealed({"format": 1, "facts": {}, "files": {}, **content})
            (folder / staged_place / manifest.NAME).write_bytes(sealed)

        return make

    none, depth = "no checkpoint to resume from", rng.randint(2000, 90_000)
    out, begun = "../../outside/canary", Path(train.CHECKPOINTS) / "checkpoint-5"
    staged, start = f"{staged_place}/{manifest.NAME}", f"{train.CHECKPOINTS}/{started.FILE}"
    yield "a manifest that names a file outside", none, naming(out, "outside/canary")
    yield "the same without --resume", "holds an unfinished run", naming(out, "outside/canary", anew=True)
    yield "a manifest with an absolute name", none, naming(str(good.canary), "x")
    yield "a checkpoint that names a file outside", "no checkpoint", naming(out, "outside/canary", begun)
    yield "a manifest that names a link", none, linked
    yield "checkpoints that are a link", "it is a link", link(Path(train.CHECKPOINTS))
    yield "an adapter that is a link", "it is a link", link(staged_place)
    yield "a manifest of a list", none, of(files=[rng.random()])
    yield "a manifest of numbers", none, of(files={"x": rng.randint(0, 9)})
    yield "a manifest of no digests", none, of(files={"x": {"bytes": "1", "sha256": None}})
    yield "a manifest of another format", none, of(format=["x" * 9999])
    yield "a manifest nested deep", none, written(staged, '{"a": ' + "[" * depth + "]" * depth + "}")
    yield "a manifest of 3 MB", none, written(staged, '{"a": "' + "a" * (3 << 20) + '"}')
    yield "a start that is a list", "it holds a list", written(start, f"[{rng.random()}]")
    yield (
        "a start nested deep",
        "its own digest differs",
        written(start, '{"a": ' + "[" * depth + "]" * depth + "}"),
    )


def adapter_numbers(good: Good, rng: random.Random, turn: int) -> Made:
    """Yields adapters that are sound JSON and safetensors, and cost memory or time, or lose numbers."""

    def setting(**fields: Any) -> Callable[[Path], None]:
        return lambda folder: change(folder / "adapter_config.json", **fields)

    def record(**fields: Any) -> Callable[[Path], None]:
        return lambda folder: change(folder / "environment.json", **fields)

    def of(how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            tensors = {name: how(tensor) for name, tensor in load_file(folder / ADAPTER).items()}
            save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})

        return make

    many, token = rng.randint(60_000, 90_000), rng.randint(296, 10**6)
    fitting = {"".join("." if i >> j & 1 else c for j, c in enumerate("self_attn.q_proj")): 4 for i in range(4000)}
    yield f"rank {many % 4000 + 90}", "the model needs", setting(r=many % 4000 + 90)
    yield "patterns that all fit", "than the", setting(rank_pattern=fitting)
    yield f"{many} patterns", "an object of at most", setting(alpha_pattern={f"q{i}": 4 for i in range(many)})
    yield f"{many} targets", "a list of at most", setting(target_modules=[f"a{i}" for i in range(many)])
    yield f"{many} modules to save", "a list of at most 256 names", setting(modules_to_save=["norm"] * many)
    yield f"token {token}", "which is none of the 296 tokens", setting(trainable_token_indices=[token])
    yield "a norm as a target", "PEFT cannot use it", setting(target_modules=["norm"])
    yield "float64", "is of F64", of(lambda t: torch.full_like(t, 10.0 ** rng.randint(39, 300), dtype=torch.float64))
    yield "whole numbers", "is of I", of(lambda t: t.to(rng.choice([torch.int8, torch.int32])))
    yield "complex numbers", "is of C64", of(lambda t: t * (1 + 1j))
    yield "float8", "is of F8", of(lambda t: t.to(torch.float8_e4m3fn))
    yield "labels that are a number", "task is", record(task={"labels": many})
    yield "a task of a million letters", "task is", record(task=["a" * 50] * 20_000)


def tokenizer_programs(good: Good, rng: random.Random, turn: int) -> Made:
    """Yields tokenizers whose steps turn a word into gigabytes."""

    def part(**parts: Any) -> Callable[[Path], None]:
        return lambda folder: change(folder / "tokenizer.json", **parts)

    def replace(times: int, **pattern: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": "w" * times}

    many = rng.randint(300, 2000)
    steps = {"type": "Sequence", "normalizers": [replace(many, String="w")] * 3}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * many
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    yield "a word that is replaced thrice", "turns a character into", part(normalizer=steps)
    yield "letters that are replaced", "turns a character into", part(normalizer=replace(many, Regex="[a-z0-9]"))
    yield "a long beginning", "adds more than", part(normalizer={"type": "Prepend", "prepend": "w" * many})
    yield "a long template", "adds more than", part(post_processor=template)
    yield "a decoder that replaces", "turns a character into", part(decoder=replace(many, String="w"))


def base_programs(good: Good, rng: random.Random, turn: int) -> Made:
    def setting(file: str, **fields: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            path = folder / file
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))

        return make

    evil = "evil" * rng.randint(1, 9)
    yield f"a cache called {evil}", "cannot load it", setting("generation_config.json", cache_implementation=evil)
    yield f"a dtype called {evil}", "does not know this model", setting("config.json", dtype=evil)
