"""The blocks against the published formulas: the plain forward, and the fused one of inference."""

import copy
import pickle
from types import SimpleNamespace

import published
import pytest
import torch
import torch.nn.functional as F
from models import draw, latents, make_decoder, randomize, scaled
from spies import record_calls
from tolerances import assert_close, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from movq_ext import AttnBlock, Downsample, GroupNorm, ResnetBlock, SpatialNorm, Upsample
from movq_ext.model import fusion, norms
from movq_ext.model.layers import is_plain_network
from movq_ext.ops import upsampling


@pytest.mark.parametrize("zq_ch", [None, 4])
@pytest.mark.parametrize(
    ("out_channels", "conv_shortcut", "shortcut"), [(None, False, None), (64, False, "nin_shortcut"), (64, True, "conv_shortcut")]
)
@pytest.mark.parametrize("temb_channels", [0, 16])
def test_resnet_block(zq_ch, out_channels, conv_shortcut, shortcut, temb_channels):
    block = randomize(
        ResnetBlock(
            in_channels=32, out_channels=out_channels, conv_shortcut=conv_shortcut, temb_channels=temb_channels, zq_ch=zq_ch
        ).double()
    )
    assert [name for name in ("nin_shortcut", "conv_shortcut") if hasattr(block, name)] == ([shortcut] if shortcut else [])
    x, zq, temb = draw(2, 32, 6, 4), draw(2, 4, 3, 2), draw(2, 16) if temb_channels else None

    def norm(layer, h):
        if zq_ch is None:
            return published.group_norm(h, 32, layer.weight, layer.bias, 1e-6)
        return published.spatial_norm_layer(layer.state_dict(), h, zq)

    h = F.conv2d(published.silu(norm(block.norm1, x)), block.conv1.weight, block.conv1.bias, padding=1)
    if temb_channels:
        h = h + (published.silu(temb) @ block.temb_proj.weight.T + block.temb_proj.bias)[:, :, None, None]
    h = F.conv2d(published.silu(norm(block.norm2, h)), block.conv2.weight, block.conv2.bias, padding=1)
    residual = x
    if shortcut:
        layer = getattr(block, shortcut)
        residual = F.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)
    assert_close(block(x, temb, zq), residual + h)


def test_resnet_block_takes_temb_exactly_when_it_has_channels_for_it():
    x = torch.zeros(1, 32, 2, 2)
    with pytest.raises(ValueError, match=r"temb must be given exactly when .*, got none"):
        ResnetBlock(in_channels=32, temb_channels=8)(x)
    with pytest.raises(ValueError, match=r"temb must be given exactly when .*, got shape \(1, 8\)"):
        ResnetBlock(in_channels=32)(x, torch.zeros(1, 8))


def test_dropout_acts_in_training_only():
    block = ResnetBlock(in_channels=32, dropout=0.9)
    x = torch.randn(1, 32, 4, 4)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("zq_ch", [None, 4])
def test_attn_block(zq_ch):
    block = randomize(AttnBlock(32, zq_ch).double())
    x, zq = draw(2, 32, 5, 3), draw(2, 4, 2, 3)
    n = (
        published.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6)
        if zq_ch is None
        else published.spatial_norm_layer(block.norm.state_dict(), x, zq)
    )
    q, k, v = (published.conv1x1(n, layer.weight, layer.bias) for layer in (block.q, block.k, block.v))
    out = published.conv1x1(published.attention(q, k, v), block.proj_out.weight, block.proj_out.bias)
    assert_close(block(x, zq), x + out)


def test_attn_block_projects_with_one_convolution_and_saves_three():
    block = AttnBlock(32)
    with torch.profiler.profile() as profile:
        block(draw(1, 32, 4, 4).float())
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::conv2d"] == 2  # q, k and v; proj_out
    assert sorted(name for name in block.state_dict() if "norm" not in name) == sorted(
        f"{layer}.{kind}" for layer in ("q", "k", "v", "proj_out") for kind in ("weight", "bias")
    )


@pytest.mark.parametrize("replace", ["a subclass", "no bias"])
def test_attn_block_calls_layers_that_are_not_plain(replace):
    block, x = randomize(AttnBlock(32).double()), draw(1, 32, 3, 5)
    block.v = scaled(block.v) if replace == "a subclass" else nn.Conv2d(32, 32, 1, bias=False).double()
    n = published.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6)
    q, k = (published.conv1x1(n, layer.weight, layer.bias) for layer in (block.q, block.k))
    out = published.conv1x1(published.attention(q, k, block.v(n)), block.proj_out.weight, block.proj_out.bias)
    assert_close(block(x), x + out)


