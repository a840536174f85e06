"""Pictures of one batch as one picture."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

GRID_GAP_PX: Final = 4


def grid_columns(count: int, height: int, width: int) -> int:
    """How many pictures of a batch stand in a row of its sheet."""
    return min(max(1, math.ceil(math.sqrt(count * height / width))), count)


def grid(pictures: Tensor) -> Tensor:
    """A batch as one picture: (N,3,H,W) -> (3,H',W'), row by row, as near a square as N allows; black gaps of 4 px."""
    count, _, height, width = pictures.shape
    columns = grid_columns(count, height, width)
    rows = math.ceil(count / columns)
    sheet = pictures.new_zeros(
        3, rows * height + (rows - 1) * GRID_GAP_PX, columns * width + (columns - 1) * GRID_GAP_PX
    )
    for place in range(count):
        row, column = divmod(place, columns)
        top, left = row * (height + GRID_GAP_PX), column * (width + GRID_GAP_PX)
        sheet[:, top : top + height, left : left + width] = pictures[place]
    return sheet
