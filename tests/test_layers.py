import copy
import pickle

import published
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from movq_ext import AttnBlock, Downsample, GroupNorm, ResnetBlock, SpatialNorm, Upsample
from movq_ext.model import fusion, layers


def randomize(module):
    """Published inits leave norm weights at one and biases near zero, which hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return module


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("zq_grid", [(2, 2), (3, 5), (8, 6)])
def test_spatial_norm_is_the_published_layer(zq_grid):
    layer = randomize(SpatialNorm(64, 4, num_groups=32, eps=1e-6).double())
    f, zq = draw(2, 64, 8, 6), draw(2, 4, *zq_grid, seed=1)
    assert_close(layer(f, zq), published.spatial_norm_layer(layer.state_dict(), f, zq))
    assert_close(layer(f, zq, activation="silu"), published.silu(published.spatial_norm_layer(layer.state_dict(), f, zq)))


def test_add_conv_runs_on_the_resized_latent():
    layer = randomize(SpatialNorm(64, 4, add_conv=True, num_groups=32, eps=1e-6).double())
    f, zq = draw(2, 64, 8, 6), draw(2, 4, 4, 3, seed=1)
    convolved = F.conv2d(published.resize(zq, 8, 6), layer.conv.weight, layer.conv.bias, padding=1)
    assert_close(layer(f, zq), published.spatial_norm_layer(layer.state_dict(), f, convolved))
    assert set(layer.state_dict()) == {
        f"{name}.{kind}" for name in ("norm_layer", "conv", "conv_y", "conv_b") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "grid, cell", [((4, 3), (4, 4)), ((1, 2), (8, 4)), ((3, 1), (16, 8)), ((4, 3), (2, 4)), ((4, 3), (1, 1)), ((4, 3), (3, 5))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_add_conv_runs_on_the_cells_of_the_latent(monkeypatch, grid, cell, layout):
    """Where cells are of whole powers of two and nothing records a gradient, the resized latent is not made."""
    resized, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, *a, **k: (resized.append(x.shape[1]), interpolate(x, *a, **k))[1])
    layer = randomize(SpatialNorm(64, 4, add_conv=True, num_groups=32, eps=1e-6).double())
    f = draw(2, 64, *(many * size for many, size in zip(grid, cell, strict=True))).contiguous(memory_format=layout)
    zq = draw(2, 4, *grid, seed=1).contiguous(memory_format=layout)
    wanted = layer(f, zq, "silu")
    assert 4 in resized
    resized.clear()
    with torch.no_grad():
        assert_close(layer(f, zq, "silu"), wanted)
    assert (resized == []) == (min(cell) >= 4 and cell != (3, 5))


def test_norm_layer_parameters_reach_the_norm():
    layer = randomize(SpatialNorm(6, 3, num_groups=2, eps=0.5, affine=False).double())
    assert layer.norm_layer.weight is None
    f, zq = draw(1, 6, 4, 4), draw(1, 3, 2, 2)
    y, b = layer.conv_y(zq), layer.conv_b(zq)
    assert_close(layer(f, zq), published.spatial_norm(f, y, b, None, None, 2, 0.5))


class BatchNorm(nn.BatchNorm2d):
    def __init__(self, num_channels, **parameters):
        super().__init__(num_channels, **parameters)


def test_any_norm_layer():
    layer = randomize(SpatialNorm(6, 3, norm_layer=BatchNorm, momentum=1.0).double())
    f, zq = draw(2, 6, 4, 4), draw(2, 3, 2, 2)
    up = F.interpolate(zq, size=(4, 4), mode="nearest")
    expected = F.batch_norm(f, None, None, layer.norm_layer.weight, layer.norm_layer.bias, training=True) * layer.conv_y(
        up
    ) + layer.conv_b(up)
    assert_close(layer(f, zq), expected)
    assert_close(layer(f, zq, activation="silu"), F.silu(expected))


def test_frozen_norm_layer_does_not_train():
    layer = SpatialNorm(6, 3, norm_layer=BatchNorm, freeze_norm_layer=True).train()
    before = {name: value.clone() for name, value in layer.norm_layer.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    layer(torch.randn(2, 6, 4, 4), torch.randn(2, 3, 2, 2)).square().sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in layer.norm_layer.parameters())
    assert all(p.grad is not None for p in (layer.conv_y.weight, layer.conv_b.weight))
    assert all(torch.equal(value, before[name]) for name, value in layer.norm_layer.state_dict().items())


def test_group_norm_is_torchs():
    ours, theirs = randomize(GroupNorm(4, 8, 1e-6).double()), nn.GroupNorm(4, 8, 1e-6).double()
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 8, 5, 3)
    assert_close(ours(x), theirs(x))
    assert_close(ours(x, activation="silu"), F.silu(theirs(x)))


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
    if shortcut:
        layer = getattr(block, shortcut)
        x_ = F.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)
    else:
        x_ = x
    assert_close(block(x, temb, zq), x_ + h)


def test_resnet_block_wants_its_temb():
    x = torch.zeros(1, 32, 2, 2)
    with pytest.raises(ValueError, match="temb must be given exactly when"):
        ResnetBlock(in_channels=32, temb_channels=8)(x)
    with pytest.raises(ValueError, match="temb must be given exactly when"):
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
    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    block, x = randomize(AttnBlock(32).double()), draw(1, 32, 3, 5)
    v = (Doubled if replace == "a subclass" else torch.nn.Conv2d)(32, 32, 1, bias=replace == "a subclass").double()
    block.v, plain = v, block.v
    n = published.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6)
    q, k = (published.conv1x1(n, layer.weight, layer.bias) for layer in (block.q, block.k))
    out = published.conv1x1(published.attention(q, k, v(n)), block.proj_out.weight, block.proj_out.bias)
    assert plain is not v
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
def test_upsample_is_four_convolutions_of_the_small_map(grid):
    """16 multiplications where the published 3x3 convolution of the large map takes 36; borders and gradients are its own."""
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
            up.conv.weight.data *= 2  # which no version counts
            up.conv.bias.data *= 2
            assert_close(up(x), 2 * before)
            up.conv.weight.data /= 2
            up.conv.bias.data /= 2
    assert torch.equal(copy.deepcopy(up)(x), up(x)) and torch.equal(pickle.loads(pickle.dumps(up))(x), up(x))


def test_upsample_calls_a_convolution_that_is_not_plain():
    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    up, x = Upsample(4, True).double(), draw(1, 4, 3, 3)
    up.conv = Doubled(4, 4, 3, padding=1).double()
    assert_close(up(x), up.conv(published.resize(x, 6, 6)))


@pytest.mark.parametrize("make, names", [(lambda: ResnetBlock(in_channels=32), ("conv1", "conv2")),
                                         (lambda: AttnBlock(32), ("q", "k", "v", "proj_out")),
                                         (lambda: Upsample(32, True), ("conv",))])  # fmt: skip
def test_hooks_on_layers_see_what_the_layers_made(make, names):
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
    """Where nothing is recorded, modules write over what they have just computed: never over what they were given."""
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
        with pytest.raises(ValueError, match="num_groups must be a positive number"):
            SpatialNorm(6, 3, num_groups=groups)
    with pytest.raises(ValueError, match="num_groups must be a positive number, got None"):
        SpatialNorm(6, 3)


LAYER = SpatialNorm(64, 4, num_groups=32)
F_, ZQ = torch.randn(2, 64, 4, 4), torch.randn(2, 4, 2, 2)
BAD = {
    "no latent": (TypeError, "zq must be a tensor, got NoneType", (F_, None)),
    "rank": (ValueError, r"f must have shape \(batch, 64, height, width\), got \(64, 4, 4\)", (F_[0], ZQ)),
    "channels": (ValueError, r"zq must have shape \(batch, 4, height, width\), got \(2, 3, 2, 2\)", (F_, ZQ[:, :3])),
    "batch": (ValueError, "f and zq must have the same batch size: f has 2, zq has 1", (F_, ZQ[:1])),
    "empty": (ValueError, "zq must not be empty", (F_, ZQ[..., :0])),
    "dtype": (TypeError, "zq must have the model's dtype torch.float32, got torch.float64", (F_, ZQ.double())),
    "device": (ValueError, "f must be on the model's device cpu, got meta", (F_.to("meta"), ZQ)),
}


@pytest.mark.parametrize("case", BAD)
def test_spatial_norm_refuses(case):
    error, message, arguments = BAD[case]
    with pytest.raises(error, match=message):
        LAYER(*arguments)


BLOCKS = {
    "resnet": lambda: ResnetBlock(in_channels=32, zq_ch=4),
    "shortcut of 1x1": lambda: ResnetBlock(in_channels=32, out_channels=64, zq_ch=4),
    "shortcut of 3x3": lambda: ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True),
    "attention": lambda: AttnBlock(32, 4),
}


@pytest.fixture
def epilogues(monkeypatch):
    """As if tensors were on a GPU: the (bias, residual) that were added in one pass, and f_bias of every norm."""
    seen, add, norm = [], fusion.add_bias_residual_, layers.fused_spatial_norm
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    monkeypatch.setattr(
        fusion, "add_bias_residual_", lambda x, bias, residual: (seen.append((bias, residual)), add(x, bias, residual))[1]
    )
    monkeypatch.setattr(layers, "fused_spatial_norm", lambda *a: (seen.append(a[3].f_bias), norm(*a))[1])
    return seen


@pytest.mark.parametrize("name", BLOCKS)
def test_biases_are_added_by_the_passes_that_follow(epilogues, name):
    block, x, zq = randomize(BLOCKS[name]().double()), draw(2, 32, 4, 6), draw(2, 4, 2, 3)
    wanted, kept = block(x, zq=zq), x.clone()
    assert all(bias is None for bias in epilogues)
    epilogues.clear()
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        out = block(x, zq=zq)
    assert_close(out, wanted)
    assert torch.equal(x, kept)
    *norms, (bias, residual) = epilogues
    if isinstance(block, ResnetBlock):
        assert norms[0] is None and norms[1] is block.conv1.bias
        shortcut = next((layer for layer_name, layer in block.named_children() if "shortcut" in layer_name), None)
        assert torch.equal(bias, block.conv2.bias if shortcut is None else block.conv2.bias + shortcut.bias)
    else:
        assert norms == [None] and bias is block.proj_out.bias
    assert residual.shape == out.shape
    convolutions = [event for event in profile.events() if event.name == "aten::conv2d"]
    with_bias = sum(event.input_shapes[2] != [] for event in convolutions)
    assert with_bias == (1 if name == "attention" else 0)  # q, k and v: what follows is no kernel of ours


@pytest.mark.parametrize("touch", ["hook on norm2", "hook on conv1", "hook on conv2", "time embedding"])
def test_biases_stay_where_somebody_looks(epilogues, touch):
    block = randomize(ResnetBlock(in_channels=32, zq_ch=4, temb_channels=8 * (touch == "time embedding")).double())
    x, zq, temb, seen = draw(2, 32, 4, 6), draw(2, 4, 2, 3), draw(2, 8) if touch == "time embedding" else None, []
    with torch.no_grad():
        wanted = block(x, temb, zq)
        if touch == "hook on norm2":
            block.norm2.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        elif touch != "time embedding":
            getattr(block, touch.split()[-1]).register_forward_hook(lambda layer, inputs, out: seen.append(out.clone()))
        epilogues.clear()
        assert_close(block(x, temb, zq), wanted)
        if touch in ("hook on norm2", "hook on conv1"):
            h = published.silu(published.spatial_norm_layer(block.norm1.state_dict(), x, zq))
            assert_close(seen[0], F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1))
    assert (epilogues[1] is None) == (touch != "hook on conv2")
    assert len(seen) == (touch != "time embedding")


def test_biases_under_autocast(epilogues):
    block, x, zq = (
        randomize(ResnetBlock(in_channels=32, out_channels=64, zq_ch=4)),
        draw(2, 32, 4, 6).float(),
        draw(2, 4, 2, 3).float(),
    )
    wanted = block(x, zq=zq)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = block(x, zq=zq)
    assert out.dtype == torch.bfloat16 and 1e-4 < relative_error(out, wanted) < 3e-2


@pytest.mark.parametrize("trained", ["norm2", "zq", "conv2", "nin_shortcut"])
def test_biases_where_a_part_of_a_block_is_trained(epilogues, trained):
    block, x, zq = randomize(ResnetBlock(in_channels=32, out_channels=64, zq_ch=4).double()), draw(2, 32, 4, 6), draw(2, 4, 2, 3)
    parameters = [zq] if trained == "zq" else list(getattr(block, trained).parameters())
    wanted = torch.autograd.grad(block(x, zq=zq.requires_grad_(trained == "zq")).square().sum(), parameters)
    for parameter in block.parameters():
        parameter.requires_grad_(any(parameter is one for one in parameters))
    for grad, want in zip(torch.autograd.grad(block(x, zq=zq).square().sum(), parameters), wanted, strict=True):
        assert_close(grad, want)
