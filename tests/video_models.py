"""Video autoencoders of diffusers with random weights, and their inputs."""

import pytest
import torch
from accelerated_models import diffusers, randomised

from movq_ext.diffusers import causal_convolution

causal_convolution.MIN_PIXELS = 1  # small frames, too


def cogvideox(**changes):
    if not hasattr(diffusers, "AutoencoderKLCogVideoX"):
        pytest.skip("diffusers has no AutoencoderKLCogVideoX")
    torch.manual_seed(0)
    defaults = dict(block_out_channels=(8, 8, 16), down_block_types=("CogVideoXDownBlock3D",) * 3,
                    up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=4, layers_per_block=1,
                    norm_num_groups=4, sample_height=32, sample_width=48)  # fmt: skip
    return randomised(diffusers.AutoencoderKLCogVideoX(**{**defaults, **changes}))


def draw(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def latent(frames, size=(3, 2), batch=1, channels=4, dtype=torch.float32):
    return draw(batch, channels, frames, *size, dtype=dtype)


def video(frames, size=(12, 8), batch=1, dtype=torch.float32):
    return draw(batch, 3, frames, *size, dtype=dtype)


def kvae_video(**changes):
    if not hasattr(diffusers, "AutoencoderKLKVAEVideo"):
        pytest.skip("diffusers has no AutoencoderKLKVAEVideo")
    torch.manual_seed(0)
    defaults = dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4)
    return randomised(diffusers.AutoencoderKLKVAEVideo(**{**defaults, **changes}))


def kandinsky6(**changes):
    if not hasattr(diffusers, "Kandinsky6SRVAE"):
        pytest.skip("diffusers has no Kandinsky6SRVAE")
    torch.manual_seed(0)
    widths = dict(encoder_block_out_channels=(4, 8, 8), decoder_block_out_channels=(4, 8, 8))
    return randomised(diffusers.Kandinsky6SRVAE(**{**dict(latent_channels=4, layers_per_block=1, **widths), **changes}))
