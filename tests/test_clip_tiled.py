"""decode_clip_tiled against diffusers' decode: results, its memory limit, its temporary files and its arguments."""

import tempfile

import pytest
import torch
from accelerated_models import diffusers
from models import PeakBytes
from spies import record_calls
from tolerances import RELATIVE, assert_close, relative_error
from torch import nn
from video_models import cogvideox, latent

from movq_ext import accelerate, decode_clip_tiled
from movq_ext.diffusers import clip_strips, clip_tiled
from movq_ext.model.working_memory import WorkingMemory
from movq_ext.ops import cpu_upsampling, upsampling
from movq_ext.ops.moments import Moments

F64 = torch.float64
SIZE, LITTLE = (5, 3), 440_000  # of float64 maps: 20 rows of 12 pixels in strips of one row
PLENTY = 1 << 30


@pytest.fixture
def files(monkeypatch):
    """The temporary files."""
    return record_calls(monkeypatch, tempfile, "TemporaryFile", lambda file, **_: file)


def decode(model, z):
    with torch.no_grad():
        return model.decode(z).sample


def scaled(limit, dtype):
    """A limit for the dtype that maps have."""
    return limit * (4 if dtype == torch.float16 else dtype.itemsize) // F64.itemsize


@pytest.mark.parametrize("max_memory", [LITTLE, 2 * LITTLE, PLENTY])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7])
def test_it_equals_the_whole_decode(frames, max_memory):
    """One frame, and odd and even numbers of them in one or several batches; strips of one row, of some, and of all."""
    model, z = cogvideox().double(), latent(frames, size=SIZE, batch=2, dtype=F64)
    assert_close(decode_clip_tiled(model, z, max_memory=max_memory), decode(model, z))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_other_batches_of_frames(size):
    model, z = cogvideox().double(), latent(7, size=SIZE, dtype=F64)
    model.num_latent_frames_batch_size = size
    assert_close(decode_clip_tiled(model, z, max_memory=2 * LITTLE), decode(model, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [1, 5])
def test_it_is_as_exact_as_diffusers(frames, dtype):
    model, z = cogvideox().to(dtype), latent(frames, size=SIZE, dtype=dtype)
    theirs, out = decode(model, z), decode_clip_tiled(model, z, max_memory=scaled(LITTLE, dtype))
    expected = decode(model.double(), z.double())
    assert out.dtype == dtype
    assert relative_error(out, expected) < 1.5 * relative_error(theirs, expected) + RELATIVE[torch.float32]


def test_the_model_may_be_accelerated():
    model, z = cogvideox(), latent(5, size=SIZE)
    expected = decode_clip_tiled(model, z, max_memory=PLENTY)
    accelerate(model)
    model.enable_tiling(), model.enable_slicing()
    assert torch.equal(decode_clip_tiled(model, z, max_memory=PLENTY), expected)


def test_a_change_of_widths_inside_a_block():
    changes = dict(block_out_channels=(8, 16, 24), norm_num_groups=4, layers_per_block=0)
    model, z = cogvideox(**changes).double(), latent(4, size=SIZE, dtype=F64)
    assert_close(decode_clip_tiled(model, z, max_memory=2 * LITTLE), decode(model, z))


def test_little_memory_takes_strips_and_files(monkeypatch, files):
    spans = record_calls(monkeypatch, WorkingMemory, "spans", lambda spans, *_: spans)
    model, z = cogvideox().double(), latent(5, size=SIZE, dtype=F64)
    decode_clip_tiled(model, z, max_memory=LITTLE)
    assert max(map(len, spans)) == 4 * SIZE[0] and files and all(file.closed for file in files)
    spans.clear(), files.clear()
    decode_clip_tiled(model, z, max_memory=PLENTY)
    assert max(map(len, spans)) == 1 and not files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_peak_memory(dtype):
    """Beyond the clips, it stays below the limit; a whole decode takes more, accelerated or not."""
    model, z, limit = cogvideox().to(dtype), latent(5, size=(24, 12), batch=2, dtype=dtype), (3 << 20) * dtype.itemsize // 4
    peaks = []
    for run in (lambda: decode_clip_tiled(model, z, max_memory=limit), lambda: model.decode(z), lambda: model.decode(z)):
        with PeakBytes(model) as memory:
            run()
        peaks.append(memory.peak)
        if len(peaks) == 2:
            accelerate(model)
    clips = dtype.itemsize * 2 * 3 * 17 * (4 * 24) * (4 * 12)
    assert peaks[0] < limit + clips < min(peaks[1:]) / 2


def test_float16_is_computed_in_float32_on_a_cpu():
    model, z = cogvideox().half(), latent(5, size=SIZE, dtype=torch.float16)
    out = decode_clip_tiled(model, z, max_memory=PLENTY)
    assert model.decoder.conv_in.conv.weight.dtype == torch.float16
    assert torch.equal(out, decode_clip_tiled(model.float(), z.float(), max_memory=PLENTY).half())


def test_autocast_is_ignored():
    model, z = cogvideox(), latent(5, size=SIZE)
    expected = decode_clip_tiled(model, z, max_memory=PLENTY)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode_clip_tiled(model, z, max_memory=PLENTY), expected)


