"""Models of diffusers with random weights, before and after `accelerate`."""

import contextlib
import copy
import io
import pickle
import sys
from unittest import mock

import pytest
import torch
from tolerances import RELATIVE, relative_error
from torch import nn

import movq_ext
from movq_ext import accelerate, restore
from movq_ext.diffusers import acceleration, attention, norms, registry
from movq_ext.diffusers.accelerated import Accelerated
from movq_ext.model import fusion

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor, SpatialNorm  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from diffusers.models.upsampling import Upsample2D  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SLACK = 10  # a decode is some thirty operators


def randomised(model):
    """The norms start at one and zero, which would hide mistakes."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def levels(*attends):
    return {
        "down_block_types": [("Attn" if attends_ else "") + "DownEncoderBlock2D" for attends_ in attends],
        "up_block_types": [("Attn" if attends_ else "") + "UpDecoderBlock2D" for attends_ in reversed(attends)],
    }


def vq(**changes):
    torch.manual_seed(0)
    defaults = {"latent_channels": 4, "num_vq_embeddings": 64, "norm_type": "spatial", "block_out_channels": (32, 64)}
    return randomised(diffusers.VQModel(**{**defaults, **levels(False, True), **changes}))


def kl(**changes):
    torch.manual_seed(0)
    defaults = {"sample_size": 16, "block_out_channels": (32, 64)}
    return randomised(diffusers.AutoencoderKL(**{**defaults, **levels(False, False), **changes}))


MODELS = {
    "VQModel, spatial norm": vq,
    "VQModel, group norm": lambda: vq(norm_type="group"),
    "AutoencoderKL of SD": lambda: kl(layers_per_block=2),
    "AutoencoderKL of FLUX": lambda: kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
    "AutoencoderKL without attention": lambda: kl(mid_block_add_attention=False),
}
every_model = pytest.mark.parametrize("name", MODELS)


def latents(model, batch=2, size=(6, 4), dtype=torch.float32):
    channels = model.config.latent_channels
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def decode(model, z):
    return (model.decode(z, force_not_quantize=True) if isinstance(model, diffusers.VQModel) else model.decode(z)).sample


def encode(model, x):
    out = model.encode(x)
    return out.latents if hasattr(out, "latents") else out.latent_dist.mean


def outputs(model, dtype=torch.float32):
    x = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    return decode(model, latents(model, dtype=dtype)), encode(model, x)


def assert_same(actual, expected, slack=SLACK):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < slack * RELATIVE[theirs.dtype]


def assert_equal(actual, expected):
    assert all(map(torch.equal, actual, expected))


class Counted(contextlib.ExitStack):
    """Counts how often the operators of this package run."""

    def __enter__(self):
        self.norms = [self._wrap(module, "fused_spatial_norm") for module in (norms, attention)]
        self.attention, self.upsampling = self._wrap(attention, "attention"), self._wrap(torch.nn.functional, "conv_transpose2d")
        return super().__enter__()

    def _wrap(self, module, name):
        return self.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))

    @property
    def calls(self):
        """Number of calls of spatial norms, of attention and of upsampling."""
        return sum(norm.call_count for norm in self.norms), self.attention.call_count, self.upsampling.call_count


# Results


@every_model
@torch.no_grad()
def test_results_are_the_same_and_all_of_it_is_served(name):
    model = MODELS[name]()
    expected = outputs(model)
    report = accelerate(model)
    assert report.skipped == {}
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    attends = sum(isinstance(m, Attention) for m in model.modules())
    with Counted() as counted:
        actual = outputs(model)
    assert counted.calls == (norms, attends, 1)
    assert_same(actual, expected)


@every_model
@torch.no_grad()
def test_half_precision(name):
    model = MODELS[name]()
    exact = outputs(model)
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        theirs = outputs(model, dtype)
        accelerate(model)
        ours = outputs(model, dtype)
        restore(model)
        for our, their, true in zip(ours, theirs, exact, strict=True):
            assert our.dtype == dtype
            assert relative_error(our, true) < 1.5 * relative_error(their, true) + RELATIVE[dtype]


@every_model
def test_gradients_are_the_same(name):
    model, gradients = MODELS[name](), []
    for change in (None, accelerate):
        if change:
            change(model)
        model.zero_grad()
        z = latents(model).requires_grad_()
        sum(out.square().sum() for out in (decode(model, z), outputs(model)[1])).backward()
        gradients.append([z.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    theirs, ours = gradients
    assert len(ours) == len(theirs) > 10
    scale = max(g.norm() for g in theirs)
    for our, their in zip(ours, theirs, strict=True):  # the exact gradient of the keys' bias is zero: ours is rounding only
        assert (our - their).norm() < 1e-5 * their.norm() + 1e-7 * scale


@every_model
@torch.no_grad()
def test_biases_that_the_next_kernel_adds(name, monkeypatch):
    """As on a GPU, where the kernel after a convolution adds its bias."""
    model = MODELS[name]()
    expected = outputs(model)
    accelerate(model)
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    with Counted() as counted:
        actual = outputs(model)
    biased = [call for norm in counted.norms for call in norm.call_args_list if call.args[3].f_bias is not None]
    blocks = [m for m in model.modules() if hasattr(m, "conv_shortcut")]
    assert len(biased) == len(blocks) > 0
    assert_same(actual, expected)


@pytest.mark.parametrize("make", [vq, kl])
def test_gradients_of_norms_alone(make, monkeypatch):
    """The preceding convolutions are frozen, but must not defer their bias to a norm that records gradients."""
    model, gradients = make().requires_grad_(False), []
    weights = [p.requires_grad_() for name, p in model.decoder.named_parameters() if "norm2" in name]
    monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    for change in (lambda model: None, accelerate):
        change(model)
        gradients.append(torch.autograd.grad(decode(model, latents(model)).square().sum(), weights))
    assert_same(*reversed(gradients), 10 * SLACK)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("skip_time_act", [False, True])
def test_blocks_with_a_time_embedding(scale_shift, skip_time_act):
    torch.manual_seed(0)
    block = randomised(ResnetBlock2D(
        in_channels=32, out_channels=64, temb_channels=8, skip_time_act=skip_time_act, output_scale_factor=2.0,
        time_embedding_norm="scale_shift" if scale_shift else "default",
    ))  # fmt: skip
    x, temb = torch.randn(2, 32, 6, 5), torch.randn(2, 8)
    results = []
    for _ in range(2):
        with torch.no_grad():
            out = block(x, temb)
        leaves = [x.clone().requires_grad_(), temb.clone().requires_grad_()]
        results.append([out, *torch.autograd.grad(block(*leaves).square().sum(), leaves)])
        accelerate(block)
    assert_same(results[1], results[0])
    with pytest.raises((TypeError, ValueError, AttributeError)):
        block(x, None)  # as diffusers says it


@torch.no_grad()
def test_unet():
    torch.manual_seed(0)
    unet = randomised(diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=8, attention_head_dim=8, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ))  # fmt: skip
    arguments = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 2, 8)
    expected = unet(*arguments).sample
    report = accelerate(unet)
    assert len(report.replaced["ResnetBlock2D"]) > 5 and set(report.skipped.values()) == {"it has more than one head"}
    assert_same([unet(*arguments).sample], [expected])


@torch.no_grad()
def test_kvae():
    torch.manual_seed(0)
    if not hasattr(diffusers, "AutoencoderKLKVAE"):
        pytest.skip("diffusers has no KVAE")
    from diffusers.models.autoencoders.autoencoder_kl_kvae import KVAEDecoderSpatialNorm2D

    for add_conv in (False, True):
        norm = randomised(KVAEDecoderSpatialNorm2D(32, 4, add_conv))
        f, zq = torch.randn(2, 32, 8, 6), torch.randn(2, 4, 4, 3)
        expected = norm(f, zq)
        assert accelerate(norm).replaced == {"KVAEDecoderSpatialNorm2D": ["KVAEDecoderSpatialNorm2D"]}
        with Counted() as counted:
            assert_same([norm(f, zq)], [expected])
        assert counted.calls == (1, 0, 0)
    model = randomised(diffusers.AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2)))
    z = torch.randn(1, 4, 4, 4)
    expected = model.decode(z).sample
    accelerate(model)
    assert_same([model.decode(z).sample], [expected])


@torch.no_grad()
def test_what_works_on_video_is_left():
    torch.manual_seed(0)
    model = randomised(diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1, sample_size=16
    ))  # fmt: skip
    z = torch.randn(2, 4, 4, 4)
    expected = model.decode(z, num_frames=2).sample
    report = accelerate(model)
    temporal = {name for name, module in model.named_modules() if type(module).__name__ == "TemporalResnetBlock"}
    assert report.skipped == dict.fromkeys(temporal, "it works on maps with a time axis") and temporal
    assert_same([model.decode(z, num_frames=2).sample], [expected])


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (2, 3)])
@torch.no_grad()
def test_sizes_and_layouts(size):
    model = vq()
    z = latents(model, batch=1, size=size)
    expected = decode(model, z)
    accelerate(model)
    assert_same([decode(model, z)], [expected])
    model.to(memory_format=torch.channels_last)
    assert_same([decode(model, z.contiguous(memory_format=torch.channels_last))], [expected])


@torch.no_grad()
def test_autocast():
    for model in (vq(), kl()):
        exact, z = outputs(model), latents(model)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = outputs(model)
            accelerate(model)
            ours = outputs(model)
        for our, their, true in zip(ours, theirs, exact, strict=True):
            assert our.dtype == their.dtype
            assert relative_error(our, true) < 1.5 * relative_error(their, true) + RELATIVE[torch.bfloat16]
        assert decode(model, z).dtype == torch.float32


@torch.no_grad()
def test_slicing_and_tiling():
    model = kl()
    z, x = latents(model, size=(20, 12)), torch.randn(2, 3, 40, 24)
    for mode in ("slicing", "tiling"):
        getattr(model, f"enable_{mode}")()
        expected = decode(model, z), encode(model, x)
        accelerate(model)
        assert_same((decode(model, z), encode(model, x)), expected)
        getattr(model, f"disable_{mode}")()
        restore(model)


def test_gradient_checkpointing():
    model = kl().train()
    accelerate(model)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        z = latents(model).requires_grad_()
        decode(model, z).square().sum().backward()
        weights = model.decoder.conv_in.weight, model.decoder.mid_block.resnets[0].norm1.weight
        gradients.append([z.grad, *(weight.grad.clone() for weight in weights)])
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("make", [vq, kl])
@torch.no_grad()
def test_compile(make):
    model = make(block_out_channels=(32,), **levels(False)) if make is vq else make()
    expected, z = decode(model, latents(model)), latents(model)
    accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(lambda z: decode(model, z), fullgraph=True, backend="eager")
    assert_same([compiled(z)], [expected])
    restore(model)
    assert_same([compiled(z)], [expected])


# Classes, state and copies of the model


@every_model
@torch.no_grad()
def test_restored_is_what_it_was(name):
    model = MODELS[name]()
    expected = outputs(model)
    before = {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}
    report = accelerate(model)
    outputs(model)
    assert accelerate(model) == report
    for _ in range(2):
        restore(model)
        assert {path: (type(module), dict(vars(module))) for path, module in model.named_modules()} == before
        assert_equal(outputs(model), expected)


@torch.no_grad()
def test_parameters_names_and_files_stay(tmp_path):
    for i, model in enumerate((vq(), kl())):
        state, classes = model.state_dict(keep_vars=True), [type(m).__name__ for m in model.modules()]
        model.save_pretrained(tmp_path / f"before{i}")
        accelerate(model)
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(state) and all(now[key] is state[key] for key in state)
        assert [type(m).__name__ for m in model.modules()] == classes
        outputs(model)
        model.save_pretrained(tmp_path / f"after{i}")
        for file in sorted((tmp_path / f"before{i}").iterdir()):
            assert file.read_bytes() == (tmp_path / f"after{i}" / file.name).read_bytes()
        reloaded = type(model).from_pretrained(tmp_path / f"after{i}")
        ours = outputs(model)
        restore(model)
        assert_equal(outputs(reloaded), outputs(model))
        accelerate(reloaded)
        assert_equal(outputs(reloaded), ours)


@torch.no_grad()
def test_copies():
    for model in (vq(), kl()):
        for change in (accelerate, restore):
            change(model)
            expected = outputs(model)
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
                assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
                assert_equal(outputs(other), expected)
                other.decoder.up_blocks[0].upsamplers[0].conv.weight.mul_(2)
                assert not torch.equal(outputs(other)[0], expected[0])
                assert_equal(outputs(model), expected)


@torch.no_grad()
def test_weights_that_change_are_seen():
    model = kl()
    accelerate(model)
    outputs(model)
    for change in (lambda p: p.mul_(1.5), lambda p: setattr(p, "data", p.data * 0.5)):
        change(model.decoder.up_blocks[0].upsamplers[0].conv.weight)
        ours = outputs(model)
        restore(model)
        assert_same(ours, outputs(model))
        accelerate(model)
    model.to(torch.float64)
    assert outputs(model, torch.float64)[0].dtype == torch.float64


# Layers that others changed


class Doubled(nn.Conv2d):
    """A stand-in for LoRA, quantisation and similar changes."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def put_in(parent, name, kind):
    layer = getattr(parent, name)
    new = kind.__new__(kind)
    new.__dict__ = layer.__dict__
    setattr(parent, name, new)


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_layers_that_were_replaced_are_called(first):
    model = vq()
    plain = outputs(model)
    if first:
        accelerate(model)
    block, attention = model.decoder.mid_block.resnets[0], model.decoder.mid_block.attentions[0]
    for parent, name, kind in (
        (block, "conv1", Doubled), (block, "conv2", Doubled), (block.norm1, "conv_y", Doubled),
        (attention, "to_q", DoubledLinear), (attention.to_out, "0", DoubledLinear),
        (model.decoder.up_blocks[0].upsamplers[0], "conv", Doubled), (model.encoder.mid_block.resnets[0], "conv2", Doubled),
    ):  # fmt: skip
        put_in(parent, name, kind)
    if not first:
        accelerate(model)
    ours = outputs(model)
    restore(model)
    theirs = outputs(model)
    assert_same(ours, theirs)
    assert relative_error(theirs[0], plain[0]) > 1e-2 and relative_error(theirs[1], plain[1]) > 1e-2


