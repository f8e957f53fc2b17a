"""The plan of a run that has ended, beside what was measured of it.

A training whose memory might be short makes one as it begins, and keeps it; of all others it is made here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ft import memory, sources, tasks
from lora_ft import report as reports
from lora_ft.config import RunConfig
from lora_ft.data.examples import Example
from lora_ft.errors import LoraFtError
from lora_ft.pages import summary
from lora_ft.proof import recorded
from lora_ft.settings import without_code
from lora_ft.system.devices import Device
from lora_ft.training import rows as all_rows

log = logging.getLogger(__name__)


def report(folder: Path) -> Path:
    """Returns the page of an adapter folder, drawn anew with the plan of its memory beside what was measured.

    Raises:
        AdapterError: the folder is none of a run that has ended.
    """
    told = summary.read(folder)
    if not told.plan and told.fit:  # adapters are combined without a training
        try:
            told = dataclasses.replace(told, plan=plan(folder))
        except LoraFtError as error:
            log.warning("the report has no plan: %s", error)
    reports.write_page(folder, told)
    return folder / reports.PAGE


def plan(folder: Path) -> dict[str, Any]:
    """Returns what the step of a finished run should have held at its peak: `bytes` by kind, `rows` and `tokens`.

    `measured_rows` says whether the longest batch is that of the run's rows, which are read anew where they still are,
    or of rows as long as they may be. Nothing that the folder names is run for it.

    Raises:
        AdapterError: the folder is none of a run. SourceError: its base cannot be found.
        ConfigError, UnsupportedModelError: such a run cannot be planned.
    """
    record = recorded.read(folder)
    config, task = recorded.task(folder, record)
    # Neither what the adapter began as nor what judged it makes a difference to what its training held.
    config = without_code(dataclasses.replace(config, init_from=None))
    task = tasks.of(config, task.facts())
    train = dataclasses.replace(config.train, dtype=record["dtype"], eval_steps=None, patience=None)
    config = dataclasses.replace(config, train=train)
    examples = _rows_of_run(config, record)
    known = examples is not None
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=None, eval=None))
    source = sources.recall(record["base"])
    told = str(record.get("device", ""))
    device = Device(told, "cpu" if told.startswith("CPU") else "cuda", 0, record["dtype"])
    items, _ = memory.items_of(config, task, source, examples)
    with memory.shapes_suffice(config.base):
        step = memory.Planner(config, task, source, device, items).asked()
    return {"bytes": step.bytes, "rows": step.rows, "tokens": step.tokens, "measured_rows": known}


def _rows_of_run(config: RunConfig, record: dict[str, Any]) -> Sequence[Example] | None:
    """Returns the rows that a run was trained on; None where they are no longer in the file that it names.

    Another file may have its name, in a working folder of another run.
    """
    data = config.data
    if data.streaming or data.train is None or not Path(data.train).is_file():
        return None
    if data.eval_fraction is None:
        config = dataclasses.replace(config, data=dataclasses.replace(data, eval=None))
    try:
        examples, _ = all_rows.read(config)
    except LoraFtError:
        return None
    facts = record.get("data")
    trained = facts.get("train") if isinstance(facts, dict) else None
    return examples if isinstance(trained, dict) and trained.get("sha256") == all_rows.digest(examples) else None
