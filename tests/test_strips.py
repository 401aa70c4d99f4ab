"""A decode in strips must match the layers called one by one, on whole maps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CASES,
    adapted,
    circular,
    hooked,
    hooked_norm,
    larger,
    latents,
    make_decoder,
    other_norm,
    patched,
    quantised,
)
from spies import KeepTensors, record_calls
from tolerances import assert_close, relative_error
from torch import nn

from movq_ext import ResnetBlock, decode_tiled
from movq_ext.model import strips
from movq_ext.model.feature_maps import MapStore
from movq_ext.model.map_rows import StoredRows
from movq_ext.model.working_memory import WorkingMemory
from movq_ext.ops.onednn import Convolution
from movq_ext.ops.winograd import WinogradConvolution

pytestmark = pytest.mark.usefixtures("in_strips")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
LITTLE, SOME, PLENTY = 350_000, 1_000_000, 1 << 30  # bytes: several strips and files, several strips, one strip


def decode(decoder, z, zq, max_memory):
    """Decode in strips: with max_memory as decode_tiled does, without it as the decoder does on a CPU."""
    if max_memory is not None:
        return decode_tiled(decoder, z, zq, max_memory=max_memory)
    with torch.no_grad():
        return decoder(z, zq)


@pytest.fixture
def spans(monkeypatch):
    """Return the strips of every layer that ran in strips."""
    return record_calls(monkeypatch, strips.Strips, "spans", lambda spans, *_: spans)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid, max_memory", [((32, 64), None), ((46, 63), None), ((32, 64), 128 << 20)])
def test_wide_layers_take_a_winograd_convolution(monkeypatch, grid, max_memory, dtype):
    blocks = record_calls(monkeypatch, WinogradConvolution, "_write_block", lambda result, convolution, out, *_: tuple(out.shape))
    decoder = make_decoder(ch=128, ch_mult=(1,), attn_resolutions=[], mid_attn=False)
    z, zq = latents(grid, 1)
    expected = copy.deepcopy(decoder).double().requires_grad_()(z.double(), zq.double())  # layer by layer
    out = decode(decoder.to(dtype), z.to(dtype), zq.to(dtype), max_memory)
    assert_close(out, expected, slack=2)
    assert {shape[-1] for shape in blocks} == {128} and len(blocks) >= 8  # all convolutions of four blocks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_memory", [LITTLE, SOME, PLENTY, None])
@pytest.mark.parametrize("name", CASES)
def test_strips_match_whole_maps(spans, name, max_memory, device):
    changes, grid, zq_grid = CASES[name]
    decoder = make_decoder(**changes).to(device)
    z, zq = latents(grid, zq_grid=zq_grid, device=device)
    expected = decoder(z, zq)  # with gradients: layer by layer
    assert expected.requires_grad and not spans
    out = decode(decoder, z, zq, max_memory)
    assert out.is_contiguous() and not out.requires_grad
    assert spans or (device == "cuda" and max_memory is None)
    assert_close(out, expected.double(), slack=5)


@pytest.mark.parametrize("max_memory", [LITTLE, None])
@pytest.mark.parametrize("channels", [(64, 32), (64, 64), (32, 64)])
def test_3x3_shortcuts(max_memory, channels):
    decoder, (z, zq) = make_decoder(), latents((6, 4))
    blocks = decoder.up[0].block
    blocks[0] = ResnetBlock(in_channels=64, out_channels=channels[1], conv_shortcut=True, zq_ch=5)
    blocks[1] = ResnetBlock(in_channels=channels[1], out_channels=32, conv_shortcut=channels[0] == 64, zq_ch=5)
    assert_close(decode(decoder, z, zq, max_memory), decoder(z, zq).double(), slack=5)


def patched_block(decoder):
    plain = decoder.up[0].block[0].forward
    decoder.up[0].block[0].forward = lambda x, zq: 2 * plain(x, zq=zq)


def patched_inside(decoder):
    """As add-ons for seamless textures do."""
    layer = decoder.up[0].block[0].conv2
    layer._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


@pytest.mark.parametrize(
    "change", [circular, adapted, patched, patched_inside, larger, hooked, other_norm, hooked_norm, patched_block, quantised]
)
def test_a_modified_decoder_runs_layer_by_layer(spans, change):
    decoder, (z, zq) = make_decoder(), latents((6, 4))
    before = decoder(z, zq)
    change(decoder)
    expected = decoder(z, zq)
    assert relative_error(expected, before) > 1e-3
    assert_close(decode(decoder, z, zq, None), expected.double(), slack=5)
    assert not spans


def patched_in_float16(decoder):
    patched(decoder.half())


@pytest.mark.parametrize("change", [adapted, patched, hooked, patched_in_float16])
def test_modified_convolutions_are_called_once_per_strip(spans, change):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    change(decoder)
    z, zq = (x.to(decoder.conv_in.weight.dtype) for x in (z, zq))
    assert_close(decode_tiled(decoder, z, zq, max_memory=2 * LITTLE), decoder(z, zq).double(), slack=5)
    assert max(map(len, spans)) > 1


def test_tensors_kept_by_hooks_are_not_overwritten():
    decoder, (z, zq), hook = make_decoder(), latents((40, 4)), KeepTensors()
    decoder.up[0].block[0].conv2.register_forward_hook(hook)
    decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert len(hook.kept) > 4 and all(torch.equal(a, b) for a, b in zip(hook.kept, hook.copies, strict=True))


def test_a_global_hook_sees_every_layers_output(spans):
    decoder, (z, zq), seen = make_decoder(), latents((6, 4)), {}

    def keep(layer, inputs, out):
        seen[layer] = out, out.clone()

    handle = nn.modules.module.register_module_forward_hook(keep)
    try:
        decode(decoder, z, zq, None)
    finally:
        handle.remove()
    assert not spans and decoder.up[0].block[0].conv2 in seen
    assert all(torch.equal(*pair) for pair in seen.values())


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-11), (torch.bfloat16, 5e-2)])
def test_other_dtypes(dtype, limit):
    decoder = make_decoder().to(dtype)
    z, zq = latents((6, 4), dtype=dtype)
    exact = make_decoder().double()(z.double(), zq.double())
    for max_memory in (2 * LITTLE, None):
        out = decode(decoder, z, zq, max_memory)
        assert out.dtype == dtype
        assert relative_error(out, exact) < limit


def test_float16_on_a_cpu_is_computed_in_float32():
    decoder, (z, zq) = make_decoder().half(), latents((6, 4), dtype=torch.float16)
    exact = copy.deepcopy(decoder).double()(z.double(), zq.double())
    for max_memory in (2 * LITTLE, None):
        out = decode(decoder, z, zq, max_memory)
        assert out.dtype == torch.float16
        assert relative_error(out, exact) < 2**-11  # only the image is rounded to float16
    assert {p.dtype for p in decoder.parameters()} == {torch.float16}


@pytest.mark.parametrize("onednn", [True, False])
def test_weights_are_packed_only_with_onednn(monkeypatch, onednn):
    decoder, (z, zq) = make_decoder(), latents((6, 4))
    packed = record_calls(monkeypatch, Convolution, "__init__", lambda _, conv, *args, **kwargs: conv.packed is not None)
    with torch.backends.mkldnn.flags(enabled=onednn):
        assert_close(decode(decoder, z, zq, None), decoder(z, zq).double(), slack=5)
    assert packed and any(packed) == (onednn and torch.backends.mkldnn.is_available())
    convolutions = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    upsamplings = sum(hasattr(layer, "with_conv") for layer in decoder.layers())
    assert len(packed) == len(z) * (len(convolutions) + upsamplings)  # each once; those of upsamplings in two parts


def test_pointwise_convolutions_are_matrix_products(monkeypatch):
    """PyTorch's 1x1 convolution of float32 is slower in one thread."""
    called = record_calls(monkeypatch, F, "conv2d", lambda _, x, weight, *args, **kwargs: weight.shape[2:])
    products = record_calls(monkeypatch, torch, "addmm", lambda _, bias, x, *args, **kwargs: x.shape[1])
    decoder, (z, zq) = make_decoder(), latents((6, 4))
    decode_tiled(decoder, z, zq, max_memory=PLENTY)
    shortcuts, attention = (sum(hasattr(block, name) for block in decoder.layers()) for name in ("nin_shortcut", "proj_out"))
    assert shortcuts and attention and (1, 1) not in called
    products = [channels for channels in products if channels != zq.shape[1]]  # the others modulate norms
    assert len(products) == len(z) * (shortcuts + 4 * attention)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    zq_grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
    add_conv=st.booleans(),
)
def test_any_latent_size(grid, zq_grid, batch, add_conv):
    decoder = make_decoder(ch_mult=(1, 1), num_res_blocks=0, add_conv=add_conv)
    z, zq = latents(grid, batch, zq_grid=zq_grid)
    # Groups of one or two values have almost no variance: the norm divides by it, which magnifies rounding errors.
    assert_close(decode(decoder, z, zq, None), decoder(z, zq).double(), slack=20 if grid[0] * grid[1] > 4 else 1e4)


