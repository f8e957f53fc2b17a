"""JSONL, JSON, plain text and CoNLL files -> rows, never holding much more than one row."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator
from typing import Any

from lora_ft.data.faults import found
from lora_ft.data.rows import CHUNK_BYTES, MAX_ROW_BYTES, ByteFile, Row, Rows, undecodable
from lora_ft.data.tagged import RULE, is_tag
from lora_ft.errors import DataError
from lora_ft.foreign.strictjson import BLANK, JsonError, Scanner, loads, quoted

# Checked before a file is read as text; the first that fits is named.
SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"SQLite format 3\x00": "an SQLite database",
    b"%PDF": "PDF",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "HDF5",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    **{b"\x80" + bytes([protocol]): "a Python pickle" for protocol in range(2, 6)},
}
SPACE = re.compile(f"[{BLANK}]*")
# A line of a CoNLL file that begins a document, and no word.
NEW_DOCUMENT = "-DOCSTART-"
# As many as the shortest lines could make of the longest row.
MAX_WORDS = MAX_ROW_BYTES // 4
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def begin(file: ByteFile, name: str) -> None:
    """Skips a byte order mark. Raises DataError where the file's first bytes are not those of a UTF-8 text."""
    head = file.peek(16)
    if not head:
        raise DataError([f"{name}: is empty; a data set needs at least one row."])
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    kind = next((kind for start, kind in SIGNATURES.items() if head.startswith(start)), None)
    if kind:
        raise DataError([f"{name}: is binary ({kind}), whatever its name says; unpack or convert it to a text file."])
    if head.startswith(UTF16_MARKS) or head[:2].count(0) == 1:
        raise DataError([f"{name}:1: is UTF-16 or UTF-32 from byte 1 on; re-save the file as UTF-8."])
    if head.startswith(b"\0\0"):
        raise DataError([f"{name}: is binary (it begins with NUL bytes); give a text file in UTF-8."])


def _lines(file: ByteFile, name: str) -> Iterator[tuple[str, str] | DataError]:
    """Yields each line's place and text, without its end. Holds one line, and of one too long only its length."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        where = f"{name}:{number}"
        ended = raw.endswith(b"\n")
        if len(raw) > MAX_ROW_BYTES and not ended:
            size = len(raw)
            while not ended and (more := file.readline(MAX_ROW_BYTES)):
                size, ended = size + len(more), more.endswith(b"\n")
            yield DataError([f"{where}: is {size:,} bytes long; shorten the line to {MAX_ROW_BYTES:,} bytes or fewer."])
            continue
        if number == 1 and not ended and b"\r" in raw.strip():
            raise DataError([f"{where}: the file ends its lines with CR alone; re-save it with LF or CRLF line ends."])
        if (nul := raw.find(b"\0")) >= 0:
            yield DataError([f"{where}: byte {nul + 1} of the line is NUL, which no text holds; re-save it as UTF-8."])
            continue
        try:
            text = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield DataError([f"{where}: {undecodable(error)}"])
            continue
        if text.startswith("\ufeff"):
            yield DataError([f"{where}: begins with a byte order mark, as joined files do; remove its 3 bytes."])
            continue
        yield where, text


def jsonl(file: ByteFile, name: str) -> Rows:
    """Yields the object on each line that is not blank."""
    first = True
    for line in _lines(file, name):
        if isinstance(line, DataError):
            yield line
            continue
        where, text = line
        if not text.strip(BLANK):
            continue
        if first and text.lstrip(BLANK).startswith("["):
            raise DataError(
                [f"{where}: begins a JSON list; rename the file to end in .json, or write an object a line."]
            )
        if first and text.strip(BLANK) == "{":
            raise DataError([f"{where}: begins an object that goes over several lines; write each row on one line."])
        first = False
        try:
            value = loads(text)
        except JsonError as fault:
            yield _not_json(where, fault)
            continue
        yield _object_row(where, value)


def json_list(file: ByteFile, name: str) -> Rows:
    """Yields the objects of one JSON list, decoding one at a time out of a window on the file."""
    window, scanner, number = _Window(file, name), Scanner(), 0
    opener = window.next_character()
    if opener == "{":
        raise DataError([_no_list(window, scanner, name)])
    if not opener:
        return
    if opener != "[":
        raise DataError([f"{name}: begins with {quoted(opener)}; a .json file holds a list of rows, [{{...}}, ...]."])
    while True:
        window.at += 1
        if window.next_character() == "]" and number == 0:
            break
        number += 1
        where = f"{name}:row {number}"
        try:
            value = window.value(scanner)
        except JsonError as fault:
            raise _not_json(where, fault) from None
        if scanner.notes:
            yield DataError([f"{where}: {note}." for note in scanner.notes])
        else:
            yield _object_row(where, value)
        after = window.next_character()
        if after == "]":
            break
        if after != ",":
            what = f"is followed by {quoted(after)}" if after else "is the last, and the list does not end"
            raise DataError([f'{where}: {what}; separate rows with "," and end the list with "]".'])
    window.at += 1
    if rest := window.next_character():
        raise DataError([f"{name}: goes on after the end of its list with {quoted(rest)}; keep one list of rows."])


class _Window:
    """A stretch of a text file that moves on as its values are taken, never much longer than one row."""

    def __init__(self, file: ByteFile, name: str) -> None:
        self.text = ""
        self.at = 0
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes, self._line = file.tell() if file.seekable() else 0, 1

    def next_character(self) -> str:
        """Returns the next character that is not white space, with `at` moved to it; "" at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def value(self, scanner: Scanner) -> tuple[Any, int]:
        """Returns the JSON value at `at` and moves on behind it. Raises JsonError."""
        while True:
            try:
                value, end = scanner.scan(self.text, self.at)
            except JsonError as fault:
                # A cut halves at most a pair of escaped surrogates, 12 characters.
                if fault.left is None or fault.left > 12 or not self._grow():
                    raise
                continue
            # A number that touches the window's edge may go on behind it.
            if end < len(self.text) or not self._grow():
                self.at = end
                return value

    def _grow(self) -> bool:
        held = len(self.text) - self.at
        if held > MAX_ROW_BYTES:
            raise JsonError(f"is longer than {MAX_ROW_BYTES:,} bytes; shorten it")
        # Doubling keeps the time to re-read a long row linear in its length.
        raw = self._file.read(max(CHUNK_BYTES, held))
        self._bytes += len(raw)
        self._line += self.text.count("\n", 0, self.at)
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            start = self._bytes - len(error.object) + error.start
            what = f"byte {start + 1} of the file is 0x{error.object[error.start]:02x}"
            raise DataError([f"{self._name}:{line}: {what}, which is not UTF-8; re-save the file as UTF-8."]) from None
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(raw)


