"""Who may ask: the token, the Host and the Origin of each request, looked at before anything else.

The token is made at the first start and kept as a digest. A page of another site that a browser shows cannot reach the
server: its requests carry its Origin, and a name that it made to lead here is not a Host this server has.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from lora_ft.serve.refusals import RequestError
from lora_ft.serve.store import Store

Scope = MutableMapping[str, Any]
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# What anybody may read: the page holds nothing, and asks for the token itself.
OPEN = frozenset({"/", "/healthz"})
KEY = "token_sha256"
# Of the API, as its answers tell it.
VERSION = "2020-10-01"


def make_token(store: Store) -> str:
    """Returns a new token, in place of any before it; only its digest is kept, so it is never seen again."""
    token = f"sk-local-{secrets.token_urlsafe(30)}"
    store.put(KEY, _digest(token))
    return token


def is_loopback(host: str) -> bool:
    """Returns whether an address to listen on is reached from this machine alone."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """The rules for one server.

    Args:
        bound: the address it listens on. On loopback only loopback's names are its Host; elsewhere so are addresses in
            numbers and that name itself, for only names can be made to lead astray.
    """

    def __init__(self, store: Store, bound: str) -> None:
        self.store, self.bound = store, bound

    def check(self, path: str, headers: dict[str, str]) -> None:
        """Raises RequestError for a request that may not come in."""
        host = headers.get("host", "")
        name = _host_name(host)
        if not self._is_own(name):
            told = f"The Host header is {host[:100]!r}, which is not this server's name; ask it by {self._own_name()}."
            raise RequestError(403, told, code="invalid_host")
        origin = headers.get("origin")
        if origin is not None and not _same_origin(origin, host):
            told = (
                f"The request comes from a page of another site ({origin[:100]!r}); no page but this server's may ask."
            )
            raise RequestError(403, told, code="invalid_origin")
        if path not in OPEN:
            self._check_token(headers)

    def _check_token(self, headers: dict[str, str]) -> None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("api-key", "")
        if not given:
            told = "You didn't provide an API key: send the server's token as `Authorization: Bearer TOKEN`."
            raise RequestError(401, told, code="invalid_api_key")
        if not hmac.compare_digest(_digest(given), self.store.get(KEY) or ""):
            told = f"Incorrect API key provided: {_masked(given)}. It is the token that `lora-ft serve` printed once."
            raise RequestError(401, told, code="invalid_api_key")

    def _is_own(self, name: str | None) -> bool:
        if name is None:
            return False
        if name in LOOPBACK:
            return True
        if is_loopback(self.bound):
            return name == self.bound
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == self.bound.lower()
        return True

    def _own_name(self) -> str:
        return "localhost" if is_loopback(self.bound) else "its address in numbers"


class Guarded:
    """An ASGI application behind `Access`; `refuse` answers for it, and each answer has the headers clients report."""

    def __init__(
        self, app: Any, access: Access, refuse: Callable[[RequestError, Scope, Any, Any], Awaitable[None]]
    ) -> None:
        self.app, self.access, self.refuse = app, access, refuse

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            send = _numbered(send)
            # A header that comes twice has no one meaning.
            headers: dict[str, str] = {}
            for raw, value in scope["headers"]:
                name = raw.decode("latin-1").lower()
                headers[name] = (
                    f"{headers[name]},{value.decode('latin-1')}" if name in headers else value.decode("latin-1")
                )
            try:
                self.access.check(scope["path"], headers)
            except RequestError as refusal:
                await self.refuse(refusal, scope, receive, send)
                return
        await self.app(scope, receive, send)


def _numbered(send: Any) -> Any:
    """Returns `send` with an id for the answer and the milliseconds that it took to begin it."""
    began = time.perf_counter()

    async def numbered(message: Scope) -> None:
        if message["type"] == "http.response.start":
            took = str(round(1000 * (time.perf_counter() - began)))
            told = {
                "x-request-id": f"req_{secrets.token_hex(16)}",
                "openai-version": VERSION,
                "openai-processing-ms": took,
            }
            headers = [*message["headers"], *((name.encode(), value.encode()) for name, value in told.items())]
            message = {**message, "headers": headers}
        await send(message)

    return numbered


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _host_name(host: str) -> str | None:
    """Returns the name in a Host header, without its port; None where there is no sense in it."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or parts.username is not None or not parts.hostname:
        return None
    return parts.hostname.rstrip(".")


def _same_origin(origin: str, host: str) -> bool:
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and rest.lower() == host.lower()


def _masked(token: str) -> str:
    """Returns as much of a wrong key as tells people which one it was."""
    return f"{token[:3]}***{token[-4:]}" if len(token) >= 16 else "***"
