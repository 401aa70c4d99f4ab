"""SpatialNorm's kernels: one list of cases, on the emulator everywhere and on the GPU where one is present."""

import emulator
import published
import pytest
import torch
from kernels.spatial_norm import Emulator, Gpu, case, is_channels_last
from tolerances import RELATIVE, relative_error

import movq_ext

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BACKENDS = {"emulator": Emulator, "gpu": Gpu}


def usable(name):
    if name == "emulator":
        return emulator.available()
    return torch.cuda.is_available() and movq_ext.build_info()["extension"] == "loaded"


@pytest.fixture(params=BACKENDS)
def backend(request):
    if not usable(request.param):
        pytest.skip("needs Linux and a host C++ compiler" if request.param == "emulator" else "needs a GPU and the extension")
    return BACKENDS[request.param]()


# (shape of f, groups, zq's height and width). `small` is what a sanitizer has time for.
SHAPES = {
    "small-whole-ratio": ((2, 32, 8, 16), 8, (2, 4)),
    "small-no-zq": ((1, 32, 8, 8), 32, None),
    "same-grid": ((1, 64, 4, 8), 4, (4, 8)),
    "one-pixel": ((2, 32, 1, 1), 8, (1, 1)),
    "one-value-a-group": ((1, 32, 1, 1), 32, None),
    "prime": ((1, 6, 7, 13), 2, (3, 5)),
    "three-channels-a-group": ((1, 96, 6, 8), 32, (3, 2)),
    "not-whole-ratio": ((1, 16, 12, 24), 4, (5, 7)),
    "thinned-zq": ((1, 16, 4, 8), 4, (9, 16)),
    "one-cell": ((1, 16, 24, 40), 2, (1, 1)),
    "long-rows": ((1, 4, 2, 4224), 2, (1, 70)),
    "one-column": ((1, 32, 67, 1), 8, (5, 1)),
    "wide-group": ((1, 1032, 2, 8), 2, (1, 2)),
    "one-group": ((3, 24, 5, 8), 1, (5, 1)),
}
LAYOUTS = ("nchw", "channels_last")
CASES = [pytest.param(*SHAPES[name], dtype, layout, offset, id=f"{name}-{str(dtype)[6:]}-{layout}{'-unaligned' * (offset > 0)}")
         for name in SHAPES for layout in LAYOUTS
         for dtype, offset in ((F32, 0), (BF16, 0), *(((F16, 0), (F16, 1)) if "small" in name or name == "prime" else ()))]


def float64(x):
    return None if x is None else x.double()


def expected_forward(c, groups, eps, silu):
    return published.spatial_norm(*map(float64, (c.f, c.zq_y, c.zq_b, c.weight, c.bias)), groups, eps, "silu" if silu else None)


def expected_backward(c, groups, eps, silu):
    inputs = [None if x is None else x.double().requires_grad_() for x in (c.f, c.zq_y, c.zq_b, c.weight, c.bias)]
    out = published.spatial_norm(*inputs, groups, eps, "silu" if silu else None)
    grads = iter(torch.autograd.grad(out, [x for x in inputs if x is not None], c.dout.double()))
    return [None if x is None else next(grads) for x in inputs]


def assert_close(actual, expected, slack=1.0):
    """Near the float64 result, where that may be all but zero too: then near in the scale of 1."""
    if float(expected.norm()) < 1e-6 * expected.numel() ** 0.5:
        assert float(actual.double().abs().max()) < 1e-2
        return
    error, allowed = relative_error(actual, expected), slack * RELATIVE[actual.dtype]
    assert error <= allowed, f"relative error {error:.2e} > {allowed:.2e} ({actual.dtype})"


@pytest.mark.parametrize("shape, groups, zq_size, dtype, layout, offset", CASES)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_forward_and_backward_are_the_published_formula(backend, shape, groups, zq_size, dtype, layout, offset, silu):
    c = case(shape, zq_size, dtype, layout, affine=dtype if silu else F32, offset=offset)
    out, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, 1e-6, silu)
    if out.shape[1] > 1 and out.shape[2:].numel() > 1:
        assert is_channels_last(out) == (layout == "channels_last")
    assert_close(out, expected_forward(c, groups, 1e-6, silu))
    grads = backend.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, groups, silu)
    for name, grad, expected in zip(("f", "zq_y", "zq_b", "weight", "bias"), grads, expected_backward(c, groups, 1e-6, silu)):
        assert (grad is None) == (expected is None)
        if grad is not None:
            assert grad.shape == expected.shape
            try:
                assert_close(grad, expected, slack=2.0)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}: {error}") from None
