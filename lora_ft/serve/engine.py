"""One base in memory and adapters on it: answers of many requests computed together, token by token.

Requests join a running batch before its next token and leave it after their last. The adapters of a batch may all
differ (PEFT's mixed batches). Rows of a batch are padded on the left; what a row says depends on its neighbours by
rounding only.

A row is let in by what it holds and a little room, for most that may take the whole context end long before. The rows
times the tokens of the longest stay within BATCH_TOKENS, but for a row alone: where a batch outgrows that, the row that
came last waits again, and later reads its prompt and what it has said anew.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_ft.errors import LoraFtError
from lora_ft.generate import BATCH_TOKENS
from lora_ft.serve.decoding import Decoder, Piece
from lora_ft.serve.held import NO_ADAPTER, Held, Home
from lora_ft.serve.refusals import RequestError
from lora_ft.serve.sampling import Chooser, Settings, logprobs_of
from lora_ft.system import heap

log = logging.getLogger(__name__)

MAX_ROWS = 16
# Tokens that an answer is thought to take beyond those it has: most end within.
ROOM = 256
# How long a base is kept that nobody asks: a job may want the device, and loading takes seconds.
IDLE_S = 300.0
# Requests that may wait; beyond them a client is told to come again.
MAX_WAITING = 256


@dataclass(eq=False)
class Row:
    """One answer that is asked for."""

    home: Home
    adapter: Path | None
    ids: list[int]
    settings: Settings
    decoder: Decoder
    tell: Callable[[Piece | Exception], None]
    """Called from the engine's thread with each piece, the last of which says why the answer ends."""
    grammar: Any = None
    echo: int | None = None
    """Whether the tokens of the prompt are told first, with this many likeliest ones at each place."""
    cancelled: bool = False
    """Whether nobody waits for the answer any more."""
    chooser: Chooser = field(init=False)
    name: str = field(init=False, default=NO_ADAPTER)
    made: int = field(init=False, default=0)

    @property
    def so_far(self) -> list[int]:
        """The tokens of the prompt and of what has been said."""
        return [*self.ids, *self.decoder.ids]

    @property
    def expected(self) -> int:
        """How many tokens prompt and answer are thought to come to."""
        return len(self.ids) + min(self.settings.max_tokens, self.made + ROOM)

    def begin(self, held: Held) -> None:
        """Makes ready what the answer is made with. Raises LoraFtError where the adapter cannot be had."""
        self.name = held.name_of(self.adapter)
        if self.made:
            return
        seed = secrets.randbits(63) if self.settings.seed is None else self.settings.seed % 2**63
        self.chooser = Chooser(self.settings, self.grammar, held.device, seed)

    def advance(self, logits_V: torch.Tensor) -> int:
        """Returns the next token, having told it, or -1 where the answer ends; the logits may be changed."""
        if self.settings.max_tokens == 0:
            return self._end("length")
        chosen = self.chooser.choose(logits_V)
        self.made += 1
        is_end = chosen.token in self.settings.ends
        if is_end or (self.grammar is not None and self.grammar.done):
            if not is_end:
                self.tell(self.decoder.add(chosen))
            return self._end("stop")
        piece = self.decoder.add(chosen)
        self.tell(piece)
        if piece.finish is not None:
            return -1
        return self._end("length") if self.made >= self.settings.max_tokens else chosen.token

    def _end(self, finish: str) -> int:
        self.tell(self.decoder.end(finish))
        return -1

    def fail(self, error: Exception) -> None:
        """Tells why there will be no answer: nobody may wait for ever, or take a part for the whole."""
        if not self.cancelled:
            log.error("an answer ends: %s", error, exc_info=None if isinstance(error, LoraFtError) else error)
            self.cancelled = True
            self.tell(error)


