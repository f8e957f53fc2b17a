"""The cases of `test_bounds` in this very process, which dies of SIGSEGV with the first that reaches out of bounds.

pytest does not collect this by itself; `mutate` names it, whose processes are forked and cheap.
"""

import pytest

from tests.kernel_ops import guard, test_bounds


@pytest.mark.parametrize("side", test_bounds.SIDES)
@pytest.mark.parametrize("case", test_bounds.IN_BOUNDS)
def test_in_bounds(case, side, triton_anywhere):
    with guard.fenced_launches(side):
        test_bounds.IN_BOUNDS[case]()


@pytest.mark.parametrize("case", test_bounds.FAR_OUT)
def test_far_out(case, triton_anywhere):
    with guard.last_program_only():
        test_bounds.FAR_OUT[case]()
