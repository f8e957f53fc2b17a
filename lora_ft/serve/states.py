"""The states of a job and the steps between them, as data: the database holds every change to this table."""

from __future__ import annotations

VALIDATING, QUEUED, RUNNING, PAUSED = "validating_files", "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"

TRANSITIONS: dict[str, tuple[str, ...]] = {
    VALIDATING: (QUEUED, FAILED, CANCELLED),
    QUEUED: (RUNNING, FAILED, CANCELLED),
    # Back to the queue: the server or the worker ended before the job did.
    RUNNING: (SUCCEEDED, FAILED, CANCELLED, PAUSED, QUEUED),
    PAUSED: (QUEUED, CANCELLED),
    SUCCEEDED: (),
    FAILED: (),
    CANCELLED: (),
}
FINAL = tuple(state for state, after in TRANSITIONS.items() if not after)

# What a client may ask of a job in each state; asking for what is the case already changes nothing.
ACTIONS: dict[str, tuple[str, ...]] = {
    VALIDATING: ("cancel",),
    QUEUED: ("cancel",),
    RUNNING: ("pause", "cancel"),
    PAUSED: ("resume", "cancel"),
}
DONE_ALREADY = {
    "cancel": (CANCELLED,),
    "pause": (PAUSED,),
    # A resumed job is queued and then running: a retried request finds it so.
    "resume": (QUEUED, RUNNING),
}


def legal(state: str) -> str:
    """Returns, in words, what may be asked of a job in a state."""
    return " or ".join(ACTIONS.get(state, ())) or "nothing, for it has ended"
