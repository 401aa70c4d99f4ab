"""Spatial norms of clips: shapes, arguments, and the published formula."""

import published
import torch

# T, H and W of f; t, h and w of zq.
SIZES = [((9, 8, 8), (3, 4, 2)), ((8, 6, 5), (2, 3, 4)), ((1, 4, 4), (1, 2, 2)), ((5, 3, 7), (1, 2, 2)), ((3, 4, 4), (3, 4, 4)),
         ((2, 8, 8), (3, 1, 1)), ((2, 41, 2), (1, 1, 1)), ((2, 22, 2), (2, 13, 1))]  # fmt: skip


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def arguments(f_size=(9, 8, 8), zq_size=(3, 4, 2), dtype=torch.float64, batch=2, channels=6, groups=3):
    maps = draw(batch, channels, *f_size) * 3 + 5, draw(batch, channels, *zq_size), draw(batch, channels, *zq_size) - 1
    return *(x.to(dtype) for x in (*maps, draw(channels), draw(channels) + 1)), groups


def source_frames(t, frames, split_first_frame):
    """The latent's frame for each frame of a clip, as the models say it."""
    if split_first_frame and t > 1 and frames > 1:
        return torch.cat([torch.tensor([0]), 1 + published.nearest_index(frames - 1, t - 1)])
    return published.nearest_index(frames, t)


def formula(f, zq_y, zq_b, weight, bias, groups, eps=1e-6, activation=None, split_first_frame=False):
    """`published.spatial_norm` of the frames, with statistics of all of them."""
    frames = source_frames(zq_y.shape[2], f.shape[2], split_first_frame)
    y, b = (torch.stack([published.resize(zq[:, :, t], *f.shape[3:]) for t in frames], dim=2) for zq in (zq_y, zq_b))
    norm = published.group_norm(f.flatten(2, 3), groups, weight, bias, eps).view(f.shape)
    return published.silu(norm * y + b) if activation == "silu" else norm * y + b