def runner(strip_bytes=1 << 20, budget=None):
    store, zq = MapStore(torch.float32, torch.device("cpu"), budget), latents((4, 6), batch=1)[1]
    return strips.Strips(store, zq, WorkingMemory(strip_bytes, maps=budget))


@pytest.mark.parametrize("strip_bytes", [1, 4_400, 7_000, 1 << 30])
@pytest.mark.parametrize("height", [1, 5, 8, 37])
def test_spans_cover_every_row_once_within_strip_bytes(strip_bytes, height):
    run, values, row_bytes = runner(strip_bytes, budget=1 << 30), 20, 20 * 6 * 4
    spans = run.spans(run.store.allocate(8, height, 6), values)
    assert [row for first, last in spans for row in range(first, last)] == list(range(height))
    rows, *others = (last - first for first, last in spans)
    assert rows == 1 or (rows + 2) * row_bytes <= strip_bytes
    if others:
        assert rows.bit_count() == 1 and set(others[:-1]) <= {rows} and others[-1] <= rows
        assert (2 * rows + 2) * row_bytes > strip_bytes


def test_strips_without_a_limit_have_at_least_four_rows():
    """So that wide maps are neither normalised twice nor convolved directly."""
    run = runner(strip_bytes=1)
    assert run.spans(run.store.allocate(8, 10, 6), 20) == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("max_memory, rows", [(512 << 20, 4), (90 << 20, 1)])
def test_strips_of_wide_maps_have_four_rows_if_memory_allows(spans, max_memory, rows):
    decoder = make_decoder(ch=128, ch_mult=(1,), attn_resolutions=[], mid_attn=False)
    decode(decoder, *latents((6, 4096), 1), max_memory)
    assert min(last - first for strips in spans for first, last in strips[:-1]) == rows


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 0])
def test_a_layer_releases_all_maps_but_its_output(budget):
    decoder, run = make_decoder(), runner(budget=budget)
    decoder.up[0].block[0] = ResnetBlock(in_channels=64, out_channels=32, conv_shortcut=True, zq_ch=5)  # not in place
    x = run.store_input(latents((4, 6), batch=1)[0])
    x = run.convolve(StoredRows(x), decoder.conv_in)
    for step in decoder.steps():
        x = run.run_layer(step.layer, x)
        files, used = len(run.store._files), run.store._used
        assert files == (2 if budget == 0 else 0)  # the latent and this map
        assert used == (0 if budget == 0 else 4 * 4 * 4 * 6 + x.storage.values.nbytes)
