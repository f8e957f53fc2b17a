"""Requests of any shape to every endpoint of the server: none is answered with a failure of the server's own.

python -m tests.reliability.fuzz_api --count 10000
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from lora_ft.serve import checks
from tests import tiny_server
from tests.in_process import HOST, Client
from tests.reliability.forks import MEMORY

# Memory that may come and go with garbage and caches, over the second half of all requests.
GROWTH_BYTES = 64 << 20


@dataclass
class Tally:
    """What the requests were answered with."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    grown_bytes: int = 0

    def __str__(self) -> str:
        told = ", ".join(f"{count} times {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"{self.statuses.total()} requests: {told}; {len(self.wrong)} wrong; grew by {self.grown_bytes >> 20} MiB"
        )


def fuzz(folder: Path, count: int) -> Tally:
    """Returns what `count` requests, spread over all endpoints, were answered with."""
    base = tiny_server.base_folder(folder / "base", context=64)
    client = Client(tiny_server.home(folder / "home", base))
    client.state.store.connection.execute("PRAGMA synchronous = OFF")
    headers = {"authorization": f"Bearer {client.token}", "host": HOST}
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", client.app, headers=headers)
    tally = Tally()
    # Ids that are there, so that what needs one is reached too.
    job, file = client.job(), client.upload("{}")[1]
    there = {"job_id": job["id"], "file_id": file["id"], "model": "tiny"}
    operations = [found.ok() for found in schema.get_all_operations()]
    half = 0
    for turn in range(2):
        for operation in operations:
            each = max(1, count // (2 * len(operations)))

            @settings(
                max_examples=each, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def one(case: Any) -> None:
                _use(case, there, tally.statuses.total())
                _call(case, headers, tally)

            # What a process of its own would find is another matter, and takes seconds each time.
            with mock.patch.object(checks, "_found", return_value={}):
                one()
        gc.collect()
        used = psutil.Process().memory_info().rss
        if turn == 0:
            half = used
        else:
            tally.grown_bytes = used - half
    client.state.answers.stop()
    return tally


def _use(case: Any, there: dict[str, str], number: int) -> None:
    """Has every other request name what is there."""
    if number % 2:
        return
    for name in case.path_parameters or {}:
        if name in there:
            case.path_parameters[name] = there[name]
    if isinstance(case.body, dict):
        for name, value in (("model", "tiny"), ("training_file", there["file_id"])):
            if name in case.body:
                case.body[name] = value
        if "max_tokens" in case.body:
            case.body["max_tokens"] = 2


def _call(case: Any, headers: dict[str, str], tally: Tally) -> None:
    place = f"{case.method} {case.path}"
    try:
        answer = case.call(headers=headers)
    # What answers an error of our own raises it again, for the log of a server that there is none of here.
    except Exception as error:
        tally.statuses[500] += 1
        tally.wrong.append(f"{place}: {error!r} for {str(case.body)[:300]}")
        return
    tally.statuses[answer.status_code] += 1
    text = answer.text
    if answer.status_code >= 500 or "Traceback" in text:
        tally.wrong.append(f"{place}: {answer.status_code}: {text[:300]} for {str(case.body)[:300]}")
    elif answer.status_code >= 400:
        error = answer.json().get("error", {})
        if not error.get("message") or set(error) != {"message", "type", "param", "code"}:
            tally.wrong.append(f"{place}: {answer.status_code} without a message: {text[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        tally = fuzz(Path(scratch), count)
    print(tally)
    if tally.wrong or tally.grown_bytes > GROWTH_BYTES:
        raise SystemExit("\n".join(tally.wrong[:20]))


if __name__ == "__main__":
    main()