@pytest.mark.parametrize("kind", ["Conv2d", "GroupNorm", "SpatialNorm", "SiLU", "Linear", "ResnetBlockCondNorm2D", "Attention"])
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_hooks_run_and_see_what_they_saw(kind, first):
    model = vq()
    seen = []

    def hook(module, inputs, output):
        seen.append((names[module], inputs[0].shape, output.shape))

    names = {module: name for name, module in model.named_modules() if type(module).__name__ == kind}
    if first:
        accelerate(model)
    for module in names:
        module.register_forward_hook(hook)
    if not first:
        accelerate(model)
    outputs_ours = outputs(model)
    ours = list(seen)
    seen.clear()
    restore(model)
    assert_same(outputs_ours, outputs(model))
    assert seen == ours and len(seen) >= len(names) > 1


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_layerwise_casting(first):
    """diffusers stores weights in a smaller dtype, and converts them in a forward that it sets on most layers."""
    model = kl()
    if first:
        accelerate(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    if not first:
        accelerate(model)
    with Counted() as counted:
        ours = outputs(model)
    assert counted.calls[:2] == (sum(isinstance(m, nn.GroupNorm) for m in model.modules()), 2)
    restore(model)
    assert_same(ours, outputs(model))


@torch.no_grad()
def test_a_forward_on_the_instance():
    model = kl()
    expected = outputs(model)
    block = model.decoder.mid_block.resnets[0]
    block.forward = block.forward
    report = accelerate(model)
    assert report.skipped == {"decoder.mid_block.resnets.0": "its forward was replaced (by offloading, or a patch)"}
    restore(model)
    del block.forward
    accelerate(model)
    for module in model.modules():  # as offloading does to save the original forward
        if isinstance(module, Accelerated):
            module.forward = module.forward
    with Counted() as counted:
        assert_same(outputs(model), expected)
    assert min(counted.calls) > 0
    assert accelerate(model).skipped == {}
    restore(model)
    assert_equal(outputs(model), expected)


@torch.no_grad()
def test_attention_processors():
    model = kl()
    accelerate(model)
    expected, processors = outputs(model), model.attn_processors
    with Counted() as counted:
        model.set_attn_processor(SlicedAttnProcessor(1))
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 0
        model.set_default_attn_processor()
        assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor}
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 2
        model.set_attn_processor(dict(processors))
        model.fuse_qkv_projections()
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 2
        model.unfuse_qkv_projections()
        assert_same(outputs(model), expected)
        assert counted.calls[1] == 4
    model.set_attn_processor(SlicedAttnProcessor(1))
    assert set(accelerate(model).skipped.values()) == {"its processor is SlicedAttnProcessor"}


