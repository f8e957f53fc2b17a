"""Multipart forms read as they come: fields into a mapping, the one file into wherever it is to go, chunk by chunk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from lora_ft.serve.refusals import RequestError, bad

MAX_FIELD_BYTES = 64 << 10
MAX_FIELDS = 32


@dataclass
class Form:
    """What a form held besides its file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """None where no file came."""
    file_bytes: int = 0


async def read(
    content_type: str, chunks: AsyncIterator[bytes], file_field: str, max_bytes: int, write: Callable[[bytes], Any]
) -> Form:
    """Returns the fields of a form, having handed the bytes of its file to `write`.

    Raises:
        RequestError: it is no multipart form, or its file has more than `max_bytes` (413).
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        what = content_type[:80] or "none"
        raise bad(
            None, f"The content type is {what}; send multipart/form-data with a boundary.", "invalid_content_type"
        )
    parser = _Parts(boundary, file_field, max_bytes)
    try:
        async for chunk in chunks:
            parser.feed(chunk)
            if parser.ready:
                await run_in_threadpool(write, b"".join(parser.ready))
                parser.ready.clear()
        parser.end()
    except FormParserError as error:
        raise bad(None, f"The multipart form cannot be read: {error}.", "invalid_form") from None
    return parser.form


def too_large(name: str, most: int) -> RequestError:
    """Returns the refusal of a file of more than `most` bytes."""
    return RequestError(413, f"The file is larger than {most >> 20} MiB; send less.", code="file_too_large", param=name)


class _Parts:
    """Takes a form apart; bytes of its file wait in `ready`."""

    def __init__(self, boundary: bytes, file_field: str, max_bytes: int) -> None:
        self.form, self.ready = Form(), list[bytes]()
        self._file_field, self._max_bytes = file_field, max_bytes
        self._headers: dict[str, bytes] = {}
        self._name = self._key = self._value = b""
        self._field = b""
        self._is_file = self._ended = False
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add("_key", data[start:end]),
            "on_header_value": lambda data, start, end: self._add("_value", data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._opened,
            "on_part_data": lambda data, start, end: self._data(data[start:end]),
            "on_part_end": self._close,
            "on_end": self._finish,
        }
        self._parser = MultipartParser(boundary, callbacks)

    def feed(self, chunk: bytes) -> None:
        if not self._ended:
            self._parser.write(chunk)

    def end(self) -> None:
        self._parser.finalize()
        if not self._ended:
            raise bad(None, "The multipart form ends in the middle; send all of it.", "invalid_form")

    def _add(self, name: str, data: bytes) -> None:
        setattr(self, name, getattr(self, name) + data)
        if len(getattr(self, name)) > MAX_FIELD_BYTES:
            raise bad(None, f"A header of the form is longer than {MAX_FIELD_BYTES} bytes.", "invalid_form")

    def _begin(self) -> None:
        self._headers, self._key, self._value, self._field = {}, b"", b"", b""

    def _header(self) -> None:
        self._headers[self._key.decode("latin-1").lower()] = self._value
        self._key = self._value = b""

    def _opened(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        self._name = options.get(b"name", b"")
        self._is_file = self._name.decode("utf-8", "replace") == self._file_field
        if self._is_file:
            if self.form.filename is not None:
                raise bad(
                    self._file_field, f"The form has two parts named {self._file_field}; send one.", "invalid_form"
                )
            self.form.filename = options.get(b"filename", b"file").decode("utf-8", "replace")

    def _data(self, data: bytes) -> None:
        if self._is_file:
            self.form.file_bytes += len(data)
            if self.form.file_bytes > self._max_bytes:
                raise too_large(self._file_field, self._max_bytes)
            self.ready.append(data)
        else:
            self._add("_field", data)

    def _close(self) -> None:
        if self._is_file:
            return
        if len(self.form.fields) == MAX_FIELDS:
            raise bad(None, f"The form has more than {MAX_FIELDS} fields.", "invalid_form")
        self.form.fields[self._name.decode("utf-8", "replace")] = self._field.decode("utf-8", "replace")

    def _finish(self) -> None:
        self._ended = True