class Engine:
    """Answers in a thread of its own, which begins with the first request."""

    def __init__(self) -> None:
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._forgotten: set[Path] = set()
        self._held: Held | None = None

    def submit(self, rows: Sequence[Row]) -> None:
        """Queues answers. Raises RequestError (429) where too many wait already."""
        with self._changed:
            if len(self._waiting) + len(rows) > MAX_WAITING:
                raise RequestError(
                    429, f"{len(self._waiting)} answers wait already; try again in a moment.", code="overloaded"
                )
            self._waiting.extend(rows)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._changed.notify()

    def forget(self, adapter: Path) -> None:
        """Lets go of an adapter whose folder is gone."""
        with self._changed:
            self._forgotten.add(adapter)

    def stop(self) -> None:
        """Ends the thread; whatever it was answering is told so."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        batch: _Batch | None = None
        with torch.inference_mode():
            while True:
                is_idle = False
                with self._changed:
                    while not (self._waiting or self._ending or batch or is_idle):
                        is_idle = not self._changed.wait(IDLE_S if self._held else None)
                    if self._ending:
                        break
                    # An answer that has begun is made to its end, whatever has become of its model.
                    used = {row.adapter for row in (*(batch.rows if batch else ()), *self._waiting)}
                    forgotten = self._forgotten - used
                    self._forgotten &= used
                if is_idle:
                    self._let_go()
                if self._held is not None:
                    for place in forgotten:
                        self._held.drop(place)
                batch = self._advanced(batch)
        gone = RequestError(503, "The server is stopping.", code="server_stopping")
        for row in [*(batch.rows if batch else ()), *self._waiting]:
            row.tell(gone)

    def _advanced(self, batch: _Batch | None) -> _Batch | None:
        """Returns the batch after one token of all its rows, with those that wait taken in where they fit.

        None where no rows are left: a batch holds its base.
        """
        joining = self._joining(batch)
        try:
            if joining:
                held = self._holding(joining[0].home)
                if not held.mixes:
                    with self._changed:
                        self._waiting.extendleft(reversed(joining[1:]))
                    joining = joining[:1]
                for row in joining:
                    with _alone(row):
                        row.begin(held)
                joining = [row for row in joining if not row.cancelled]
                batch = batch if batch is not None and batch.held is held else _Batch(held)
                batch.join(joining)
                joining = []
            elif batch is not None:
                aside = batch.put_aside()
                with self._changed:
                    self._waiting.extendleft(aside)
                batch.step()
        except Exception as error:
            taken = batch.rows if batch is not None else []
            # Where the new rows could not be taken in, the others are as they were.
            lost = joining if joining and joining[0] not in taken else taken
            for row in lost:
                row.fail(error)
            heap.give_back()
            if lost is not joining:
                return None
        return batch if batch is not None and batch.rows else None

    def _joining(self, batch: _Batch | None) -> list[Row]:
        """Returns the rows, the oldest first, that go with the batch as it is, or together where there is none."""
        chosen: list[Row] = []
        running = list(batch.rows) if batch else []
        with self._changed:
            while self._waiting:
                row = self._waiting[0]
                others = [*running, *chosen]
                if row.cancelled:
                    self._waiting.popleft()
                    continue
                if others and not self._fits(row, others):
                    break
                chosen.append(self._waiting.popleft())
        return chosen

    def _fits(self, row: Row, others: Sequence[Row]) -> bool:
        if row.home.key != others[0].home.key or len(others) >= MAX_ROWS:
            return False
        if self._held is not None and self._held.home.key == row.home.key and not self._held.mixes:
            return False
        return max(row.expected, *(other.expected for other in others)) * (len(others) + 1) <= BATCH_TOKENS

    def _holding(self, home: Home) -> Held:
        if self._held is None or self._held.home.key != home.key:
            # The one before goes first: two bases need not fit.
            self._let_go()
            self._held = Held(home)
        return self._held

    def _let_go(self) -> None:
        """Gives back the memory of the base and its adapters."""
        self._held = None
        heap.give_back()
        torch.cuda.empty_cache()


class _Batch:
    """The rows being answered, with keys and values of all their tokens, padded on the left to one length."""

    def __init__(self, held: Held) -> None:
        self.held = held
        self.rows: list[Row] = []
        self.cache: Any = None
        self.mask_BT: torch.Tensor = torch.zeros(0, 0, dtype=torch.int64, device=held.device)
        self.last: list[int] = []

    def join(self, rows: Sequence[Row]) -> None:
        """Reads the prompts of new rows and takes the rows in with the first token of each."""
        if not rows:
            return
        held = self.held
        held.let_go({row.name for row in (*self.rows, *rows)})
        texts = [row.so_far for row in rows]
        longest = max(map(len, texts))
        pad = held.base.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts], device=held.device)
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=held.device)
        echoing = [place for place, row in enumerate(rows) if row.echo is not None and not row.made]
        cache = held.cache()
        places = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), "attention_mask": mask} if held.mixes else {}
        kept = {"logits_to_keep": 1} if held.keeps_logits and not echoing else {}
        out = held.run([r.name for r in rows], input_ids=ids, past_key_values=cache, use_cache=True, **places, **kept)
        for place in echoing:
            row = rows[place]
            with _alone(row):
                start = longest - len(row.ids)
                row.tell(Piece(tokens=logprobs_of(out.logits[place, start:-1], row.ids[1:], row.echo or 0)))
        if self.rows:
            self.cache, self.mask_BT = held.joined(self.cache, self.mask_BT, out.past_key_values, mask)
        else:
            self.cache, self.mask_BT = out.past_key_values, mask
        self.rows = [*self.rows, *rows]
        self.last = [*self.last, *self._chosen(rows, out.logits[:, -1])]
        self._leave()

    def step(self) -> None:
        """Computes one more token of each row."""
        held = self.held
        self._leave()
        if not self.rows:
            return
        ids = torch.tensor(self.last, device=held.device)[:, None]
        places = {}
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.rows), 1)], dim=1)
        if held.mixes:
            places = {"position_ids": self.mask_BT.sum(dim=1, keepdim=True) - 1, "attention_mask": self.mask_BT}
        names = [row.name for row in self.rows]
        out = held.run(names, input_ids=ids, past_key_values=self.cache, use_cache=True, **places)
        self.cache = out.past_key_values
        self.last = self._chosen(self.rows, out.logits[:, -1])
        self._leave()

    def _chosen(self, rows: Sequence[Row], logits_BV: torch.Tensor) -> list[int]:
        """Returns the next token of each row, -1 where there is none."""
        tokens = [-1] * len(rows)
        for place, (row, logits) in enumerate(zip(rows, logits_BV.float(), strict=True)):
            if not row.cancelled:
                with _alone(row):
                    tokens[place] = row.advance(logits)
        return tokens

    def put_aside(self) -> list[Row]:
        """Returns the rows, the last first, that were taken out because the next token would make them all too many."""
        self._leave()
        length = self.mask_BT.shape[1] + 1
        fitting = max(1, BATCH_TOKENS // length)
        aside = self.rows[fitting:]
        self._keep(range(len(self.rows))[:fitting])
        return aside[::-1]

    def _leave(self) -> None:
        """Takes the rows out that have ended, or that nobody waits for any more."""
        self._keep([i for i, row in enumerate(self.rows) if self.last[i] >= 0 and not row.cancelled])

    def _keep(self, staying: Sequence[int]) -> None:
        if len(staying) == len(self.rows):
            return
        self.rows, self.last = [self.rows[i] for i in staying], [self.last[i] for i in staying]
        if not staying:
            self.cache, self.mask_BT = None, self.mask_BT[:0, :0]
            return
        chosen = torch.tensor(staying, device=self.held.device)
        mask = self.mask_BT[chosen]
        # Columns that are padding in every row that stays are let go too.
        start = int((mask.sum(dim=0) > 0).int().argmax())
        cache = self.held.cache()
        for new, old in zip(cache.layers, self.cache.layers, strict=True):
            new.update(old.keys[chosen, :, start:], old.values[chosen, :, start:])
        self.cache, self.mask_BT = cache, mask[:, start:]


@contextmanager
def _alone(row: Row) -> Iterator[None]:
    """Runs the block for one row: what goes wrong there is told to that row, and ends no other."""
    try:
        yield
    except Exception as error:
        row.fail(error)
