"""What dropout keeps depends on the seed and the place alone, in every kernel, and both ways through a layer."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import Frozen, dispatch

PARTS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(seed, rows, columns):
    """Returns the 32-bit numbers of Philox 4x32 with 10 rounds, from its definition, for a tensor of this shape."""
    quads = -(-columns // 4)
    row, quad = np.meshgrid(np.arange(rows, dtype=np.uint64), np.arange(quads, dtype=np.uint64), indexing="ij")
    counter = [row, quad, np.zeros_like(row), np.zeros_like(row)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        left, right = counter[0] * np.uint64(PARTS[0]), counter[2] * np.uint64(PARTS[1])
        counter = [
            (right >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            right & np.uint64(0xFFFFFFFF),
            (left >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            left & np.uint64(0xFFFFFFFF),
        ]
        key = [(part + step) & 0xFFFFFFFF for part, step in zip(key, WEYL, strict=True)]
    return np.stack(counter, axis=-1).reshape(rows, 4 * quads)[:, :columns]


@pytest.mark.parametrize(("seed", "dropout"), [(0, 0.5), (7, 0.1), (2**61 + 12345, 0.9)])
def test_the_mask_is_philox(seed, dropout, triton_anywhere):
    wanted = philox(seed, 33, 131) >= dropout * 2**32
    found = lora_kernels.keep_mask(torch.empty(33, 131), dropout, seed)
    assert np.array_equal(found.cpu().numpy(), wanted)


@pytest.mark.parametrize("shape", [(1, 5), (1000, 333)])
def test_the_mask_of_the_cpu_keeps_its_share_and_comes_back(shape):
    like = torch.empty(shape)
    mask = lora_kernels.keep_mask(like, 0.3, 5)
    assert torch.equal(mask, lora_kernels.keep_mask(like, 0.3, 5))
    assert mask.shape == shape
    if mask.numel() > 1000:
        # Five standard deviations; and neither rows nor columns repeat what others do.
        assert abs(mask.float().mean() - 0.7) < 5 * (0.21 / mask.numel()) ** 0.5
        assert not torch.equal(mask, lora_kernels.keep_mask(like, 0.3, 6))
        assert (mask[1:] == mask[:-1]).float().mean() < 0.6
        assert (mask[:, 1:] == mask[:, :-1]).float().mean() < 0.6


@pytest.mark.parametrize("dropout", [0.0, 1e-9, 1 - 1e-9])
def test_the_ends_of_the_range_keep_all_or_nearly_nothing(dropout):
    share = lora_kernels.keep_mask(torch.empty(100, 100), dropout, 5).float().mean()
    assert share == 1 if dropout < 0.5 else share < 0.01


@pytest.mark.parametrize("dropout", [1 - 2**-16, 1 - 1e-9])
def test_at_the_end_of_the_range_the_largest_draws_are_kept(dropout):
    draws = torch.empty(90_000, dtype=torch.int64, device="cpu")
    draws.random_(-(2**63), None, generator=torch.Generator(device="cpu").manual_seed(5))
    quarters = draws.view(torch.int16).view(600, 600)
    assert (quarters == 32767).any()
    mask = lora_kernels.keep_mask(torch.empty(600, 600, device="cpu"), dropout, 5)
    assert torch.equal(mask, quarters == 32767)


WAYS = ["cpu", "dequant", "triton", "triton_4bit"]


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_drops_the_same_both_ways(way, request):
    """Taken apart by a rank as large as the inputs: y, dx and da are then the mask itself."""
    if way != "cpu":
        request.getfixturevalue("triton_anywhere")
    rows, inputs, dropout = 18, 64, 0.5
    weight = Frozen.of(torch.zeros(inputs, inputs))
    if way == "triton_4bit":
        import bitsandbytes.functional as bnb

        weight = Frozen.of(*bnb.quantize_4bit(weight.data, quant_type="nf4"))
    x = torch.ones(rows, inputs, requires_grad=True)
    a = torch.eye(inputs).requires_grad_()
    b = torch.eye(inputs)
    keep = lora_kernels.keep_mask(x, dropout, 11)
    with dispatch.forced("dequant" if way == "cpu" else way):
        y = lora_kernels.lora_linear(x, weight, None, a, b, scaling=1.0, dropout=dropout, seed=11)
        y.backward(torch.ones(rows, inputs))
    assert 0.3 < keep.float().mean() < 0.7
    assert torch.equal(y, keep / (1 - dropout))
    assert torch.equal(x.grad, keep / (1 - dropout))
    assert torch.equal(a.grad, keep.float().sum(0).expand(inputs, inputs) / (1 - dropout))


def test_a_recomputed_forward_pass_drops_the_same(triton_anywhere):
    weight, a, b = Frozen.of(torch.randn(32, 64)), torch.randn(8, 64), torch.randn(32, 8)
    x = torch.randn(5, 64, requires_grad=True)

    def layer(x):
        return lora_kernels.lora_linear(x, weight, None, a, b, scaling=1.0, dropout=0.5)

    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.manual_seed(3)
    (recomputed,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, recomputed)
    assert not torch.equal(layer(x), layer(x))
