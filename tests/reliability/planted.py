"""Tokens planted in a whole run, and looked for in all it leaves: `python -m tests.reliability.planted --count 24`.

They stand where secrets do: in environment variables, in the hub's store, in the address of a mirror; and where they
get by accident: in a row, in an option, in a library's log and in an error that nobody expected. One process trains,
fails to download, verifies and fails again; then every file, log and error is searched for them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import tiny
from tests.local_hub import LocalHub

ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Planted:
    """One secret."""

    place: str
    """The environment variable, or where else it stands."""
    value: str


def secrets(count: int, seed: int = 0) -> list[Planted]:
    """Returns `count` secrets of every shape, and of none."""
    rng = random.Random(seed)

    def letters(many: int, of: str = ALPHANUMERIC) -> str:
        return "".join(rng.choice(of) for _ in range(many))

    shapes = [
        lambda: ("HF_TOKEN", f"hf_{letters(34)}"),
        lambda: ("OPENAI_API_KEY", f"sk-proj-{letters(40)}"),
        lambda: ("WANDB_API_KEY", letters(40, "0123456789abcdef")),
        lambda: ("hub's store", f"hf_{letters(34)}"),
        lambda: ("mirror", letters(16)),
        lambda: ("package index", letters(16)),
        lambda: (f"SERVICE{rng.randrange(10**6)}_TOKEN", letters(24)),
        lambda: (f"AWS_SECRET_{rng.randrange(10**6)}", letters(40, ALPHANUMERIC + "/+")),
        lambda: (f"DB_PASSWORD_{rng.randrange(10**6)}", letters(12, ALPHANUMERIC + "!$%&<>\"'")),
        lambda: (f"my_key_{rng.randrange(10**6)}", letters(20)),
        lambda: ("a row", f"hf_{letters(34)}"),
        lambda: ("a row", f"sk-{letters(48)}"),
    ]
    made, places = [], set[str]()
    for i in range(count):
        place, value = shapes[i % len(shapes)]()
        # There is one store and one mirror; what is planted there a second time stands in a variable.
        if place in places and place != "a row":
            place = f"TEAM{i}_{re.sub('[^A-Za-z]', '_', place)}_KEY"
        places.add(place)
        made.append(Planted(place, value))
    return made


def played(texts: list[str]) -> None:
    """Runs the whole of it, in the process that is searched; `texts` are put into logs and errors."""
    from lora_ft import cli

    logging.basicConfig(filename="debug.log", level=logging.DEBUG, force=True)
    train = [
        "--quant",
        "none",
        "--lora.rank",
        "4",
        "--train.steps",
        "4",
        "--train.lr",
        "1e-2",
        "--data.eval",
        "eval.jsonl",
    ]
    commands = [
        ["train", "chat", "--base", "base", "--out", "run", "--data.train", "rows.jsonl", *train],
        ["train", "chat", "--base", "org/absent", "--out", "other", "--data.train", "rows.jsonl"],
        ["train", "chat", "--base", "smollm2-135m", "--out", "other", "--data.train", "rows.jsonl"],
        ["train", "chat", "--base", "base", "--revision", texts[0], "--out", "other", "--data.train", "rows.jsonl"],
        ["train", "chat", "--base", "base", "--out", "other", "--data.train", "bad.jsonl"],
        ["train", "chat", "--config", "bad.yaml"],
        ["verify", "run", "--json"],
        ["verify", "run", "--base", "org/absent", "--json"],
        ["evaluate", "run", "--data", "eval.jsonl", "--json"],
        ["merge", "run", "--out", "merged"],
        ["chat", "run", "--prompt", "w1 w2"],
        ["data", "check", "bad.jsonl", "--json"],
        ["doctor", "--json"],
    ]
    statuses = [cli.main(command) for command in commands]
    print(json.dumps({"statuses": statuses}))
    for number, text in enumerate(texts):
        logging.getLogger(f"lib{number}").warning("connecting with %s", text)
        try:
            raise ConnectionError(f"403 for https://user:{text}@example.org/")
        except ConnectionError:
            logging.getLogger("lib").exception("failed")
    raise RuntimeError(f"a fault that nobody expected, with {' '.join(texts)}")


def search(planted: list[Planted], texts: dict[str, str]) -> list[str]:
    """Returns where which secret was found; `texts` are what was searched, by name."""
    return [
        f"{where} holds what was planted in {p.place}"
        for where, text in texts.items()
        for p in planted
        if p.value in text
    ]


def run(count: int, seed: int = 0) -> tuple[list[str], int, list[int]]:
    """Returns where which secret was found, how many files and streams were searched, and the commands' statuses."""
    planted = secrets(count, seed)
    with tempfile.TemporaryDirectory() as name, LocalHub() as hub:
        folder, outside = Path(name) / "work", Path(name) / "outside"
        folder.mkdir()
        outside.mkdir()
        hub.faults["info"] = 403  # 500 would be asked again and again
        tiny.model_folder(folder / "base")
        root = Path(__file__).parents[2]
        environ = {
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
            "HF_HOME": str(outside),
            "LORA_FT_HOME": str(folder / "home"),
            "PIP_RETRIES": "0",
        }
        at = lambda place: next((p.value for p in planted if p.place == place), "none")  # noqa: E731
        environ["HF_ENDPOINT"] = hub.url.replace("//", f"//user:{at('mirror')}@")
        environ["PIP_INDEX_URL"] = f"http://user:{at('package index')}@127.0.0.1:9/simple"
        (outside / "token").write_text(at("hub's store"))
        environ |= {p.place: p.value for p in planted if p.place.isidentifier()}
        in_rows = [p.value for p in planted if p.place == "a row"]
        rows = [[f"w{i} w{i + 1}", f"w{i % 7} w9"] for i in range(12)] + [[f"w1 {text}", "w2"] for text in in_rows]
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in rows
        ]
        (folder / "rows.jsonl").write_text("\n".join(lines[:10]))
        (folder / "eval.jsonl").write_text("\n".join(lines[::-1][: 2 + len(in_rows)]))
        values = [p.value for p in planted]
        (folder / "bad.jsonl").write_text(
            "\n".join(json.dumps({"messages": [{"role": v, "content": v}]}) for v in values)
        )
        (folder / "bad.yaml").write_text(f"task: chat\nbase: a\nout: b\n{values[0]}: 1\n")
        given = {name for name in os.listdir(folder) if name.endswith((".jsonl", ".yaml"))}  # noqa: PTH208
        done = subprocess.run(
            [sys.executable, "-m", "tests.reliability.planted", "--play"],
            cwd=folder,
            env={**os.environ, **environ},
            input=json.dumps(values),
            capture_output=True,
            text=True,
            check=False,
        )
        searched = {"stdout": done.stdout, "stderr": done.stderr}
        for file in folder.rglob("*"):
            if file.is_file() and file.name not in given:
                searched[str(file.relative_to(folder))] = file.read_bytes().decode("utf-8", "replace")
        found = search(planted, searched)
        told = [line for line in done.stdout.splitlines() if line.startswith('{"statuses"')]
        if not told or "nobody expected" not in done.stderr:
            raise RuntimeError(f"the run did not come to its end: {done.stderr[-3000:]}")
        return found, len(searched), json.loads(told[0])["statuses"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--play", action="store_true", help="be the process that is searched; secrets come on stdin")
    chosen = parser.parse_args()
    if chosen.play:
        played(json.loads(sys.stdin.read()))
    found, searched, statuses = run(chosen.count)
    for line in found:
        print(line)
    print(
        f"{chosen.count} tokens planted, {len(statuses)} commands run (statuses {statuses}), "
        f"{searched} files, logs and streams searched: {len(found)} tokens found"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
