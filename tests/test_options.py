"""The arguments of a spatial norm apart from its maps."""

import pytest
import torch
from torch import nn

from movq_ext.ops.options import NormOptions


def test_the_options_of_a_layer_are_its_own():
    layer, f_bias = nn.GroupNorm(2, 6, eps=0.5), torch.zeros(6)
    options = NormOptions.from_layer(layer, "silu", f_bias, bordered=True, split_first_frame=True, statistics=f_bias)
    assert options.weight is layer.weight and options.bias is layer.bias and options.f_bias is f_bias
    assert (options.groups, options.eps, options.activation, options.bordered) == (2, 0.5, "silu", True)
    assert options.split_first_frame and options.statistics is f_bias
    plain = NormOptions.from_layer(nn.GroupNorm(2, 6, affine=False))
    assert plain == (None, None, 2, 1e-5, None, None, False, False, None)


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        NormOptions(None, None, 2).groups = 3
