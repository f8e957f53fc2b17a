"""Bytes of tensors that have shapes only: what a step would hold at its largest, counted while it runs on fakes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lora_kernels import operators, slabs

ACTIVATIONS, LOGITS, WORKSPACE = "activations", "logits", "workspace"
ELSEWHERE = "elsewhere"
"""Kind of what lies outside of the memory that is counted."""


def _of_whole_rows(q_BHTD: Any, k_BJLD: Any, *_: Any, out_val: Any, **kwargs: Any) -> int:
    """Returns what the two products of all scores take."""
    batch, heads, queries, width = q_BHTD.shape
    return 4 * batch * heads * queries * k_BJLD.shape[2] * width


def _of_whole_rows_backward(do_BHTD: Any, *rest: Any, out_val: Any, **kwargs: Any) -> int:
    return _of_whole_rows(*rest, out_val=out_val) * 5 // 2


def _of_attention(q_HTD: Any, k_JTD: Any, v_JTD: Any, bounds: Sequence[int], *_: Any, out_val: Any) -> int:
    """Returns what two products of the scores that a causal mask leaves take."""
    heads, _, width = q_HTD.shape
    return 2 * heads * width * sum((end - begin) ** 2 for begin, end in pairwise(bounds))


def _of_attention_backward(do_HTD: Any, *rest: Any, out_val: Any) -> int:
    """Returns what the scores computed again and four more products take."""
    return _of_attention(*rest, out_val=out_val) * 5 // 2


# What operators hold for a while, by their names.
_HOLD = dict.fromkeys(
    (
        "nf4_dequant",
        "lora_linear",
        "lora_linear_backward",
        "lora_group",
        "lora_group_backward",
        "swiglu_lora_backward",
    ),
    WORKSPACE,
)
_HOLD["linear_cross_entropy"] = LOGITS
# On a GPU these work in registers, or have a kernel of torch go before them; on a CPU on a block of rows, or on the
# scores of some examples, at a time.
_HOLD_ON_CPU = dict.fromkeys(
    ("rms_norm_lora", "rms_norm_lora_backward", "swiglu_lora", "rope", "packed_attention_backward"), WORKSPACE
)
_FLOPS = {
    **flop_registry,
    # Torch counts products in place under the names of those that are not.
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_whole_rows,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_whole_rows_backward,
    torch.ops.lora_kernels.packed_attention: _of_attention,
    torch.ops.lora_kernels.packed_attention_backward: _of_attention_backward,
}


class Ledger(TorchDispatchMode):
    """Counts the storages of fake tensors, from the operation that makes them to the last reference to them.

    It goes inside a `FakeTensorMode`. Operators of `lora_kernels` that hold much for a while, dequantized weights,
    logits and on a CPU blocks of rows, run what they consist of, so that it is counted too. Tensors of numbers, such as
    token ids, are computed with and not counted.

    Args:
        on_gpu: whether the step is that of a GPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self._hold = _HOLD if on_gpu else _HOLD | _HOLD_ON_CPU
        self.kind = ACTIVATIONS
        """What new storages are counted as."""
        self.held: Counter[str] = Counter()
        """Bytes held now, by kind."""
        self.peak: Counter[str] = Counter()
        """Bytes held when they were the most."""
        self.flops = 0
        self._entries: dict[int, tuple[int, str, int]] = {}
        """Size and kind of each storage that is held, and how many were made before it."""
        self._made = self._made_by_peak = 0
        self._leaving: torch.Tensor | None = None

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Counts what is made in the block as `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def begin(self) -> None:
        """Forgets the peak and the arithmetic so far."""
        self.peak, self.flops = +self.held, 0
        self._made_by_peak = self._made

    def call(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts a tensor as `kind`, at the peak too if it was held then and is yet; `ELSEWHERE` as none."""
        size, before, made = self._entries[tensor.untyped_storage()._cdata]
        self._recount(tensor.untyped_storage(), kind)
        if made < self._made_by_peak:
            self._count(self.peak, before, -size)
            self._count(self.peak, kind, size)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Keeps what is saved for the backward pass in the block elsewhere, as one that is in the host's memory.

        A tensor leaves when the next one is saved, for until then it is computed with.
        """
        with saved_tensors_hooks(self._leave, self._return):
            yield

    def _leave(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._leaving is not None:
            self._recount(self._leaving.untyped_storage(), ELSEWHERE)
        self._leaving = tensor
        return tensor

    def _return(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._leaving is not tensor:
            self._recount(tensor.untyped_storage(), ACTIVATIONS)
            self._see()
        self._leaving = None
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        space, _, name = func._schema.name.partition("::")
        if space == "lora_kernels" and name in self._hold:
            return self._inside(func, args, kwargs)
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        found = func(*args, **kwargs)
        for tensor in tree_leaves(found):
            if isinstance(tensor, FakeTensor):
                self._note(tensor.untyped_storage())
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=found)
        return found

    def _inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, before = func._schema.name.partition("::")[2], self.flops
        with self, self.counting(self._hold[name]), slabs.one_block():
            found = operators.bodies[name](*args, **kwargs)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            # Of one block only those were counted.
            self.flops = before + count(*args, **kwargs, out_val=found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, FakeTensor):
                self._recount(tensor.untyped_storage(), self.kind)
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._entries:
            return
        self._entries[key] = storage.nbytes(), self.kind, self._made
        self._made += 1
        self.held[self.kind] += storage.nbytes()
        self._see()
        weakref.finalize(storage, self._freed, key)

    def _see(self) -> None:
        if self.held.total() > self.peak.total():
            self.peak, self._made_by_peak = +self.held, self._made

    def _freed(self, key: int) -> None:
        size, kind, _ = self._entries.pop(key)
        self._count(self.held, kind, -size)

    def _recount(self, storage: torch.UntypedStorage, kind: str) -> None:
        entry = self._entries.get(storage._cdata)
        if entry is not None:
            size, before, made = entry
            self._entries[storage._cdata] = size, kind, made
            self._count(self.held, before, -size)
            self._count(self.held, kind, size)

    @staticmethod
    def _count(counter: Counter[str], kind: str, size: int) -> None:
        if kind != ELSEWHERE:
            counter[kind] += size
