"""The arguments of a spatial norm apart from its feature maps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class NormOptions(NamedTuple):
    """Group norm parameters and the steps fused with the norm.

    Attributes:
        weight, bias: ``(C,)`` affine parameters of the group norm, or None.
        groups: number of groups; divides C.
        eps: added to the variance.
        activation: None or ``"silu"``, applied last.
        f_bias: ``(C,)`` in f's dtype or float32, or None. Added to f first, ``norm(f + f_bias[c])``; the kernels do this in
            float32 without another pass over f. It is the bias of the convolution that computed f. Inference only.
        bordered: zq_y and zq_b are ``(B, C, 3h, 3w)`` for ``h x w`` cells, each covering at least 2x2 pixels of f. A cell's three
            rows (and columns) hold the values for its first row of pixels, its inner rows and its last row. This is how
            `convolve_cells` represents a latent that was convolved 3x3 after its resize. Inference only.
        statistics: ``(B, groups, parts, 4)`` in float32, or None: the mean, the sum of squared distances from it, the number of
            values and 0 for each part of a group of f, as `add_bias_residual_with_statistics_` returns them. The kernels then
            read f once. The native path does not use them. Not with f_bias. Inference only.
        split_first_frame: for clips, see `spatial_norm`.
    """

    weight: Tensor | None
    bias: Tensor | None
    groups: int
    eps: float = 1e-6
    activation: str | None = None
    f_bias: Tensor | None = None
    bordered: bool = False
    split_first_frame: bool = False
    statistics: Tensor | None = None

    @classmethod
    def from_layer(
        cls,
        norm: nn.GroupNorm,
        activation: str | None = None,
        f_bias: Tensor | None = None,
        bordered: bool = False,
        split_first_frame: bool = False,
        statistics: Tensor | None = None,
    ) -> NormOptions:
        """Return the parameters of a group norm layer, with the steps to fuse."""
        parameters = norm.weight, norm.bias, norm.num_groups, norm.eps
        return cls(*parameters, activation, f_bias, bordered, split_first_frame, statistics)
