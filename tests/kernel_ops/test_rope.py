"""Rotary embedding of queries and keys, against its twin and `apply_rotary_pos_emb`."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import lora_kernels
from lora_kernels import reference
from tests.kernel_ops import forms
from tests.kernel_ops.compare import assert_like_its_twin

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# B, H, Hk, T, D, dtype: head counts and sizes that fill no tile, an odd T, one token, one key head.
CASES = [
    (2, 3, 1, 7, 80, BF16),
    (1, 20, 4, 5, 128, FP32),
    (1, 4, 4, 1, 64, FP16),
    (3, 17, 2, 3, 6, BF16),
]


@pytest.fixture(params=forms.ALL, autouse=True)
def _form(request):
    with forms.computed_by(request.param):
        yield


def inputs(b, h, hk, t, d, dtype, angles=1):
    """Returns q and k as the projections leave them, heads inside tokens, and angles that differ between halves."""
    q, k = (torch.randn(b, t, heads, d).to(dtype).transpose(1, 2).requires_grad_() for heads in (h, hk))
    return q, k, torch.randn(angles, t, d).to(dtype), torch.randn(angles, t, d).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case):
    tensors = inputs(*case, angles=case[0])
    assert_like_its_twin(lora_kernels.rope, reference.rope, tensors)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_it_rotates_as_llama_does(dtype):
    q, k, _, _ = inputs(2, 4, 2, 7, 16, dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [900, 901, 902, 0, 1, 2, 3]])
    angles = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))
    # Angles in float32, so that float64 starts from the very same ones.
    cos, sin = (x.to(dtype) for x in angles(torch.zeros(1), positions))
    assert_like_its_twin(lora_kernels.rope, apply_rotary_pos_emb, (q, k, cos, sin))


def test_outputs_keep_the_layout_of_the_inputs():
    q, k, cos, sin = inputs(2, 3, 1, 7, 16, BF16)
    q = q.detach().contiguous()
    q_out, k_out = lora_kernels.rope(q, k, cos, sin)
    assert q_out.stride() == q.stride()
    assert k_out.stride() == k.stride()


def test_any_layout():
    both = torch.randn(2, 7, 5, 16).bfloat16()
    q, k = both[:, :, :3].transpose(1, 2).requires_grad_(), torch.randn(2, 2, 16, 7).bfloat16().mT.requires_grad_()
    cos, sin = torch.randn(1, 7, 32).bfloat16()[..., ::2], torch.randn(7, 1, 20).bfloat16()[..., :16].transpose(0, 1)
    assert_like_its_twin(lora_kernels.rope, reference.rope, (q, k, cos, sin))
    q, k = torch.randn(3, 2, 9, 16)[:, :, :7].transpose(0, 1), torch.randn(2, 3, 8, 20)[:, :2, :7, :16]
    cos, sin = torch.randn(2, 10, 16)[:, :7], torch.randn(2, 11, 18)[:, :7, :16]
    assert_like_its_twin(lora_kernels.rope, reference.rope, (q.requires_grad_(), k.requires_grad_(), cos, sin))


def test_gradients_of_stride_zero_and_none():
    q, k, cos, sin = inputs(2, 3, 1, 7, 16, BF16)
    upstream = [torch.ones(()).expand(2, 3, 7, 16), torch.randn(1, 1, 1, 16).expand(2, 1, 7, 16)]
    assert_like_its_twin(lora_kernels.rope, reference.rope, (q, k, cos, sin), upstream)
    assert_like_its_twin(lora_kernels.rope, reference.rope, (q, k.detach(), cos, sin), [upstream[0], None])


def test_angles_may_be_wider_than_what_they_rotate():
    q, k, cos, sin = inputs(1, 3, 1, 7, 16, BF16)
    found = lora_kernels.rope(q, k, cos.float(), sin.float())
    for wide, narrow in zip(found, lora_kernels.rope(q, k, cos, sin), strict=True):
        assert wide.dtype == BF16
        assert torch.equal(wide, narrow)


def test_the_operator_keeps_the_rules_of_torch_library():
    tensors = inputs(2, 3, 1, 3, 8, FP32)
    torch.library.opcheck(torch.ops.lora_kernels.rope.default, (*tensors, False))
    torch.library.opcheck(torch.ops.lora_kernels.rope.default, (tensors[0].mT.contiguous().mT, *tensors[1:], True))


def test_the_kernel_writes_its_heads_and_nothing_else():
    from lora_kernels.gpu import rope

    q, k, cos, sin = inputs(2, 3, 1, 7, 16, BF16)
    q_buffer = torch.full((2, 7, 4, 20), float("nan"), dtype=BF16).transpose(1, 2)
    k_buffer = torch.full((2, 2, 9, 18), float("nan"), dtype=BF16)
    rope.rotate_into(q_buffer[:, :3, :, :16], k_buffer[:, :1, :7, :16], q.detach(), k.detach(), cos, sin, False)
    wanted = lora_kernels.rope(q, k, cos, sin)
    for buffer, tensor in zip((q_buffer, k_buffer), wanted, strict=True):
        _, heads, tokens, size = tensor.shape
        assert torch.equal(buffer[:, :heads, :tokens, :size], tensor)
        assert (~buffer.isnan()).sum() == tensor.numel()


def test_the_twin_has_the_gradients_of_what_it_computes():
    q, k, cos, sin = inputs(2, 2, 1, 3, 4, FP32)
    q, k = q.detach().double().requires_grad_(), k.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(reference.rope, (q, k, cos.double(), sin.double()))


@pytest.mark.parametrize("wrong", ["tokens", "rows", "halves", "sin", "odd", "keys"])
def test_shapes_that_do_not_meet_are_refused(wrong):
    q, k, cos, sin = inputs(2, 3, 1, 7, 15 if wrong == "odd" else 16, BF16, angles=2)
    if wrong == "sin":
        sin = sin[:1]
    elif wrong == "keys":
        k = k[:1]
    elif wrong != "odd":
        cut = {"tokens": (slice(None), slice(1)), "rows": torch.tensor([0, 1, 1]), "halves": (..., slice(8))}[wrong]
        cos, sin = cos[cut], sin[cut]
    with pytest.raises(ValueError, match=r"rope: q, k, cos, sin must be .*, got \[\[2, 3, 7, 1[56]\]"):
        lora_kernels.rope(q, k, cos, sin)
