"""The live view of a training run: step, loss, tokens per second, time left and memory; and of rows being answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class Bar(TrainerCallback):
    """A progress bar on a terminal; elsewhere a line every tenth of the run.

    A context manager: however its block ends, the terminal has its cursor again.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *raised: object) -> None:
        self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, state="")
        if self.console.is_terminal:
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        peak = logs["peak_bytes"] / 2**30
        # Of replies that are compared with each other the loss is about 0 whatever is learned.
        name = "reward" if logs.get("reward") is not None else "loss"
        text = f"{name} {logs[name]:.4f}  {logs['tokens_per_s']:.0f} tokens/s  peak {peak:.2f} GiB"
        self.progress.update(self.bar, state=text)
        if not self.console.is_terminal and state.global_step % max(1, state.max_steps // 10) == 0:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


@contextmanager
def of_rows(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is told of how many more rows are done: a bar on a terminal, elsewhere a line every tenth."""
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    bar, done = progress.add_task("rows", total=total), 0

    def note(rows: int) -> None:
        nonlocal done
        before, done = done, done + rows
        progress.update(bar, completed=done)
        if not console.is_terminal and 10 * before // total < 10 * done // total:
            console.print(f"row {done}/{total}")

    if console.is_terminal:
        progress.start()
    try:
        yield note
    finally:
        progress.stop()