@torch.no_grad()
def test_attention_to_something_else_is_diffusers():
    torch.manual_seed(0)
    attention = Attention(32, heads=1, dim_head=32, bias=True).eval()
    x = torch.randn(2, 32, 3, 5)
    others = dict(encoder_hidden_states=torch.randn(2, 7, 32)), dict(attention_mask=torch.zeros(2, 1, 15).bernoulli_() * -1e4)
    expected = [attention(x, **other) for other in others] + [attention(x.flatten(2).mT)]
    plain = attention(x)
    accelerate(attention)
    assert_equal([attention(x, **other) for other in others] + [attention(x.flatten(2).mT)], expected)
    assert_same([attention(x)], [plain])


@torch.no_grad()
def test_one_latent_for_all_is_diffusers():
    norm = SpatialNorm(32, 4)
    f, zq = torch.randn(2, 32, 4, 6), torch.randn(1, 4, 2, 3)
    expected = norm(f, zq)
    accelerate(norm)
    assert torch.equal(norm(f, zq), expected)
    assert_same([norm(f[:1], zq)], [expected[:1]])


@torch.no_grad()
def test_upsampling_to_a_size_is_diffusers():
    upsample = Upsample2D(4, use_conv=True)
    x = torch.randn(1, 4, 3, 5)
    expected = upsample(x, (7, 9))
    accelerate(upsample)
    assert torch.equal(upsample(x, (7, 9)), expected)


