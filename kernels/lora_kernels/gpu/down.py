"""The down projection inside a kernel that walks along rows and has them at hand, a tile at a time."""

import triton
import triton.language as tl


@triton.jit
def add_down(b_sum, b_x, p_a, first_rank, first_column, columns, stride_a, RANK: tl.constexpr):
    """Returns b_sum + x @ a.T for a tile of x: [SLICES, ROWS, RANKS], which the caller sums over slices in the end.

    Each warp contracts a slice of the columns. In a plain product of 16 rows every warp holds all of x, and the
    compiler has each of them compute it.
    """
    SLICES: tl.constexpr = b_sum.shape[0]
    ROWS: tl.constexpr = b_x.shape[0]
    SLICE: tl.constexpr = b_x.shape[1] // SLICES
    o_rank = first_rank + tl.arange(0, b_sum.shape[2])[None, None, :]
    o_slice = tl.arange(0, SLICES)[:, None, None] * SLICE
    o_column = first_column + o_slice + tl.arange(0, SLICE)[None, :, None]
    m_a = (o_rank < RANK) & (o_column < columns)
    b_a = tl.load(p_a + o_rank * stride_a + o_column, mask=m_a, other=0.0)
    b_x = tl.permute(tl.reshape(b_x, (ROWS, SLICES, SLICE)), (1, 0, 2))
    return tl.dot(b_x, b_a, b_sum, input_precision="ieee")
