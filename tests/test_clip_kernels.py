"""The kernels of SpatialNorm on clips: each row of f finds its row of zq, and the result may go behind other frames."""

import pytest
import torch
from clip_cases import formula
from kernels import backends
from kernels.spatial_norm import IMAGE, Clip, Emulator, Gpu, case, is_channels_last
from tolerances import RELATIVE, relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = ("nchw", "channels_last")
backend = backends(emulator=Emulator, gpu=Gpu)

# Batch and channels, groups; T, H and W of f; t, h and w of zq, or None; whether the first frame is apart.
CLIPS = {
    "nine-of-three": ((2, 16), 2, (9, 4, 8), (3, 2, 4), True),
    "even-frames": ((2, 16), 4, (8, 4, 8), (2, 2, 4), False),
    "not-whole": ((1, 16), 4, (7, 4, 16), (3, 3, 5), True),
    "not-whole-times": ((1, 8), 1, (5, 4, 8), (3, 2, 2), False),
    "only-frames-differ": ((1, 16), 2, (5, 2, 8), (3, 2, 8), True),
    "same-grid": ((2, 16), 2, (3, 2, 8), (3, 2, 8), True),
    "same-grid-odd-rows": ((2, 16), 2, (4, 4, 6), (4, 4, 6), True),
    "one-frame": ((2, 16), 4, (1, 4, 8), (1, 2, 4), True),
    "one-frame-of-two": ((1, 16), 4, (1, 4, 8), (2, 2, 4), True),
    "one-latent-frame": ((1, 16), 4, (5, 4, 8), (1, 2, 4), True),
    "thinned-time": ((1, 16), 4, (3, 4, 8), (5, 2, 4), True),
    "wide-cells": ((1, 8), 2, (3, 4, 264), (2, 2, 3), True),
    "one-element-accesses": ((2, 6), 2, (5, 3, 7), (2, 2, 3), True),
    "one-row-frames": ((1, 8), 2, (4, 1, 16), (2, 1, 8), False),
    "large-cells": ((1, 16), 2, (5, 16, 16), (2, 2, 2), True),
    "no-zq": ((2, 16), 2, (3, 4, 8), None, False),
}
CASES = [
    pytest.param(name, dtype, layout, offset, id=f"{name}-{str(dtype)[6:]}-{layout}{'-unaligned' * offset}")
    for name in CLIPS
    for layout in LAYOUTS
    for dtype, offset in ((F32, 0), (BF16, 0), *(((F16, 0), (F16, 1)) if name in ("nine-of-three", "no-zq") else ()))
]


def clip_case(name, dtype, layout, offset=0):
    """Return the inputs of the kernels, where frames are adjacent rows, the number of groups, and the clip."""
    (batch, channels), groups, (frames, height, width), zq_size, split = CLIPS[name]
    clip = Clip(frames, *((zq_size[0], split) if zq_size else (1, False)))
    zq_map = zq_size and (zq_size[0] * zq_size[1], zq_size[2])
    return case((batch, channels, frames * height, width), zq_map, dtype, layout, offset=offset), groups, clip


def expected_forward(c, groups, clip, silu, inputs=None):
    f, y, b, weight, bias = inputs or (None if x is None else x.double() for x in (c.f, c.zq_y, c.zq_b, c.weight, c.bias))
    f = f.unflatten(2, (clip.frames, -1))
    if y is None:
        norm = torch.nn.functional.group_norm(f, groups, weight, bias, 1e-6)
        out = torch.nn.functional.silu(norm) if silu else norm
    else:
        y, b = (zq.unflatten(2, (clip.latent_frames, -1)) for zq in (y, b))
        activation = "silu" if silu else None
        out = formula(f, y, b, weight, bias, groups, activation=activation, split_first_frame=clip.split_first_frame)
    return out.flatten(2, 3)


def assert_close(name, actual, expected, slack=1.0):
    """Compare relative to the norm, and to 1 where gradients cancel: of cells that nothing reads, and of one frame's f."""
    actual, allowed = actual.double(), slack * RELATIVE[actual.dtype]
    if float(expected.norm()) < 1e-6 * expected.numel() ** 0.5:
        assert float(actual.abs().max()) < 1e-2, name
    else:
        error = relative_error(actual, expected)
        assert error <= allowed, f"{name}: relative error {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("name, dtype, layout, offset", CASES)
def test_forward_and_backward_of_a_clip(backend, name, dtype, layout, offset):
    c, groups, clip = clip_case(name, dtype, layout, offset)
    silu = len(name) % 2 == 0
    out, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, 1e-6, silu, clip=clip)
    inputs = [None if x is None else x.double().requires_grad_() for x in (c.f, c.zq_y, c.zq_b, c.weight, c.bias)]
    expected = expected_forward(c, groups, clip, silu, inputs)
    assert_close("out", out, expected.detach())
    grads = backend.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, groups, silu, clip=clip)
    wanted = iter(torch.autograd.grad(expected, [x for x in inputs if x is not None], c.dout.double()))
    for label, x, grad in zip(("f", "zq_y", "zq_b", "weight", "bias"), inputs, grads, strict=True):
        assert (grad is None) == (x is None)
        if grad is not None:
            assert_close(f"gradient of {label}", grad, next(wanted), slack=2.0)


@pytest.mark.parametrize("name, dtype, layout, offset", CASES)
def test_the_result_goes_behind_other_frames(backend, name, dtype, layout, offset):
    c, groups, clip = clip_case(name, dtype, layout, offset)
    padding_rows = 2 * c.f.shape[2] // clip.frames
    arguments = c.f, c.zq_y, c.zq_b, c.weight, c.bias, groups, 1e-6, True
    padded, *_ = backend.forward(*arguments, clip=clip, padding_rows=padding_rows)
    assert is_channels_last(padded) == (layout == "channels_last")
    assert padded[:, :, :padding_rows].isnan().all()
    assert_close("out", padded[:, :, padding_rows:], expected_forward(c, groups, clip, True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clip_of_one_frame_has_the_bits_of_an_image(backend, layout):
    c = case((2, 16, 8, 16), (2, 4), BF16, layout)
    results = []
    for clip in (IMAGE, Clip(1, 1, True)):
        out, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 4, 1e-6, True, clip=clip)
        grads = backend.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, 4, True, clip=clip)
        results.append([out, mean, rstd, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_pass_repeats_the_latent(backend, layout):
    """9 frames of 32x32 read 3 of 4x4: no pass repeats zq, whose gradient is written once."""
    if not isinstance(backend, Emulator):
        pytest.skip("counts memory accesses")
    c, clip = case((1, 16, 9 * 32, 32), (3 * 4, 4), BF16, layout), Clip(9, 3, True)
    backend.seeds = (0,)
    _, mean, rstd = backend.forward(c.f, c.zq_y, c.zq_b, c.weight, c.bias, 2, 1e-6, True, clip=clip)
    size = c.f.numel() * c.f.element_size()
    assert backend.cost.buffers["f"].read_bytes == 2 * size and backend.cost.buffers["out"].written_bytes == size
    for name in ("zq_y", "zq_b"):
        assert backend.cost.buffers[name].read_bytes <= size / 2  # one access serves at least two rows
    backend.backward(c.dout, c.f, c.zq_y, c.zq_b, c.weight, c.bias, mean, rstd, 2, True, clip=clip)
    for name in ("f", "dout"):
        assert backend.cost.buffers[name].read_bytes == 2 * size
    assert backend.cost.buffers["dzq_y"].written_bytes == c.zq_y.numel() * c.zq_y.element_size()