def test_upsample_and_downsample():
    x = draw(1, 3, 5, 7)
    assert torch.equal(Upsample(3, with_conv=False)(x), published.resize(x, 10, 14))
    up, down = randomize(Upsample(3, True).double()), randomize(Downsample(3, True).double())
    assert_close(up(x), F.conv2d(published.resize(x, 10, 14), up.conv.weight, up.conv.bias, padding=1))
    padded = torch.zeros(1, 3, 6, 8, dtype=x.dtype)
    padded[:, :, :5, :7] = x
    assert_close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))
    assert torch.equal(Downsample(3, with_conv=False)(x), F.avg_pool2d(x, 2))
    assert not list(Downsample(3, with_conv=False).parameters()) and not list(Upsample(3, with_conv=False).parameters())


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 3)])
def test_upsample_is_four_convolutions_of_the_small_map(monkeypatch, grid):
    """16 multiplications per small pixel, where the published order takes 36; borders and gradients are the same."""
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 1)
    up, x = randomize(Upsample(4, True).double()), draw(2, 4, *grid)
    with FlopCounterMode(display=False) as flops:
        up(x)
    pixels = 2 * grid[0] * grid[1]
    assert flops.get_total_flops() == 2 * 16 * 4 * 4 * pixels
    inputs = [x.requires_grad_(), *up.conv.parameters()]
    published_out = F.conv2d(published.resize(x, 2 * grid[0], 2 * grid[1]), up.conv.weight, up.conv.bias, padding=1)
    dout = draw(*published_out.shape)
    assert_close(up(x), published_out)
    for grad, want in zip(
        torch.autograd.grad(up(x), inputs, dout), torch.autograd.grad(published_out, inputs, dout), strict=True
    ):
        assert_close(grad, want)


def test_upsample_sees_a_new_weight_at_once_and_saves_only_the_published_one():
    up, x = randomize(Upsample(4, True).double()), draw(1, 4, 3, 3)
    assert set(up.state_dict()) == {"conv.weight", "conv.bias"}
    with torch.no_grad():
        for training in (False, True):
            up.train(training)
            before = up(x)
            up.conv.weight.mul_(2)
            up.conv.bias.mul_(2)
            assert_close(up(x), 2 * before)
            up.load_state_dict({name: value / 2 for name, value in up.state_dict().items()})
            assert_close(up(x), before)
            up.conv.weight.data *= 2  # which increments no version counter
            up.conv.bias.data *= 2
            assert_close(up(x), 2 * before)
            up.conv.weight.data /= 2
            up.conv.bias.data /= 2
    assert torch.equal(copy.deepcopy(up)(x), up(x)) and torch.equal(pickle.loads(pickle.dumps(up))(x), up(x))


def test_upsample_calls_a_convolution_that_is_not_plain():
    up, x = Upsample(4, True).double(), draw(1, 4, 3, 3)
    up.conv = scaled(up.conv)
    assert_close(up(x), up.conv(published.resize(x, 6, 6)))


@pytest.mark.parametrize("make, names", [(lambda: ResnetBlock(in_channels=32), ("conv1", "conv2")),
                                         (lambda: AttnBlock(32), ("q", "k", "v", "proj_out")),
                                         (lambda: Upsample(32, True), ("conv",))])  # fmt: skip
def test_hooks_on_layers_see_their_inputs_and_outputs(make, names):
    module, x, seen = randomize(make().double()), draw(1, 32, 4, 6), {}
    with torch.no_grad():
        wanted = module(x)
        for name in names:
            layer = getattr(module, name)
            layer.register_forward_hook(lambda layer, inputs, out, name=name: seen.update({name: (layer, inputs[0], out)}))
        assert_close(module(x), wanted)
        assert set(seen) == set(names)
        for layer, x, out in seen.values():
            assert_close(out, F.conv2d(x, layer.weight, layer.bias, padding=layer.padding))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [lambda: ResnetBlock(in_channels=32, zq_ch=4),
                                  lambda: ResnetBlock(in_channels=32, out_channels=64), lambda: AttnBlock(32, 4),
                                  lambda: GroupNorm(32, 32, 1e-6)])  # fmt: skip
def test_without_gradients_results_are_the_same_and_inputs_are_left_alone(make, layout):
    """In inference, layers overwrite their own intermediate results, never their inputs."""
    module, x, zq = randomize(make().double()), draw(2, 32, 4, 6).contiguous(memory_format=layout), draw(2, 4, 2, 3)
    call = (lambda: module(x, zq=zq)) if not isinstance(module, GroupNorm) else (lambda: module(x, activation="silu"))
    wanted, kept, kept_zq = call(), x.clone(), zq.clone()
    with torch.no_grad():
        assert_close(call(), wanted)
    with torch.inference_mode():
        assert_close(call(), wanted)
    assert torch.equal(x, kept) and torch.equal(zq, kept_zq)


