"""`lora-ft data prepare`: a file of rows looked over, mended as far as its owner agrees, and split for training."""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ft.data import files, findings
from lora_ft.data.findings import Finding, Kind, Line, Lines
from lora_ft.errors import DataError, LoraFtError
from lora_ft.system import atomicio

SHARE, MOST_HELD_OUT, SEED = 0.1, 1000, 42
TASK_OF = {"chat": "chat", "completion": "complete", "text": "complete", "preference": "prefer"}
# A split of fewer rows than this would hold out too little to say anything.
FEWEST_TO_SPLIT = 20


@dataclass
class Prepared:
    """What came of a file."""

    kind: Kind
    rows: int
    findings: list[dict[str, Any]] = field(default_factory=list)
    """`weight`, `text`, `rows`, and whether its fix was `taken`."""
    files: dict[str, str] = field(default_factory=dict)
    """`train` and, where rows were held out, `valid`."""
    estimate: dict[str, float] = field(default_factory=dict)
    """`tokens`, `steps`, `seconds` and `bytes` of a training with the usual options; empty where it cannot be told."""
    command: str = ""
    """What to run next; empty where nothing trains on such rows."""
    reason: str = ""
    """Why there is no estimate, or no command either."""


def prepare(
    source: Path,
    base: str,
    *,
    agree: Callable[[str], bool],
    say: Callable[[str], None],
    estimated: Callable[[Path, Kind, str], dict[str, float]] | None = None,
) -> Prepared:
    """Returns what came of a file, having written the rows beside it.

    Args:
        base: the model that the rows are for.
        agree: asked before each change that is advised.
        estimated: returns what training on a file takes; unset, it is counted and measured here.

    Raises:
        DataError: nothing can be made of the file.
    """
    lines, kind, done = _read(source, agree, say)
    looking = findings.look(lines, kind)
    answer: Lines | None = None
    while True:
        try:
            finding, lines = looking.send(answer)
        except StopIteration:
            break
        answer = _settled(finding, lines, done, agree, say)
        if answer is not None:
            lines = answer
        if not lines:
            raise DataError([f"{source.name}: no row is left to train on."])
    say(f"These rows teach {findings.task_of(lines, kind)}.")
    done.rows = len(lines)
    parts = {"train": lines}
    held_out = min(MOST_HELD_OUT, round(SHARE * len(lines)))
    if len(lines) >= FEWEST_TO_SPLIT and agree(f"Hold out {held_out} rows to measure on"):
        order = list(range(len(lines)))
        random.Random(SEED).shuffle(order)
        chosen = set(order[:held_out])
        parts = {
            "train": [line for i, line in enumerate(lines) if i not in chosen],
            "valid": [line for i, line in enumerate(lines) if i in chosen],
        }
    for name, held in parts.items():
        place = _free(source, f"_prepared_{name}" if len(parts) > 1 else "_prepared")
        text = "".join(json.dumps(line.fields, ensure_ascii=False) + "\n" for line in held)
        atomicio.write(place, text)
        done.files[name] = str(place)
        say(f"Wrote {len(held)} rows to {place}.")
    done.command = _command(done, base, source)
    try:
        done.estimate = (estimated or estimate)(Path(done.files["train"]), kind, base)
    except LoraFtError as error:
        done.reason = f"What training takes cannot be told: {error}"
        say(done.reason)
    else:
        seconds, memory, tokens = (done.estimate[name] for name in ("seconds", "bytes", "tokens"))
        took = f"about {_duration(seconds)} and {memory / 2**30:.1f} GiB here: 3 times {tokens:,.0f} tokens"
        say(f"Training takes {took}.")
    say(f"Next:\n  {done.command}")
    return done


def _read(source: Path, agree: Callable[[str], bool], say: Callable[[str], None]) -> tuple[Lines, Kind, Prepared]:
    """Returns the rows that can be read, under the names that training reads, and what they are."""
    lines: Lines = []
    broken: list[str] = []
    for row in files.rows(str(source), streaming=False):
        if isinstance(row, DataError):
            broken += row.problems
        else:
            lines.append(Line(row.where, row.fields))
    if not lines:
        raise DataError(broken)
    ready = findings.ready_for(lines)
    if ready is not None:
        look = f"lora-ft data check {source} --task {ready}"
        raise DataError(
            [f"{lines[0].where}: rows for the task {ready} need nothing prepared: look at them with `{look}`."]
        )
    found = findings.kind_of(lines)
    if found is None:
        names = ", ".join(lines[0].fields)
        rule = "give prompt and completion, messages, chosen and rejected, or text"
        raise DataError([f"{lines[0].where}: has the columns {names}; {rule}."])
    kind, columns = found
    done = Prepared(kind, len(lines))
    if broken:
        told = f"{len(broken)} rows cannot be read, and are left out: {' '.join(broken[:5])}"
        _note(done, Finding("needed", told), True, say)
    known = {*columns, "tools", "functions", "parallel_tool_calls", "input", "prompt"}
    known |= set(findings.ASKED) if kind == "preference" else set()
    more = sorted({name for line in lines for name in line.fields} - known)
    if more:
        _note(
            done, Finding("needed", f"Columns that training does not read are left out: {', '.join(more)}."), True, say
        )
    renamed = [name for name in columns if name not in ("prompt", "completion", "messages", "text")]
    if renamed and kind in ("chat", "completion", "text"):
        _note(done, Finding("needed", f"Columns get the names that training reads: {', '.join(renamed)}."), True, say)
    return findings.normal(lines, kind, columns), kind, done