def test_parts_of_other_kinds_are_left_with_a_reason():
    blocks = nn.ModuleDict({
        "good": ResnetBlock2D(in_channels=32, temb_channels=None),
        "mish": ResnetBlock2D(in_channels=32, temb_channels=None, non_linearity="mish"),
        "down": ResnetBlock2D(in_channels=32, temb_channels=None, down=True),
        "norm": ResnetBlock2D(in_channels=32, temb_channels=None),
        "wide": Attention(544, heads=1, dim_head=544),
        "rms": Attention(32, heads=1, dim_head=32, qk_norm="rms_norm"),
        "hook": ResnetBlock2D(in_channels=32, temb_channels=None),
        "cond": Attention(32, heads=1, dim_head=32, spatial_norm_dim=4),
        "bare": Upsample2D(4),
        "large": Upsample2D(4, use_conv=True, kernel_size=5, padding=2),
    })  # fmt: skip
    blocks["norm"].norm2 = nn.Identity()
    blocks["cond"].spatial_norm = nn.Identity()
    blocks["hook"].nonlinearity.register_forward_hook(lambda *_: None)
    report = accelerate(blocks)
    assert report.replaced == {"ResnetBlock2D": ["good"]}
    assert report.skipped == {
        "mish": "its activation is Mish, not SiLU",
        "down": "it resamples between its norm and its convolution",
        "norm": "its norm2 is Identity, not GroupNorm",
        "wide": "its head is larger than 512",
        "rms": "it normalises its queries, or does not scale its scores",
        "cond": "its spatial_norm is Identity, not SpatialNorm",
        "hook": "its activation is hooked or patched",
        "bare": "it is not a nearest upsampling and a convolution",
        "large": "its convolution is replaced, hooked or not a padded 3x3",
    }
    lines = str(report).splitlines()
    assert lines[:3] == ["1 parts replaced", "  ResnetBlock2D (1): good", "9 parts skipped"] and len(lines) == 12


