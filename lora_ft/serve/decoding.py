"""Tokens -> text as it comes: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lora_ft.serve.sampling import Chosen

HALF = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass
class Piece:
    """What can be told of an answer since the last piece."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    """The tokens of the text, where log-probabilities were asked for."""
    finish: str | None = None
    """Why the answer ends here: `stop` or `length`."""


class Decoder:
    """The text of one answer.

    Args:
        kept: the special tokens that stand in the text; the others are left out.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], kept: frozenset[int] = frozenset()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self._hidden = special_tokens(tokenizer).keys() - kept if kept else None
        self.ids: list[int] = []
        self.text = ""
        """All that the tokens say so far, up to a stop string."""
        self.told = 0
        """Characters that pieces have held."""
        self._window = self._read = 0
        self._waiting: list[tuple[int, Chosen]] = []

    def add(self, chosen: Chosen) -> Piece:
        """Returns what can be told once a token has come; `finish` is set where a stop string is complete."""
        begins = len(self.text)
        self.ids.append(chosen.token)
        self.text += self._new()
        self._waiting.append((begins, chosen))
        # A stop string may have begun in what was held back.
        earliest = min((at for at in (self.text.find(stop, self.told) for stop in self.stop) if at >= 0), default=None)
        if earliest is not None:
            self.text = self.text[:earliest]
            return self._piece(len(self.text), "stop")
        return self._piece(len(self.text) - self._held())

    def end(self, finish: str) -> Piece:
        """Returns the rest of an answer that ends."""
        rest = self._decoded(self.ids[self._window :])
        known = self._decoded(self.ids[self._window : self._read])
        self.text += rest[len(known) :].rstrip(HALF)
        return self._piece(len(self.text), finish)

    def _new(self) -> str:
        """Returns the text that the last token adds: none while a character is not whole.

        A token is decoded with those before it, for some tokenizers write a space between words only.
        """
        before = self._decoded(self.ids[self._window : self._read])
        now = self._decoded(self.ids[self._window :])
        if now.endswith(HALF) or len(now) <= len(before):
            return ""
        self._window, self._read = self._read, len(self.ids)
        return now[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        if self._hidden is None:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return str(self.tokenizer.decode([one for one in ids if one not in self._hidden]))

    def _held(self) -> int:
        """Returns how many characters at the end may be the beginning of a stop string."""
        rest = len(self.text) - self.told
        lengths = (
            n for stop in self.stop for n in range(min(len(stop) - 1, rest), 0, -1) if self.text.endswith(stop[:n])
        )
        return max(lengths, default=0)

    def _piece(self, end: int, finish: str | None = None) -> Piece:
        text, self.told = self.text[self.told : end], max(end, self.told)
        if finish is None:
            ready = [one for begins, one in self._waiting if begins < end or (begins == end == len(self.text))]
            self._waiting = self._waiting[len(ready) :]
        else:
            # Of a stop string itself nothing is told.
            ready = [one for begins, one in self._waiting if begins < end or finish == "length"]
            self._waiting = []
        return Piece(text, ready, finish)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Returns the tokens that are no text, and how they are written."""
    return {one: token.content for one, token in tokenizer.added_tokens_decoder.items() if token.special}


@cache
def _letters() -> dict[str, int]:
    """Returns the letter that byte-level vocabularies write for each byte (Radford et al. 2019, GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Returns the bytes that a token stands for, which need not be whole characters."""
    written = tokenizer.convert_ids_to_tokens(token)
    if written is None:
        return b""
    if token in tokenizer.all_special_ids:
        return str(written).encode()
    if match := _BYTE.fullmatch(written):
        return bytes([int(match[1], 16)])
    letters = _letters()
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) and all(letter in letters for letter in written):
        return bytes(letters[letter] for letter in written)
    return str(written).replace("\u2581", " ").encode("utf-8", "surrogatepass")
