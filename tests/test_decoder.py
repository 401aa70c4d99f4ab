"""The decoder against the published one, and everything a module must support: AMP, autograd, compile, export, copies."""

import copy
import pickle

import published
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KANDINSKY, TINY, Copies, assert_ddp_averages_the_gradients, latents, make_decoder
from tolerances import assert_close, relative_error
from torch import nn

from movq_ext import AttnBlock, MOVQDecoder, SpatialNorm, annotate
from movq_ext.model import fusion


def published_decode(decoder, z, zq):
    """Run the published decoder's forward in plain tensor arithmetic, on the entries of state_dict()."""
    state = decoder.state_dict()

    def sub(prefix):
        return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(prefix + ".")}

    def conv(name, x, padding=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def norm(name, h):
        return published.spatial_norm_layer(sub(name), h, zq)

    def block(name, x):
        h = conv(f"{name}.conv1", published.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", published.silu(norm(f"{name}.norm2", h)))
        return (conv(f"{name}.nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in state else x) + h

    def attn(name, x):
        n = norm(f"{name}.norm", x)
        return x + conv(f"{name}.proj_out", published.attention(*(conv(f"{name}.{p}", n, 0) for p in "qkv")), 0)

    h = attn("mid.attn_1", block("mid.block_1", conv("conv_in", z)))
    h = block("mid.block_2", h)
    for level in reversed(range(decoder.num_resolutions)):
        for i in range(decoder.num_res_blocks + 1):
            h = block(f"up.{level}.block.{i}", h)
            if f"up.{level}.attn.{i}.q.weight" in state:
                h = attn(f"up.{level}.attn.{i}", h)
        if level:
            h = published.resize(h, 2 * h.shape[2], 2 * h.shape[3])
            if f"up.{level}.upsample.conv.weight" in state:
                h = conv(f"up.{level}.upsample.conv", h)
    return conv("conv_out", published.silu(norm("norm_out", h)))


def test_the_released_model_has_300_entries_and_its_names():
    decoder = MOVQDecoder(**KANDINSKY)
    state = decoder.state_dict()
    assert len(state) == 300
    assert sum(p.numel() for p in decoder.parameters()) == 52_775_683
    for name, shape in {
        "conv_in.weight": (512, 4, 3, 3),
        "mid.block_1.norm1.norm_layer.weight": (512,),
        "mid.block_1.norm1.conv_y.weight": (512, 4, 1, 1),
        "mid.attn_1.q.weight": (512, 512, 1, 1),
        "mid.attn_1.norm.conv_b.bias": (512,),
        "up.3.attn.2.proj_out.weight": (512, 512, 1, 1),
        "up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "up.3.upsample.conv.weight": (512, 512, 3, 3),
        "norm_out.norm_layer.bias": (128,),
        "conv_out.weight": (3, 128, 3, 3),
    }.items():
        assert state[name].shape == shape, name
    assert not any(name.startswith("up.0.upsample") for name in state)


CHANGES = [{}, {"resamp_with_conv": False}, {"attn_resolutions": []}, {"attn_resolutions": [8, 16]},
           {"ch_mult": (1,)}, {"ch_mult": (2, 1, 1)}, {"num_res_blocks": 0}, {"out_ch": 1}]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_decoder_is_the_published_one(changes):
    decoder = make_decoder(**changes).double()
    upsamples = decoder.num_resolutions - 1 if changes.get("resamp_with_conv", True) else 0
    assert sum("upsample.conv.weight" in name for name in decoder.state_dict()) == upsamples
    z, zq = latents(dtype=torch.float64)
    out = decoder(z, zq)
    assert_close(out, published_decode(decoder, z, zq), slack=10)
    factor = 2 ** (decoder.num_resolutions - 1)
    assert out.shape == (2, changes.get("out_ch", 3), 4 * factor, 6 * factor)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@torch.no_grad()
def test_fused_decoder_is_the_published_one(monkeypatch, changes):
    """The path of a GPU: batched modulations and deferred biases."""
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    decoder, (z, zq) = make_decoder(**changes).double(), latents(dtype=torch.float64)
    assert_close(decoder._forward_fused(z, zq), published_decode(decoder, z, zq), slack=10)


@torch.no_grad()
def test_fused_decoder_with_other_options():
    """add_conv on whole and on fractional cells, and features instead of an image."""
    decoder = make_decoder(add_conv=True, give_pre_end=True, ch_mult=(1, 1, 1)).double()
    for zq_grid in (None, (3, 5)):
        z, zq = latents(dtype=torch.float64, zq_grid=zq_grid)
        assert_close(decoder._forward_fused(z, zq), decoder.forward_with_features_output(z, zq)[0], slack=10)


@torch.no_grad()
def test_fused_decoder_opens_the_ranges_of_a_layer_by_layer_decode():
    decoder, inputs = make_decoder(), latents()
    names = {name for name, _ in decoder.named_modules() if name}
    ranges = []
    for decode in (decoder.forward_with_features_output, decoder._forward_fused):
        with annotate(decoder), torch.profiler.profile() as profiler:
            decode(*inputs)
        ranges.append([event.name for event in profiler.events() if event.name in names])
    layer_by_layer, fused = ranges
    assert "up.1.block.0.norm2" in fused and fused == layer_by_layer


@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    zq_grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
)
def test_any_latent_size(grid, zq_grid, batch):
    decoder = make_decoder(ch_mult=(1, 1), num_res_blocks=0)
    z, zq = latents(grid, batch, zq_grid=zq_grid)
    out = decoder(z, zq)
    assert out.shape == (batch, 3, 2 * grid[0], 2 * grid[1])
    expected = published_decode(copy.deepcopy(decoder).double(), z.double(), zq.double())
    # With few pixels a group has one or two values, and the norm divides by their small difference.
    assert_close(out, expected, slack=20 if grid[0] * grid[1] > 4 else 1e4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    decoder = make_decoder()
    z, zq = latents()
    expected = published_decode(copy.deepcopy(decoder).double(), z.double(), zq.double())
    out = decoder.to(dtype)(z.to(dtype), zq.to(dtype))
    assert out.dtype == dtype
    assert_close(out, expected, slack=4)


def test_autocast():
    decoder = make_decoder()
    z, zq = latents()
    expected = decoder(z, zq)
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(z, zq)
        mixed = decoder(z.bfloat16(), zq)
    assert out.dtype == torch.bfloat16
    for actual in (out, mixed):
        assert 1e-4 < relative_error(actual, expected) < 0.05


def test_dropout_and_ignored_keywords():
    decoder = make_decoder(dropout=0.5, double_z=False, attn_type="vanilla")
    assert {module.p for module in decoder.modules() if isinstance(module, nn.Dropout)} == {0.5}
    z, zq = latents()
    assert torch.equal(decoder(z, zq), decoder(z, zq))
    decoder.train()
    assert not torch.equal(decoder(z, zq), decoder(z, zq))


def test_zq_ch_defaults_to_z_channels():
    assert make_decoder(zq_ch=None).zq_ch == 4
    assert make_decoder(zq_ch=None)(*latents(zq=4)).shape == (2, 3, 8, 12)


def test_add_conv_adds_one_convolution_per_norm():
    plain, convolved = make_decoder(), make_decoder(add_conv=True)
    norms = sum(isinstance(module, SpatialNorm) for module in convolved.modules())
    assert len(convolved.state_dict()) == len(plain.state_dict()) + 2 * norms
    assert convolved(*latents()).shape == (2, 3, 8, 12)


FEATURES = ["conv_in", "mid_block_1", "mid_attn_1", "mid_block_2", "up_1_block_0", "up_1_attn_0", "up_1_block_1", "up_1_attn_1",
            "up_1_upsample", "up_0_block_0", "up_0_block_1", "norm_out", "nonlinearity", "conv_out"]  # fmt: skip


def test_features_in_execution_order():
    decoder = make_decoder()
    z, zq = latents()
    seen = {}
    watched = {"conv_in": decoder.conv_in, "mid_attn_1": decoder.mid.attn_1, "up_1_block_0": decoder.up[1].block[0],
               "up_1_attn_1": decoder.up[1].attn[1], "up_1_upsample": decoder.up[1].upsample,
               "up_0_block_1": decoder.up[0].block[1]}  # fmt: skip
    for name, module in watched.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
    out, features = decoder.forward_with_features_output(z, zq)
    assert list(features) == FEATURES
    assert all(torch.equal(features[name], output) for name, output in seen.items())
    assert torch.equal(out, features["conv_out"])
    assert torch.equal(features["nonlinearity"], F.silu(features["norm_out"]))
    assert_close(out, decoder(z, zq))


def test_give_pre_end():
    decoder, whole = make_decoder(give_pre_end=True), make_decoder()
    out, features = decoder.forward_with_features_output(*latents())
    assert list(features) == FEATURES[:-3]
    assert torch.equal(out, features["up_0_block_1"]) and torch.equal(out, decoder(*latents()))
    assert torch.equal(out, whole.forward_with_features_output(*latents())[1]["up_0_block_1"])


def test_gradcheck():
    decoder = make_decoder(ch_mult=(1,), num_res_blocks=0, attn_resolutions=[]).double()
    z, zq = latents((2, 2), 1, torch.float64, zq_grid=(1, 2))
    assert torch.autograd.gradcheck(decoder, (z.requires_grad_(), zq.requires_grad_()))


def test_every_parameter_gets_the_published_gradient():
    decoder = make_decoder().double()
    z, zq = latents(dtype=torch.float64)
    decoder(z, zq).square().sum().backward()
    twin = copy.deepcopy(decoder)
    twin.zero_grad()
    twin.state_dict = lambda: dict(twin.named_parameters())
    published_decode(twin, z, zq).square().sum().backward()
    scale = torch.stack([p.grad.norm() for p in twin.parameters()]).median()  # some gradients are zero, except for rounding
    for (name, ours), theirs in zip(decoder.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-10 * (theirs.grad.norm() + scale), name


def test_torch_compile_fullgraph():
    decoder = make_decoder(ch_mult=(1, 1), num_res_blocks=0)
    z, zq = latents()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    assert_close(compiled(z, zq), decoder(z, zq).double(), slack=10)
    assert_close(compiled(*latents((3, 5))), decoder(*latents((3, 5))).double(), slack=10)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_export(dynamic):
    decoder = make_decoder(ch_mult=(1, 1), num_res_blocks=0)
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    batch = torch.export.Dim("batch", min=1, max=8)
    sizes = {0: batch, 2: height, 3: width}
    program = torch.export.export(decoder, tuple(latents()), dynamic_shapes=(sizes, sizes) if dynamic else None)
    other = latents((5, 3), 3) if dynamic else latents()
    assert_close(program.module()(*other), decoder(*other).double(), slack=10)


def test_weights_written_without_autograd_take_effect():
    """Weight averaging and adapter merging write ``parameter.data``."""
    decoder, other, (z, zq) = make_decoder(), make_decoder(seed=1), latents()
    with torch.no_grad():
        decoder(z, zq)
        for parameter, value in zip(decoder.parameters(), other.parameters(), strict=True):
            parameter.data.copy_(value)
        assert torch.equal(decoder(z, zq), other(z, zq))


def test_latents_can_be_optimised_after_a_preview():
    decoder, (z, zq) = make_decoder().requires_grad_(False), latents()
    with torch.inference_mode():
        preview = decoder(z, zq)
    out = decoder(z.requires_grad_(), zq)
    out.sum().backward()
    assert z.grad is not None
    assert_close(preview, out.double(), slack=5)


def test_forward_mode_derivatives():
    decoder, (z, zq) = make_decoder().double().requires_grad_(False), latents(dtype=torch.float64)
    tangent = torch.randn_like(z)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        out = torch.autograd.forward_ad.unpack_dual(decoder(torch.autograd.forward_ad.make_dual(z, tangent), zq)).tangent
    step = 1e-5
    wanted = (decoder(z + step * tangent, zq) - decoder(z - step * tangent, zq)) / (2 * step)
    assert relative_error(out, wanted) < 1e-6


def test_meta_device():
    with torch.device("meta"):
        decoder = MOVQDecoder(**KANDINSKY)
    out = decoder(torch.empty(2, 4, 96, 64, device="meta"), torch.empty(2, 4, 96, 64, device="meta"))
    assert out.shape == (2, 3, 768, 512) and out.is_meta


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))], ids=["deepcopy", "pickle"]
)
def test_copies(twin_of):
    decoder = make_decoder()
    twin = twin_of(decoder)
    assert torch.equal(twin(*latents()), decoder(*latents()))
    with torch.no_grad():
        twin.conv_out.bias += 1
    assert not torch.equal(twin(*latents()), decoder(*latents()))


def test_ddp_averages_the_gradients(tmp_path):
    assert_ddp_averages_the_gradients(tmp_path, {})


def test_nothing_prints(capfd):
    make_decoder()(*latents())
    assert capfd.readouterr() == ("", "")


def test_nan_reaches_its_own_image_only():
    z, zq = latents()
    z[0, 0, 0, 0] = float("nan")
    out = make_decoder()(z, zq)
    assert out[0].isnan().all() and not out[1].isnan().any()


def test_non_contiguous_latents():
    decoder = make_decoder()
    z, zq = latents((6, 6))
    strided = (z.transpose(2, 3)[:, :, ::2], zq.transpose(2, 3)[:, :, ::2])
    assert not strided[0].is_contiguous()
    assert_close(decoder(*strided), decoder(*(x.contiguous() for x in strided)).double(), slack=10)
    assert_close(decoder(*(x.to(memory_format=torch.channels_last) for x in (z, zq))), decoder(z, zq).double(), slack=10)


def test_attention_only_where_asked():
    decoder = make_decoder(attn_resolutions=[16])
    assert [len(stage.attn) for stage in decoder.up] == [2, 0]
    assert isinstance(decoder.mid.attn_1, AttnBlock)


Z, ZQ = latents()
BAD = {
    "no tensor": (TypeError, "z must be a tensor, got list", ([1.0], ZQ)),
    "rank": (ValueError, r"z must have shape \(batch, 4, height, width\), got \(4, 4, 6\)", (Z[0], ZQ)),
    "channels": (ValueError, r"z must have shape \(batch, 4, height, width\), got \(2, 3, 4, 6\)", (Z[:, :3], ZQ)),
    "zq channels": (ValueError, r"zq must have shape \(batch, 5, height, width\), got \(2, 4, 4, 6\)", (Z, ZQ[:, :4])),
    "batch": (ValueError, "z and zq must have the same batch size: z has 2, zq has 1", (Z, ZQ[:1])),
    "no images": (ValueError, r"z must not be empty, got shape \(0, 4, 4, 6\)", (Z[:0], ZQ[:0])),
    "no height": (ValueError, r"zq must not be empty, got shape \(2, 5, 0, 6\)", (Z, ZQ[:, :, :0])),
    "dtype": (TypeError, "z must have the model's dtype torch.float32, got torch.float64", (Z.double(), ZQ.double())),
    "dtypes": (TypeError, "zq must have the model's dtype torch.float32, got torch.bfloat16", (Z, ZQ.bfloat16())),
    "integers": (TypeError, "z must have the model's dtype torch.float32, got torch.int64", (Z.long(), ZQ)),
    "device": (ValueError, "zq must be on the model's device cpu, got meta", (Z, ZQ.to("meta"))),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("method", ["forward", "forward_with_features_output"])
def test_decoder_refuses(case, method):
    error, message, arguments = BAD[case]
    with pytest.raises(error, match=message):
        getattr(make_decoder(num_res_blocks=0), method)(*arguments)


BAD_CONFIG = {
    "channels": ("channels must be divisible by the 32 groups of the norm, got 48 channels", dict(ch=48)),
    "no levels": (r"ch_mult must be .*, got \(\)", dict(ch_mult=())),
    "no channels": ("ch must be a positive integer, got 0", dict(ch=0)),
    "multiplier": (r"ch_mult must be .*, got \(1, 0\)", dict(ch_mult=(1, 0))),
    "blocks": ("num_res_blocks must not be negative, got -1", dict(num_res_blocks=-1)),
    "z": ("z_channels must be a positive integer, got 0", dict(z_channels=0)),
    "zq": ("zq_ch must be a positive integer, got -4", dict(zq_ch=-4)),
    "out": ("out_ch must be a positive integer, got 0", dict(out_ch=0)),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_decoder_refuses_config(case):
    message, change = BAD_CONFIG[case]
    with pytest.raises(ValueError, match=message):
        MOVQDecoder(**{**TINY, **change})


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_stay_in_channels_last(batch):
    """No map is copied to another layout between latents of any layout and the image, which is contiguous."""
    decoder, (z, zq) = make_decoder(), latents((8, 8), batch)
    layouts = {}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels >= 32:
            module.register_forward_pre_hook(lambda _, args, name=name: layouts.update({name: memory_format(args[0])}))
    with torch.no_grad(), Copies(batch, batch * 32 * 8 * 8) as copies:
        out = decoder(z, zq)
    assert len(layouts) > 8 and set(layouts.values()) == {torch.channels_last}, layouts
    assert copies.seen == [] and out.is_contiguous()


def test_every_map_is_in_channels_last():
    """Without hooks, which would change how the layers are computed."""
    with torch.no_grad():
        _, features = make_decoder().forward_with_features_output(*latents((8, 8), 1))
    assert {name: memory_format(x) for name, x in features.items()} == dict.fromkeys(FEATURES, torch.channels_last)


def memory_format(x):
    return torch._prims_common.suggest_memory_format(x)
