"""Hostile configurations in JSON, of adapters, bases and tokenizers, and links in place of files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.reliability.cases import Good, Made, Maker, change, write


def changes(file: str, *many: dict[str, Any]) -> Made:
    for fields in many:
        shown = ", ".join(f"{key}={str(value)[:40]}" for key, value in fields.items())
        yield f"{file}: {shown}", lambda folder, fields=fields: change(folder / file, **fields)


def bad_json(file: str, rng: random.Random) -> Made:
    """Yields files that are no JSON, or JSON that two readers would understand differently."""

    def spoil(how: Callable[[str], str | bytes]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            made = how((folder / file).read_text())
            (folder / file).write_bytes(made if isinstance(made, bytes) else made.encode())

        return make

    def before_end(text: str, more: str) -> str:
        return f"{text.rstrip()[:-1]}, {more}}}"

    depth = rng.randint(100, 200_000)
    yield f"{file}: nested {depth} deep", spoil(lambda t: before_end(t, f'"x": {"[" * depth}{"]" * depth}'))
    yield f"{file}: a key twice", spoil(lambda t: before_end(t, f'"x": 1, "x": {rng.random()}'))
    yield f"{file}: NaN", spoil(lambda t: before_end(t, '"x": NaN'))
    yield f"{file}: a number of 5,000 digits", spoil(lambda t: before_end(t, '"x": ' + "9" * 5000))
    yield f"{file}: 6 MB", spoil(lambda t: before_end(t, '"x": "' + "a" * (6 << 20) + '"'))
    yield f"{file}: not UTF-8", spoil(lambda t: before_end(t, '"x": "').encode() + b'\xff"}')
    yield f"{file}: a list", spoil(lambda t: f"[{t}]")
    yield f"{file}: cut", spoil(lambda t: t[: rng.randrange(1, len(t) - 2)])
    yield f"{file}: half a surrogate", spoil(lambda t: before_end(t, '"x": "\\ud800"'))


REGEX_BOMBS = (
    "(a+)+$",
    "([a-z_.]+)+!",
    "(.*)*x",
    "(\\w|\\w\\w)+!",
    "(.*a){20}",
    "((\\w+\\.)*\\w+)*!",
    "(?:(?:[a-z]*)*)*[0-9]!",
)


def adapter_settings(good: Good, rng: random.Random, turn: int) -> Made:
    file = "adapter_config.json"
    bomb = rng.choice(REGEX_BOMBS)
    yield from changes(
        file,
        {"r": 10 ** rng.randint(4, 18)},
        {"r": -rng.randint(1, 9)},
        {"r": 0},
        {"lora_alpha": 1e300},
        {"lora_alpha": -1},
        {"lora_dropout": rng.choice([2, -1, 1e9])},
        {"target_modules": bomb},
        {"target_modules": f".*{bomb}"},
        {"target_modules": "a" * 100_000},
        {"target_modules": rng.choice(["(", "[", "*", "(?P<a", "\\"])},
        {"target_modules": [f"a{i}" for i in range(200_000)]},
        {"target_modules": [["q_proj"]]},
        {"target_modules": [f"q_proj\u202e{rng.random()}"]},
        {"rank_pattern": {rng.choice(REGEX_BOMBS): 4}},
        {"alpha_pattern": {rng.choice(REGEX_BOMBS): 4.0}},
        {"rank_pattern": {"q_proj": 10**9}},
        {"exclude_modules": rng.choice(REGEX_BOMBS)},
        {"layers_to_transform": [-1, 2]},
        {"layers_pattern": rng.choice(REGEX_BOMBS), "layers_to_transform": [0]},
        {"trainable_token_indices": list(range(200_000))},
        {"trainable_token_indices": [-1]},
        {"modules_to_save": ["__class__"]},
        {"modules_to_save": ["."] * 200_000},
        {"auto_mapping": {"base_model_class": "os", "parent_library": rng.choice(["antigravity", "this", "evil"])}},
        {"megatron_config": {"a": 1}, "megatron_core": rng.choice(["antigravity", "evil"])},
        {"corda_config": {"cache_file": str(good.canary.parent / "bomb.pt"), "covariance_file": "bomb.pt"}},
        {"lora_ga_config": {"cache_file": str(good.canary.parent / "bomb.pt")}, "init_lora_weights": "lora_ga"},
        {"eva_config": {"rho": 1e9}},
        {"loftq_config": {"loftq_bits": 4}},
        {"layer_replication": [[0, 2]] * rng.randint(2, 9)},
        {"use_qalora": True},
        {"arrow_config": {"top_k": 3}},
        {"__class__": {"a": rng.random()}},
        {f"key{rng.random()}": "../../x"},
        {"peft_type": rng.choice(["IA3", "PROMPT_TUNING", "BONE"])},
        {"bias": "evil"},
        {"fan_in_fan_out": "yes"},
        {"base_model_name_or_path": "a\x1b[31m\u202eb"},
        {"revision": ["main"]},
        {"use_dora": 3},
    )
    yield from bad_json(file, rng)


def adapter_record(good: Good, rng: random.Random, turn: int) -> Made:
    file = "environment.json"
    base = json.loads((good.adapter / file).read_text())["base"]
    home = good.canary.parent
    yield from changes(
        file,
        {"base": {**base, "weights_sha256": "0" * 64}},
        {"base": {**base, "weights_sha256": f"../../../..{home}/pointer"}},
        {"base": {**base, "weights_sha256": f"{home}/pointer"}},
        {"base": {**base, "weights_sha256": 5}},
        {"base": base["name"]},
        {"dtype": rng.choice(["load", "__class__", "float8"])},
        {"quant": rng.choice(["gptq", "../x"])},
        {"task": {rng.choice(["__class__", "labels", "a"]): 1}},
        {"left_whole": {"a": 1}},
    )
    yield from bad_json(file, rng)

    def other_base(folder: Path) -> None:
        (folder / "other_base").touch()

    if turn == 0:
        yield "put on another base", other_base


def tokenizer_files(good: Good, rng: random.Random, turn: int) -> Made:
    """Yields spoiled tokenizers, of a base or of an adapter."""
    file = "tokenizer_config.json"
    outside = rng.choice(["../../x", "/tmp/x", "..", "a/b", "a\x00b", "x\u202ey"])
    auto_map = {"AutoTokenizer": [None, "evil.T"]}
    yield from changes(
        file,
        {"auto_map": auto_map, "tokenizer_class": "T"},
        {"trust_remote_code": True},
        {"chat_template": [{"name": outside, "template": "x"}, {"name": "default", "template": "y"}]},
        {"chat_template": {outside: "x"}},
        {"chat_template": "a" * (2 << 20)},
        {"chat_template": [1, 2]},
        {"init_inputs": ["/etc/passwd"]},
        {"tokenizer_class": "os.system"},
        {"tokenizer_class": {"a": 1}},
        {"added_tokens_decoder": {"a": {"content": 5}}},
        {"added_tokens_decoder": {"0": "a"}},
    )
    yield from bad_json(file, rng)
    for name in ("special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        depth = rng.randint(1000, 100_000)
        yield f"{name} nested deep", write(name, b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
    for name, data in (
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Evil"}}'),
        ("chat_template.jinja", b"a" * (2 << 20)),
        ("chat_template.jinja", b"\xff\xfe"),
    ):
        yield f"{name} of {len(data)} bytes", write(name, data)


def links(*names: str) -> Maker:
    def maker(good: Good, rng: random.Random, turn: int) -> Made:
        for name in names:
            target = rng.choice(["/etc/passwd", "/dev/zero", str(good.canary.parent / "secret"), "../../../x"])

            def make(folder: Path, name: str = name, target: str = target) -> None:
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(target)

            yield f"{name} is a link to {target}", make

            def pipe(folder: Path, name: str = name) -> None:
                (folder / name).unlink(missing_ok=True)
                os.mkfifo(folder / name)

            if turn == 0:
                yield f"{name} is a pipe that nobody writes to", pipe

    return maker


def base_config(good: Good, rng: random.Random, turn: int) -> Made:
    file = "config.json"
    repo = rng.choice(["evil/kernel", "evil/kernel@main", "kernels-community/x:y", "../kernel", "evil/kernel|x"])
    key = rng.choice(["attn", "experts"])
    evil = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    yield from changes(
        file,
        {f"_{key}_implementation_internal": repo},
        {f"{key}_implementation": repo},
        {f"_{key}_implementation": {"": repo}},
        {"text_config": {f"_{key}_implementation_internal": repo}},
        {"decoder": [{"inner": {f"{key}_implementation": repo}}]},
        {"trust_remote_code": True},
        {"vision": {"deep": [{"trust_remote_code": True}]}},
        {"model_type": f"evil{rng.randint(0, 99)}", "auto_map": evil},
        {"model_type": ["llama"]},
        {"model_type": None, "auto_map": evil},
        {"model_type": rng.choice(["clip", "whisper", "vit", "llava"])},
        {"num_hidden_layers": 10 ** rng.randint(4, 18)},
        {"num_labels": 10 ** rng.randint(6, 12)},
        {"vocab_size": 10 ** rng.randint(9, 13)},
        {"hidden_size": 2 ** rng.randint(16, 30)},
        {"intermediate_size": 2 ** rng.randint(20, 40)},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"hidden_size": {"a": 1}},
        {"vocab_size": rng.randint(300, 900)},
        {"num_hidden_layers": rng.randint(3, 9)},
        {"quantization_config": {"quant_method": rng.choice(["gptq", "aqlm", "evil"])}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"architectures": ["Evil"], "model_type": "evil"},
        {"rope_scaling": {"rope_type": "evil", "factor": -1}},
        {"hidden_act": "evil/act"},
    )
    yield from bad_json(file, rng)

    def with_adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil"})
        )

    if turn == 0:
        yield "a base with an adapter in it", with_adapter
