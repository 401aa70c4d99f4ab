"""Activation checkpointing: a layer's intermediate maps are computed again in the backward pass instead of being kept for it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ActivationCheckpointing(nn.Module):
    """A network that can run its layers checkpointed (Chen et al., arXiv:1604.06174).

    Only in training and where gradients are recorded. Gradients are the same, dropout included, for one more forward pass of
    every layer; what is kept is each layer's input. Hooks inside a layer run in the second pass too.
    """

    gradient_checkpointing: bool = False

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the inputs of layers for the backward pass."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep every intermediate map for the backward pass, which is the default."""
        self.gradient_checkpointing = False

    def _run(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, *args, use_reentrant=False, **kwargs))
        return cast(Tensor, layer(*args, **kwargs))
