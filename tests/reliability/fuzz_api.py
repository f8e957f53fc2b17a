"""Requests of any shape to every endpoint of the server: none is answered with a failure of the server's own.

Of two requests one names what is there, made for it alone, so that what lies behind the names is reached; each endpoint
must have answered some requests with 2xx.

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

from lora_ft.serve import checks, routes_jobs
from tests import tiny_server
from tests.in_process import HOST, Client
from tests.reliability.forks import MEMORY
from tests.reliability.things import MESSAGES, Things

# Memory that may come and go with garbage and caches, over the second half of all requests.
GROWTH_BYTES = 64 << 20
# One request in so many says the least that its endpoint needs.
PLAIN = 8


@dataclass
class Tally:
    """What the requests were answered with."""

    operations: list[str]
    """Method and path of each endpoint, the three actions on a job one by one."""
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many requests to an endpoint were answered with a status."""
    wrong: list[str] = field(default_factory=list)
    grown_bytes: int = 0

    @property
    def total(self) -> int:
        """How many requests were made."""
        return self.statuses.total()

    @property
    def unreached(self) -> list[str]:
        """The endpoints that answered nothing with 2xx."""
        return [name for name in self.operations if not self.of_class(name, 2)]

    def of_class(self, operation: str, hundreds: int) -> int:
        """Returns how many requests to an endpoint were answered with a status of a class."""
        return sum(n for (name, status), n in self.statuses.items() if (name, status // 100) == (operation, hundreds))

    def __str__(self) -> str:
        wide = max(map(len, self.operations))
        head = f"{'':{wide}}   2xx   4xx   5xx"
        counts = [(name, [self.of_class(name, hundreds) for hundreds in (2, 4, 5)]) for name in self.operations]
        lines = [f"{name:{wide}}" + "".join(f"{n:6}" for n in found) for name, found in counts]
        told = f"{self.total} requests; {len(self.wrong)} wrong; grew by {self.grown_bytes >> 20} MiB"
        return "\n".join([head, *lines, told])


def fuzz(folder: Path, count: int) -> Tally:
    """Returns what at least `count` requests, spread over all endpoints, were answered with."""
    base = tiny_server.base_folder(folder / "base", context=64)
    client = Client(tiny_server.home(folder / "home", base))
    client.state.store.connection.execute("PRAGMA synchronous = OFF")
    headers = {"authorization": f"Bearer {client.token}", "host": HOST}
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", client.app, headers=headers)
    things = Things(client)
    operations = [found.ok() for found in schema.get_all_operations()]
    asked = Counter[str]()
    tally = Tally([f"{each.method.upper()} {each.path}" for each in operations])
    # Nobody pauses here, so that nobody waits for it; and what a process of its own would find takes seconds.
    with mock.patch.object(routes_jobs, "PAUSE_WAIT_S", 0.0), mock.patch.object(checks, "_found", return_value={}):
        for goal in (count // 2, count):
            # Of what has few forms hypothesis makes fewer requests than it may.
            while tally.total < goal:
                most = -(-(goal - tally.total) // len(operations))
                for operation in operations:
                    _ask(operation, most, things, asked, headers, tally)
            gc.collect()
            before, tally.grown_bytes = tally.grown_bytes, psutil.Process().memory_info().rss
        tally.grown_bytes -= before
    client.state.answers.stop()
    return tally


def _ask(operation: Any, most: int, things: Things, asked: Counter[str], headers: dict[str, str], tally: Tally) -> None:
    """Makes at most so many requests to one endpoint."""
    name = f"{operation.method.upper()} {operation.path}"

    @settings(
        max_examples=most, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def one(case: Any) -> None:
        number = asked[name]
        asked[name] += 1
        if number % 2 == 0:
            _use(case, name, things, number)
        _call(case, name, headers, tally)

    one()


def _use(case: Any, name: str, things: Things, number: int) -> None:
    """Has a request name what is there."""
    path = things.path(name)
    case.path_parameters.update(path)
    after, body = things.after(name, path), things.body(name, path)
    is_plain = number % PLAIN == 0
    if is_plain:
        case.query = {"after": after} if after else {}
        case.headers = {}
    elif after and "after" in (case.query or {}):
        case.query["after"] = after
    if is_plain and body is not None:
        case.body = dict(body)
    elif isinstance(case.body, dict):
        for field_name, value in (body or {}).items():
            if field_name in case.body and field_name not in ("file", "data", "bytes", "filename"):
                case.body[field_name] = value
        if "messages" in case.body:
            case.body["messages"] = MESSAGES


def _call(case: Any, name: str, headers: dict[str, str], tally: Tally) -> None:
    try:
        answer = case.call(headers=headers)
    # What answers an error of our own raises it again, for the log of a server that there is none of here.
    except Exception as error:
        tally.statuses[name, 500] += 1
        tally.wrong.append(f"{name}: {error!r} for {str(case.body)[:300]}")
        return
    tally.statuses[name, answer.status_code] += 1
    text = answer.text
    if answer.status_code >= 500 or "Traceback" in text:
        tally.wrong.append(f"{name}: {answer.status_code}: {text[:300]} for {str(case.body)[:300]}")
    elif answer.status_code >= 400:
        error = answer.json().get("error", {})
        if not error.get("message") or set(error) != {"message", "type", "param", "code"}:
            tally.wrong.append(f"{name}: {answer.status_code} without a message: {text[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        tally = fuzz(Path(scratch), count)
    print(tally)
    wrong = [*tally.wrong[:20], *(f"{name}: no answer of 2xx" for name in tally.unreached)]
    if tally.total < count:
        wrong.append(f"only {tally.total} requests")
    if wrong or tally.grown_bytes > GROWTH_BYTES:
        raise SystemExit("\n".join(wrong) or "memory grew")


if __name__ == "__main__":
    main()
