"""Measure rows: loss, accuracy and metrics on generated replies, of the adapter and of its base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_ft.data.examples import Example
from lora_ft.generate import Sampling, generate
from lora_ft.model import modes
from lora_ft.scoring import class_metrics, drift, losses, metrics, retrieval
from lora_ft.scoring.losses import Losses
from lora_ft.system import heap
from lora_ft.tasks import Features, Task
from lora_ft.training import judged

log = logging.getLogger(__name__)

# Longest reply generated, over the longest one wanted: what runs on further is wrong already.
ROOM = 1.25


@dataclass(frozen=True)
class Comparison:
    """The same rows answered by the base and by the adapter."""

    base: dict[str, Any]
    adapter: dict[str, Any]
    """As `base`, with `loss_change_interval`: the 95% interval of the adapter's loss less the base's.

    So it has of each further metric that is a mean over rows; an interval is None for fewer than `losses.FEWEST_ROWS`.
    Of classes it holds `class_metrics.TABLES` besides, and both hold what `drift.measure` gives where the model
    continues text.
    """
    before: list[str]
    """The base's replies, where metrics on replies were asked for."""
    after: list[str]
    asked: Sequence[Example]
    """The rows that they reply to."""


def compare(
    task: Task,
    model: Any,
    examples: Sequence[Example],
    rows: Sequence[Features],
    *,
    names: Sequence[str] = (),
    index: Sequence[Features] = (),
    batch_size: int = 4,
    note: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Returns loss, accuracy and the metrics `names` of the same rows for the base and for the adapter.

    The interval is a paired bootstrap over rows.

    Args:
        names: metrics on generated replies.
        index: rows to look the held-out ones up among, for a task that makes vectors.
        note: told what is being measured, for a progress display.
    """
    if task.reward is not None:
        return _judged(task, model, examples, rows, names, note)
    asked = task.questioned(examples, names) if names else []
    wanted = [task.question(example)[1] for example in asked]
    # What a metric does not take is said before hours of replies.
    score_replies(wanted, wanted, names)
    _begin("measuring the base", note)
    with modes.without(model):
        base_losses, base_values = _measured(task, model, examples, rows, index, batch_size)
        before = replies(task, model, asked) if names else []
    _begin("measuring the adapter", note)
    adapter_losses, adapter_values = _measured(task, model, examples, rows, index, batch_size)
    after = replies(task, model, asked) if names else []
    found = {"loss": losses.difference_interval(base_losses, adapter_losses)}
    found |= losses.change_intervals(base_losses, adapter_losses)
    intervals = {f"{name}_change_interval": pair and list(pair) for name, pair in found.items()}
    _begin("measuring the drift on general text", note)
    base_drift, adapter_drift = drift.measure(model, task.tokenizer) if task.peft_task == "CAUSAL_LM" else ({}, {})
    # Of the base that knows nothing of the classes a table of them says nothing.
    base_values = {name: value for name, value in base_values.items() if name not in class_metrics.TABLES}
    return Comparison(
        base_values | score_replies(before, wanted, names) | base_drift,
        adapter_values | score_replies(after, wanted, names) | intervals | adapter_drift,
        before,
        after,
        asked,
    )


def _begin(what: str, note: Callable[[str], None]) -> None:
    """Says what is measured next; the memory that the stage before it freed goes back first, lest it adds up."""
    heap.give_back()
    note(what)


def require(task: Task, names: Sequence[str] = ()) -> None:
    """Raises LoraFtError where the reward of a task, which an adapter folder names, cannot judge replies here.

    Where it is left out, that is said.

    Args:
        names: the metrics that are asked for besides.
    """
    if _is_judged(task, names):
        task.reward.admit()  # type: ignore[union-attr]
    elif task.reward is not None:
        log.warning("the reward is left out: it is a function, and none is run because an adapter folder names it")


def measure(
    task: Task,
    model: Any,
    examples: Sequence[Example],
    rows: Sequence[Features],
    *,
    names: Sequence[str] = (),
    batch_size: int = 4,
) -> dict[str, Any]:
    """Returns loss, accuracy and the metrics `names` of rows for the model as it stands."""
    if task.reward is not None:
        return _rewarded(task, model, examples, rows, names)[1]
    _, values = _measured(task, model, examples, rows, (), batch_size)
    return values | (replies_match(task, model, examples, names) if names else {})


def _judged(
    task: Task,
    model: Any,
    examples: Sequence[Example],
    rows: Sequence[Features],
    names: Sequence[str],
    note: Callable[[str], None],
) -> Comparison:
    """Returns what `compare` does, of a task that has a reward in the place of a loss."""
    wanted = [task.question(example)[1] for example in examples] if names else []
    score_replies(wanted, wanted, names)
    _begin("measuring the base", note)
    with modes.without(model):
        before, base_values = _rewarded(task, model, examples, rows, names)
    _begin("measuring the adapter", note)
    after, adapter_values = _rewarded(task, model, examples, rows, names)
    one_each = np.ones(len(rows))
    interval = {}
    if isinstance(before, judged.Judged) and isinstance(after, judged.Judged):
        was, now = (Losses(said.rewards, one_each, one_each) for said in (before, after))
        change = losses.difference_interval(was, now)
        interval = {"reward_change_interval": change and list(change)}
    _begin("measuring the drift on general text", note)
    base_drift, adapter_drift = drift.measure(model, task.tokenizer)
    return Comparison(
        base_values | base_drift, adapter_values | interval | adapter_drift, before.replies, after.replies, examples
    )


def _rewarded(
    task: Task, model: Any, examples: Sequence[Example], rows: Sequence[Features], names: Sequence[str]
) -> tuple[judged.Said, dict[str, Any]]:
    """Returns the likeliest replies, and their mean reward and length and the metrics `names`, by plain name.

    The reward is left out where its function is not loaded and there are metrics to tell instead.
    """
    said = (judged.judge if _is_judged(task, names) else judged.say)(task, model, rows)
    wanted = [task.question(example)[1] for example in examples] if names else []
    values: dict[str, Any] = {"reward": float(said.rewards.mean())} if isinstance(said, judged.Judged) else {}
    values |= {"reply_tokens": float(said.tokens.mean()), "rows": len(rows)}
    return said, values | score_replies(said.replies, wanted, names)


def _is_judged(task: Task, names: Sequence[str]) -> bool:
    """Returns whether replies are given to the task's reward."""
    return task.reward is not None and (task.reward.is_known or not names)


def replies_match(task: Task, model: Any, examples: Sequence[Example], names: Sequence[str]) -> dict[str, float]:
    """Returns the metrics `names` of replies generated greedily for `examples`."""
    asked = task.questioned(examples, names)
    return score_replies(replies(task, model, asked), [task.question(example)[1] for example in asked], names)


def replies(task: Task, model: Any, examples: Sequence[Example]) -> list[str]:
    """Returns the model's greedy replies to the prompts of `examples`, cut at 1.25 times the longest one wanted."""
    asked = [task.question(example) for example in examples]
    longest = max(len(ids) for ids in task.tokenizer([want for _, want in asked])["input_ids"])
    sampling = Sampling(max_new_tokens=int(ROOM * longest) + 1)
    prompts = [prompt for prompt, _ in asked]
    return generate(model, task.tokenizer, prompts, sampling=sampling, stop_ids=task.end_ids())


def score_replies(found: Sequence[str], wanted: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Returns the metrics `names` of replies against the ones wanted."""
    values: dict[str, float] = {}
    for name in names:
        values.update(metrics.compute(name, found, wanted))
    return values


def _measured(
    task: Task,
    model: Any,
    examples: Sequence[Example],
    rows: Sequence[Features],
    index: Sequence[Features],
    batch_size: int,
) -> tuple[Losses, dict[str, Any]]:
    """Returns the loss of each row, and what there is to say of all, by plain name."""
    values: dict[str, Any] = {}
    if task.contrasts:
        found, values = retrieval.measured(task, model, rows, index, batch_size)
    elif task.measure or task.own_metrics:
        found, logits = losses.answers(task, model, rows, batch_size)
    else:
        found = losses.of_rows(task, model, rows, batch_size)
    if task.measure:
        one_each = np.stack([logits_NV.reshape(-1) for logits_NV in logits])
        labels = [row["labels"] for row in rows]
        values |= class_metrics.measure(task.measure, one_each, labels, task.facts()["labels"])
    for name in task.own_metrics:
        likeliest = [logits_NV.argmax(axis=-1).tolist() for logits_NV in logits]
        pairs = [task.compared(example, classes) for example, classes in zip(examples, likeliest, strict=True)]
        values |= metrics.compute(name, [said for said, _ in pairs], [right for _, right in pairs])
    right = {task.accuracy_name: found.accuracy} if task.accuracy_name else {}
    right |= {name: float(value.mean()) for name, value in found.more.items()}
    return found, {"loss": found.mean, **right, **values, "rows": len(found.nll)}