def test_modules_refuse_channels_that_the_groups_do_not_divide():
    for make in (lambda: ResnetBlock(in_channels=48), lambda: AttnBlock(20, 4), lambda: SpatialNorm(6, 3, num_groups=4)):
        with pytest.raises(ValueError, match=r"channels must be divisible by the \d+ groups of the norm, got \d+ channels"):
            make()
    for groups in (0, None):
        with pytest.raises(ValueError, match="num_groups must be a positive integer"):
            SpatialNorm(6, 3, num_groups=groups)
    with pytest.raises(ValueError, match="num_groups must be a positive integer, got None"):
        SpatialNorm(6, 3)


BLOCKS = {
    "resnet": lambda: ResnetBlock(in_channels=32, zq_ch=4),
    "shortcut of 1x1": lambda: ResnetBlock(in_channels=32, out_channels=64, zq_ch=4),
    "shortcut of 3x3": lambda: ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True),
    "attention": lambda: AttnBlock(32, 4),
}


@pytest.fixture
def fused(monkeypatch):
    """Pretend that tensors are on a GPU. Record every norm's f_bias, and the bias and residual of every sum in one pass."""
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    return SimpleNamespace(
        norm_biases=record_calls(monkeypatch, norms, "fused_spatial_norm", lambda result, f, y, b, options: options.f_bias),
        sums=record_calls(monkeypatch, fusion, "add_bias_residual_", lambda result, x, bias, residual: (bias, residual)),
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_later_passes_add_the_biases_in_inference(fused, name):
    block, x, zq = randomize(BLOCKS[name]().double()), draw(2, 32, 4, 6), draw(2, 4, 2, 3)
    wanted, kept = block(x, zq=zq), x.clone()
    assert not any(bias is not None for bias in fused.norm_biases) and fused.sums == []
    fused.norm_biases.clear()
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        out = block(x, zq=zq)
    assert_close(out, wanted)
    assert torch.equal(x, kept)
    ((bias, residual),) = fused.sums
    if isinstance(block, ResnetBlock):
        before_conv1, after_conv1 = fused.norm_biases
        assert before_conv1 is None and after_conv1 is block.conv1.bias
        shortcut = next((layer for layer_name, layer in block.named_children() if "shortcut" in layer_name), None)
        assert torch.equal(bias, block.conv2.bias if shortcut is None else block.conv2.bias + shortcut.bias)
    else:
        assert fused.norm_biases == [None] and bias is block.proj_out.bias
    assert residual.shape == out.shape
    convolutions = [event for event in profile.events() if event.name == "aten::conv2d"]
    with_bias = sum(event.input_shapes[2] != [] for event in convolutions)
    assert with_bias == (1 if name == "attention" else 0)  # q, k and v: no kernel of ours follows them


@pytest.mark.parametrize("change", ["hook on norm2", "hook on conv1", "hook on conv2", "time embedding"])
def test_hooked_layers_keep_their_biases(fused, change):
    block = randomize(ResnetBlock(in_channels=32, zq_ch=4, temb_channels=8 * (change == "time embedding")).double())
    x, zq, temb, seen = draw(2, 32, 4, 6), draw(2, 4, 2, 3), draw(2, 8) if change == "time embedding" else None, []
    with torch.no_grad():
        wanted = block(x, temb, zq)
        if change == "hook on norm2":
            block.norm2.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        elif change != "time embedding":
            getattr(block, change.split()[-1]).register_forward_hook(lambda layer, inputs, out: seen.append(out.clone()))
        fused.norm_biases.clear()
        assert_close(block(x, temb, zq), wanted)
        if change in ("hook on norm2", "hook on conv1"):
            h = published.silu(published.spatial_norm_layer(block.norm1.state_dict(), x, zq))
            assert_close(seen[0], F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1))
    assert (fused.norm_biases[1] is None) == (change != "hook on conv2")
    assert len(seen) == (change != "time embedding")


def test_the_shortcut_keeps_its_bias_where_conv2_keeps_its_own(fused):
    block = randomize(ResnetBlock(in_channels=32, out_channels=64, zq_ch=4).double())
    block.conv2.register_forward_hook(lambda layer, inputs, out: None)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        block(draw(2, 32, 4, 6), zq=draw(2, 4, 2, 3))
    biases = [event.input_shapes[2] for event in profile.events() if event.name == "aten::conv2d"]
    assert biases == [[], [64], [64]] and fused.sums == []  # conv1, conv2, nin_shortcut


