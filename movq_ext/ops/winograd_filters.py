"""Winograd's minimal filters as matrices, derived from their points.

F(m, r) computes m outputs of a filter with r taps from m + r - 1 products, where the direct sum takes m * r (Winograd, Arithmetic
Complexity of Computations, 1980; Lavin and Gray, arXiv:1509.09308). Values and taps are seen as polynomials: evaluated at
m + r - 1 points, multiplied point by point, and interpolated. All of these steps but the products are small matrices:

    outputs = OUTPUTS @ ((TAPS @ taps) * (VALUES @ values))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MinimalFilter:
    """F(outputs, taps) as matrices in float64.

    Args:
        taps: number of taps.
        points: of the polynomials, besides infinity. They decide how large the rounding error is.

    Attributes:
        products, taps, outputs: their numbers.
        from_values: ``(products, products)``. As many neighbouring values as products are read.
        from_taps: ``(products, taps)``.
        to_outputs: ``(outputs, products)``.
    """

    def __init__(self, taps: int, points: Sequence[float]) -> None:
        self.products, self.taps, self.outputs = len(points) + 1, taps, len(points) + 2 - taps
        self.from_values = torch.zeros(self.products, self.products, dtype=torch.float64)
        self.from_taps = torch.zeros(self.products, taps, dtype=torch.float64)
        self.to_outputs = torch.zeros(self.outputs, self.products, dtype=torch.float64)
        for row, point in enumerate(points):
            others = [other for other in points if other != point]
            distance = _polynomial(others) @ _powers(point, len(points))  # the product of all point - other
            self.from_values[row, :-1] = _polynomial(others)
            self.from_taps[row] = _powers(point, taps) / distance
            self.to_outputs[:, row] = _powers(point, self.outputs)
        # At infinity a polynomial is its highest coefficient.
        self.from_values[-1] = _polynomial(points)
        self.from_taps[-1, -1] = self.to_outputs[-1, -1] = 1


def _polynomial(zeros: Sequence[float]) -> Tensor:
    """Return the coefficients of the polynomial with these zeros, the constant first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for zero in zeros:
        higher, lower = torch.zeros(2, len(coefficients) + 1, dtype=torch.float64)
        higher[1:], lower[:-1] = coefficients, coefficients
        coefficients = higher - zero * lower
    return coefficients


def _powers(point: float, count: int) -> Tensor:
    return torch.tensor([point**power for power in range(count)], dtype=torch.float64)


class Tile(NamedTuple):
    """A filter of rows followed by a filter of columns, which compute ``rows.outputs * columns.outputs`` pixels."""

    rows: MinimalFilter
    columns: MinimalFilter

    @property
    def products(self) -> int:
        return self.rows.products * self.columns.products

    @property
    def outputs(self) -> int:
        return self.rows.outputs * self.columns.outputs


with torch.device("cpu"):  # also where the default device is another one
    TWO_OUTPUTS = MinimalFilter(3, (0, 1, -1))
    # With the usual points, 0, ±1 and ±2, the rounding error is 1.5 times as large, and twice if both filters have them.
    FOUR_OUTPUTS = MinimalFilter(3, (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2))
TILES = (Tile(FOUR_OUTPUTS, FOUR_OUTPUTS), Tile(FOUR_OUTPUTS, TWO_OUTPUTS))
