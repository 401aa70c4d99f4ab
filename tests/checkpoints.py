"""A small MOVQ with a value in every parameter, for the tests of weight files."""

import torch

from movq_ext import MOVQ

DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[128], in_channels=3, resolution=256,
                z_channels=4, double_z=False)  # fmt: skip
CODES = torch.arange(12).view(1, 3, 4)


def make_movq(seed=0, n_embed=16, embed_dim=5, **changes):
    torch.manual_seed(seed)
    model = MOVQ({**DDCONFIG, **changes}, n_embed, embed_dim)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
