"""Fused operations around a frozen, possibly quantized matrix product and its low-rank adapter.

Every operation is a `torch.library` operator with a schema, a shape function for fake tensors and a gradient. On a CUDA
tensor it runs Triton kernels (`lora_kernels.gpu`), on any other its CPU form, in torch with loops that are compiled
where it runs (`lora_kernels.cpu`). `lora_kernels.reference` holds a naive twin of each, which says what the operation
computes.

Imports torch, and triton where there is one; knows nothing of models.
"""

from lora_kernels.attention import packed_attention
from lora_kernels.cross_entropy import linear_cross_entropy
from lora_kernels.dropout import keep_mask, new_seed
from lora_kernels.frozen import Frozen
from lora_kernels.group import Projection, lora_group, stacked
from lora_kernels.linear import lora_linear
from lora_kernels.lora import lora_bwd_up, lora_down
from lora_kernels.nf4 import nf4_dequant
from lora_kernels.norm import rms_norm_lora
from lora_kernels.rope import rope
from lora_kernels.swiglu import swiglu_lora

__all__ = [
    "Frozen",
    "Projection",
    "keep_mask",
    "linear_cross_entropy",
    "lora_bwd_up",
    "lora_down",
    "lora_group",
    "lora_linear",
    "new_seed",
    "nf4_dequant",
    "packed_attention",
    "rms_norm_lora",
    "rope",
    "stacked",
    "swiglu_lora",
]
