"""An encode in strips must match the layers called one by one, on whole maps."""

import tempfile

import numpy as np
import pytest
import torch
from models import SMALL_MOVQ, Trebled, scaled
from PIL import Image
from spies import record_calls
from tolerances import assert_close, relative_error
from torch import nn

from movq_ext import MOVQ, Encoder, encode_tiled, save_pretrained
from movq_ext.cli import main
from movq_ext.io.codes import CodeFile
from movq_ext.model import strips
from movq_ext.model.feature_maps import FeatureMap, MapStore
from movq_ext.model.working_memory import WorkingMemory

TINY = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=16, z_channels=4)
LITTLE, SOME, PLENTY = 350_000, 1_000_000, 1 << 30  # bytes: several strips and files, several strips, one strip
CASES = {
    "default": ({}, (40, 12)),
    "odd sizes": ({}, (37, 13)),
    "three levels, odd sizes": (dict(ch_mult=(1, 2, 2), num_res_blocks=2), (43, 15)),
    "sizes of 4n + 3 and 4n + 1": (dict(ch_mult=(1, 1, 1)), (47, 9)),
    "mean instead of convolution": (dict(resamp_with_conv=False), (35, 9)),
    "attention on every level": (dict(attn_resolutions=[8, 16]), (24, 6)),
    "no attention": (dict(attn_resolutions=[], mid_attn=False), (40, 12)),
    "one level": (dict(ch_mult=(1,)), (21, 5)),
    "for a KL model": (dict(double_z=True), (12, 12)),
    "one row of latents": ({}, (2, 14)),
}


def make_encoder(**changes):
    torch.manual_seed(0)
    encoder = Encoder(**{**TINY, **changes})
    for module in encoder.modules():  # published inits leave norm weights at one, which hides mistakes
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return encoder.eval()


def images(height=40, width=12, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.fixture
def spans(monkeypatch):
    """The strips of every layer."""
    return record_calls(monkeypatch, strips.Strips, "spans", lambda spans, *_: spans)


@pytest.fixture
def files(monkeypatch):
    """The temporary files."""
    return record_calls(monkeypatch, tempfile, "TemporaryFile", lambda file, **_: file)


@pytest.mark.parametrize("max_memory", [LITTLE, SOME, PLENTY])
@pytest.mark.parametrize("name", CASES)
def test_strips_match_whole_maps(name, max_memory):
    changes, size = CASES[name]
    encoder, x = make_encoder(**changes), images(*size)
    expected = encoder(x)
    out = encode_tiled(encoder, x, max_memory=max_memory)
    assert out.is_contiguous() and not out.requires_grad
    assert_close(out, expected.double(), slack=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_memory", [SOME, PLENTY])
def test_strips_match_whole_maps_on_a_gpu(max_memory):
    encoder, x = make_encoder().cuda(), images(37, 13).cuda()
    assert_close(encode_tiled(encoder, x, max_memory=max_memory), encoder(x).double(), slack=5)


def test_little_memory_takes_strips_and_files(spans, files, tmp_path, monkeypatch):
    torch.set_num_threads(1)  # each thread would have a strip of its own
    encoder, x = make_encoder(), images(160, 12)
    encode_tiled(encoder, x, max_memory=LITTLE)
    assert max(map(len, spans)) > 2 and files and all(file.closed for file in files)
    spans.clear(), files.clear()
    encode_tiled(encoder, x, max_memory=PLENTY)
    assert max(map(len, spans)) == 1 and not files
    folders = record_calls(monkeypatch, tempfile, "TemporaryFile", lambda file, dir: dir)
    encode_tiled(encoder, x, max_memory=LITTLE, folder=str(tmp_path))
    assert set(folders) == {str(tmp_path)}


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-11), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_other_dtypes(dtype, limit):
    out = encode_tiled(make_encoder().to(dtype), images(dtype=dtype), max_memory=2 * LITTLE)
    assert out.dtype == dtype
    assert relative_error(out, make_encoder().double()(images(dtype=dtype).double())) < limit


def test_autocast():
    encoder, x = make_encoder(), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, out = encoder(x), encode_tiled(encoder, x, max_memory=LITTLE)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert relative_error(out, expected) < 5e-2


def adapted(encoder):
    encoder.down[0].block[0].conv2 = scaled(encoder.down[0].block[0].conv2)
    encoder.mid.attn_1.v = scaled(encoder.mid.attn_1.v)


def hooked(encoder):
    encoder.down[0].downsample.conv.register_forward_hook(lambda layer, inputs, out: 2 * out)


def patched(encoder):
    plain = encoder.down[0].downsample.conv.forward
    encoder.down[0].downsample.conv.forward = lambda x: 2 * plain(x)


@pytest.mark.parametrize("change", [adapted, hooked, patched])
def test_modified_convolutions_are_called_once_per_strip(spans, change):
    encoder, x = make_encoder(), images()
    before = encoder(x)
    change(encoder)
    assert relative_error(encoder(x), before) > 1e-3
    assert_close(encode_tiled(encoder, x, max_memory=LITTLE), encoder(x).double(), slack=5)
    assert max(map(len, spans)) > 2


def circular(encoder):
    encoder.down[0].block[0].conv1.padding_mode = "circular"


def larger(encoder):
    encoder.down[0].downsample.conv = nn.Conv2d(32, 32, 5, stride=2, padding=1)


def other_norm(encoder):
    encoder.down[0].block[0].norm2.__class__ = Trebled


def hooked_norm(encoder):
    encoder.norm_out.register_forward_hook(lambda layer, inputs, out: 2 * out)


def unknown_layer(encoder):
    encoder.mid.block_1 = nn.Identity()


REFUSED = {
    circular: r"encoder's convolutions must be 3x3 nn.Conv2d padded with zeros, got .*circular.* in down.0.block.0",
    larger: r"encoder's convolutions must be 3x3 nn.Conv2d .* got .*\(5, 5\).* in down.0.downsample",
    other_norm: r"encoder's norms must be unmodified GroupNorm or SpatialNorm, got Trebled.* in down.0.block.0",
    hooked_norm: r"encoder's norms must be unmodified GroupNorm or SpatialNorm, got GroupNorm.* in the encoder",
    unknown_layer: r"encoder's layers must be ResnetBlock, AttnBlock or Downsample, got Identity",
}


@pytest.mark.parametrize("change", REFUSED)
def test_unsupported_layers_are_refused(change):
    encoder = make_encoder()
    change(encoder)
    with pytest.raises(TypeError, match=f"(?s){REFUSED[change]}"):
        encode_tiled(encoder, images(), max_memory=PLENTY)


def test_invalid_arguments():
    encoder, x = make_encoder(), images()
    needed = r"max_memory must be at least \d+ bytes \(1 MiB\) for x of shape \(2, 3, 40, 12\), got 1000"
    with pytest.raises(ValueError, match=needed):
        encode_tiled(encoder, x, max_memory=1000)
    with pytest.raises(TypeError, match="max_memory must be an int, the number of bytes, got '1'"):
        encode_tiled(encoder, x, max_memory="1")
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, height, width\)"):
        encode_tiled(encoder, x[:, :2], max_memory=PLENTY)
    with pytest.raises(ValueError, match=r"encoder must be in evaluation mode: call encoder.eval\(\) first"):
        encode_tiled(make_encoder(dropout=0.1).train(), x, max_memory=PLENTY)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MOVQ({**SMALL_MOVQ["ddconfig"], "num_res_blocks": 1}, 64, 4).eval()
    nn.init.normal_(model.quantize.embedding.weight)
    return model


