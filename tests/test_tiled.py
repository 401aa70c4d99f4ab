"""Decoding in strips gives what decoding whole gives."""

import tempfile

import pytest
import torch
from test_decoder import latents, make
from tolerances import assert_close, relative_error

from movq_ext import MOVQ, ResnetBlock, decode_tiled, maps, strips

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
LITTLE, SOME, PLENTY = 350_000, 1_000_000, 1 << 30
CASES = {
    "as it is": ({}, (4, 6), None),
    "odd grid, another grid of zq": ({}, (5, 3), (7, 2)),
    "one row": ({}, (1, 9), (1, 2)),
    "add_conv": (dict(add_conv=True), (6, 4), (3, 3)),
    "give_pre_end": (dict(give_pre_end=True), (4, 4), None),
    "three levels, no convolution after upsampling": (dict(ch_mult=(1, 2, 2), resamp_with_conv=False), (4, 4), None),
    "attention on every level": (dict(attn_resolutions=[8, 16]), (6, 4), None),
    "from files": ({}, (40, 4), None),
    "no attention": (dict(attn_resolutions=[], mid_attn=False), (6, 4), None),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_memory", [LITTLE, SOME, PLENTY])
@pytest.mark.parametrize("name", CASES)
def test_strips_are_the_whole(name, max_memory, device):
    changes, grid, zq_grid = CASES[name]
    decoder = make(**changes).to(device)
    z, zq = latents(grid, zq_grid=zq_grid, device=device)
    with torch.no_grad():
        wanted = decoder(z, zq)
    out = decode_tiled(decoder, z, zq, max_memory=max_memory)
    assert out.is_contiguous() and not out.requires_grad
    assert_close(out, wanted.double(), slack=5)


def test_there_are_strips_and_files(monkeypatch):
    decoder, (z, zq) = make(), latents((40, 4))
    spans, files = [], []
    plain = strips.Strips._spans
    monkeypatch.setattr(strips.Strips, "_spans", lambda *a: (spans.append(list(plain(*a))), iter(spans[-1]))[1])
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda real=tempfile.TemporaryFile, **k: (files.append(real(**k)), files[-1])[1])
    decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert max(map(len, spans)) > 2 and files and all(file.closed for file in files)
    spans.clear(), files.clear()
    decode_tiled(decoder, z, zq, max_memory=PLENTY)
    assert max(map(len, spans)) == 1 and not files


def test_shortcuts_by_3x3_convolutions():
    decoder, (z, zq) = make(), latents((6, 4))
    decoder.up[0].block[0] = ResnetBlock(in_channels=64, out_channels=32, conv_shortcut=True, zq_ch=5)
    with torch.no_grad():
        assert_close(decode_tiled(decoder, z, zq, max_memory=LITTLE), decoder(z, zq).double(), slack=5)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-11), (torch.bfloat16, 5e-2)])
def test_other_dtypes(dtype, limit):
    decoder = make().to(dtype)
    z, zq = latents((6, 4), dtype=dtype)
    out = decode_tiled(decoder, z, zq, max_memory=2 * LITTLE)
    assert out.dtype == dtype
    with torch.no_grad():
        exact = make().double()(z.double(), zq.double()) if dtype == torch.bfloat16 else decoder(z, zq)
    assert relative_error(out, exact) < limit


@pytest.mark.parametrize("max_memory", [LITTLE, PLENTY])
def test_autocast(max_memory):
    decoder, (z, zq) = make(), latents((40, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted, out = decoder(z, zq), decode_tiled(decoder, z, zq, max_memory=max_memory)
    assert relative_error(out, wanted) < 5e-2


def test_statistics_of_strips_with_a_large_mean():
    x = torch.randn(1, 8, 40, 30) + 4096
    moments = maps.Moments()
    for strip in x.split([1, 30, 2, 7], dim=2):
        moments.add(strip)
    mean, rstd = moments.of_groups(4, 1e-6)
    grouped = x.double().reshape(4, -1)
    wanted = (grouped.var(1, correction=0) + 1e-6).rsqrt()
    torch.testing.assert_close(mean[::2], grouped.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd[::2], wanted, rtol=1e-5, atol=0)


def test_files_are_closed_when_it_fails(monkeypatch):
    decoder, (z, zq) = make(), latents((40, 4))
    files, plain = [], strips.Strips._convolved_rows

    def fails_late(*arguments):
        if files:
            raise OSError("disk full")
        return plain(*arguments)

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda real=tempfile.TemporaryFile, **k: (files.append(real(**k)), files[-1])[1])
    monkeypatch.setattr(strips.Strips, "_convolved_rows", fails_late)
    with pytest.raises(OSError, match="disk full"):
        decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert files and all(file.closed for file in files)


def test_the_whole_model_takes_max_memory():
    torch.manual_seed(0)
    model = MOVQ(dict(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=16, z_channels=4,
                      double_z=False), 16, 4).eval()
    quant = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        assert_close(model.decode(quant, max_memory=LITTLE), model.decode(quant).double(), slack=5)


def test_it_refuses():
    decoder, (z, zq) = make(), latents((4, 6))
    with pytest.raises(ValueError, match=r"max_memory must be at least \d+ bytes \(1 MiB\) for z of shape \(2, 4, 4, 6\), got 1000"):
        decode_tiled(decoder, z, zq, max_memory=1000)
    with pytest.raises(ValueError, match="zq must have shape"):
        decode_tiled(decoder, z, z, max_memory=PLENTY)
    with pytest.raises(ValueError, match="decoder must be in evaluation mode"):
        decode_tiled(make(dropout=0.1).train(), z, zq, max_memory=PLENTY)
