"""Attention through PyTorch's matrix products, a chunk of the scores at a time. On a GPU, cuBLAS computes them.

Scores and softmax are float32 in every dtype: in bfloat16, a score of 10 would be wrong by up to 0.03, and its weight by 3%. The
weights are then rounded to q's dtype, as in every fused kernel, and divided by the sum of the rounded ones.

Memory is linear in the number of tokens. A chunk has at most MAX_CHUNK_BYTES, so that it stays in the L2 cache from one step to
the next (50 MB on an H100, 40 MB on an A100: NVIDIA's whitepapers). Budget per score, for a head of C in 16-bit types:

    forward   4 C operations in 2 products. 26 bytes: scores written 4; maximum 4; softmax 4 + 4; rounding 4 + 2; sum 2; product 2
    backward  10 C operations in 5 products. 58 bytes: p 4 + 8 + 8, and 4 + 2 to round it; ds 4 + 8, and 8 + 2 to multiply it by p
              and round it; products 2 + 2 + 2. Sums in float32 take 8 C / side bytes each, 2.5 of a head of 512.

Backward takes squares rather than rows, because it adds every chunk to three sums. Chunks are added in order, so every run gives
the same bits if cuBLAS does (see ``torch.use_deterministic_algorithms``). On an H200 it is slower than the kernels in bfloat16,
and faster in float32 for heads of 512 and 4096 tokens or more (attention_table.json).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_CHUNK_BYTES = 32 << 20
TILE = 128  # chunks are multiples of this where they can be: cuBLAS computes tiles of 64 to 256 rows and columns
WEIGHT_FACTOR = 2.0**15  # keeps small weights in float16's range


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale * q @ k.mT) @ v`` of ``(B, heads, tokens, C)``, and the log-sum-exp of each row of scores."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v, all_out, all_lse = (x.flatten(0, 1) for x in (q, k, v, out, lse))  # (B * heads, tokens, C)
    images, rows = _row_chunk(q, k)
    for image in _slices(len(q), images):
        for row in _slices(q.shape[1], rows):
            all_out[image, row], all_lse[image, row] = _attend(q[image, row], k[image], v[image], scale)
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _empty(q, q.shape[1], k.shape[1])
    _multiply(q, k.mT, scores, alpha=scale, beta=0)
    peak, position = scores.max(2, keepdim=True)
    weights = torch.softmax(scores, 2, out=scores)  # in place
    lse = peak - weights.gather(2, position).log()
    out = _empty(q, q.shape[1], v.shape[2])
    if q.dtype == torch.float32:
        _multiply(weights, v, out, beta=0)
    else:
        rounded = torch.mul(weights, WEIGHT_FACTOR, out=torch.empty_like(weights, dtype=q.dtype))
        _multiply(rounded, v, out, beta=0)
        out /= rounded.sum(2, keepdim=True, dtype=torch.float32)
    return out, lse.squeeze(2)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, shared_kv: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k and v.

    With `shared_kv`, k and v are one tensor. Its gradient takes the place of k's, and v's is None.
    """
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), None if shared_kv else v.new_empty(v.shape)
    dout, q, k, v, out, lse = (x.flatten(0, 1) for x in (dout, q, k, v, out, lse))
    images, rows, columns = _square_chunk(q, k)
    for image in _slices(len(q), images):
        dk_sum = _empty(k[image], *k.shape[1:]).zero_()
        dv_sum = dk_sum if shared_kv else torch.zeros_like(dk_sum)
        for row in _slices(q.shape[1], rows):
            dq_sum = _empty(q[image, row], *q[image, row].shape[1:]).zero_()
            delta = (dout[image, row].float() * out[image, row].float()).sum(2)
            for column in _slices(k.shape[1], columns):
                inputs = dout[image, row], q[image, row], k[image, column], v[image, column]
                sums = dq_sum, dk_sum[:, column], dv_sum[:, column]
                _add_gradients(sums, *inputs, lse[image, row], delta, scale)
            dq.flatten(0, 1)[image, row] = dq_sum
        dk.flatten(0, 1)[image] = dk_sum
        if dv is not None:
            dv.flatten(0, 1)[image] = dv_sum
    return dq, dk, dv


def _add_gradients(
    sums: tuple[Tensor, Tensor, Tensor], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> None:
    """Add a chunk's gradients to the sums of q's, k's and v's.

    ``p = exp(scale q k^T - lse)``, ``dv = p^T dout``, ``ds = p (dout v^T - delta)``, ``dq = scale ds k``, ``dk = scale ds^T q``,
    with delta the sum of dout out over a query's elements (FlashAttention-2, arXiv:2307.08691, algorithm 2).
    """
    dq, dk, dv = sums
    p, ds = (_empty(q, q.shape[1], k.shape[1]) for _ in range(2))
    _multiply(q, k.mT, p.copy_(-lse[..., None]), alpha=scale)
    p.exp_()
    _multiply(dout, v.mT, ds.copy_(-delta[..., None]))
    if q.dtype == torch.float32:
        ds *= p
        _multiply(p.mT, dout, dv)
    else:
        ds = torch.mul(ds, p, out=torch.empty_like(ds, dtype=q.dtype))
        rounded = torch.mul(p, WEIGHT_FACTOR, out=torch.empty_like(p, dtype=q.dtype))
        _multiply(rounded.mT, dout, dv, alpha=1 / WEIGHT_FACTOR)
    _multiply(ds.mT, q, dk, alpha=scale)
    _multiply(ds, k, dq, alpha=scale)


def _multiply(a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """``out = beta * out + alpha * a @ b``, in place. out is float32, whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif a.is_cuda:
        torch.baddbmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:  # only cuBLAS adds products of 16-bit numbers to float32
        torch.baddbmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(len(like), rows, columns, dtype=torch.float32)


def _row_chunk(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Return the images and rows of scores in a chunk: whole images, or rows of one."""
    max_scores = MAX_CHUNK_BYTES // (4 if q.dtype == torch.float32 else 6)  # the scores, and the rounded weights
    if images := max_scores // (q.shape[1] * k.shape[1]):
        return images, q.shape[1]
    return 1, _whole_tiles(max_scores // k.shape[1])


def _square_chunk(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """Return the images, rows and columns of scores in a chunk of backward: whole images, or a square of one."""
    max_scores = MAX_CHUNK_BYTES // (8 if q.dtype == torch.float32 else 12)  # p and ds, and both of them rounded
    if images := max_scores // (q.shape[1] * k.shape[1]):
        return images, q.shape[1], k.shape[1]
    side = math.isqrt(max_scores)
    rows = min(q.shape[1], _whole_tiles(max(side, max_scores // k.shape[1])))
    return 1, rows, _whole_tiles(max_scores // rows)


def _whole_tiles(size: int) -> int:
    return size - size % TILE if size > TILE else max(size, 1)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))
