"""Bytes of tensors that a real training holds at its largest, seen by the allocator."""

import gc
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback


def held() -> int:
    """Returns the bytes of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class PeakOfStep(TrainerCallback):
    """Watches one optimizer step of a training, by default the second, when the optimizer has its state.

    Args:
        before: what was held before the model was there.
    """

    def __init__(self, before: int, step: int = 1) -> None:
        self.before, self.step = before, step
        self.peak = 0
        self.profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.peak = held() - self.before
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            changes = [e.nbytes() for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            now = above = 0
            for change in changes:
                now += change
                above = max(above, now)
            self.peak += above
            self.profiler = None
