"""Decoding in strips, as decode_tiled does and every decode on a CPU without gradients, gives what the layers give one by one."""

import copy
import tempfile

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, adapted, circular, hooked, latents, make_decoder, patched, quantised
from tolerances import assert_close, relative_error
from torch import nn

from movq_ext import MOVQ, ResnetBlock, decode_tiled
from movq_ext.model import feature_maps, strips

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
LITTLE, SOME, PLENTY = 350_000, 1_000_000, 1 << 30


def decode(decoder, z, zq, max_memory):
    if max_memory is not None:
        return decode_tiled(decoder, z, zq, max_memory=max_memory)
    with torch.no_grad():
        return decoder(z, zq)


@pytest.fixture
def spans(monkeypatch):
    """The strips of every layer that runs in strips."""
    seen, plain = [], strips.Strips._spans
    monkeypatch.setattr(strips.Strips, "_spans", lambda *a: (seen.append(list(plain(*a))), iter(seen[-1]))[1])
    return seen


@pytest.fixture
def files(monkeypatch):
    """The temporary files."""
    seen, plain = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **k: (seen.append(plain(**k)), seen[-1])[1])
    return seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_memory", [LITTLE, SOME, PLENTY, None])
@pytest.mark.parametrize("name", CASES)
def test_strips_are_the_whole(spans, name, max_memory, device):
    changes, grid, zq_grid = CASES[name]
    decoder = make_decoder(**changes).to(device)
    z, zq = latents(grid, zq_grid=zq_grid, device=device)
    wanted = decoder(z, zq)  # with gradients: layer by layer
    assert wanted.requires_grad and not spans
    out = decode(decoder, z, zq, max_memory)
    assert out.is_contiguous() and not out.requires_grad
    assert spans or (device == "cuda" and max_memory is None)
    assert_close(out, wanted.double(), slack=5)


def test_there_are_strips_and_files(spans, files):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert max(map(len, spans)) > 2 and files and all(file.closed for file in files)
    spans.clear(), files.clear()
    decode_tiled(decoder, z, zq, max_memory=PLENTY)
    assert max(map(len, spans)) == 1 and not files


@pytest.mark.parametrize("max_memory", [LITTLE, None])
@pytest.mark.parametrize("channels", [(64, 32), (64, 64), (32, 64)])
def test_shortcuts_by_3x3_convolutions(max_memory, channels):
    decoder, (z, zq) = make_decoder(), latents((6, 4))
    blocks = decoder.up[0].block
    blocks[0] = ResnetBlock(in_channels=64, out_channels=channels[1], conv_shortcut=True, zq_ch=5)
    blocks[1] = ResnetBlock(in_channels=channels[1], out_channels=32, conv_shortcut=channels[0] == 64, zq_ch=5)
    assert_close(decode(decoder, z, zq, max_memory), decoder(z, zq).double(), slack=5)


def patched_block(decoder):
    plain = decoder.up[0].block[0].forward
    decoder.up[0].block[0].forward = lambda x, zq: 2 * plain(x, zq=zq)


def patched_inside(decoder):
    """As add-ons for seamless pictures do it."""
    layer = decoder.up[0].block[0].conv2
    layer._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def larger(decoder):
    torch.manual_seed(1)
    decoder.up[1].upsample.conv = nn.Conv2d(64, 64, 5, padding=2)


class Trebled(nn.GroupNorm):
    def forward(self, x):
        return 3 * super().forward(x)


def other_norm(decoder):
    decoder.up[0].block[0].norm2.norm_layer.__class__ = Trebled


def hooked_norm(decoder):
    decoder.up[0].block[0].norm2.norm_layer.register_forward_hook(lambda layer, inputs, out: 2 * out)


@pytest.mark.parametrize(
    "change", [circular, adapted, patched, patched_inside, larger, hooked, other_norm, hooked_norm, patched_block, quantised]
)
def test_a_decoder_that_somebody_changed_is_called_layer_by_layer(spans, change):
    decoder, (z, zq) = make_decoder(), latents((6, 4))
    before = decoder(z, zq)
    change(decoder)
    wanted = decoder(z, zq)
    assert relative_error(wanted, before) > 1e-3
    assert_close(decode(decoder, z, zq, None), wanted.double(), slack=5)
    assert not spans


@pytest.mark.parametrize("change", [adapted, patched, hooked, lambda decoder: patched(decoder.half())])
def test_convolutions_that_somebody_changed_are_called_in_strips(change):
    decoder, (z, zq) = make_decoder(), latents((6, 4))
    change(decoder)
    z, zq = (x.to(decoder.conv_in.weight.dtype) for x in (z, zq))
    assert_close(decode_tiled(decoder, z, zq, max_memory=2 * LITTLE), decoder(z, zq).double(), slack=5)


def test_what_hooks_keep_is_left_alone(spans):
    decoder, (z, zq), seen, kept = make_decoder(), latents((40, 4)), [], []
    conv = decoder.up[0].block[0].conv2
    conv.register_forward_hook(
        lambda layer, inputs, out: (seen.extend((inputs[0], out)), kept.extend((inputs[0].clone(), out.clone())))[2:] or None
    )
    decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert len(seen) > 4 and all(torch.equal(a, b) for a, b in zip(seen, kept, strict=True))


