"""One base in memory with the adapters on it, and the keys and values of the texts it has read."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import DynamicCache

from lora_ft import base as bases
from lora_ft import fused, saved, sources
from lora_ft.errors import UnsupportedModelError
from lora_ft.generate import InPlaceLayer, can_share, contiguous_head
from lora_ft.model import four_bits
from lora_ft.model.modes import unwrapped
from lora_ft.tasks import get as get_task

log = logging.getLogger(__name__)

# Adapters kept beside the base: of SmolLM2-135M at rank 16 each takes 10 MB in bfloat16.
MAX_ADAPTERS = 16
NO_ADAPTER = "__base__"
"""PEFT's word for a row that no adapter changes."""


@dataclass(frozen=True)
class Home:
    """A base as adapters and requests name it: what must be the same for them to share it."""

    source: sources.Source
    digest: str
    quant: Any = "nf4"
    dtype: str = "auto"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.digest, self.quant, self.dtype


class Held:
    """The base in memory and the adapters on it."""

    def __init__(self, home: Home) -> None:
        self.home = home
        base = bases.load(home.source, quant=home.quant, model_class=get_task("chat").model_class, dtype=home.dtype)
        self.base, self.model = base, base.model
        self.model.eval()
        takes = inspect.signature(self.model.forward).parameters
        if "past_key_values" not in takes:
            raise UnsupportedModelError(
                f"{home.source.name}: a {self.model.config.model_type} model keeps no cache of what it has read, so it "
                "would read all of it anew for every token: it is not served."
            )
        self.keeps_logits = "logits_to_keep" in takes
        self.mixes = can_share(self.model)
        if not self.mixes:
            log.info("%s answers one request at a time: its attention does not allow padding", home.source.name)
        self._kept = ExitStack()
        self._kept.enter_context(four_bits.dequantized(self.model))
        self._kept.enter_context(contiguous_head(self.model))
        self._names: OrderedDict[Path, str] = OrderedDict()
        self._made = 0

    @property
    def device(self) -> torch.device:
        return self.base.device

    def drop(self, place: Path) -> None:
        """Takes an adapter out of the model."""
        if name := self._names.pop(place, None):
            self.model.delete_adapter(name)

    def name_of(self, place: Path | None) -> str:
        """Returns the name of an adapter, None standing for none, having put it into the model. Raises LoraFtError."""
        if place is None:
            return NO_ADAPTER
        if place in self._names:
            self._names.move_to_end(place)
            return self._names[place]
        settings = saved.lora_settings(place)
        self._made += 1
        name = f"a{self._made}"
        fused.register(settings)
        if isinstance(self.model, peft.PeftModel):
            self.model.add_adapter(name, settings)
        else:
            self.model.name_or_path = settings.base_model_name_or_path
            self.model = peft.get_peft_model(self.model, settings, adapter_name=name)
        try:
            saved.fill(self.model, place, name)
        except Exception:
            self.model.delete_adapter(name)
            raise
        # Autocast would make the same numbers of them, for every product anew.
        for parameter_name, parameter in self.model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.data = parameter.data.to(self.base.dtype)
                parameter.requires_grad_(False)
        self.model.eval()
        self._names[place] = name
        return name

    def let_go(self, but: set[str]) -> None:
        """Drops the adapters that were not used for longest, where there are too many."""
        for place in [place for place, name in self._names.items() if name not in but]:
            if len(self._names) <= MAX_ADAPTERS:
                return
            self.drop(place)

    def run(self, names: Sequence[str], **inputs: Any) -> Any:
        """Returns the model's output for rows, each with the adapter of its name."""
        if isinstance(self.model, peft.PeftModel):
            return self.model(**inputs, adapter_names=list(names))
        return self.model(**inputs)

    def cache(self) -> DynamicCache:
        """Returns an empty cache: the model's own kind where a batch has one row only."""
        config = unwrapped(self.model).config
        cache = DynamicCache(config=config)
        if self.mixes:
            cache.layers = [InPlaceLayer() for _ in cache.layers or range(config.num_hidden_layers)]
        return cache

    def joined(
        self, first: DynamicCache, first_mask: torch.Tensor, second: DynamicCache, second_mask: torch.Tensor
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Returns the caches and masks of two batches as those of one, the shorter padded on the left."""
        longest = max(first_mask.shape[1], second_mask.shape[1])
        cache = self.cache()
        for new, one, two in zip(cache.layers, first.layers, second.layers, strict=True):
            keys = torch.cat([_padded(one.keys, longest), _padded(two.keys, longest)])
            new.update(keys, torch.cat([_padded(one.values, longest), _padded(two.values, longest)]))
        masks = [torch.nn.functional.pad(m, (longest - m.shape[1], 0)) for m in (first_mask, second_mask)]
        return cache, torch.cat(masks)


def _padded(states_BHTD: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.nn.functional.pad(states_BHTD, (0, 0, longest - states_BHTD.shape[2], 0))
