"""diffusers' autoencoders on this package's operators: their blocks are replaced in place, and given back.

A block is replaced by giving the object another class: a subclass of its own, of the same name, with another forward and no
state. So parameters, state dict keys, hooks, ``isinstance``, what goes by a class's name (``_no_split_modules``, LoRA's
targets) and the model's own class are as before, and a copy or a pickle of the model stays what it is. A forward put on the
instance would hide or be hidden by those of offloading and layerwise casting, and is bound to one object, which pickle cannot
follow. An attention processor would be lost to every ``set_attn_processor``, and ``set_default_attn_processor`` refuses one it
does not know: here the processor is left alone, and one that is not diffusers' default is called as it is. The same holds, in
every call, for each layer that is no longer diffusers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.fusion import add_residual, conv_deferring_bias, fold_upsampling, is_plain_conv, is_plain_conv3x3, is_unmodified
from ..model.modulation import modulate
from ..ops.cuda import MAX_HEAD_SIZE
from ..ops.functional import attention, fused_spatial_norm
from ..ops.native import is_inference
from ..ops.options import NormOptions

NAMES_SHOWN = 3
PREFIX = "of_diffusers_"
NOT_SERVED = "no part of it is of a kind that can be served"
WITH_TIME = ("TemporalResnetBlock", "CogVideoXSpatialNorm3D", "KVAECachedSpatialNorm3D", "Kandinsky6SRSpatialNorm3D")


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate` did. ``print(report)`` says it in short.

    Attributes:
        replaced: dotted names of the parts that this package computes, by kind (the name of diffusers' class).
        left: why a part that looks like one of them, or a component of a pipeline, was left as it is, by dotted name.
    """

    replaced: dict[str, list[str]]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{sum(map(len, self.replaced.values()))} parts replaced"]
        lines += [f"  {kind} ({len(names)}): {_in_short(names)}" for kind, names in self.replaced.items()]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"{len(self.left)} left as they are"]
        return "\n".join(lines + [f"  {reason} ({len(names)}): {_in_short(names)}" for reason, names in reasons.items()])


def _in_short(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def accelerate(model_or_pipeline: Any) -> AccelerationReport:
    """Let this package compute the parts of a diffusers model that it can, in place; `restore` undoes it.

    These are, with SiLU: ResnetBlock2D (group norm, with a time embedding or without), ResnetBlockCondNorm2D and SpatialNorm
    (Kandinsky's VQModel), KVAE's 2-D SpatialNorm, nearest Upsample2D with its convolution, the group norm before the last
    convolution, and Attention of one head of up to 512 over an image: nearly all of AutoencoderKL (SD, SDXL, FLUX) and VQModel,
    and much of a UNet. Results and gradients are the same but for rounding. Twice is once; parts that are put in later are not
    served before the next call.

    Args:
        model_or_pipeline: a ``torch.nn.Module``, or a pipeline of diffusers, whose models are all looked through.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        TypeError: model_or_pipeline is neither a module nor a pipeline.
        ImportError: diffusers is not installed.
        ValueError: no part can be served; the message says why.
    """
    served = _served_classes()
    replaced: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    for component, model in _models(model_or_pipeline).items():
        found = False
        for path, module in model.named_modules(prefix=component):
            name = path.replace("_orig_mod.", "") or type(module).__name__
            kind = served.get(type(module)) if not isinstance(module, Served) else type(module)
            if type(module).__name__ in WITH_TIME:
                found, left[name] = True, "it works on maps with a time axis"
            if kind is None or (kind.diffusers_class is nn.GroupNorm and path.rpartition(".")[2] != "conv_norm_out"):
                continue
            found = True
            if reason := _own_forward(module) or kind.reason(module):
                left[name] = reason
                continue
            module.__class__ = kind
            replaced.setdefault(kind.__name__, []).append(name)
        if component and not found:
            left[component] = NOT_SERVED
    if not replaced:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:NAMES_SHOWN]) or NOT_SERVED
        raise ValueError(f"model_or_pipeline has no part that can be served, got {type(model_or_pipeline).__name__} ({reasons})")
    return AccelerationReport(replaced, left)


def restore(model_or_pipeline: Any) -> None:
    """Give the parts that `accelerate` replaced back to diffusers; nothing happens to others.

    Args:
        model_or_pipeline: as for `accelerate`.

    Raises:
        TypeError: model_or_pipeline is neither a module nor a pipeline.
    """
    for model in _models(model_or_pipeline).values():
        for module in model.modules():
            if isinstance(module, Served):
                module.__class__ = module.diffusers_class  # type: ignore[assignment]


