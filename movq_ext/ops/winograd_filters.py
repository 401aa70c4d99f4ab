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

    def taps_matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix from the taps of a weight, ``rows.taps * columns.taps``, to its factors, one for each product."""
        return torch.kron(self.rows.from_taps, self.columns.from_taps).to(dtype)

    def row_transforms(self, dtype: torch.dtype, has_bias: bool) -> tuple[Tensor, Tensor]:
        """Return the matrices from rows and to rows. A bias is like one more product of each row."""
        to_rows = self.rows.to_outputs
        if has_bias:
            to_rows = torch.cat([to_rows, torch.ones_like(to_rows[:, :1])], 1)
        return self.rows.from_values.to(dtype), to_rows.to(dtype)


class ColumnTransforms:
    """``TILE.columns.from_values @ values`` and ``TILE.columns.to_outputs @ products``, for one product of rows after another.

    Most entries are 0, the others 1 or -1: additions take half the time of a matrix product. Views are taken once for all: a
    view costs as much as adding a thousand values, and other threads wait for the interpreter's lock meanwhile.

    Args:
        values: ``(rows.products, 4, ...)``.
        factors: memory for the factors, ``(4, ...)``.
        products: memory for the products, ``(4, ...)``.
        sums: ``(rows.products, 2, ...)``.
    """

    def __init__(self, values: Tensor, factors: Tensor, products: Tensor, sums: Tensor) -> None:
        self._values = [values[:, part].unbind() for part in (slice(2), slice(2, 4), slice(1, 2), slice(2, 3))]
        self._outer_factors, self._inner_factors = factors[::3], factors[1:3]
        self._outer_products, self._second, self._third = products[::3], products[1:2], products[2:3]
        self._sums = sums.unbind()
        self._signs = values.new_tensor((1, -1)).view(2, *[1] * (values.dim() - 2))

    def write_factors(self, row: int) -> None:
        """Write the factors of this product of rows."""
        before, after, second, third = (views[row] for views in self._values)
        torch.sub(after, before, out=self._outer_factors)
        torch.addcmul(third, second, self._signs, out=self._inner_factors)

    def write_sums(self, row: int) -> None:
        """Write the sums of the products, of this product of rows."""
        out = self._sums[row]
        torch.add(self._outer_products, self._second, out=out)
        torch.addcmul(out, self._third, self._signs, out=out)


def as_matrix(values: Tensor) -> Tensor:
    """Return a view whose rows are the first dimension."""
    return values.view(len(values), -1)


with torch.device("cpu"):  # also where the default device is another one
    # With the usual points of F(4, 3), 0, ±1 and ±2, the rounding error is 1.5 times as large.
    TILE = Tile(rows=MinimalFilter(3, (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)), columns=MinimalFilter(3, (0, 1, -1)))

# The fewest input channels from which a convolution in these tiles is as exact as oneDNN's direct one. Errors against float64 and
# CPU times in units of the direct one's, for as many outputs, inputs SiLU(normal), three seeds, on an AMD EPYC with AVX-512:
#
#   input channels     32    64    96   128   192   256   384   512
#   error, 4x2       1.11  1.01  0.97  0.96  0.93  0.67  0.66  0.63
#   error, 4x3       1.88  1.69  1.62  1.60  1.55  1.13  1.10  1.04
#   error, 4x4       1.89  1.71  1.65  1.61  1.57  1.14  1.11  1.06
#   time, 4x2              0.93  0.77  0.69  0.64  0.59  0.52  0.53
#   time, 4x3              0.86  0.68  0.64  0.55  0.53  0.47  0.49
#   time, 4x4              0.88  0.68  0.62  0.53  0.51  0.46  0.47
#
# So larger tiles are faster, but less exact for any number of channels; 3x3, 5x2 and 6x2 pixels as well.
MIN_CHANNELS = 96