def test_frames_for_the_next_batch_have_no_moments(monkeypatch):
    """No norm reads them."""
    model, z = cogvideox(), latent(4, size=SIZE)
    added = record_calls(monkeypatch, Moments, "add", lambda *_: None)
    decode_clip_tiled(model, z, max_memory=PLENTY)
    convolutions = sum(isinstance(m, nn.Conv3d) and m.kernel_size[0] == 3 for m in model.decoder.modules()) - 1
    assert len(added) == 2 * (convolutions + 2)  # two batches, of one strip; conv_out has none, upsamplers do


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_strips_take_few_operations_more_than_the_whole(monkeypatch, frames):
    """Repeated first frames are not convolved here either: the first frame takes one tap and the second two."""
    made = record_calls(monkeypatch, clip_strips.CausalConvolution, "__init__", lambda _, self, *args, **kwargs: self)
    decode_clip_tiled(cogvideox(), latent(frames, size=SIZE), max_memory=PLENTY)
    assert len(made) == sum(isinstance(m, nn.Conv3d) and m.kernel_size[0] == 3 for m in cogvideox().decoder.modules())
    for convolution in made:
        convolved = sum(tap.frames for tap in convolution.taps)
        assert convolved == max(1, 3 * convolution.frames - 3), convolution.frames
        assert convolution.frames > 1 or frames == 1


def test_upsampling_weights_are_folded_once_for_all_strips(monkeypatch):
    folded = []
    for module in (cpu_upsampling, upsampling):
        record_calls(monkeypatch, module, "fold_upsampling", lambda out, weight: folded.append(weight))
    model = cogvideox()
    decode_clip_tiled(model, latent(5, size=SIZE), max_memory=scaled(LITTLE, torch.float32))  # strips of one row
    weights = [upsampler.conv.weight for upsampler in clip_strips.upsamplers(model.decoder)]
    assert list(map(id, folded)) == 2 * list(map(id, weights))  # for two batches


def test_files_are_closed_after_an_error(monkeypatch, files):
    original = clip_strips.ClipStrips.convolve

    def fail_late(*args, **kwargs):
        if files:
            raise OSError("disk full")
        return original(*args, **kwargs)

    monkeypatch.setattr(clip_strips.ClipStrips, "convolve", fail_late)
    with pytest.raises(OSError, match="disk full"):
        decode_clip_tiled(cogvideox().double(), latent(3, size=SIZE, dtype=F64), max_memory=LITTLE)
    assert files and all(file.closed for file in files)


def test_files_go_to_the_folder(tmp_path, monkeypatch):
    folders = record_calls(monkeypatch, tempfile, "TemporaryFile", lambda file, dir: dir)
    decode_clip_tiled(cogvideox().double(), latent(3, size=SIZE, dtype=F64), max_memory=LITTLE, folder=str(tmp_path))
    assert set(folders) == {str(tmp_path)}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("frames", [*range(1, 12)])
def test_frame_batches_are_those_of_diffusers(frames, size):
    model, seen = cogvideox(), []
    model.decoder = nn.Module()
    model.decoder.forward = lambda z, conv_cache: (seen.append((int(z[0, 0, 0, 0, 0]), int(z[0, 0, -1, 0, 0]) + 1)) or z, None)
    model.num_latent_frames_batch_size = size
    decode(model, torch.arange(float(frames)).view(1, 1, -1, 1, 1))
    assert clip_tiled.frame_batches(frames, size) == seen


