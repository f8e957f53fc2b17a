"""What one server holds: its database and the nouns in it, the queue, and what answers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from lora_ft.serve import leftovers
from lora_ft.serve.files import Files
from lora_ft.serve.jobs import Jobs
from lora_ft.serve.models import Models
from lora_ft.serve.queue import Queue
from lora_ft.serve.store import Store, now

if TYPE_CHECKING:
    from lora_ft.serve.answers import Answers


@dataclass
class State:
    """One server."""

    store: Store
    files: Files
    jobs: Jobs
    models: Models
    queue: Queue
    answers: Answers
    results_base64: bool = False
    """Whether result files are handed out in base64, as the hosted service does."""
    checking: threading.Lock = field(default_factory=threading.Lock)
    """Held while files are looked at for nobody's job."""

    @classmethod
    def of(cls, home: Path, devices: int = 1, results_base64: bool = False) -> State:
        """Returns the server in a folder, which is made unless it is there."""
        from lora_ft.serve.answers import Answers

        store = Store(home.resolve())
        if store.get("made_at") is None:
            store.put("made_at", str(now()))
        files, models = Files(store), Models(store)
        files.sweep()
        leftovers.sweep(store)
        return cls(store, files, Jobs(store), models, Queue(store, devices), Answers(models), results_base64)


def _of(request: Request) -> State:
    return request.app.state.server


Server = Annotated[State, Depends(_of)]
"""A route's argument: the server that it is of."""
