"""The check of a request for a job without a job: what its files hold, found in a process of its own.

    python -m lora_ft.serve.checks < WHAT

It runs in the server's folder, as the processes of jobs do, and writes what it found to its standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_ft.serve.jobs import NO_ERROR, Order
from lora_ft.serve.models import Models
from lora_ft.serve.queue import environment
from lora_ft.serve.refusals import RequestError
from lora_ft.serve.store import dumps

# As long as OpenAI's client waits for an answer.
LONGEST_S = 600.0


def check(models: Models, order: Order) -> dict[str, Any]:
    """Returns what a job would find: whether it can be trained, or the error that it would fail with.

    Raises:
        RequestError: the check takes too long for an answer.
    """
    row = {
        "id": "validate",
        "training_file": order.training_file,
        "validation_file": order.validation_file,
        "hyperparameters": dumps(order.values),
        "extensions": dumps(order.extensions),
        "seed": order.seed,
    }
    parent = models.resolve(order.parent).adapter if order.parent else None
    found = _found(models.store.home, {"row": row, "source": order.source, "parent": parent})
    return {
        "object": "fine_tuning.validation",
        "valid": "error" not in found,
        "model": order.model,
        "training_file": order.training_file,
        "validation_file": order.validation_file,
        "hyperparameters": found.get("values", order.values),
        "total_steps": found.get("total_steps"),
        "warnings": [*order.warnings.values(), *found.get("notes", ())],
        "error": found.get("error", NO_ERROR),
    }


def _found(home: Path, what: dict[str, Any]) -> dict[str, Any]:
    """Returns what the process finds."""
    command = [sys.executable, "-m", "lora_ft.serve.checks"]
    try:
        done = subprocess.run(
            command, input=json.dumps(what), cwd=home, env=environment(None, 1), stdout=subprocess.PIPE, text=True,
            timeout=LONGEST_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        told = f"The check takes longer than {LONGEST_S:.0f} s: create the job, which has all the time it needs."
        raise RequestError(400, told, code="check_takes_too_long") from None
    if done.returncode:
        told = f"The process of the check ended with status {done.returncode}. See the server's log."
        return {"error": {"code": "internal_error", "message": told, "param": None}}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Returns the exit status of the process, which has written what it found."""
    from lora_ft.serve import trial
    from lora_ft.serve.worker import explained
    from lora_ft.system.terminal import quiet

    quiet()
    what = json.load(sys.stdin)
    try:
        plan = trial.examine(what["row"], what["source"], Path(what["parent"]) if what["parent"] else None)
        found = {"values": plan.values, "total_steps": plan.total_steps, "notes": plan.notes}
    except trial.JobError as bad:
        found = {"error": {"code": bad.code, "message": str(bad), "param": bad.param}}
    except Exception as error:
        # Any error is what a job would fail with.
        code, message = explained(error)
        found = {"error": {"code": code, "message": message, "param": None}}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
