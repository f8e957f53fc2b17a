"""Fused operations around a frozen, possibly quantized matrix product and its low-rank adapter.

Every operation is a `torch.library` operator with a schema, a shape function for fake tensors and a gradient. On a CUDA
tensor it runs Triton kernels (`lora_kernels.gpu`), on any other its CPU form. `lora_kernels.reference` holds a naive
twin of each, which says what the operation computes.

Imports torch, and triton where there is one; knows nothing of models.
"""

from lora_kernels.frozen import Frozen
from lora_kernels.nf4 import nf4_dequant

__all__ = ["Frozen", "nf4_dequant"]
