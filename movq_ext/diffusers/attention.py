"""diffusers' attention of one head over a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.fusion import SHARED_KV_DTYPES, absorb_keys, is_plain_group_norm
from ..ops.attention_backends import MAX_HEAD_SIZE
from ..ops.functional import attention, fused_spatial_norm, shared_kv_attention
from ..ops.native import compute_dtype
from ..ops.options import NormOptions
from .accelerated import Accelerated, can_compute, count_call, is_plain_instance, original_class
from .norms import group_norm_reason, spatial_norm_reason


class Attention(Accelerated):
    """``(x + to_out(attention(to_q(n), to_k(n), to_v(n)))) / rescale_output_factor`` with ``n = group_norm(x)``.

    The norm, the residual and the factor are optional, and a spatial norm may come before the group norm.
    """

    default_processors: ClassVar[tuple[type, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        processors = import_module("diffusers.models.attention_processor")
        Attention.default_processors = (processors.AttnProcessor, processors.AttnProcessor2_0)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        head_size = module.to_q.out_features if hasattr(module.to_q, "out_features") else module.inner_dim
        if module.heads != 1:
            return "it has more than one head"
        if head_size > MAX_HEAD_SIZE:
            return f"its head is larger than {MAX_HEAD_SIZE}"
        if module.is_cross_attention or module.added_kv_proj_dim is not None or module.to_out is None:
            return "it attends to another sequence"
        if module.norm_q is not None or module.norm_k is not None or not module.scale_qk:
            return "it normalises its queries, or does not scale its scores"
        if module.inner_dim != module.inner_kv_dim or module.out_dim != module.query_dim:
            return "its input, head and output differ in size"
        if type(module.processor) not in Attention.default_processors:
            return f"its processor is {type(module.processor).__name__}"
        reason = None if module.group_norm is None else group_norm_reason("group_norm", module.group_norm)
        return reason if reason or module.spatial_norm is None else spatial_norm_reason("spatial_norm", module.spatial_norm)

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x, norm = hidden_states, self.group_norm
        to_itself = encoder_hidden_states is None and attention_mask is None and all(name == "temb" for name in kwargs)
        plain_norm = norm is None or is_plain_group_norm(norm)
        can_attend = can_compute(self, x) and type(self.processor) in Attention.default_processors
        if not count_call(self, to_itself and plain_norm and can_attend):
            return original_class(self).forward(self, x, encoder_hidden_states, attention_mask, **kwargs)  # type: ignore[no-any-return]
        h = x if self.spatial_norm is None else self.spatial_norm(x, kwargs.get("temb"))
        h = h if norm is None else fused_spatial_norm(h, None, None, NormOptions.from_layer(norm))
        tokens = h.flatten(2).transpose(1, 2)
        if Attention.shares_keys_and_values(self, tokens):
            h = Attention.attend_shared(self, tokens)
        else:
            q, k, v = (x.unsqueeze(1) for x in Attention.project(self, tokens))
            h = attention(q, k, v).squeeze(1)
        for layer in self.to_out:
            h = layer(h)
        h = h.transpose(1, 2).reshape(x.shape)
        h = h + x if self.residual_connection else h
        return h if self.rescale_output_factor == 1 else h / self.rescale_output_factor

    def project(self: Any, tokens: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values ``(B, H*W, C)`` of tokens ``(B, H*W, C)``, from one product where layers are plain."""
        layers = (self.to_q, self.to_k, self.to_v)
        if not all(is_plain_instance(layer, nn.Linear) and layer.bias is not None for layer in layers):
            return [layer(tokens) for layer in layers]
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return F.linear(tokens, weight, bias).chunk(3, dim=2)

    def shares_keys_and_values(self: Any, tokens: Tensor) -> bool:
        """True if the tokens may serve as both keys and values, as in `AttnBlock`."""
        plain = all(is_plain_instance(layer, nn.Linear) for layer in (self.to_k, self.to_v))
        return plain and compute_dtype(tokens) in SHARED_KV_DTYPES and tokens.shape[2] <= MAX_HEAD_SIZE

    def attend_shared(self: Any, tokens: Tensor) -> Tensor:
        """Compute attention with the tokens as keys and values: to_k is applied to the queries, and to_v to the result."""
        tokens = tokens.to(compute_dtype(tokens))
        projection, scale = absorb_keys(self.to_k.weight, self.to_k.bias, tokens.dtype)
        q = F.linear(self.to_q(tokens), projection)
        h: Tensor = self.to_v(shared_kv_attention(q.unsqueeze(1), tokens.unsqueeze(1), scale).squeeze(1))
        return h
