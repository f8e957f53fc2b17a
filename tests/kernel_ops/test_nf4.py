"""4-bit weights come out bit for bit as bitsandbytes has them, from the kernel, the CPU form and the twin."""

import bitsandbytes.functional as bnb
import pytest
import torch

import lora_kernels
from lora_kernels import Frozen, reference
from lora_kernels.nf4 import dequantize_into

SHAPES = [(1, 64), (7, 64), (3, 65), (130, 192), (63, 130), (64, 4096)]


def quantized(shape, dtype=torch.float32, **options):
    """Returns a random weight in 4 bits, and what bitsandbytes dequantizes it to."""
    packed, state = bnb.quantize_4bit(torch.randn(shape, dtype=dtype), quant_type="nf4", **options)
    return Frozen.of(packed, state), bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_bitsandbytes_bit_for_bit(shape, nested, dtype, triton_anywhere):
    weight, wanted = quantized(shape, dtype, compress_statistics=nested)
    assert torch.equal(lora_kernels.nf4_dequant(weight, dtype), wanted)
    assert torch.equal(reference.nf4_dequant(weight, dtype), wanted)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_any_block_size_and_code(blocksize, kind, triton_anywhere):
    packed, state = bnb.quantize_4bit(torch.randn(70, 129), quant_type=kind, blocksize=blocksize)
    weight = Frozen.of(packed, state)
    assert torch.equal(lora_kernels.nf4_dequant(weight, torch.float32), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_as_another_dtype_are_the_same_bytes(storage, triton_anywhere):
    packed, state = bnb.quantize_4bit(torch.randn(64, 128), quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    found = lora_kernels.nf4_dequant(Frozen.of(packed, state), torch.float32)
    assert torch.equal(found, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("gap", [0, 16])
def test_rows_may_stand_apart(gap, triton_anywhere):
    weight, wanted = quantized((63, 128))
    buffer = torch.full((63, 128 + gap), float("nan"))
    dequantize_into(buffer[:, :128], weight)
    assert torch.equal(buffer[:, :128], wanted)
    assert buffer[:, 128:].isnan().all()


def test_the_cpu_form_writes_the_same_bits():
    weight, wanted = quantized((63, 130), compress_statistics=True)
    assert torch.equal(lora_kernels.nf4_dequant(weight, torch.float32), wanted)


@pytest.mark.parametrize(("shape", "blocksize"), [((64, 96), 64), ((128, 32), 64), ((5, 192), 128), ((96, 64), 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_form_is_right_where_blocks_cross_rows(shape, blocksize, dtype):
    """On processors with AVX512, bitsandbytes 0.50.2 is not."""
    packed, state = bnb.quantize_4bit(torch.randn(shape), quant_type="nf4", blocksize=blocksize)
    weight = Frozen.of(packed, state)
    assert torch.equal(lora_kernels.nf4_dequant(weight, dtype), reference.nf4_dequant(weight, dtype))


def test_a_dense_weight_is_refused():
    with pytest.raises(ValueError, match="dense already"):
        lora_kernels.nf4_dequant(Frozen.of(torch.ones(2, 2)), torch.float32)


def test_the_operator_keeps_the_rules_of_torch_library(triton_anywhere):
    weight, _ = quantized((7, 64), compress_statistics=True)
    torch.library.opcheck(torch.ops.lora_kernels.nf4_dequant.default, (*weight.flat(), torch.bfloat16))
