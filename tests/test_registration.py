"""The compiled operators as PyTorch knows them: schemas, and implementations for CPU tensors and for shapes alone."""

import published
import pytest
import torch
from clip_cases import formula
from operators import (
    CLIP,
    DEVICES,
    GROUPS,
    LAYOUTS,
    attention_arguments,
    detached,
    epilogue_arguments,
    needs_extension,
    norm_arguments,
    shared_kv_arguments,
)
from tolerances import assert_close

from movq_ext.ops import cuda, registration

EPS = 1e-6


def in_double(tensors):
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def gradients(out, inputs, dout):
    """The gradient of every input, None for one that is None."""
    grads = iter(torch.autograd.grad(out, [x for x in inputs if x is not None], dout.double()))
    return [None if x is None else next(grads) for x in inputs]


# --- CPU implementations, in Python: they need no extension


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("zq_size", [(2, 4), (3, 5), None])
@pytest.mark.parametrize("affine", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spatial_norm_on_a_cpu_is_the_published_formula(dtype, affine, zq_size, silu, layout):
    inputs, dout = norm_arguments(dtype, layout, zq_size, affine)
    exact, f = in_double(inputs), inputs[0]
    expected = published.spatial_norm(*exact, GROUPS, EPS, "silu" if silu else None)
    out, mean, rstd = registration.spatial_norm_forward_cpu(*detached(inputs), GROUPS, EPS, silu)
    assert_close(out, expected)
    grouped = exact[0].detach().reshape(2, GROUPS, -1)
    assert_close(mean, grouped.mean(2))
    assert_close(rstd, (grouped.var(2, correction=0) + EPS).rsqrt())
    grads = registration.spatial_norm_backward_cpu(dout, *detached(inputs), mean, rstd, GROUPS, silu)
    for x, grad, want in zip(inputs, grads, gradients(expected, exact, dout), strict=True):
        if x is None:
            assert grad.numel() == 0
        else:
            assert grad.dtype == x.dtype
            assert_close(grad, want, slack=2.0)
    assert all(x.stride() == f.stride() for x in (out, grads[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clip", [CLIP, (4, 4, False), (2, 1, True), (1, 2, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_spatial_norm_of_a_clip_on_a_cpu_is_the_formula(dtype, clip, layout):
    inputs, dout = norm_arguments(dtype, layout, (4, 3))
    f, y, b, weight, bias = exact = in_double(inputs)
    frames = [x.unflatten(2, (many, -1)) for x, many in ((f, clip[0]), (y, clip[1]), (b, clip[1]))]
    expected = formula(*frames, weight, bias, GROUPS, EPS, "silu", clip[2]).flatten(2, 3)
    out, mean, rstd = registration.spatial_norm_forward_cpu(*detached(inputs), GROUPS, EPS, True, None, False, None, *clip)
    assert_close(out, expected)
    written = torch.full_like(out, 7)
    registration.spatial_norm_into_cpu(written, *detached(inputs), GROUPS, EPS, True, *clip)
    assert torch.equal(written, out)
    grads = registration.spatial_norm_backward_cpu(dout, *detached(inputs), mean, rstd, GROUPS, True, *clip)
    for grad, want in zip(grads, gradients(expected, exact, dout), strict=True):
        assert_close(grad, want, slack=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, arguments", [("attention", attention_arguments), ("shared_kv_attention", shared_kv_arguments)])
def test_attention_on_a_cpu_is_the_formula(name, arguments, dtype):
    inputs, dout = arguments(dtype)
    exact = in_double(inputs)
    q, k, v = (*exact, exact[-1])[:3]  # v is k where keys and values are shared
    scores = 0.2 * q @ k.mT
    expected = scores.softmax(3) @ v
    out, lse = getattr(registration, f"{name}_forward_cpu")(*detached(inputs), 0.2)
    assert_close(out, expected)
    assert_close(lse, scores.logsumexp(3))
    grads = getattr(registration, f"{name}_backward_cpu")(dout, *detached(inputs), out, lse, 0.2)
    for x, grad, want in zip(inputs, grads, gradients(expected, exact, dout), strict=True):
        assert grad.dtype == x.dtype
        assert_close(grad, want, slack=2.0)


def described(results):
    return [(x.shape, x.stride(), x.dtype) for x in results]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zq_size", [(2, 4), None])
def test_fake_norms_have_the_layouts_of_real_ones(zq_size, layout):
    inputs, dout = norm_arguments(layout=layout, zq_size=zq_size)
    forward = *detached(inputs), GROUPS, EPS, True
    real = registration.spatial_norm_forward_cpu(*forward)
    assert described(registration.spatial_norm_forward_fake(*forward)) == described(real)
    _, mean, rstd = real
    backward = dout, *detached(inputs), mean, rstd, GROUPS, True
    real = registration.spatial_norm_backward_cpu(*backward)
    assert described(registration.spatial_norm_backward_fake(*backward)) == described(real)


def test_fake_attention_has_the_layouts_of_real_attention():
    inputs, dout = attention_arguments()
    real = registration.attention_forward_cpu(*inputs, 0.2)
    assert described(registration.attention_forward_fake(*inputs, 0.2)) == described(real)
    backward = dout, *inputs, *real, 0.2
    real = registration.attention_backward_cpu(*backward)
    assert described(registration.attention_backward_fake(*backward)) == described(real)


def test_fake_shared_kv_attention_has_the_layouts_of_the_real_one():
    inputs, dout = shared_kv_arguments()
    for hopper in ([], [True]):
        real = registration.shared_kv_attention_forward_cpu(*inputs, 0.2, *hopper)
        assert described(registration.shared_kv_attention_forward_fake(*inputs, 0.2, *hopper)) == described(real)
        backward = dout, *inputs, *real, 0.2, *hopper
        real = registration.shared_kv_attention_backward_cpu(*backward)
        assert described(registration.shared_kv_attention_backward_fake(*backward)) == described(real)


# --- Registered operators


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype, affine", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, None)]
)
@pytest.mark.parametrize("zq_size", [(2, 4), None])
def test_opcheck_of_spatial_norm(device, layout, dtype, affine, zq_size):
    inputs, dout = norm_arguments(dtype, layout, zq_size, affine, device)
    inputs = detached(inputs)
    forward, backward = torch.ops.movq_ext.spatial_norm_forward.default, torch.ops.movq_ext.spatial_norm_backward.default
    torch.library.opcheck(forward, (*inputs, GROUPS, EPS, True))
    torch.library.opcheck(forward, (*inputs, GROUPS, EPS, True, torch.ones(32, device=device)))
    _, mean, rstd = forward(*inputs, GROUPS, EPS, True)
    torch.library.opcheck(backward, (dout, *inputs, mean, rstd, GROUPS, True))


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_clips(device, dtype, layout):
    inputs, dout = norm_arguments(dtype, layout, device=device)
    inputs = detached(inputs)
    operators = torch.ops.movq_ext
    names = dict(zip(("frames", "latent_frames", "split_first_frame"), CLIP, strict=True))
    torch.library.opcheck(operators.spatial_norm_forward.default, (*inputs, GROUPS, EPS, True), names)
    _, mean, rstd = operators.spatial_norm_forward(*inputs, GROUPS, EPS, True, **names)
    torch.library.opcheck(operators.spatial_norm_backward.default, (dout, *inputs, mean, rstd, GROUPS, True), names)
    padded = torch.zeros_like(torch.cat([inputs[0]] * 2, dim=2))
    for out in (torch.zeros_like(inputs[0]), padded[:, :, 8:]):
        torch.library.opcheck(operators.spatial_norm_into.default, (out, *inputs, GROUPS, EPS, True, *CLIP))


@needs_extension
def test_opcheck_of_a_bordered_latent():
    """Each cell of 4x4 pixels has three rows and columns; the last arguments may be given by name."""
    f, y, b, weight, bias = detached(norm_arguments(zq_size=(6, 9))[0])
    operator = torch.ops.movq_ext.spatial_norm_forward.default
    torch.library.opcheck(operator, (f, y, b, weight, bias, GROUPS, EPS, True), {"f_bias": torch.ones(32), "bordered": True})


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 20])
def test_opcheck_of_attention(device, dtype, size):
    inputs, dout = attention_arguments(dtype, size, device)
    inputs = detached(inputs)
    forward, backward = torch.ops.movq_ext.attention_forward.default, torch.ops.movq_ext.attention_backward.default
    torch.library.opcheck(forward, (*inputs, 0.2))
    out, lse = forward(*inputs, 0.2)
    torch.library.opcheck(backward, (dout, *inputs, out, lse, 0.2))


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 20])
def test_opcheck_of_shared_kv_attention(device, dtype, size):
    inputs, dout = shared_kv_arguments(dtype, size, device)
    inputs = detached(inputs)
    operators = torch.ops.movq_ext
    for hopper in ([], [True]):
        torch.library.opcheck(operators.shared_kv_attention_forward.default, (*inputs, 0.2, *hopper))
        out, lse = operators.shared_kv_attention_forward(*inputs, 0.2, *hopper)
        torch.library.opcheck(operators.shared_kv_attention_backward.default, (dout, *inputs, out, lse, 0.2, *hopper))


