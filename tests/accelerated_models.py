"""Models of diffusers with random weights, their outputs, and a count of the operators that compute them."""

import contextlib
from unittest import mock

import pytest
import torch
from tolerances import RELATIVE, relative_error
from torch import nn

from movq_ext.diffusers import attention, norms
from movq_ext.ops import upsampling

diffusers = pytest.importorskip("diffusers")
upsampling.MIN_FOLDED_PIXELS = upsampling.MIN_FOLDED_PIXELS_BFLOAT16 = 1  # small maps, too
SLACK = 10  # a decode is some thirty operators


def randomised(model):
    """Draw the norms' parameters, whose initial ones and zeros would hide mistakes."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def levels(*attends):
    return {
        "down_block_types": [("Attn" if attends_ else "") + "DownEncoderBlock2D" for attends_ in attends],
        "up_block_types": [("Attn" if attends_ else "") + "UpDecoderBlock2D" for attends_ in reversed(attends)],
    }


def vq(**changes):
    torch.manual_seed(0)
    defaults = {"latent_channels": 4, "num_vq_embeddings": 64, "norm_type": "spatial", "block_out_channels": (32, 64)}
    return randomised(diffusers.VQModel(**{**defaults, **levels(False, True), **changes}))


def kl(**changes):
    torch.manual_seed(0)
    defaults = {"sample_size": 16, "block_out_channels": (32, 64)}
    return randomised(diffusers.AutoencoderKL(**{**defaults, **levels(False, False), **changes}))


MODELS = {
    "VQModel, spatial norm": vq,
    "VQModel, group norm": lambda: vq(norm_type="group"),
    "AutoencoderKL of SD": lambda: kl(layers_per_block=2),
    "AutoencoderKL of FLUX": lambda: kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
    "AutoencoderKL without attention": lambda: kl(mid_block_add_attention=False),
}
every_model = pytest.mark.parametrize("name", MODELS)


def latents(model, batch=2, size=(6, 4), dtype=torch.float32):
    channels = model.config.latent_channels
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def decode(model, z):
    return (model.decode(z, force_not_quantize=True) if isinstance(model, diffusers.VQModel) else model.decode(z)).sample


def encode(model, x):
    out = model.encode(x)
    return out.latents if hasattr(out, "latents") else out.latent_dist.mean


def outputs(model, dtype=torch.float32):
    x = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    return decode(model, latents(model, dtype=dtype)), encode(model, x)


def assert_same(actual, expected, slack=SLACK):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < slack * RELATIVE[theirs.dtype]


def assert_equal(actual, expected):
    assert all(map(torch.equal, actual, expected))


class Counted(contextlib.ExitStack):
    """Counts how often the operators of this package run."""

    def __enter__(self):
        self.norms = [self._wrap(module, "fused_spatial_norm") for module in (norms, attention)]
        self.attention = [self._wrap(attention, name) for name in ("attention", "shared_kv_attention")]
        self.upsampling = self._wrap(torch.nn.functional, "conv_transpose2d")
        return super().__enter__()

    def _wrap(self, module, name):
        return self.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))

    @property
    def calls(self):
        """Number of calls of spatial norms, of attention and of upsampling."""
        return *(sum(op.call_count for op in ops) for ops in (self.norms, self.attention)), self.upsampling.call_count