# Pipelines and errors


def pipeline():
    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, vae, text_encoder, scheduler):
            super().__init__()
            self.register_modules(vae=vae, text_encoder=text_encoder, scheduler=scheduler)

    return Pipeline(kl(), nn.Linear(2, 2), diffusers.DDIMScheduler())


@torch.no_grad()
def test_pipeline():
    pipe = pipeline()
    expected = outputs(pipe.vae)
    report = accelerate(pipe)
    assert report.skipped == {"text_encoder": "none of its parts can be accelerated"}
    assert report.replaced["Upsample2D"] == ["vae.decoder.up_blocks.0.upsamplers.0"]
    assert "  ResnetBlock2D (10): vae.encoder.down_blocks.0.resnets.0, " in str(report) and " and 7 more" in str(report)
    assert_same(outputs(pipe.vae), expected)
    restore(pipe)
    assert_equal(outputs(pipe.vae), expected)


def test_errors():
    for given in (3, None, object()):
        for function in (accelerate, restore):
            with pytest.raises(TypeError, match=rf"must be a torch\.nn\.Module or a .* got {type(given).__name__}"):
                function(given)
    widths = dict(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4))
    tiny = diffusers.AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **widths)
    with pytest.raises(ValueError, match=r"must have parts that can be accelerated, got AutoencoderTiny \(none of its"):
        accelerate(tiny)
    restore(tiny)


def test_without_diffusers(monkeypatch):
    monkeypatch.setattr(acceleration, "accelerated_classes", registry.accelerated_classes.__wrapped__)
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_processor", None)
    with pytest.raises(ImportError, match="accelerate needs diffusers: pip install diffusers"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = registry.nothing


# On a GPU


@needs_gpu
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_on_a_gpu(name, dtype, memory_format):
    model = MODELS[name]().cuda().double()
    z = latents(model, size=(12, 8)).cuda()
    exact = decode(model, z.double())
    model.to(dtype).to(memory_format=memory_format)
    theirs = decode(model, z.to(dtype))
    accelerate(model)
    ours = decode(model, z.to(dtype))
    assert ours.dtype == dtype
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact) + RELATIVE[dtype]


@needs_gpu
@every_model
def test_gradients_on_a_gpu(name):
    model = MODELS[name]().cuda()
    gradients = []
    for change in (lambda model: None, accelerate):
        change(model)
        z = latents(model).cuda().requires_grad_()
        decode(model, z).square().sum().backward()
        gradients.append(z.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_names():
    assert movq_ext.accelerate is acceleration.accelerate and movq_ext.restore is acceleration.restore
    assert movq_ext.AccelerationReport is acceleration.AccelerationReport
