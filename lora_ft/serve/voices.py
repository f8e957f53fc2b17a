"""What speaks for a model name: its base, its adapter, its tokenizer and its chat template, found once and kept."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_ft import base as bases
from lora_ft import saved, sources
from lora_ft.data.render import ChatRenderer
from lora_ft.data.tokens import adds_bos
from lora_ft.errors import LoraFtError, MaskError, SourceError
from lora_ft.foreign.files import object_of
from lora_ft.proof import recorded
from lora_ft.serve import grammars
from lora_ft.serve.held import Home
from lora_ft.serve.models import Model, Models
from lora_ft.serve.refusals import RequestError, bad
from lora_ft.serve.toolcalls import CallForm

KEPT = 32
# Where a base does not say how long a text may be.
CONTEXT = 2048


@dataclass
class Voice:
    """A model that can be asked."""

    model: Model
    home: Home
    adapter: Path | None
    tokenizer: Any
    context: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    """The number of logits."""
    ends: frozenset[int]
    """Tokens that end any text of the model."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while tokenizer and template are used: neither allows two threads at once."""

    @cached_property
    def renderer(self) -> ChatRenderer:
        """The chat template. Raises RequestError where there is none."""
        try:
            return ChatRenderer(self.tokenizer, self.context)
        except MaskError as error:
            raise bad("model", f"{self.model.name} cannot be talked to: {error}", "invalid_model") from None

    @cached_property
    def calls(self) -> CallForm | None:
        """How the template writes calls of tools."""
        return CallForm.of(self.renderer)

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """What grammars know of the tokenizer."""
        return grammars.tokenizer_of(self.tokenizer, self.vocabulary, sorted(self.ends | {self.renderer.end_id}))

    @cached_property
    def start(self) -> list[int]:
        """What is put before a prompt without a template: BOS, where the tokenizer puts it before texts."""
        return [self.tokenizer.bos_token_id] if adds_bos(self.tokenizer) else []

    def plain(self, text: str) -> list[int]:
        """Returns a prompt without a template as tokens, as it was trained."""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        # A model must be run on something.
        return [*self.start, *ids] or [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id]

    @property
    def fingerprint(self) -> str:
        """What changes where the same request may be answered otherwise."""
        name = self.model.name if self.adapter else "base"
        digest = hashlib.sha256(f"{self.home.key} {name}".encode()).hexdigest()
        return f"fp_{digest[:10]}"


class Voices:
    """The voices of a server, those used last kept."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._kept: OrderedDict[str, Voice] = OrderedDict()
        self._homes: dict[str, Home] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Voice:
        """Returns the voice of a model. Raises RequestError where there is none, or its base cannot be had."""
        model = self.models.resolve(name)
        with self._lock:
            held = self._kept.get(name)
            if held is None or held.model != model:
                try:
                    self._kept[name] = self._made(model)
                except RequestError:
                    raise
                except LoraFtError as error:
                    raise RequestError(
                        400, f"{name} cannot be used: {error}", code="model_unavailable", param="model"
                    ) from None
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(name)
            return self._kept[name]

    def forget(self, name: str) -> Path | None:
        """Returns the adapter of a model that is gone, having let go of its voice."""
        with self._lock:
            voice = self._kept.pop(name, None)
        return voice.adapter if voice else None

    def _made(self, model: Model) -> Voice:
        folder = self.models.store.home / model.adapter if model.adapter else None
        if folder is None:
            # Once: an alias is looked for on the hub first, which may take a while not to answer.
            if model.source not in self._homes:
                source = sources.resolve(model.source)
                self._homes[model.source] = Home(source, sources.weights_digest(source.folder))
            home = self._homes[model.source]
        else:
            record = recorded.read(folder)
            home = Home(saved.find_base(folder, record["base"]), record["base"]["weights_sha256"], record["quant"])
        config = bases.read_config(home.source.folder)
        tokenizer = bases.load_tokenizer(folder or home.source.folder)
        length = getattr(config, "max_position_embeddings", None)
        return Voice(
            model=model,
            home=home,
            adapter=folder,
            tokenizer=tokenizer,
            context=length if isinstance(length, int) and length > 0 else CONTEXT,
            vocabulary=config.vocab_size,
            ends=_ends(home.source.folder, config, tokenizer),
        )


def _ends(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that the base's files say a text ends with."""
    told = [config.eos_token_id, tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        told.append(object_of(folder / "generation_config.json", SourceError).get("eos_token_id"))
    ids = [one for value in told for one in (value if isinstance(value, list) else [value])]
    return frozenset(one for one in ids if isinstance(one, int))
