"""The HTTP side of a server: routes put together, errors in OpenAI's form, and the rules of access before all."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lora_ft import __version__
from lora_ft.errors import StorageError
from lora_ft.serve import bodies, refusals, routes_answers, routes_files, routes_jobs, routes_models
from lora_ft.serve.access import Access, Guarded, Scope
from lora_ft.serve.refusals import RequestError
from lora_ft.serve.state import State
from lora_ft.system.redaction import redacted

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page.html"
# The page is one file: nothing is fetched from elsewhere, and nothing of it runs that is not in it.
PAGE_RULES = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GONE = {
    "/v1/fine-tunes": "/v1/fine-tunes was removed; use /v1/fine_tuning/jobs (client.fine_tuning.jobs.create).",
    "/v1/responses": "/v1/responses is not served here; use /v1/chat/completions.",
    "/v1/embeddings": "/v1/embeddings is not served here: the models of this server write text.",
    "/v1/batches": "/v1/batches is not served here; send the requests to /v1/chat/completions.",
    "/v1/fine_tuning/alpha/graders": "Graders are not served here; the methods supported are supervised and dpo.",
    "/v1/fine_tuning/checkpoints": "Permissions of checkpoints are not served here: this server has one user.",
}


def create(server: State, bound: str) -> Any:
    """Returns the ASGI application of a server that listens on `bound`."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        server.queue.start()
        try:
            yield
        finally:
            server.answers.stop()
            server.queue.stop()

    app = FastAPI(
        title="lora_ft",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.server = server
    for routes in (routes_files, routes_jobs, routes_models, routes_answers):
        app.include_router(routes.router)
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/healthz", healthy, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(StorageError, _unwritten)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _broken)
    return Guarded(app, Access(server.store, bound), _refuse)


def page() -> HTMLResponse:
    """Returns the page of the server."""
    headers = {"Content-Security-Policy": PAGE_RULES, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


def healthy() -> dict[str, str]:
    """Returns that the server answers."""
    return {"status": "ok"}


async def _refuse(refusal: RequestError, scope: Scope, receive: Any, send: Any) -> None:
    await JSONResponse(refusal.body(), refusal.status, {"connection": "close"})(scope, receive, send)


def _refused(request: Request, refusal: Any) -> JSONResponse:
    headers = {"retry-after": "1"} if refusal.status == 429 else None
    return JSONResponse(refusal.body(), refusal.status, headers)


def _invalid(request: Request, error: Any) -> JSONResponse:
    return _refused(request, bodies.of_validation(error.errors()))


def _http_error(request: Request, error: Any) -> JSONResponse:
    path = request.url.path
    told = next((why for start, why in GONE.items() if path == start or path.startswith(f"{start}/")), None)
    if told is None or error.status_code != 404:
        told = f"{error.detail}: {request.method} {path[:200]}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    headers = getattr(error, "headers", None)
    return JSONResponse(refusals.body(error.status_code, redacted(told), code), error.status_code, headers)


def _unwritten(request: Request, error: Any) -> JSONResponse:
    log.error("%s %s: %s", request.method, request.url.path, error)
    told = (
        "The server's disk is full: free some space, then try again."
        if error.full
        else "The disk cannot be written to."
    )
    return JSONResponse(refusals.body(507, told, "disk_full" if error.full else "disk_error"), 507)


def _gone(request: Request, error: Any) -> Response:
    """Returns what nobody reads: the client went away before its request was whole."""
    return Response(status_code=400)


def _broken(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    told = "The server met an error of its own; its log says which."
    return JSONResponse(refusals.body(500, told, "internal_error"), 500)
