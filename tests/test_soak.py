"""Decodes again and again: nothing is kept that grows. MOVQ_EXT_CASES=10000 for so many decodes of each kind."""

import gc
import itertools
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movq_ext import MOVQDecoder, annotate, decode_tiled, profiling
from movq_ext.model import feature_maps

DECODES = int(os.environ.get("MOVQ_EXT_CASES", 150))
WARM_UP = 40
RSS_GROWTH = 24 << 20  # bytes: what the allocator may come to keep after the warm-up, whatever the number of decodes
SIZES = [(1, 1), (3, 5), (8, 4), (6, 6), (2, 9), (7, 1)]
LEAST = 43_008  # bytes for latents 4 wide: half of that holds less than one map of (1, 32, 48, 8)
SETTINGS = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), in_channels=3, resolution=32, z_channels=4
)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return MOVQDecoder(**{**SETTINGS, **changes}).eval()


def latents(height=4, width=4, batch=1, **options):
    return torch.randn(batch, 4, height, width, **options), torch.randn(batch, 4, height, width)


def tensors():
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.fixture
def files(monkeypatch):
    """How many temporary files were made."""
    made = itertools.count()
    real = feature_maps.tempfile.TemporaryFile
    monkeypatch.setattr(feature_maps.tempfile, "TemporaryFile", lambda *args, **options: (next(made), real(*args, **options))[1])
    return made


def usage():
    """Live tensors, open files, other objects, and bytes in memory."""
    while gc.collect():  # what earlier tests left may take more than one pass to go
        pass
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return tensors(), len(os.listdir("/proc/self/fd")), len(gc.get_objects()), resident


def soak(work, decodes=DECODES):
    """work(0), work(1), ...: after a warm-up nothing grows."""
    for i in range(WARM_UP):
        work(i)
    before = usage()
    for i in range(WARM_UP, WARM_UP + decodes):
        work(i)
    after = usage()
    for name, was, now in zip(("tensors", "open files"), before, after, strict=False):
        assert now <= was, f"{was} {name} became {now}"
    # Some objects torch and the interpreter keep.
    assert after[2] - before[2] < decodes // 4, f"{before[2]} objects became {after[2]}"
    assert after[3] - before[3] < RSS_GROWTH, f"{before[3]} bytes became {after[3]}"


@torch.no_grad()
def in_strips(decoder, i):
    decoder(*latents())


@torch.no_grad()
def of_changing_size(decoder, i):
    decoder(*latents(*SIZES[i % len(SIZES)], batch=1 + i % 3))


def in_files(decoder, i):
    decode_tiled(decoder, *latents(24, 4), max_memory=LEAST)


@torch.inference_mode()
def in_half_precision(decoder, i):
    z, zq = latents()
    decoder(z.half(), zq.half())


@torch.no_grad()
def under_autocast(decoder, i):
    with torch.autocast("cpu", torch.bfloat16):
        decoder(*latents())


def with_gradients(decoder, i):
    decoder(*latents(requires_grad=True)).square().mean().backward()
    decoder.zero_grad(set_to_none=True)


@torch.no_grad()
def with_features(decoder, i):
    decoder.forward_with_features_output(*latents())


@torch.no_grad()
def annotated(decoder, i):
    with annotate(decoder):
        decoder(*latents())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
@pytest.mark.parametrize(
    "work", [in_strips, of_changing_size, in_files, in_half_precision, under_autocast, with_gradients, with_features, annotated]
)
def test_decodes(work, files):
    decoder = make()
    if work is in_half_precision:
        decoder.half()
    soak(lambda i: work(decoder, i))
    assert not profiling._annotated and (next(files) >= DECODES) == (work is in_files)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
@pytest.mark.parametrize("how", ["in place", "data", "loaded"])
def test_weights_that_change_between_decodes(how):
    """What is derived of them is replaced, and right."""
    decoder, z, zq = make(), *latents()
    states = [make(seed).state_dict() for seed in range(2)]
    wanted = []
    for state in states:
        other = make()
        other.load_state_dict(state)
        with torch.no_grad():
            wanted.append([other(z, zq), other.forward_with_features_output(z, zq)[0]])

    @torch.no_grad()
    def work(i):
        state = states[i % 2]
        if how == "loaded":
            decoder.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        else:
            for name, parameter in decoder.named_parameters():
                if how == "data":
                    parameter.data = state[name].clone()
                else:
                    parameter.copy_(state[name])
        for got, expected in zip((decoder(z, zq), decoder.forward_with_features_output(z, zq)[0]), wanted[i % 2], strict=True):
            torch.testing.assert_close(got, expected)

    soak(work)


def test_parameters_that_take_the_place_of_dropped_ones():
    """The new one may have its predecessor's address and version, but has other values."""
    decoder = make()
    upsample = decoder.up[1].upsample
    x = torch.randn(1, 32, 5, 5)
    for _ in range(DECODES):
        upsample.conv.weight = None
        upsample.conv.weight = nn.Parameter(torch.randn(32, 32, 3, 3) / 17)
        for _ in range(2):
            upsample.conv.weight.data = torch.randn(32, 32, 3, 3) / 17
        with torch.no_grad():
            torch.testing.assert_close(upsample(x), upsample.conv(F.interpolate(x, scale_factor=2.0)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
def test_models_that_come_and_go():
    gone = []

    def work(i):
        decoder = make(i)
        with torch.no_grad(), annotate(decoder):
            decoder(*latents())
            decoder.forward_with_features_output(*latents())
        gone[:] = [*gone[-20:], weakref.ref(decoder), weakref.ref(decoder.conv_out.weight)]

    soak(work, DECODES // 3)
    assert all(ref() is None for ref in gone) and not profiling._annotated


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
@pytest.mark.parametrize("what", [ValueError, KeyboardInterrupt])
def test_decodes_that_fail(what, files):
    """Each at another layer: no file stays open, no range, no map."""
    decoder, calls = make(), itertools.count()
    fails_at = 0

    def fail(*_):
        if next(calls) == fails_at:
            raise what

    for conv in decoder.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.register_forward_hook(fail)

    def work(i):
        nonlocal calls, fails_at
        calls, fails_at = itertools.count(), i % 10
        with pytest.raises(what), annotate(decoder):
            decode_tiled(decoder, *latents(24, 4), max_memory=LEAST)

    soak(work)
    assert not profiling._annotated and not profiling._opened.ranges and next(files) >= DECODES // 2
