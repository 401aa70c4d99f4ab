"""HunyuanVideo's attention over frames, against diffusers' masked attention."""

import copy

import pytest
import torch
from accelerated_models import assert_same, randomised
from diffusers.models.attention_processor import AttnProcessor2_0
from tolerances import relative_error
from video_models import draw, hunyuan_video

from movq_ext import accelerate, restore
from movq_ext.diffusers.frame_attention import attend_to_earlier_frames

hunyuan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")


def block(channels=32, **changes):
    torch.manual_seed(0)
    defaults = dict(num_layers=2, attention_head_dim=channels, resnet_groups=4)
    return randomised(hunyuan.HunyuanVideoMidBlock3D(channels, **{**defaults, **changes})).double()


def clip(frames, batch=2, dtype=torch.float64):
    return draw(batch, 32, frames, 3, 4, dtype=dtype)


def forget_masks(monkeypatch):
    monkeypatch.setattr(hunyuan, "prepare_causal_attention_mask", None)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_results_and_gradients(frames, layout, monkeypatch):
    module, x, results = block(), clip(frames).contiguous(memory_format=layout).requires_grad_(), []
    for change in (lambda module: None, accelerate):
        report = change(module)
        out = module(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *module.parameters()], allow_unused=True)
        with torch.no_grad():
            results.append([out, module(x), *gradients])
        forget_masks(monkeypatch)  # ours builds none
    # The bias of the keys adds the same to all scores of a query, so its gradient is rounding.
    names = ["out", "out", "x", *(name for name, _ in module.named_parameters())]
    for name, ours, theirs in zip(names, results[1], results[0], strict=True):
        if not name.endswith("to_k.bias"):
            assert_same([ours], [theirs], slack=100)
    calls = report.calls()
    assert {calls[name].accelerated for name in ("HunyuanVideoMidBlock3D", "attentions.0", "attentions.1")} == {2}
    assert all(count.original == 0 for count in calls.values())


@torch.no_grad()
def test_no_frame_depends_on_later_ones():
    module, x = block(), clip(4)
    accelerate(module)
    layer = module.attentions[0]
    expected = attend_to_earlier_frames(layer, x)
    changed = x.clone()
    changed[:, :, 3] = x[:, :, 3].flip(2, 3)  # the norm's statistics stay
    out = attend_to_earlier_frames(layer, changed)
    assert_same([out[:, :, :3]], [expected[:, :, :3]])
    assert not torch.allclose(out[:, :, 3], expected[:, :, 3])


@torch.no_grad()
def test_attention_without_a_residual_and_with_a_factor(monkeypatch):
    module, x = block(), clip(2)
    module.attentions[0].residual_connection = False
    module.attentions[1].rescale_output_factor = 2.0
    expected = module(x)
    accelerate(module)
    forget_masks(monkeypatch)
    assert_same([module(x)], [expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes(dtype, monkeypatch):
    module, x = block().to(dtype), clip(3).to(dtype)
    expected, theirs = copy.deepcopy(module).double()(x.double()), module(x)
    accelerate(module)
    forget_masks(monkeypatch)
    ours = module(x)
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected)


@torch.no_grad()
def test_compiled(monkeypatch):
    module, x = block(), clip(3)
    expected = module(x)
    accelerate(module)
    forget_masks(monkeypatch)
    torch.compiler.reset()
    assert_same([torch.compile(module, fullgraph=True, backend="eager")(x)], [expected])


def test_gradient_checkpointing_is_left_to_diffusers():
    module, x = block().train(), clip(2)
    expected, report = module(x), accelerate(module)
    module.gradient_checkpointing = True
    module._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    assert_same([module(x)], [expected])
    assert report.calls()["HunyuanVideoMidBlock3D"].original == 1


@torch.no_grad()
def test_hooks_and_processors_set_later():
    module, x, seen = block(), clip(3), []
    report = accelerate(module)
    expected = module(x)
    hook = module.attentions[1].register_forward_hook(lambda *_: seen.append(1))
    assert_same([module(x)], [expected])
    assert seen == [1] and report.calls()["HunyuanVideoMidBlock3D"].original == 1
    hook.remove()
    module.attentions[0].set_processor(type("Other", (AttnProcessor2_0,), {})())
    assert_same([module(x)], [expected])
    assert report.calls()["HunyuanVideoMidBlock3D"].original == 2


@torch.no_grad()
def test_blocks_that_are_left_have_a_reason():
    for module, reason in (
        (block(attention_head_dim=16), "it has more than one head"),
        (block(add_attention=False), "it has no attention"),
    ):
        assert accelerate(module).skipped["HunyuanVideoMidBlock3D"] == reason


@torch.no_grad()
def test_the_whole_model(monkeypatch):
    model, z = hunyuan_video().double(), draw(1, 4, 2, 2, 3, dtype=torch.float64)
    theirs = model.decode(z).sample
    report = accelerate(model)
    assert "decoder.mid_block.attentions.0" in report.replaced["Attention"]
    ours = model.decode(z).sample
    assert_same([ours], [theirs], slack=100)
    assert report.calls()["decoder.mid_block"].accelerated == 1
    restore(model)
    assert torch.equal(model.decode(z).sample, theirs)
