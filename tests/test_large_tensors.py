"""Tensors of more than 2^32 elements.

The emulator runs the kernels' blocks for the last image (or the last queries) of such a tensor, on a window that holds only that
image: 32-bit arithmetic would access memory outside the window.
"""

import math

import published
import pytest
import torch
from kernels import attention, epilogue, spatial_norm, upsampling, usable
from kernels.spatial_norm import DTYPES
from models import DDCONFIG
from tolerances import assert_close

from movq_ext import MOVQ
from movq_ext.model.feature_maps import MapStore
from movq_ext.ops.upsampling import interleave_windows

needs_emulator = pytest.mark.skipif(not usable("emulator"), reason="needs Linux and a host C++ compiler")
BF16 = torch.bfloat16
SHAPE = (64, 64, 64)  # of an image
IMAGES = (1 << 32) // (64 * 64 * 64) + 1  # the last image starts at element 2^32
FORWARD = ("spatial_norm statistics", "spatial_norm merge_statistics", "spatial_norm modulate")
BACKWARD = (
    "spatial_norm sum_cell_per_thread", "spatial_norm sum_cell_per_team", "spatial_norm sum_cell_per_block",
    "spatial_norm sum_bands", "spatial_norm sum_pixel_ranges", "spatial_norm merge_sums", "spatial_norm write_input_gradient",
)  # fmt: skip
BACKWARDS = (
    "spatial_norm modulate",
    "spatial_norm write_input_gradient",
)  # these run their blocks from the last image to the first


def call_for_last_image(library, function, kernels, images, **arguments):
    """Call a function of a library with all arguments but run only the blocks of the last image."""
    dry = library.call(function, **arguments, run_blocks=dict.fromkeys(kernels, (0, 0)), seeds=(0,))
    grids = {launch.kernel: math.prod(launch.grid) for launch in dry.launches if launch.kernel in kernels}
    blocks = {}
    for kernel, grid in grids.items():
        assert grid % images == 0
        share = grid // images
        blocks[kernel] = (0, share) if kernel in BACKWARDS else (grid - share, grid)
    return library.call(function, **arguments, run_blocks=blocks, seeds=(0,))


@needs_emulator
@pytest.mark.parametrize(
    "layout, zq_size", [("nchw", (8, 8)), ("nchw", None), *(("channels_last", size) for size in ((8, 8), (2, 2), None))], ids=str
)
def test_spatial_norm(layout, zq_size):
    c = spatial_norm.case((1, *SHAPE), zq_size, BF16, layout)
    groups, library = 32, spatial_norm.library()
    problem = spatial_norm.problem(c.f, c.zq_y, c.weight, groups, silu=True, eps=1e-6)
    problem["batch"] = IMAGES
    mean, rstd = torch.zeros(IMAGES, groups), torch.zeros(IMAGES, groups)

    def windows(**tensors):
        return {name: (IMAGES - 1) * x.numel() for name, x in tensors.items() if x is not None}

    def run(function, kernels, tensors, **others):
        size = torch.zeros(1, dtype=torch.int64)
        arguments = dict(**problem, **tensors, **others, mean=mean, rstd=rstd, weight=c.weight, bias=c.bias, size=size)
        window = windows(**tensors)
        library.call(function, **arguments, workspace=None, windows=window, seeds=(0,))
        workspace = torch.zeros(int(size), dtype=torch.uint8)  # no blocks fill the other images' parts
        call_for_last_image(library, function, kernels, IMAGES, **arguments, workspace=workspace, windows=window)

    out = spatial_norm.poisoned(c.f)
    run(
        "forward",
        FORWARD,
        dict(f=c.f, zq_y=c.zq_y, zq_b=c.zq_b, out=out),
        f_bias=None,
        f_bias_dtype=0,
        bordered=False,
        statistics=None,
        parts=0,
        out_offset=0,
        out_image_stride=0,
        out_channel_stride=0,
    )
    inputs = [None if x is None else x.double().requires_grad_() for x in (c.f, c.zq_y, c.zq_b, c.weight, c.bias)]
    expected = published.spatial_norm(*inputs, groups, 1e-6, "silu")
    assert_close(out, expected)

    grads = [None if x is None else spatial_norm.poisoned(x) for x in (c.f, c.zq_y, c.zq_b)]
    tensors = dict(dout=c.dout, f=c.f, zq_y=c.zq_y, zq_b=c.zq_b, df=grads[0], dzq_y=grads[1], dzq_b=grads[2])
    dweight, dbias = spatial_norm.poisoned(c.weight), spatial_norm.poisoned(c.bias)
    run("backward", BACKWARD, tensors, dweight=dweight, dbias=dbias)
    wanted = [x for x in inputs if x is not None]
    actual = [x for x in (*grads, dweight, dbias) if x is not None]
    for gradient, exact in zip(actual, torch.autograd.grad(expected, wanted, c.dout.double()), strict=True):
        assert_close(gradient, exact, slack=20 if gradient.dtype == torch.float32 else 1)


