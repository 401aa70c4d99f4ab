"""Blocks, decoders and encoders of diffusers' images that run strip by strip on a CPU, against diffusers itself."""

import copy
from unittest import mock

import pytest
import torch
from accelerated_models import assert_same, decode, encode, kl, latents, levels, randomised, vq
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from models import PeakBytes
from tolerances import RELATIVE, relative_error
from torch import nn

from movq_ext import accelerate, restore
from movq_ext.diffusers import blocks, coders, map_strips
from movq_ext.model import strip_rows

WIDTH = 128  # Winograd convolutions are faster from 32x32 pixels on
SIZE = (44, 42)
F64 = torch.float64
CHANNELS_LAST = torch.channels_last


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def make_block(spatial=False, channels=WIDTH, **changes):
    torch.manual_seed(0)
    if spatial:
        return randomised(ResnetBlockCondNorm2D(in_channels=channels, temb_channels=4, time_embedding_norm="spatial", **changes))
    return randomised(ResnetBlock2D(in_channels=channels, temb_channels=None, **changes))


def inputs(spatial=False, batch=1, size=SIZE, channels=WIDTH):
    return draw(batch, channels, *size) + 1, draw(batch, 4, size[0] // 2, size[1] // 2) if spatial else None


@pytest.fixture
def strips(monkeypatch):
    """The blocks and last layers that run in strips, and the Winograd convolutions that they take."""
    spies = {}
    for name, owner, attribute in [
        ("blocks", blocks, "run_block"), ("outputs", coders, "run_output"), ("winograd", strip_rows, "WinogradConvolution"),
    ]:  # fmt: skip
        spies[name] = mock.Mock(wraps=getattr(owner, attribute))
        monkeypatch.setattr(owner, attribute, spies[name])
    return lambda: {name: spy.call_count for name, spy in spies.items()}


def assert_as_accurate(ours, theirs, exact):
    """theirs: of diffusers in float32 and channels_last, where a CPU is fastest."""
    error = relative_error(ours, exact)
    assert error < 1.5 * relative_error(theirs, exact) and error < 5 * RELATIVE[torch.float32]


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("out_channels", [WIDTH, 160])
@pytest.mark.parametrize("spatial", [False, True])
@torch.no_grad()
def test_blocks(spatial, out_channels, layout, strips):
    """A batch of images, with and without a shortcut, for each norm and layout."""
    block, (x, zq) = make_block(spatial, out_channels=out_channels), inputs(spatial, batch=2)
    exact = copy.deepcopy(block).double()(x.double(), zq if zq is None else zq.double())
    theirs = copy.deepcopy(block).to(memory_format=CHANNELS_LAST)(x.contiguous(memory_format=CHANNELS_LAST), zq)
    report = accelerate(block)
    given = x.contiguous(memory_format=layout)
    ours = block(given, zq)
    assert strips() == {"blocks": 1, "outputs": 0, "winograd": 4}
    assert all(count.accelerated and not count.original for count in report.calls().values())
    assert_as_accurate(ours, theirs, exact)
    assert torch.equal(given, x) and ours.is_contiguous(memory_format=layout)
    assert ours.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()


@torch.no_grad()
def test_a_latent_whose_cells_are_no_power_of_two(strips):
    block, x, zq = make_block(spatial=True), draw(1, WIDTH, *SIZE), draw(1, 4, 5, 7)
    expected = copy.deepcopy(block).double()(x.double(), zq.double())
    accelerate(block)
    assert relative_error(block(x, zq), expected) < 2 * RELATIVE[torch.float32]
    assert strips()["blocks"] == 1


@torch.no_grad()
def test_float64(strips):
    block, (x, _) = make_block().double(), inputs()
    expected = block(x.double(), None)
    accelerate(block)
    assert_same([block(x.double(), None)], [expected])
    assert strips()["winograd"] == 2


def hook(layer):
    layer.register_forward_hook(lambda layer, inputs, out: 2 * out)


@pytest.mark.parametrize("change", [
    lambda block: hook(block.conv1), lambda block: hook(block.conv_shortcut), lambda block: hook(block.dropout),
    lambda block: hook(block.norm2), lambda block: hook(block.nonlinearity),
    lambda block: setattr(block.conv2, "padding_mode", "circular"), lambda block: setattr(block, "output_scale_factor", 2.0),
    lambda block: setattr(block, "dropout", nn.Identity()), lambda block: setattr(block, "conv1", nn.Sequential(block.conv1)),
], ids=["conv1", "shortcut", "dropout", "norm2", "activation", "padding", "factor", "no dropout", "wrapped"])  # fmt: skip
@torch.no_grad()
def test_changed_blocks_run_layer_by_layer(change, strips):
    block, (x, _) = make_block(out_channels=160), inputs()
    accelerate(block)
    change(block)
    ours = block(x, None)
    restore(block)
    assert_same([ours], [block(x, None)])
    assert strips()["blocks"] == 0


@pytest.mark.parametrize("dtype, widest, too_wide", [(torch.float32, 539, 540), (F64, 381, 382)])
def test_widths_and_sizes_of_the_documentation(dtype, widest, too_wide):
    def runs_in_strips(channels, size):
        with torch.device("meta"):
            block = ResnetBlock2D(in_channels=channels, temb_channels=None, groups=1)
        for conv in (block.conv1, block.conv2):
            conv.weight = nn.Parameter(torch.empty(channels, channels, 3, 3, dtype=dtype))
        return map_strips.is_faster_in_strips(block, size, size)

    for channels, size in ((96, 48), (128, 32), (192, 24), (256, 20), (widest, 16), (widest, 512)):
        assert runs_in_strips(channels, size)
    for channels, size in ((64, 48), (95, 512), (96, 46), (128, 30), (192, 22), (256, 18), (too_wide, 16), (too_wide, 512)):
        assert not runs_in_strips(channels, size)


def test_where_blocks_run_layer_by_layer(strips):
    """With gradients, an embedding, active dropout or autocast, in 16 bits, and for small maps."""
    block, (x, _) = make_block(dropout=0.5), inputs()
    accelerate(block)
    block(x, None)
    with torch.no_grad():
        block.train()(x, None)
        block.eval()(x[:, :, :16, :16], None)
        with torch.autocast("cpu", torch.bfloat16):
            block(x, None)
        copy.deepcopy(block).bfloat16()(x.bfloat16(), None)
        timed = randomised(ResnetBlock2D(in_channels=WIDTH, temb_channels=8))
        accelerate(timed)
        timed(x, draw(1, 8))
        with pytest.raises(ValueError, match="weight must have shape"):
            block(x[:, :96], None)
        assert strips()["blocks"] == 0
        block(x, None)
    assert strips()["blocks"] == 1


def test_frozen_weights_and_an_input_with_gradients(strips):
    block, (x, _) = make_block().requires_grad_(False), inputs()
    accelerate(block)
    block(x.requires_grad_(), None).sum().backward()
    assert x.grad is not None and strips()["blocks"] == 0


WIDE = {"block_out_channels": (WIDTH, WIDTH)}
MODELS = {
    "AutoencoderKL": lambda: kl(**WIDE),
    "VQModel": lambda: vq(**WIDE, **levels(False, False)),
}


def run(model):
    """A decode of two images from latents of 22x20 (the blocks of the smallest map are slower in strips), and an encode."""
    x = draw(1, 3, *SIZE).to(next(model.parameters()).dtype)
    return decode(model, latents(model, size=(22, 20), dtype=x.dtype)), encode(model, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_autoencoders(name, layout, strips):
    model = MODELS[name]()
    exact = run(copy.deepcopy(model).double())
    theirs = run(copy.deepcopy(model).to(memory_format=CHANNELS_LAST))
    report = accelerate(model.to(memory_format=layout))
    ours = run(model)
    assert report.skipped == {} and all((count.accelerated, count.original) == (1, 0) for count in report.calls().values())
    assert strips() == {"blocks": 3, "outputs": 2, "winograd": 10}  # two of the decoder's blocks, for two images, and one block
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(our, their, true)
    assert ours[0].is_contiguous(memory_format=layout)
    restore(model)
    assert_same(run(model), ours)


@torch.no_grad()
def test_a_hooked_last_convolution_is_called(strips):
    model = kl(**WIDE)
    accelerate(model)
    hook(model.decoder.conv_out)
    ours = run(model)
    restore(model)
    assert_same(ours, run(model))
    assert strips()["outputs"] == 1  # the encoder's


@torch.no_grad()
def test_gradient_checkpointing(strips):
    """Checkpointed with gradients, in strips without."""
    model, gradients = kl(**WIDE), []
    model.enable_gradient_checkpointing()
    for change in (restore, accelerate):
        report = change(model)
        z = latents(model).requires_grad_()
        with torch.enable_grad():
            gradients.append(torch.autograd.grad(decode(model, z).square().sum(), z)[0])
    assert_same(gradients[1:], gradients[:1])
    calls = report.calls()
    assert (calls["decoder"].accelerated, calls["decoder.mid_block.resnets.0"].accelerated, strips()["outputs"]) == (1, 2, 0)
    decode(model, latents(model, size=(22, 20)))
    assert (report.calls()["decoder"].accelerated, report.calls()["decoder"].original, strips()["outputs"]) == (2, 0, 1)


@pytest.mark.parametrize("spatial", [False, True])
@torch.no_grad()
def test_peak_memory_of_a_block(spatial, strips):
    """Three maps: its input, the one between the convolutions, and the result. The strips take constant memory."""
    block, (x, zq) = make_block(spatial), inputs(spatial, size=(224, 208))
    x = x.contiguous(memory_format=CHANNELS_LAST)
    accelerate(block)
    with PeakBytes(block) as memory:
        block(x, zq)
    strips_and_convolution = 40 << 20
    assert strips()["blocks"] == 1 and memory.peak < 3.1 * x.nbytes + strips_and_convolution
