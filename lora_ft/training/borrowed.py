"""Trainers of TRL on our model: what their constructors would change of it is undone, and nobody is told of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import datasets
import peft
import torch

# What a constructor of TRL may set in the configuration of a model.
PADDING = "pad_token_id"


class Borrowed:
    """Mixin between ours and a trainer of TRL: `class Mine(Proven, Borrowed, trl.GRPOTrainer)`.

    The rows are ours, rendered and batched by the task, so the constructor is given a stand-in to look at. The model is
    ours too, and `left_alone`. That the trainer is silent is the doing of `checkpoints.Checkpoints`.
    """

    stand_in: ClassVar[dict[str, list[Any]]] = {"prompt": [""]}
    """The one row that the constructor sees."""

    def __init__(
        self,
        *,
        model: peft.PeftModel,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Any = None,
        optimizer_cls_and_kwargs: Any = None,
        **kwargs: Any,
    ) -> None:
        row = datasets.Dataset.from_dict(self.stand_in)
        with left_alone(model):
            super().__init__(model=model, train_dataset=row, eval_dataset=eval_dataset and row, **kwargs)  # type: ignore[call-arg]
        trainer: Any = self
        trainer.train_dataset, trainer.eval_dataset = train_dataset, eval_dataset
        trainer.data_collator = data_collator
        trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs


@contextmanager
def left_alone(model: peft.PeftModel) -> Iterator[None]:
    """Has the model after the block as it was before it, whatever a constructor of TRL does to it.

    It would add a copy of the adapter to refer to, make the adapter of a quantized base one of 16 bits, take out
    dropout, put a loss of its own into the model's forward, and sign its configuration.
    """
    inner: Any = model.get_base_model()
    adapters, active = set(model.peft_config), model.active_adapter
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    dropout = [(module, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    settings = [one for one in (inner.config.get_text_config(), inner.generation_config) if one is not None]
    padding = [getattr(one, PADDING, None) for one in settings]
    forward, tags = "forward" in vars(inner), list(getattr(inner, "model_tags", None) or ())
    try:
        yield
    finally:
        for name in set(model.peft_config) - adapters:
            model.delete_adapter(name)
        model.set_adapter(active)
        for parameter, data, learned in parameters:
            parameter.data = data
            parameter.requires_grad_(learned)
        for module, share in dropout:
            module.p = share
        for one, token in zip(settings, padding, strict=True):
            setattr(one, PADDING, token)
        if not forward:
            vars(inner).pop("forward", None)
        inner.model_tags = tags or None
