"""The encoder against the published one."""

import published
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from movq_ext import Encoder

TINY = dict(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=16, z_channels=4)


def published_encode(encoder, x):
    """Run the published encoder's forward in plain tensor arithmetic, on the entries of state_dict()."""
    state = encoder.state_dict()

    def conv(name, h, padding=1, stride=1):
        return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    def norm(name, h):
        return published.group_norm(h, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def block(name, x):
        h = conv(f"{name}.conv1", published.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", published.silu(norm(f"{name}.norm2", h)))
        return (conv(f"{name}.nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in state else x) + h

    def attn(name, x):
        n = norm(f"{name}.norm", x)
        return x + conv(f"{name}.proj_out", published.attention(*(conv(f"{name}.{p}", n, 0) for p in "qkv")), 0)

    h = conv("conv_in", x)
    for level in range(3):
        h = block(f"down.{level}.block.0", h)
        if level == 1:  # 16 / 2 is in attn_resolutions
            h = attn(f"down.{level}.attn.0", h)
        if level < 2:
            h = conv(f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), 0, 2)
    h = block("mid.block_2", attn("mid.attn_1", block("mid.block_1", h)))
    return conv("conv_out", published.silu(norm("norm_out", h)))


def make_encoder(**changes):
    torch.manual_seed(0)
    return Encoder(**{**TINY, **changes}).double()


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (13, 7)])
def test_encoder_is_the_published_one(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    out = make_encoder()(x)
    assert_close(out, published_encode(make_encoder(), x), slack=10)
    assert out.shape == (2, 4, size[0] // 4, size[1] // 4)


def test_double_z_and_resampling_without_convolution():
    assert make_encoder(double_z=True)(torch.zeros(1, 3, 8, 8, dtype=torch.float64)).shape == (1, 8, 2, 2)
    assert not any("downsample" in name for name in make_encoder(resamp_with_conv=False).state_dict())


def test_gradcheck():
    encoder = make_encoder(ch_mult=(1,), attn_resolutions=[])
    assert torch.autograd.gradcheck(encoder, torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True))


X = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
BAD = {
    "channels": (ValueError, r"x must have shape \(batch, 3, height, width\), got \(1, 2, 8, 8\)", X[:, :2]),
    "rank": (ValueError, r"x must have shape \(batch, 3, height, width\), got \(3, 8, 8\)", X[0]),
    "empty": (ValueError, "x must not be empty", X[:0]),
    "small": (ValueError, r"x must be at least 4 x 4 \(height x width\), got 3 x 8", X[:, :, :3]),
    "dtype": (TypeError, "x must have the model's dtype torch.float64, got torch.float32", X.float()),
}


@pytest.mark.parametrize("case", BAD)
def test_encoder_refuses(case):
    error, message, x = BAD[case]
    with pytest.raises(error, match=message):
        make_encoder()(x)
