"""The losses of the autoencoder, and the forward pass that they are computed from."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.autoencoder import MOVQ
from .config import TrainingConfig
from .discriminator import Adversary
from .perceptual import PerceptualDistance

NOISE = 0.1  # of the continuous phase, relative to the latents; about as large as the later quantisation error


class StepLosses(NamedTuple):
    """The losses of one step: scalars, on the model's device. None for terms that are not active in this step.

    Args:
        loss: the autoencoder's loss, the weighted sum of mse, codebook, perceptual and adversarial.
        mse: mean squared error of images in [-1, 1].
        codebook: the quantiser's loss.
        perceptual: see PerceptualDistance.
        adversarial: the autoencoder's adversarial loss, see Adversary.
        adversarial_weight: its weight in this step.
        discriminator: the discriminator's hinge loss.
    """

    loss: Tensor
    mse: Tensor
    codebook: Tensor | None = None
    perceptual: Tensor | None = None
    adversarial: Tensor | None = None
    adversarial_weight: Tensor | None = None
    discriminator: Tensor | None = None


class Reconstruction(nn.Module):
    """The autoencoder's training pass as a module, so that DistributedDataParallel wraps it."""

    def __init__(self, model: MOVQ) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, quantized: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return (reconstructions, codebook loss, latents, code indices) of images in [-1, 1]."""
        h = self.model.encode(x)
        if quantized:
            quant, codebook_loss, (_, _, indices) = self.model.quantize(h)
            return self.model.decode(quant), codebook_loss, h.detach(), indices
        # Noise keeps the decoder from relying on exact latents.
        return self.model.decode(h + NOISE * h.detach().std() * torch.randn_like(h)), None, h.detach(), None


def compute_losses(
    x: Tensor,
    decoded: Tensor,
    codebook: Tensor | None,
    config: TrainingConfig,
    perceptual_distance: PerceptualDistance | None,
    adversary: Adversary | None,
    last_layer: Tensor,
) -> StepLosses:
    """Return the losses of reconstructions of x. They share a graph with ``decoded``, except the discriminator's loss.

    ``perceptual_distance`` and ``adversary`` are None if their terms are not active in this step. ``last_layer`` is the weight
    that the adaptive weight compares gradients at.
    """
    mse = F.mse_loss(decoded.float(), x)
    loss, perceptual, adversarial, weight, discriminator = mse, None, None, None, None
    if perceptual_distance is not None:
        perceptual = perceptual_distance(x, decoded)
        loss = loss + config.perceptual_weight * perceptual
    if adversary is not None:
        adversarial = adversary.generator_loss(decoded)
        weight = x.new_full((), config.adversarial_weight)  # new_tensor would copy from the host
        if config.adaptive_weight:
            weight = weight * gradient_ratio(loss, adversarial, last_layer)
        loss = loss + weight * adversarial
        discriminator = adversary.hinge_loss(x, decoded.detach())
    if codebook is not None:
        loss = loss + config.codebook_weight * codebook
    return StepLosses(loss, mse, codebook, perceptual, adversarial, weight, discriminator)


def gradient_ratio(loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Return ``|d loss| / |d adversarial_loss|``, gradients of the last layer's weight (VQGAN, arXiv:2012.09841, equation 7)."""
    norm, adversarial_norm = (
        torch.autograd.grad(value, last_layer, retain_graph=True)[0].norm() for value in (loss, adversarial_loss)
    )
    ratio: Tensor = norm / (adversarial_norm + 1e-4)
    return ratio.clamp(max=1e4).detach()
