"""Compare every CUDA kernel with the native path before it is used: once per device, dtype and layout, on small inputs.

A kernel may be wrong on a GPU that it was never run on. Then the native path runs instead, with a warning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .registration import CPU_IMPLEMENTATIONS

Call = tuple[str, list[Any]]  # the name of a compiled operator, and its arguments
Results = dict[tuple[str, torch.device, torch.dtype, bool], str | None]

VARIABLE = "MOVQ_EXT_SELF_TEST"
# Largest ``||kernel - native|| / ||native||``: far above rounding, far below the effect of a wrong index.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
HEAD_SIZES = (512, 256, 128, 40)
HOPPER_HEAD_SIZES = HEAD_SIZES[:3]

_results: Results = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def self_test_failure(operator: str, device: torch.device, dtype: torch.dtype, channels_last: bool) -> str | None:
    """Return how the kernels of an operator differ from the native path, or None if they agree.

    Tests them in the first call for a device, dtype and layout. The results to compare with take tens of milliseconds of a CPU
    core for attention, and less for the others; the kernels' part is not yet measured on a GPU. Does not test while a CUDA graph
    is captured, or without the device: a program for a GPU may be traced on another machine.

    Args:
        operator: one of CALLS.
        device, dtype, channels_last: of the operator's first argument.

    Raises:
        ValueError: the environment variable MOVQ_EXT_SELF_TEST is neither 0, 1 nor empty.
    """
    key = operator, device, dtype, channels_last
    if key not in _results:
        if not _is_enabled() or (device.type == "cuda" and (not torch.cuda.is_available() or _is_capturing())):
            return None
        # The caller's modes (fake tensors, profilers, default devices) must not see the test.
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                _results[key] = next(_failures(operator, device, dtype, channels_last), None)
            except (torch.OutOfMemoryError, MemoryError):  # says nothing about the kernels: test again in the next call
                return None
    return _results[key]


def _is_enabled() -> bool:
    setting = os.environ.get(VARIABLE, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0, 1 or unset, got {setting!r}")
    return setting != "0"


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _failures(operator: str, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Iterator[str]:
    """Yield a description of every call that fails."""
    layout = f", {'channels_last' if channels_last else 'NCHW'}" if not operator.endswith("attention") else ""
    where = f"on {device} in {str(dtype).removeprefix('torch.')}{layout}"
    for name, arguments in CALLS[operator](_Inputs(dtype, channels_last)):
        expected = _outputs(name, CPU_IMPLEMENTATIONS[name.removeprefix("chunked_")], arguments)
        try:
            results = _outputs(name, getattr(torch.ops.movq_ext, name), [_copy(argument, device) for argument in arguments])
            actual = [result.cpu().double() for result in results]  # waits for the kernel, whose errors appear here
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            yield f"the self test of {name} {where} failed: {(str(error).splitlines() or ['unknown error'])[0]}"
            return
        for index, (result, wanted) in enumerate(zip(actual, expected, strict=True)):
            if result.numel() == wanted.numel() == 0:  # the gradient of an argument that was not given
                continue
            wanted = wanted.double()
            # cuBLAS rounds to TF32 where torch.backends.cuda.matmul.allow_tf32 says so.
            allowed = TOLERANCES[dtype] * (10 if name.startswith("chunked_") and dtype == torch.float32 else 1)
            difference = float((result - wanted).norm() / wanted.norm())
            if not difference <= allowed:  # also if it is NaN
                figures = f"relative error {difference:.2g} in result {index}, expected at most {allowed:.2g}"
                norms = f"norm {float(result.norm()):.4g}, expected {float(wanted.norm()):.4g}"
                yield f"the self test of {name} {where} found {figures} ({norms})"


def _outputs(name: str, function: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    """Return the results of an operator, and its first argument if it works in place."""
    arguments = [_copy(argument) for argument in arguments]
    results = function(*arguments)
    outputs = [results] if isinstance(results, Tensor) else list(results or ())
    if "statistics" in name:  # mean, m2 and count differ in size: compared as one, the largest would hide errors of the others
        outputs += outputs.pop().unbind(3)[:3]
    return [*outputs, arguments[0]] if name.endswith(("_", "_into")) else outputs


def _copy(argument: Any, device: torch.device | None = None) -> Any:
    """Copy a tensor with its strides, which Tensor.clone and Tensor.to do not keep if it has gaps."""
    if not isinstance(argument, Tensor):
        return argument
    copy = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device or argument.device)
    return copy.copy_(argument)


class _Inputs:
    """Draws random tensors in a dtype, and maps in a layout, always the same ones."""

    def __init__(self, dtype: torch.dtype, channels_last: bool) -> None:
        self.dtype, self.channels_last = dtype, channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(self.dtype)

    def map(self, *shape: int) -> Tensor:
        return self.tensor(*shape).contiguous(memory_format=self.memory_format)


def _spatial_norm_calls(inputs: _Inputs) -> Iterator[Call]:
    groups, eps, silu = 8, 1e-6, True
    f, dout = inputs.map(2, 64, 12, 16), inputs.map(2, 64, 12, 16)
    zq_y, zq_b = inputs.map(2, 64, 3, 4), inputs.map(2, 64, 3, 4)
    weight, bias, f_bias = (inputs.tensor(64) for _ in range(3))
    norm = [f, zq_y, zq_b, weight, bias]
    yield "spatial_norm_forward", [*norm, groups, eps, silu]
    yield "spatial_norm_forward", [f, None, None, weight, bias, groups, eps, silu, f_bias]
    bordered = [inputs.map(2, 64, 9, 12) for _ in range(2)]  # three rows and columns for each of 3x4 cells
    yield "spatial_norm_forward", [f, *bordered, weight, bias, groups, eps, silu, f_bias, True]
    statistics = CPU_IMPLEMENTATIONS["add_bias_residual_statistics_"](f.clone(), f_bias * 0, None, groups, 64)
    yield "spatial_norm_forward", [*norm, groups, eps, silu, None, False, statistics]
    yield "spatial_norm_forward", [f, *(inputs.map(2, 64, 12, 16) for _ in range(2)), weight, bias, groups, eps, silu]
    _, mean, rstd = CPU_IMPLEMENTATIONS["spatial_norm_forward"](*norm, groups, eps, silu)
    yield "spatial_norm_backward", [dout, *norm, mean, rstd, groups, silu]
    yield from _clip_calls(f, dout, [inputs.map(2, 64, 4, 8) for _ in range(2)], weight, bias)
    # Accesses of 16 bytes, and of one element: neither 6 channels nor rows of 130 or 390 pixels are whole accesses.
    yield from _calls_for_each_cell(inputs, (1, 16, 4, 128), 2)
    yield from _calls_for_each_cell(inputs, (1, 6, 3, 130), 2)
    # A latent on the clip's own grid: a row of 6 pixels is not a whole number of accesses, a clip of 96 is.
    out, clip_and_latent = inputs.map(2, 64, 32, 6)[:, :, 16:], [inputs.map(2, 64, 16, 6) for _ in range(3)]
    yield "spatial_norm_into", [out, *clip_and_latent, weight, bias, groups, eps, silu, 4, 4, True]


def _clip_calls(f: Tensor, dout: Tensor, zq: list[Tensor], weight: Tensor, bias: Tensor) -> Iterator[Call]:
    """Yield calls for f as three frames and zq as two, the first apart, and for a result behind three other frames."""
    norm, clip = [f, *zq, weight, bias], [3, 2, True]
    yield "spatial_norm_forward", [*norm, 8, 1e-6, True, None, False, None, *clip]
    yield "spatial_norm_into", [torch.cat([f, f], dim=2)[:, :, f.shape[2] :], *norm, 8, 1e-6, True, *clip]
    _, mean, rstd = CPU_IMPLEMENTATIONS["spatial_norm_forward"](*norm, 8, 1e-6, True)
    yield "spatial_norm_backward", [dout, *norm, mean, rstd, 8, True, *clip]


def _calls_for_each_cell(inputs: _Inputs, shape: tuple[int, int, int, int], groups: int) -> Iterator[Call]:
    """Yield calls without zq, with cells of a few pixels, with larger cells, and with a single one: a kernel each in backward."""
    batch, channels, _, width = shape
    f, dout, weight, bias = inputs.map(*shape), inputs.map(*shape), inputs.tensor(channels), inputs.tensor(channels)
    for grid in (None, (2, width // 2), (1, 10), (1, 1)):
        zq = [inputs.map(batch, channels, *grid) if grid else None for _ in range(2)]
        norm = [f, *zq, weight, bias]
        yield "spatial_norm_forward", [*norm, groups, 1e-6, True]
        _, mean, rstd = CPU_IMPLEMENTATIONS["spatial_norm_forward"](*norm, groups, 1e-6, True)
        yield "spatial_norm_backward", [dout, *norm, mean, rstd, groups, True]


def _attention_calls(inputs: _Inputs) -> Iterator[Call]:
    for size in HEAD_SIZES:
        yield from _calls_of_head(inputs, size, ("attention", "shared_kv_attention"))


def _hopper_attention_calls(inputs: _Inputs) -> Iterator[Call]:
    for size in HOPPER_HEAD_SIZES:
        for name, arguments in _calls_of_head(inputs, size, ("shared_kv_attention",)):
            yield name, [*arguments, True]


def _chunked_attention_calls(inputs: _Inputs) -> Iterator[Call]:
    for name, arguments in _calls_of_head(inputs, HEAD_SIZES[0], ("attention", "shared_kv_attention")):
        yield f"chunked_{name}", arguments


def _calls_of_head(inputs: _Inputs, size: int, names: tuple[str, ...]) -> Iterator[Call]:
    q, dout = inputs.tensor(1, 1, 70, size), inputs.tensor(1, 1, 70, size)
    k, v = inputs.tensor(1, 1, 150, size), inputs.tensor(1, 1, 150, size)
    for name in names:
        keys_and_values = [k, v] if name == "attention" else [k]
        yield f"{name}_forward", [q, *keys_and_values, size**-0.5]
        out, lse = CPU_IMPLEMENTATIONS[f"{name}_forward"](q, *keys_and_values, size**-0.5)
        yield f"{name}_backward", [dout, q, *keys_and_values, out, lse, size**-0.5]


def _add_bias_residual_calls(inputs: _Inputs) -> Iterator[Call]:
    yield "add_bias_residual_", [inputs.map(2, 24, 6, 10), inputs.tensor(24), inputs.map(2, 24, 6, 10)]
    yield "add_bias_residual_statistics_", [inputs.map(2, 32, 6, 12), inputs.tensor(32), inputs.map(2, 32, 6, 12), 8, 24]


def _upsample_conv_calls(inputs: _Inputs) -> Iterator[Call]:
    weight, dfolded = inputs.map(72, 24, 3, 3), inputs.map(24, 72, 4, 4)
    for windows in (False, True):
        yield "fold_upsampling", [weight, windows]
    yield "fold_upsampling_backward", [dfolded, inputs.channels_last]
    yield "interleave_windows", [inputs.map(2, 4 * 24, 4, 36), inputs.tensor(24)]
    yield "interleave_windows_statistics", [inputs.map(2, 4 * 32, 4, 36), inputs.tensor(32), 8, 32]


CALLS: dict[str, Callable[[_Inputs], Iterator[Call]]] = {
    "spatial_norm": _spatial_norm_calls,
    "attention": _attention_calls,
    "hopper_attention": _hopper_attention_calls,
    "chunked_attention": _chunked_attention_calls,
    "add_bias_residual_": _add_bias_residual_calls,
    "upsample_conv": _upsample_conv_calls,
}
