"""Measure rows: loss, accuracy and metrics on generated replies, of the adapter and of its base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft import adapters, losses, metrics
from lora_ft.config import Metric
from lora_ft.data.formats import Example
from lora_ft.generate import Sampling, generate
from lora_ft.losses import Losses
from lora_ft.tasks import Features, Task

# Longest reply generated, over the longest one wanted: what runs on further is wrong already.
ROOM = 1.25


@dataclass(frozen=True)
class Comparison:
    """The same rows answered by the base and by the adapter."""

    base: dict[str, Any]
    adapter: dict[str, Any]
    """As `base`, with `loss_change_interval`: the 95% interval of the adapter's loss less the base's.

    It is None for fewer rows than `losses.FEWEST_ROWS`.
    """
    before: list[str]
    """The base's replies, where metrics on replies were asked for."""
    after: list[str]


def compare(
    task: Task,
    model: Any,
    examples: Sequence[Example],
    rows: Sequence[Features],
    *,
    names: Sequence[Metric] = (),
    batch_size: int = 4,
    note: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Returns loss, accuracy and the metrics `names` of the same rows for the base and for the adapter.

    The interval is a paired bootstrap over rows.

    Args:
        names: metrics on generated replies.
        note: told what is being measured, for a progress display.
    """
    note("measuring the base")
    with adapters.without(model):
        base_losses = losses.of_rows(task, model, rows, batch_size)
        before = replies(task, model, examples) if names else []
    note("measuring the adapter")
    adapter_losses = losses.of_rows(task, model, rows, batch_size)
    after = replies(task, model, examples) if names else []
    wanted = [task.question(example)[1] for example in examples] if names else []
    found = losses.difference_interval(base_losses, adapter_losses)
    interval = None if found is None else list(found)
    return Comparison(
        _values(task, base_losses) | score_replies(before, wanted, names),
        _values(task, adapter_losses) | score_replies(after, wanted, names) | {"loss_change_interval": interval},
        before,
        after,
    )


def replies_match(task: Task, model: Any, examples: Sequence[Example], names: Sequence[Metric]) -> dict[str, float]:
    """Returns the metrics `names` of replies generated greedily for `examples`."""
    found = replies(task, model, examples)
    return score_replies(found, [task.question(example)[1] for example in examples], names)


def replies(task: Task, model: Any, examples: Sequence[Example]) -> list[str]:
    """Returns the model's greedy replies to the prompts of `examples`, cut at 1.25 times the longest one wanted."""
    asked = [task.question(example) for example in examples]
    longest = max(len(ids) for ids in task.tokenizer([want for _, want in asked])["input_ids"])
    sampling = Sampling(max_new_tokens=int(ROOM * longest) + 1)
    prompts = [prompt for prompt, _ in asked]
    return generate(model, task.tokenizer, prompts, sampling=sampling, stop_ids=task.end_ids())


def score_replies(found: Sequence[str], wanted: Sequence[str], names: Sequence[Metric]) -> dict[str, float]:
    """Returns the metrics `names` of replies against the ones wanted."""
    values: dict[str, float] = {}
    for name in names:
        values.update(metrics.compute(name, found, wanted))
    return values


def _values(task: Task, found: Losses) -> dict[str, Any]:
    return {"loss": found.mean, task.accuracy_name: found.accuracy, "rows": len(found.nll)}
