"""Which products a kernel computes and which torch does, and how programs are spread over the GPU."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import lora_kernels
from lora_kernels import dispatch
from lora_kernels.dispatch import Gpu
from lora_kernels.gpu import lora
from lora_kernels.gpu.tile import leaves_idle
from tests.kernel_ops import guard


def launched_by(run):
    with guard.fenced_launches("end") as launched:
        run()
    return launched


@pytest.mark.parametrize("rank", [32, 33])
def test_above_rank_32_dy_is_read_by_torch(rank, triton_anywhere):
    dy, b, xa = (torch.ones(size, dtype=torch.bfloat16) for size in ((3, 16), (16, rank), (3, rank)))
    names = launched_by(lambda: lora_kernels.lora_bwd_up(dy, b, xa, 0.5))
    assert names == ({"lora_up_backward_kernel"} if rank == 32 else set())
    ds, db = lora_kernels.lora_bwd_up(dy, b, xa, 0.5)
    assert (ds.dtype, db.dtype) == (torch.bfloat16, torch.float32)
    assert (ds == 8).all()
    assert (db == 1.5).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_float32_is_multiplied_by_torch_where_nothing_is_dropped(dropout, triton_anywhere):
    x, a, s = torch.randn(3, 16), torch.randn(4, 16), torch.randn(3, 4)
    names = launched_by(lambda: lora.down(x, a, dropout, 1))
    names |= launched_by(lambda: lora.down_weight_gradient(s, x, dropout, 1))
    names |= launched_by(lambda: lora.down_input_gradient(s, a, dropout, 1))
    names |= launched_by(lambda: lora.up_backward(x, a.t(), s, 1.0))
    kernels = {"lora_down_kernel", "lora_down_weight_kernel", "lora_down_input_kernel"}
    assert names == (kernels if dropout else set())


def few_rows(rank, residual):
    """Returns what the norm and the activation give for five rows."""
    torch.manual_seed(0)
    x, a = torch.randn(5, 300).half(), torch.randn(rank, 300)
    norm = lora_kernels.rms_norm_lora(x, x if residual else None, torch.randn(300).half(), a, 1e-5)
    return [*norm, lora_kernels.swiglu_lora(x, torch.randn(5, 300).half(), a)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rank", [4, 70])
def test_a_few_rows_are_spread_over_the_multiprocessors(rank, residual, triton_anywhere, monkeypatch):
    grids = []
    run = InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction,
        "run",
        lambda self, *args, grid, **kw: grids.append(grid) or run(self, *args, grid=grid, **kw),
    )
    together = few_rows(rank, residual)
    assert [grid[0] for grid in grids] == [1, 1]
    monkeypatch.setattr(dispatch, "gpu", lambda device: Gpu("a card", "sm_89", 128))
    apart = few_rows(rank, residual)
    assert grids[2:] == [(5,), (1, 3)]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=4e-3, atol=8e-3)
    # Two programs of 16 rows for each multiprocessor are enough.
    assert leaves_idle(255, torch.device("cpu"))
    assert not leaves_idle(256, torch.device("cpu"))
