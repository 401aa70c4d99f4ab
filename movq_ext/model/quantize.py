"""Vector quantisation: map latents to the indices of their nearest codes, and back."""

from __future__ import annotations

from os import PathLike

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.native import traces_plain_operators
from .checks import MAX_NUMBER, check_channels, check_count, check_flags, check_number
from .fusion import plain_weight
from .value_checks import can_read_values, is_finite, runs_training_step

INTEGER_DTYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip
MAX_DISTANCE_BYTES = 64 << 20  # limit for the distances that the nearest-code search holds at once


@torch.library.custom_op("movq_ext::nearest_code", mutates_args=())
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the codebook row nearest to each vector: ``(n, d), (codes, d) -> (n,)`` int64.

    Distances are Euclidean, in float32 or better, computed in chunks of at most 64 MiB. The first of equally near codes wins. The
    index is -1 where the smallest distance is NaN or infinite.
    """
    codebook = codebook.to(_precision(vectors, codebook))
    rows = max(1, MAX_DISTANCE_BYTES // (codebook.shape[0] * codebook.element_size()))
    return torch.cat([nearest_code_unchunked(chunk, codebook) for chunk in vectors.split(rows)])


def nearest_code_unchunked(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return what `nearest_code` returns, from PyTorch's own operators, with all distances in memory at once."""
    precision = _precision(vectors, codebook)
    vectors, codebook = vectors.to(precision), codebook.to(precision)
    half_norms = codebook.square().sum(1) / 2  # argmin |v - e|^2 = argmin |e|^2 / 2 - v @ e
    with torch.autocast(vectors.device.type, enabled=False):
        distances = torch.addmm(half_norms, vectors, codebook.t(), alpha=-1)
    nearest = distances.argmin(1, keepdim=True)  # NaN counts as the smallest
    return torch.where(distances.gather(1, nearest).isfinite(), nearest, -1).flatten()


def _precision(vectors: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(vectors.dtype, codebook.dtype), torch.float32)


@nearest_code.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.long)