@needs_emulator
@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_epilogue(layout, groups):
    c = spatial_norm.case((1, *SHAPE), None, BF16, layout)
    x, expected = (
        c.f.clone(memory_format=torch.preserve_format),
        (c.f.double() + c.bias[:, None, None].double() + c.dout.double()),
    )
    channels, height, width = SHAPE
    chunk = 512  # pixels
    parts = height * width // chunk * (1 if layout == "channels_last" else channels // 8)
    statistics = torch.full((8, parts, 4), float("nan")) if groups else None
    arguments = dict(batch=IMAGES, channels=channels, pixels=height * width, dtype=DTYPES.index(BF16), bias_dtype=0,
                     channels_last=layout == "channels_last", groups=groups, chunk_pixels=chunk, x=x, bias=c.bias,
                     residual=c.dout, statistics=statistics)  # fmt: skip
    start = (IMAGES - 1) * x.numel()
    windows = dict(x=start, residual=start) | (dict(statistics=(IMAGES - 1) * statistics.numel()) if groups else {})
    call_for_last_image(epilogue.library(), "add", ("epilogue add",), IMAGES, **arguments, windows=windows)
    assert_close(x, expected)
    if groups:
        part_means, m2, count, _ = statistics.double().unbind(2)
        size = channels * height * width // 8
        assert (count.sum(1) == size).all()
        means = (part_means * count).sum(1) / size
        variances = (m2 + count * (part_means - means[:, None]).square()).sum(1) / size
        values = x.double().reshape(8, size)
        torch.testing.assert_close(means, values.mean(1), rtol=0, atol=1e-6)
        torch.testing.assert_close(variances, values.var(1, correction=0), rtol=1e-5, atol=0)


@needs_emulator
def test_interleaving_of_windows():
    channels, height, width = 64, 32, 32  # of the small map; out has SHAPE
    windows = spatial_norm.case((1, 4 * channels, height + 1, width + 1), None, BF16, "channels_last").f
    out = upsampling.in_channels_last(1, *SHAPE, dtype=BF16)
    arguments = dict(batch=IMAGES, channels=channels, height=height, width=width, dtype=DTYPES.index(BF16), bias_dtype=0,
                     groups=0, chunk_columns=0, pixels=windows, bias=None, out=out, statistics=None)  # fmt: skip
    starts = dict(pixels=(IMAGES - 1) * windows.numel(), out=(IMAGES - 1) * out.numel())
    call_for_last_image(upsampling.library(), "interleave", ("interleave windows",), IMAGES, **arguments, windows=starts)
    assert torch.equal(out, interleave_windows(windows, None))


@needs_emulator
def test_attention():
    rows, keys, head_size = 64, 48, 512
    queries = (1 << 32) // head_size + rows  # the last tile of queries starts at element 2^32
    q, k, v, _ = attention.case(1, 1, rows, keys, head_size, BF16)
    out, lse = spatial_norm.poisoned(q), torch.full((rows,), torch.nan)
    size = torch.zeros(1, dtype=torch.int64)
    arguments = {
        **attention.with_strides(dict(q=q, k=k, v=v, out=out)),
        **dict(batch=1, heads=1, queries=queries, keys=keys, head_size=head_size, dtype=DTYPES.index(BF16), scale=0.1),
        **dict(lse=lse, bytes=size, multiprocessors=queries),  # so many that a block has one tile of scores
    }
    windows = dict(q=1 << 32, out=1 << 32, lse=queries - rows)
    library = attention.library()
    library.call("forward", **arguments, workspace=None, windows=windows, seeds=(0,))
    assert int(size) == 0  # no block leaves a partial result
    workspace, kernel = torch.zeros(1, dtype=torch.uint8), "attention forward"
    dry = library.call("forward", **arguments, workspace=workspace, windows=windows, seeds=(0,), run_blocks={kernel: (0, 0)})
    (grid,) = (launch.grid[0] for launch in dry.launches)
    tile = queries // grid
    blocks = {kernel: (grid - -(-rows // tile), grid)}
    library.call("forward", **arguments, workspace=workspace, windows=windows, seeds=(0,), run_blocks=blocks)
    scores = 0.1 * q.double() @ k.double().mT
    assert_close(out, scores.softmax(-1) @ v.double(), slack=2)
    assert_close(lse, scores.logsumexp(-1).flatten())


def test_a_map_in_a_file(tmp_path):
    """The file is sparse: only the written rows take disk space."""
    store = MapStore(torch.float32, torch.device("cpu"), budget=0, folder=str(tmp_path))
    with store:
        x = store.allocate(64, 1 << 14, 1 << 13)  # 2^33 values
        rows = torch.randn(1, 64, 2, 1 << 13)
        x.write((1 << 14) - 2, rows)
        assert torch.equal(x.read((1 << 14) - 2, 1 << 14), rows)


@pytest.mark.parametrize("method", ["decode_code", "encode_code"])
def test_shapes_on_the_meta_device(method):
    with torch.device("meta"):
        model = MOVQ({**DDCONFIG, "ch_mult": (1, 1, 1), "mid_attn": False}, 64, 4).eval()
        side = 1 << 15  # 2^30 pixels of 32 channels
        codes = torch.zeros(1, side // 4, side // 4, dtype=torch.uint16)
        image = torch.zeros(1, 3, side, side)
    out = model.decode_code(codes) if method == "decode_code" else model.encode_code(image)
    assert out.shape == ((1, 3, side, side) if method == "decode_code" else (1, side // 4, side // 4))