def _models(model_or_pipeline: Any) -> dict[str, nn.Module]:
    """By name in the pipeline; a model itself has none."""
    if isinstance(model_or_pipeline, nn.Module):
        return {"": model_or_pipeline}
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, Mapping):
        given = type(model_or_pipeline).__name__
        raise TypeError(f"model_or_pipeline must be a torch.nn.Module or a diffusers pipeline, got {given}")
    return {name: component for name, component in components.items() if isinstance(component, nn.Module)}


class Served(nn.Module):
    """A part that was replaced. It may be called as what it was before too: whoever wrapped its forward has kept that."""

    diffusers_class: ClassVar[type[nn.Module]]

    @staticmethod
    def reason(module: Any) -> str | None:
        """Why the module cannot be served, or None if it can."""
        raise NotImplementedError


def _theirs(module: Any) -> Any:
    """diffusers' class of the module."""
    return module.diffusers_class if isinstance(module, Served) else type(module)


def _takes(module: Any, x: Tensor) -> bool:
    return isinstance(module, Served) and x.dim() == 4 and x.numel() > 0 and x.is_floating_point()


def _is(module: Any, kind: type[nn.Module]) -> bool:
    """Whether the module does what its class, which is this one, does: nobody put in his own, patched it or hooked on to it."""
    return type(module) is kind and is_unmodified(module)


def _own_forward(module: nn.Module) -> str | None:
    patched = "forward" in module.__dict__ and not isinstance(module, Served)  # what is put over ours calls ours
    return "its forward was replaced (by offloading, or a patch)" if patched else None


def _part_reason(name: str, part: Any, wanted: type[nn.Module]) -> str | None:
    if _theirs(part) is not wanted:
        return f"its {name} is {type(part).__name__}, not {wanted.__name__}"
    return None if is_unmodified(part) else f"its {name} is hooked or patched"


def _group_reason(name: str, norm: Any) -> str | None:
    return _part_reason(name, norm, nn.GroupNorm)


def _spatial_reason(name: str, norm: Any) -> str | None:
    return _part_reason(name, norm, import_module("diffusers.models.attention_processor").SpatialNorm) or SpatialNorm.reason(norm)


def _block_reason(block: Any, norm_reason: Callable[[str, Any], str | None]) -> str | None:
    if block.upsample is not None or block.downsample is not None:
        return "it resamples between its norm and its convolution"
    norms = norm_reason("norm1", block.norm1) or norm_reason("norm2", block.norm2)
    return norms or _part_reason("activation", block.nonlinearity, nn.SiLU)


class GroupNorm(Served):
    """Group norm of an image."""

    @staticmethod
    def reason(module: Any) -> str | None:
        return None

    def forward(self: Any, input: Tensor) -> Tensor:
        if not _takes(self, input):
            return nn.GroupNorm.forward(self, input)
        return fused_spatial_norm(input, None, None, NormOptions.of_layer(self))


class SpatialNorm(Served):
    """diffusers' SpatialNorm, and KVAE's, which may convolve zq after its resize."""

    @staticmethod
    def reason(module: Any) -> str | None:
        if reason := _group_reason("norm_layer", module.norm_layer):
            return reason
        return None if all(map(_is_pointwise, (module.conv_y, module.conv_b))) else "its conv_y or conv_b is replaced or hooked"

    def forward(self: Any, f: Tensor, zq: Tensor) -> Tensor:
        if not _takes(self, f) or not self.can_modulate(f, zq):
            return _theirs(self).forward(self, f, zq)  # type: ignore[no-any-return]
        return self.modulated(f, zq)  # type: ignore[no-any-return]

    def can_modulate(self: Any, f: Tensor, zq: Tensor) -> bool:
        return SpatialNorm.reason(self) is None and isinstance(zq, Tensor) and zq.dim() == 4 and zq.shape[0] == f.shape[0]

    def modulated(self: Any, f: Tensor, zq: Tensor, activation: str | None = None, f_bias: Tensor | None = None) -> Tensor:
        if getattr(self, "add_conv", False):
            zq = self.conv(F.interpolate(zq, size=f.shape[2:], mode="nearest"))
        y, b = modulate([self], zq)[0]
        return fused_spatial_norm(f, y, b, NormOptions.of_layer(self.norm_layer, activation, f_bias))


def _is_pointwise(conv: Any) -> bool:
    return is_plain_conv(conv) and conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.bias is not None


def _group_norm(
    norm: Any, f: Tensor, act: Any, y: Tensor | None = None, b: Tensor | None = None, f_bias: Tensor | None = None
) -> Tensor:
    """``act(norm(f + f_bias) * y + b)``."""
    if _is(norm, nn.GroupNorm) and _is(act, nn.SiLU):
        return fused_spatial_norm(f, y, b, NormOptions.of_layer(norm, "silu", f_bias))
    out = norm(f)
    return act(out if y is None or b is None else out * y + b)  # type: ignore[no-any-return]


