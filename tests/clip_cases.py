"""Shapes and arguments of spatial norms of clips."""

import torch

# T, H and W of f; t, h and w of zq.
SIZES = [((9, 8, 8), (3, 4, 2)), ((8, 6, 5), (2, 3, 4)), ((1, 4, 4), (1, 2, 2)), ((5, 3, 7), (1, 2, 2)), ((3, 4, 4), (3, 4, 4)),
         ((2, 8, 8), (3, 1, 1)), ((2, 41, 2), (1, 1, 1)), ((2, 22, 2), (2, 13, 1))]  # fmt: skip


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def arguments(f_size=(9, 8, 8), zq_size=(3, 4, 2), dtype=torch.float64, batch=2, channels=6, groups=3):
    maps = draw(batch, channels, *f_size) * 3 + 5, draw(batch, channels, *zq_size), draw(batch, channels, *zq_size) - 1
    return *(x.to(dtype) for x in (*maps, draw(channels), draw(channels) + 1)), groups
