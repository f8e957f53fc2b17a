"""JSON bodies of requests, read within limits and held to their models; what is wrong is told with its field."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from lora_ft.foreign.strictjson import JsonError, flaws, loads
from lora_ft.serve.refusals import RequestError, bad

MAX_BYTES = 16 << 20
M = TypeVar("M", bound="Body")


class Body(BaseModel):
    """A body of known fields: another one is a slip, which nobody should have to find out by its having no effect."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def reader(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """Returns what reads the body of a request as `model`."""

    async def read(request: Request) -> M:
        return parse(model, await raw(request))

    return read


async def raw(request: Request) -> bytes:
    """Returns the bytes of a body. Raises RequestError where there are too many."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            limit = f"{MAX_BYTES >> 20} MiB"
            raise RequestError(413, f"The body is larger than {limit}; upload files instead.", code="request_too_large")
    return bytes(data)


def parse(model: type[M], data: bytes) -> M:
    """Returns the body as `model`. Raises RequestError with what is wrong and the field it is wrong in."""
    try:
        value = loads(data.decode())
    except UnicodeDecodeError:
        raise bad(None, "The body is not UTF-8; send JSON in UTF-8.", "invalid_json") from None
    except JsonError as error:
        raise bad(None, f"The body {error}.", "invalid_json") from None
    broken = next(islice(flaws(value), 1), None)
    if broken:
        raise bad(str(broken[0] or "") or None, f"{broken[0] or 'The body'} {broken[1]}.", "invalid_json")
    if not isinstance(value, dict):
        raise bad(None, f"The body is a JSON {type(value).__name__}; send an object.", "invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_context=False)) from None


def of_validation(problems: Sequence[Any]) -> RequestError:
    """Returns the refusal of what pydantic found wrong: all of it in the message, the first field as `param`."""
    told = [(dotted(one["loc"]), one["type"], str(one["msg"])) for one in problems]
    # Of a field that may be several things, each thing it is not is a problem of its own.
    first, kind, _ = told[0]
    if kind == "missing":
        return bad(first, f"Missing required parameter: '{first}'.", "missing_required_parameter")
    if kind == "extra_forbidden":
        return bad(first, f"Unrecognized request argument supplied: {first}", "unknown_parameter")
    lines = list(dict.fromkeys(f"{place}: {message}" for place, _, message in told))
    more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
    return bad(first, f"Invalid value: {'; '.join(lines[:8])}{more}.")


def dotted(place: Sequence[Any]) -> str:
    """Returns a place as clients write it: `messages[2].role`."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in ("body", "query", "path", "header"):
            text += f".{str(part)[:64]}" if text else str(part)[:64]
    return text[:200]


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """Returns what tells the API's own description of a body that a `reader` reads."""
    schema = model.model_json_schema()
    inner = schema.pop("$defs", {})

    def whole(part: Any) -> Any:
        """Returns a part of the schema with what it refers to in place."""
        if isinstance(part, list):
            return [whole(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(inner[part["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in part.items()}

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole(schema)}}}}