def _conditioned(norm: Any, f: Tensor, zq: Tensor) -> bool:
    """Whether the norm may be computed without calling it."""
    return isinstance(norm, SpatialNorm) and is_unmodified(norm) and norm.can_modulate(f, zq)


def _spatial_norm(norm: Any, f: Tensor, zq: Tensor, act: Any, f_bias: Tensor | None = None) -> Tensor:
    """``act(norm(f + f_bias, zq))``."""
    if _conditioned(norm, f, zq) and _is(act, nn.SiLU):
        return norm.modulated(f, zq, "silu", f_bias)  # type: ignore[no-any-return]
    return act(norm(f, zq))  # type: ignore[no-any-return]


def _end(block: Any, h: Tensor, x: Tensor) -> Tensor:
    """``(shortcut(x) + conv2(dropout(h))) / output_scale_factor``, the second half of both blocks."""
    h, bias = conv_deferring_bias(block.conv2, block.dropout(h))
    if block.conv_shortcut is not None:
        x = x.contiguous() if block.training else x  # as diffusers does, for DDP
        if bias is None:
            x = block.conv_shortcut(x)
        else:
            x, more = conv_deferring_bias(block.conv_shortcut, x)
            bias = bias if more is None else bias + more
    h = add_residual(h, bias, x, block.conv2)
    return h if block.output_scale_factor == 1 else h / block.output_scale_factor


class ResnetBlock2D(Served):
    """The block of GroupNorm and SiLU. A time embedding's scale and shift are SpatialNorm's modulation on a grid of one cell."""

    @staticmethod
    def reason(module: Any) -> str | None:
        if module.time_embedding_norm not in ("default", "scale_shift", "group"):  # "group" is AutoencoderKL's decoder, with none
            return f"its time_embedding_norm is {module.time_embedding_norm}"
        return _block_reason(module, _group_reason)

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        x, act, norm2, by_scale = input_tensor, self.nonlinearity, self.norm2, self.time_embedding_norm == "scale_shift"
        odd = (temb is not None) != (self.time_emb_proj is not None) or (by_scale and temb is None)
        if args or kwargs or odd or not _takes(self, x):
            return _theirs(self).forward(self, x, temb, *args, **kwargs)  # type: ignore[no-any-return]
        h = _group_norm(self.norm1, x, act)  # named again and again, so that what was there before is freed
        if temb is None:
            free = _is(norm2, nn.GroupNorm) and _is(act, nn.SiLU) and is_inference(*norm2.parameters())
            h, bias = conv_deferring_bias(self.conv1, h) if free else (self.conv1(h), None)
            return _end(self, _group_norm(norm2, h, act, f_bias=bias), x)
        temb = self.time_emb_proj(temb if self.skip_time_act else act(temb))[:, :, None, None]
        h = self.conv1(h)
        if not by_scale:
            return _end(self, _group_norm(norm2, add_residual(h, None, temb, self.conv1), act), x)
        scale, shift = temb.chunk(2, dim=1)
        return _end(self, _group_norm(norm2, h, act, 1 + scale, shift), x)


