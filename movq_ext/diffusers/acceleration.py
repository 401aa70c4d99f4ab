"""Acceleration of diffusers' models: their parts are replaced in place, and can be restored.

A part is replaced by changing the object's class to a subclass of its own, of the same name, with another forward and no state.
So parameters, state dict keys, hooks, ``isinstance``, everything that goes by class names (``_no_split_modules``, LoRA's targets)
and the model's own class stay as they were, and a copy or a pickle of the model works. The alternatives do not: a forward set on
the instance conflicts with those of offloading and layerwise casting and cannot be pickled, and a custom attention processor is
lost on ``set_attn_processor`` and refused by ``set_default_attn_processor``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .accelerated import CallCount, call_count, forget_calls, original_class, own_class, patched_forward_reason
from .frame_attention import HunyuanVideoMidBlock3D
from .registry import accelerated_classes

MAX_NAMES_SHOWN = 3
TIME_AXIS_REASON = "it works on maps with a time axis"
SILU_IS_A_FUNCTION = "the SiLU after its last norm is a function in its forward"
# Parts of video autoencoders that resemble served ones, with the reasons why they are not.
UNSERVED = {
    "KVAECachedEncoder3D": SILU_IS_A_FUNCTION,
    "KVAECachedDecoder3D": SILU_IS_A_FUNCTION,
    "Kandinsky6SREncoder3D": SILU_IS_A_FUNCTION,
    "Kandinsky6SRDecoder3D": SILU_IS_A_FUNCTION,
    "MochiDecoder3D": "no norm comes before its last activation",
}
NO_PART_REASON = "none of its parts can be accelerated"


@dataclass(frozen=True)
class AccelerationReport:
    """The changes that `accelerate` made. ``print(report)`` summarises them.

    Attributes:
        replaced: dotted names of the replaced parts, by diffusers' class name.
        skipped: for each similar part, and each model without any, that was not replaced: the reason, by dotted name.
        counts: the calls of each replaced part, by dotted name. Later calls change them; `calls` copies them.
    """

    replaced: dict[str, list[str]]
    skipped: dict[str, str]
    counts: dict[str, CallCount] = field(default_factory=dict, repr=False, compare=False)

    def calls(self) -> dict[str, CallCount]:
        """Return the calls of each replaced part so far, by dotted name: those that this package computed, and the others.

        A part that its block computes counts as called. A part is called as diffusers calls it where its inputs, or layers
        that were replaced or hooked, do not allow ours, or where ours would do more work. Calls in compiled, exported and traced
        programs are not counted.
        """
        return {name: replace(count) for name, count in self.counts.items()}

    def __str__(self) -> str:
        names_of: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names_of.setdefault(reason, []).append(name)
        return "\n".join([
            f"{sum(map(len, self.replaced.values()))} parts replaced", *_summary(self.replaced),
            f"{len(self.skipped)} parts skipped", *_summary(names_of),
        ])  # fmt: skip


def _summary(names_of: Mapping[str, list[str]]) -> Iterator[str]:
    for title, names in names_of.items():
        more = len(names) - MAX_NAMES_SHOWN
        yield f"  {title} ({len(names)}): {', '.join(names[:MAX_NAMES_SHOWN])}" + (f" and {more} more" if more > 0 else "")


def accelerate(model_or_pipeline: Any, *, strict: bool = False) -> AccelerationReport:
    """Compute the parts of a diffusers model with this package's operators, in place; `restore` undoes it.

    The parts, with SiLU: ResnetBlock2D (group norm, with or without a time embedding), ResnetBlockCondNorm2D and SpatialNorm
    (Kandinsky's VQModel), KVAE's 2-D SpatialNorm, nearest Upsample2D with its convolution, the last norm of Decoder and Encoder,
    and Attention of one head of up to 512 over an image. They make up nearly all of AutoencoderKL (SD, SDXL, FLUX)
    and VQModel, and much of a UNet. Of clips: the blocks, spatial norms, upsampling and causal convolutions of
    AutoencoderKLCogVideoX, AutoencoderKLKVAEVideo and Kandinsky6SRVAE (blocks of its decoder only); the group norms of
    TemporalResnetBlock (the decoder and UNet of Stable Video Diffusion), of HunyuanVideo's, EasyAnimate's (Magvit) and Mochi's
    blocks and of Allegro's layers over time; the last norms of these models with their activation, except those of KVAE
    and Kandinsky 6.
    Results and gradients are the same up to rounding. Idempotent; call it again after adding parts to the model.

    Args:
        model_or_pipeline: a ``torch.nn.Module``, or a diffusers pipeline, with all its models.
        strict: raise an error if no part can be accelerated.

    Returns:
        The replaced parts, and the skipped ones with the reasons.

    Raises:
        TypeError: model_or_pipeline is neither a module nor a pipeline.
        ImportError: diffusers is not installed.
        ValueError: strict, and no part can be accelerated; the message gives the reasons.
    """
    replaced: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    counts: dict[str, CallCount] = {}
    for component, model in _models(model_or_pipeline).items():
        paths = list(_known_parts(model))
        for path in paths:
            part = model.get_submodule(path)
            name = ".".join(filter(None, (component, path.replace("_orig_mod.", "")))) or type(part).__name__
            if reason := _skip_reason(model, path, part):
                skipped[name] = reason
            else:
                part.__class__ = accelerated_classes()[original_class(part)]
                replaced.setdefault(type(part).__name__, []).append(name)
                counts[name] = call_count(part)
        if not paths:
            skipped[component or type(model).__name__] = NO_PART_REASON
    if strict and not replaced:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:MAX_NAMES_SHOWN])
        given = type(model_or_pipeline).__name__
        raise ValueError(f"model_or_pipeline must have parts that can be accelerated, got {given} ({reasons})")
    return AccelerationReport(replaced, skipped, counts)


def restore(model_or_pipeline: Any) -> None:
    """Restore the diffusers classes of the parts that `accelerate` replaced. Other parts do not change.

    Args:
        model_or_pipeline: as for `accelerate`.

    Raises:
        TypeError: model_or_pipeline is neither a module nor a pipeline.
    """
    for model in _models(model_or_pipeline).values():
        for module in model.modules():
            if own_class(module) is not type(module):
                module.__class__ = original_class(module)
                forget_calls(module)


def _models(model_or_pipeline: Any) -> dict[str, nn.Module]:
    """Return a pipeline's models by name, or the model itself under the empty name."""
    if isinstance(model_or_pipeline, nn.Module):
        return {"": model_or_pipeline}
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, Mapping):
        given = type(model_or_pipeline).__name__
        raise TypeError(f"model_or_pipeline must be a torch.nn.Module or a diffusers pipeline, got {given}")
    return {name: component for name, component in components.items() if isinstance(component, nn.Module)}