def check_indices(indices: Tensor, codebook: Tensor | None) -> None:
    """Indices must be a tensor of integers on the codebook's device. If codebook is None, the device is not checked."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor of integers, got {type(indices).__name__}")
    if indices.dtype not in INTEGER_DTYPES:
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if codebook is not None and indices.device != codebook.device:
        raise ValueError(f"indices must be on the model's device {codebook.device}, got {indices.device}")


class VectorQuantizer(nn.Module):
    """Nearest-code quantiser with straight-through gradients (VQ-VAE, arXiv:1711.00937; VQGAN's ``VectorQuantizer2``).

    Args:
        n_e: number of codes. A model with 0 has no codebook: it decodes latents, and raises ValueError for codes.
        e_dim: channels of a code.
        beta: weight of the commitment term.
        remap: path of a ``.npy`` file, or an integer array, that lists the codes in use. Indices are then positions in it.
        unknown_index: the index returned for codes that remap lacks: ``"random"``, ``"extra"`` (one past the last) or a number.
        sane_index_shape: return indices as ``(B, h, w)`` rather than flat (with remap ``(B, h * w)``).
        legacy: weight the codebook term by beta instead of the commitment term, as the released code does.

    Raises:
        ValueError: an argument is out of range. The message names it.
    """

    used: Tensor  # with remap only
    stored_codebook: Tensor | None = None  # the codebook as from_pretrained read it, before any cast; identifies it

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | PathLike[str] | np.ndarray | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        check_count("n_e", n_e)
        check_channels(e_dim=e_dim)
        check_number("beta", beta, 0, MAX_NUMBER)
        check_flags(sane_index_shape=sane_index_shape, legacy=legacy)
        self.n_e, self.e_dim, self.beta = n_e, e_dim, float(beta)
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / max(n_e, 1), 1.0 / max(n_e, 1))
        self.remap = remap
        self.re_embed = n_e
        if remap is not None:
            used = remap if isinstance(remap, np.ndarray) else np.load(remap, allow_pickle=False)
            self.register_buffer("used", torch.as_tensor(used).long())
            self.re_embed = len(used)
            if unknown_index == "extra":
                unknown_index, self.re_embed = self.re_embed, self.re_embed + 1
        self.unknown_index = unknown_index

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantise z ``(B, e_dim, h, w)``.

        A vector with NaN or infinity has no nearest code: its index is -1, and its z_q and the loss are NaN. This is an error,
        except where the check would make a training step wait for the GPU (training mode, gradients enabled), and in compiled,
        exported and captured programs.

        Returns:
            ``(z_q, loss, (perplexity, min_encodings, indices))``. z_q has z's shape and passes its gradient to z unchanged. loss
            is a scalar. perplexity and min_encodings are None, placeholders of the released code. indices are ``(B * h * w,)``
            int64 unless remap or sane_index_shape changes their shape.

        Raises:
            ValueError: z does not have the shape ``(B, e_dim, h, w)``, z or the codebook is not finite, or there is no codebook.
        """
        self._require_codebook()
        if z.dim() != 4 or z.shape[1] != self.e_dim:
            raise ValueError(f"z must have shape (batch, {self.e_dim}, height, width), got {tuple(z.shape)}")
        batch, _, height, width = z.shape
        vectors = z.permute(0, 2, 3, 1)
        flat = vectors.reshape(-1, self.e_dim)
        find_nearest = nearest_code_unchunked if traces_plain_operators() else nearest_code
        indices = find_nearest(flat.detach(), self.embedding.weight.detach())
        if not runs_training_step(self) and can_read_values(indices):
            self._check_found(indices, z)
        quantized = self.embedding(indices.clamp(min=0)).masked_fill((indices < 0)[:, None], float("nan")).view(vectors.shape)
        commitment_loss = (quantized.detach() - vectors).square().mean()
        codebook_loss = (quantized - vectors.detach()).square().mean()
        if self.legacy:
            loss = commitment_loss + self.beta * codebook_loss
        else:
            loss = self.beta * commitment_loss + codebook_loss
        z_q = vectors + (quantized - vectors).detach()
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(batch, -1)).flatten()
            if not self.sane_index_shape:
                indices = indices.view(batch, -1)
        if self.sane_index_shape:
            indices = indices.view(batch, height, width)
        return z_q.permute(0, 3, 1, 2), loss, (None, None, indices)

    def _check_found(self, indices: Tensor, z: Tensor) -> None:
        """Raise ValueError if a vector of z has no nearest code."""
        if missing := int((indices < 0).sum()):
            name = "the codebook" if is_finite(z) else "z"
            unmatched = f"{missing} of {len(indices)} vectors have no nearest code"
            raise ValueError(f"{name} must be finite, got NaN or infinity: {unmatched}")

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Return the positions in ``used`` of codes, int64 of any shape.

        Codes that are not in it become unknown_index; -1, which stands for no code, stays.
        """
        order = self.used.argsort()
        position = torch.searchsorted(self.used[order], indices).clamp(max=len(order) - 1)
        remapped = order[position]
        known = self.used[remapped] == indices
        if self.unknown_index == "random":
            unknown = torch.randint(0, len(self.used), indices.shape, device=indices.device)
        else:
            unknown = torch.full_like(indices, int(self.unknown_index))
        return torch.where(known, remapped, torch.where(indices < 0, indices, unknown))

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Return the codes at positions of ``used``, int64 of any shape. Positions past its end give its first code."""
        return self.used[torch.where(indices >= len(self.used), 0, indices)]

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Look up the codes of indices, integers of any dtype and shape.

        Returns ``(..., e_dim)``, or ``(B, e_dim, h, w)`` for ``shape=(B, h, w, e_dim)``.

        Raises ValueError for an index outside the codebook or another device than the codebook's, and TypeError for indices that
        are not a tensor of integers.
        """
        self._require_codebook()
        check_indices(indices, plain_weight(self.embedding))
        indices = indices.long()  # the lookups below take int64 and int32 only, or read uint8 as a mask
        if indices.numel() and can_read_values(indices):
            low, high = (int(bound) for bound in indices.aminmax())
            if low < 0 or high >= self.re_embed:
                raise ValueError(f"indices must be in [0, {self.re_embed}), got values from {low} to {high}")
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        codes: Tensor = self.embedding(indices)
        return codes if shape is None else codes.view(shape).permute(0, 3, 1, 2).contiguous()

    def _require_codebook(self) -> None:
        if self.n_e == 0:
            raise ValueError("the model has no codebook (n_embed is 0): use encode and decode, whose latents are not quantised")
