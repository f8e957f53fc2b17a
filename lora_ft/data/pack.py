"""Several examples in one row: which ones go together."""

from __future__ import annotations

from collections.abc import Sequence


def fill(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Returns which examples share each row: their indices, so that no row is longer than `budget` tokens.

    The longest example goes first, each into the fullest row that has room for it (best-fit decreasing: at most 11/9
    of the fewest rows possible, and 4 more; Johnson et al. 1974, SIAM J. Comput. 3). An example longer than the budget
    has a row of its own.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit n is set where some row has room for n tokens
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max(budget, length), len(rows)
            rows.append([])
        rows[row].append(i)
        left = room - length
        with_room.setdefault(left, []).append(row)
        rooms |= 1 << left
    return rows