def test_a_hook_on_all_modules_sees_what_they_made(spans):
    decoder, (z, zq), seen = make_decoder(), latents((6, 4)), {}
    handle = nn.modules.module.register_module_forward_hook(lambda layer, inputs, out: seen.update({layer: (out, out.clone())}))
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
        assert relative_error(out, exact) < 2**-11  # one rounding, of the image
    assert {p.dtype for p in decoder.parameters()} == {torch.float16}


@pytest.mark.parametrize("max_memory", [LITTLE, PLENTY])
def test_autocast(max_memory):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted, out = decoder(z, zq), decode_tiled(decoder, z, zq, max_memory=max_memory)
    assert relative_error(out, wanted) < 5e-2


def test_a_circular_convolution_of_the_latent_is_refused():
    decoder, (z, zq) = make_decoder(add_conv=True), latents((6, 4))
    decoder.up[0].block[0].norm1.conv.padding_mode = "circular"
    with pytest.raises(TypeError, match=r"padded with zeros, got .*circular.* in up.0.block.0.norm1"):
        decode_tiled(decoder, z, zq, max_memory=PLENTY)
    assert_close(decode(decoder, z, zq, None), decoder(z, zq).double(), slack=5)


@pytest.mark.parametrize("onednn", [True, False])
def test_without_onednn(monkeypatch, onednn):
    packed, decoder, (z, zq) = [], make_decoder(), latents((6, 4))
    pack = strips.Convolution.__init__
    monkeypatch.setattr(
        strips.Convolution, "__init__", lambda self, *a: (pack(self, *a), packed.append(self.packed is not None))[2:] or None
    )
    with torch.backends.mkldnn.flags(enabled=onednn):
        assert_close(decode(decoder, z, zq, None), decoder(z, zq).double(), slack=5)
    assert any(packed) == (onednn and torch.backends.mkldnn.is_available())


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
    # one pixel: every group has one or two values, and the norm divides by what little they differ
    assert_close(decode(decoder, z, zq, None), decoder(z, zq).double(), slack=20 if grid[0] * grid[1] > 4 else 1e4)


def test_statistics_of_strips_with_a_large_mean():
    x = torch.randn(1, 8, 40, 30) + 4096
    moments = feature_maps.Moments()
    for strip in x.split([1, 30, 2, 7], dim=2):
        moments.add(strip)
    mean, rstd = moments.of_groups(4, 1e-6)
    grouped = x.double().reshape(4, -1)
    wanted = (grouped.var(1, correction=0) + 1e-6).rsqrt()
    torch.testing.assert_close(mean[::2], grouped.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd[::2], wanted, rtol=1e-5, atol=0)


def test_files_are_closed_when_it_fails(monkeypatch, files):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    plain = strips.Strips._haloed

    def fails_late(*arguments):
        if files:
            raise OSError("disk full")
        return plain(*arguments)

    monkeypatch.setattr(strips.Strips, "_haloed", fails_late)
    with pytest.raises(OSError, match="disk full"):
        decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert files and all(file.closed for file in files)


def test_the_whole_model_takes_max_memory():
    torch.manual_seed(0)
    ddconfig = dict(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=16,
                    z_channels=4, double_z=False)  # fmt: skip
    model = MOVQ(ddconfig, 16, 4).eval()
    quant = torch.randn(1, 4, 6, 5)
    assert_close(model.decode(quant, max_memory=LITTLE), model.decode(quant).double(), slack=5)


def test_it_refuses():
    decoder, (z, zq) = make_decoder(), latents((4, 6))
    with pytest.raises(
        ValueError, match=r"max_memory must be at least \d+ bytes \(1 MiB\) for z of shape \(2, 4, 4, 6\), got 1000"
    ):
        decode_tiled(decoder, z, zq, max_memory=1000)
    with pytest.raises(ValueError, match="zq must have shape"):
        decode_tiled(decoder, z, z, max_memory=PLENTY)
    with pytest.raises(ValueError, match="decoder must be in evaluation mode"):
        decode_tiled(make_decoder(dropout=0.1).train(), z, zq, max_memory=PLENTY)
    for change, message in (
        (circular, r"nn.Conv2d padded with zeros, got .*circular"),
        (quantised, r"nn.Conv2d padded with zeros, got Sequential"),
        (larger, r"3x3 nn.Conv2d .* got .*\(5, 5\).* in up.1.upsample"),
        (other_norm, r"nn.GroupNorm as it is, got Trebled"),
        (hooked_norm, r"nn.GroupNorm as it is"),
        (lambda decoder: setattr(decoder.mid, "block_1", nn.Identity()), r"takes ResnetBlock, .* got Identity"),
    ):
        changed = make_decoder()
        change(changed)
        with pytest.raises(TypeError, match=message):
            decode_tiled(changed, z, zq, max_memory=PLENTY)