def _settled(
    finding: Finding, lines: Lines, done: Prepared, agree: Callable[[str], bool], say: Callable[[str], None]
) -> Lines | None:
    """Returns the rows after the fix of a finding, where it has one that is needed or agreed to."""
    taken = finding.fix is not None and finding.weight == "needed"
    if finding.fix is not None and finding.weight == "advised":
        taken = agree(f"{finding}\n  {finding.ask}")
        _note(done, finding, taken, lambda text: None)
    else:
        _note(done, finding, taken, say)
    return finding.fix(lines) if taken and finding.fix is not None else None


def _note(done: Prepared, finding: Finding, taken: bool, say: Callable[[str], None]) -> None:
    done.findings.append({"weight": finding.weight, "text": finding.text, "rows": list(finding.rows), "taken": taken})
    say(str(finding))


def _free(source: Path, more: str) -> Path:
    """Returns a name beside the source that is not taken: nothing is ever overwritten."""
    names = (
        source.with_name(f"{source.stem}{more}{number}.jsonl") for number in ("", *(f"-{n}" for n in range(2, 1000)))
    )
    return next(name for name in names if not name.exists())


def _command(done: Prepared, base: str, source: Path) -> str:
    task = TASK_OF[done.kind]
    held_out = ["--data.eval", done.files["valid"]] if "valid" in done.files else []
    words = ["lora-ft", "train", task, "--base", base, "--data.train", done.files["train"], *held_out]
    return shlex.join([*words, "--out", f"runs/{source.stem}"])


def estimate(path: Path, kind: Kind, base: str) -> dict[str, float]:
    """Returns `tokens` of a pass, `steps`, `seconds` and `bytes` of a training with the usual options, roughly.

    The products of a step are counted and the device's speed at such products is measured: what a training takes beside
    them is put at as much again on a processor. Memory is that of the weights, and of what a batch's activations take.
    """
    import torch

    from lora_ft import base as bases
    from lora_ft import memory, sources, tasks
    from lora_ft.config import TrainConfig
    from lora_ft.data import formats

    source = sources.resolve(base)
    task = tasks.get(TASK_OF[kind])
    examples = formats.read(str(path))
    task.learn(examples)
    task.prepare(bases.load_tokenizer(source.folder), 1024)
    rows = tasks.featurize(task, examples)
    lengths = [sum(task.lengths(row)) for row in rows]
    config = bases.read_config(source.folder)
    weights = sources.count_numbers(source.folder)
    usual = TrainConfig()
    tokens = sum(lengths)
    # Forward twice the weights, backward as much: the frozen weights get no gradient of their own. A reference, which
    # the base is to replies that are compared, is once more forward.
    passes = 3 if kind == "preference" else 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed = _products_per_s(device)
    held = memory.roughly(weights, config, usual.batch_size, max(lengths), bases.choose_dtype("auto", device)[0])
    if held is None:
        raise LoraFtError(f"{base}: its configuration does not say how many layers of which size it has.")
    return {
        "tokens": float(tokens),
        "steps": float(-(-len(rows) // usual.batch_size) * int(usual.epochs)),
        "seconds": 2 * 2 * passes * weights * tokens * usual.epochs / speed,
        "bytes": held,
    }


def _products_per_s(device: str) -> float:
    """Returns the multiplications and additions a second of a device, at products like those of a small model."""
    import torch

    from lora_ft import base as bases

    dtype, _ = bases.choose_dtype("auto", device)
    left, right = torch.ones(512, 576, dtype=dtype, device=device), torch.ones(576, 1536, dtype=dtype, device=device)
    left @ right
    began, made = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < 0.2:
        left @ right
        made += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * 512 * 576 * 1536 * made / took


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
