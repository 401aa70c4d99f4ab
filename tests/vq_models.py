"""diffusers' VQModel in small sizes. Without diffusers, the tests that import this are skipped."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

LIMIT = 1e-5


def vq_model(widths=(32, 64), attention=(False, True), layers=1, **changes):
    torch.manual_seed(0)
    model = diffusers.VQModel(**{
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "num_vq_embeddings": 64, "vq_embed_dim": 4,
        "block_out_channels": widths, "layers_per_block": layers, "norm_type": "spatial", "norm_num_groups": 32,
        "down_block_types": [("Attn" if attends else "") + "DownEncoderBlock2D" for attends in attention],
        "up_block_types": [("Attn" if attends else "") + "UpDecoderBlock2D" for attends in reversed(attention)],
        **changes,
    })  # fmt: skip
    for name, parameter in model.named_parameters():  # the norms start at one and zero, which hides mistakes
        if "norm" in name and parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()
