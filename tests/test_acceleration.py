"""Models of diffusers with random weights, before and after `accelerate`."""

import gc
import pickle
import weakref

import pytest
import torch
from accelerated_models import (
    MODELS,
    SLACK,
    Counted,
    assert_equal,
    assert_same,
    decode,
    diffusers,
    encode,
    every_model,
    kl,
    latents,
    levels,
    outputs,
    randomised,
    vq,
)
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from tolerances import RELATIVE, relative_error
from torch import nn

import movq_ext
from movq_ext import AccelerationReport, accelerate, restore
from movq_ext.diffusers import acceleration
from movq_ext.model import fusion

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# Results


@every_model
@torch.no_grad()
def test_results_are_the_same_and_every_part_is_replaced(name):
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
def test_deferred_biases_are_added_by_the_next_kernel(name, monkeypatch):
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
def test_blocks_over_time_are_served():
    torch.manual_seed(0)
    model = randomised(diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1, sample_size=16
    ))  # fmt: skip
    z = torch.randn(2, 4, 4, 4)
    expected = model.decode(z, num_frames=2).sample
    report = accelerate(model)
    temporal = {name for name, module in model.named_modules() if type(module).__name__ == "TemporalResnetBlock"}
    assert set(report.replaced["TemporalResnetBlock"]) == temporal and not report.skipped
    assert_same([model.decode(z, num_frames=2).sample], [expected])
    assert all(report.calls()[name].accelerated == 1 for name in temporal)


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


@pytest.mark.parametrize(("make", "operator"), [(vq, "baddbmm"), (kl, "conv_transpose2d")])  # of spatial norms, of upsampling
@torch.no_grad()
def test_compile(make, operator):
    graphs = []

    def backend(module, inputs):
        graphs.append(module.code)
        return module.forward

    model = make(block_out_channels=(32,), **levels(False)) if make is vq else make()
    expected, z = decode(model, latents(model)), latents(model)
    accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(lambda z: decode(model, z), fullgraph=True, backend=backend)
    assert_same([compiled(z)], [expected])
    restore(model)
    assert_same([compiled(z)], [expected])
    assert [operator in graph for graph in graphs] == [True, False]


# Classes and state of the model


@every_model
@torch.no_grad()
def test_restore_gives_back_the_original_model(name):
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
def test_accelerate_keeps_parameters_names_and_files(tmp_path):
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
def test_weight_changes_take_effect():
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


# Unsupported parts


def test_unsupported_parts_are_skipped_with_a_reason():
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


@pytest.mark.parametrize("path", ["decoder", "encoder", "decoder.mid_block.resnets.0", "decoder.conv_norm_out"])
@pytest.mark.parametrize("accelerate_first", [False, True])
def test_subclasses_are_skipped_with_a_reason(path, accelerate_first):
    """Their forward may differ. A subclass of an accelerated class stays what it is, too, when its model is restored."""
    model = kl()
    if accelerate_first:
        accelerate(model)
    part = model.get_submodule(path)
    base, kind = type(part), type("Mine", (type(part),), {})
    part.__class__ = kind
    report = accelerate(model)
    assert report.skipped[path] == f"its class is Mine, a subclass of {base.__name__}"
    assert type(part) is kind and not any(path in names for names in report.replaced.values())
    restore(model)
    assert type(part) is kind


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
    with pytest.raises(ValueError, match=r"must have parts that can be accelerated, got AutoencoderTiny \(.* none of its"):
        accelerate(tiny, strict=True)
    assert accelerate(tiny) == AccelerationReport({}, {"AutoencoderTiny": "none of its parts can be accelerated"})
    restore(tiny)


