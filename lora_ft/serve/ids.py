"""Names of things: made at random in the shapes clients know, and checked before they touch a path or a query."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable

from lora_ft.serve.refusals import RequestError

ALPHABET = string.ascii_letters + string.digits
PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def new(prefix: str, length: int = 24) -> str:
    """Returns a fresh id such as `ftjob-` and 24 letters and digits."""
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(length))


def checked(value: str, refusal: Callable[[str], RequestError]) -> str:
    """Returns an id of a request. Raises what `refusal` makes of one that no id looks like."""
    if not PLAIN.fullmatch(value):
        # What is not an id is not repeated at length.
        raise refusal(value[:64])
    return value
