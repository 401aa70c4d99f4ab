"""``movq-ext info``."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from .. import build_info, explain
from ..io.codes import codebook_fingerprint
from ..model.fusion import SHARED_KV_DTYPES
from .common import add_model, load_model

TOKENS = 4096  # of a 512x512 image, by which attention chooses its backend
SUMMARY = "Print versions, the build, the path that runs on the device, and the model's config, as JSON."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    report: dict[str, Any] = build_info()
    report["path"] = explain(torch.empty(0, device=args.device))
    model = load_model(args)
    channels, dtype = model.decoder.conv_in.out_channels, model.quant_conv.weight.dtype
    operator = "shared_kv_attention" if dtype in SHARED_KV_DTYPES else "attention"  # as in AttnBlock
    tokens = torch.empty(1, 1, 1, channels, dtype=dtype, device=args.device).expand(-1, -1, TOKENS, -1)
    report["attention"] = explain(tokens, operator)
    report["model"] = {
        "path": str(args.model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "downsampling": model.downsampling,
        "codebook": codebook_fingerprint(model),
        **model.config,
    }
    print(json.dumps(report, indent=2, default=str))
    return 0