OTHER_MODELS = {
    "AutoencoderKLWan": {"none of its parts can be accelerated"},
    "AutoencoderKLLTXVideo": {"none of its parts can be accelerated"},
    "AutoencoderKLQwenImage": {"none of its parts can be accelerated"},
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_models_without_supported_parts_are_reported(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers has no {name}")
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    classes = {path: type(module) for path, module in model.named_modules()}
    report = accelerate(model)
    assert report.replaced == {} == report.calls() and set(report.skipped.values()) == OTHER_MODELS[name]
    assert str(report).startswith("0 parts replaced")
    assert {path: type(module) for path, module in model.named_modules()} == classes
    with pytest.raises(ValueError, match=f"must have parts that can be accelerated, got {name}"):
        accelerate(model, strict=True)


HUNYUAN = dict(block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4)
MAGVIT = dict(block_out_channels=(32, 32), latent_channels=4, layers_per_block=1, down_block_types=("SpatialDownBlock3D",) * 2,
              up_block_types=("SpatialUpBlock3D",) * 2)  # fmt: skip


@torch.no_grad()
def test_parts_of_a_video_model_that_are_given_no_image_are_left():
    model = diffusers.AutoencoderKLHunyuanVideo(**HUNYUAN).eval()
    for half in (model.encoder, model.decoder):  # whose accelerated mid block computes the attention
        half.mid_block.forward = half.mid_block.forward
    report = accelerate(model)
    with Counted() as counted:
        model.decode(torch.randn(1, 4, 1, 2, 2))
    assert counted.calls == (0, 0, 0)
    assert {name for name, reason in report.skipped.items() if reason == "it works on maps with a time axis"} == {
        f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder")
    }


@pytest.mark.parametrize("name, config, block", [
    ("AutoencoderKLHunyuanVideo", HUNYUAN, "HunyuanVideoResnetBlockCausal3D"),
    ("AutoencoderKLMagvit", {**MAGVIT, "spatial_group_norm": False}, "EasyAnimateResidualBlock3D"),
    ("AutoencoderKLMagvit", {**MAGVIT, "spatial_group_norm": True}, "EasyAnimateResidualBlock3D"),
])  # fmt: skip
def test_blocks_of_other_video_models(name, config, block):
    torch.manual_seed(0)
    model, z = randomised(getattr(diffusers, name)(**config)), torch.randn(1, 4, 2, 3, 4).double()
    model.double()
    results = []
    for change in (lambda model: None, accelerate):
        report = change(model)
        out = model.decode(z.requires_grad_()).sample
        gradients = torch.autograd.grad(out.square().sum(), z)
        with torch.no_grad():
            results.append([out, model.decode(z).sample, *gradients])
    assert_same(results[1], results[0])
    counts = [report.calls()[part] for part in report.replaced[block] if part.startswith("decoder.")]
    assert counts and all(count.accelerated >= 2 and not count.original for count in counts)


# Counts of calls


@torch.no_grad()
def test_calls_are_counted_by_who_computed_them():
    model = vq()
    report = accelerate(model)
    names = [name for names in report.replaced.values() for name in names]
    assert set(report.calls()) == set(names)
    assert {(count.accelerated, count.original) for count in report.calls().values()} == {(0, 0)}
    for decodes in (1, 2):
        decode(model, latents(model))
        for name, count in report.calls().items():
            assert (count.accelerated, count.original) == (decodes if name.startswith("decoder") else 0, 0), name
    attention = "decoder.mid_block.attentions.0"
    model.get_submodule(attention).set_processor(SlicedAttnProcessor(1))
    before = report.calls()
    decode(model, latents(model))
    assert (report.calls()[attention].accelerated, report.calls()[attention].original) == (2, 1)
    assert before[attention].original == 0, "an earlier result must not change"


@torch.no_grad()
def test_a_report_does_not_hold_the_model():
    model = kl()
    report, part = accelerate(model), weakref.ref(model.decoder.conv_norm_out)
    outputs(model)
    del model
    gc.collect()
    assert part() is None and report.calls()["decoder.conv_norm_out"].accelerated == 1
    assert pickle.loads(pickle.dumps(report)).calls() == report.calls()


@torch.no_grad()
def test_calls_in_compiled_programs_are_not_counted():
    model = kl()
    report = accelerate(model)
    torch.compiler.reset()
    torch.compile(lambda z: decode(model, z), fullgraph=True, backend="eager")(latents(model))
    assert {count.accelerated for count in report.calls().values()} == {0}


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


def test_public_names():
    assert movq_ext.accelerate is acceleration.accelerate and movq_ext.restore is acceleration.restore
    assert movq_ext.AccelerationReport is acceleration.AccelerationReport
