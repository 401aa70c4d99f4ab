"""decode_tiled: its memory limit, its temporary files and its arguments. test_strips.py compares its images."""

import tempfile

import pytest
import torch
from models import circular, latents, make_decoder
from spies import record_calls
from tolerances import assert_close, relative_error

from movq_ext import MOVQ, decode_tiled
from movq_ext.model import strip_rows, strips
from movq_ext.ops import onednn

LITTLE, PLENTY = 350_000, 1 << 30  # bytes: several strips and files, one strip


@pytest.fixture
def files(monkeypatch):
    """The temporary files."""
    return record_calls(monkeypatch, tempfile, "TemporaryFile", lambda file, **_: file)


def test_little_memory_takes_strips_and_files(monkeypatch, files):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    spans = record_calls(monkeypatch, strips.Strips, "spans", lambda spans, *_: spans)
    decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert max(map(len, spans)) > 2 and files and all(file.closed for file in files)
    spans.clear(), files.clear()
    decode_tiled(decoder, z, zq, max_memory=PLENTY)
    assert max(map(len, spans)) == 1 and not files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_memory", [LITTLE, PLENTY])
def test_autocast(max_memory, dtype):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = z.to(dtype)  # of a convolution under autocast, z has 16 bits
        expected, out = decoder(z, zq), decode_tiled(decoder, z, zq, max_memory=max_memory)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert relative_error(out, expected) < 5e-2


def test_autocast_casts_a_weight_once_per_layer(monkeypatch):
    decoder, (z, zq) = make_decoder(), latents((40, 4))

    def dtypes_of(_, conv, out, x):
        return {(conv.packed if conv.weight is None else conv.weight).dtype, x.dtype}

    dtypes = record_calls(monkeypatch, onednn.Convolution, "add_to", dtypes_of)
    with torch.autocast("cpu", torch.bfloat16):
        decode_tiled(decoder, z.bfloat16(), zq, max_memory=LITTLE)
    assert dtypes == [{torch.bfloat16}] * len(dtypes)  # otherwise autocast would cast the weight for every strip


@pytest.mark.parametrize("name", ["mid.block_1.conv1", "up.1.upsample.conv", "conv_out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_of_another_dtype_raises_outside_autocast(name, dtype, in_strips):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    decoder.get_submodule(name).to(dtype)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="type"):
            decoder(z, zq)
        with pytest.raises(RuntimeError, match="type"):
            decode_tiled(decoder, z, zq, max_memory=LITTLE)


def test_float16_autocast_on_a_cpu_is_computed_in_float32():
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        out = decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert out.dtype == torch.float16
    assert relative_error(out, decoder.double()(z.double(), zq.double())) < 2**-11  # only the image is rounded


def test_files_are_closed_after_an_error(monkeypatch, files):
    decoder, (z, zq) = make_decoder(), latents((40, 4))
    original = strip_rows.haloed_rows

    def fail_late(*arguments):
        if files:
            raise OSError("disk full")
        return original(*arguments)

    monkeypatch.setattr(strip_rows, "haloed_rows", fail_late)
    with pytest.raises(OSError, match="disk full"):
        decode_tiled(decoder, z, zq, max_memory=LITTLE)
    assert files and all(file.closed for file in files)


def test_files_go_to_the_folder(tmp_path, monkeypatch):
    folders = record_calls(monkeypatch, tempfile, "TemporaryFile", lambda file, dir: dir)
    decode_tiled(make_decoder(), *latents((40, 4)), max_memory=LITTLE, folder=str(tmp_path))
    assert set(folders) == {str(tmp_path)}


def test_the_autoencoder_takes_max_memory():
    torch.manual_seed(0)
    ddconfig = dict(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=16,
                    z_channels=4, double_z=False)  # fmt: skip
    model = MOVQ(ddconfig, 16, 4).eval()
    quant = torch.randn(1, 4, 6, 5)
    assert_close(model.decode(quant, max_memory=LITTLE), model.decode(quant).double(), slack=5)


def test_invalid_arguments():
    decoder, (z, zq) = make_decoder(), latents((4, 6))
    with pytest.raises(
        ValueError, match=r"max_memory must be at least \d+ bytes \(1 MiB\) for z of shape \(2, 4, 4, 6\), got 1000"
    ):
        decode_tiled(decoder, z, zq, max_memory=1000)
    with pytest.raises(TypeError, match="max_memory must be an int, the number of bytes, got None"):
        decode_tiled(decoder, z, zq, max_memory=None)
    with pytest.raises(ValueError, match="zq must have shape"):
        decode_tiled(decoder, z, z, max_memory=PLENTY)
    with pytest.raises(ValueError, match="decoder must be in evaluation mode"):
        decode_tiled(make_decoder(dropout=0.1).train(), z, zq, max_memory=PLENTY)
    circular(decoder)
    with pytest.raises(TypeError, match=r"nn.Conv2d padded with zeros, got .*circular"):
        decode_tiled(decoder, z, zq, max_memory=PLENTY)