class ResnetBlockCondNorm2D(Served):
    """The block of SpatialNorm and SiLU; temb is the latent."""

    @staticmethod
    def reason(module: Any) -> str | None:
        if module.time_embedding_norm != "spatial":
            return f"its time_embedding_norm is {module.time_embedding_norm}"
        return _block_reason(module, _spatial_reason)

    def forward(self: Any, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, act, norm2 = input_tensor, self.nonlinearity, self.norm2
        if args or kwargs or not _takes(self, x):
            return _theirs(self).forward(self, x, temb, *args, **kwargs)  # type: ignore[no-any-return]
        h = _spatial_norm(self.norm1, x, temb, act)
        free = _conditioned(norm2, h, temb) and _is(act, nn.SiLU) and is_inference(temb, *norm2.parameters())
        h, bias = conv_deferring_bias(self.conv1, h) if free else (self.conv1(h), None)
        return _end(self, _spatial_norm(norm2, h, temb, act, bias), x)


class Upsample2D(Served):
    """Nearest 2x upsampling and a 3x3 convolution, as one transposed convolution."""

    @staticmethod
    def reason(module: Any) -> str | None:
        nearest = not module.use_conv_transpose and module.norm is None and getattr(module, "interpolate", True)
        if not nearest or not module.use_conv:
            return "it is not a nearest upsampling and a convolution"
        return None if _is_folding(_conv_of(module)) else "its convolution is replaced, hooked or not a padded 3x3"

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv = _conv_of(self)
        if args or kwargs or output_size is not None or not _takes(self, hidden_states) or not _is_folding(conv):
            return _theirs(self).forward(self, hidden_states, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        return F.conv_transpose2d(hidden_states, fold_upsampling(conv.weight), conv.bias, stride=2, padding=1)


def _conv_of(upsample: Any) -> Any:
    return upsample.conv if upsample.name == "conv" else upsample.Conv2d_0


def _is_folding(conv: Any) -> bool:
    return is_plain_conv3x3(conv)


class Attention(Served):
    """Self-attention of one head over all positions of an image."""

    processors: ClassVar[tuple[type, ...]]

    @staticmethod
    def reason(module: Any) -> str | None:
        processors = _served_classes()[_theirs(module)].processors
        size = module.to_q.out_features if hasattr(module.to_q, "out_features") else module.inner_dim
        if module.heads != 1:
            return "it has more than one head"
        if size > MAX_HEAD_SIZE:
            return f"its head is larger than {MAX_HEAD_SIZE}"
        if module.is_cross_attention or module.added_kv_proj_dim is not None or module.to_out is None:
            return "it attends to another sequence"
        if module.norm_q is not None or module.norm_k is not None or not module.scale_qk:
            return "it normalises its queries or does not scale them"
        if module.inner_dim != module.inner_kv_dim or module.out_dim != module.query_dim:
            return "its input, head and output differ in size"
        if type(module.processor) not in processors:
            return f"its processor is {type(module.processor).__name__}"
        reason = None if module.group_norm is None else _group_reason("group_norm", module.group_norm)
        return reason if reason or module.spatial_norm is None else _spatial_reason("spatial_norm", module.spatial_norm)

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x, to_itself = hidden_states, encoder_hidden_states is None and attention_mask is None
        norm = self.group_norm
        odd = not to_itself or any(name != "temb" for name in kwargs) or not (norm is None or _is(norm, nn.GroupNorm))
        if odd or not _takes(self, x) or type(self.processor) not in self.processors:
            return _theirs(self).forward(self, x, encoder_hidden_states, attention_mask, **kwargs)  # type: ignore[no-any-return]
        h = x if self.spatial_norm is None else self.spatial_norm(x, kwargs.get("temb"))
        if norm is not None:
            h = fused_spatial_norm(h, None, None, NormOptions.of_layer(norm))
        q, k, v = (part.unsqueeze(1) for part in self.projected(h.flatten(2).transpose(1, 2)))
        out = attention(q, k, v).squeeze(1)
        for layer in self.to_out:
            out = layer(out)
        out = out.transpose(1, 2).reshape(x.shape)
        out = out + x if self.residual_connection else out
        return cast(Tensor, out if self.rescale_output_factor == 1 else out / self.rescale_output_factor)

    def projected(self: Any, tokens: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values ``(B, H*W, C)`` of tokens ``(B, H*W, C)``."""
        layers = (self.to_q, self.to_k, self.to_v)
        if not all(_is(layer, nn.Linear) and layer.bias is not None for layer in layers):
            return [layer(tokens) for layer in layers]
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return F.linear(tokens, weight, bias).chunk(3, dim=2)


KINDS: dict[str, type[Served]] = {
    "torch.nn.GroupNorm": GroupNorm,
    "diffusers.models.resnet.ResnetBlock2D": ResnetBlock2D,
    "diffusers.models.resnet.ResnetBlockCondNorm2D": ResnetBlockCondNorm2D,
    "diffusers.models.upsampling.Upsample2D": Upsample2D,
    "diffusers.models.attention_processor.Attention": Attention,
    "diffusers.models.attention_processor.SpatialNorm": SpatialNorm,
    "diffusers.models.autoencoders.autoencoder_kl_kvae.KVAEDecoderSpatialNorm2D": SpatialNorm,
}


@functools.cache
def _served_classes() -> dict[type[nn.Module], Any]:
    """For each of diffusers' classes ours: a subclass of it with its name, which __getattr__ finds."""
    try:
        processors = import_module("diffusers.models.attention_processor")
    except ImportError as error:
        raise ImportError("accelerate needs diffusers: pip install diffusers") from error
    more: dict[type[Served], Any] = {Attention: {"processors": (processors.AttnProcessor, processors.AttnProcessor2_0)}}
    found: dict[type[nn.Module], Any] = {}
    for original, kind in _originals():
        found[original] = type(original.__name__, (kind, original), {
            "__module__": __name__, "__qualname__": PREFIX + original.__name__, "diffusers_class": original, **more.get(kind, {}),
        })  # fmt: skip
    return found


def _originals() -> Iterator[tuple[type[nn.Module], type[Served]]]:
    for path, kind in KINDS.items():
        file, _, name = path.rpartition(".")
        try:
            yield getattr(import_module(file), name), kind
        except (ImportError, AttributeError):  # a diffusers that does not have it
            continue


def __getattr__(name: str) -> Any:
    """The classes by the names that pickle asks for; made then, for diffusers is not needed before."""
    if name.startswith(PREFIX):
        for made in _served_classes().values():
            if made.__qualname__ == name:
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
