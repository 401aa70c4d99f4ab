"""The patch discriminator, its hinge loss, and the adversarial loss of the autoencoder."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .config import OptionError, TrainingConfig

MAX_CHANNEL_FACTOR = 8  # channels stop doubling at this multiple of the first convolution's


class PatchDiscriminator(nn.Module):
    """Score overlapping patches of an image as real or decoded (PatchGAN, Isola et al., arXiv:1611.07004).

    Args:
        in_channels: channels of the image.
        channels: channels of the first convolution. They double with every further one, up to 8 times.
        layers: strided convolutions. Three give a receptive field of 70x70 pixels, two of 34x34.
    """

    def __init__(self, in_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, MAX_CHANNEL_FACTOR) for layer in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            modules += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[layer], track_running_stats=False),  # it only ever runs in training
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @staticmethod
    def min_size(layers: int) -> int:
        """Return the height and width in pixels of the smallest image that has a score."""
        # The map is scaled down 2**layers times. Each of the last two convolutions shrinks it by one pixel in height and width.
        return 3 << layers

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to scores ``(B, 1, h, w)``: the higher, the more real."""
        return cast(Tensor, self.layers(x))


class HingeLoss(nn.Module):
    """The discriminator's loss as a module, so that DistributedDataParallel wraps its forward pass."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, decoded: Tensor) -> Tensor:
        """Return the hinge loss, a scalar: real images should score at least 1, decoded ones at most -1."""
        real_loss = F.relu(1 - self.discriminator(real).float()).mean()
        decoded_loss = F.relu(1 + self.discriminator(decoded).float()).mean()
        return (real_loss + decoded_loss) / 2


class Adversary:
    """The discriminator of a training run, with its optimiser.

    Every process creates one. DDP averages its gradients.

    Raises:
        OptionError: crops are too small for the discriminator.
    """

    def __init__(self, config: TrainingConfig, in_channels: int, device: torch.device, distributed: bool) -> None:
        layers, min_crop = config.discriminator_layers, PatchDiscriminator.min_size(config.discriminator_layers)
        if config.crop < min_crop:
            raise OptionError("crop", f"must be at least {min_crop} for a discriminator of {layers} layers, got {config.crop}")
        self.discriminator = PatchDiscriminator(in_channels, config.discriminator_channels, layers).to(device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=config.learning_rate, betas=(0.5, 0.9))
        self.hinge_loss: nn.Module = HingeLoss(self.discriminator)
        if distributed:
            self.hinge_loss = nn.parallel.DistributedDataParallel(self.hinge_loss)

    def generator_loss(self, decoded: Tensor) -> Tensor:
        """Return the autoencoder's adversarial loss, a scalar. Its gradient reaches the images, not the discriminator."""
        weights = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        scores: Tensor = functional_call(self.discriminator, weights, (decoded,))
        return -scores.float().mean()

    def state_dict(self) -> dict[str, Any]:
        """Return the discriminator's weights and its optimiser's state."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
