"""Routes of files and of uploads in parts."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from lora_ft.serve import files, forms, ids, uploads
from lora_ft.serve.bodies import Body, documented, reader
from lora_ft.serve.refusals import bad
from lora_ft.serve.state import Server
from lora_ft.system import atomicio

router = APIRouter(prefix="/v1")
CHUNK = 1 << 20
PURPOSE_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
                    },
                }
            }
        },
    }
}
PART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


class ExpiresAfter(Body):
    """When a file is to be removed."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=files.KEPT_S[0], le=files.KEPT_S[-1])


class NewUpload(Body):
    """A file that will come in parts."""

    bytes: int = Field(ge=1, le=uploads.MAX_BYTES)
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(max_length=255)
    purpose: str
    expires_after: ExpiresAfter | None = None


class Completion(Body):
    """The parts of an upload, in the order of the file."""

    part_ids: list[str] = Field(min_length=1, max_length=10_000)
    md5: str | None = Field(None, max_length=64)


@router.post("/files", openapi_extra=FORM)
async def create_file(request: Request, server: Server) -> dict[str, Any]:
    """Returns the file that the form holds, streamed to the disk as it comes."""
    file_id = ids.new("file-", 22)
    with server.files.draft(file_id) as draft:
        form = await _received(request, "file", files.MAX_BYTES, draft)
        purpose = files.check_purpose(form.fields.get("purpose"))
        _refuse_unknown(form)
        keep_s = _kept(form.fields)
        name = files.safe_name(form.filename or "file")
        return files.public(
            await run_in_threadpool(server.files.add, draft, file_id, files.ROWS, name, purpose, keep_s)
        )


@router.get("/files")
def list_files(
    server: Server,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=files.LISTED)] = files.LISTED,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """Returns a page of the files."""
    found = server.files.page(purpose, after, limit, order)
    data = [files.public(row) for row in found.rows]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": found.has_more}


@router.get("/files/{file_id}")
def get_file(file_id: str, server: Server) -> dict[str, Any]:
    """Returns one file."""
    return files.public(server.files.get(file_id))


@router.delete("/files/{file_id}")
def delete_file(file_id: str, server: Server) -> dict[str, Any]:
    """Returns that the file is gone."""
    server.files.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/files/{file_id}/content")
def file_content(file_id: str, server: Server, encoding: Literal["plain", "base64"] | None = None) -> Response:
    """Returns the bytes of a file. Scripts that decode result files from base64 get them so where that is asked for."""
    row = server.files.get(file_id)
    path = server.files.path(row)
    in_base64 = encoding == "base64" or (encoding is None and server.results_base64)
    if row["purpose"] == files.RESULTS and in_base64:
        return Response(base64.b64encode(path.read_bytes()), media_type="application/octet-stream")
    headers = {"Content-Length": str(row["bytes"]), "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(_chunks(path), media_type="application/octet-stream", headers=headers)


@router.post("/uploads", openapi_extra=documented(NewUpload))
def create_upload(server: Server, body: Annotated[NewUpload, Depends(reader(NewUpload))]) -> dict[str, Any]:
    """Returns a new upload, to which parts can be added for an hour."""
    keep_s = body.expires_after.seconds if body.expires_after else None
    name = files.safe_name(body.filename)
    return uploads.create(server.files, body.bytes, name, files.check_purpose(body.purpose), keep_s)


@router.post("/uploads/{upload_id}/parts", openapi_extra=PART)
async def create_part(upload_id: str, request: Request, server: Server) -> dict[str, Any]:
    """Returns the part that was added."""
    await run_in_threadpool(uploads.pending, server.files, upload_id)
    part_id = ids.new("part_")
    with server.files.draft(part_id) as draft:
        form = await _received(request, "data", uploads.MAX_PART_BYTES, draft)
        return await run_in_threadpool(uploads.add_part, server.files, upload_id, part_id, draft, form.file_bytes)


@router.post("/uploads/{upload_id}/complete", openapi_extra=documented(Completion))
def complete_upload(
    upload_id: str, server: Server, body: Annotated[Completion, Depends(reader(Completion))]
) -> dict[str, Any]:
    """Returns the upload with the file that its parts make."""
    return uploads.complete(server.files, upload_id, body.part_ids, body.md5)


@router.post("/uploads/{upload_id}/cancel")
def cancel_upload(upload_id: str, server: Server) -> dict[str, Any]:
    """Returns the upload, to which nothing can be added any more."""
    return uploads.cancel(server.files, upload_id)


async def _received(request: Request, name: str, most: int, draft: atomicio.Draft) -> forms.Form:
    """Returns the form of a request, whose file is in the draft."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) < 20 and int(length) > most + forms.MAX_FIELD_BYTES:
        raise forms.too_large(name, most)
    draft.append(files.ROWS, b"")
    form = await forms.read(
        request.headers.get("content-type", ""),
        request.stream(),
        name,
        most,
        lambda data: draft.append(files.ROWS, data),
    )
    if form.filename is None:
        raise bad(name, f"Missing required parameter: '{name}'.", "missing_required_parameter")
    return form


def _refuse_unknown(form: forms.Form) -> None:
    unknown = [name for name in form.fields if name not in PURPOSE_FIELDS]
    if unknown:
        raise bad(unknown[0][:64], f"Unrecognized request argument supplied: {unknown[0][:64]}", "unknown_parameter")


def _kept(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise bad("expires_after[anchor]", f"expires_after[anchor] is {str(anchor)[:40]!r}; give created_at.")
    return files.check_keep(seconds)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk
