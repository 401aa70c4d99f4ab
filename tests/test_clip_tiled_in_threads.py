"""decode_clip_tiled with threads that compute strips of their own: one meeting per layer, within the memory limit."""

import threading
import time

import pytest
import torch
import torch.nn.functional as F
from spies import record_calls
from tolerances import assert_close
from torch import nn
from video_models import cogvideox, latent

from movq_ext import decode_clip_tiled
from movq_ext.diffusers import clip_strips
from movq_ext.model.feature_maps import FeatureMap
from movq_ext.model.strip_spans import HALO
from movq_ext.model.working_memory import WorkingMemory

pytestmark = pytest.mark.usefixtures("small_maps_in_threads")

SIZE, LITTLE, PLENTY = (7, 3), 600_000, 1 << 28  # bytes: LITTLE takes several strips for each of two threads, and files


def decode(model, z):
    with torch.no_grad():
        return model.decode(z).sample


@pytest.mark.parametrize("count, max_memory", [(2, LITTLE), (2, PLENTY), (3, PLENTY)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_match_the_whole_decode(runs, count, max_memory, dtype):
    model, z = cogvideox().to(dtype), latent(5, size=SIZE, dtype=dtype)
    torch.set_num_threads(1)
    # In bfloat16 the errors of both are as large as the tolerance.
    is_exact = dtype == torch.float32
    expected = decode(cogvideox().double(), z.double()) if is_exact else decode_clip_tiled(model, z, max_memory=PLENTY)
    assert not runs
    torch.set_num_threads(count)
    out = decode_clip_tiled(model, z, max_memory=max_memory)
    assert max(runs) in range(2, count + 1)
    assert_close(out, expected, slack=5)


def test_one_meeting_per_layer(runs):
    model, batches = cogvideox(), 2
    torch.set_num_threads(2)
    decode_clip_tiled(model, latent(4, size=SIZE), max_memory=PLENTY)
    convolutions = sum(isinstance(m, nn.Conv3d) and m.kernel_size[0] == 3 for m in model.decoder.modules())
    layers = convolutions + len(clip_strips.upsamplers(model.decoder))
    assert len(runs) == 1 + batches * layers and runs.count(2) == batches * layers


@pytest.mark.parametrize("max_memory", [LITTLE, PLENTY])
def test_the_order_of_the_strips_changes_no_bit(monkeypatch, max_memory):
    """The first strip of each map waits until others are done."""
    model, z, reserve = cogvideox(), latent(4, size=SIZE), FeatureMap.reserve
    torch.set_num_threads(2)
    expected = decode_clip_tiled(model, z, max_memory=max_memory)

    def late_reserve(self, first, last):
        time.sleep(0.01 if first == 0 else 0)
        return reserve(self, first, last)

    monkeypatch.setattr(FeatureMap, "reserve", late_reserve)
    assert torch.equal(decode_clip_tiled(model, z, max_memory=max_memory), expected)


def test_every_operator_is_single_threaded(monkeypatch):
    seen = [
        record_calls(monkeypatch, owner, name, lambda *_, **__: (torch.get_num_threads(), threading.current_thread().name))
        for owner, name in (
            (clip_strips.CausalConvolution, "__init__"), (clip_strips.CausalConvolution, "__call__"),
            (clip_strips.NormalisedClip, "__init__"), (F, "conv_transpose2d"), (FeatureMap, "commit_unmeasured"),
        )
    ]  # fmt: skip
    torch.set_num_threads(2)
    decode_clip_tiled(cogvideox(), latent(3, size=SIZE), max_memory=PLENTY)
    assert torch.get_num_threads() == 2
    assert all({count for count, _ in calls} == {1} for calls in seen)
    assert all(name != threading.main_thread().name for calls in seen for _, name in calls)


def test_hooks_of_other_layers_run_in_the_caller():
    """They need not be thread-safe."""
    model, seen = cogvideox(use_post_quant_conv=True, out_channels=4), []
    assert model.post_quant_conv is not None
    model.post_quant_conv.register_forward_hook(lambda *_: seen.append(threading.get_ident()))
    torch.set_num_threads(2)
    decode_clip_tiled(model, latent(3, size=SIZE), max_memory=PLENTY)
    assert set(seen) == {threading.get_ident()}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("factor", [1, 2, 5])
def test_threads_share_the_memory_limit(monkeypatch, count, factor):
    """The strips that threads compute at once, with their halos."""
    model, z = cogvideox(), latent(3, size=SIZE)
    with pytest.raises(ValueError) as error:
        decode_clip_tiled(model, z, max_memory=1)
    limit = factor * int(next(word for word in str(error.value).split() if word.isdigit()))
    describe = lambda spans, memory, x, values: (spans, memory.strip_workers(x, values), x, values)
    seen = record_calls(monkeypatch, WorkingMemory, "spans", describe)
    torch.set_num_threads(count)
    assert_close(decode_clip_tiled(model, z, max_memory=limit), decode(model.double(), z.double()), slack=5)
    for spans, workers, x, values in seen:
        rows = max(last - first for first, last in spans) + HALO
        assert min(workers, len(spans)) * rows * values * x.width * 4 <= limit // 2
    _, workers, _, _ = max(seen, key=lambda call: call[2].width * call[3])  # of the layer with the largest rows
    assert workers == min(count, max(1, factor // 2))