@needs_extension
@pytest.mark.parametrize("name", ["shared_kv_attention_forward", "shared_kv_attention_backward"])
def test_the_hopper_kernels_must_be_asked_for(name):
    """A program that was exported before there were any has one argument less."""
    last = getattr(torch.ops.movq_ext, name).default._schema.arguments[-1]
    assert (last.name, str(last.type), last.default_value) == ("hopper", "bool", False)


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_of_the_epilogue(device, layout, dtype):
    x, bias, residual = epilogue_arguments(dtype, layout, dtype if dtype == torch.float16 else torch.float32, device)
    operator = torch.ops.movq_ext.add_bias_residual_.default
    for b, r in ((bias, residual), (bias, None), (None, residual)):
        torch.library.opcheck(operator, (x.clone(), b, r))


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_of_statistics(device, layout, dtype):
    x, bias, residual = epilogue_arguments(dtype, layout, device=device)
    operators = torch.ops.movq_ext
    for b, r, groups, chunk in ((bias, residual, GROUPS, 40), (None, residual, 1, 8), (bias, None, 4, 1000)):
        torch.library.opcheck(operators.add_bias_residual_statistics_.default, (x.clone(), b, r, groups, chunk))
    statistics = operators.add_bias_residual_statistics_(x, bias, None, GROUPS, 40)
    norm = operators.spatial_norm_forward.default
    torch.library.opcheck(norm, (x, None, None, bias, None, GROUPS, EPS, True), {"statistics": statistics})
    windows = torch.randn(2, 4 * 32, 4, 5, device=device, dtype=dtype)
    torch.library.opcheck(operators.interleave_windows_statistics.default, (windows, bias, GROUPS, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_statistics_have_the_shapes_of_real_ones(layout):
    x, bias, residual = epilogue_arguments(layout=layout)
    for groups, chunk in ((GROUPS, 40), (1, 8), (4, 1000)):
        given = bias, residual, groups, chunk
        real = registration.add_bias_residual_statistics_cpu(x.clone(), *given)
        assert described([registration.add_bias_residual_statistics_fake(x, *given)]) == described([real])
        mean, m2, count, _ = real.double().unbind(3)
        values = (x + bias[:, None, None] + residual).double().reshape(2, groups, -1)
        total = (mean * count).sum(2) / count.sum(2)
        assert_close(total.float(), values.mean(2))
        assert_close(((m2 + count * (mean - total[:, :, None]) ** 2).sum(2) / count.sum(2)).float(), values.var(2, correction=0))
    windows = torch.randn(2, 4 * 32, 4, 6)
    real = registration.interleave_windows_statistics_cpu(windows, bias, GROUPS, 4)
    assert described(registration.interleave_windows_statistics_fake(windows, bias, GROUPS, 4)) == described(real)


@needs_extension
def test_statistics_must_be_asked_for():
    """A program that was exported before there were any has one argument less."""
    arguments = {argument.name: argument for argument in torch.ops.movq_ext.spatial_norm_forward.default._schema.arguments}
    assert str(arguments["statistics"].type) == "Optional[Tensor]" and arguments["statistics"].default_value is None


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_epilogue_rounds_once(device, layout):
    x, bias, residual = epilogue_arguments(torch.bfloat16, layout, device=device)
    expected = (x.float() + bias[:, None, None] + residual.float()).bfloat16()
    assert cuda.add_bias_residual_(x, bias, residual) is x
    assert torch.equal(x, expected)


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_of_upsampling(device, layout, dtype):
    torch.manual_seed(0)
    weight = torch.randn(16, 24, 3, 3, device=device, dtype=dtype).contiguous(memory_format=layout)
    windows = torch.randn(2, 4 * 16, 4, 5, device=device, dtype=dtype).contiguous(memory_format=layout)
    operators = torch.ops.movq_ext
    for to_windows in (False, True):
        torch.library.opcheck(operators.fold_upsampling.default, (weight, to_windows))
    dfolded = operators.fold_upsampling(weight)
    torch.library.opcheck(operators.fold_upsampling_backward.default, (dfolded, layout == torch.channels_last))
    for bias in (torch.zeros(16, device=device), None):
        torch.library.opcheck(operators.interleave_windows.default, (windows, bias))
