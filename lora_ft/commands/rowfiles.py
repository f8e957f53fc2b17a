"""The commands on files of rows: check and prepare."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lora_ft.commands.options import DataCheckConfig, DataPrepareConfig
from lora_ft.config import PreferConfig, ReasonConfig
from lora_ft.errors import LoraFtError
from lora_ft.system.terminal import say


def check(config: DataCheckConfig) -> None:
    """Says what would be trained of a file of rows, and shows some of it."""
    from rich.console import Console
    from rich.text import Text

    from lora_ft import sources, tasks
    from lora_ft.base import load_tokenizer, longest_row
    from lora_ft.data import formats
    from lora_ft.data.preferences import Judged
    from lora_ft.data.render import Rendered, coloured
    from lora_ft.data.show import TRAINED_STYLE

    examples = formats.read(config.file, config.columns)
    task = tasks.get(config.task)
    if config.task == "prefer" and isinstance(examples[0], Judged):
        task.configure(PreferConfig(loss="kto"))
    if config.task == "reason":
        # A row is its prompt here, whatever room a reply has; its answer is checked by a run, which names the reward.
        task.configure(ReasonConfig(max_new_tokens=1))
    task.learn(examples)
    source = sources.resolve(config.base)
    tokenizer = load_tokenizer(source.folder)
    task.prepare(tokenizer, longest_row(source, task.model_class, config.max_length))
    rows = tasks.featurize(task, examples)
    lengths = [length for row in rows for length in task.lengths(row)]
    found = {
        "file": Path(config.file).name,
        "rows": len(rows),
        "tokens": sum(lengths),
        "longest_row": max(lengths),
        "cut_rows": task.cut_rows,
        "ways": list(task.ways),
        "rules": list(task.rules),
    }
    if config.json:
        say(json.dumps(found))
        return
    console = Console()
    for example, row in list(zip(examples, rows, strict=True))[: config.show]:
        console.rule(example.where)
        answer = task.answer(row)
        if answer is None:
            for text in task.texts(row):
                console.print(coloured(tokenizer, Rendered(example.where, text["input_ids"], text["labels"])))
        else:
            console.print(tokenizer.decode(row["input_ids"]), markup=False, highlight=False)
            console.print(Text.assemble("-> ", (answer, TRAINED_STYLE)))
    for rule in task.rules:
        say(f"the chat template {rule}")
    cut = f", {task.cut_rows} cut at {task.max_length}" if task.cut_rows else ""
    masked = f"; mask found by {' and '.join(task.ways)}" if task.ways else ""
    counted = f"{len(rows)} {config.task} rows, {found['tokens']} tokens, longest {found['longest_row']}"
    say(f"{found['file']}: {counted}{cut}{masked}; all good")


def prepare(config: DataPrepareConfig) -> None:
    """Mends a file of rows as far as the user agrees."""
    from lora_ft.commands.prepare import prepare as mend

    def agree(question: str) -> bool:
        if config.yes or config.json:
            if not config.json:
                say(f"{question}: yes")
            return config.yes
        say(f"{question}? [Y/n]")
        try:
            return input("> ").strip().lower() in ("", "y", "yes")
        except EOFError:
            raise LoraFtError("Nobody answers: add --yes to agree to all that is advised.") from None

    done = mend(config.file, config.base, agree=agree, say=(lambda text: None) if config.json else say)
    if config.json:
        say(json.dumps(asdict(done)))
