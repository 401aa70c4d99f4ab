"""Activation checkpointing: recompute a layer's intermediate maps in the backward pass instead of keeping them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ActivationCheckpointing(nn.Module):
    """A network that can checkpoint its layers (Chen et al., arXiv:1604.06174).

    Checkpointing keeps only each layer's input and costs one more forward pass of every layer. Gradients are the same, dropout
    included. It applies in training, where gradients are recorded. Hooks inside a layer run in the second pass too.
    """

    gradient_checkpointing: bool = False

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the layers' inputs for the backward pass."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep every intermediate map for the backward pass. This is the default."""
        self.gradient_checkpointing = False

    def _run_layer(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Call the layer, checkpointed if that is enabled and gradients are recorded."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, *args, use_reentrant=False, **kwargs))
        return cast(Tensor, layer(*args, **kwargs))