def test_the_autoencoder_takes_max_memory(model, spans):
    x = images(64, 16, batch=1)
    with torch.inference_mode():
        assert_close(model.encode(x, max_memory=LITTLE), model.encode(x).double(), slack=5)
        assert torch.equal(model.encode_code(x, max_memory=LITTLE), model.encode_code(x))
    assert max(map(len, spans)) > 2


def test_the_command_line_takes_max_memory(model, spans, tmp_path):
    save_pretrained(model, tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")

    def encode(out, *options):
        arguments = [tmp_path / "a.png", "-o", tmp_path / out, "--model", tmp_path / "model", "--device", "cpu", *options]
        return main(["encode", *map(str, arguments)])

    assert encode("whole.safetensors") == 0 and not spans
    assert encode("strips.safetensors", "--max-memory", "350000") == 0 and max(map(len, spans)) > 2
    whole, in_strips = (CodeFile.load(tmp_path / f"{name}.safetensors").codes for name in ("whole", "strips"))
    assert whole.keys() == in_strips.keys() and all(torch.equal(whole[name], in_strips[name]) for name in whole)
    assert encode("none.safetensors", "--max-memory", "1K") == 1


def test_the_image_is_copied_in_strips(monkeypatch):
    rows = record_calls(monkeypatch, FeatureMap, "reserve", lambda buffer, *_: buffer.shape[2])
    with MapStore(torch.float32, torch.device("cpu"), budget=0) as store:
        image = images(height=64, batch=1)
        x = strips.Strips(store, None, WorkingMemory(4096, maps=1 << 30)).store_input(image)
        assert torch.equal(x.read(0, 64), image)
    assert sum(rows) == 64 and max(rows) < 10


def test_no_gradient_is_recorded_with_max_memory():
    model, x = MOVQ(**SMALL_MOVQ).eval(), images()
    assert model.encode(x).requires_grad and not model.encode(x, max_memory=PLENTY).requires_grad