def test_invalid_arguments():
    model, z = cogvideox(), latent(3)
    for bad, error, message in (
        (z[0], ValueError, r"z must have shape \(B, 4, frames, height, width\), not empty, got \(4, 3, 3, 2\)"),
        (z[:, :3], ValueError, r"z must have shape \(B, 4, frames, height, width\), not empty, got \(1, 3, 3, 3, 2\)"),
        (z[:, :, :0], ValueError, r"z must have shape .* not empty, got \(1, 4, 0, 3, 2\)"),
        (z.half(), TypeError, "z must have the model's dtype torch.float32, got torch.float16"),
        (z.to("meta"), ValueError, "z must be on the model's device cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            decode_clip_tiled(model, bad, max_memory=PLENTY)
    with pytest.raises(ValueError, match=r"max_memory must be at least \d+ bytes \(1 MiB\) for z of shape .*, got 1000"):
        decode_clip_tiled(model, z, max_memory=1000)
    for bad, got in ((None, "None"), ("1", "'1'"), (True, "True"), (1e9, "1000000000.0")):
        with pytest.raises(TypeError, match=f"max_memory must be an int, the number of bytes, got {got}"):
            decode_clip_tiled(model, z, max_memory=bad)
    with pytest.raises(TypeError, match="vae must be diffusers' AutoencoderKLCogVideoX, got AutoencoderKL"):
        decode_clip_tiled(diffusers.AutoencoderKL(), z, max_memory=PLENTY)
    model.train().decoder.mid_block.resnets[0].dropout.p = 0.5
    with pytest.raises(ValueError, match="vae must be in evaluation mode"):
        decode_clip_tiled(model, z, max_memory=PLENTY)


@pytest.mark.parametrize(
    "path", ["conv_in.conv", "mid_block.resnets.0", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.0.norm1.conv_y.conv"]
)
def test_hooked_layers_are_refused(path):
    """They would see strips."""
    model = cogvideox()
    model.decoder.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"vae must have .* unmodified, got decoder\..*: it.* is .*hooked"):
        decode_clip_tiled(model, latent(3), max_memory=PLENTY)


def change_class(module):
    """Make the module an instance of a subclass of its class, which doubles its result."""

    def forward(self, *args, **kwargs):
        out = super(subclass, self).forward(*args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    subclass = type("Subclass", (type(module),), {"forward": forward})
    module.__class__ = subclass


def patch(module):
    plain = module.forward
    module.forward = lambda *args, **kwargs: plain(*args, **kwargs)


def change_resnet(decoder):
    decoder.mid_block.resnets[0] = nn.Identity()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda decoder: setattr(decoder, "conv_act", nn.ReLU()), "decoder: its conv_act is ReLU, not SiLU"),
        (lambda decoder: change_class(decoder.conv_in), "decoder: its conv_in is Subclass, not CogVideoXCausalConv3d"),
        (lambda decoder: change_class(decoder.conv_out), "decoder: its conv_out is Subclass, not CogVideoXCausalConv3d"),
        (change_class, "vae: its decoder is Subclass, not CogVideoXDecoder3D"),
        (lambda decoder: decoder.register_forward_hook(lambda *_: None), "vae: its decoder is hooked or patched"),
        (patch, "vae: its decoder is hooked or patched"),
        (change_resnet, r"decoder\.mid_block: its resnets\.0 is Identity, not CogVideoXResnetBlock3D"),
        (
            lambda decoder: setattr(decoder, "norm_out", nn.GroupNorm(4, 8)),
            "its norm_out is GroupNorm, not CogVideoXSpatialNorm3D",
        ),
        (
            lambda decoder: setattr(decoder.mid_block.resnets[1], "norm2", nn.GroupNorm(4, 16)),
            r"decoder\.mid_block\.resnets\.1: its norm2 is GroupNorm, not CogVideoXSpatialNorm3D",
        ),
        (
            lambda decoder: change_class(decoder.up_blocks[1].resnets[0].conv2),
            r"up_blocks\.1\.resnets\.0: its conv2 is Subclass, not CogVideoXCausalConv3d",
        ),
        (
            lambda decoder: setattr(decoder.up_blocks[1].resnets[0], "nonlinearity", nn.ReLU()),
            r"up_blocks\.1\.resnets\.0: its nonlinearity is ReLU, not SiLU",
        ),
        (lambda decoder: change_class(decoder.up_blocks[0]), r"decoder: its up_blocks\.0 is Subclass, not CogVideoXUpBlock3D"),
        (
            lambda decoder: change_class(decoder.up_blocks[0].upsamplers[0]),
            r"up_blocks\.0: its upsamplers\.0 is Subclass, not CogVideoXUpsample3D",
        ),
        (
            lambda decoder: change_class(decoder.up_blocks[1].resnets[0].conv_shortcut),
            r"up_blocks\.1\.resnets\.0\.conv_shortcut: it is replaced, hooked or not 1x1x1",
        ),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_changed_layers_are_refused(change, message, accelerated):
    model = cogvideox()
    change(model.decoder)
    if accelerated:
        accelerate(model)
    with pytest.raises(TypeError, match=f"vae must have the layers of .*, unmodified, got .*{message}"):
        decode_clip_tiled(model, latent(3), max_memory=PLENTY)


@pytest.mark.parametrize("path", ["conv_in", "mid_block.resnets.0", "norm_out"])
def test_subclasses_of_accelerated_layers_are_refused(path):
    model = cogvideox()
    accelerate(model)
    layer = model.decoder.get_submodule(path)
    layer.__class__ = type("Mine", (type(layer),), {"forward": lambda self, *args, **kwargs: None})
    with pytest.raises(TypeError, match=r"vae must have the layers of .*, unmodified, got .*: its .* is Mine, not CogVideoX"):
        decode_clip_tiled(model, latent(1), max_memory=64 << 20)
