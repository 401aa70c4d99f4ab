"""The perceptual loss: a distance between VGG16's features of two images, with user-supplied weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.checkpoint_files import read_tensors
from ..io.tensor_files import CheckpointError, format_names

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # of VGG16's convolutions, by resolution
MIN_SIZE = 1 << (len(WIDTHS) - 1)  # pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # VGG16's input is normalised by them
EPSILON = 1e-10
# Names in torchvision's VGG16 or its features alone, and in LPIPS or a training checkpoint that contains it.
FEATURE_NAME = re.compile(r"(?:^|(?:^|\.)(?:features|slice\d)\.)(\d+)\.(weight|bias)$")
LINEAR_NAME = re.compile(r"(?:^|\.)lin(\d)\.model\.\d\.weight$")


class PerceptualDistance(nn.Module):
    """LPIPS with VGG16 (Zhang et al., arXiv:1801.03924): the squared distance of normalised features at five resolutions.

    LPIPS's linear layers weight the feature channels; without them all channels have equal weight.

    Args:
        files: safetensors or torch.save files that together hold VGG16's convolutions and, optionally, LPIPS's linear weights.
            Other entries are ignored.

    Raises:
        OSError: a file cannot be read.
        CheckpointError: a file is damaged, or the files lack convolutions or have some of another shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, files: Sequence[str | Path]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_block(block) for block in range(len(WIDTHS)))
        self.channel_weights = nn.ParameterList(torch.ones(widths[-1]) for widths in WIDTHS)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        features, linear = _read(files)
        source = " and ".join(map(str, files))
        layers = [layer for block in self.blocks for layer in cast(nn.Sequential, block)]  # numbered as in torchvision
        parameters = {f"{i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.named_parameters()}
        _assign(parameters, features, f"{source}: expected the weights of VGG16's convolutions")
        if linear:
            _assign(dict(self.channel_weights.named_parameters()), linear, f"{source}: expected LPIPS's linear weights for VGG16")
        self.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """Return a hash of the weights."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean distance of images ``(B, 3, H, W)`` in [-1, 1], a scalar."""
        distance = x.new_zeros((), dtype=torch.float32)
        for a, b, weights in zip(self._features(x), self._features(y), self.channel_weights, strict=True):
            difference = F.normalize(a.float(), dim=1, eps=EPSILON) - F.normalize(b.float(), dim=1, eps=EPSILON)
            distance = distance + (difference.square() * weights.view(-1, 1, 1)).sum(1).mean()
        return distance

    def _features(self, x: Tensor) -> list[Tensor]:
        x = ((x + 1) / 2 - self.mean) / self.std
        features: list[Tensor] = []
        for block in self.blocks:
            x = cast(Tensor, block(x))
            features.append(x)
        return features


def _block(index: int) -> nn.Sequential:
    """Return the layers at one resolution, after the pooling that leads to it."""
    inputs = WIDTHS[index - 1][-1] if index else 3
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
    for before, after in pairwise((inputs, *WIDTHS[index])):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _read(files: Sequence[str | Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (VGG16's convolutions by torchvision's names, LPIPS's linear weights by the index of their block)."""
    features: dict[str, Tensor] = {}
    linear: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(Path(file)).items():
            if match := FEATURE_NAME.search(name):
                features[f"{match[1]}.{match[2]}"] = tensor
            elif match := LINEAR_NAME.search(name):
                linear[match[1]] = tensor.flatten()
    return features, linear


@torch.no_grad()
def _assign(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], expected: str) -> None:
    """Copy tensors to the parameters of the same names. Raises CheckpointError if one is missing or has another shape."""
    if wrong := [name for name, value in parameters.items() if name not in tensors or tensors[name].shape != value.shape]:
        raise CheckpointError(f"{expected}; missing or of another shape: {format_names(wrong)}")
    for name, value in parameters.items():
        value.copy_(tensors[name])
