"""The Triton kernels, a file for each operation: the kernel, then the function that launches it.

In the kernels `p_` is a pointer, `o_` an offset, `m_` a mask and `b_` a value held by a block of threads.
"""
