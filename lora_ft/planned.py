"""The plan of a run that has ended, beside what was measured of it.

A training whose memory might be short makes one as it begins, and keeps it; of all others it is made here.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from lora_ft import memory, recorded, sources, summary
from lora_ft import report as reports
from lora_ft.devices import Device
from lora_ft.errors import ConfigError

log = logging.getLogger(__name__)


def report(folder: Path) -> Path:
    """Returns the page of an adapter folder, drawn anew with the plan of its memory beside what was measured.

    Raises:
        AdapterError: the folder is none of a run that has ended. SourceError: its base cannot be found.
    """
    told = summary.read(folder)
    if not told.plan:
        try:
            told = dataclasses.replace(told, plan=plan(folder))
        except ConfigError as error:
            log.warning("the report has no plan: %s", error)
    reports.write(folder, told)
    return folder / reports.PAGE


def plan(folder: Path) -> dict[str, Any]:
    """Returns what the step of a finished run should have held at its peak: `bytes` by kind, `rows` and `tokens`.

    `measured_rows` says whether the longest batch is that of the run's rows, which are read anew where they still are,
    or of rows as long as they may be.

    Raises:
        AdapterError: the folder is none of a run. SourceError: its base cannot be found.
        ConfigError: such a run cannot be planned.
    """
    record = recorded.read(folder)
    config, task = recorded.task(folder, record)
    # What the adapter began as makes no difference to what its training held.
    config = dataclasses.replace(config, init_from=None)
    known = config.data.train is not None and Path(config.data.train).is_file()
    data = config.data if known else dataclasses.replace(config.data, train=None, eval=None)
    config = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, dtype=record["dtype"]))
    source = sources.recall(record["base"])
    told = str(record.get("device", ""))
    device = Device(told, "cpu" if told.startswith("CPU") else "cuda", 0, record["dtype"])
    items, _ = memory.items_of(config, task, source)
    step = memory.Planner(config, task, source, device, items).asked()
    return {"bytes": step.bytes, "rows": step.rows, "tokens": step.tokens, "measured_rows": known}
