"""One run in processes that order sets each their own way: `python -m tests.reliability.same_bytes --count 2`.

Python orders its sets by a hash that differs from process to process. Adapter, configuration and card must not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import tiny

FILES = ("adapter_model.safetensors", "adapter_config.json", "config.yaml", "README.md")
# A recipe with much in it that could come in the order of a set.
OPTIONS = [
    "--base", "base", "--out", "run", "--data.train", "rows.jsonl", "--data.eval", "0.25", "--quant", "none",
    "--lora.rank", "4", "--lora.targets", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
    "--lora.rank-pattern", "q_proj", "2", "v_proj", "3", "--lora.alpha-pattern", "k_proj", "8", "o_proj", "12",
    "--data.special-tokens", "<|a|>", "<|b|>", "--lora.dropout", "0.1",
    "--train.steps", "6", "--train.lr", "1e-2", "--train.batch-size", "4", "--train.dtype", "float32",
]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What one process wrote: the sha256 of each file."""

    hash_seed: str
    files: dict[str, str]


def train(folder: Path, base: Path, hash_seed: str) -> Made:
    """Returns what a process with that PYTHONHASHSEED writes, working in `folder`."""
    folder.mkdir()
    (folder / "base").symlink_to(base, target_is_directory=True)
    rows = [
        {"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i % 7} w9"}]}
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "lora_ft.cli", "train", "chat", *OPTIONS]
    root = Path(__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "PYTHONHASHSEED": hash_seed}
    environ["LORA_FT_HOME"] = str(folder / "home")
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"PYTHONHASHSEED={hash_seed}: {done.stderr[-2000:]}")
    sums = {name: hashlib.sha256((folder / "run" / name).read_bytes()).hexdigest() for name in FILES}
    return Made(hash_seed, sums)


def run(count: int) -> list[Made]:
    """Returns what `count` processes wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        base = tiny.model_folder(Path(scratch) / "model")
        return [train(Path(scratch) / f"p{i}", base, str(1 + 4_294_967 * i)) for i in range(count)]


def differing(made: list[Made]) -> list[str]:
    """Returns the names of the files that are not the same bytes everywhere."""
    return [name for name in FILES if len({one.files[name] for one in made}) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2)
    made = run(parser.parse_args().count)
    found = differing(made)
    print(
        f"{len(made)} processes with {len(made)} hash seeds wrote {', '.join(FILES)}: {len(found)} differ {found or ''}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
