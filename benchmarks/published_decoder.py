"""The published decoder: our parameters, the published formulas, and PyTorch's operators in eager mode."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

import movq_ext
from movq_ext import AttnBlock, MOVQDecoder, SpatialNorm, Upsample


class PublishedNorm(SpatialNorm):
    def forward(self, f: Tensor, zq: Tensor, activation: str | None = None) -> Tensor:
        zq = F.interpolate(zq, size=f.shape[2:], mode="nearest")
        if self.add_conv:
            zq = self.conv(zq)
        norm = self.norm_layer
        out = F.group_norm(f, norm.num_groups, norm.weight, norm.bias, norm.eps) * self.conv_y(zq) + self.conv_b(zq)
        return out * torch.sigmoid(out) if activation == "silu" else out


class PublishedAttention(AttnBlock):
    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        n = self.norm(x, zq)
        batch, channels, height, width = n.shape
        q, k, v = (layer(n).reshape(batch, channels, height * width) for layer in (self.q, self.k, self.v))
        weights = (torch.bmm(q.permute(0, 2, 1), k) * channels**-0.5).softmax(dim=2)
        return x + self.proj_out(torch.bmm(v, weights.permute(0, 2, 1)).reshape(n.shape))


class PublishedResnetBlock(movq_ext.ResnetBlock):
    def forward(self, x: Tensor, temb: Tensor | None = None, zq: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x, zq, activation="silu"))
        h = self.conv2(self.dropout(self.norm2(h, zq, activation="silu")))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class PublishedUpsample(Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


CLASSES = {
    SpatialNorm: PublishedNorm,
    AttnBlock: PublishedAttention,
    movq_ext.ResnetBlock: PublishedResnetBlock,
    Upsample: PublishedUpsample,
}


class PublishedDecoder(MOVQDecoder):
    def forward(self, z: Tensor, zq: Tensor) -> Tensor:
        h = self.conv_in(z)
        for _, layer, is_conditioned in self.steps():
            h = layer(h, zq=zq) if is_conditioned else layer(h)
        return self.conv_out(self.norm_out(h, zq, activation="silu"))


def published(decoder: MOVQDecoder) -> MOVQDecoder:
    """Return a copy of the decoder that computes everything by the published formulas."""
    decoder = copy.deepcopy(decoder)
    for module in decoder.modules():
        module.__class__ = CLASSES.get(type(module), type(module))
    decoder.__class__ = PublishedDecoder
    return decoder