def _known_parts(model: nn.Module) -> Iterator[str]:
    """Yield the dotted names of the modules that accelerate replaces or reports."""
    for path, module in model.named_modules():
        kind = own_class(module)
        if issubclass(kind, nn.GroupNorm) and path.rpartition(".")[2] != "conv_norm_out":
            continue  # the other group norms belong to a block, which computes them
        if _known_class(kind) is not None:
            yield path


def _known_class(kind: type) -> type | None:
    """Return the class that accelerate replaces or reports and that this class is or derives from."""
    classes = accelerated_classes()
    return next((base for base in kind.__mro__ if base in classes or base.__name__ in UNSERVED), None)


def _skip_reason(model: nn.Module, path: str, part: nn.Module) -> str | None:
    """Return why the part is not replaced, or None if it is."""
    kind = own_class(part)
    if (known := _known_class(kind)) is not None and known is not kind:
        return f"its class is {kind.__name__}, a subclass of {known.__name__}"
    if kind.__name__ in UNSERVED:
        return UNSERVED[kind.__name__]
    accelerated = accelerated_classes()[kind]
    if 4 in accelerated.ranks and not _is_given(accelerated.ranks, model, path) and not _is_computed_by_block(model, path):
        return accelerated.unsupported_reason(part) or TIME_AXIS_REASON
    return patched_forward_reason(part) or accelerated.unsupported_reason(part)


def _is_computed_by_block(model: nn.Module, path: str) -> bool:
    """True for a part that an accelerated block around it computes: HunyuanVideo's attention over frames."""
    names = path.split(".")
    return any(isinstance(model.get_submodule(".".join(names[:depth])), HunyuanVideoMidBlock3D) for depth in range(len(names)))


def _is_given(ranks: Sequence[int], model: nn.Module, path: str) -> bool:
    """False if no convolution of the innermost enclosing module that has any takes these ranks: the part is never given one."""
    names = path.split(".") if path else []
    kinds = tuple({4: nn.Conv2d, 5: nn.Conv3d}[rank] for rank in ranks)
    for depth in range(len(names), -1, -1):
        around = model.get_submodule(".".join(names[:depth]))
        if convolutions := [layer for layer in around.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]:
            return any(isinstance(layer, kinds) for layer in convolutions)
    return True