@pytest.mark.parametrize("add_conv", [False, True])
@pytest.mark.parametrize("layer", ["norm1", "conv1", "norm2", "conv2"])
def test_a_hook_in_a_frozen_block_may_add_what_requires_a_gradient(layer, add_conv):
    block = randomize(ResnetBlock(in_channels=32, zq_ch=4, add_conv=add_conv).double())
    x, zq, offset = draw(2, 32, 16, 16), draw(2, 4, 4, 4), torch.zeros(16, 16, dtype=torch.float64, requires_grad=True)
    getattr(block, layer).register_forward_hook(lambda layer, inputs, out: out + offset)
    (wanted,) = torch.autograd.grad(block(x, zq=zq).square().sum(), offset)
    block.requires_grad_(False)
    assert_close(torch.autograd.grad(block(x, zq=zq).square().sum(), offset)[0], wanted)


def test_biases_under_autocast(fused):
    block = randomize(ResnetBlock(in_channels=32, out_channels=64, zq_ch=4))
    x, zq = draw(2, 32, 4, 6).float(), draw(2, 4, 2, 3).float()
    wanted = block(x, zq=zq)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = block(x, zq=zq)
    assert out.dtype == torch.bfloat16 and 1e-4 < relative_error(out, wanted) < 3e-2


@pytest.mark.parametrize("trained", ["norm2", "zq", "conv2", "nin_shortcut"])
def test_biases_of_a_partly_trained_block(fused, trained):
    block, x, zq = randomize(ResnetBlock(in_channels=32, out_channels=64, zq_ch=4).double()), draw(2, 32, 4, 6), draw(2, 4, 2, 3)
    parameters = [zq] if trained == "zq" else list(getattr(block, trained).parameters())
    wanted = torch.autograd.grad(block(x, zq=zq.requires_grad_(trained == "zq")).square().sum(), parameters)
    for parameter in block.parameters():
        parameter.requires_grad_(any(parameter is one for one in parameters))
    for grad, want in zip(torch.autograd.grad(block(x, zq=zq).square().sum(), parameters), wanted, strict=True):
        assert_close(grad, want)


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("make", [lambda: ResnetBlock(in_channels=32, zq_ch=4), lambda: AttnBlock(32, 4)])
def test_blocks_refuse_what_their_norms_refuse(make, with_gradients):
    block, x, zq = make(), torch.zeros(2, 32, 4, 4), torch.zeros(2, 4, 2, 2)
    with torch.set_grad_enabled(with_gradients):
        with pytest.raises(TypeError, match="zq must be a tensor, got NoneType"):
            block(x)
        with pytest.raises(TypeError, match="zq must be a tensor, got list"):
            block(x, zq=[zq])
        with pytest.raises(ValueError, match="f and zq must have the same batch size: f has 2, zq has 1"):
            block(x, zq=zq[:1])
        with pytest.raises(ValueError, match=r"f must have shape \(batch, 32, height, width\), got \(2, 16, 4, 4\)"):
            block(x[:, :16], zq=zq)


MODIFICATIONS = {
    "hook": lambda decoder: decoder.mid.block_1.norm1.register_forward_hook(lambda layer, inputs, out: None),
    "adapter": lambda decoder: setattr(decoder.mid.block_1, "conv1", scaled(decoder.mid.block_1.conv1)),
    "unknown layer": lambda decoder: decoder.mid.add_module("extra", nn.Identity()),
    "dropout in training": lambda decoder: decoder.train(),
    "compiled block": lambda decoder: decoder.mid.block_1.compile(backend="eager"),
}


@pytest.mark.parametrize("name", MODIFICATIONS)
def test_a_modified_network_is_not_plain(name):
    decoder = make_decoder(dropout=0.5)
    assert is_plain_network(decoder)
    MODIFICATIONS[name](decoder)
    assert not is_plain_network(decoder)


def test_a_compiled_block_runs_compiled():
    """A network that computes its blocks itself would bypass ``block.compile()``."""
    decoder, (z, zq), runs = make_decoder(), latents(), []

    def backend(graph, inputs):
        def run(*arguments):
            runs.append(graph)
            return graph(*arguments)

        return run

    with torch.no_grad():
        wanted = decoder(z, zq)
        decoder.mid.block_1.compile(backend=backend)
        assert_close(decoder(z, zq), wanted.double(), slack=5)
    assert runs
