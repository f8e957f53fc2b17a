"""CSV and Parquet files -> rows, by way of pyarrow, a batch at a time."""

from __future__ import annotations

import csv as python_csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_ft.data.faults import listed
from lora_ft.data.rows import CHUNK_BYTES, MAX_ROW_BYTES, ByteFile, Row, Rows, first_line, refuse_twins, undecodable
from lora_ft.errors import DataError
from lora_ft.foreign.strictjson import bare, quoted

# pyarrow takes some 10 KB for each column, so that a line of a million commas would fill the memory.
MAX_COLUMNS = 1000
# Misfits held while their batch is parsed; a file with more of them is no table.
MAX_MISFITS = 1000
# Rows made into Python objects at once: as fast as the whole batch, which may be of millions.
SLICE_ROWS = 256
UNCLOSED = "a quotation mark opens here and never closes; close it"


def csv(file: ByteFile, name: str, delimiter: str = ",") -> Rows:
    """Yields each row under the names of the header, all of them as text: "007" stays as it is, and so does "NA"."""
    _refuse_wide(file, name, delimiter)
    header: list[str] = []
    where, line, last = name, 1, ""
    for row in _physical_rows(file, name, delimiter):
        where, last = f"{name}:{line}", row[-1] if isinstance(row, list) else row.text
        line += 1 + (sum(cell.count("\n") for cell in row) if isinstance(row, list) else row.text.count("\n"))
        if isinstance(row, _Misfit):
            if not row.text.endswith(_Ended.END):
                yield DataError(
                    [f"{where}: {row} ({listed(header)}); quote the cells that hold a {quoted(delimiter)}."]
                )
        elif not header:
            header = _header(row, where, delimiter)
        elif any(row):
            yield _csv_row(where, header, row)
    if last.endswith(_Ended.END):
        raise DataError([f"{where}: {UNCLOSED}."])


def _refuse_wide(file: ByteFile, name: str, delimiter: str) -> None:
    """Raises DataError where the header is too long or too wide, before pyarrow makes columns of it."""
    head = file.peek()
    stream = io.StringIO(head.decode("latin1"), newline="")
    cells = next(python_csv.reader(stream, delimiter=delimiter), [])
    if len(head) >= CHUNK_BYTES and not stream.read():
        raise DataError([f"{name}:1: the header is longer than {CHUNK_BYTES:,} bytes; check its quotation marks."])
    if len(cells) > MAX_COLUMNS:
        raise DataError([f"{name}:1: has {len(cells):,} columns; keep {MAX_COLUMNS:,} or fewer."])


@dataclass(frozen=True, slots=True)
class _Misfit:
    """A row with more or fewer cells than the header."""

    text: str
    cells: int
    columns: int

    def __str__(self) -> str:
        return f"has {self.cells} cell{'s' if self.cells > 1 else ''}, but the header names {self.columns}"


class _Ended(io.RawIOBase):
    """A CSV file with two line ends more: unless a quotation mark is left open, its last row is then blank."""

    END = "\n\n"

    def __init__(self, file: ByteFile) -> None:
        self._file = file
        self._end = self.END.encode()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        if not data:
            data, self._end = self._end, b""
        buffer[: len(data)] = data
        return len(data)


def _physical_rows(file: ByteFile, name: str, delimiter: str) -> Iterator[list[str] | _Misfit]:
    """Yields every row in order: header, blank ones and misfits too."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import csv as arrow_csv

    misfits: dict[int, _Misfit] = {}
    number = 1

    def hold(row: Any) -> str:
        misfits[row.number] = _Misfit(row.text, row.actual_columns, row.expected_columns)
        return "skip" if len(misfits) <= MAX_MISFITS else "error"

    def misfits_here() -> Iterator[_Misfit]:
        nonlocal number
        while number in misfits:
            yield misfits.pop(number)
            number += 1

    read = arrow_csv.ReadOptions(
        use_threads=False,  # with threads, misfits come without their number
        block_size=MAX_ROW_BYTES,
        autogenerate_column_names=True,  # makes the header a row like the others, so that all are counted
        encoding="latin1",  # takes any byte; `_decoded` turns cells back, and can name the one that is not UTF-8
    )
    parse = arrow_csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=hold
    )
    convert = arrow_csv.ConvertOptions(default_column_type=pa.string())
    try:
        for batch in arrow_csv.open_csv(_Ended(file), read, parse, convert):
            for start in range(0, batch.num_rows, SLICE_ROWS):
                for cells in zip(*(column.to_pylist() for column in batch[start : start + SLICE_ROWS]), strict=True):
                    yield from misfits_here()
                    yield list(cells)
                    number += 1
        yield from misfits_here()
    except pa.ArrowException as error:
        text = first_line(error)
        if "straddl" in text:
            text = f"it is longer than {MAX_ROW_BYTES:,} bytes, or {UNCLOSED}"
        elif len(misfits) > MAX_MISFITS:
            number, text = min(misfits), f"it and {MAX_MISFITS} more do not fit the header; check its columns"
        raise DataError([f"{name}: cannot be read from row {number} on: {text}."]) from None


def _header(cells: list[str], where: str, delimiter: str) -> list[str]:
    """Returns the column names. Raises DataError where they cannot be told apart."""
    if not any(cells):
        raise DataError([f"{where}: the first line is blank; it must name the columns."])
    try:
        names = [_decoded(cell) for cell in cells]
    except UnicodeDecodeError as error:
        raise DataError([f"{where}: {undecodable(error, 'column name')}"]) from None
    if len(names) == 1 and (other := next((mark for mark in ",;\t|" if mark in names[0]), None)):
        kind = "commas (.csv)" if delimiter == "," else "tabs (.tsv)"
        raise DataError([f"{where}: is split by {quoted(other)}, it seems; separate the columns by {kind}."])
    refuse_twins(names, where)
    return names


def _csv_row(where: str, header: list[str], cells: list[str]) -> Row | DataError:
    fields: dict[str, str] = {}
    problems: list[str] = []
    for name, cell in zip(header, cells, strict=True):
        try:
            fields[name] = _decoded(cell)
        except UnicodeDecodeError as error:
            problems.append(f"{where}: {bare(name)}: {undecodable(error, 'cell')}")
    return DataError(problems) if problems else Row(where, fields)


def _decoded(cell: str) -> str:
    return cell if cell.isascii() else cell.encode("latin1").decode()


def parquet(file: ByteFile, name: str) -> Rows:
    """Yields each row, made into Python objects one at a time."""
    import pyarrow as pa
    from pyarrow import parquet as arrow_parquet

    number = 0
    try:
        table = arrow_parquet.ParquetFile(file)
        refuse_twins(table.schema_arrow.names, name)
        for batch in table.iter_batches(batch_size=SLICE_ROWS):
            for index in range(batch.num_rows):
                fields = {key: batch.column(key)[index].as_py() for key in batch.schema.names}
                number += 1
                yield Row(f"{name}:row {number}", fields)
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        place = f"{name}:row {number + 1}" if number else name
        raise DataError([f"{place}: cannot be read as Parquet: {first_line(error)}; write the file anew."]) from None