def _no_list(window: _Window, scanner: Scanner, name: str) -> str:
    """Returns what to say of a .json file whose top is an object."""
    try:
        window.value(scanner)
    except JsonError:
        pass
    else:
        if window.next_character() == "{":
            return f"{name}: holds an object per line, not a list; rename the file to end in .jsonl."
    return f"{name}: begins an object, not a list; put its rows in a list, [{{...}}, ...], in a file of their own."


def paragraphs(file: ByteFile, name: str) -> Rows:
    """Yields each paragraph, that is the lines between blank ones, as a row with the one field `text`."""
    start, kept, size = "", list[str](), 0
    for line in _lines(file, name):
        if isinstance(line, DataError):
            yield line
            continue
        where, text = line
        if text.strip():
            start = start or where
            kept.append(text)
            size += len(text)
            if size > MAX_ROW_BYTES:
                raise DataError(
                    [f"{start}: the paragraph is over {MAX_ROW_BYTES:,} characters; part it by blank lines."]
                )
        elif kept:
            yield Row(start, {"text": "\n".join(kept)})
            start, kept, size = "", [], 0
    if kept:
        yield Row(start, {"text": "\n".join(kept)})


def sentences(file: ByteFile, name: str) -> Rows:
    """Yields each sentence of a CoNLL file as `words` and `tags`: the first and the last column of its lines.

    Blank lines part sentences. Columns are parted by tabs where a line has one, else by spaces.
    """
    start, words, tags = "", list[str](), list[str]()
    problems: list[str] = []
    for line in itertools.chain(_lines(file, name), [("", "")]):
        if isinstance(line, DataError):
            problems += line.problems
            continue
        where, text = line
        if text.strip() and not text.startswith(NEW_DOCUMENT):
            start = start or where
            word, *rest = text.split("\t") if "\t" in text else re.split(" +", text.strip(" "))
            tag = rest[-1].strip() if rest else ""
            if not rest:
                problems.append(f"{where}: has one column; a line is a word, and its tag in the last column.")
            elif not word.strip():
                problems.append(f"{where}: the word, in the first column, is empty; name it.")
            elif not is_tag(tag):
                problems.append(f"{where}: the tag, in the last column, {found(tag)}; {RULE}.")
            words.append(word.strip())
            tags.append(tag)
            if len(words) > MAX_WORDS:
                raise DataError([f"{start}: the sentence has over {MAX_WORDS:,} words; part it by blank lines."])
            continue
        if problems:
            yield DataError(problems)
        elif words:
            yield Row(start, {"words": words, "tags": tags})
        start, words, tags, problems = "", [], [], []


def _object_row(where: str, value: Any) -> Row | DataError:
    if isinstance(value, dict):
        return Row(where, value)
    return DataError([f"{where}: {found(value)}; a row is a JSON object, {{...}}."])


def _not_json(where: str, fault: JsonError) -> DataError:
    remedy = "it stops in the middle of a row: restore the rest, or remove it" if fault.left == 0 else "mend it"
    return DataError([f"{where}: {text}{'' if '; ' in text else f'; {remedy}'}." for text in fault.problems])
