"""The whole MoVQ model: encoder, codebook and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .checks import check_channels, check_count, check_latent
from .decoder import MOVQDecoder
from .encoder import Encoder
from .fusion import plain_weight
from .quantize import VectorQuantizer, check_indices
from .tiled import decode_tiled, encode_tiled
from .value_checks import can_read_values, is_finite, runs_training_step


class MOVQ(nn.Module):
    """MoVQ autoencoder (Zheng et al., arXiv:2209.09002), with the module names of the released checkpoints.

    Methods raise ValueError or TypeError naming the argument, as the encoder's and the decoder's do. `encode` and
    `encode_code` raise FloatingPointError if the encoder overflows.

    Args:
        ddconfig: keyword arguments of MOVQDecoder and Encoder, as in the released configs.
        n_embed: number of codes; 0 for a model without a codebook (Kandinsky 3), which encodes to latents and decodes them.
        embed_dim: channels of a code, and therefore of the decoder's zq.
        beta, remap, sane_index_shape, legacy: see `VectorQuantizer`.

    Raises:
        ValueError: an argument is out of range, here or in ddconfig. The message names it.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        beta: float = 0.25,
        remap: str | PathLike[str] | np.ndarray | None = None,
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(ddconfig, Mapping):
            raise ValueError(f"ddconfig must be a mapping of arguments, got {ddconfig!r}")
        ddconfig = dict(ddconfig)
        if ddconfig.get("double_z") is True:
            raise ValueError("double_z must be False for a MOVQ, whose latents have no variance, got True")
        check_count("n_embed", n_embed)
        check_channels(embed_dim=embed_dim)
        self.config = {
            "ddconfig": ddconfig, "n_embed": n_embed, "embed_dim": embed_dim,
            "beta": beta, "sane_index_shape": sane_index_shape, "legacy": legacy,
        }  # fmt: skip
        self.encoder = Encoder(**ddconfig)
        self.decoder = MOVQDecoder(**{**ddconfig, "zq_ch": embed_dim})
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta, remap, sane_index_shape=sane_index_shape, legacy=legacy)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, along one side."""
        return 1 << (self.decoder.num_resolutions - 1)

    def gradient_checkpointing_enable(self) -> None:
        """Train in less memory, see ActivationCheckpointing."""
        self.encoder.gradient_checkpointing_enable()
        self.decoder.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """Keep every intermediate map for the backward pass. This is the default."""
        self.encoder.gradient_checkpointing_disable()
        self.decoder.gradient_checkpointing_disable()

    def encode(self, x: Tensor, max_memory: int | None = None) -> Tensor:
        """Encode images ``(B, in_channels, H, W)`` in [-1, 1] to latents ``(B, embed_dim, h, w)`` before quantisation.

        max_memory limits working memory, in bytes; no gradients are recorded then. See `encode_tiled`.

        NaN and infinity in the latents are an error, except where the check would make a training step wait for the GPU (training
        mode, gradients enabled), and in compiled, exported and captured programs.

        Raises ValueError (rank, channels, device, too small, not finite, max_memory too small) or TypeError (dtype) naming the
        argument, and FloatingPointError if the latents of a finite x are not finite.
        """
        if max_memory is None:
            h = cast(Tensor, self.quant_conv(self.encoder(x)))
        else:
            with torch.no_grad():
                h = self.quant_conv(encode_tiled(self.encoder, x, max_memory=max_memory))
        if not runs_training_step(self) and can_read_values(h) and not is_finite(h):
            if not is_finite(x):
                raise ValueError("x must be finite, got NaN or infinity")
            advice = ": float16 overflows beyond 65504, use bfloat16 or float32" if h.dtype == torch.float16 else ""
            raise FloatingPointError(f"the encoder computed NaN or infinity in {h.dtype}{advice}")
        return h

    @torch.no_grad()
    def encode_code(self, x: Tensor, max_memory: int | None = None) -> Tensor:
        """Encode images ``(B, in_channels, H, W)`` in [-1, 1] to code indices ``(B, h, w)`` int64, without gradients.

        max_memory limits the bytes of working memory: see `encode_tiled`.

        Raises what `encode` raises. A compiled, exported or captured program does not: where a latent is not finite, its code is
        -1, which `decode_code` refuses.
        """
        h = self.encode(x, max_memory)
        return cast(Tensor, self.quantize(h)[2][2]).view(h.shape[0], *h.shape[2:])

    def decode(self, quant: Tensor, max_memory: int | None = None) -> Tensor:
        """Decode quantised latents ``(B, embed_dim, h, w)`` to images roughly in [-1, 1].

        Returns ``(B, out_ch, h * downsampling, w * downsampling)``. max_memory limits the bytes of working memory, without
        gradients: see `decode_tiled`.

        Raises ValueError (rank, channels, device, empty, max_memory too small) or TypeError (dtype) naming the argument.
        """
        check_latent("quant", quant, self.quantize.e_dim, plain_weight(self.post_quant_conv))
        z = self.post_quant_conv(quant)
        return self.decoder(z, quant) if max_memory is None else decode_tiled(self.decoder, z, quant, max_memory=max_memory)

    def decode_code(self, indices: Tensor) -> Tensor:
        """Decode code indices ``(B, h, w)``, integers of any dtype and any grid, to images roughly in [-1, 1].

        Returns ``(B, out_ch, h * downsampling, w * downsampling)``.

        Raises ValueError for another rank or device, or an index outside the codebook, and TypeError for indices that are not a
        tensor of integers.
        """
        check_indices(indices, plain_weight(self.quantize.embedding))
        if indices.dim() != 3 or 0 in indices.shape:
            raise ValueError(f"indices must have shape (batch, height, width) and not be empty, got {tuple(indices.shape)}")
        return self.decode(self.quantize.get_codebook_entry(indices, (*indices.shape, self.quantize.e_dim)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images ``(B, in_channels, H, W)`` in [-1, 1].

        Returns the reconstructions, whose sides are multiples of `downsampling`, and the quantiser's loss.
        """
        quant, loss, _ = self.quantize(self.encode(x))
        return self.decode(quant), loss
