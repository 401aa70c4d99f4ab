"""Video autoencoders of diffusers with random weights, and their inputs."""

import pytest
import torch
from accelerated_models import diffusers, randomised
from tolerances import assert_close

from movq_ext.diffusers import causal_convolution, replicated_border

# Small frames, too.
causal_convolution.MIN_PIXELS = 1
replicated_border.MIN_PIXELS_FIRST = replicated_border.MIN_PIXELS_LATER = 1


def cogvideox(**changes):
    if not hasattr(diffusers, "AutoencoderKLCogVideoX"):
        pytest.skip("diffusers has no AutoencoderKLCogVideoX")
    torch.manual_seed(0)
    defaults = dict(block_out_channels=(8, 8, 16), down_block_types=("CogVideoXDownBlock3D",) * 3,
                    up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=4, layers_per_block=1,
                    norm_num_groups=4, sample_height=32, sample_width=48)  # fmt: skip
    return randomised(diffusers.AutoencoderKLCogVideoX(**{**defaults, **changes}))


class HeldTensors:
    """Forward hooks that hold a module's inputs and outputs, with copies of what they were."""

    def __init__(self, module):
        self.held = []
        self.handles = [
            module.register_forward_pre_hook(lambda module, args, kwargs: self.hold((args, kwargs)), with_kwargs=True),
            module.register_forward_hook(lambda module, args, out: self.hold(out)),
        ]

    def hold(self, value):
        if isinstance(value, torch.Tensor):
            self.held.append((value, value.clone()))
        elif isinstance(value, (list, tuple, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                self.hold(item)

    def release(self):
        """Remove the hooks, and return how many tensors they held. None may have changed."""
        for handle in self.handles:
            handle.remove()
        assert all(torch.equal(*pair) for pair in self.held)
        return len(self.held)


def assert_hooked_tensors_stay(model, z):
    """Decode once for each part of the decoder with hooks that hold its tensors: none is overwritten, the results stay."""
    expected, held = model.decode(z).sample, 0
    for name, module in model.decoder.named_modules():
        hooks = HeldTensors(module)
        out = model.decode(z).sample
        assert_close(out, expected, slack=10)
        try:
            held += hooks.release()
        except AssertionError:
            raise AssertionError(f"a tensor of {name} was overwritten") from None
    assert held > 0


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


def build(name, **config):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers has no {name}")
    torch.manual_seed(0)
    return randomised(getattr(diffusers, name)(**config))


def hunyuan_video(**changes):
    defaults = dict(block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4)
    return build("AutoencoderKLHunyuanVideo", **{**defaults, **changes})


def magvit(**changes):
    """Its default mode, which normalises every frame alone."""
    blocks = dict(down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D"),
                  up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D"))  # fmt: skip
    defaults = dict(block_out_channels=(32, 32), latent_channels=4, layers_per_block=1)
    return build("AutoencoderKLMagvit", **{**defaults, **blocks, **changes})


def mochi(**changes):
    widths = dict(encoder_block_out_channels=(32, 64), decoder_block_out_channels=(32, 64), layers_per_block=(1, 1, 1),
                  temporal_expansions=(2,), spatial_expansions=(2,), add_attention_block=(False, True, True))  # fmt: skip
    return build("AutoencoderKLMochi", **{**widths, **changes})


def allegro(**changes):
    defaults = dict(block_out_channels=(32,) * 2, layers_per_block=1, temporal_downsample_blocks=(True, False),
                    temporal_upsample_blocks=(False, True), down_block_types=("AllegroDownBlock3D",) * 2,
                    up_block_types=("AllegroUpBlock3D",) * 2)  # fmt: skip
    return build("AutoencoderKLAllegro", **{**defaults, **changes})


def temporal_decoder(**changes):
    defaults = dict(block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1)
    return build("AutoencoderKLTemporalDecoder", **{**defaults, **changes})
